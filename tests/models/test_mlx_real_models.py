"""Contract: on real weights the MLX platform gives mlx-lm's own 64 greedy tokens, and at each of
them transformers' float32 logits agree (teacher forcing, as in test_executor_real_models.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import make_prompt_cache
from support.real_oracles import GEMMA3, PROMPTS, SMOLLM2, STEPS, oracle_for
from support.run_mlx import complete, running

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.checkpoint.tokenizer import load_tokenizer
from sixfold.common.decisions import DecisionLog
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.mlx.loading import load_model

PARAMS = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)


def own_greedy(path: Path, prompt: list[int]) -> list[int]:
    model, _ = load_model(open_checkpoint(path), EngineSpec(str(path)), DecisionLog())
    mx.eval(model.parameters())
    cache = make_prompt_cache(model)
    new, made = prompt, []
    for _ in range(STEPS):
        new = [int(mx.argmax(model(mx.array([new]), cache=cache)[0, -1]))]
        made += new
    return made


def check(path: Path, config: Any) -> None:
    tokenizer = load_tokenizer(open_checkpoint(path))
    prompts = [tokenizer.encode(text) for text in (PROMPTS[0], PROMPTS[2])]
    with running(path, page_size=16, max_context=256) as (engine, _):
        together = complete(engine, prompts, PARAMS)
    assert together[0] == own_greedy(path, prompts[0])
    oracle = oracle_for(path, config)
    for prompt, ours in zip(prompts, together, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + ours[:-1]])).logits[0, len(prompt) - 1 :]
        np.testing.assert_array_equal(logits.argmax(-1).numpy(), ours)


@pytest.mark.wide
@pytest.mark.slow
def test_smollm2_135m() -> None:
    check(resolve_model(""), SMOLLM2)


@pytest.mark.slow
def test_gemma3_270m(gemma3_270m: Path) -> None:
    check(gemma3_270m, GEMMA3)
