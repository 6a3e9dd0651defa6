"""Keys and values of whole pages side by side, for attention that wants each row's in one piece.

Storage is head by head: keys (H * S, D) hold slot s = page * page_size + offset of head h in row
h * S + s, so that a page of one head is one block of memory. Values may be of another width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .contract import EXACT, F32, I32, normal


def page_gather(keys: F32, values: F32, pages: I32, heads: int, page_size: int) -> tuple[F32, F32]:
    """keys (heads * S, Dk), values (heads * S, Dv) storage; pages (R, P) int, repeats allowed
    -> keys (R, heads, P * page_size, Dk) and values (R, heads, P * page_size, Dv)."""
    found = []
    for storage in (keys, values):
        by_page = storage.reshape(heads, -1, page_size, storage.shape[1])
        chosen = by_page[:, pages]  # (heads, R, P, page_size, D)
        wide = pages.shape[1] * page_size
        shape = (len(pages), heads, wide, storage.shape[1])
        found.append(chosen.swapaxes(0, 1).reshape(shape))
    return found[0], found[1]


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for name, heads, page_size, dims, pages in [
        ("one_row", 2, 16, (64, 64), [[3, 1]]),
        ("one_page", 1, 16, (128, 128), [[4]]),
        ("interleaved", 3, 4, (16, 16), [[1, 5, 3], [2, 4, 6], [6, 1, 0]]),
        ("shared_and_repeated", 2, 4, (32, 32), [[1, 2, 2], [1, 1, 3]]),
        ("page_size_1", 2, 1, (80, 80), [[4, 0, 2, 5, 1], [3, 3, 3, 3, 3]]),
        ("page_size_128", 1, 128, (64, 64), [[2, 0], [1, 2]]),
        ("unlike_widths", 4, 8, (192, 128), [[1, 3], [2, 0]]),
        ("odd_widths", 3, 3, (5, 7), [[2, 1], [0, 3]]),
        ("no_rows", 2, 4, (16, 16), np.zeros((0, 2), int)),
        ("no_pages", 2, 4, (16, 16), np.zeros((2, 0), int)),
    ]:
        table = np.array(pages, np.int32)
        slots = heads * page_size * (int(table.max(initial=0)) + 2)
        yield Case(
            name,
            {
                "keys": normal(rng, slots, dims[0]),
                "values": normal(rng, slots, dims[1]),
                "pages": table,
                "heads": heads,
                "page_size": page_size,
            },
        )


OPS = (Op("page_gather", page_gather, cases, EXACT),)
