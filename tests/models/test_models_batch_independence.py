"""Guards that a model's logits for a row that decodes are the same bits alone and in a batch, on
the native kernels with eight-bit weights: same seed, same tokens, whatever else is served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.kernel_checks import cpu_facts
from support.tiny_models import TINY, Tiny, save
from torch import Tensor

from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.cpu.native_attention import PART_KEYS
from sixfold.platforms.cpu.native_library import missing
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import StepBatch, Want
from sixfold.platforms.sampling_rows import no_sampling
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.model_runner import ModelRunner

pytestmark = pytest.mark.skipif(missing() is not None, reason="no native kernels here")
ROWS = 33
LONGEST = 3 * PART_KEYS
PAGE = 16
PAGES = -(-(LONGEST + 1) // PAGE)  # of a row


def page_table(window: int) -> np.ndarray:
    """Every row on pages of its own; behind a window they are used in turn, as few are kept."""
    kept = -(-window // PAGE) + 1 if window else PAGES
    return (1 + np.arange(ROWS)[:, None] * kept + np.arange(PAGES) % kept).astype(np.int32)


def decoding(first: int, last: int, windows: dict[str, int]) -> StepBatch:
    """Rows first..last of one batch of 33, each with its own context, pages and token. `windows`:
    of each cache group."""
    rng = np.random.default_rng(5)
    contexts = rng.integers(0, LONGEST, ROWS).astype(np.int32)
    tokens = rng.integers(0, 256, ROWS).astype(np.int32)
    part, count = slice(first, last), last - first
    return StepBatch(
        step=0,
        row_ids=np.arange(count, dtype=np.int32),
        token_ids=tokens[part],
        query_start=np.arange(count + 1, dtype=np.int32),
        context_lens=contexts[part],
        page_tables={name: page_table(window)[part] for name, window in windows.items()},
        want=np.full(count, int(Want.SAMPLE), np.uint8),
        sampling=no_sampling(count),
    )


def logits_of(runner: ModelRunner, batch: StepBatch) -> Tensor:
    ids, positions = (
        torch.from_numpy(x.astype(np.int64)) for x in (batch.token_ids, batch.context_lens)
    )
    return runner._model.logits(runner._step(batch, ids, positions)).clone()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3_moe"])
def test_logits_are_the_same_alone_and_in_a_batch(name: str, tmp_path: Path) -> None:
    tiny = Tiny(TINY[name].family, {**TINY[name].changes, "max_position_embeddings": 2048})
    path = save(tiny.model(), tmp_path)
    device = CpuDevice(cpu_facts(cores=2))
    spec = EngineSpec(
        str(path), dtype="float32", quantize="int8", page_size=PAGE,
        cache_tokens=ROWS * (LONGEST + 2 * PAGE), max_context=LONGEST + PAGE,
    )  # fmt: skip
    executor = TorchExecutor(spec, device, lambda registry: register(registry, device))
    info = executor.load()
    decided = {d.what: d.chosen for d in info.decisions}
    assert decided["kernel linear"] == decided["kernel attention"] == "native"
    runner = executor._runner
    assert runner is not None
    torch.manual_seed(2)
    for pool in executor.pools.values():
        pool.data.normal_()
    windows = {name: pool.group.window for name, pool in executor.pools.items()}
    for name, pool in executor.pools.items():
        assert page_table(windows[name]).max() < pool.group.pages
    alone = torch.cat([logits_of(runner, decoding(r, r + 1, windows)) for r in range(ROWS)])
    for batch in (2, 7, ROWS):
        assert torch.equal(logits_of(runner, decoding(0, batch, windows)), alone[:batch])
    executor.close()
