"""From a checkpoint to a model with weights: choose the family, build on meta, fill parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..common.checkpoint.block_floats import StoredMatrix
from ..common.checkpoint.checkpoint import Checkpoint
from ..common.checkpoint.quantization_config import (
    has_block_scales,
    has_mxfp4_stacks,
    packed_scheme,
)
from ..common.errors import CheckpointError
from ..platforms.interface import LoadProgress
from ..platforms.interface_kernels import KernelTable, Problem
from .base import Model, Placement
from .block_weights import BlockWeights
from .deepseek_v3 import DeepseekV3Model
from .deepseek_v4 import DeepseekV4Model
from .gemma3 import Gemma3Model
from .gguf_weights import GGUFWeights
from .gpt_oss import GptOssModel
from .layers import Build, Layer, Norm
from .llama import LlamaModel
from .matrix_cache import VERSION, MatrixCache, Parts, files_of, fingerprint, folder_for
from .mxfp4_stacks import Mxfp4Stacks
from .packed_weights import PackedWeights
from .quantization import FLOATS, assign_schemes
from .qwen2 import Qwen2Model
from .qwen3 import Qwen3Model
from .qwen3_5 import Qwen35Model
from .qwen3_5_moe import Qwen35MoeModel
from .qwen3_moe import Qwen3MoeModel
from .safetensors_weights import SafetensorsWeights
from .stale_matrices import origin_of
from .step3p7 import Step3p7Model

FAMILIES: dict[str, Callable[..., Model]] = {
    "llama": LlamaModel,
    "mistral": LlamaModel,
    "qwen2": Qwen2Model,
    "qwen3": Qwen3Model,
    "qwen3_moe": Qwen3MoeModel,
    "qwen3_5_text": Qwen35Model,
    "qwen3_5_moe_text": Qwen35MoeModel,
    "gemma3_text": Gemma3Model,
    "gpt_oss": GptOssModel,
    "deepseek_v3": DeepseekV3Model,
    "deepseek_v4": DeepseekV4Model,
    "step3p5": Step3p7Model,
}
"""Model type -> class, called with (fields, build)."""

_TEXT_PREFIX = re.compile(r"(?:language_model\.model|model\.language_model|model)\.")
_HEAD_PREFIX = "language_model.lm_head."
# Parts of multimodal checkpoints that a text model has no use for.
_VISION_PREFIX = re.compile(r"(?:model\.)?(?:visual|vision_model)\.|(?=vit_large_projector\.)")
_OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|vision_model|multi_modal_projector|visual|vit_large_projector)\."
)


class WeightSource(Protocol):
    """Tensors by name. `norm_offset` is what stored norm weights already include of a 1 + w."""

    norm_offset: float

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def where(self, name: str) -> str: ...

    def mapped(self, name: str, dtype: torch.dtype) -> Tensor | None: ...

    def copy_into(self, name: str, target: Tensor) -> None: ...

    def scheme(self, name: str) -> str:
        """The form that a matrix is stored in; "" for float32 and for vectors."""
        ...

    def is_spare(self, name: str) -> bool:
        """Whether a model that has no such tensor computes the same without it."""
        ...

    def quantised(self, name: str) -> StoredMatrix:
        """A whole matrix in the form that it is stored in, when that is not a dtype."""
        ...


@dataclass(frozen=True, slots=True)
class _Piece:
    """One checkpoint tensor and the part of a parameter that it fills."""

    tensor: str
    placement: Placement


def build_model(
    checkpoint: Checkpoint,
    ops: KernelTable,
    dtype: torch.dtype,
    quantize: str = "",
    drafts: bool = False,
) -> Model:
    """The model without weights (on meta). `quantize` as in `assign_schemes`; `drafts`: with its
    draft head. Raises CheckpointError for what is not supported."""
    family = FAMILIES.get(checkpoint.architecture)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.config_file}: architecture {checkpoint.architecture!r} is not supported; "
            f"supported: {' '.join(FAMILIES)}."
        )
    with torch.device("meta"):
        model = family(checkpoint.fields, Build(ops, dtype, drafts)).eval()
    if drafts:
        _require_head(model, checkpoint)
    stored = {}
    if quantize == "stored":
        stored = _stored_schemes(model, open_weights(checkpoint), str(dtype).removeprefix("torch."))
    assign_schemes(model, quantize, stored)
    return model


def _require_head(model: Model, checkpoint: Checkpoint) -> None:
    names = (_canonical(tensor, model) for tensor in open_weights(checkpoint).names())
    places = (model.placement(name) for name in names if name)
    if model.drafts and any(place and place.parameter.startswith("mtp.") for place in places):
        return
    lacks = "has no tensors of one" if model.drafts else "is of a family without one"
    raise CheckpointError(
        f"--draft mtp wants a draft head (MTP): {checkpoint.path} {lacks} (architecture "
        f"{checkpoint.architecture!r}). Use --draft ngram, or leave --draft out."
    )


def open_weights(checkpoint: Checkpoint) -> WeightSource:
    if checkpoint.format == "gguf":
        return GGUFWeights(checkpoint.path)
    if has_block_scales(checkpoint.config, checkpoint.config_file):
        return BlockWeights(checkpoint.path)
    if has_mxfp4_stacks(checkpoint.config, checkpoint.config_file):
        return Mxfp4Stacks(checkpoint.path)
    scheme = packed_scheme(checkpoint.config, checkpoint.config_file)
    if scheme is not None:
        return PackedWeights(checkpoint.path, scheme)
    return SafetensorsWeights(checkpoint.path)


def _stored_schemes(model: Model, source: WeightSource, dtype_name: str) -> dict[str, str]:
    """Parameter name -> scheme, for matrices that are stored in a form of their own."""
    found = {}
    for tensor in source.names():
        name, scheme = _canonical(tensor, model), source.scheme(tensor)
        placement = model.placement(name) if name and scheme not in ("", dtype_name) else None
        if placement is not None:
            found[placement.parameter] = scheme
    known = {name for _, _, name in _parameters(model)}
    return {name: scheme for name, scheme in found.items() if name in known}


def kernel_problems(
    checkpoint: Checkpoint, dtype_name: str, quantize: str = "", drafts: bool = False
) -> list[Problem]:
    """The ops that the model calls, with their static sizes; attention is not among them."""
    dtype = getattr(torch, dtype_name)
    model = build_model(checkpoint, KernelTable({}, ()), dtype, quantize, drafts)
    found: dict[tuple[object, ...], Problem] = {}
    for module in model.modules():
        if isinstance(module, Layer):
            for problem in module.problems():
                found[(problem.op, problem.weights, *sorted(problem.dims.items()))] = problem
    return list(found.values())


def load_weights(
    model: Model,
    checkpoint: Checkpoint,
    to_device: Callable[[Tensor], Tensor],
    progress: LoadProgress | None = None,
    cache: MatrixCache | None = None,
) -> None:
    """Give every parameter and buffer its value, one after the other.

    `to_device` gets a CPU tensor of the final dtype, which may lie on mapped pages of the file, and
    returns the tensor to keep. Matrices come from `cache` where it has them; else it is given those
    that are worth keeping. Raises CheckpointError naming the file and the tensor.
    """
    source = open_weights(checkpoint)
    pieces = _assign(model, source, checkpoint)
    total, done = sum(parameter.nbytes for parameter in model.parameters()), 0
    stored: dict[nn.Module, list[str]] = {}  # layers whose matrices stay as they are -> tensors
    restored: dict[nn.Module, Parts] = {}
    left = {module: len(list(module.parameters(recurse=False))) for module in model.modules()}
    for owner, leaf, name in list(_parameters(model)):
        meta = getattr(owner, leaf)
        tensors = [piece.tensor for piece in pieces[name]]
        kept = None
        if cache is not None and leaf == "weight" and isinstance(owner, Layer):
            kept = cache.get(name)
        scheme = owner.scheme if leaf == "weight" and isinstance(owner, Layer) else ""
        if kept is not None:
            restored[owner] = kept
        elif scheme not in ("", *FLOATS) and {source.scheme(t) for t in tensors} == {scheme}:
            stored[owner] = tensors
        else:
            dtype = FLOATS.get(scheme, meta.dtype)
            value = to_device(_value(owner, meta.to(dtype), pieces[name], source))
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        left[owner] -= 1
        if not left[owner] and isinstance(owner, Layer):
            # As soon as a layer is whole, so that two forms of one weight exist at a time.
            if owner in restored:
                owner.restore(restored[owner])
            else:
                kept_as = (source.quantised(t) for t in stored[owner]) if owner in stored else None
                owner.prepare(kept_as)
        done += meta.nbytes
        if progress:
            progress(done, total)
    for module in model.modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, to_device(buffer))
    if cache is not None and not cache.found:
        for name, module in model.named_modules():
            parts = module.keepable() if isinstance(module, Layer) else None
            if parts is not None:
                cache.put(f"{name}.weight", parts)


def open_cache(model: Model, checkpoint: Checkpoint) -> MatrixCache | None:
    """Where the packed matrices of this model are or will be kept; None when its kernels keep
    nothing."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Layer)}
    kernels = {op: k for layer in layers.values() for op, k in layer.ops.kernels.items()}
    keeping = {op: k.provider for op, k in kernels.items() if k.dismantle is not None}
    if not keeping:
        return None
    settings = {
        "kernels": keeping,
        "schemes": {name: layer.scheme for name, layer in layers.items()},
        "dtypes": {name: layer.build.dtype_name for name, layer in layers.items()},
    }
    files = files_of(checkpoint.path)
    origin = origin_of(checkpoint.path, files, VERSION)
    return MatrixCache(folder_for(checkpoint.path), fingerprint(files, settings), origin)


