"""Contract: a DeepSeek-V4 is served over HTTP on the cpu platform, and sixteen requests at a time
get what each gets alone: its caches of five kinds are kept apart and reused rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from crowds import check_crowd_of_sixteen
from serving import Launcher, Running
from support.tiny_deepseek_v4 import CONFIG, tensors, write
from toy_checkpoint import VOCABULARY, write_toy_checkpoint


@pytest.fixture(scope="module")
def deepseek(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Running:
    path: Path = write_toy_checkpoint(tmp_path_factory.mktemp("models") / "tiny-v4")
    (path / "tokenizer_config.json").write_text("{}")  # and so no chat template of its own
    config = {**CONFIG, "vocab_size": VOCABULARY}
    write(path, tensors(config), config)
    sizes = ("--max-context", "256", "--cache-tokens", "2048", "--page-size", "16")
    return launcher.start(path, "--platform", "cpu", "--threads", "1", *sizes)


def test_sixteen_at_a_time_get_what_each_gets_alone(deepseek: Running) -> None:
    check_crowd_of_sixteen(deepseek)


def test_a_chat_is_rendered_as_the_model_knows_it(deepseek: Running) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    with deepseek.openai() as client:
        found = client.chat.completions.create(
            model="tiny-v4", messages=messages, max_tokens=4, temperature=0
        )
    # In bytes: the beginning 29, the user's mark 12, "Hi", the assistant's 17, "</think>" 8.
    assert found.usage.prompt_tokens == 29 + 12 + 2 + 17 + 8
