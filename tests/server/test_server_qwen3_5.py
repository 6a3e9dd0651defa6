"""Contract: Qwen3.5, dense and with experts, is served over HTTP on the cpu platform from the
published names: sixteen requests at a time get what each gets alone, which is transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from crowds import PROMPTS, TOKENS, check_crowd_of_sixteen
from seeing_checkpoint import write_seeing
from serving import Launcher, Running
from support.run_engine import one_thread
from support.tiny_qwen3_5 import NAMES, greedy
from toy_checkpoint import BYTES


@pytest.fixture(scope="module", params=NAMES)
def qwen(
    request: Any, launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Running, Any]:
    path: Path = tmp_path_factory.mktemp("models") / f"qwen-{request.param}"
    with one_thread():
        model = write_seeing(path, name=request.param)
    sizes = ("--max-context", "256", "--cache-tokens", "2048", "--page-size", "16")
    return launcher.start(path, "--platform", "cpu", "--threads", "1", *sizes), model


def test_sixteen_at_a_time_get_what_each_gets_alone(qwen: tuple[Running, Any]) -> None:
    """A byte is a token, so a text tells the tokens but for the special ones."""
    running, model = qwen
    texts = check_crowd_of_sixteen(running)
    with one_thread():
        for prompt, text in list(zip(PROMPTS, texts, strict=True))[::5]:
            made = greedy(model, list(prompt.encode()), TOKENS)
            assert bytes(t for t in made if t < BYTES).decode("utf-8", "replace") == text