def _value(owner: nn.Module, meta: Tensor, pieces: list[_Piece], source: WeightSource) -> Tensor:
    offset = owner.offset - source.norm_offset if isinstance(owner, Norm) and owner.offset else 0.0
    whole = not pieces[0].placement.index
    if whole and not offset:
        mapped = source.mapped(pieces[0].tensor, meta.dtype)
        if mapped is not None:
            return mapped
    value = torch.empty(meta.shape, dtype=meta.dtype)
    for piece in pieces:
        source.copy_into(piece.tensor, value[piece.placement.index] if not whole else value)
    return value + offset if offset else value


def _assign(model: Model, source: WeightSource, checkpoint: Checkpoint) -> dict[str, list[_Piece]]:
    """Parameter name -> the checkpoint tensors that fill it; every one checked."""
    shapes = {name: getattr(owner, leaf) for owner, leaf, name in _parameters(model)}
    tied = "lm_head.weight" not in shapes
    pieces: dict[str, list[_Piece]] = {}
    for tensor in source.names():
        name = _canonical(tensor, model)
        if name is None or (tied and name == "lm_head.weight"):
            continue
        placement = model.placement(name)
        if placement is None:
            continue
        if placement.parameter not in shapes:
            if source.is_spare(tensor):
                continue
            raise CheckpointError(
                f"{source.where(tensor)} is not part of the architecture "
                f"{checkpoint.architecture!r} as configured; the model would answer wrongly "
                "without it."
            )
        _check_shape(source, tensor, shapes[placement.parameter], placement, checkpoint)
        pieces.setdefault(placement.parameter, []).append(_Piece(tensor, placement))
    _check_complete(shapes, pieces, source, checkpoint)
    for parts in pieces.values():
        parts.sort(key=_place)
    return pieces


