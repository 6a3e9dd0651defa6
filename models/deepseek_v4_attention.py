"""Attention of DeepSeek-V4: queries and outputs of low rank, one vector that is key and value of
all heads, a window of tokens, and compressed entries of all tokens before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.checkpoint.block_floats import StoredMatrix
from ..platforms.interface_kernels import Problem
from ..platforms.interface_kv import CacheNeed, KVKind, StateArray
from .base import Step
from .deepseek_v4_args import DeepseekV4Args, Kind
from .layers import Build, HeadNorm, Layer, Linear, Norm

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Angles:
    """Of a step's tokens: cos and sin (T, R/2) each."""

    window: Rotary  # of layers without entries
    entries: Rotary  # of queries and keys in layers with entries
    completed: Mapping[int, Rotary]  # ratio -> of the entry that a token belongs to


@dataclass(frozen=True, slots=True)
class Sites:
    """Which caches of the model a layer has. In the order of `needs`."""

    window: int
    state: int = -1
    entries: int = -1
    index: int = -1

    @classmethod
    def of(cls, kind: Kind, first: int) -> Sites:
        count = {Kind.WINDOW: 1, Kind.DENSE: 3, Kind.SPARSE: 4}[kind]
        return cls(*range(first, first + count))


class Compressor(Layer):
    """Pools the projections of a layer's inputs into entries of `dim` channels."""

    def __init__(self, dim: int, ratio: int, overlap: bool, args: DeepseekV4Args, build: Build):
        super().__init__(build)
        width = (2 if overlap else 1) * dim
        self.projection = Linear(args.width, 2 * width, build)
        self.ape = build.parameter(ratio, width, dtype=torch.float32)
        self.norm = build.parameter(dim, dtype=torch.float32)
        self.dim, self.ratio, self.eps = dim, ratio, args.eps
        self.parts = width // dim

    @property
    def state(self) -> StateArray:
        """What its open windows need of a row's last tokens: their projections."""
        return StateArray((self.parts * self.ratio, 2 * self.parts * self.dim), "float32")

    @property
    def need(self) -> CacheNeed:
        dtype = self.build.dtype_name
        return CacheNeed(KVKind.COMPRESSED, 1, self.dim, ratio=self.ratio, dtype=dtype)

    def forward(
        self, x: Tensor, state: Tensor, slots: Tensor, site: int, angles: Angles, step: Step
    ) -> None:
        """Stores the entries that x (T, width) completes."""
        pages = step.pages(site)
        self.ops.compress_norm_rope_store(
            self.projection(x),
            state,
            slots,
            self.ape,
            self.norm,
            self.eps,
            *angles.completed[self.ratio],
            pages.cache,
            pages.table,
            step.query_start,
            step.context_lens,
            pages.page_size,
        )

    def problems(self) -> Iterable[Problem]:
        sizes = {"ratio": self.ratio, "dim": self.dim, "parts": self.parts}
        ring = self.parts * self.ratio
        yield self.build.problem("compress_norm_rope_store", ring=ring, **sizes)


class Indexer(Layer):
    """Selects the entries that each query attends to."""

    def __init__(self, ratio: int, args: DeepseekV4Args, build: Build) -> None:
        super().__init__(build)
        self.wq_b = Linear(args.query_rank, args.index_heads * args.index_dim, build)
        self.weights_proj = Linear(args.width, args.index_heads, build)
        self.compressor = Compressor(args.index_dim, ratio, True, args, build)
        self.args, self.ratio = args, ratio

    def forward(self, x: Tensor, low: Tensor, site: int, rotary: Rotary, step: Step) -> Tensor:
        """x (T, width), low (T, rank) the normed queries of low rank -> (T, top_k)."""
        q = self.wq_b(low).unflatten(-1, (self.args.index_heads, self.args.index_dim))
        pages = step.pages(site)
        chosen: Tensor = self.ops.index_topk(
            self.ops.interleaved_rope(q, *rotary),
            self.weights_proj(x),
            pages.cache,
            pages.table,
            step.query_start,
            step.context_lens,
            pages.page_size,
            self.ratio,
            self.args.index_top_k,
        )
        return chosen

    def problems(self) -> Iterable[Problem]:
        heads, dim = self.args.index_heads, self.args.index_dim
        rotary = self.args.rope_dim
        yield self.build.problem("interleaved_rope", heads=heads, head_dim=dim, rotary=rotary)
        sizes = {"ratio": self.ratio, "top_k": self.args.index_top_k}
        yield self.build.problem("index_topk", heads=heads, dim=dim, **sizes)


