"""Keeps freed memory in the process, so that a step's buffers are not mapped anew at every layer.

By default glibc returns large freed blocks to the kernel and takes others page by page: with a
batch of 32 that cost more than half of a decode step (SmolLM2-135M, two cores).
"""

from __future__ import annotations

import ctypes
import sys

# Numbers of mallopt's parameters, from glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8

LARGEST_REUSED = 32 << 20
"""Larger blocks are mapped one by one as ever; glibc accepts no more than this."""

KEPT_AT_MOST = 256 << 20
"""Free memory at the end of the heap beyond this goes back to the kernel."""


def keep_freed_memory() -> bool:
    """Process-wide; for threads started later. False where the C library cannot do it."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (M_MMAP_THRESHOLD, LARGEST_REUSED),
        (M_TRIM_THRESHOLD, KEPT_AT_MOST),
        (M_ARENA_MAX, 1),  # a thread's own arena is given back sooner than the main one
    )
    return all(mallopt(name, value) == 1 for name, value in settings)
