"""Contract: a DeepSeek-V4 is served over HTTP on the cpu platform, and sixteen requests at a time
get what each gets alone: its caches of five kinds are kept apart and reused rightly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Launcher, Running
from support.tiny_deepseek_v4 import CONFIG, tensors, write
from toy_checkpoint import VOCABULARY, write_toy_checkpoint

SHARED = "The sea is made of water, and of what lives in it: "
PROMPTS = [
    SHARED[: 10 * (i % 5)] + chr(65 + i) * (1 + 3 * (i % 4)) + " and then" for i in range(16)
]


@pytest.fixture(scope="module")
def deepseek(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Running:
    path: Path = write_toy_checkpoint(tmp_path_factory.mktemp("models") / "tiny-v4")
    (path / "tokenizer_config.json").write_text("{}")  # and so no chat template of its own
    config = {**CONFIG, "vocab_size": VOCABULARY}
    write(path, tensors(config), config)
    sizes = ("--max-context", "256", "--cache-tokens", "2048", "--page-size", "16")
    return launcher.start(path, "--platform", "cpu", "--threads", "1", *sizes)


def complete(client: Any, prompt: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were cached."""
    body = {"max_tokens": 10, "temperature": 0, "extra_body": {"ignore_eos": True}}
    found = client.completions.create(model="tiny-v4", prompt=prompt, **body)
    return found.choices[0].text, found.usage.prompt_tokens_details.cached_tokens


def test_sixteen_at_a_time_get_what_each_gets_alone(deepseek: Running) -> None:
    with deepseek.openai() as client:
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda p: complete(client, p), PROMPTS))
        alone = [complete(client, prompt) for prompt in PROMPTS]
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert len({text for text, _ in alone}) > 8  # the prompts matter
    assert max(cached for _, cached in alone) >= 16


def test_a_chat_is_rendered_as_the_model_knows_it(deepseek: Running) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    with deepseek.openai() as client:
        found = client.chat.completions.create(
            model="tiny-v4", messages=messages, max_tokens=4, temperature=0
        )
    # In bytes: the beginning 29, the user's mark 12, "Hi", the assistant's 17, "</think>" 8.
    assert found.usage.prompt_tokens == 29 + 12 + 2 + 17 + 8
