"""What a DeepSeek-V4 is built from, and where the tensors of its published checkpoints go."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Self

from ..common.checkpoint.fields import Fields
from .base import Placement


class Kind(Enum):
    """What a layer's attention sees beside a window of tokens: compressed entries of all before.
    SPARSE pools overlapping spans and selects entries with an indexer; DENSE does neither."""

    WINDOW = 0
    SPARSE = 4
    DENSE = 128


@dataclass(frozen=True, kw_only=True)
class DeepseekV4Args:
    """Names follow the checkpoint's; `ratios` has the tokens per entry of each layer, 0 = none."""

    vocabulary: int
    width: int
    heads: int
    head_dim: int
    rope_dim: int
    query_rank: int
    output_groups: int
    output_rank: int
    window: int
    kinds: tuple[Kind, ...]
    ratios: tuple[int, ...]
    index_heads: int
    index_dim: int
    index_top_k: int
    streams: int
    sinkhorn: int
    mix_eps: float
    eps: float
    experts: int
    top_k: int
    expert_inner: int
    shared_inner: int
    hash_layers: int
    renormalise: bool
    route_scale: float
    limit: float
    window_rope: Fields
    entry_rope: Fields

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """From a published configuration. Raises CheckpointError."""
        _refuse(fields)
        kinds = _kinds(fields)
        # The published rates are the tags themselves; tests want smaller ones.
        rates = {
            Kind.WINDOW: 0,
            Kind.SPARSE: fields.positive("compress_rate_csa", Kind.SPARSE.value),
            Kind.DENSE: fields.positive("compress_rate_hca", Kind.DENSE.value),
        }
        inner = fields.positive("moe_intermediate_size")
        return cls(
            vocabulary=fields.positive("vocab_size"),
            width=fields.positive("hidden_size"),
            heads=fields.positive("num_attention_heads"),
            head_dim=fields.positive("head_dim"),
            rope_dim=fields.positive("qk_rope_head_dim"),
            query_rank=fields.positive("q_lora_rank"),
            output_groups=fields.positive("o_groups"),
            output_rank=fields.positive("o_lora_rank"),
            window=fields.positive("sliding_window"),
            kinds=kinds,
            ratios=tuple(rates[kind] for kind in kinds),
            index_heads=fields.positive("index_n_heads"),
            index_dim=fields.positive("index_head_dim"),
            index_top_k=fields.positive("index_topk"),
            streams=fields.positive("hc_mult"),
            sinkhorn=fields.positive("hc_sinkhorn_iters"),
            mix_eps=fields.number("hc_eps"),
            eps=fields.number("rms_norm_eps"),
            experts=fields.positive("n_routed_experts"),
            top_k=fields.positive("num_experts_per_tok"),
            expert_inner=inner,
            shared_inner=inner * fields.positive("n_shared_experts"),
            hash_layers=fields.integer("num_hash_layers"),
            renormalise=fields.flag("norm_topk_prob"),
            route_scale=fields.number("routed_scaling_factor"),
            limit=fields.number("swiglu_limit"),
            window_rope=_rope(fields, "rope_theta", scaled=False),
            entry_rope=_rope(fields, "compress_rope_theta", scaled=True),
        )

    def placement(self, name: str) -> Placement | None:
        """Of a published tensor, the draft layers' too."""
        expert = _EXPERT.fullmatch(name)
        if expert:
            return self._expert(expert[1], int(expert[2]), expert[3])
        joined = _JOINED.fullmatch(name)
        if joined:
            return self._joined(joined[1], joined[3], int(joined[2]), joined[4])
        for published, ours in _RENAMED:
            name = published.sub(ours, name)
        return Placement(name)

    def _expert(self, layer: str, expert: int, part: str) -> Placement:
        inner = self.expert_inner
        if part == "w2":
            return Placement(f"{layer}.down.weight", (expert,))
        rows = slice(0, inner) if part == "w1" else slice(inner, 2 * inner)
        return Placement(f"{layer}.gate_up.weight", (expert, rows))

    def _joined(self, module: str, indexer: str | None, layer: int, leaf: str) -> Placement:
        """Keys and gate scores are one product, with the matrix of the keys above."""
        width = self.index_dim if indexer else self.head_dim
        width *= 2 if self.kinds[layer] is Kind.SPARSE else 1
        rows = slice(0, width) if leaf == "wkv" else slice(width, 2 * width)
        return Placement(f"{module}.projection.weight", (rows,))


_EXPERT = re.compile(r"((?:layers|mtp)\.\d+\.ffn)\.experts\.(\d+)\.(w[123])\.weight")
_RENAMED = (
    (re.compile(r"^head\.weight$"), "lm_head.weight"),
    (re.compile(r"compressor\.norm\.weight$"), "compressor.norm"),
    (re.compile(r"ffn\.gate\.weight$"), "ffn.gate.scores"),
    (re.compile(r"\b(hc_(?:attn|ffn|head))_(fn|base|scale)$"), r"\1.\2"),
)
_JOINED = re.compile(r"(layers\.(\d+)\.attn\.(indexer\.)?compressor)\.(wkv|wgate)\.weight")


def _refuse(fields: Fields) -> None:
    """Values that would change the arithmetic and that nobody publishes."""
    for name, only in (
        ("scoring_func", "sqrtsoftplus"),
        ("topk_method", "noaux_tc"),
        ("hidden_act", "silu"),
    ):
        if fields.text(name, only) != only:
            raise fields.unsupported(name, only)
    for name in ("tie_word_embeddings", "attention_bias"):
        if fields.flag(name, False):
            raise fields.unsupported(name, "false")
    for name in ("num_key_value_heads", "n_group"):
        if fields.positive(name, 1) != 1:
            raise fields.unsupported(name, "1")


def _kinds(fields: Fields) -> tuple[Kind, ...]:
    """The list may go on for the draft layers."""
    layers = fields.positive("num_hidden_layers")
    given = fields.optional("compress_ratios")
    tags = [kind.value for kind in Kind]
    if not isinstance(given, list) or len(given) < layers or not set(given) <= set(tags):
        raise fields.unsupported("compress_ratios", f"at least {layers} of {tags}")
    return tuple(Kind(tag) for tag in given[:layers])


def _rope(fields: Fields, theta: str, scaled: bool) -> Fields:
    """Layers with entries turn by other frequencies, interpolated for length; neither they nor the
    others multiply by an attention factor."""
    values = {"rope_type": "default", "rope_theta": fields.number(theta)}
    stated = fields.optional("rope_scaling")
    if scaled and stated:
        if not isinstance(stated, dict) or stated.get("type", stated.get("rope_type")) != "yarn":
            raise fields.unsupported("rope_scaling", "an object of type yarn")
        values = {**stated, **values, "rope_type": "yarn", "attention_factor": 1.0}
    return Fields(values, fields.source)
