"""Guards that devices which are emulated or interpreted serve the text that the CPU serves: the npu
platform over the emulator of torch_npu, those of GPUs with Triton's kernels interpreted, and xpu
with torch's in their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import NAMED, PATIENCE, Launcher, Running, arguments, install_hosted
from tiny_babbler import write_babbler

PROMPTS = ("The first card", "An other, longer prompt: " + "one page and more. " * 8)
INTERPRETED = ("interpreted_cuda", "interpreted_rocm", "interpreted_xpu")
TINY = ("--dtype", "float16", "--threads", "1", "--cache-tokens", "4096", "--max-context", "512")
DEMO = ("--dtype", "float32", "--threads", "2", "--cache-tokens", "2048", "--max-context", "512")


def wide(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.wide)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_babbler(tmp_path_factory.mktemp("models") / "tiny", max_context=512)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("patient"), PATIENCE)
    yield launcher
    launcher.close()


def answers(server: Running, tokens: int) -> list[str]:
    client = server.openai()
    made = [
        client.completions.create(
            model=server.model, prompt=prompt, max_tokens=tokens, temperature=0.0
        )
        for prompt in PROMPTS
    ]
    return [answer.choices[0].text for answer in made]


def text_of(launcher: Launcher, platform: str, *flags: str | Path, tokens: int) -> list[str]:
    named = arguments(NAMED.get(platform, {}))
    server = launcher.start(*flags, "--platform", platform, *named)
    try:
        return answers(server, tokens)
    finally:
        server.terminate()
        server.exit_code()


@pytest.mark.parametrize(
    "hosted", ["emulated_npu", "hosted_xpu", *(wide(name) for name in INTERPRETED)]
)
def test_text_is_the_cpus(hosted: str, launcher: Launcher, tiny: Path) -> None:
    install_hosted(launcher.folder / "env", hosted)
    plain = ("--kernel", "linear=generic", "--kernel", "attention=sdpa")
    want = text_of(launcher, "cpu", tiny, *TINY, *plain, tokens=8)
    assert all(want)
    assert text_of(launcher, hosted, tiny, *TINY, tokens=8) == want


@pytest.mark.wide
@pytest.mark.parametrize(
    ("hosted", "tokens"), [("emulated_npu", 12), ("hosted_xpu", 12), ("interpreted_xpu", 4)]
)
def test_the_demo_models_text_is_the_cpus(hosted: str, tokens: int, patient: Launcher) -> None:
    """In float32, whose sums differ least, by the kernels that the platform chooses."""
    install_hosted(patient.folder / "env", hosted)
    want = text_of(patient, "cpu", *DEMO, tokens=tokens)
    assert text_of(patient, hosted, *DEMO, tokens=tokens) == want
