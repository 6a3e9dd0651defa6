"""Guards which kernel and which attention backend the GPU platforms choose on recorded machines,
with and without the libraries they know, and every reason why another was refused. What the user
names is taken or refused, never replaced. Nothing runs: registration and `requires` only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.model_shapes import GEMMA_3_4B, LLAMA_8B, fewer
from support.random_source import RandomSource
from support.recorded_machines import load

from sixfold.common.checkpoint.packed_schemes import PACKED
from sixfold.common.errors import KernelError
from sixfold.common.ops.registry import KernelRegistry
from sixfold.models.quantization import assign_schemes
from sixfold.platforms import select
from sixfold.platforms.cuda.kernels import register as register_cuda
from sixfold.platforms.interface import Decision, DeviceFacts
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import KernelTable, Problem
from sixfold.platforms.npu.kernels import register as register_npu
from sixfold.platforms.rocm.kernels import register as register_rocm
from sixfold.platforms.torch_runtime.executor import RUNTIME_OPS
from sixfold.platforms.torch_runtime.interpreted import HostedDevice
from sixfold.platforms.torch_runtime.kernels import register_generic
from sixfold.platforms.triton_kernels import register as triton_register
from sixfold.platforms.xpu.kernels import register as register_xpu

FLASHINFER = {"flashinfer-python": "0.7.2.post1"}
AITER = {"amd-aiter": "0.1.7"}
REGISTER: dict[str, Callable[..., None]] = {
    "cuda": register_cuda,
    "rocm": register_rocm,
    "xpu": register_xpu,
    "npu": register_npu,
}
MODELS = {"llama": fewer(LLAMA_8B, 1), "gemma": fewer(GEMMA_3_4B, 6)}
NO_TRITON = "triton is not installed"


@pytest.fixture(autouse=True)
def _triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Triton is installed is a parameter of these tests, not of where they run. Its module
    is not imported: what would be bound stands for itself."""
    there = "without_triton" not in request.node.name
    monkeypatch.setattr(triton_register, "missing", lambda: None if there else NO_TRITON)
    monkeypatch.setattr(triton_register, "_bound", lambda module, op, facts: print)
    monkeypatch.setattr(triton_register, "import_module", lambda *name: _Module)


