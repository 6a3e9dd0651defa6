"""Where torch_npu's fused ops may be used."""

from __future__ import annotations

from ..interface import DeviceFacts
from ..judgement import numbers

PACKAGE = "torch_npu"
PRIORITY = 30
"""Of the library's kernels, above the generic ones."""
OLDEST = (2, 13)
"""The release whose schemas the adapters were written against."""


def refusal(facts: DeviceFacts) -> str | None:
    """Why the library's ops are not used on a device, or None. Their pages name the Atlas A2 and
    A3 products (910B, 910C); those are the devices with bfloat16."""
    if "bfloat16" not in facts.dtypes:
        return f"its fused ops are documented for the 910B and 910C, not for {facts.name}"
    version = facts.libraries.get(PACKAGE, "")
    if not version:
        return f"{PACKAGE} is not installed"
    if numbers(version)[:2] < OLDEST:
        return f"written for {PACKAGE} {'.'.join(map(str, OLDEST))}, there is {version}"
    return None
