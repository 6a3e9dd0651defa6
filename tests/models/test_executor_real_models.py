"""Contract: through TorchExecutor (shuffled pages, chunked prefill, rows batched with others, steps
overlapped) a real model's 64 greedy tokens in float32 equal transformers', token for token.

The proof is by teacher forcing, as in test_models_real_greedy.py: at every position of prompt and
continuation, transformers' argmax must be our next token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.kernel_checks import cpu_facts
from support.real_oracles import GEMMA3, LONG, PROMPTS, SMOLLM2, STEPS, oracle_for
from support.tiny_torch_model import Driver

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.checkpoint.tokenizer import load_tokenizer
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import LAST_TOKEN, Want
from sixfold.platforms.torch_runtime.executor import TorchExecutor


def continuations(path: Path, prompts: list[list[int]], chunk: int) -> list[list[int]]:
    """Greedy tokens of all prompts at once; row r joins r steps late, prefill goes by `chunk`."""
    spec = EngineSpec(
        str(path), dtype="float32", max_rows=len(prompts), max_context=1024, page_size=16
    )
    device = CpuDevice(cpu_facts(), threads=1)
    executor = TorchExecutor(spec, device, lambda registry: register(registry, device))
    try:
        driver = Driver(executor.load())
        plan: list[list[int]] = []  # rows that sample, step by step
        left, made = [list(p) for p in prompts], [0] * len(prompts)
        while min(made) < STEPS:
            rows, want = [], []
            for row in range(min(len(prompts), len(plan) + 1)):
                if made[row] == STEPS:
                    continue
                new, left[row] = left[row][:chunk] or [LAST_TOKEN], left[row][chunk:]
                rows.append((row, new))
                want.append(Want.NOTHING if left[row] else Want.SAMPLE)
                made[row] += bool(want[-1])
            executor.submit(driver.batch(rows, want))
            plan.append([row for row, _ in rows])
        found: list[list[int]] = [[] for _ in prompts]
        for rows_of_step in plan:
            result = executor.collect()
            for row, token in zip(rows_of_step, result.token_ids[:, 0].tolist(), strict=True):
                found[row] += [token] if token >= 0 else []
        return found
    finally:
        executor.close()


def check(path: Path, config: Any, texts: list[str], chunk: int) -> None:
    tokenizer = load_tokenizer(open_checkpoint(path))
    prompts = [tokenizer.encode(text) for text in texts]
    found = continuations(path, prompts, chunk)
    oracle = oracle_for(path, config)
    for text, prompt, ours in zip(texts, prompts, found, strict=True):
        assert len(ours) == STEPS
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + ours[:-1]])).logits[0, len(prompt) - 1 :]
        np.testing.assert_array_equal(logits.argmax(-1).numpy(), ours, err_msg=text)


@pytest.mark.wide
@pytest.mark.slow
def test_smollm2_135m() -> None:
    texts = [PROMPTS[0], PROMPTS[1], PROMPTS[3], LONG[:900]]
    check(resolve_model(""), SMOLLM2, texts, chunk=50)


@pytest.mark.slow
def test_gemma3_270m_beyond_its_window(gemma3_270m: Path) -> None:
    check(gemma3_270m, GEMMA3, [PROMPTS[0], LONG, PROMPTS[2]], chunk=200)
