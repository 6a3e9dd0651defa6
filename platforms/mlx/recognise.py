"""A whole mlx-lm model recognised: its trunk and head, its layers' needs, and the table that
`--explain` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx

from ..interface import Decision
from ..interface_kv import KVKind
from .adapters import Layer, recognise
from .probe import Found, examine
from .substitution import Substitution
from .trunk import SplitModel


@dataclass(frozen=True, slots=True)
class Recognised:
    model: SplitModel
    layers: tuple[Found, ...]
    decisions: tuple[Decision, ...]

    @property
    def windows(self) -> tuple[int, ...]:
        """Of each layer in tokens, 0 where it sees everything."""
        return tuple(layer.need.window for layer in self.layers)

    @property
    def kv_dtype(self) -> str:
        """Of keys and values; "float32" for a model that has none."""
        kept = [f.dtypes[0] for f in self.layers if f.need.kind is not KVKind.RECURRENT]
        return str(kept[0]).removeprefix("mlx.core.") if kept else "float32"


def recognise_model(model: Any, dtype: mx.Dtype, forms: Substitution | None = None) -> Recognised:
    """`forms`: the functions of mlx-lm that are replaced (`forms.py`), none by default. Raises
    CheckpointError naming the layer that matches nothing or does something else."""
    forms = forms or Substitution(model, {})
    layers = recognise(model)
    split = SplitModel(model, forms)
    found = tuple(examine(layer, split.width, dtype, forms) for layer in layers)
    return Recognised(split, found, tuple(_table(layers, found)))


def _table(layers: Sequence[Layer], found: Sequence[Found]) -> list[Decision]:
    """One decision for each run of layers that are alike."""
    rows = [(_words(layer, f), i) for i, (layer, f) in enumerate(zip(layers, found, strict=True))]
    table = []
    for words, members in groupby(rows, key=lambda row: row[0]):
        indices = [index for _, index in members]
        first, last = indices[0], indices[-1]
        name = f"layer {first}" if first == last else f"layers {first} to {last}"
        looked_for = " and ".join(layers[first].mixer.adapter.parts)
        apart = max(found[i].difference for i in indices)
        because = (
            f"has {looked_for}; run once beside mlx-lm's own, largest difference {apart:.1g} of "
            "the largest output"
        )
        table.append(Decision(name, words, because))
    return table


def _words(layer: Layer, found: Found) -> str:
    others = [part.adapter.name for part in layer.others if part.adapter.name != "norm"]
    return " + ".join([found.name, *others])
