"""The vision tower of Step-3.7-Flash: square views of an image to rows that stand in a prompt.

A linear patch embedding with a learned square of positions, blocks of attention inside a view with
rotary angles of columns and rows, and two convolutions that each halve both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from torch import Tensor, nn

from ..common.checkpoint.block_floats import StoredMatrix
from ..common.checkpoint.fields import Fields
from ..common.images.patches import Grid
from ..platforms.interface_kernels import Problem
from .layers import Build, Layer
from .qwen3_5_vision import (
    GridRope,
    LayerNorm,
    Positions,
    TowerLinear,
    VisionArgs,
    patch_places,
)
from .vision import ROWS_AT_ONCE, working_bytes

EPS = 1e-5
MERGE = 4
"""Patches to a side of what becomes one token: two convolutions of stride 2."""
_QUICK = 1.702  # of the sigmoid in place of gelu (Hendrycks and Gimpel 2016, section 2)
_ALIASES = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
_RENAMED = (
    ("in_proj_", "in_proj."),
    ("positional_embedding", "positional_embedding.weight"),
    (".transformer.resblocks.", ".blocks."),
)


def vision_args(fields: Fields) -> VisionArgs | None:
    """From a whole configuration; None for a text model. Raises CheckpointError."""
    values = fields.optional("vision_config")
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise fields.unsupported("vision_config", "an object")
    named = {_ALIASES[name]: values[name] for name in _ALIASES if name in values}
    found = Fields({**values, **named}, fields.source)
    if found.text("hidden_act", "quick_gelu") != "quick_gelu":
        raise found.unsupported("hidden_act", "quick_gelu")
    if found.number("layer_norm_eps", EPS) != EPS:
        raise found.unsupported("layer_norm_eps", str(EPS))
    if fields.flag("projector_bias", False):
        raise fields.unsupported("projector_bias", "false")
    width, heads = found.positive("hidden_size", 1536), found.positive("num_attention_heads", 16)
    if width % (4 * heads):
        raise found.unsupported("hidden_size", f"a multiple of 4 x {heads} heads")
    patch = found.positive("patch_size", 14)
    return VisionArgs(
        depth=found.positive("num_hidden_layers", 47),
        width=width,
        heads=heads,
        inner=int(width * found.number("mlp_ratio", 8960 / 1536)),
        channels=found.positive("num_channels", 3),
        frames=1,
        patch=patch,
        merge=MERGE,
        side=found.positive("image_size", 728) // patch,
        outputs=fields.positive("hidden_size"),
    )


class FlatPatch(TowerLinear):
    """A convolution whose kernel is one patch: a matrix, once it is flattened."""

    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__(args.channels * args.patch**2, args.width, build)
        self.weight = build.parameter(args.width, args.channels, args.patch, args.patch)

    def prepare(self, stored: Iterable[StoredMatrix] | None = None) -> None:
        self.weight = nn.Parameter(self.weight.flatten(1), requires_grad=False)
        super().prepare(stored)

    def problems(self) -> Iterable[Problem]:
        outputs, inputs = self.weight.flatten(1).shape
        yield self.matrix_problem("linear", k=inputs, n=outputs, bias=0)


class ViewAttention(Layer):
    """Checkpoints turn neighbouring pairs of channels."""

    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__(build)
        self.heads = args.heads
        self.head_dim = args.width // args.heads
        self.in_proj = TowerLinear(args.width, 3 * args.width, build, bias=True)
        self.out_proj = TowerLinear(args.width, args.width, build, bias=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], starts: tuple[int, ...]) -> Tensor:
        q, k, v = self.in_proj(x).view(len(x), 3, self.heads, self.head_dim).unbind(1)
        q, k = (self.ops.interleaved_rope(part.contiguous(), *rotary) for part in (q, k))
        seen = self.ops.segment_attention(q, k, v, starts, self.head_dim**-0.5)
        result: Tensor = self.out_proj(seen.flatten(1))
        return result

    def problems(self) -> Iterable[Problem]:
        sizes = {"heads": self.heads, "head_dim": self.head_dim}
        yield self.build.problem("interleaved_rope", **sizes, rotary=self.head_dim)
        yield self.build.problem("segment_attention", **sizes)


class QuickMLP(nn.Module):
    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__()
        self.c_fc = TowerLinear(args.width, args.inner, build, bias=True)
        self.c_proj = TowerLinear(args.inner, args.width, build, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for part in x.split(ROWS_AT_ONCE):
            inner = self.c_fc(part)
            made.append(self.c_proj(inner * (_QUICK * inner).sigmoid()))
        return torch.cat(made)


class Scale(nn.Module):
    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__()
        self.gamma = build.parameter(args.width)


class ViewBlock(nn.Module):
    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(args.width, build, EPS)
        self.ln_2 = LayerNorm(args.width, build, EPS)
        self.ls_1 = Scale(args, build)
        self.ls_2 = Scale(args, build)
        self.attn = ViewAttention(args, build)
        self.mlp = QuickMLP(args, build)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], starts: tuple[int, ...]) -> Tensor:
        x = x + self.ls_1.gamma * self.attn(self.ln_1(x), rotary, starts)
        result: Tensor = x + self.ls_2.gamma * self.mlp(self.ln_2(x))
        return result


class Halving(nn.Module):
    """(channels, down, across) -> (2 * channels, down / 2, across / 2)."""

    def __init__(self, channels: int, build: Build) -> None:
        super().__init__()
        self.weight = build.parameter(2 * channels, channels, 3, 3)
        self.bias = build.parameter(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=2, padding=1)


class Step3p7Vision(nn.Module):
    """Every image of the engine is one view: the whole picture, or a part of it."""

    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__()
        self.dtype = build.dtype
        self.args = args
        self.patch_values = args.channels * args.patch**2
        self.conv1 = FlatPatch(args, build)
        self.positional_embedding = Positions(args, build)
        self.ln_pre = LayerNorm(args.width, build, EPS)
        self.rope = GridRope(args, build)
        self.blocks = nn.ModuleList(ViewBlock(args, build) for _ in range(args.depth))
        self.vit_downsampler1 = Halving(args.width, build)
        self.vit_downsampler2 = Halving(2 * args.width, build)
        self.vit_large_projector = TowerLinear(4 * args.width, args.outputs, build)

    def memory(self, patches: int) -> int:
        """Bytes at once for so many patches, beside the weights. A convolution may lay out its
        kernel anew."""
        args = self.args
        sizes = self.patch_values, args.width, args.inner
        kernel = self.vit_downsampler2.weight.nbytes
        return working_bytes(patches, *sizes, self.dtype.itemsize) + kernel

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches (N, patch_values), each view's in blocks of 4 x 4 neighbours -> (N / 16,
        outputs), each view's row by row."""
        places, sizes = patch_places(grids, MERGE)
        x: Tensor = self.conv1(patches.to(self.dtype))
        learned = self.positional_embedding.resampled(places, sizes, x.device, corners=False)
        x = self.ln_pre(x + learned.to(x.dtype))
        rotary = self.rope(torch.from_numpy(places[::-1].copy()).to(x.device))
        lengths = [down * across for frames, down, across in grids for _ in range(frames)]
        starts = (0, *np.cumsum(lengths, dtype=int).tolist())
        for block in self.blocks:
            x = block(x, rotary, starts)
        views = zip(x.split(lengths), (g for g in grids for _ in range(g[0])), strict=True)
        rows = torch.cat([self._smaller(view, grid) for view, grid in views])
        result: Tensor = self.vit_large_projector(rows)
        return result

    def _smaller(self, view: Tensor, grid: Grid) -> Tensor:
        _, down, across = grid
        blocks = view.view(down // MERGE, across // MERGE, MERGE, MERGE, -1)
        picture = blocks.permute(4, 0, 2, 1, 3).reshape(-1, down, across)
        small: Tensor = self.vit_downsampler2(self.vit_downsampler1(picture))
        return small.flatten(1).mT.contiguous()


def tower_name(name: str) -> str:
    """A checkpoint's name of a tensor of the tower as the modules here are called."""
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name
