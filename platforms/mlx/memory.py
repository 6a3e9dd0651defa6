"""How much memory MLX may use, and telling MLX so.

On Apple silicon the GPU shares the machine's memory, but only the *recommended working set* can be
used without the system starting to swap; it is well below the RAM.
"""

from __future__ import annotations

import mlx.core as mx
import psutil

from ..interface import Decision

WIRED_FROM = (15, 0)
"""First macOS that lets a process wire its working set."""


def on_metal() -> bool:
    return bool(mx.metal.is_available()) and mx.default_device().type == mx.DeviceType.gpu


def working_set() -> tuple[int, str]:
    """Bytes that may be used in all, and where the number comes from."""
    size = int(mx.device_info().get("max_recommended_working_set_size", 0)) if on_metal() else 0
    if size:
        return size, "the recommended working set of this GPU"
    available = int(psutil.virtual_memory().available)
    return available, "memory available now; MLX runs on the CPU here"


def set_limits(weights: int, cache: int, os_version: str) -> list[Decision]:
    """Bound what MLX keeps of freed buffers, and wire weights and cache where the OS can."""
    total, because = working_set()
    spare = max(256 << 20, (total - weights - cache) // 2)
    mx.set_cache_limit(spare)
    kept = f"half of what is left of {because}"
    decisions = [Decision("buffer cache", f"{spare / 2**30:.2f} GiB", kept)]
    version = tuple(int(n) for n in os_version.split(".")[:2] if n.isdigit())
    if not on_metal():
        decisions.append(Decision("wired memory", "none", "only Metal wires memory"))
    elif version < WIRED_FROM:
        decisions.append(Decision("wired memory", "none", "needs macOS 15", fallback=True))
    else:
        wired = min(weights + cache, total)
        mx.set_wired_limit(wired)
        reason = "weights and cache stay in memory"
        decisions.append(Decision("wired memory", f"{wired / 2**30:.2f} GiB", reason))
    return decisions
