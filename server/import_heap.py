"""Imports without the garbage collector's visits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """For a block that only imports. What it leaves lives as long as the process, so no collection
    looks at it during the block (an eighth of the time of importing torch) or after it (a visit to
    a framework's objects is a pause between two tokens). Not for loading: its garbage would stay.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
