"""Cache groups and how one platform stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]


ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class KVKind(Enum):
    """FULL keeps every token; WINDOW only the last `window`; RECURRENT one state of fixed size per
    sequence (gated delta nets, convolution tails, Mamba). LATENT keeps one vector of every token,
    which all heads share (MLA); COMPRESSED one vector of every `ratio` tokens (DeepSeek-V4)."""

    FULL = "full"
    WINDOW = "window"
    LATENT = "latent"
    COMPRESSED = "compressed"
    RECURRENT = "recurrent"

    @property
    def keeps_all(self) -> bool:
        """Whether a row needs every page from its first token on."""
        return self in (KVKind.FULL, KVKind.LATENT, KVKind.COMPRESSED)


@dataclass(frozen=True, slots=True)
class StateArray:
    """One array of a recurrent state, of one sequence."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheNeed:
    """What one *site* of a model must remember: a place that reads and writes a cache, of which a
    layer has one or several. Sites with equal needs form one group.

    A LATENT or COMPRESSED site, and a WINDOW site that is `shared`, stores one vector of `head_dim`
    numbers where others store keys and values. Entry w of a COMPRESSED site covers the tokens from
    w * ratio on, and lies in the page of its last token.
    """

    kind: KVKind
    kv_heads: int
    head_dim: int
    window: int = 0  # WINDOW: a query at position p sees keys at p-window+1 .. p
    value_dim: int = 0  # of the values where it is not head_dim
    states: tuple[StateArray, ...] = ()  # RECURRENT: of one sequence
    ratio: int = 1  # COMPRESSED: tokens of an entry
    shared: bool = False  # WINDOW: one vector is key and value
    dtype: str = ""  # of the one vector; keys and values are as the attention backend keeps them

    @property
    def values_dim(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def one_vector(self) -> bool:
        return self.shared or self.kind in (KVKind.LATENT, KVKind.COMPRESSED)

    @property
    def state_bytes(self) -> int:
        return sum(array.nbytes for array in self.states)

    def entries(self, page_size: int) -> int:
        """Vectors of a page. Where the ratio does not divide the page size, pages of unlike fill
        have room for the most."""
        return -(-page_size // self.ratio)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """All that the scheduler knows of a group.

    A page of a RECURRENT group is a *slot*: the state of one sequence in all its layers. A slot is
    the working state of a row, or a snapshot of the state at a page boundary, from which other
    rows go on. There are at least `max_rows` slots beside the null slot, so that every row has one;
    what there is beyond them, and what idle rows leave, holds snapshots.
    """

    name: str
    kind: KVKind
    page_size: int  # tokens per page, equal in all groups of a model; where snapshots can stand
    pages: int  # including the null page 0
    window: int = 0
    bytes_per_page: int = 0  # over all layers of the group; of one slot where RECURRENT


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How a platform stores one group: named axes in storage order, their sizes, the dtype."""

    axes: tuple[str, ...]  # of "layer", "kv", "page", "token", "head", "dim"
    shape: tuple[int, ...]
    dtype: str
    scale_axes: tuple[str, ...] = ()


class KVPool(Protocol):
    """The storage of one group, all layers. Pages move between unlike platforms in one canonical
    form, version 1: little-endian, C order, axes (layer, 2, token, head, dim), the pool's dtype."""

    @property
    def group(self) -> KVGroup: ...

    @property
    def layout(self) -> KVLayout: ...

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None: ...

    def export_page(self, page: int) -> bytes:
        """The page in canonical form; a copy."""
        ...

    def import_page(self, page: int, data: bytes) -> None:
        """Raises ValueError when the length does not fit the layout."""
        ...

    def write(self, layer: int, slots: Any, k: Any, v: Any) -> None:
        """Store k, v (T, heads, dim) at flat slots (T,) = page * page_size + offset.
        `layer` counts within the group."""
        ...

    def page_view(self, layer: int, page: int) -> Any:
        """The page of one layer without a copy, for fingerprints; valid until the next step."""
        ...
