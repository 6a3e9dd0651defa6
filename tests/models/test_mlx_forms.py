"""Guards that a model answers the same in every form its functions may have: mlx-lm's own greedy
tokens with attention and activation fused and in parts, whatever this machine would choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.run_mlx import GREEDY, complete, running
from support.tiny_mlx import VOCAB, build, own_greedy, write

from sixfold.platforms.mlx.substitution import called

FAMILIES = ("llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_5_moe", "granitemoehybrid")


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_mlx_lms_in_either_form(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, name)
    rng = np.random.default_rng(11)
    asked = [rng.integers(0, VOCAB, length).tolist() for length in (1, 9, 34, 70)]
    expected = own_greedy(path, asked, GREEDY.max_tokens or 0)
    for form in ("mlx-lm", "parts"):
        kernels = dict.fromkeys(called(build(name)), form)
        with running(path, kernels=kernels, max_step_tokens=67) as (engine, info):
            assert complete(engine, asked) == expected
        chosen = {d.what: (d.chosen, d.because) for d in info.decisions}
        for op in kernels:
            assert chosen[f"kernel {op}"] == (form, "named by the user")
