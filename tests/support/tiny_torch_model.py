"""A three-layer torch model of a test's own, its source for TorchExecutor, and a dense oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from support.kernel_checks import cpu_facts
from torch import Tensor, nn

from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.models.base import Model
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.interface import EngineSpec, ExecutorInfo
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.interface_kv import CacheNeed, KVKind
from sixfold.platforms.interface_step import PageCopy, StepBatch, Want
from sixfold.platforms.torch_runtime.executor import TorchExecutor

VOCAB, HIDDEN, HEADS, KV_HEADS, DIM = 61, 32, 4, 2, 8
WINDOWS = (0, 6, 0)
POISON_TOKEN = 60
"""A step with this token raises; the model never samples it."""


class TinyModel(Model):
    """Attention with learned absolute positions, no rope, no feed-forward."""

    def __init__(self, ops: Any) -> None:
        super().__init__()
        self.ops = ops
        shapes = {"table": (VOCAB, HIDDEN), "places": (512, HIDDEN), "head": (VOCAB, HIDDEN)}
        for layer in range(len(WINDOWS)):
            shapes[f"qkv{layer}"] = ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)
            shapes[f"out{layer}"] = (HIDDEN, HEADS * DIM)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))

    def cache_needs(self) -> Sequence[CacheNeed]:
        return [CacheNeed(KVKind.WINDOW if w else KVKind.FULL, KV_HEADS, DIM, w) for w in WINDOWS]

    def attention_specs(self) -> Sequence[AttentionSpec]:
        return [AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5, w) for w in WINDOWS]

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        if bool((token_ids == POISON_TOKEN).any()):
            raise ValueError("poisoned")
        x = self.ops.embedding(token_ids, self.table) + self.places[positions]
        for layer in range(len(WINDOWS)):
            qkv = self.ops.linear(x, self.get_parameter(f"qkv{layer}"), None)
            q, k, v = qkv.view(len(x), -1, DIM).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
            attended = attend(layer, q, k, v).reshape(len(x), -1)
            x = x + self.ops.linear(attended, self.get_parameter(f"out{layer}"), None)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.ops.linear(hidden, self.head, None).float()
        logits[:, POISON_TOKEN] = -torch.inf
        return logits


class TinySource:
    """ModelSource with weights from a seed."""

    name = "tiny"
    vocab_size = VOCAB
    context_length = 256
    stored_dtype = "float32"

    def kernel_problems(self, dtype: str, quantize: str = "") -> Sequence[Problem]:
        return [Problem("embedding", dtype), Problem("linear", dtype, {"in": HIDDEN})]

    def build(self, ops: Any, dtype: torch.dtype, quantize: str = "") -> TinyModel:
        with torch.device("meta"):
            return TinyModel(ops)

    def load(self, model: Model, to_device: Any, progress: Any) -> None:
        rng = np.random.default_rng(5)
        for name, meta in list(model.named_parameters()):
            scale = 2.0 if name in ("table", "head") else meta.shape[-1] ** -0.5
            value = (rng.standard_normal(meta.shape) * scale).astype(np.float32)
            tensor = nn.Parameter(to_device(torch.from_numpy(value)), requires_grad=False)
            model.register_parameter(name, tensor)
            if progress is not None:
                progress(1, 2)


def tiny_executor(**changes: Any) -> TorchExecutor:
    spec = EngineSpec(**{"model_path": "", "max_rows": 8, "page_size": 4, **changes})
    device = CpuDevice(cpu_facts(), threads=1)
    return TorchExecutor(
        spec, device, lambda registry: register(registry, device), lambda _: TinySource()
    )


def dense_logits(tokens: Sequence[int]) -> np.ndarray:
    """(T, vocab) for one sequence, without pages, batches or kernels of the runtime."""
    from support.reference_kernels import reference_table

    model = TinySource().build(reference_table(), torch.float32)
    TinySource().load(model, lambda t: t, None)
    positions = torch.arange(len(tokens))
    distance = positions[:, None] - positions

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = distance >= 0
        if WINDOWS[layer]:
            seen &= distance < WINDOWS[layer]
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)

    with torch.inference_mode():
        hidden = model(torch.tensor(list(tokens)), positions, attend)
        return model.logits(hidden).numpy()


def dense_greedy(prompt: Sequence[int], steps: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(dense_logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class Driver:
    """The least scheduler: rows with pages of their own, in shuffled order."""

    def __init__(self, info: ExecutorInfo, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.info = info
        paged = [g for g in info.groups if g.kind is not KVKind.RECURRENT]
        self.free = {g.name: list(rng.permutation(np.arange(1, g.pages))) for g in paged}
        width = -(-info.max_context // info.page_size)
        self.tables = {g.name: np.zeros((info.max_rows, width), np.int32) for g in paged}
        self.slots = {
            g.name: rng.permutation(np.arange(1, g.pages, dtype=np.int32))[: info.max_rows]
            for g in info.groups
            if g.kind is KVKind.RECURRENT
        }
        self.lengths = np.zeros(info.max_rows, np.int32)
        self.steps = 0

    def batch(
        self,
        rows: Sequence[tuple[int, Sequence[int]]],
        want: Sequence[int] | None = None,
        params: Sequence[dict[str, Any]] | None = None,
        targets: Sequence[int] | None = None,
        moves: tuple[PageCopy, ...] = (),
        mask: Any = None,
    ) -> StepBatch:
        """rows: (handle, new tokens). Greedy and sampling unless said otherwise."""
        handles = np.array([handle for handle, _ in rows], np.int32)
        counts = np.array([len(tokens) for _, tokens in rows])
        for handle, count in zip(handles, counts, strict=True):
            self._grow(int(handle), int(self.lengths[handle] + count))
        pages = -(-int((self.lengths[handles] + counts).max()) // self.info.page_size)
        batch = StepBatch(
            step=self.steps,
            row_ids=handles,
            token_ids=np.concatenate([np.asarray(t, np.int32) for _, t in rows]),
            query_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            context_lens=self.lengths[handles].copy(),
            page_tables={name: t[handles, :pages] for name, t in self.tables.items()},
            want=np.array(want or [Want.SAMPLE] * len(rows), np.uint8),
            sampling=sampling_arrays(params or [{"temperature": 0.0}] * len(rows)),
            moves=moves,
            grammar_mask=mask,
            prompt_targets=None if targets is None else np.array(targets, np.int32),
            state_slots={name: slots[handles] for name, slots in self.slots.items()},
        )
        self.lengths[handles] += counts.astype(np.int32)
        self.steps += 1
        return batch

    def _grow(self, handle: int, length: int) -> None:
        for name, table in self.tables.items():
            for index in range(-(-length // self.info.page_size)):
                if index * self.info.page_size >= self.lengths[handle] and not table[handle, index]:
                    table[handle, index] = self.free[name].pop()
