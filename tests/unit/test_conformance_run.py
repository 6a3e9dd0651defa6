"""Guards the conformance run itself: rounding is each dtype's own, what differs is found and
measured, and an off-by-one in any of many ops does not get through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checked_platform import one_row_late, subject

from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import DTYPES, check_op, difference, round_case, round_to
from sixfold.platforms.interface_kernels import Case, Tolerance

EXACT = Tolerance(0.0, 0.0)
NAN, INF = np.nan, np.inf


def test_bfloat16_rounds_to_nearest_and_ties_to_even() -> None:
    given = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, NAN, INF, -0.0, 3.4e38])
    wanted = [1.0, 1.0, 1 + 2**-6, -1 - 2**-7, NAN, INF, -0.0, INF]
    found = round_to(given.astype(np.float32), "bfloat16")
    np.testing.assert_array_equal(found, np.array(wanted, np.float32))
    assert np.signbit(found[6])
    assert round_to(np.float32([70000.0, 2049.0]), "float16").tolist() == [INF, 2048.0]


def test_float32_arguments_stay_and_integers_too() -> None:
    (case,) = [c for c in OPS["rope"].cases(np.random.default_rng(0)) if c.name == "partial"]
    rounded = round_case(OPS["rope"], case, "bfloat16").args
    np.testing.assert_array_equal(rounded["cos"], case.args["cos"])
    assert (rounded["q"] != case.args["q"]).any()


@pytest.mark.parametrize(
    ("got", "wanted", "said"),
    [
        ([[1.0, 2.0]], [[1.0, 2.5]], "1 of 2 elements differ, first at [1]: 2, not 2.5"),
        ([[NAN]], [[1.0]], "first at [0]: nan, not 1"),
        ([[1.0]], [[NAN]], "first at [0]: 1, not nan"),
        ([[INF]], [[-INF]], "first at [0]: inf, not -inf"),
        ([[1.0]], [[1.0, 1.0]], "shape (1,), not (2,)"),
        ([[1.0]], [[1.0], [1.0]], "1 results, the reference has 2"),
        ([[1.0], [2.0]], [[1.0], [3.0]], "result 1: 1 of 1"),
    ],
)
def test_what_differs_is_said(got: Any, wanted: Any, said: str) -> None:
    pair = ([np.array(x) for x in side] for side in (got, wanted))
    assert said in difference(*pair, EXACT)[1]


def test_equal_nan_and_infinities_are_equal_and_errors_are_measured() -> None:
    have, want = np.array([NAN, INF, -INF, 1.25]), np.array([NAN, INF, -INF, 1.0])
    assert difference([have], [want], Tolerance(0.5, 0.0)) == (0.25, "")
    assert difference([np.zeros((0, 3))], [np.zeros((0, 3))], EXACT) == (0.0, "")


def test_a_case_that_no_dtype_reaches_runs_once() -> None:
    ran: list[str] = []

    def run(case: Case, dtype: str) -> list[Any]:
        ran.append(dtype)
        return [OPS["page_digest"].reference(**case.args)]

    digest = subject("page_digest", OPS["page_digest"].reference)
    counted = type(digest)("page_digest", "x", digest.requires, run)
    check_op(OPS["page_digest"], [counted])
    assert set(ran) == {"float32"}
    (verdict,) = check_op(OPS["silu_mul"], [subject("silu_mul", OPS["silu_mul"].reference)])
    assert list(verdict.errors) == list(DTYPES)


def test_failures_are_counted_and_only_the_first_are_kept() -> None:
    def wrong(**args: Any) -> Any:
        return OPS["silu_mul"].reference(**args) + 1

    (verdict,) = check_op(OPS["silu_mul"], [subject("silu_mul", wrong)], dtypes=["float32"])
    assert (verdict.failed, verdict.passed, len(verdict.failures)) == (3, 1, 3)
    assert verdict.failures[0].error == pytest.approx(1, abs=1e-6)


def test_what_a_kernel_itself_refuses_is_left_out_with_the_reason() -> None:
    def picky(**args: Any) -> Any:
        if args["gate"].shape[0] == 1:
            raise KernelError("no single rows")
        return OPS["silu_mul"].reference(**args)

    (verdict,) = check_op(OPS["silu_mul"], [subject("silu_mul", picky)], dtypes=["float32"])
    assert verdict.status == "pass"
    assert set(verdict.refused) == {"no single rows"}
    assert verdict.passed + sum(verdict.refused.values()) == 4


# ---- an off-by-one in every kind of op is caught; the numpy references are the kernels


def changed(op: str, **changes: Callable[[Any], Any]) -> tuple[str, Callable[..., Any]]:
    """The op's reference, given some arguments a little changed."""

    def faulty(**args: Any) -> Any:
        return OPS[op].reference(**{**args, **{n: f(args[n]) for n, f in changes.items()}})

    return op, faulty


