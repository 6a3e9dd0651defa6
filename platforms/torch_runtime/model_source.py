"""Where a model comes from: a checkpoint on disk, or an object of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...models.base import Model
from ..interface import Decision, EngineSpec, LoadProgress
from ..interface_kernels import KernelTable, Problem


class ModelSource(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    @property
    def stored_dtype(self) -> str:
        """The dtype that the checkpoint declares, "" when it declares none."""
        ...

    def kernel_problems(self, dtype: str, quantize: str) -> Sequence[Problem]: ...

    def build(self, ops: KernelTable, dtype: torch.dtype, quantize: str) -> Model:
        """The model on the meta device."""
        ...

    def load(
        self,
        model: Model,
        to_device: Callable[[Tensor], Tensor],
        progress: LoadProgress | None,
    ) -> Decision | None:
        """Replace every meta tensor of `model` by its values. What was decided on the way."""
        ...


class CheckpointSource:
    """A Hugging Face directory or a GGUF file."""

    def __init__(self, path: str, keep: bool = False, drafts: bool = False) -> None:
        """`keep`: packed matrices on disk, for the next start; `drafts`: with the draft head."""
        self._keep = keep
        self._drafts = drafts
        from ...common.checkpoint.checkpoint import open_checkpoint

        self._checkpoint = open_checkpoint(path)

    @property
    def name(self) -> str:
        return self._checkpoint.name

    @property
    def vocab_size(self) -> int:
        return self._checkpoint.vocab_size

    @property
    def context_length(self) -> int:
        return self._checkpoint.context_length

    @property
    def stored_dtype(self) -> str:
        config = self._checkpoint.config
        return str(config.get("dtype") or config.get("torch_dtype") or "")

    def kernel_problems(self, dtype: str, quantize: str) -> Sequence[Problem]:
        from ...models.loading import kernel_problems

        return kernel_problems(self._checkpoint, dtype, quantize, self._drafts)

    def build(self, ops: KernelTable, dtype: torch.dtype, quantize: str) -> Model:
        from ...models.loading import build_model

        return build_model(self._checkpoint, ops, dtype, quantize, self._drafts)

    def load(
        self,
        model: Model,
        to_device: Callable[[Tensor], Tensor],
        progress: LoadProgress | None,
    ) -> Decision | None:
        from ...models.loading import load_weights, open_cache

        cache = open_cache(model, self._checkpoint) if self._keep else None
        load_weights(model, self._checkpoint, to_device, progress, cache)
        if cache is None:
            return None
        if cache.found:
            return Decision("packed weights", "mapped", f"{cache.path} has them; it may be deleted")
        cache.save_aside()
        because = f"the next start maps {cache.path}; --no-weight-cache keeps nothing"
        return Decision("packed weights", "made, and kept", because)


def open_source(spec: EngineSpec) -> ModelSource:
    return CheckpointSource(spec.model_path, spec.weight_cache, spec.draft == "mtp")
