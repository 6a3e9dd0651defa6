"""A device that is not there, by what is recorded of it: for suites that run in an interpreter."""

from __future__ import annotations

from ..common.errors import PlatformError
from .interface import Accelerator, DeviceFacts, Machine


def machine_with(accelerator: Accelerator) -> Machine:
    """A machine of which nothing is known but its one accelerator."""
    return Machine(
        os="linux",
        os_version="",
        arch="x86_64",
        python="",
        cpu_name="",
        cpu_features=frozenset(),
        physical_cores=1,
        logical_cores=1,
        memory_bytes=0,
        available_bytes=0,
        packages={},
        accelerators=(accelerator,),
    )


def present(facts: DeviceFacts | None, platform: str) -> DeviceFacts:
    """The facts, of a suite that runs on the device itself. Raises PlatformError."""
    if facts is None:
        raise PlatformError(f"The platform {platform!r} needs a device to run its suite on.")
    return facts


def no_interpreter(platform: str) -> PlatformError:
    return PlatformError(
        f"The platform {platform!r} has no kernels that an interpreter runs; "
        "leave --interpret out to run its suite on this machine."
    )
