"""An mlx-lm model cut in two without touching it: the trunk gives hidden states of all positions,
the head gives logits of the few that sample.

mlx-lm models run their head on every position. What the head does besides a product (soft caps,
scales, tied embeddings) stands in each model's own code. So that code is run as it is, with the
trunk replaced for that one call by an object that returns hidden states computed before.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...common.errors import CheckpointError
from .substitution import Substitution


class _Given(nn.Module):
    """Takes the trunk's place: returns what it was given; all else is the trunk's."""

    def __init__(self, trunk: nn.Module, hidden: mx.array) -> None:
        super().__init__()
        object.__setattr__(self, "_trunk", trunk)
        object.__setattr__(self, "_hidden", hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_trunk"), name)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return object.__getattribute__(self, "_hidden")


class SplitModel:
    """`trunk(tokens, cache)` and `head(hidden)` of a model that has `layers`."""

    def __init__(self, model: Any, forms: Substitution) -> None:
        """`forms`: functions that the trunk calls in place of mlx-lm's. Raises CheckpointError when
        the parts cannot be found or do not make up the whole."""
        self.model = model
        self._forms = forms
        self._parent, self._name = _find_trunk(model)
        self._trunk = self._parent[self._name]
        self._check()

    @property
    def width(self) -> int:
        """Features of a token inside the layers."""
        tokens = mx.zeros((1, 1), mx.int32)
        return int(self._trunk.embed_tokens(tokens).shape[-1])

    def trunk(self, tokens: mx.array, caches: list[Any] | None) -> mx.array:
        """tokens (R, S) -> (R, S, width)."""
        with self._forms:
            return self._trunk(tokens, caches)

    def head(self, hidden: mx.array) -> mx.array:
        """(R, S, width) -> logits (R, S, V)."""
        given = _Given(self._trunk, hidden)
        self._parent[self._name] = given
        try:
            return self.model(mx.zeros(hidden.shape[:2], mx.int32))
        finally:
            self._parent[self._name] = self._trunk

    def _check(self) -> None:
        tokens = mx.array([[1, 2, 3, 4]], mx.int32)
        whole = self.model(tokens)
        parts = self.head(self._trunk(tokens, None))
        if whole.shape != parts.shape or not bool(mx.array_equal(whole, parts, equal_nan=True)):
            raise CheckpointError(
                "The model's head does more than the trunk's hidden states show: its logits are "
                "others when it is run in two parts. This version cannot serve it."
            )


def _find_trunk(model: Any) -> tuple[Any, str]:
    """The module with the embedding and the layers, as (its parent, its name there)."""
    stack = [model]
    while stack:
        parent = stack.pop()
        for name, child in parent.children().items():
            if not isinstance(child, nn.Module):
                continue
            if "embed_tokens" in child and "layers" in child:
                return parent, name
            stack.append(child)
    raise CheckpointError(
        f"{type(model).__module__}.{type(model).__name__} has no part with embed_tokens and layers."
    )
