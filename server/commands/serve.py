"""`sixfold serve`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...common.config import EngineConfig
from ...common.errors import ConfigError

if TYPE_CHECKING:
    from ...common.messages import Loading
    from ..early_engine import EarlyEngine
    from ..run import ServeOptions
    from ..service import Service


def _kernels(pairs: tuple[str, ...]) -> dict[str, str]:
    kernels = {}
    for pair in pairs:
        op, separator, provider = pair.partition("=")
        if not (op and separator and provider):
            raise ConfigError(f"--kernel wants op=provider, got {pair!r}.")
        kernels[op] = provider
    return kernels


def _bits(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """mlx-lm's users write 4bit and 8bit."""
    return {"4bit": "int4", "8bit": "int8"}.get(value or "", value)


def _engine_options(command: Any) -> Any:
    """The flags that are fields of EngineConfig."""
    options = [
        click.option("--platform", help="Hardware to run on; the best usable one if not given."),
        click.option("--dtype", help="Weights and activations: float32, bfloat16 or float16."),
        click.option("--device-index", type=int, default=0, help="Which device of the platform."),
        click.option("--max-context", type=int, help="Longest prompt plus completion, in tokens."),
        click.option("--page-size", type=int, help="Tokens in one page of the cache."),
        click.option("--cache-tokens", type=int, help="Size of the cache, in tokens."),
        click.option("--memory-fraction", type=float, help="Share of free memory to use, 0 to 1."),
        click.option("--max-rows", type=int, default=64, help="Most sequences in one step."),
        click.option("--max-step-tokens", type=int, default=2048, help="Most tokens in one step."),
        click.option("--max-queue", type=int, default=1024, help="Most waiting sequences."),
        click.option(
            "--no-prefix-cache", is_flag=True, help="Compute every prompt from its beginning."
        ),
        click.option("--eviction", default="lru", help="Cache eviction: lru, lfu or priority."),
        click.option(
            "--no-weight-cache", is_flag=True, help="Keep no packed weights for the next start."
        ),
        click.option("--no-overlap", is_flag=True, help="End each step before the next begins."),
        click.option("--threads", type=int, help="Threads for compute on a processor."),
        click.option(
            "--quantize",
            callback=_bits,
            help="Matrices as int8 (8bit), int4 (4bit), fp8, or none; else as stored.",
        ),
        click.option("--draft", help="Guess tokens: mtp or ngram, or ngram:5 for 5 in a step."),
        click.option("--graphs", help="Capture steps and replay them: on or off."),
        click.option("--kv-dtype", help="Keys and values: float32, bfloat16, float16 or int8."),
        click.option(
            "--kernel", "kernel", multiple=True, help="Name an op's kernel as op=provider."
        ),
        click.option("--strict", is_flag=True, help="Refuse to start with a generic fallback."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("model", default="")
@_engine_options
@click.option("--explain", is_flag=True, help="Load, print every decision, and exit.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port; 0 takes a free one.")
@click.option("--api-key", multiple=True, help="Accept only requests with this key (repeatable).")
@click.option("--served-model-name", help="Name of the model in the API.")
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False),
    help="Jinja file to use instead of the model's own template.",
)
@click.option(
    "--max-body-bytes", type=click.IntRange(1), default=2**25, help="Largest request body."
)
@click.option("--fetch-images", is_flag=True, help="Fetch http and https URLs of image parts.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    default=30.0,
    help="Seconds that running requests get after SIGTERM.",
)
@click.option(
    "--log-level",
    type=click.Choice(["error", "warning", "info", "debug"]),
    default="info",
    help="How much to log.",
)
def serve(model: str, **flags: Any) -> None:
    """Serve MODEL: a directory, a .gguf file or a hub id; the bundled demo model if not given."""
    draft, draft_tokens = _draft(flags["draft"])
    config = EngineConfig(
        model=model,
        draft=draft,
        draft_tokens=draft_tokens,
        kernels=_kernels(flags["kernel"]),
        prefix_cache=not flags["no_prefix_cache"],
        overlap=not flags["no_overlap"],
        weight_cache=not flags["no_weight_cache"],
        **{
            name: flags[name]
            for name in (
                "platform dtype device_index max_context page_size cache_tokens memory_fraction "
                "max_rows max_step_tokens max_queue eviction threads quantize kv_dtype graphs "
                "strict"
            ).split()
        },
    )
    if flags["explain"]:
        _explain(config)
        return
    _serve(config, flags)


