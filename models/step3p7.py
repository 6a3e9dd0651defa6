"""Step-3.5-Flash, which is the text of Step-3.7-Flash: layers that see a window have more heads
than those that see all, every head's result passes a gate, and late layers clamp their experts.

Norms are zero-centred (they multiply by 1 + w).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..common.checkpoint.fields import Fields
from ..platforms.interface import ImageInput
from ..platforms.interface_attention import AttentionSpec
from ..platforms.interface_kernels import Problem
from .base import Attend, Placement, Step, layer_of
from .experts import Experts, SigmoidRouter
from .layers import Build, GatedMLP, HeadNorm, Layer, Linear
from .llama import LlamaBlock, LlamaTrunk, Rotary, TrunkModel
from .rope import Rope
from .step3p7_args import Step3p7Args
from .step3p7_vision import MERGE, Step3p7Vision, tower_name, vision_args
from .vision import ImageRows
from .windows import SLIDING

_ONE = 1.0


class HeadGatedAttention(Layer):
    """Grouped attention; each head's result is multiplied by the sigmoid of the head's own gate."""

    def __init__(self, args: Step3p7Args, layer: int, build: Build) -> None:
        super().__init__(build)
        heads = args.sliding_heads if args.types[layer] == SLIDING else args.heads
        query, key = heads * args.head_dim, args.kv_heads * args.head_dim
        self.q_proj = Linear(args.width, query, build)
        self.k_proj = Linear(args.width, key, build)
        self.v_proj = Linear(args.width, key, build)
        self.g_proj = Linear(args.width, heads, build)
        self.o_proj = Linear(query, args.width, build)
        self.q_norm = HeadNorm(args.head_dim, args.eps, build, _ONE)
        self.k_norm = HeadNorm(args.head_dim, args.eps, build, _ONE)
        self.site = layer
        self.spec = AttentionSpec(
            heads=heads,
            kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            scale=args.scale,
            window=args.windows[layer],
            dtype=build.dtype_name,
        )

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.spec.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = self.q_norm.weight, self.k_norm.weight
        q, k = self.ops.qk_norm_rope(q, k, *weights, self.q_norm.eps, *rotary)
        by_head = attend(self.site, q, k, v).flatten(0, 1)
        gated = self.ops.sigmoid_mul(self.g_proj(x).view(-1, 1), by_head)
        result: Tensor = self.o_proj(gated.view(len(x), -1))
        return result

    def problems(self) -> Iterable[Problem]:
        spec = self.spec
        sizes = {"heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
        yield self.build.problem("qk_norm_rope", **sizes)
        yield self.build.problem("sigmoid_mul", width=spec.head_dim)


class ClampedMLP(GatedMLP):
    """With a limit above 0 the activation is clamped."""

    def __init__(self, width: int, inner: int, limit: float, build: Build) -> None:
        super().__init__(width, inner, build, "clamped_swiglu" if limit else "silu_mul")
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        if not self.limit:
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = self.ops.clamped_swiglu(gate, up, self.limit, 1.0, 0.0, clamp_after=True)
        result: Tensor = self.down_proj(inner)
        return result


class Step3p7Experts(nn.Module):
    """A layer's mixture. Every token takes the shared expert, at weight 1."""

    def __init__(self, args: Step3p7Args, layer: int, build: Build) -> None:
        super().__init__()
        self.ops = build.ops
        self.gate = SigmoidRouter(
            args.width, args.experts, args.top_k, build, scale=args.route_scale
        )
        sizes = args.experts, args.expert_inner, args.width
        self.experts = Experts(*sizes, build, "moe_experts")
        limit = args.shared_limits[layer]
        self.shared_experts = ClampedMLP(args.width, args.shared_inner, limit, build)
        self.limit = args.limits[layer]

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.gate(x)
        stacked = self.experts.gate_up_proj.matrix, self.experts.down_proj.matrix
        form = {"limit": self.limit, "clamp_after": True} if self.limit else {}
        routed: Tensor = self.ops.moe_experts(x, experts, weights, *stacked, **form)
        return routed + self.shared_experts(x)


class Step3p7Model(TrunkModel):
    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__()
        self.args = args = Step3p7Args.read(fields)
        attentions = [HeadGatedAttention(args, layer, build) for layer in range(args.layers)]
        self._specs = [attention.spec for attention in attentions]
        blocks = (
            LlamaBlock(attention, self._mlp(layer, build), args, build, _ONE)
            for layer, attention in enumerate(attentions)
        )
        self.model = LlamaTrunk(blocks, args, build, _ONE)
        self.lm_head = None if args.tied else Linear(args.width, args.vocabulary, build)
        self.ropes = nn.ModuleDict(
            {kind: Rope(settings, args.head_dim, build) for kind, settings in args.ropes.items()}
        )
        seen = vision_args(fields)
        self.vision = None if seen is None else Step3p7Vision(seen, build)
        self.image_token = 0 if seen is None else fields.positive("image_token_id")

    def _mlp(self, layer: int, build: Build) -> nn.Module:
        args = self.args
        if args.sparse[layer]:
            return Step3p7Experts(args, layer, build)
        return ClampedMLP(args.width, args.inner, args.shared_limits[layer], build)

    def attention_specs(self) -> Sequence[AttentionSpec]:
        return self._specs

    def images(self) -> ImageInput | None:
        if self.vision is None:
            return None
        return ImageInput(self.image_token, MERGE, self.vision.patch_values, sequential=True)

    def forward(
        self, token_ids: Tensor, positions: Tensor, step: Step, images: ImageRows | None = None
    ) -> Tensor:
        x, residual = self.model.embed_tokens(token_ids), None
        if images is not None:
            x = images.placed(x)
        rotary = {kind: rope(positions) for kind, rope in self.ropes.items()}
        for kind, block in zip(self.args.types, self.model.layers, strict=True):
            x, residual = block(x, residual, rotary[kind], step)
        return self.model.norm.add(x, residual)[0]

    def placement(self, name: str) -> Placement | None:
        """Layers behind the last predict a second token; they are known and not used. Checkpoints
        keep gate and up as two stacks."""
        if layer_of(name) >= self.args.layers:
            return None
        if name.startswith("vision."):
            return Placement(tower_name(name))
        block, moe, part = name.partition(".moe.")
        if not moe:
            return Placement(name.replace(".share_expert.", ".mlp.shared_experts."))
        rows = self.args.expert_inner
        every = slice(0, self.args.experts)
        places = {
            "gate.weight": Placement(f"{block}.mlp.gate.weight"),
            "router_bias": Placement(f"{block}.mlp.gate.e_score_correction_bias"),
            "gate_proj.weight": Placement(_stack(block, "gate_up"), (every, slice(0, rows))),
            "up_proj.weight": Placement(_stack(block, "gate_up"), (every, slice(rows, 2 * rows))),
            "down_proj.weight": Placement(_stack(block, "down")),
        }
        return places.get(part, Placement(name))


def _stack(block: str, which: str) -> str:
    return f"{block}.mlp.experts.{which}_proj.weight"
