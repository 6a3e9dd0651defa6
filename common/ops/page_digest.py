"""A fingerprint of the bits of cached pages, the same however a platform stores them.

Every element's bits are mixed with its place in the canonical order (token, head, dim), and the
results are summed: sums modulo 2^32 do not depend on who adds first, so any number of threads may
share the work. For one place the mixing is a bijection, so a change of any single element always
changes the first word; several changes at once are missed once in 2^64.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...platforms.interface_kernels import Case, Op
from .contract import EXACT, I32
from .sample import mix32

SEED = 0x51F01D
STRIDE = 0x9E3779B9


def page_digest(pool: NDArray[Any], pages: I32) -> NDArray[np.uint32]:
    """pool (pages, token, head, dim) of one layer's keys or values, any strides, elements of one,
    two or four bytes of which only the bits count; pages (n,) int -> (n, 2) uint32.

    With i the place in the page and b the element's bits as a number, k = mix32(i * STRIDE + SEED)
    and a = mix32(k ^ b); the words are the sums of a and of mix32(a + k).
    """
    count = int(np.prod(pool.shape[1:]))
    found = np.ascontiguousarray(pool[pages]).view(np.dtype(f"u{pool.itemsize}"))
    bits = found.reshape(len(pages), count).astype(np.uint32)
    places = np.arange(count, dtype=np.uint32)
    k = mix32(places * np.uint32(STRIDE) + np.uint32(SEED))
    a = mix32(k ^ bits)
    words = [part.sum(axis=1, dtype=np.uint32) for part in (a, mix32(a + k))]
    return np.stack(words, axis=1)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for width in (8, 16, 32):
        for name, shape, pages in [
            ("one_page", (3, 16, 2, 64), [1]),
            ("page_size_1", (5, 1, 3, 80), [4, 0, 2]),
            ("page_size_128", (2, 128, 1, 16), [1, 0]),
            ("odd", (4, 3, 5, 7), [2, 2, 3]),
            ("one_element", (2, 1, 1, 1), [1]),
            ("no_page", (2, 4, 1, 8), []),
        ]:
            kind = np.dtype(f"u{width // 8}")
            pool = rng.integers(0, 2**width, shape, dtype=np.uint64).astype(kind)
            yield Case(f"{name}_{width}", {"pool": pool, "pages": np.array(pages, np.int32)})
    head_first = rng.integers(0, 2**16, (2, 5, 4, 8), dtype=np.uint64).astype(np.uint16)
    by_head = {"pool": head_first.transpose(1, 2, 0, 3), "pages": np.array([4, 1], np.int32)}
    yield Case("stored_by_head", by_head)


OPS = (Op("page_digest", page_digest, cases, EXACT),)
