"""DeepSeek-V4: residual streams mixed by hyper-connections, attention over a window and compressed
entries, mixtures of experts. Its draft layers are known and not loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kernels import Problem
from ..platforms.interface_kv import CacheNeed
from .base import Model, Placement, Step
from .deepseek_v4_args import DeepseekV4Args
from .deepseek_v4_attention import Angles, DeepseekV4Attention, PlainNorm
from .deepseek_v4_experts import DeepseekV4Experts
from .layers import Build, Embedding, HeadNorm, Layer, Linear
from .rope import Rope


@dataclass(frozen=True, slots=True)
class Open:
    """Streams (T, N, D) that a sub-layer's result is still to be written back to, and how."""

    streams: Tensor
    post: Tensor
    mixing: Tensor


class Mixer(Layer):
    """The hyper-connection before a sub-layer; the write-back of the one before is joined to it."""

    def __init__(self, args: DeepseekV4Args, first: bool, build: Build) -> None:
        super().__init__(build)
        outputs = (2 + args.streams) * args.streams
        self.fn = build.parameter(outputs, args.streams * args.width, dtype=torch.float32)
        self.base = build.parameter(outputs, dtype=torch.float32)
        self.scale = build.parameter(3, dtype=torch.float32)
        self.args, self.first = args, first

    def enter(self, streams: Tensor, norm: HeadNorm) -> tuple[Tensor, Open]:
        """The model's first sub-layer: (its normed input (T, D), what is open)."""
        args = self.args
        x, post, mixing = self.ops.mhc_pre(
            streams, self.fn, self.base, self.scale, args.sinkhorn, args.mix_eps, args.eps
        )
        return self.ops.rms_norm(x, norm.weight, args.eps), Open(streams, post, mixing)

    def join(self, made: Tensor, last: Open, norm: HeadNorm) -> tuple[Tensor, Open]:
        """The same, after `made` (T, D) by the sub-layer before is written back."""
        args = self.args
        streams, x, post, mixing = self.ops.mhc_post_pre(
            made,
            last.streams,
            last.post,
            last.mixing,
            self.fn,
            self.base,
            self.scale,
            norm.weight,
            args.sinkhorn,
            args.mix_eps,
            args.eps,
        )
        return x, Open(streams, post, mixing)

    def problems(self) -> Iterable[Problem]:
        sizes = {"streams": self.args.streams, "width": self.args.width}
        if self.first:
            yield self.build.problem("mhc_pre", **sizes)
            yield self.build.problem("rms_norm", width=self.args.width, weight_bytes=self._bytes)
        else:
            yield self.build.problem("mhc_post_pre", **sizes)

    @property
    def _bytes(self) -> int:
        return self.build.dtype.itemsize


class Collapse(Layer):
    """All streams to one, behind the last layer."""

    def __init__(self, args: DeepseekV4Args, build: Build) -> None:
        super().__init__(build)
        self.fn = build.parameter(args.streams, args.streams * args.width, dtype=torch.float32)
        self.base = build.parameter(args.streams, dtype=torch.float32)
        self.scale = build.parameter(1, dtype=torch.float32)
        self.args = args

    def forward(self, made: Tensor, last: Open) -> Tensor:
        streams = self.ops.mhc_post(made, last.streams, last.post, last.mixing)
        args = self.args
        result: Tensor = self.ops.mhc_head(
            streams, self.fn, self.base, self.scale, args.mix_eps, args.eps
        )
        return result

    def problems(self) -> Iterable[Problem]:
        sizes = {"streams": self.args.streams, "width": self.args.width}
        yield self.build.problem("mhc_post", **sizes)
        yield self.build.problem("mhc_head", **sizes)


class DeepseekV4Block(nn.Module):
    def __init__(self, args: DeepseekV4Args, layer: int, first_site: int, build: Build) -> None:
        super().__init__()
        self.hc_attn = Mixer(args, layer == 0, build)
        self.attn_norm = HeadNorm(args.width, args.eps, build)
        self.attn = DeepseekV4Attention(args, layer, first_site, build)
        self.hc_ffn = Mixer(args, False, build)
        self.ffn_norm = HeadNorm(args.width, args.eps, build)
        self.ffn = DeepseekV4Experts(args, layer, build)


class DeepseekV4Model(Model):
    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        self.args = args = DeepseekV4Args.read(fields)
        self.embed = Embedding(args.vocabulary, args.width, build, tied=False)
        self.layers = nn.ModuleList()
        self._needs: list[CacheNeed] = []
        for layer in range(len(args.kinds)):
            block = DeepseekV4Block(args, layer, len(self._needs), build)
            self.layers.append(block)
            self._needs += block.attn.needs()
        self.hc_head = Collapse(args, build)
        self.norm = PlainNorm(args.width, args.eps, build)
        self.lm_head = Linear(args.width, args.vocabulary, build)
        self.window_rope = Rope(args.window_rope, args.rope_dim, build)
        self.entry_rope = Rope(args.entry_rope, args.rope_dim, build)

    def cache_needs(self) -> Sequence[CacheNeed]:
        return self._needs

    def attention_specs(self) -> Sequence[AttentionSpec | None]:
        """Every cache is read and written by an op that is given it."""
        return [None] * len(self._needs)

    def placement(self, name: str) -> Placement | None:
        return self.args.placement(name)

    def forward(self, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        embedded = self.embed(token_ids)
        streams = embedded.unsqueeze(1).expand(-1, self.args.streams, -1).contiguous()
        angles = self._angles(positions)
        made, last = None, None
        for block in self.layers:
            if made is None or last is None:
                x, last = block.hc_attn.enter(streams, block.attn_norm)
            else:
                x, last = block.hc_attn.join(made, last, block.attn_norm)
            made = block.attn(x, angles, step)
            x, last = block.hc_ffn.join(made, last, block.ffn_norm)
            made = block.ffn(x, token_ids)
        return self.norm(self.hc_head(made, last))

    def _angles(self, positions: Tensor) -> Angles:
        ratios = {ratio for ratio in self.args.ratios if ratio}
        completed = {ratio: self.entry_rope(positions // ratio * ratio) for ratio in ratios}
        return Angles(self.window_rope(positions), self.entry_rope(positions), completed)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()
