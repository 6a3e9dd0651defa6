"""The model's ops on the native kernels: each call is an instruction, run at once or recorded."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..torch_runtime.rounding import GROUP
from . import packed_experts, packing
from .native_library import Instruction, RopeShape, Team, instruction
from .packed_experts import PackedExperts
from .packing import PackedWeight

EMBED, RMS_NORM, ANGLES, ROPE, GATE, LINEAR, QUANTISE, KV_WRITE, ATTENTION, MERGE = range(10)
ROUTE, SORT_ROWS, EXPERTS_UP, EXPERTS_DOWN, COMBINE = range(10, 15)
SILU, GELU_TANH = 0, 1


class NotRecorded(Exception):
    """A step cannot be recorded; the message says what it does that instructions cannot."""


class Issuer:
    """Runs instructions on a team; while `recording`, writes them down instead."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self._one = (Instruction * 2)()
        self._tape: list[Instruction] | None = None
        self._allocate: Callable[[int, int], Tensor] | None = None
        self._rows = 0  # of the step that is recorded
        self._kept: dict[Any, Any] = {}

    @property
    def is_recording(self) -> bool:
        return self._tape is not None

    @contextmanager
    def recording(
        self, allocate: Callable[[int, int], Tensor], rows: int
    ) -> Iterator[list[Instruction]]:
        """Within it, results come from `allocate` and instructions go to the list."""
        self._tape, self._allocate, self._rows = [], allocate, rows
        try:
            yield self._tape
        finally:
            self._tape = self._allocate = None

    def empty(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width) if self._allocate is None else self._allocate(rows, width)

    def issue(self, op: int, rows: int, a: Sequence[int], f: Sequence[float] = ()) -> None:
        if self._tape is not None:
            if rows != self._rows:
                raise NotRecorded(f"an op works on {rows} rows for {self._rows} tokens")
            self._tape.append(instruction(op, -1, a, f))
            return
        self._one[0] = instruction(op, rows, a, f)
        self.team.run(self._one, 1, rows)

    def shape(self, heads: int, kv_heads: int, dim: int, half: int) -> int:
        key = (heads, kv_heads, dim, half)
        if key not in self._kept:
            self._kept[key] = RopeShape(*key)
        return ctypes.addressof(self._kept[key])

    def entries(self, experts: int) -> int:
        """Where a step's rows by expert are counted: one place, as layers take turns."""
        if experts not in self._kept:
            self._kept[experts] = (ctypes.c_int32 * (2 * experts + 2))()
        return ctypes.addressof(self._kept[experts])


