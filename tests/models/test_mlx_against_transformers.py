"""Contract: checkpoints of Qwen3.5, dense and mixture of experts, in their published form
(multimodal nesting, zero-centred norms, fused experts), give transformers' greedy tokens on the MLX
platform: alone, batched, and after a restored state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.run_mlx import complete, running
from support.tiny_qwen3_5 import NAMES, greedy, write

from sixfold.common.sampling import SamplingParams

STEPS = 30


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_qwen3_5_greedy_tokens(tmp_path: Path, name: str) -> None:
    path, model = write(tmp_path, name)
    rng = np.random.default_rng(3)
    shared = rng.integers(2, 480, 40).tolist()
    prompts = [shared, shared + rng.integers(2, 480, 5).tolist(), rng.integers(2, 480, 9).tolist()]
    wanted = [greedy(model, prompt, STEPS) for prompt in prompts]
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    with running(path, page_size=16, max_step_tokens=32, kv_dtype=None) as (engine, info):
        assert complete(engine, prompts, params) == wanted
        before = engine.stats().cached_tokens
        assert complete(engine, prompts, params) == wanted
        assert engine.stats().cached_tokens > before, "no state was restored"
        kinds = {group.kind.value for group in info.groups}
        assert kinds == {"full", "recurrent"}
