"""Many requests at a time to one server, against each of them alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving import Running

SHARED = "The sea is made of water, and of what lives in it: "
PROMPTS = [
    SHARED[: 10 * (i % 5)] + chr(65 + i) * (1 + 3 * (i % 4)) + " and then" for i in range(16)
]
TOKENS = 10


def complete(client: Any, model: str, prompt: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were cached."""
    body = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    found = client.completions.create(model=model, prompt=prompt, **body)
    return found.choices[0].text, found.usage.prompt_tokens_details.cached_tokens


def check_crowd_of_sixteen(running: Running) -> list[str]:
    """Sixteen at a time get what each gets alone, and the prompts matter; the answers."""
    with running.openai() as client:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = list(pool.map(lambda p: complete(client, running.model, p), PROMPTS))
        alone = [complete(client, running.model, prompt) for prompt in PROMPTS]
    texts = [text for text, _ in alone]
    assert [text for text, _ in together] == texts
    assert len(set(texts)) > 8
    assert max(cached for _, cached in alone) >= 16
    return texts
