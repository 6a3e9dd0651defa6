"""The experts of a mixture on matrices in fewer bits, one contract per form (docs/weights.md).

As in `quantised_linear`, numbers and scales of a matrix are exact; activations may be rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .contract import F32, I64, normal
from .moe import moe_experts
from .quantised_linear import FORMS, TOLERANCE, Stored, stored_values

Form = Callable[[np.random.Generator, int, int], Stored]


def quantised_experts(
    x: F32,
    experts: I64,
    weights: F32,
    gate_up: Sequence[Stored],
    down: Sequence[Stored],
    gate_up_bias: F32 | None = None,
    down_bias: F32 | None = None,
    limit: float = 0.0,
    slope: float = 1.0,
    offset: float = 0.0,
    clamp_after: bool = False,
) -> F32:
    """As `moe_experts`. gate_up: of every expert the gate's matrix (I, H), then the up's; down: of
    every expert one (H, I)."""
    both = np.stack([stored_values(matrix) for matrix in gate_up])
    both = both.reshape(len(down), -1, both.shape[-1])
    backward = np.stack([stored_values(matrix) for matrix in down])
    form = limit, slope, offset, clamp_after
    return moe_experts(x, experts, weights, both, backward, gate_up_bias, down_bias, *form)


def _cases(form: Form) -> Callable[[np.random.Generator], Iterable[Case]]:
    def cases(rng: np.random.Generator) -> Iterable[Case]:
        gpt_oss = {"limit": 7.0, "slope": 1.702, "offset": 1.0}
        for name, rows, width, inner, count, top_k, biased, more in [
            ("one_row", 1, 64, 32, 4, 2, False, {}),
            ("edges_of_blocks", 3, 200, 130, 3, 2, False, {}),
            ("clamped_and_biased", 4, 96, 64, 4, 3, True, gpt_oss),
            ("many_rows_an_expert", 40, 32, 33, 2, 1, False, {}),
            ("no_rows", 0, 32, 32, 4, 2, False, {}),
        ]:
            # Some forms have whole groups of columns only.
            width, inner = (form(rng, 1, columns).shape[1] for columns in (width, inner))
            order = rng.permuted(np.tile(np.arange(count), (rows, 1)), axis=1)
            args: dict[str, Any] = {
                "x": normal(rng, rows, width),
                "experts": order[:, :top_k].astype(np.int64),
                "weights": rng.uniform(0.0, 1.0, (rows, top_k)).astype(np.float32),
                "gate_up": tuple(form(rng, inner, width) for _ in range(2 * count)),
                "down": tuple(form(rng, width, inner) for _ in range(count)),
                "gate_up_bias": normal(rng, count, 2 * inner) if biased else None,
                "down_bias": normal(rng, count, width) if biased else None,
            }
            yield Case(name, {**args, **more})

    return cases


def _dims(args: Mapping[str, Any]) -> dict[str, int]:
    n, k = args["gate_up"][0].shape
    return {"experts": len(args["down"]), "parts": 2, "n": n, "k": k}


OPS = tuple(
    Op(
        "moe_experts",
        quantised_experts,
        _cases(form),
        TOLERANCE,
        float32=frozenset({"weights"}),
        weights=scheme,
        dims=_dims,
    )
    for scheme, form in FORMS.items()
)
