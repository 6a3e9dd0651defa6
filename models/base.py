"""What a torch model gives the runtime, and what it is given. No device, no cache here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ..common.images.patches import Grid
from ..platforms.interface import ImageInput
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kv import CacheNeed, KVKind


class Attend(Protocol):
    """Stores k and v in the site's cache and attends. The runtime binds it anew for every step."""

    def __call__(
        self, site: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """q (T, heads, dim), k and v (T, kv_heads, dim), rope applied -> (T, heads, dim). `sinks`
        (heads,) float32, a parameter of the model, where the site's spec has them."""
        ...


class State(NamedTuple):
    """A recurrent site: its arrays (slots, *shape), which an op changes in place, and the slot of
    each row, (R,) int32, -1 = a row of padding. A row without context begins from zero."""

    arrays: tuple[Tensor, ...]
    slots: Tensor


class Pages(NamedTuple):
    """A site of one vector per entry: `cache` (pages * entries, dim), which an op writes in place;
    `table` (R, P) int32, the rows' pages of `page_size` tokens and `entries` entries."""

    cache: Tensor
    table: Tensor
    page_size: int
    entries: int


class Step(Attend, Protocol):
    """A step as the model's layers see it, beside their inputs. All tensors are on the device."""

    query_start: Tensor  # (R+1,) int32, where each row's new tokens begin
    context_lens: Tensor  # (R,) int32, tokens of each row before them

    def state(self, site: int) -> State: ...

    def pages(self, site: int) -> Pages: ...


def attention_need(spec: AttentionSpec) -> CacheNeed:
    kind = KVKind.WINDOW if spec.window else KVKind.FULL
    return CacheNeed(kind, spec.kv_heads, spec.head_dim, spec.window)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a checkpoint's tensor goes: a parameter, or the part of it that `index` selects."""

    parameter: str
    index: tuple[int | slice, ...] = ()


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_of(name: str) -> int:
    """The layer that a canonical tensor name belongs to; -1: none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


class Model(nn.Module):
    """A decoder-only language model over a packed step of T tokens (rows concatenated)."""

    def cache_needs(self) -> Sequence[CacheNeed]:
        """One per cache site. Here, of a model of attention alone, that is one per layer."""
        return [attention_need(spec) for spec in self.attention_specs() if spec is not None]

    def attention_specs(self) -> Sequence[AttentionSpec | None]:
        """One per cache site, None where the model's own op reads and writes the cache; sites with
        equal cache needs have equal specs."""
        raise NotImplementedError

    def forward(self, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        """token_ids, positions (T,) int -> hidden states (T, hidden) after the final norm."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden) -> (N, vocab) float32. Called only for positions whose logits are wanted."""
        raise NotImplementedError

    @property
    def drafts(self) -> bool:
        """Whether the model was built with its draft head, the module `mtp`. Its caches are sites
        of their own, and `forward` then gives the hidden states that it reads."""
        return hasattr(self, "mtp")

    def draft(self, hidden: Tensor, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        """The head over tokens whose hidden states (T, …) `forward`, or the head itself, gave;
        `token_ids` (T,) are those after them -> the head's hidden states, of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} has no draft head.")

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """What `draft` gave (N, …) -> (N, vocab) float32: of the token after the next."""
        raise NotImplementedError(f"{type(self).__name__} has no draft head.")

    def images(self) -> ImageInput | None:
        """How the model takes images; None: it reads text only. One that takes images has its
        vision tower as the module `vision`; its `forward` takes `images=ImageRows`
        (models/vision.py) and then positions (3, T) too."""
        return None

    def image_rows(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches (N, patch_values) float32 of all images, one after the other -> the rows
        (tokens of all images, hidden) that take the place of embeddings."""
        tower = getattr(self, "vision", None)
        if tower is None:
            raise NotImplementedError(f"{type(self).__name__} reads text only.")
        rows: Tensor = tower(patches, grids)
        return rows

    def image_memory(self, patches: int) -> int:
        """Bytes that `image_rows` has at once for so many patches, at most, beside the weights."""
        tower = getattr(self, "vision", None)
        return 0 if tower is None else int(tower.memory(patches))

    def placement(self, name: str) -> Placement | None:
        """The place of the checkpoint tensor `name` (canonical: "model.layers.0…", "lm_head…").
        None when it is known and not needed. Modules are named as checkpoints name them."""
        return Placement(name)