class _Module:
    class TritonAttention:
        """Its own refusals, without its kernels."""

        name = "triton"

        def __init__(self, device: Any) -> None:
            pass

        def accepts(self, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
            return () if spec.head_dim <= 256 else ("head sizes up to 256",)


def facts_of(machine: str, libraries: dict[str, str] | None = None) -> DeviceFacts:
    found = select.probe_all(load(machine)[0])
    name = {"nvidia": "cuda", "amd": "rocm", "intel": "xpu", "ascend": "npu"}[
        machine.partition("_")[0]
    ]
    facts = found[name].devices[0]
    return replace(facts, libraries={**facts.libraries, **(libraries or {})})


class Choices:
    """What a platform chooses for a model of a shape."""

    def __init__(
        self,
        facts: DeviceFacts,
        model: str = "llama",
        chosen: dict[str, str] | None = None,
        quantize: str = "",
        strict: bool = False,
        sinks: bool = False,
        stored: dict[str, str] | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        registry, device = KernelRegistry(), HostedDevice(facts)
        register_generic(registry, device)
        REGISTER[facts.kind](registry, device)
        built = RandomSource(MODELS[model]).build(KernelTable({}, ()), getattr(torch, dtype), "")
        assign_schemes(built, quantize, stored or {})
        layers = [module for module in built.modules() if hasattr(module, "problems")]
        problems = [problem for layer in layers for problem in layer.problems()]
        problems += [Problem(op, dtype) for op in RUNTIME_OPS]
        self.table = registry.resolve(problems, facts, chosen or {}, strict)
        specs = [replace(spec, sinks=sinks) for spec in built.attention_specs()]
        wanted = (chosen or {}).get("attention")
        backend, attention = registry.resolve_attention(specs, facts, wanted, strict)
        self.decisions = {d.what: d for d in [*self.table.decisions, attention]}
        self.attention = backend.name

    def of(self, op: str) -> Decision:
        return self.decisions[f"kernel {op}"]

    def provider(self, *ops: str) -> set[str]:
        return {self.of(op).chosen for op in ops}


PORTABLE = ("rope", "silu_mul", "embedding", "kv_write", "page_copy")
MACHINES = (
    "nvidia_h100",
    "nvidia_b200",
    "amd_mi300x",
    "amd_mi355x",
    "amd_radeon_gfx1100",
    "intel_arc_b580",
    "intel_arc_b70",
    "intel_max_1550",
)


@pytest.mark.parametrize("machine", MACHINES)
def test_triton_serves_every_machine_without_libraries(machine: str) -> None:
    choices = Choices(facts_of(machine))
    assert choices.attention == "triton"
    assert choices.provider(*PORTABLE, "rms_norm", "add_rms_norm") == {"triton"}
    assert choices.provider("sample", "draw") == {"triton"}
    assert choices.provider("logprobs") == {"generic"}
    gemma = Choices(facts_of(machine), "gemma")
    assert gemma.attention == "triton"
    assert gemma.provider("rms_norm", "qk_norm_rope", "gelu_tanh_mul") == {"triton"}


@pytest.mark.parametrize("machine", MACHINES)
def test_generic_kernels_serve_every_machine_without_triton(machine: str) -> None:
    choices = Choices(facts_of(machine))
    assert choices.attention == "sdpa"
    assert choices.provider(*PORTABLE, "rms_norm", "add_rms_norm") == {"generic"}
    for op in PORTABLE:
        assert ("triton", NO_TRITON) in choices.of(op).rejected
        assert choices.of(op).fallback
    with pytest.raises(KernelError, match=f"Strict mode refuses .*{NO_TRITON}"):
        Choices(facts_of(machine), strict=True)


@pytest.mark.parametrize("machine", ["nvidia_h100", "nvidia_b200"])
@pytest.mark.parametrize("model", MODELS)
def test_flashinfer_attends_where_it_is_installed(machine: str, model: str) -> None:
    choices = Choices(facts_of(machine, FLASHINFER), model)
    assert choices.attention == "flashinfer"
    assert not choices.of("attention").fallback
    assert ("sdpa", "lower priority than flashinfer") in choices.of("attention").rejected
    assert choices.provider("rms_norm") == {"triton"}


FLASHINFER_REFUSALS = [
    ({"libraries": {}}, {}, "flashinfer-python is not installed"),
    ({"libraries": {"flashinfer-python": "0.6.9"}}, {}, "written for .* 0.7, not 0.6.9"),
    ({"libraries": {"flashinfer-python": "0.8.0"}}, {}, "written for .* 0.7, not 0.8.0"),
    ({"arch": (7, 5)}, {}, "needs compute capability 8.0, NVIDIA H100 80GB HBM3 has 7.5"),
    ({"arch": ()}, {}, "has unknown"),
    ({}, {"head_dim": 80}, "head sizes 64, 128, 256, not 80"),
    ({}, {"heads": 9, "kv_heads": 4}, "9 heads do not divide among 4"),
    ({}, {"dtype": "float32"}, "serves bfloat16 and float16, not float32"),
    ({}, {"kv_dtype": "int8"}, "keeps keys and values in bfloat16, not int8"),
    ({}, {"sinks": True}, "attention sinks are not served"),
]


@pytest.mark.parametrize(("facts", "spec", "reason"), FLASHINFER_REFUSALS)
def test_flashinfer_says_why_not(facts: Any, spec: Any, reason: str) -> None:
    from sixfold.platforms.cuda.flashinfer_attention import refusals

    here = replace(facts_of("nvidia_h100", FLASHINFER), **facts)
    asked = AttentionSpec(**{"heads": 32, "kv_heads": 8, "head_dim": 128, "scale": 1.0,
                             "dtype": "bfloat16", **spec})  # fmt: skip
    (said,) = refusals(asked, here)
    assert re.search(reason, said), said


def test_a_model_with_sinks_goes_to_triton_with_the_reason() -> None:
    choices = Choices(facts_of("nvidia_h100", FLASHINFER), sinks=True)
    assert choices.attention == "triton"
    assert "sinks" in dict(choices.of("attention").rejected)["flashinfer"]


@pytest.mark.parametrize(
    ("machine", "named", "reason"),
    [
        ("nvidia_h100", {"attention": "flashinfer"}, "flashinfer-python is not installed"),
        ("nvidia_h100", {"attention": "aiter"}, "there are: flashinfer, triton, sdpa"),
        ("amd_mi300x", {"attention": "aiter"}, "amd-aiter is not installed"),
        ("amd_mi300x", {"rms_norm": "aiter"}, "amd-aiter is not installed"),
        ("amd_radeon_gfx1100", {"attention": "aiter"}, "its kernels are for gfx942 and gfx950"),
    ],
)
def test_what_is_named_is_refused_with_the_reason(
    machine: str, named: dict[str, str], reason: str
) -> None:
    with pytest.raises(KernelError, match=reason):
        Choices(facts_of(machine), chosen=named)


def test_what_is_named_is_taken() -> None:
    facts = facts_of("nvidia_h100", FLASHINFER)
    assert Choices(facts, chosen={"attention": "sdpa"}).attention == "sdpa"
    assert Choices(facts, chosen={"rope": "generic"}).provider("rope") == {"generic"}


@pytest.mark.parametrize("machine", ["amd_mi300x", "amd_mi355x"])
def test_aiter_serves_what_it_is_for(machine: str) -> None:
    facts = facts_of(machine, AITER)
    llama, gemma = Choices(facts), Choices(facts, "gemma")
    assert llama.attention == gemma.attention == "aiter"
    assert llama.provider("rms_norm", "add_rms_norm") == {"aiter"}
    assert llama.provider(*PORTABLE) == {"triton"}
    assert gemma.provider("rms_norm", "add_rms_norm") == {"triton"}, "its weights are float32"
    assert "this model's are float32" in dict(gemma.of("rms_norm").rejected)["aiter"]


@pytest.mark.parametrize(
    ("arch", "libraries", "reason"),
    [
        ((11, 0, 0), AITER, "its kernels are for gfx942 and gfx950"),
        ((12, 0, 1), AITER, "ROCm/aiter#4302"),
        ((9, 0, 10), AITER, "ROCm/aiter#2021"),
        ((9, 4, 2), {"amd-aiter": "0.1.5"}, "needs amd-aiter 0.1.7, there is 0.1.5"),
    ],
)
def test_aiter_says_why_not(arch: Any, libraries: dict[str, str], reason: str) -> None:
    facts = replace(facts_of("amd_mi300x", libraries), arch=arch)
    choices = Choices(facts)
    for op in ("attention", "rms_norm"):
        assert reason in dict(choices.of(op).rejected)["aiter"]
        assert choices.of(op).chosen == "triton"


# ---- eight-bit floats


@pytest.mark.parametrize("machine", ["nvidia_h100", "nvidia_b200", "amd_mi300x", "amd_mi355x"])
def test_fp8_products_have_a_kernel(machine: str) -> None:
    facts = facts_of(machine)
    choices = Choices(facts, quantize="fp8")
    assert choices.provider("linear") == {"scaled_mm"}
    prepare = choices.table.kernels["linear"].prepare
    assert prepare is not None
    problem = Problem("linear", "bfloat16", {"k": 32, "n": 16}, "fp8")
    wanted = torch.float8_e4m3fnuz if machine == "amd_mi300x" else torch.float8_e4m3fn
    assert prepare(torch.ones(16, 32), problem).weight.dtype == wanted


@pytest.mark.parametrize(
    ("machine", "change", "reason"),
    [
        ("nvidia_h100", {"arch": (8, 9)}, "need compute capability 9.0"),
        ("nvidia_h100", {"arch": (8, 0), "fp8": "none"}, "has no units for eight-bit floats"),
        ("amd_radeon_gfx1100", {}, "has no units for eight-bit floats"),
        ("intel_arc_b580", {}, "Arc B580 has no units for eight-bit floats"),
        ("amd_mi300x", {"arch": (12, 0, 1), "fp8": "ocp"}, "scales by row are for gfx942"),
    ],
)
def test_fp8_is_refused_with_the_reason(machine: str, change: Any, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        Choices(replace(facts_of(machine), **change), quantize="fp8")


def test_an_odd_side_is_refused() -> None:
    facts = facts_of("nvidia_h100")
    kernel = Choices(facts, quantize="fp8").table.kernels["linear"]
    problem = Problem("linear", "bfloat16", {"k": 4096, "n": 1000}, "fp8")
    assert kernel.requires(facts, problem) == "n must be a multiple of 16, not 1000"


# ---- quantised matrices


def stored(scheme: str) -> dict[str, str]:
    """A packed checkpoint of the first layer: its embedding and head are plain."""
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    return {f"model.layers.0.{part}.weight": scheme for part in parts}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("machine", MACHINES)
def test_matrices_rounded_on_load_are_tritons(machine: str, quantize: str) -> None:
    choices = Choices(facts_of(machine), quantize=quantize)
    assert choices.provider("linear", "embedding") == {"triton"}
    assert not choices.of("linear").fallback
    refused = dict(choices.of("linear").rejected)
    assert refused["generic"] in {f"has no {scheme} weights" for scheme in ("int8", "int4")}
    assert refused["widened"] == refused["generic"]
    assert "this model's are int" in refused.get("scaled_mm", "this model's are int")
    kernels = choices.table.kernels
    assert kernels["linear"].prepare == kernels["embedding"].prepare, "a tied matrix is kept once"


@pytest.mark.parametrize("scheme", sorted(PACKED))
@pytest.mark.parametrize("machine", ["nvidia_h100", "amd_mi300x"])
def test_a_packed_model_is_tritons_beside_its_plain_head(machine: str, scheme: str) -> None:
    choices = Choices(facts_of(machine), quantize="stored", stored=stored(scheme))
    assert choices.provider("linear", "embedding") == {"triton"}
    assert not choices.of("linear").fallback
    assert ("generic", f"has no {scheme} weights") in choices.of("linear").rejected


@pytest.mark.parametrize("machine", MACHINES)
def test_plain_matrices_stay_with_torch(machine: str) -> None:
    choices = Choices(facts_of(machine))
    assert choices.of("linear").chosen == "generic"
    assert not choices.of("linear").fallback
    reason = "is for quantised matrices in other schemes; this model's are bfloat16"
    assert dict(choices.of("linear").rejected)["triton"] == reason
    with pytest.raises(KernelError, match=f"'triton' cannot serve op 'linear': {reason}"):
        Choices(facts_of(machine), chosen={"linear": "triton"})


def test_eight_bit_floats_pass_triton_over() -> None:
    choices = Choices(facts_of("nvidia_h100"), quantize="fp8")
    assert (choices.of("linear").chosen, choices.of("linear").fallback) == ("scaled_mm", False)
    assert "this model's are bfloat16, fp8" in dict(choices.of("linear").rejected)["triton"]


def test_forms_that_triton_has_none_for_are_refused() -> None:
    schemes = {**stored("gptq_int4"), "model.embed_tokens.weight": "mxfp4"}
    with pytest.raises(KernelError, match="triton: has no mxfp4 weights"):
        Choices(facts_of("nvidia_h100"), quantize="stored", stored=schemes)


@pytest.mark.parametrize(
    ("machine", "facts"),
    [
        ("nvidia_h100", {"fp8": "ocp", "lane_width": 32, "graphs": "stream"}),
        ("amd_mi300x", {"fp8": "fnuz", "lane_width": 64, "graphs": "stream"}),
        ("amd_mi355x", {"fp8": "ocp", "lane_width": 64, "graphs": "stream"}),
        ("amd_radeon_gfx1100", {"fp8": "none", "lane_width": 32, "graphs": "stream"}),
        ("ascend_910b", {"fp8": "none", "lane_width": 64, "graphs": "tasks", "arch": (910,)}),
        ("ascend_910c", {"fp8": "none", "lane_width": 64, "graphs": "tasks", "arch": (910,)}),
        ("intel_arc_b580", {"fp8": "none", "lane_width": 16, "graphs": "stream", "arch": (20, 1)}),
        ("intel_arc_b70", {"fp8": "none", "lane_width": 16, "graphs": "stream", "arch": (20, 1)}),
        ("intel_max_1550", {"fp8": "none", "lane_width": 16, "graphs": "stream", "arch": (12, 60)}),
    ],
)
def test_facts_that_kernels_ask_for(machine: str, facts: dict[str, Any]) -> None:
    known = facts_of(machine)
    assert {name: getattr(known, name) for name in facts} == facts
    assert known.libraries["torch"].startswith("2.13.0")


# ---- npu

OF_LIBRARY = ("rms_norm", "add_rms_norm", "silu_mul", "rope", "sample")


@pytest.mark.parametrize("machine", ["ascend_910b", "ascend_910c"])
def test_the_vendors_library_serves_both_generations_that_its_pages_name(machine: str) -> None:
    choices = Choices(facts_of(machine))
    assert choices.attention == "fused_infer"
    assert choices.provider(*OF_LIBRARY) == {"torch_npu"}
    assert choices.provider("embedding", "linear") == {"generic"}
    packed = Choices(facts_of(machine), quantize="stored", stored=stored("int8_channel"))
    assert packed.of("linear").chosen == "torch_npu"
    asking = Choices(facts_of(machine), quantize="stored", stored=stored("int8_token"))
    assert asking.of("linear").chosen == "torch_npu_w8a8"
    lower = ("torch_npu", "lower priority than torch_npu_w8a8")
    assert lower in asking.of("linear").rejected


def test_groups_of_four_bits_are_refused_in_bfloat16_with_the_way_out() -> None:
    with pytest.raises(KernelError, match=r"would round .*; --dtype float16 keeps them"):
        Choices(facts_of("ascend_910b"), chosen={"linear": "torch_npu"}, quantize="stored",
            stored=stored("packed_int4"))  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "libraries", "reason"),
    [
        ("ascend_910_first", {}, "documented for the 910B and 910C, not for Ascend 910"),
        ("ascend_910b", {"torch_npu": ""}, "torch_npu is not installed"),
        ("ascend_910c", {"torch_npu": "2.12.1"}, "written for torch_npu 2.13, there is 2.12.1"),
    ],
)
def test_elsewhere_npu_kernels_are_generic_with_the_reason(
    machine: str, libraries: dict[str, str], reason: str
) -> None:
    choices = Choices(facts_of(machine, libraries))
    assert choices.attention == "sdpa"
    for op in OF_LIBRARY:
        assert choices.of(op).chosen == "generic"
        assert reason in dict(choices.of(op).rejected)["torch_npu"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_int8_rounded_on_load_is_the_librarys(dtype: str) -> None:
    """The head of 128,256 outputs too, in parts."""
    choices = Choices(facts_of("ascend_910b"), quantize="int8", dtype=dtype)
    assert choices.provider("linear", "embedding") == {"torch_npu"}


# ---- xpu


def test_four_bits_are_tritons_and_onednn_may_be_named() -> None:
    asked: Any = {"quantize": "stored", "stored": stored("packed_int4"), "dtype": "float16"}
    linear = Choices(facts_of("intel_arc_b580"), **asked).of("linear")
    assert (linear.chosen, linear.fallback) == ("triton", False)
    assert ("onednn", "lower priority than triton") in linear.rejected
    named = Choices(facts_of("intel_arc_b580"), chosen={"linear": "onednn"}, **asked)
    assert named.of("linear").chosen == "onednn"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_by_bytes_are_for_checkpoints_that_ask(dtype: str) -> None:
    asked: Any = {"quantize": "stored", "dtype": dtype}
    linear = Choices(facts_of("intel_arc_b580"), stored=stored("int8_token"), **asked).of("linear")
    assert (linear.chosen, linear.fallback) == ("onednn_w8a8", False)
    plain = Choices(facts_of("intel_arc_b580"), stored=stored("int8_channel"), **asked)
    assert plain.of("linear").chosen == "triton"
    with pytest.raises(KernelError, match="'onednn_w8a8' cannot serve op 'linear': is for"):
        Choices(facts_of("intel_arc_b580"), chosen={"linear": "onednn_w8a8"},
            stored=stored("int8_channel"), **asked)  # fmt: skip


def test_four_bits_without_triton_are_onednns() -> None:
    choices = Choices(
        facts_of("intel_arc_b580"),
        quantize="stored",
        stored=stored("packed_int4"),
        dtype="float16",
    )
    assert choices.of("linear").chosen == "onednn"
    assert dict(choices.of("linear").rejected)["triton"] == NO_TRITON