class GroupedOutput(Layer):
    """The first product of the output, each group of heads with a matrix of its own."""

    def __init__(self, args: DeepseekV4Args, build: Build) -> None:
        super().__init__(build)
        groups, n = args.output_groups, args.output_rank
        k = args.heads * args.head_dim // groups
        self.weight = build.parameter(groups * n, k)
        self.sizes = {"groups": groups, "n": n, "k": k}
        self.heads = {"heads": args.heads, "head_dim": args.head_dim, "rotary": args.rope_dim}
        self.matrix: Any = None  # (groups, n, k)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        made: Tensor = self.ops.inverse_rope_grouped_linear(x, *rotary, self.matrix)
        return made

    def prepare(self, stored: Iterable[StoredMatrix] | None = None) -> None:
        (problem,) = self.problems()
        shape = tuple(self.sizes.values())
        self.matrix = self.build.prepared(problem.op, self.weight.view(shape), problem)

    def problems(self) -> Iterable[Problem]:
        sizes = {**self.heads, **self.sizes}
        yield self.matrix_problem("inverse_rope_grouped_linear", **sizes)


class DeepseekV4Attention(Layer):
    def __init__(self, args: DeepseekV4Args, layer: int, first_site: int, build: Build) -> None:
        super().__init__(build)
        heads, dim = args.heads, args.head_dim
        kind, ratio = args.kinds[layer], args.ratios[layer]
        self.wq_a = Linear(args.width, args.query_rank, build)
        self.q_norm = PlainNorm(args.query_rank, args.eps, build)
        self.wq_b = Linear(args.query_rank, heads * dim, build)
        self.wkv = Linear(args.width, dim, build)
        self.kv_norm = HeadNorm(dim, args.eps, build)
        self.attn_sink = build.parameter(heads, dtype=torch.float32)
        self.wo_a = GroupedOutput(args, build)
        self.wo_b = Linear(args.output_groups * args.output_rank, args.width, build)
        sparse = kind is Kind.SPARSE
        self.compressor = Compressor(dim, ratio, sparse, args, build) if ratio else None
        self.indexer = Indexer(ratio, args, build) if sparse else None
        self.sites = Sites.of(kind, first_site)
        self.args, self.ratio = args, ratio

    def needs(self) -> list[CacheNeed]:
        dim, window, dtype = self.args.head_dim, self.args.window, self.build.dtype_name
        needs = [CacheNeed(KVKind.WINDOW, 1, dim, window, shared=True, dtype=dtype)]
        if self.compressor is not None:
            parts = [self.compressor]
            if self.indexer is not None:
                parts.append(self.indexer.compressor)
            states = tuple(part.state for part in parts)
            needs.append(CacheNeed(KVKind.RECURRENT, 0, 0, states=states))
            needs += [part.need for part in parts]
        return needs

    def forward(self, x: Tensor, angles: Angles, step: Step) -> Tensor:
        args, rotary = self.args, angles.entries if self.ratio else angles.window
        low = self.q_norm(self.wq_a(x))
        q = self.wq_b(low).unflatten(-1, (args.heads, args.head_dim))
        q, kv = self.ops.shared_kv_norm_rope(q, self.wkv(x), self.kv_norm.weight, args.eps, *rotary)
        window = step.pages(self.sites.window)
        seen, _ = self.ops.compressed_attention(
            q,
            kv,
            self.attn_sink,
            window.cache,
            window.table,
            step.query_start,
            step.context_lens,
            window.page_size,
            args.window,
            args.head_dim**-0.5,
            *self._entries(x, low, angles, step),
        )
        result: Tensor = self.wo_b(self.wo_a(seen, rotary))
        return result

    def _entries(self, x: Tensor, low: Tensor, angles: Angles, step: Step) -> tuple[Any, ...]:
        """Brings the entries up to this step: their cache and table, the ratio, the selection."""
        if self.compressor is None:
            return (None, None, 0, None)
        state = step.state(self.sites.state)
        self.compressor(x, state.arrays[0], state.slots, self.sites.entries, angles, step)
        chosen = None
        if self.indexer is not None:
            keys, site = self.indexer.compressor, self.sites.index
            keys(x, state.arrays[1], state.slots, site, angles, step)
            chosen = self.indexer(x, low, site, angles.entries, step)
        pages = step.pages(self.sites.entries)
        return (pages.cache, pages.table, self.ratio, chosen)

    def problems(self) -> Iterable[Problem]:
        args = self.args
        heads, dim = args.heads, args.head_dim
        rotary = args.rope_dim
        yield self.build.problem("shared_kv_norm_rope", heads=heads, head_dim=dim, rotary=rotary)
        chosen = 0 if self.indexer is None else args.index_top_k
        sizes = {"selected": chosen, "window": args.window, "ratio": self.ratio}
        yield self.build.problem("compressed_attention", heads=heads, dim=dim, **sizes)


class PlainNorm(Norm):
    """An RMS norm that no residual is added before."""

    def problems(self) -> Iterable[Problem]:
        size = self.weight.element_size()
        yield self.build.problem("rms_norm", width=len(self.weight), weight_bytes=size)
