"""Guards the forms that MLX may compute the same in: attention in parts is attention, another form
serves only inside a step and where it was chosen, and a choice follows the clock or the user."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention
from support.tiny_mlx import build

from sixfold.common.errors import CheckpointError, ConfigError, KernelError
from sixfold.common.ops.attention import TOLERANCE
from sixfold.platforms.interface_kernels import Kernel
from sixfold.platforms.mlx import forms, matrices, product_threads, softmax_attention
from sixfold.platforms.mlx.page_kernels import paged_attention
from sixfold.platforms.mlx.recognise import recognise_model
from sixfold.platforms.mlx.softmax_attention import BLOCK, attend
from sixfold.platforms.mlx.substitution import Substitution, called

SEED = np.random.default_rng(3)
PAGED = Kernel("paged_attention", "generic", lambda facts, problem: None, paged_attention)


def normal(*shape: int) -> np.ndarray:
    return SEED.standard_normal(shape).astype(np.float32)


def reference(q: Any, k: Any, v: Any, scale: float, seen: Any, sinks: Any) -> np.ndarray:
    """In float64; `seen` (R, H, S, K) bool. A query that sees nothing gets zeros."""
    k, v = (np.repeat(x.astype(np.float64), q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = np.where(seen, q.astype(np.float64) @ k.swapaxes(-1, -2) * scale, -np.inf)
    best = np.maximum(logits.max(-1, keepdims=True), -1e30)
    extra = 0.0
    if sinks is not None:
        limit = sinks.astype(np.float64)[None, :, None, None]
        best = np.maximum(best, limit)
        extra = np.exp(limit - best)
    weights = np.exp(logits - best)
    return weights @ v / np.maximum(weights.sum(-1, keepdims=True) + extra, 1e-300)


def causal(rows: int, heads: int, count: int, keys: int) -> np.ndarray:
    seen = np.arange(keys)[None] <= np.arange(keys - count, keys)[:, None]
    return np.broadcast_to(seen, (rows, heads, count, keys))


def apart(made: mx.array, wanted: np.ndarray) -> float:
    bound = TOLERANCE["float32"]
    return float((np.abs(np.array(made) - wanted) / (bound.atol + bound.rtol * abs(wanted))).max())


SHAPES = [  # rows, heads, kv heads, queries, keys, key size, value size
    (1, 9, 3, 2 * BLOCK + 1, 2 * BLOCK + 70, 16, 16),
    (2, 4, 4, 1, 37, 8, 8),
    (3, 4, 1, 5, 9, 32, 8),
    (1, 2, 2, BLOCK, BLOCK, 8, 8),
    (1, 2, 1, BLOCK + 1, BLOCK + 1, 8, 8),
    (2, 6, 2, BLOCK - 1, BLOCK + 3, 80, 80),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_in_parts_is_attention(shape: tuple[int, ...], with_sinks: bool) -> None:
    rows, heads, groups, count, keys, dim, dim_v = shape
    q, k, v = normal(rows, heads, count, dim), normal(rows, groups, keys, dim), 0
    v = normal(rows, groups, keys, dim_v)
    sinks = 2 * normal(heads) if with_sinks else None
    whole = (rows, heads, count, keys)
    some, each = SEED.random((rows, 1, count, keys)) > 0.4, SEED.random(whole) > 0.4
    for mask, seen in [
        (None, np.ones(whole, bool)),
        ("causal", causal(*whole)),
        (mx.array(some), np.broadcast_to(some, whole)),
        (mx.array(each), each),
        (mx.array(some[0, 0]), np.broadcast_to(some[0, 0], whole)),
        (mx.array(np.where(each, np.float32(0), -np.inf)), each),
    ]:
        given = [mx.array(x) for x in (q, k, v)]
        made = attend(*given, 0.3, mask, None if sinks is None else mx.array(sinks))
        assert apart(made, reference(q, k, v, 0.3, seen, sinks)) <= 1


def test_what_is_added_to_logits_is_added_per_head() -> None:
    q, k, v, added = normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 8), normal(2, 4, 3, 5)
    given = [mx.array(x) for x in (q, k, v)]
    want = mx.fast.scaled_dot_product_attention(*given, scale=0.3, mask=mx.array(added))
    assert apart(attend(*given, 0.3, mx.array(added)), np.array(want)) <= 1


def test_ties_large_logits_and_queries_that_see_nothing() -> None:
    ones = mx.ones((1, 2, 3, 16))
    values = normal(1, 2, 3, 16)
    made = attend(ones, 1e3 * ones, mx.array(values), 30.0)
    assert apart(made, np.broadcast_to(values.mean(2, keepdims=True), values.shape)) <= 1
    for sinks in (None, mx.zeros(2)):
        made = attend(ones, ones, mx.array(values), 1.0, mx.zeros((1, 1, 3, 3), mx.bool_), sinks)
        assert not np.array(made).any()


def test_a_mask_that_is_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (normal(1, 2, 9, 8) for _ in "qkv")
    want = reference(q, k, v, 0.3, causal(1, 2, 9, 9), None)
    right = softmax_attention._causal
    shifted = lambda count, length: mx.roll(right(count, length), 1, axis=0)  # noqa: E731
    monkeypatch.setattr(softmax_attention, "_causal", shifted)
    made = attend(*(mx.array(x) for x in (q, k, v)), 0.3, "causal")
    assert not apart(made, want) <= 1


# ---- where another form serves


def test_names_are_bound_inside_only_and_bound_back_after_an_error() -> None:
    form = forms.forms("attention")["parts"]
    using = Substitution(build("llama"), {"attention": form})
    with using, using:
        assert llama.scaled_dot_product_attention is form
        assert llama.swiglu is swiglu
    with pytest.raises(ZeroDivisionError), using:
        raise ZeroDivisionError
    assert llama.scaled_dot_product_attention is scaled_dot_product_attention


ROPE = mx.fast.rope
WRONG = {
    "attention": lambda q, k, v, cache, scale, mask, sinks=None: attend(q, k, v, 2 * scale, mask),
    "silu_mul": lambda gate, up: nn.silu(up) * gate,
    "rope": lambda x, dims, **how: ROPE(x, dims, **{**how, "scale": 2 * how["scale"]}),
}


@pytest.mark.parametrize(
    ("op", "part"), [("attention", "self_attn"), ("silu_mul", "mlp"), ("rope", "self_attn")]
)
def test_a_form_that_computes_something_else_stops_the_load(op: str, part: str) -> None:
    model = build("llama")
    with pytest.raises(CheckpointError, match=rf"layers\.0\.{part} .* differs from"):
        recognise_model(model, mx.float32, Substitution(model, {op: WRONG[op]}))


# ---- what is chosen


def clock(monkeypatch: pytest.MonkeyPatch, place: Any, *seconds: float) -> None:
    monkeypatch.setattr(place, "fastest", lambda ways: list(seconds[: len(ways)]))


@pytest.mark.parametrize(("parts", "chosen"), [(0.5, "parts"), (0.9, "mlx-lm"), (2.0, "mlx-lm")])
def test_the_faster_form_is_chosen_and_explained(
    monkeypatch: pytest.MonkeyPatch, parts: float, chosen: str
) -> None:
    clock(monkeypatch, forms, 1.0, parts, 1.0)
    using, decisions = forms.choose(build("llama"), mx.float32, {}, PAGED)
    assert [(d.what, d.chosen) for d in decisions] == [
        ("kernel attention", chosen),
        ("kernel rope", "table" if chosen == "parts" else chosen),
        ("kernel silu_mul", chosen),
        ("decode attention", "in pages" if chosen == "parts" else "over gathered pages"),
    ]
    assert [len(d.rejected) for d in decisions] == [1, 1, 1, 2]
    assert all("ms" in d.because for d in decisions)
    with using:
        assert (llama.swiglu is swiglu) == (chosen == "mlx-lm")


def test_the_user_names_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, forms, 1.0, 0.1, 0.2)
    model = build("llama")
    _, decisions = forms.choose(
        model, mx.float32, {"attention": "mlx-lm", "sample": "generic"}, PAGED
    )
    assert [d.chosen for d in decisions] == ["mlx-lm", "table", "parts", "in pages"]
    assert decisions[0].because == "named by the user"
    with pytest.raises(KernelError, match="No form 'flash' of attention; there are: mlx-lm, parts"):
        forms.choose(model, mx.float32, {"attention": "flash"}, PAGED)


@pytest.mark.parametrize(
    ("kernel", "products", "chosen"),
    [
        (1.0, 0.9, "products"),
        (1.0, 0.95, "over gathered pages"),
        (0.5, 0.6, "in pages"),
        (0.9, 0.89, "products"),
        (0.9, 0.95, "over gathered pages"),
    ],
)
def test_decode_reads_pages_as_is_fastest(
    monkeypatch: pytest.MonkeyPatch, kernel: float, products: float, chosen: str
) -> None:
    clock(monkeypatch, forms, 1.0, kernel, products)
    _, decisions = forms.choose(build("llama"), mx.float32, {"silu_mul": "parts"}, PAGED)
    decision = next(d for d in decisions if d.what == "decode attention")
    assert decision.chosen == chosen
    assert chosen not in [name for name, _ in decision.rejected]


def test_products_of_pages_are_refused_in_sixteen_bits() -> None:
    named = {"paged_attention": "products", "attention": "parts", "silu_mul": "parts"}
    with pytest.raises(KernelError, match=r"paged_attention=products: .* float32 only"):
        forms.choose(build("llama"), mx.float16, named, PAGED)


def test_a_form_of_what_the_model_does_not_call_is_refused() -> None:
    model = build("gemma3_text")  # its MLP has another activation
    assert called(model) == {"attention", "rope"}
    with pytest.raises(KernelError, match=r"--kernel silu_mul=parts: .* call: attention"):
        forms.choose(model, mx.float32, {"silu_mul": "parts"}, PAGED)


def layout(module: Any) -> str:
    strides = np.array(module.weight, copy=False).strides
    return "turned" if strides[0] < strides[1] else "as stored"


@pytest.mark.parametrize(("turned", "found"), [(0.5, "turned"), (1.0, "as stored")])
def test_a_turned_matrix_is_the_same_matrix(
    monkeypatch: pytest.MonkeyPatch, turned: float, found: str
) -> None:
    clock(monkeypatch, matrices, 1.0, turned)
    model, tokens = build("llama"), mx.array([[1, 2, 3]])
    before, want = np.array(model.layers[0].mlp.up_proj.weight), np.array(model(tokens))
    (decision,) = matrices.arrange(model)
    up = model.layers[0].mlp.up_proj
    assert layout(up) == found
    np.testing.assert_array_equal(np.array(up.weight), before)
    np.testing.assert_allclose(np.array(model(tokens)), want, rtol=1e-5, atol=1e-6)
    assert ("none is faster otherwise" in decision.because) == (found == "as stored")


# ---- threads of products


class Library:
    """A BLAS that can be told, and counts."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def openblas_get_num_threads(self) -> int:
        return 4

    def openblas_set_num_threads(self, count: int) -> None:
        self.told.append(count)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(product_threads, "ctypes", SimpleNamespace(CDLL=lambda name: made))
    return made


def test_few_rows_and_many_have_their_own_number(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(1.0, 2.0), (1.0, 0.9), (1.0, 2.0), (2.0, 1.0)])  # a tenth is too little
    monkeypatch.setattr(product_threads, "fastest", lambda ways: list(next(times)))
    threads, decision = product_threads.product_threads(None)
    assert "1 from 8 tokens, 1 from 32 tokens, 4 from 128 tokens" in decision.chosen
    library.told.clear()
    assert threads is not None
    for tokens in (0, 1, 127, 128, 2048, 8):
        threads.tell(tokens)
    assert library.told == [1, 4, 1]  # said once until it changes


def test_a_number_that_the_user_sets_is_honoured_or_refused(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, decision = product_threads.product_threads(3)
    assert threads is not None
    assert decision.because == "set by the user"
    threads.tell(500)
    assert library.told == [3]
    nobody = SimpleNamespace(CDLL=lambda name: SimpleNamespace())
    monkeypatch.setattr(product_threads, "ctypes", nobody)
    assert product_threads.product_threads(1)[0] is None
    with pytest.raises(ConfigError, match="--threads 3 cannot be had"):
        product_threads.product_threads(3)