def _draft(text: str | None) -> tuple[str | None, int]:
    """NAME or NAME:TOKENS -> who guesses, and how many tokens in a step at most."""
    name, colon, count = (text or "").partition(":")
    if colon and not count.isdecimal():
        raise ConfigError(f"--draft {text}: behind the colon stands a number, as in ngram:5.")
    return name or None, int(count) if colon else EngineConfig().draft_tokens


def _explain(config: EngineConfig) -> None:
    from ..explain import render
    from ..launch import build, locate

    launched = build(config, locate(config.model))
    try:
        click.echo(render(launched.decisions))
    finally:
        launched.engine.close()


def _serve(config: EngineConfig, flags: dict[str, Any]) -> None:
    from ..early_engine import EarlyEngine

    early = EarlyEngine(config, flags["log_level"])
    try:
        code = _serve_with(early, config, flags)
    finally:
        early.close()
    sys.exit(code)


def _serve_with(early: EarlyEngine, config: EngineConfig, flags: dict[str, Any]) -> int:
    import logging

    from ..import_heap import uncollected

    with uncollected():
        from ..listener import bind
        from ..run import ServeOptions, serve
        from ..service import HttpOptions

    level = flags["log_level"]
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")
    # Uvicorn's own notes (started, shutting down) are about its insides.
    logging.getLogger("uvicorn").setLevel("DEBUG" if level == "debug" else "WARNING")
    template = flags["chat_template"]
    options = ServeOptions(
        engine=config,
        http=HttpOptions(flags["api_key"], flags["max_body_bytes"], flags["fetch_images"]),
        served_name=flags["served_model_name"],
        chat_template=Path(template).read_text("utf-8") if template else None,
        drain_seconds=flags["drain_timeout"],
        log_level=level,
    )
    listener = bind(flags["host"], flags["port"])
    with listener:
        return serve(options, listener, _Terminal(options), early)


NO_CHAT = "It has no chat template (--chat-template gives it one), so it completes text; paste:"


class _Terminal:
    """Reports to the person who typed the command."""

    def __init__(self, options: ServeOptions) -> None:
        from ..loading_bar import LoadingBar

        self._options = options
        self._bar = LoadingBar()

    def loading(self, message: Loading) -> None:
        self._bar.show(message)

    def ready(self, service: Service, address: str) -> None:
        self._bar.close()
        loaded = service.loaded
        chats = loaded.tokenizer.chat_template is not None
        what = "Open it in a browser to chat, or paste:" if chats else NO_CHAT
        click.echo(
            f"Sixfold serves {service.model} on {loaded.ready.platform} at {address} "
            f"(context {loaded.ready.max_context}). {what}\n\n"
            f"{_curl(service.model, address, bool(self._options.http.api_keys), chats)}\n"
        )

    def failed(self, sentence: str) -> None:
        self._bar.close()
        click.echo(f"Error: {sentence}", err=True)

    def draining(self, sequences: int) -> None:
        click.echo(f"Stopping: {sequences} running sequence(s) may finish.", err=True)


def _curl(model: str, address: str, key: bool, chats: bool) -> str:
    body: dict[str, object] = {"model": model}
    if chats:
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        body |= {"prompt": "The capital of France is", "max_tokens": 16}
    body["temperature"] = 0
    path = "chat/completions" if chats else "completions"
    header = " -H 'Authorization: Bearer YOUR_KEY'" if key else ""
    return (
        f"curl {address}/v1/{path} -H 'Content-Type: application/json'{header} "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
