"""The vision tower of Qwen3.5: patches of images to rows that stand in a prompt as tokens do.

A linear patch embedding, a learned square of positions resampled to each image's grid, blocks of
attention inside an image with rotary angles of rows and columns, and a merger that makes one row of
merge x merge patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own spelling)
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common.checkpoint.block_floats import StoredMatrix
from ..common.checkpoint.fields import Fields
from ..common.images.patches import Grid
from ..platforms.interface_kernels import Problem
from .layers import Build, Embedding, Layer, Linear
from .vision import ROWS_AT_ONCE, working_bytes

EPS = 1e-6
THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class VisionArgs:
    """`side`: rows and columns of the learned square of positions; `outputs`: the text's width."""

    depth: int
    width: int
    heads: int
    inner: int
    channels: int
    frames: int
    patch: int
    merge: int
    side: int
    outputs: int

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """From `vision_config`. Raises CheckpointError."""
        if fields.text("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise fields.unsupported("hidden_act", "gelu_pytorch_tanh")
        if fields.optional("deepstack_visual_indexes"):
            raise fields.unsupported("deepstack_visual_indexes", "none, as in Qwen3.5")
        width, heads = fields.positive("hidden_size"), fields.positive("num_heads")
        if width % (4 * heads):
            raise fields.unsupported("hidden_size", f"a multiple of 4 x {heads} heads")
        positions = fields.positive("num_position_embeddings")
        if isqrt(positions) ** 2 != positions:
            raise fields.unsupported("num_position_embeddings", "a square number")
        return cls(
            depth=fields.positive("depth"),
            width=width,
            heads=heads,
            inner=fields.positive("intermediate_size"),
            channels=fields.positive("in_channels", 3),
            frames=fields.positive("temporal_patch_size", 2),
            patch=fields.positive("patch_size", 16),
            merge=fields.positive("spatial_merge_size", 2),
            side=isqrt(positions),
            outputs=fields.positive("out_hidden_size"),
        )


class TowerLinear(Linear):
    """Stays in the dtype, or as stored, whatever the text's matrices are rounded to."""

    rounds_on_load = False


class LayerNorm(Layer):
    def __init__(self, width: int, build: Build, eps: float = EPS) -> None:
        super().__init__(build)
        self.weight = build.parameter(width)
        self.bias = build.parameter(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.ops.layer_norm(x, self.weight, self.bias, self.eps)
        return result

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem("layer_norm", width=len(self.weight))


class PatchProjection(TowerLinear):
    """A convolution whose kernel is one patch: a matrix, once it is flattened."""

    def __init__(self, args: VisionArgs, build: Build) -> None:
        size = args.channels, args.frames, args.patch, args.patch
        super().__init__(int(np.prod(size)), args.width, build, bias=True)
        self.weight = build.parameter(args.width, *size)

    def prepare(self, stored: Iterable[StoredMatrix] | None = None) -> None:
        self.weight = nn.Parameter(self.weight.flatten(1), requires_grad=False)
        super().prepare(stored)

    def problems(self) -> Iterable[Problem]:
        outputs, inputs = self.weight.flatten(1).shape
        yield self.matrix_problem("linear", k=inputs, n=outputs, bias=1)


class PatchEmbedding(nn.Module):
    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__()
        self.proj = PatchProjection(args, build)


class Positions(Embedding):
    """The learned square, by row and column."""

    rounds_on_load = False

    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__(args.side**2, args.width, build, tied=False)
        self.side = args.side

    def resampled(
        self,
        places: NDArray[np.int64],
        sizes: NDArray[np.int64],
        device: torch.device,
        corners: bool = True,
    ) -> Tensor:
        """places and sizes (2, N): row and column of each patch, and of how many -> (N, width)
        float32, bilinear between the four nearest: the centres of the patches in the corners lie
        on each other, or (without `corners`) the squares' outer edges do."""
        exact = places * (self.side - 1) / np.maximum(sizes - 1, 1)
        if not corners:
            exact = np.maximum((places + 0.5) * self.side / sizes - 0.5, 0.0)
        low = np.floor(exact).astype(np.int64)
        share = (exact - low).astype(np.float32)
        both = np.stack([low, np.minimum(low + 1, self.side - 1)])  # (2, axis, N)
        weights = np.stack([1 - share, share])
        ids = both[:, None, 0] * self.side + both[None, :, 1]
        factors = weights[:, None, 0] * weights[None, :, 1]
        rows = self(torch.from_numpy(ids.reshape(-1)).to(device)).float()
        taps = torch.from_numpy(factors.reshape(4, -1, 1)).to(device)
        return (rows.view(4, places.shape[1], -1) * taps).sum(0)


class VisionAttention(Layer):
    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__(build)
        self.heads = args.heads
        self.head_dim = args.width // args.heads
        self.qkv = TowerLinear(args.width, 3 * args.width, build, bias=True)
        self.proj = TowerLinear(args.width, args.width, build, bias=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], starts: tuple[int, ...]) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, self.head_dim).unbind(1)
        q, k = self.ops.rope(q, k, *rotary)
        seen = self.ops.segment_attention(q, k, v, starts, self.head_dim**-0.5)
        result: Tensor = self.proj(seen.flatten(1))
        return result

    def problems(self) -> Iterable[Problem]:
        sizes = {"heads": self.heads, "head_dim": self.head_dim}
        yield self.build.problem("rope", kv_heads=self.heads, **sizes)
        yield self.build.problem("segment_attention", **sizes)


