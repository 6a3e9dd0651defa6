"""What stands in for the Triton kernels where there are none: its refusals are in the record."""

from __future__ import annotations

from typing import Any, NoReturn

from ...common.errors import KernelError
from ..interface import DeviceFacts
from ..interface_attention import AttentionSpec


def refused_kernel(reason: str, *args: Any, **named: Any) -> NoReturn:
    raise KernelError(f"There are no Triton kernels: {reason}.")


class RefusedAttention:
    """An AttentionBackend that accepts nothing."""

    name = "triton"

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
        return (self._reason,)

    def layout(self, *args: Any) -> NoReturn:
        refused_kernel(self._reason)

    def plan(self, *args: Any) -> NoReturn:
        refused_kernel(self._reason)

    def reserve(self, *args: Any) -> NoReturn:
        refused_kernel(self._reason)

    def bind(self, *args: Any) -> NoReturn:
        refused_kernel(self._reason)

    def run(self, *args: Any) -> NoReturn:
        refused_kernel(self._reason)
