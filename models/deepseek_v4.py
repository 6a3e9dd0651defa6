"""DeepSeek-V4: residual streams mixed by hyper-connections, attention over a window and compressed
entries, mixtures of experts. Where something drafts with it, its draft layer, over the streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kernels import Problem
from ..platforms.interface_kv import CacheNeed
from .base import Model, Placement, Step
from .deepseek_v4_args import DeepseekV4Args, Kind
from .deepseek_v4_attention import Angles, DeepseekV4Attention, PlainNorm
from .deepseek_v4_experts import DeepseekV4Experts
from .layers import Build, Embedding, HeadNorm, Layer, Linear
from .rope import Rope


class WriteBack(NamedTuple):
    """What a sub-layer made (T, D), and how it goes back into the streams."""

    made: Tensor
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

    def forward(
        self, streams: Tensor, last: WriteBack | None, norm: HeadNorm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """streams (T, N, D) -> the same with `last` written back, the next sub-layer's normed input
        (T, D), and post and mixing for what that makes."""
        args, own = self.args, (self.fn, self.base, self.scale)
        numbers = (args.sinkhorn, args.mix_eps, args.eps)
        if last is None:
            x, post, mixing = self.ops.mhc_pre(streams, *own, *numbers)
            return streams, self.ops.rms_norm(x, norm.weight, args.eps), post, mixing
        made, post, mixing = last
        streams, x, post, mixing = self.ops.mhc_post_pre(
            made, streams, post, mixing, *own, norm.weight, *numbers
        )
        return streams, x, post, mixing

    def problems(self) -> Iterable[Problem]:
        sizes = {"streams": self.args.streams, "width": self.args.width}
        if self.first:
            yield self.build.problem("mhc_pre", **sizes)
            size = self.build.dtype.itemsize
            yield self.build.problem("rms_norm", width=self.args.width, weight_bytes=size)
        else:
            yield self.build.problem("mhc_post_pre", **sizes)


class Collapse(Layer):
    """All streams to one, behind a last layer."""

    def __init__(self, args: DeepseekV4Args, build: Build) -> None:
        super().__init__(build)
        self.fn = build.parameter(args.streams, args.streams * args.width, dtype=torch.float32)
        self.base = build.parameter(args.streams, dtype=torch.float32)
        self.scale = build.parameter(1, dtype=torch.float32)
        self.args = args

    def written(self, streams: Tensor, last: WriteBack) -> Tensor:
        """The streams (T, N, D) with `last` written back."""
        made, post, mixing = last
        result: Tensor = self.ops.mhc_post(made, streams, post, mixing)
        return result

    def forward(self, streams: Tensor) -> Tensor:
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
    def __init__(
        self, args: DeepseekV4Args, layer: int, first_site: int, build: Build, first: bool
    ) -> None:
        super().__init__()
        self.hc_attn = Mixer(args, first, build)
        self.attn_norm = HeadNorm(args.width, args.eps, build)
        self.attn = DeepseekV4Attention(args, layer, first_site, build)
        self.hc_ffn = Mixer(args, False, build)
        self.ffn_norm = HeadNorm(args.width, args.eps, build)
        self.ffn = DeepseekV4Experts(args, layer, build)

    def forward(
        self,
        streams: Tensor,
        last: WriteBack | None,
        token_ids: Tensor,
        angles: Angles,
        step: Step,
    ) -> tuple[Tensor, WriteBack]:
        streams, x, post, mixing = self.hc_attn(streams, last, self.attn_norm)
        last = WriteBack(self.attn(x, angles, step), post, mixing)
        streams, x, post, mixing = self.hc_ffn(streams, last, self.ffn_norm)
        return streams, WriteBack(self.ffn(x, token_ids), post, mixing)


class DeepseekV4Draft(DeepseekV4Block):
    """The layer that predicts one token more: the next token's embedding added to every stream, and
    a block of its own. It feeds on its own streams alike."""

    def __init__(self, args: DeepseekV4Args, first_site: int, build: Build) -> None:
        more = replace(args, kinds=(*args.kinds, Kind.WINDOW), ratios=(*args.ratios, 0))
        super().__init__(more, len(args.kinds), first_site, build, first=True)
        self.enorm, self.hnorm = (PlainNorm(args.width, args.eps, build) for _ in range(2))
        self.e_proj, self.h_proj = (Linear(args.width, args.width, build) for _ in range(2))
        self.hc_head = Collapse(args, build)
        self.norm = PlainNorm(args.width, args.eps, build)

    def draft(
        self, embedded: Tensor, streams: Tensor, token_ids: Tensor, angles: Angles, step: Step
    ) -> Tensor:
        """embedded (T, D), streams (T, N, D) -> (T, N, D)."""
        own = self.h_proj(self.hnorm(streams.flatten(0, 1))).view(streams.shape)
        begun = own + self.e_proj(self.enorm(embedded)).unsqueeze(1)
        return self.hc_head.written(*self(begun, None, token_ids, angles, step))


class DeepseekV4Model(Model):
    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        self.args = args = DeepseekV4Args.read(fields)
        self.embed = Embedding(args.vocabulary, args.width, build, tied=False)
        self.layers = nn.ModuleList()
        self._needs: list[CacheNeed] = []
        for layer in range(len(args.kinds)):
            block = DeepseekV4Block(args, layer, len(self._needs), build, first=layer == 0)
            self.layers.append(block)
            self._needs += block.attn.needs()
        self.hc_head = Collapse(args, build)
        self.norm = PlainNorm(args.width, args.eps, build)
        self.lm_head = Linear(args.width, args.vocabulary, build)
        self.window_rope = Rope(args.window_rope, args.rope_dim, build)
        self.entry_rope = Rope(args.entry_rope, args.rope_dim, build)
        if build.drafts and fields.integer("num_nextn_predict_layers", 0):
            head = DeepseekV4Draft(args, len(self._needs), build)
            self._needs += head.attn.needs()
            self.mtp = nn.ModuleList([head])

    def cache_needs(self) -> Sequence[CacheNeed]:
        return self._needs

    def attention_specs(self) -> Sequence[AttentionSpec | None]:
        """Every cache is read and written by an op that is given it."""
        return [None] * len(self._needs)

    def placement(self, name: str) -> Placement | None:
        """The first draft layer is loaded where something drafts with it."""
        if name.startswith("mtp.") and not (self.drafts and name.startswith("mtp.0.")):
            return None
        return self.args.placement(name)

    def forward(self, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        """With the draft layer, which reads streams, these are the hidden states: (T, N * D)."""
        embedded = self.embed(token_ids)
        streams = embedded.unsqueeze(1).expand(-1, self.args.streams, -1).contiguous()
        angles = self._angles(positions)
        first, *others = self.layers
        streams, last = first(streams, None, token_ids, angles, step)
        for block in others:
            streams, last = block(streams, last, token_ids, angles, step)
        streams = self.hc_head.written(streams, last)
        return streams.flatten(1) if self.drafts else self._single(streams)

    def _single(self, streams: Tensor, head: nn.Module | None = None) -> Tensor:
        """(T, N, D) -> (T, D), by `head` in place of the model's own end."""
        end: Any = self if head is None else head
        result: Tensor = end.norm(end.hc_head(streams))
        return result

    def _streams(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(1, (self.args.streams, self.args.width))

    def draft(self, hidden: Tensor, token_ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        rotary = self.window_rope(positions)
        angles = Angles(rotary, rotary, {})
        given = self.embed(token_ids), self._streams(hidden), token_ids, angles, step
        head: Any = self.mtp[0]
        made: Tensor = head.draft(*given)
        return made.flatten(1)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self._single(self._streams(hidden), self.mtp[0]))
        return logits.float()

    def _angles(self, positions: Tensor) -> Angles:
        ratios = {ratio for ratio in self.args.ratios if ratio}
        completed = {ratio: self.entry_rope(positions // ratio * ratio) for ratio in ratios}
        return Angles(self.window_rope(positions), self.entry_rope(positions), completed)

    def logits(self, hidden: Tensor) -> Tensor:
        single = self._single(self._streams(hidden)) if self.drafts else hidden
        logits: Tensor = self.lm_head(single)
        return logits.float()
