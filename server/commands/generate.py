"""`sixfold generate`."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("prompt")
@click.argument("model", default="")
@click.option("--platform", help="Hardware to run on; the best usable one if not given.")
@click.option("--dtype", help="Weights and activations: float32, bfloat16 or float16.")
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt into the chat template.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, help="Most tokens to generate.")
@click.option("--temperature", type=float, default=0.0, help="0 always takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, help="Share of probability to draw from.")
@click.option("--seed", type=int, help="Same seed, same text; random if not given.")
@click.option("--stop", multiple=True, help="End before this text (repeatable).")
def generate(
    prompt: str,
    model: str,
    platform: str | None,
    dtype: str | None,
    as_chat: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
) -> None:
    """Complete PROMPT ("-" reads it from standard input) with MODEL, or with the demo model."""
    from ...common.sampling import SamplingParams
    from ..llm import LLM
    from ..seeds import random_seed

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=random_seed() if seed is None else seed,
    )
    with LLM(model, platform=platform, dtype=dtype) as llm:
        wanted = llm.chat_prompt([{"role": "user", "content": text}]) if as_chat else text
        for piece in llm.stream(wanted, params, stop):
            click.echo(piece, nl=False)
            sys.stdout.flush()
    click.echo()
