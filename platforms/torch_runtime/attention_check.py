"""The first attention backend that is right on this very device, before it serves.

Priorities say what should be fast. Where few people have the card, the fast one has been seen to
answer wrongly without a word; so on devices that ask for it (`TorchDevice.checks_attention`) cases
of the contract run at load, in the model's own heads, window and dtypes, and a backend that fails
one gives way to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...common.errors import KernelError
from ...common.ops import OPS
from ...common.ops.attention import Shape, build
from ...common.ops.conformance import difference, round_case
from ...common.ops.registry import KernelRegistry
from ..cache_plan import DEFAULT_PAGE_SIZE
from ..interface import Decision
from ..interface_attention import AttentionBackend, AttentionSpec
from ..interface_kernels import Case
from .conformance import TorchRunner
from .device import TorchDevice

ROWS = (
    ("decode", ((37, 1), (300, 1), (0, 1))),
    ("mixed", ((50, 1), (0, 18), (23, 9))),
)
"""Names, and (context, new tokens) of each row."""


def resolve_right(
    registry: KernelRegistry,
    specs: Sequence[AttentionSpec],
    device: TorchDevice,
    chosen: str | None,
    strict: bool,
    page_size: int | None,
) -> tuple[AttentionBackend, Decision]:
    """`KernelRegistry.resolve_attention` of backends that are right here. Raises KernelError when
    none is, or when the one that the user named is not."""
    wrong: dict[str, str] = {}
    while True:
        backend, decision = registry.resolve_attention(specs, device.facts, chosen, strict, wrong)
        fault = _first_fault(backend, specs, device, page_size)
        if fault is None:
            return backend, replace(decision, because=f"{decision.because}; right in a check here")
        wrong[backend.name] = f"wrong on this device: {fault}"
        if chosen is not None:
            raise KernelError(
                f"The attention kernel {chosen!r} is {wrong[backend.name]}. Leave --kernel "
                f"attention={chosen} out, and another is tried."
            )


def _first_fault(
    backend: AttentionBackend,
    specs: Sequence[AttentionSpec],
    device: TorchDevice,
    page_size: int | None,
) -> str | None:
    runner = TorchRunner(device)
    size = page_size or getattr(backend, "page_size", None) or DEFAULT_PAGE_SIZE
    for spec in dict.fromkeys(specs):
        contract = OPS["attention/int8" if spec.stored_dtype == "int8" else "attention"]
        for name, rows in ROWS:
            case = round_case(contract, _case(spec, name, rows, size), spec.dtype)
            expected = contract.reference(**case.args)
            try:
                got = runner.run_attention(backend, case, spec.dtype, spec.kv_dtype)
            except Exception as error:  # a broken kernel may raise anything
                return f"{name}: {type(error).__name__}: {error}".splitlines()[0][:200]
            _, message = difference(got, [expected], contract.tolerance[spec.dtype])
            if message:
                return f"{name}: {message}"
    return None


def _case(
    spec: AttentionSpec, name: str, rows: tuple[tuple[int, int], ...], page_size: int
) -> Case:
    rng = np.random.default_rng(0)
    sinks = tuple(rng.standard_normal(spec.heads).tolist()) if spec.sinks else ()
    shape = Shape(
        name, rows, page_size, spec.heads, spec.kv_heads, spec.head_dim, spec.window,
        spec.soft_cap, sinks,
    )  # fmt: skip
    made = build(rng, shape)
    return replace(made, args={**made.args, "scale": spec.scale})
