"""What a torch model gives the runtime, and what it is given. No device, no cache here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..common.images.patches import Grid
from ..platforms.interface import ImageInput
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kv import CacheNeed, KVKind


class Attend(Protocol):
    """Stores k and v in the layer's cache and attends. The runtime binds it anew for every step."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """q (T, heads, dim), k and v (T, kv_heads, dim), rope applied -> (T, heads, dim). `sinks`
        (heads,) float32, a parameter of the model, where the layer's spec has them."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a checkpoint's tensor goes: a parameter, or the part of it that `index` selects."""

    parameter: str
    index: tuple[int | slice, ...] = ()


class Model(nn.Module):
    """A decoder-only language model over a packed step of T tokens (rows concatenated)."""

    def cache_needs(self) -> Sequence[CacheNeed]:
        """One per layer: here, what its attention reads."""
        return [
            CacheNeed(
                KVKind.WINDOW if spec.window else KVKind.FULL,
                spec.kv_heads,
                spec.head_dim,
                spec.window,
            )
            for spec in self.attention_specs()
        ]

    def attention_specs(self) -> Sequence[AttentionSpec]:
        """One per layer; layers with equal cache needs have equal specs."""
        raise NotImplementedError

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """token_ids, positions (T,) int -> hidden states (T, hidden) after the final norm."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden) -> (N, vocab) float32. Called only for positions whose logits are wanted."""
        raise NotImplementedError

    def images(self) -> ImageInput | None:
        """How the model takes images; None: it reads text only. One that takes images has its
        vision tower as the module `vision` and implements `image_rows`; its `forward` takes
        `images=ImageRows` (models/vision.py) and then positions (3, T) too."""
        return None

    def image_rows(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches (N, patch_values) float32 of all images, one after the other -> the rows
        (tokens of all images, hidden) that take the place of embeddings."""
        raise NotImplementedError(f"{type(self).__name__} reads text only.")

    def placement(self, name: str) -> Placement | None:
        """The place of the checkpoint tensor `name` (canonical: "model.layers.0…", "lm_head…").
        None when it is known and not needed. Modules are named as checkpoints name them."""
        return Placement(name)
