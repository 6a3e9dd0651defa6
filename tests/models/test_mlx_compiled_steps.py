"""Contract: compiled decode steps (`--graphs on`) give mlx-lm's own tokens, alone and in crowds
that grow and shrink, are traced once for each bucket and not for each step, and are refused with
the reason where a model cannot be traced or comes out differently."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.run_mlx import GREEDY, complete, running
from support.tiny_mlx import VOCAB, own_greedy, write

from sixfold.common.errors import ConfigError
from sixfold.platforms.mlx import executor
from sixfold.platforms.mlx.compiled_steps import CompiledSteps, bucket
from sixfold.platforms.mlx.trunk import SplitModel


@pytest.fixture(autouse=True)
def _compiling() -> Iterator[None]:
    """Compiling is on or off for the whole process."""
    yield
    mx.disable_compile()


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(0, VOCAB, length).tolist() for length in (1, 3, 9, 21, 34)]


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5"])
def test_tokens_are_mlx_lms(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = write(tmp_path / name, name), prompts()
    expected = own_greedy(path, asked, GREEDY.max_tokens or 0)
    made: list[CompiledSteps] = []

    def remembered(*args: object) -> CompiledSteps:
        made.append(CompiledSteps(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(executor, "CompiledSteps", remembered)
    with running(path, page_size=4, max_step_tokens=16, graphs="on") as (engine, info):
        assert complete(engine, asked) == expected
        assert [complete(engine, [prompt])[0] for prompt in asked] == expected
    decided = {d.what: d for d in info.decisions}
    assert decided["step"].chosen == "compiled"
    assert 0 < made[-1].traces <= 12  # by 1, 2, 4 and 8 rows and 4, 8 and 16 pages


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert [bucket(n, 4) for n in (1, 4, 5)] == [4, 4, 8]


def test_a_model_that_looks_at_its_numbers_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trunk = write(tmp_path / "llama", "llama"), SplitModel.trunk

    def looks(self: SplitModel, tokens: mx.array, caches: object) -> mx.array:
        assert int(tokens.max()) >= 0
        return trunk(self, tokens, caches)  # type: ignore[arg-type]

    monkeypatch.setattr(SplitModel, "trunk", looks)
    reason = r"--graphs on cannot be had: mx\.compile refuses"
    with pytest.raises(ConfigError, match=reason), running(path, graphs="on"):
        pass


def test_a_step_that_comes_out_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = write(tmp_path / "llama", "llama"), CompiledSteps.run
    monkeypatch.setattr(CompiledSteps, "run", lambda *args: 1.05 * run(*args))
    reason = r"a compiled step differs by 0\.05"
    with pytest.raises(ConfigError, match=reason), running(path, graphs="on"):
        pass
