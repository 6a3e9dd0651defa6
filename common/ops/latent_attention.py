"""Multi-head latent attention in its absorbed form, over paged latents (DeepSeek-V2 report, section
2.1): one latent per token serves all heads, as key with all of its numbers and as value with the
first of them. The model has multiplied its queries into the latent space, and takes the results out
of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case, Op
from .attention import TOLERANCE, flat_slots
from .contract import F32, I32, normal


def latent_attention(
    q: F32,
    latents: F32,
    cache: F32,
    page_table: I32,
    query_start: I32,
    context_lens: I32,
    page_size: int,
    value_dim: int,
    scale: float,
) -> tuple[F32, F32]:
    """q (T, heads, D), latents (T, D) of the new tokens; cache (S, D) by slot = page * page_size +
    offset; page_table (R, P), query_start (R+1,), context_lens (R,) as in StepBatch
    -> (T, heads, value_dim) and the cache, changed in place.

    All new latents are written first. The query at position p of its row then sees positions
    0 .. p: softmax over scale * q . latent, of values latent[:value_dim]. Slots that no query of
    the step sees may hold anything, NaN included.
    """
    cache = cache.copy()
    cache[flat_slots(page_table, query_start, context_lens, page_size)] = latents
    result = np.zeros((*q.shape[:2], value_dim), np.float64)
    for row, context in enumerate(context_lens):
        for token in range(query_start[row], query_start[row + 1]):
            seen = np.arange(context + token - query_start[row] + 1)
            past = cache[page_table[row, seen // page_size] * page_size + seen % page_size]
            logits = q[token].astype(np.float64) @ past.astype(np.float64).T * scale
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            result[token] = weights @ past[:, :value_dim]
    return result.astype(np.float32), cache


@dataclass(frozen=True, slots=True)
class _Shape:
    name: str
    rows: tuple[tuple[int, int], ...]  # (context, new tokens)
    page_size: int = 16
    heads: int = 4
    dims: tuple[int, int] = (40, 32)  # latent, value


SHAPES = (
    _Shape("first_token", ((0, 1),)),
    _Shape("decode_one", ((37, 1),)),
    _Shape("decode_page_boundary", ((16, 1), (15, 1), (17, 1))),
    _Shape("decode_unlike_lengths", ((1, 1), (150, 1), (31, 1), (0, 1))),
    _Shape("decode_page_1", ((5, 1), (9, 1)), 1),
    _Shape("decode_page_128", ((5, 1), (130, 1), (127, 1)), 128),
    _Shape("prefill", ((0, 21),)),
    _Shape("prefill_page_1", ((0, 7), (3, 4)), 1),
    _Shape("chunk_page_128", ((0, 140), (60, 7)), 128),
    _Shape("mixed", ((50, 1), (0, 18), (7, 1), (23, 9))),
    _Shape("one_head", ((20, 1), (3, 5)), heads=1),
    _Shape("odd_dims", ((20, 1), (3, 5)), heads=3, dims=(13, 9)),
    _Shape("all_of_it_is_value", ((20, 1), (3, 5)), dims=(24, 24)),
    _Shape("published_dims", ((20, 1), (3, 2)), heads=16, dims=(576, 512)),
    _Shape("no_rows", ()),
)


def cases(rng: np.random.Generator) -> Iterable[Case]:
    for shape in SHAPES:
        yield _build(rng, shape)


def _build(rng: np.random.Generator, shape: _Shape) -> Case:
    size, (dim, value_dim) = shape.page_size, shape.dims
    counts = [-(-(context + new) // size) for context, new in shape.rows]
    order = rng.permutation(np.arange(1, sum(counts) + 3))  # two pages belong to nobody
    table = np.zeros((len(counts), max(counts, default=0) + 1), np.int32)
    cache = np.full(((len(order) + 1) * size, dim), np.nan, np.float32)
    for row, (context, _) in enumerate(shape.rows):
        table[row, : counts[row]] = order[sum(counts[:row]) : sum(counts[: row + 1])]
        seen = np.arange(context)
        cache[table[row, seen // size] * size + seen % size] = normal(rng, context, dim)
    new = [n for _, n in shape.rows]
    return Case(
        shape.name,
        {
            "q": normal(rng, sum(new), shape.heads, dim),
            "latents": normal(rng, sum(new), dim),
            "cache": cache,
            "page_table": table,
            "query_start": np.concatenate(([0], np.cumsum(new))).astype(np.int32),
            "context_lens": np.array([context for context, _ in shape.rows], np.int32),
            "page_size": size,
            "value_dim": value_dim,
            "scale": dim**-0.5,
        },
    )


def dims(args: Mapping[str, Any]) -> dict[str, int]:
    """Static sizes of a call site."""
    _, heads, dim = args["q"].shape
    sizes = {"value_dim": args["value_dim"], "page_size": args["page_size"]}
    return {"heads": heads, "dim": dim, **sizes}


OPS = (
    Op(
        "latent_attention",
        latent_attention,
        cases,
        TOLERANCE,
        in_place=frozenset({"cache"}),
        dims=dims,
    ),
)
