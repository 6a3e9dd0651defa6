"""How much memory MLX may use, and telling MLX so.

On Apple silicon the GPU shares the machine's memory, but only the *recommended working set* can be
used without the system starting to swap; it is well below the RAM.
"""

from __future__ import annotations

import ctypes

import mlx.core as mx
import psutil

from ..interface import Decision

WIRED_FROM = (15, 0)
"""First macOS that lets a process wire its working set."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
LARGEST = 32 << 20
"""Bytes: glibc takes no larger threshold."""
KEPT = 1 << 30


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


def keep_freed() -> Decision:
    """Have the C library keep what MLX frees, on a CPU, where MLX has no cache of buffers of its
    own: memory that is mapped anew for each array is cleared anew, page by page, by the system."""
    what, change = "freed memory", getattr(ctypes.CDLL(None), "mallopt", None)
    if change is None:
        return Decision(what, "as the C library has it", "it has no mallopt")
    taken = change(M_MMAP_THRESHOLD, LARGEST) and change(M_TRIM_THRESHOLD, KEPT)
    if not taken:
        return Decision(what, "as the C library has it", "mallopt refused to change it")
    because = f"arrays of up to {LARGEST >> 20} MiB are not mapped anew for every step"
    return Decision(what, f"kept, up to {KEPT >> 20} MiB", because)