def _place(piece: _Piece) -> tuple[int, ...]:
    """Where in its parameter a piece begins: a stack's matrices are wanted in order."""
    return tuple(i if isinstance(i, int) else i.start for i in piece.placement.index)


def _canonical(tensor: str, model: Model) -> str | None:
    """The name under "model.", "lm_head." or "vision."; None for parts that the model does not
    have."""
    tower = _VISION_PREFIX.match(tensor)
    if tower and model.images() is not None:
        return "vision." + tensor[tower.end() :]
    if _OTHER_PARTS.match(tensor) or tensor.endswith("rotary_emb.inv_freq"):
        return None
    if tensor.startswith(_HEAD_PREFIX):
        return "lm_head." + tensor.removeprefix(_HEAD_PREFIX)
    found = _TEXT_PREFIX.match(tensor)
    return "model." + tensor[found.end() :] if found else tensor


def _check_shape(
    source: WeightSource,
    tensor: str,
    parameter: Tensor,
    placement: Placement,
    checkpoint: Checkpoint,
) -> None:
    try:
        wanted = tuple(parameter[placement.index].shape if placement.index else parameter.shape)
    except IndexError:
        wanted = ()
    if source.shape(tensor) != wanted:
        raise CheckpointError(
            f"{source.where(tensor)} has shape {source.shape(tensor)}; the configuration in "
            f"{checkpoint.config_file.name} asks for {wanted or 'no such part'}."
        )


def _check_complete(
    shapes: dict[str, Tensor],
    pieces: dict[str, list[_Piece]],
    source: WeightSource,
    checkpoint: Checkpoint,
) -> None:
    missing = []
    for name, parameter in shapes.items():
        filled = sum(torch.Size(source.shape(p.tensor)).numel() for p in pieces.get(name, []))
        if filled != parameter.numel():
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path}: tensor {missing[0]!r}{more} is missing or incomplete; the "
            "checkpoint does not hold the whole model."
        )


def _parameters(model: Model) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, attribute, full name) of every parameter."""
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            yield module, leaf, f"{prefix}.{leaf}" if prefix else leaf
