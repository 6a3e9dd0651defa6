"""Cache groups and how one platform stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]


class KVKind(Enum):
    """FULL keeps every token; WINDOW only the last `window`; RECURRENT one state of fixed size per
    sequence (gated delta nets, convolution tails, Mamba). LATENT and COMPRESSED have their place in
    the contract and no scheduler support yet: a model that needs one is refused at load."""

    FULL = "full"
    WINDOW = "window"
    LATENT = "latent"
    COMPRESSED = "compressed"
    RECURRENT = "recurrent"


@dataclass(frozen=True, slots=True)
class CacheNeed:
    """What one layer of a model must remember. Layers with equal needs form one group."""

    kind: KVKind
    kv_heads: int
    head_dim: int
    window: int = 0  # WINDOW: a query at position p sees keys at p-window+1 .. p
    value_dim: int = 0  # of the values where it is not head_dim
    state_bytes: int = 0  # RECURRENT: of the layer's state of one sequence

    @property
    def values_dim(self) -> int:
        return self.value_dim or self.head_dim


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