def one_more(x: Any) -> Any:
    return x + 1


FAULTS = {
    "embedding_last_row": ("embedding", one_row_late),
    "moe_one_expert_less": changed("moe", top_k=lambda k: max(1, k - 1)),
    "rope_pair_beside": changed("rope", cos=lambda c: np.roll(c, 1, -1)),
    "rope_angles_next_position": changed("rope_angles", positions=one_more),
    "kv_write_next_slot": changed("kv_write", slots=lambda s: s // 16 * 16 + (s + 1) % 16 % 8),
    "attention_window_wider": changed("attention", window=lambda w: w + (w > 0)),
    "tree_attention_mask_ignored": changed("tree_attention", tree_mask=lambda mask: None),
    "tree_attention_parent_beside": changed(
        "tree_attention",
        tree_mask=lambda mask: np.roll(mask, 1, 0) | np.eye(*mask.shape, dtype=bool),
    ),
    "attention_heads_grouped_wrong": changed("attention", k=lambda k: np.roll(k, 1, 1)),
    "paged_attention_newest_missing": changed(
        "paged_attention", lengths=lambda n: np.maximum(n - 1, 0)
    ),
    "page_copy_page_beside": changed("page_copy", sources=lambda p: np.maximum(p - 1, 0)),
    "sample_one_token_fewer": changed("sample", logits=lambda x: x[:, : max(1, x.shape[1] - 1)]),
    "logprobs_next_token": changed("logprobs", token_ids=lambda t: t // 2),
    "layer_norm_no_bias": changed("layer_norm", bias=lambda b: None),
    "clamped_swiglu_limit_beside": changed("clamped_swiglu", limit=lambda x: x * 1.01),
    "clamped_swiglu_clamped_before": changed("clamped_swiglu", clamp_after=lambda late: False),
    "conv1d_update_state_turned": changed("conv1d_update", state=lambda s: np.roll(s, 1, 1)),
    "conv1d_update_stale_slot": changed("conv1d_update", context_lens=one_more),
    "gated_delta_decay_of_next_token": changed("gated_delta", a=lambda a: np.roll(a, -1, 0)),
    "gated_delta_stale_slot": changed("gated_delta", context_lens=one_more),
    "gated_delta_heads_grouped_wrong": changed("gated_delta", k=lambda k: np.roll(k, 1, 1)),
    "moe_route_one_group_more": changed("moe_route", kept_groups=one_more),
    "moe_route_bias_forgotten": changed("moe_route", bias=lambda b: None),
    "moe_experts_expert_beside": changed("moe_experts", experts=lambda e: np.maximum(e - 1, 0)),
    "moe_experts_clamped_before": changed("moe_experts", clamp_after=lambda late: False),
    "latent_attention_newest_missing": changed(
        "latent_attention", context_lens=lambda n: np.maximum(n - 1, 0)
    ),
    "merge_state_base_two": changed("merge_state", first_lse=lambda x: x * np.float32(1.4427)),
    "segment_attention_border_beside": changed(
        "segment_attention", starts=lambda s: (*s[:1], *(min(x + 1, s[-1]) for x in s[1:]))
    ),
    "page_digest_page_beside": changed("page_digest", pages=lambda p: np.maximum(p - 1, 0)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_off_by_one_is_caught(name: str) -> None:
    op, faulty = FAULTS[name]
    right = subject(op, OPS[op].reference)
    found = check_op(OPS[op], [subject(op, faulty, "faulty"), right], dtypes=["float32"])
    assert [verdict.status for verdict in found] == ["fail", "pass"]
    assert found[0].failures[0].message
