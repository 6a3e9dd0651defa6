"""Guards the contracts that DeepSeek-V4 stands on: each mistake that implementations of it have
made, put into a kernel, is caught by the cases of its op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.kernel_checks import verdict_of
from torch import Tensor

from sixfold.common.ops import OPS
from sixfold.platforms.torch_runtime import compress, experts, hyper_connections, interleaved_rope
from sixfold.platforms.torch_runtime import compressed_attention as attention


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _mixed_the_other_way(made, streams, post, mixing) -> Tensor:
    return hyper_connections.mhc_post(made, streams, post, mixing.mT)


def _rows_first(streams, fn, base, scale, iterations, eps, norm_eps) -> Any:
    """Before the first columns, rows that softmax has normalised already are so again."""
    x, post, _ = hyper_connections.mhc_pre(streams, fn, base, scale, iterations, eps, norm_eps)
    count = streams.shape[1]
    wide = streams.float()
    made = hyper_connections._products(wide, fn, norm_eps)[:, 2 * count :]
    mixing = (made * scale[2] + base[2 * count :]).unflatten(-1, (count, count)).softmax(-1) + eps
    for _ in range(iterations):
        mixing = mixing / (mixing.sum(dim=-2, keepdim=True) + eps)
        mixing = mixing / (mixing.sum(dim=-1, keepdim=True) + eps)
    return x, post, mixing


def _norm_left_out(**args: Any) -> Any:
    rest = {k: v for k, v in args.items() if k not in ("norm_weight", "made", "post", "mixing")}
    streams = hyper_connections.mhc_post(
        args["made"], args["streams"], args["post"], args["mixing"]
    )
    x, post, mixing = hyper_connections.mhc_pre(**{**rest, "streams": streams})
    return streams, x, post, mixing


def _half_of_the_lanes(**args: Any) -> Any:
    """A norm over half of the channels' squares, as a wavefront that is split leaves it."""
    streams, x, post, mixing = hyper_connections.mhc_post_pre(**args)
    return streams, x * 2**0.5, post, mixing


def _entries_not_turned(*, cos: Tensor, sin: Tensor, **rest: Any) -> Any:
    return compress.compress_norm_rope_store(
        cos=torch.ones_like(cos), sin=torch.zeros_like(sin), **rest
    )


def _turned_by_the_last_token(*, cos: Tensor, sin: Tensor, **rest: Any) -> Any:
    return compress.compress_norm_rope_store(cos=cos.roll(-1, 0), sin=sin.roll(-1, 0), **rest)


def _ape_rearranged(*, ape: Tensor, **rest: Any) -> Any:
    """By another kernel's order: series behind each other instead of beside."""
    dim = len(rest["weight"])
    parts = ape.shape[1] // dim
    other = ape.view(len(ape), parts, dim).transpose(0, 1).reshape(ape.shape)
    return compress.compress_norm_rope_store(ape=other.contiguous(), **rest)


def _series_swapped(*, projected: Tensor, **rest: Any) -> Any:
    half = projected.shape[1] // 4
    swapped = projected.unflatten(1, (2, -1)).roll(half, -1).flatten(1)
    return compress.compress_norm_rope_store(projected=swapped, **rest)


def _ring_written_first(*, state: Tensor, **rest: Any) -> Any:
    """A chunk's last tokens lie where those before it are still wanted."""
    where = [rest[name] for name in ("slots", "query_start", "context_lens")]
    if len(rest["projected"]):
        compress._append(rest["projected"], state, *where)
    return compress.compress_norm_rope_store(state=state, **rest)


def _begun_from_what_the_slot_holds(*, context_lens: Tensor, **rest: Any) -> Any:
    """Positions before a row's first token, taken for real ones."""
    moved = torch.where(context_lens == 0, len(rest["ape"]), context_lens)
    return compress.compress_norm_rope_store(context_lens=moved, **rest)


def _last_entry_hidden(*, context_lens: Tensor, **rest: Any) -> Tensor:
    return attention.index_topk(context_lens=context_lens - 1, **rest)


def _highest_of_equals(*, q: Tensor, weights: Tensor, cache: Tensor, **rest: Any) -> Tensor:
    """Scores that rise a little with the entry's place turn the order of equals round."""
    real_sort = torch.sort

    def late(x: Tensor, **options: Any) -> Any:
        if x.dtype.is_floating_point:
            x = x + torch.arange(x.shape[-1]) * 1e-3
        return real_sort(x, **options)

    torch.sort = late
    try:
        return attention.index_topk(q=q, weights=weights, cache=cache, **rest)
    finally:
        torch.sort = real_sort


