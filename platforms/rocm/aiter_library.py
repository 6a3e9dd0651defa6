"""Where AMD's aiter library may be used."""

from __future__ import annotations

from ..interface import DeviceFacts
from ..judgement import numbers

PACKAGE = "amd-aiter"
OLDEST = (0, 1, 7)
"""The release whose signatures the adapters were written against."""

SERVED = {(9, 4, 2): "gfx942", (9, 5, 0): "gfx950"}

FAULTS = {
    (9, 0, 10): "on gfx90a its modules fail to load (ROCm/aiter#2021)",
    (12, 0, 1): "on gfx1201 its norm crashes at start (ROCm/aiter#4302)",
}
"""Known faults by architecture, with the report."""


def refusal(facts: DeviceFacts) -> str | None:
    """Why the library is not used on a device, or None."""
    if facts.arch not in SERVED:
        fault = f"; {FAULTS[facts.arch]}" if facts.arch in FAULTS else ""
        return f"its kernels are for {' and '.join(SERVED.values())}{fault}"
    version = facts.libraries.get(PACKAGE, "")
    if not version:
        return f"{PACKAGE} is not installed"
    if numbers(version)[:3] < OLDEST:
        return f"needs {PACKAGE} {'.'.join(map(str, OLDEST))}, there is {version}"
    return None
