"""Attention backends: plan (host), bind (static-shape device work), run (per layer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .interface import DeviceFacts
from .interface_kv import KVGroup, KVLayout
from .interface_step import StepBatch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The static facts of one attention call site (equal for all layers of a cache group)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0  # 0 = unlimited
    soft_cap: float = 0.0  # 0 = off; else cap * tanh(logits / cap)
    sinks: bool = False  # a logit per head that joins the softmax and takes no value
    dtype: str = "float32"
    kv_dtype: str = ""  # of keys and values in the cache; "" = dtype
    tree: bool = False  # steps may have a tree mask

    @property
    def stored_dtype(self) -> str:
        return self.kv_dtype or self.dtype


class AttentionBackend(Protocol):
    """Causal attention of a step's rows over paged keys and values, prefill and decode in one call.

    Per group and step: `plan` once (host work, numpy only, same code for eager and captured
    steps), `bind` once (puts the plan on the device), `run` per layer.

    A captured step holds the calls of `run` and nothing else. Its plans are bound to buffers that
    were reserved once, so that the recording finds each new plan where it found the first.

    An attribute `page_size`, where it has one, is how many tokens pages have unless the user names
    a number.
    """

    @property
    def name(self) -> str: ...

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        """All reasons why this backend cannot serve `spec`; empty when it can. A backend is asked
        for tree masks only if it has an attribute `tree_masks` that is True."""
        ...

    def layout(self, group: KVGroup, spec: AttentionSpec, layers: int) -> KVLayout: ...

    def plan(self, batch: StepBatch, group: KVGroup) -> Any: ...

    def reserve(self, group: KVGroup, rows: int, tokens: int, longest: int) -> Any:
        """Device buffers for the plans of steps with up to `rows` rows and `tokens` tokens, of rows
        with up to `longest` tokens, context and new ones together. Raises KernelError with the
        reason where plans have no fixed shape: steps are then not captured."""
        ...

    def bind(self, plan: Any, reserved: Any = None) -> Any:
        """The plan on the device. With `reserved`, copied into those buffers in place, and rows
        and tokens that they have too many read and write the null page; what `run` gets must then
        hold nothing on the host that differs between plans. Without: in fresh buffers."""
        ...

    def run(
        self,
        bound: Any,
        pool: Any,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        spec: AttentionSpec,
        sinks: Any = None,
    ) -> Any:
        """q (T, heads, dim), k and v (T, kv_heads, dim), rope applied. Writes k and v to the
        pool, then attends. `sinks` (heads,) float32 is given exactly when `spec.sinks` and must
        outlive every step that uses it. Returns (T, heads, dim); `layer` counts within the
        group. Reads nothing back and makes no device tensor from host values."""
        ...
