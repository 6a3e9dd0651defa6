"""Loads one of our models and runs it over a dense cache, as tests need it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dense_attend import DenseAttend
from reference_kernels import reference_table
from support.kernel_checks import cpu_facts, cpu_registry
from torch import Tensor

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.models.base import Model
from sixfold.models.loading import build_model, kernel_problems, load_weights
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.interface import EngineSpec, ExecutorInfo
from sixfold.platforms.interface_kernels import KernelTable
from sixfold.platforms.torch_runtime.executor import TorchExecutor


def load(path: Path, table: KernelTable | None = None, dtype: torch.dtype = torch.float32) -> Model:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, table or reference_table(), dtype)
    load_weights(model, checkpoint, lambda tensor: tensor)
    return model


def load_native(path: Path, quantize: str = "stored") -> Model:
    """On this machine's CPU kernels, matrices kept as `quantize` says."""
    checkpoint = open_checkpoint(path)
    problems = kernel_problems(checkpoint, "float32", quantize)
    table = cpu_registry().resolve(problems, cpu_facts(), {})
    model = build_model(checkpoint, table, torch.float32, quantize)
    load_weights(model, checkpoint, lambda tensor: tensor)
    return model


def load_on_cpu(path: Path, **fields: Any) -> ExecutorInfo:
    """What an executor decides when it loads the model with these fields of EngineSpec."""
    device = CpuDevice(cpu_facts(), threads=1)
    spec = EngineSpec(str(path), max_context=64, **fields)
    executor = TorchExecutor(spec, device, lambda registry: register(registry, device))
    try:
        return executor.load()
    finally:
        executor.close()


def logits(
    model: Model, token_ids: Tensor, chunks: Sequence[int] = (), last: int | None = None
) -> Tensor:
    """(T, vocabulary) for one sequence, given to the model in pieces of these sizes; of each
    piece's `last` tokens alone."""
    attend = DenseAttend(model.attention_specs())
    sizes = list(chunks) or [len(token_ids)]
    positions = torch.arange(len(token_ids))
    parts = zip(token_ids.split(sizes), positions.split(sizes), strict=True)
    with torch.inference_mode():
        first = 0 if last is None else -last
        return torch.cat([model.logits(model(t, p, attend)[first:]) for t, p in parts])
