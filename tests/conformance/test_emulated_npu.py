"""Guards the npu platform's adapters to torch_npu against the contracts of their ops, over the
emulator of `support/emulated_npu`: what is passed is what the vendor documents, and means what the
contract says. Evidence of the kind "emulated": nothing of the vendor's kernels runs here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.emulated_npu import NPUError, module
from support.emulated_npu.platform import PLATFORM, EmulatedDevice, facts

from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops import attention as contract
from sixfold.common.ops.conformance import Verdict, check_op, round_case
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Case, Problem
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.npu import attention as adapter
from sixfold.platforms.npu import kernels
from sixfold.platforms.npu.attention import FusedInferAttention
from sixfold.platforms.torch_runtime.conformance import TorchRunner, to_numpy

ATTENTION = OPS["attention"]
SHAPES = [s for s in contract.SHAPES if not s.soft_cap and not s.sinks and s.dim % 16 == 0]
ROTARY = ("rope", "qk_norm_rope", "interleaved_rope")
FUSED = ("rms_norm", "add_rms_norm", "silu_mul", *ROTARY)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    emulator = module()
    monkeypatch.setitem(sys.modules, "torch_npu", emulator)
    return emulator


def verdicts(title: str, monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    suite = PLATFORM.conformance(None)
    monkeypatch.setitem(sys.modules, "torch_npu", sys.modules["torch_npu"])
    assert suite.evidence == "emulated"
    subjects = [s for s in suite.subjects if s.op == title and s.provider in OURS]
    return check_op(OPS[title], subjects)


OURS = ("torch_npu", "fused_infer")


@pytest.mark.parametrize("title", [*FUSED, "attention"])
def test_every_kernel_equals_its_reference(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (verdict,) = verdicts(title, monkeypatch)
    assert (verdict.status, verdict.failures) == ("pass", [])


def in_pages_of_128(shape: contract.Shape) -> Case:
    case = contract.build(np.random.default_rng(3), replace(shape, page_size=128))
    return round_case(ATTENTION, case, "bfloat16")


def attend(case: Case, backend: FusedInferAttention | None = None) -> np.ndarray:
    device = EmulatedDevice(facts())
    made = backend or FusedInferAttention(device)
    return to_numpy(TorchRunner(device).attend(made, case, "bfloat16")[0])


def close(case: Case) -> None:
    tolerance = ATTENTION.tolerance["bfloat16"]
    want = ATTENTION.reference(**case.args)
    np.testing.assert_allclose(attend(case), want, rtol=tolerance.rtol, atol=tolerance.atol)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_attention_of_every_shape_in_pages_that_the_op_takes(shape: contract.Shape) -> None:
    close(in_pages_of_128(shape))


def named(name: str) -> Case:
    return in_pages_of_128(next(shape for shape in SHAPES if shape.name == name))


# ---- faults


@pytest.mark.parametrize("size", [1, 16, 64, 192, 640, 1024])
def test_wrong_page_sizes_are_refused_with_those_allowed(size: int) -> None:
    """The device itself reads such pages wrongly without a word."""
    spec = AttentionSpec(4, 2, 64, 1.0, dtype="bfloat16")
    backend = FusedInferAttention(EmulatedDevice(facts()))
    with pytest.raises(KernelError, match=f"pages of 128, 256, 384, 512 tokens, not {size};"):
        backend.layout(KVGroup("g", KVKind.FULL, size, 8), spec, 1)


def test_a_cache_that_needs_more_than_32_bits_is_refused() -> None:
    spec = AttentionSpec(64, 64, 128, 1.0, dtype="bfloat16")
    backend = FusedInferAttention(EmulatedDevice(facts()))
    with pytest.raises(KernelError, match="counts the elements"):
        backend.layout(KVGroup("g", KVKind.FULL, 128, 1025), spec, 1)
    assert backend.layout(KVGroup("g", KVKind.FULL, 128, 1023), spec, 1).shape[1] == 1023


def wrong_page(given: dict[str, Any]) -> None:
    given["block_size"] //= 2


def wider_window(given: dict[str, Any]) -> None:
    if "pre_tokens" in given:  # not of single queries
        given["pre_tokens"] += 1


def inverted(given: dict[str, Any]) -> None:
    given["atten_mask"] = ~given["atten_mask"]


def no_mode(given: dict[str, Any]) -> None:
    given["sparse_mode"] = 0


def one_key_more(given: dict[str, Any]) -> None:
    given["actual_seq_lengths_kv"] = [n + 1 for n in given["actual_seq_lengths_kv"]]


def wide_table(given: dict[str, Any]) -> None:
    given["block_table"] = given["block_table"].long()


def pages_for_blocks(given: dict[str, Any]) -> None:
    given["block_table"] = given["block_table"] // 2


def scale_twice(given: dict[str, Any]) -> None:
    given["scale"] **= 2


FAULTS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (wrong_page, "prefill_two"),
    (wider_window, "window_chunk"),
    (inverted, "prefill_two"),
    (inverted, "window_decode"),
    (no_mode, "prefill_two"),
    (one_key_more, "decode_unlike_lengths"),
    (one_key_more, "chunk_after_context"),
    (wide_table, "decode_one"),
    (pages_for_blocks, "decode_one"),
    (scale_twice, "mixed"),
]


@pytest.mark.parametrize(("fault", "name"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_fault_in_the_call_is_caught(
    fault: Callable[[dict[str, Any]], None], name: str, library: Any
) -> None:
    close(named(name))
    op = library.npu_fused_infer_attention_score

    def faulty(*args: Any, **given: Any) -> Any:
        fault(given)
        return op(*args, **given)

    library.npu_fused_infer_attention_score = faulty
    with pytest.raises((NPUError, AssertionError)):
        close(named(name))


def test_keys_written_where_values_belong_are_caught(library: Any) -> None:
    op = library.npu_scatter_pa_kv_cache
    library.npu_scatter_pa_kv_cache = lambda k, v, *rest, **given: op(v, k, *rest, **given)
    with pytest.raises(AssertionError):
        close(named("mixed"))


def test_a_cache_order_that_is_not_documented_for_it_is_caught(library: Any) -> None:
    op = library.npu_scatter_pa_kv_cache
    library.npu_scatter_pa_kv_cache = lambda *args, cache_mode: op(*args)
    with pytest.raises(NPUError, match="cache_mode PA_NZ"):
        close(named("mixed"))


def test_swapped_halves_are_caught(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    op = library.npu_swiglu
    library.npu_swiglu = lambda x, dim: op(torch.cat(x.chunk(2, dim)[::-1], dim), dim)
    monkeypatch.setattr(sys.modules[PLATFORM.__module__], "module", lambda: library)
    (verdict,) = verdicts("silu_mul", monkeypatch)
    assert verdict.status == "fail"


def turned_back(given: list[Any]) -> None:
    given[2] = -given[2]


def other_pairs(given: list[Any]) -> None:
    given[3] = {"half": "interleave", "interleave": "half"}[given[3]]


def whole_angles(given: list[Any]) -> None:
    given[1:3] = [16 * part for part in given[1:3]]


def angles_of_the_input(given: list[Any]) -> None:
    given[1:3] = [part.bfloat16() for part in given[1:3]]


def heads_for_tokens(given: list[Any]) -> None:
    given[0] = given[0].transpose(1, 2).contiguous()


@pytest.mark.parametrize("title", ["rope", "interleaved_rope"])
@pytest.mark.parametrize(
    "fault", [turned_back, other_pairs, whole_angles, angles_of_the_input, heads_for_tokens]
)
def test_a_fault_in_a_rotation_is_caught(
    title: str, fault: Callable[[list[Any]], None], monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    op = library.npu_rotary_mul

    def faulty(*args: Any) -> Any:
        given = list(args)
        fault(given)
        return op(*given).reshape(args[0].shape)

    library.npu_rotary_mul = faulty
    monkeypatch.setattr(sys.modules[PLATFORM.__module__], "module", lambda: library)
    (verdict,) = verdicts(title, monkeypatch)
    assert verdict.status == "fail"


def test_what_a_rotation_is_not_documented_for_is_refused() -> None:
    kernel = next(k for k in registered() if k.op == "rope")

    def refused(**dims: int) -> str | None:
        return kernel.requires(facts(), Problem("rope", "bfloat16", dims))

    assert refused(heads=800, kv_heads=199, head_dim=128) is None
    assert "up to 999 heads, not 1000" in str(refused(heads=800, kv_heads=200, head_dim=128))
    assert "up to 895 numbers of a head" in str(refused(heads=8, kv_heads=2, head_dim=896))


# ---- what the device refuses, and what is never asked of it


def test_weights_of_another_dtype_are_refused_by_both() -> None:
    problem = Problem("rms_norm", "bfloat16", {"width": 64, "weight_bytes": 4})
    (kernel,) = (k for k in registered() if k.op == "rms_norm")
    assert "this model's are float32" in str(kernel.requires(facts(), problem))
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    with pytest.raises(NPUError, match="gamma is torch"):
        kernels.rms_norm(x, torch.ones(64), 1e-6)


def registered() -> list[Any]:
    found: list[Any] = []
    registry: Any = SimpleNamespace(add=found.append, add_attention=lambda *rest: None)
    kernels.register(registry, EmulatedDevice(facts()))
    return found


def test_tensors_that_are_not_contiguous_are_refused(library: Any) -> None:
    q = torch.zeros(1, 64, 1, dtype=torch.bfloat16).transpose(1, 2)
    pages = torch.zeros(4, 128, 128, dtype=torch.bfloat16)[..., :64]
    with pytest.raises(NPUError, match="key is not contiguous"):
        library.npu_fused_infer_attention_score(
            q, pages, pages, block_table=torch.zeros(1, 1, dtype=torch.int32),
            actual_seq_lengths_kv=[1], num_heads=4, num_key_value_heads=4, block_size=128,
        )  # fmt: skip


def test_strided_queries_keys_and_values_reach_the_op_contiguous(library: Any) -> None:
    """As a model cuts them from one product."""
    case = named("mixed")

    class Strided(FusedInferAttention):
        def run(self, bound: Any, pool: Any, layer: int, *tensors: Any) -> Any:
            q, k, v, *rest = tensors
            whole = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
            parts = whole.split([x[0].numel() for x in (q, k, v)], 1)
            cut = [p.view(x.shape) for p, x in zip(parts, (q, k, v), strict=True)]
            return super().run(bound, pool, layer, *cut, *rest)

    got = attend(case, Strided(EmulatedDevice(facts())))
    np.testing.assert_array_equal(got, attend(case))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 72}, "steps of 16"),
        ({"head_dim": 528}, "up to 512"),
        ({"heads": 130, "kv_heads": 2}, "64 of them to a kv head"),
        ({"dtype": "float32"}, "not float32"),
        ({"kv_dtype": "int8"}, "not int8"),
        ({"soft_cap": 30.0}, "soft cap"),
        ({"sinks": True}, "not documented"),
    ],
)
def test_what_the_op_does_not_document_is_refused(changes: dict[str, Any], reason: str) -> None:
    plain = AttentionSpec(8, 2, 128, 1.0, dtype="bfloat16")
    assert adapter.refusals(plain, facts()) == ()
    (found,) = adapter.refusals(replace(plain, **changes), facts())
    assert reason in found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"libraries": {}}, "torch_npu is not installed"),
        ({"libraries": {"torch_npu": "2.9.0.post1"}}, "written for torch_npu 2.13"),
        ({"dtypes": frozenset({"float32", "float16"})}, "910B and 910C"),
    ],
)
def test_devices_and_releases_it_was_not_written_for(changes: Any, reason: str) -> None:
    found = adapter.refusals(
        AttentionSpec(8, 2, 128, 1.0, dtype="float16"), replace(facts(), **changes)
    )
    assert reason in found[0]