class VisionMLP(nn.Module):
    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__()
        self.linear_fc1 = TowerLinear(args.width, args.inner, build, bias=True)
        self.linear_fc2 = TowerLinear(args.inner, args.width, build, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(ROWS_AT_ONCE)
        made = [self.linear_fc2(F.gelu(self.linear_fc1(p), approximate="tanh")) for p in parts]
        return made[0] if len(made) == 1 else torch.cat(made)


class VisionBlock(nn.Module):
    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__()
        self.norm1 = LayerNorm(args.width, build)
        self.norm2 = LayerNorm(args.width, build)
        self.attn = VisionAttention(args, build)
        self.mlp = VisionMLP(args, build)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], starts: tuple[int, ...]) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary, starts)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class VisionMerger(nn.Module):
    """merge x merge neighbours, which follow one another, become one row of the text's width."""

    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__()
        block = args.width * args.merge**2
        self.block = block
        self.norm = LayerNorm(args.width, build)
        self.linear_fc1 = TowerLinear(block, block, build, bias=True)
        self.linear_fc2 = TowerLinear(block, args.outputs, build, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.norm(x).view(-1, self.block)
        result: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(blocks)))
        return result


class GridRope(Layer):
    """Angles of rows, then of columns, over the whole head."""

    inverse: Tensor

    def __init__(self, args: VisionArgs, build: Build) -> None:
        super().__init__(build)
        half = args.width // args.heads // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half
        self.register_buffer("inverse", 1.0 / THETA**exponents, persistent=False)

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """places (2, N) int64: row and column -> cos and sin (N, head_dim / 2) float32."""
        down, across = (self.ops.rope_angles(axis, self.inverse, 1.0) for axis in places)
        cos, sin = (torch.cat(pair, dim=-1) for pair in zip(down, across, strict=True))
        return cos, sin

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem("rope_angles", half=len(self.inverse))


class Qwen35Vision(nn.Module):
    """Modules are named as checkpoints name them."""

    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        args = VisionArgs.read(fields)
        self.dtype = build.dtype
        self.merge = args.merge
        self.args = args
        self.patch_values = args.channels * args.frames * args.patch**2
        self.patch_embed = PatchEmbedding(args, build)
        self.pos_embed = Positions(args, build)
        self.rope = GridRope(args, build)
        self.blocks = nn.ModuleList(VisionBlock(args, build) for _ in range(args.depth))
        self.merger = VisionMerger(args, build)

    def memory(self, patches: int) -> int:
        """Bytes at once for so many patches, beside the weights."""
        args = self.args
        sizes = self.patch_values, args.width, args.inner
        return working_bytes(patches, *sizes, self.dtype.itemsize)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """patches (N, patch_values), each image's in blocks of merge x merge neighbours -> (N /
        merge^2, outputs)."""
        places, sizes = patch_places(grids, self.merge)
        x: Tensor = self.patch_embed.proj(patches.to(self.dtype))
        x = x + self.pos_embed.resampled(places, sizes, x.device).to(x.dtype)
        rotary = self.rope(torch.from_numpy(places).to(x.device))
        lengths = [down * across for frames, down, across in grids for _ in range(frames)]
        starts = (0, *np.cumsum(lengths, dtype=int).tolist())
        for block in self.blocks:
            x = block(x, rotary, starts)
        result: Tensor = self.merger(x)
        return result


def vision_fields(fields: Fields) -> Fields | None:
    """`vision_config` of a whole configuration; None for a text model. Raises CheckpointError where
    the tower's rows would not fit the text's."""
    values = fields.optional("vision_config")
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise fields.unsupported("vision_config", "an object")
    found = Fields(values, fields.source)
    width = fields.positive("hidden_size")
    if found.positive("out_hidden_size") != width:
        raise found.unsupported("out_hidden_size", f"the text's hidden_size, {width}")
    return found


def patch_places(grids: Sequence[Grid], merge: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(2, N) row and column of every patch in the order of the rows, and (2, N) its image's rows
    and columns."""
    places, sizes = [], []
    for frames, down, across in grids:
        raster = np.indices((down, across), np.int64)
        blocks = raster.reshape(2, down // merge, merge, across // merge, merge)
        ordered = blocks.transpose(0, 1, 3, 2, 4).reshape(2, -1)
        places.append(np.tile(ordered, frames))
        sizes.append(np.broadcast_to([[down], [across]], (2, frames * down * across)))
    return np.concatenate(places, axis=1), np.concatenate(sizes, axis=1)