def _entries_masked_as_padding(*, entries: Any, **rest: Any) -> Any:
    return attention.compressed_attention(entries=None, **rest)


def _sinks_left_out(*, sinks: Tensor, **rest: Any) -> Any:
    return attention.compressed_attention(sinks=torch.full_like(sinks, -torch.inf), **rest)


def _window_of_one_more(*, window: int, **rest: Any) -> Any:
    return attention.compressed_attention(window=window + 1, **rest)


def _queries_with_a_weight(q, kv, kv_weight, eps, cos, sin) -> Any:
    turned, key = interleaved_rope.shared_kv_norm_rope(q, kv, kv_weight, eps, cos, sin)
    weighted = interleaved_rope.unit(q.float(), eps) * kv_weight
    query = interleaved_rope.turn_pairs(weighted, cos.unsqueeze(1), sin.unsqueeze(1))
    return query.to(turned.dtype), key


def _not_turned_back(x, cos, sin, weight) -> Tensor:
    return interleaved_rope.grouped_linear(x.flatten(1), weight)


def _first_channels_turned(x, cos, sin, inverse=False) -> Tensor:
    rotary = 2 * cos.shape[-1]
    turned = interleaved_rope.interleaved_rope(x.roll(-rotary, -1), cos, sin, inverse)
    return turned.roll(rotary, -1)


def _halves_paired(x, cos, sin, inverse=False) -> Tensor:
    rest = x.shape[-1] - 2 * cos.shape[-1]
    first, second = x[..., rest:].float().chunk(2, dim=-1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1) * (-1 if inverse else 1)
    turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    return torch.cat((x[..., :rest], turned.to(x.dtype)), dim=-1)


def _naive_softplus(**args: Any) -> Any:
    """log(1 + exp(x)) is 0 below about -17: nothing is left to divide by."""
    real = experts.SCORES["sqrt_softplus"]
    experts.SCORES["sqrt_softplus"] = lambda x: torch.log(1 + torch.exp(x)).sqrt()
    try:
        return experts.moe_route(**args)
    finally:
        experts.SCORES["sqrt_softplus"] = real


def _routed_in_sixteen_bits(*, logits: Tensor, **rest: Any) -> Any:
    return experts.moe_route(logits=logits.bfloat16(), **rest)


def _groups_though_there_are_none(*, logits: Tensor, groups: int, **rest: Any) -> Any:
    even = logits.shape[1] % 2 == 0 and logits.shape[1] >= 4 and groups == 1
    rest["kept_groups"] = 1 if even else rest["kept_groups"]
    return experts.moe_route(logits=logits, groups=2 if even else groups, **rest)


FAULTS: list[tuple[str, Callable[..., Any]]] = [
    ("mhc_post", _mixed_the_other_way),
    ("mhc_pre", _rows_first),
    ("mhc_post_pre", _norm_left_out),
    ("mhc_post_pre", _half_of_the_lanes),
    ("compress_norm_rope_store", _entries_not_turned),
    ("compress_norm_rope_store", _turned_by_the_last_token),
    ("compress_norm_rope_store", _ape_rearranged),
    ("compress_norm_rope_store", _series_swapped),
    ("compress_norm_rope_store", _ring_written_first),
    ("compress_norm_rope_store", _begun_from_what_the_slot_holds),
    ("index_topk", _last_entry_hidden),
    ("index_topk", _highest_of_equals),
    ("compressed_attention", _entries_masked_as_padding),
    ("compressed_attention", _sinks_left_out),
    ("compressed_attention", _window_of_one_more),
    ("shared_kv_norm_rope", _queries_with_a_weight),
    ("inverse_rope_grouped_linear", _not_turned_back),
    ("interleaved_rope", _first_channels_turned),
    ("interleaved_rope", _halves_paired),
    ("moe_route", _naive_softplus),
    ("moe_route", _routed_in_sixteen_bits),
    ("moe_route", _groups_though_there_are_none),
]


@pytest.mark.parametrize(("op", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_known_mistake_is_caught(op: str, fault: Callable[..., Any]) -> None:
    verdict = verdict_of(OPS[op], fault)
    assert verdict.status == "fail"
    # A fault that raises would prove nothing of the cases.
    assert not any("Error" in failure.message for failure in verdict.failures), verdict
