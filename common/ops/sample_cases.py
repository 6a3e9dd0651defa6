"""Cases of the `sample` op, and a builder of SamplingArrays for tests and benches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...platforms.interface_kernels import Case
from ...platforms.interface_step import SamplingArrays
from .contract import F32, normal

_DEFAULTS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "uniform": 0.5,
    "logprobs": -1,
}
_TYPES = {"top_k": np.int32, "logprobs": np.int32, "uniform": np.float64}


def sampling_arrays(rows: Sequence[Mapping[str, Any]]) -> SamplingArrays:
    """One mapping per row: the scalars of SamplingArrays by name, and `bias` (id -> value),
    `prompt`, `output` (token ids). What is left out is off; the temperature then is 1."""
    scalars = {
        name: np.array([row.get(name, default) for row in rows], _TYPES.get(name, np.float32))
        for name, default in _DEFAULTS.items()
    }

    def ragged(values: list[list[Any]], dtype: Any) -> tuple[Any, Any]:
        starts = np.concatenate(([0], np.cumsum([len(v) for v in values]))).astype(np.int32)
        return starts, np.array([item for value in values for item in value], dtype)

    bias = [dict(row.get("bias", {})) for row in rows]
    bias_start, bias_ids = ragged([list(b) for b in bias], np.int32)
    prompt_start, prompt_ids = ragged([list(row.get("prompt", ())) for row in rows], np.int32)
    output_start, output_ids = ragged([list(row.get("output", ())) for row in rows], np.int32)
    return SamplingArrays(
        **scalars,
        bias_start=bias_start,
        bias_ids=bias_ids,
        bias_values=ragged([list(b.values()) for b in bias], np.float32)[1],
        prompt_start=prompt_start,
        prompt_ids=prompt_ids,
        output_start=output_start,
        output_ids=output_ids,
    )


def pack_mask(allowed: Any) -> Any:
    """Booleans (R, V) -> words (R, ceil(V/32)), bit t % 32 of word t // 32."""
    rows, vocab = allowed.shape
    padded = np.zeros((rows, -(-vocab // 32) * 32), np.uint64)
    padded[:, :vocab] = allowed
    bits = padded.reshape(rows, -1, 32) << np.arange(32, dtype=np.uint64)
    return bits.sum(axis=-1).astype(np.uint32)


def _case(
    name: str, logits: F32, rows: Sequence[Mapping[str, Any]], mask: Any = None, pending: Any = None
) -> Case:
    args = {"logits": logits, "sampling": sampling_arrays(rows)}
    return Case(name, {**args, "grammar_mask": mask, "pending": pending})


def cases(rng: np.random.Generator) -> Iterable[Case]:
    yield from greedy_cases(rng)
    yield from filter_cases(rng)
    yield from _adjusting_cases(rng)
    yield from _random_cases(rng)


def greedy_cases(rng: np.random.Generator) -> Iterable[Case]:
    greedy = {"temperature": 0.0}
    yield _case("greedy_one", normal(rng, 1, 1003), [greedy])
    yield _case("no_rows", normal(rng, 0, 64), [])
    tied = np.zeros((3, 49), np.float32)
    tied[1, [7, 40]] = 2.0
    tied[2] = -5.0
    yield _case("greedy_ties", tied, [greedy] * 3)
    far_apart = np.full((2, 4099), -1.0, np.float32)
    far_apart[1, [600, 1112, 4098]] = 3.0
    yield _case("greedy_ties_far_apart", far_apart, [greedy] * 2)
    begun = normal(rng, 2, 4099)
    begun[0, :3000], begun[1, :3000] = np.nan, -np.inf
    yield _case("banned_up_to_a_place", begun, [greedy, {"uniform": 0.3}])
    broken = normal(rng, 4, 33)
    broken[0, 5] = np.nan
    broken[1, :] = np.nan
    broken[2, :] = -np.inf
    broken[3, [9, 20]] = np.inf
    yield _case("greedy_nan_and_inf", broken, [greedy] * 4)
    yield _case("drawn_nan_and_inf", broken, [{"uniform": 0.7, "top_p": 0.9}] * 4)
    yield _case("one_token", normal(rng, 2, 1), [greedy, {"uniform": 0.999}])


def filter_cases(rng: np.random.Generator) -> Iterable[Case]:
    logits = normal(rng, 6, 257, scale=3.0)
    draws = [{"uniform": u} for u in (0.0, 0.1, 0.5, 0.9, 0.999999, np.nextafter(1.0, 0.0))]
    yield _case("draws", logits, draws)
    few = normal(rng, 96, 5)  # so that the winner's variate need not be small
    yield _case("draws_of_few", few, [{"uniform": rng.random()} for _ in few])
    for name, field, values in [
        ("top_k", "top_k", (1, 2, 40, 257, 1000, 2**31 - 1)),
        ("top_p", "top_p", (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)),
        ("min_p", "min_p", (0.0, 1e-6, 0.05, 0.3, 0.99, 1.0)),
        ("temperature", "temperature", (0.0, 1e-5, 0.1, 0.7, 1.5, 2.0)),
    ]:
        rows = [{field: v, "uniform": rng.random()} for v in values]
        yield _case(name, logits, rows)
    tied = np.repeat(np.array([[1.0, 3.0, 2.0]], np.float32), 8, axis=1).repeat(4, axis=0)
    for field, value in [("top_k", 3), ("top_p", 0.3)]:
        rows = [{field: value, "uniform": u} for u in (0.05, 0.4, 0.7, 0.99)]
        yield _case(f"{field}_ties", tied, rows)
    flat = np.zeros((2, 5000), np.float32)  # more candidates than a short list can hold
    yield _case("flat_top_p", flat, [{"top_p": 0.9, "uniform": 0.95}, {"top_p": 0.3}])
    wide = normal(rng, 24, 2003, scale=0.5)  # top-k ends behind a short list, top-p inside it
    rows = [{"top_k": 1500, "top_p": 0.2, "uniform": rng.random()} for _ in wide]
    yield _case("long_top_k_and_top_p", wide, rows)


def _adjusting_cases(rng: np.random.Generator) -> Iterable[Case]:
    logits = normal(rng, 3, 101, scale=2.0)
    ban = {int(t): -np.inf for t in np.argsort(-logits[0])[:5]}
    yield _case("bias", logits, [{"temperature": 0.0, "bias": b} for b in (ban, {100: 50.0}, {})])
    everything = dict.fromkeys(range(101), -np.inf)
    yield _case("bias_bans_all", logits, [{"bias": everything}, {}, {"temperature": 0.0}])
    history = {"prompt": [1, 2, 2, 50], "output": [3, 3, 3, 50, 100], "uniform": 0.4}
    for name, field, value in [
        ("repetition", "repetition_penalty", 1.7),
        ("repetition_reward", "repetition_penalty", 0.5),
        ("presence", "presence_penalty", 1.5),
        ("frequency", "frequency_penalty", 0.9),
        ("negative_frequency", "frequency_penalty", -1.0),
    ]:
        rows = [{**history, field: value}, {}, {**history, field: value, "temperature": 0.0}]
        yield _case(name, logits, rows)
        yield _case(f"{name}_pending", logits, rows, pending=np.array([3, 7, 11], np.int64))
    allowed = rng.random((3, 101)) < 0.2
    allowed[2] = False
    allowed[2, 100] = True
    yield _case("grammar", logits, [{}, {"temperature": 0.0}, {}], pack_mask(allowed))
    allowed[1] = False
    yield _case("grammar_allows_nothing", logits, [{}, {}, {"top_k": 5}], pack_mask(allowed))
    yield from _crossed_cases(rng)


def _crossed_cases(rng: np.random.Generator) -> Iterable[Case]:
    """What is banned or not a number must not count in what filters keep."""
    logits = normal(rng, 6, 77, scale=2.0)
    logits[:, rng.permutation(77)[:20]] = np.nan
    filters: list[dict[str, Any]] = [
        {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.3}, {"top_k": 70}, {"top_p": 0.999},
        {"temperature": 0.0},
    ]  # fmt: skip
    rows = [{**row, "uniform": rng.random()} for row in filters]
    yield _case("filters_over_nan", logits, rows)
    allowed = rng.random((6, 77)) < 0.3
    allowed[:, 76] = True
    yield _case("filters_over_nan_and_grammar", logits, rows, pack_mask(allowed))
    tied = np.zeros((6, 77), np.float32)
    tied[:, 40:] = 1.0
    allowed[:, 40] = False  # the lowest id among the largest is banned
    yield _case("filters_over_ties_and_grammar", tied, rows, pack_mask(allowed))
    every = [random_row(rng, 77) for _ in rows]
    pending = np.array([3, -1, 76, 0, -1, 5], np.int64)
    yield _case("everything_at_once", logits, every, pack_mask(allowed), pending)


def _random_cases(rng: np.random.Generator) -> Iterable[Case]:
    for vocab in (31, 1003, 4099):
        logits = normal(rng, 12, vocab, scale=4.0)
        yield _case(f"mixture_{vocab}", logits, [random_row(rng, vocab) for _ in range(12)])


def random_row(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Parameters of one row, each switched on with some probability."""

    def maybe(value: Any, off: Any, chance: float = 0.4) -> Any:
        return value if rng.random() < chance else off

    return {
        "temperature": maybe(0.0, float(rng.uniform(0.2, 2.0)), 0.2),
        "top_k": maybe(int(rng.integers(1, vocab + 1)), 0),
        "top_p": maybe(float(rng.uniform(0.05, 1.0)), 1.0),
        "min_p": maybe(float(rng.uniform(0.0, 0.3)), 0.0),
        "repetition_penalty": maybe(float(rng.uniform(0.5, 2.0)), 1.0),
        "presence_penalty": maybe(float(rng.uniform(-2.0, 2.0)), 0.0),
        "frequency_penalty": maybe(float(rng.uniform(-2.0, 2.0)), 0.0),
        "uniform": float(rng.random()),
        "prompt": rng.integers(0, vocab, rng.integers(0, 9)).tolist(),
        "output": rng.integers(0, vocab, rng.integers(0, 9)).tolist(),
        "bias": {int(t): float(rng.normal()) for t in rng.integers(0, vocab, rng.integers(0, 4))},
    }
