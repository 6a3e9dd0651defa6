"""What all op contracts share: tolerances by dtype, and inputs for cases.

References compute in float64 and return float32 (or integers): they are the meaning of an op, not a
fast way to compute it. A case's arrays are float32; a conformance run rounds them to the dtype
under test first, so that the reference sees what the kernel sees.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Tolerance

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

EXACT: Mapping[str, Tolerance] = {
    "float32": Tolerance(0.0, 0.0),
    "bfloat16": Tolerance(0.0, 0.0),
    "float16": Tolerance(0.0, 0.0),
}
"""For ops that only move values."""

POINTWISE: Mapping[str, Tolerance] = {
    "float32": Tolerance(2e-6, 2e-6),
    "bfloat16": Tolerance(1e-2, 1e-2),
    "float16": Tolerance(2e-3, 2e-3),
}
"""For ops with a few roundings per element; 16-bit kernels may round between their steps."""

REDUCTION: Mapping[str, Tolerance] = {
    "float32": Tolerance(2e-5, 2e-5),
    "bfloat16": Tolerance(3e-2, 3e-2),
    "float16": Tolerance(5e-3, 5e-3),
}
"""For sums over hundreds of terms of size one."""


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> F32:
    """Independent normal values of standard deviation `scale`."""
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def around_one(rng: np.random.Generator, *shape: int) -> F32:
    """Norm weights: near one and never equal."""
    return (1.0 + 0.3 * rng.standard_normal(shape)).astype(np.float32)
