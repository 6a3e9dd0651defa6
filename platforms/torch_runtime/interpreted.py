"""Triton's interpreter: kernels for a device that is not there, run on host tensors.

The facts are those of a recorded device, so kernels are accepted or refused as on it. A pass shows
that a kernel's arithmetic and addressing are right, and nothing of its compilation or speed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from ...common.errors import PlatformError
from ...common.ops.registry import KernelRegistry
from ...common.ops.suite import suite_of
from ..interface import DeviceFacts, Event
from ..interface_kernels import Suite
from .conformance import TorchRunner
from .device import TorchDevice
from .interpreter_speed import quicken
from .kernels import register_generic

VARIABLE = "TRITON_INTERPRET"  # read by Triton when it is imported
INTERPRETED = "triton"
"""Provider of kernels that Triton's interpreter can run."""


class HostEvent:
    """Host tensors are ready when a call returns."""

    def wait(self) -> None:
        return


class HostedDevice(TorchDevice):
    """The facts of one device over the host's memory."""

    def __init__(self, facts: DeviceFacts) -> None:
        super().__init__(facts, "cpu")

    def attach(self) -> None:
        """Any thread may run host tensors."""

    def synchronize(self) -> None:
        """Nothing is ever outstanding: see HostEvent."""

    def event(self) -> Event:
        return HostEvent()

    def memory(self) -> tuple[int, int]:
        raise NotImplementedError("A hosted device has no memory of its own to plan.")


def start_interpreter() -> None:
    """Before Triton is imported in this process. Raises PlatformError."""
    if find_spec("triton") is None:
        raise PlatformError("--interpret needs Triton: pip install triton")
    if "triton" in sys.modules and os.environ.get(VARIABLE) != "1":
        raise PlatformError(
            "Triton is imported already and compiles in this process; its interpreter needs a "
            f"process that has {VARIABLE}=1 from its start."
        )
    os.environ[VARIABLE] = "1"
    quicken(import_module("triton.runtime.interpreter"), import_module("triton.language"))


def not_interpreted(provider: str, dtype: str) -> str:
    """Why a provider's kernels do not run in the interpreter with this dtype, or ""."""
    if provider != INTERPRETED:
        return f"not a Triton kernel: the interpreter runs those of provider {INTERPRETED!r}"
    if dtype == "bfloat16":
        return "Triton's interpreter computes bfloat16 on its bit patterns"
    return ""


def interpreted_suite(
    facts: DeviceFacts, register: Callable[[KernelRegistry, TorchDevice], None] | None = None
) -> Suite:
    """The suite of a device with these facts. `register` adds a platform's own kernels, to the
    generic ones. Raises PlatformError where there is no interpreter."""
    start_interpreter()
    device = HostedDevice(facts)
    registry = KernelRegistry()
    register_generic(registry, device)
    if register is not None:
        register(registry, device)
    return suite_of(registry, facts, TorchRunner(device), "interpreted", not_interpreted)
