"""What becomes of activations where a checkpoint asks that they be rounded to eight bits."""

from __future__ import annotations

from collections.abc import Iterable

from ..interface import Decision
from ..interface_kernels import KernelTable, Problem

BY_TOKEN = "int8_token"
"""The scheme of matrices whose checkpoint asks so."""
AS_ASKED = "int8, a scale per token"


def rounding_decisions(problems: Iterable[Problem], ops: KernelTable, dtype: str) -> list[Decision]:
    """One per op with such matrices: as asked, in smaller groups, or not at all."""
    asked = dict.fromkeys(problem.op for problem in problems if problem.weights == BY_TOKEN)
    because = f"the checkpoint asks for {AS_ASKED}"
    decisions = []
    for op in asked:
        kernel = ops.kernels[op]
        how = kernel.activations or f"{dtype}, not rounded"
        less = "" if how == AS_ASKED else f"; {kernel.provider!r} rounds less"
        decisions.append(Decision(f"activations of {op}", how, because + less))
    return decisions