class NativeOps:
    """One method per op contract (common/ops). Activations are float32."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        # The last input of a linear layer and its quantised form: q, k and v share one.
        self._quantised: tuple[Any, Tensor] | None = None

    def _codes(self, x: Tensor) -> Tensor:
        """x (rows, k) as signed bytes with a scale per 32; made once per tensor."""
        if self._quantised is not None and self._quantised[0]() is x:
            return self._quantised[1]
        codes = self._rounded(x, x.stride(0), x.shape[1], 1)
        self._quantised = (weakref.ref(x), codes)
        return codes

    def _rounded(self, x: Tensor, stride: int, width: int, per_row: int) -> Tensor:
        """`per_row` rows of `width` for each row of x, `stride` apart."""
        rows = len(x)
        codes = self._issuer.empty(rows, per_row * -(-width // GROUP) * (GROUP + 24) // 4)
        args = (x.data_ptr(), stride, codes.data_ptr(), width, per_row)
        self._issuer.issue(QUANTISE, rows, args)
        return codes

    def embedding(self, ids: Tensor, table: Tensor | PackedWeight, scale: float = 1.0) -> Tensor:
        packed = self._packed(table)
        out = self._issuer.empty(len(ids), packed.shape[1])
        self._issuer.issue(
            EMBED, len(ids), (ids.data_ptr(), packed.address(None), out.data_ptr()), (scale,)
        )
        return out

    def linear(
        self, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None
    ) -> Tensor:
        packed = self._packed(weight)
        x = _rows(x if packed.order is None else self._reordered(x, packed.order))
        rows = len(x)
        quantised = self._codes(x).data_ptr() if packed.quantised else 0
        out = self._issuer.empty(rows, packed.shape[0])
        self._issuer.issue(
            LINEAR,
            rows,
            (
                x.data_ptr(),
                x.stride(0),
                packed.address(bias),
                out.data_ptr(),
                out.stride(0),
                quantised,
            ),
        )
        return out

    def _reordered(self, x: Tensor, order: Tensor) -> Tensor:
        if self._issuer.is_recording:
            raise NotRecorded("a weight has its columns out of order (desc_act)")
        return x.index_select(1, order)

    def _packed(self, weight: Tensor | PackedWeight) -> PackedWeight:
        if isinstance(weight, PackedWeight):
            return weight
        if self._issuer.is_recording:
            raise NotRecorded("a weight was not packed at load")
        return packing.pack_floats(weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        shape = x.shape
        x = _rows(x.flatten(0, -2) if x.dim() > 2 else x)
        out = self._issuer.empty(*x.shape)
        args = (x.data_ptr(), x.stride(0), 0, weight.data_ptr(), out.data_ptr(), 0, x.shape[1])
        self._issuer.issue(RMS_NORM, len(x), args, (eps,))
        return out.view(shape)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, residual = _rows(x), residual.contiguous()
        out, total = self._issuer.empty(*x.shape), self._issuer.empty(*x.shape)
        args = (
            x.data_ptr(),
            x.stride(0),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            total.data_ptr(),
            x.shape[1],
        )
        self._issuer.issue(RMS_NORM, len(x), args, (eps,))
        return out, total

    def rope_angles(self, positions: Tensor, inverse: Tensor, scale: float) -> Any:
        rows, half = len(positions), len(inverse)
        cos, sin = self._issuer.empty(rows, half), self._issuer.empty(rows, half)
        args = (positions.data_ptr(), inverse.data_ptr(), cos.data_ptr(), sin.data_ptr(), half)
        self._issuer.issue(ANGLES, rows, args, (scale,))
        return cos, sin

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self._rope(q, k, cos, sin, 0, 0, 0.0)

    def qk_norm_rope(
        self,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return self._rope(q, k, cos, sin, q_weight.data_ptr(), k_weight.data_ptr(), eps)

    def _rope(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: int, k_norm: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows, heads, dim = q.shape
        kv_heads = k.shape[1]
        q, k = _heads(q), _heads(k)
        turned_q = self._issuer.empty(rows, heads * dim)
        turned_k = self._issuer.empty(rows, kv_heads * dim)
        args = (
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            turned_q.data_ptr(),
            turned_k.data_ptr(),
            q_norm,
            k_norm,
            self._issuer.shape(heads, kv_heads, dim, cos.shape[1]),
        )
        self._issuer.issue(ROPE, rows, args, (eps,))
        return turned_q.view(rows, heads, dim), turned_k.view(rows, kv_heads, dim)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._gate(gate, up, SILU)

    def gelu_tanh_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._gate(gate, up, GELU_TANH)

    def _gate(self, gate: Tensor, up: Tensor, kind: int) -> Tensor:
        gate, up = _rows(gate), _rows(up)
        out = self._issuer.empty(*gate.shape)
        args = (
            gate.data_ptr(),
            gate.stride(0),
            up.data_ptr(),
            up.stride(0),
            out.data_ptr(),
            gate.shape[1],
            kind,
        )
        self._issuer.issue(GATE, len(gate), args)
        return out

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Tensor | PackedExperts,
        down: Tensor | PackedExperts,
        top_k: int,
        renormalise: bool,
    ) -> Tensor:
        """Rows are sorted by expert in an instruction of their own, so that steps with experts are
        recorded like others. Integers lie in buffers of floats of the same size."""
        ups, downs = self._experts(gate_up, 2), self._experts(down, 1)
        issuer, rows, experts = self._issuer, len(x), downs.count
        x, logits = _rows(x), _rows(router_logits)
        ids, factors, places, tokens = (issuer.empty(rows, top_k) for _ in range(4))
        entries = issuer.entries(experts)
        route = (
            logits.data_ptr(),
            logits.stride(0),
            ids.data_ptr(),
            factors.data_ptr(),
            experts,
            top_k,
            int(renormalise),
        )
        issuer.issue(ROUTE, rows, route)
        sort = (ids.data_ptr(), entries, places.data_ptr(), tokens.data_ptr(), experts, top_k)
        issuer.issue(SORT_ROWS, rows, sort)
        hidden = issuer.empty(rows, top_k * ups.n)
        up = (
            x.data_ptr(),
            x.stride(0),
            self._codes(x).data_ptr() if ups.quantised else 0,
            ups.address,
            hidden.data_ptr(),
            entries,
            tokens.data_ptr(),
            experts,
            top_k,
        )
        issuer.issue(EXPERTS_UP, rows, up)
        codes = self._rounded(hidden, ups.n, ups.n, top_k) if downs.quantised else None
        each = issuer.empty(rows, top_k * downs.n)
        lower = (
            hidden.data_ptr(),
            0 if codes is None else codes.data_ptr(),
            downs.address,
            each.data_ptr(),
            entries,
            experts,
            top_k,
        )
        issuer.issue(EXPERTS_DOWN, rows, lower)
        out = issuer.empty(rows, downs.n)
        combine = (
            each.data_ptr(),
            places.data_ptr(),
            factors.data_ptr(),
            out.data_ptr(),
            downs.n,
            top_k,
        )
        issuer.issue(COMBINE, rows, combine)
        return out

    def _experts(self, weights: Tensor | PackedExperts, parts: int) -> PackedExperts:
        """weights (experts, parts * n, k)."""
        if isinstance(weights, PackedExperts):
            return weights
        if self._issuer.is_recording:
            raise NotRecorded("experts were not packed at load")
        matrices = weights.unflatten(1, (parts, -1)).flatten(0, 1)
        return packed_experts.join(packing.pack_floats(matrix) for matrix in matrices)


def _rows(x: Tensor) -> Tensor:
    """Any stride between rows will do, none within."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
