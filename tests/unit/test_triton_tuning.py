"""Guards how the Triton kernels judge a device: on recorded machines, the row of the tuning table
or the reason why there is none; what `requires` refuses; and the reason where there is no Triton.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from support.kernel_checks import cpu_facts
from support.recorded_machines import load, names

from sixfold.common.errors import KernelError
from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms import select
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface import DeviceFacts
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.torch_runtime.kernels import register_generic
from sixfold.platforms.triton_kernels import register, tuning

ROWS = {
    "nvidia_h100": "sm_90",
    "nvidia_b200": "sm_100",
    "amd_mi300x": "gfx942",
    "amd_mi355x": "gfx950",
    "amd_radeon_gfx1100": "rdna3",
    "intel_arc_b580": "xe",
}
REFUSED = {
    "amd_integrated_gfx1036": "architecture 10.3.6 of .* is in no row .*cdna: from 9.0.8 and below",
    "xeon_amx": "no Triton compiler for cpu devices, only for cuda, rocm, xpu",
    "apple_m4": "no Triton compiler for mlx devices",
    "ascend_910b": "no Triton compiler for npu devices",
}


def recorded(name: str) -> DeviceFacts:
    machine, _ = load(name)
    found = select.probe_all(machine)
    devices = [d for probe in found.values() for d in probe.devices]
    return next((d for d in devices if d.kind != "cpu"), devices[-1])


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_recorded_devices_have_their_row(name: str, row: str) -> None:
    facts = recorded(name)
    assert tuning.refusal(facts) is None
    chosen = tuning.choose(facts)
    assert (chosen.name, chosen.lane_width) == (row, facts.lane_width)


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_other_recorded_devices_are_refused(name: str, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        tuning.choose(recorded(name))


def test_every_recorded_device_has_a_row_or_a_reason() -> None:
    judged = 0
    for name in names():
        for probe in select.probe_all(load(name)[0]).values():
            for facts in probe.devices:
                judged += 1
                assert (tuning.refusal(facts) is None) == (tuning._row(facts) is not None)
    assert judged > 20


@pytest.mark.parametrize(
    ("arch", "row"),
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"),
     ((12, 1), "sm_120"), ((13, 0), "sm_120"), ((), None)],
)  # fmt: skip
def test_an_arch_between_rows_has_the_one_before(arch: tuple[int, ...], row: str | None) -> None:
    facts = cpu_facts(kind="cuda", arch=arch)
    assert (tuning.refusal(facts) is None) == (row is not None)
    if row is not None:
        assert tuning.choose(facts).name == row


WITHOUT_PRODUCTS = {"delta", "mhc", "pool", "select"}


def test_every_row_is_a_whole_tuning_with_sizes_that_are_powers_of_two() -> None:
    for row in tuning._table()["row"]:
        chosen = tuning.choose(cpu_facts(kind=row["kind"], arch=tuple(row["from"])))
        assert chosen.name == row["name"]
        sizes = [chosen.splits, chosen.row_elements, chosen.most_warps]
        sizes += [chosen.mhc_slices, chosen.mhc.block_k, chosen.mhc_many.block_k]
        for name in chosen.__slots__:
            tile = getattr(chosen, name)
            if isinstance(tile, tuning.Tile):
                sizes += [tile.block_m, tile.block_n, tile.warps]
                assert name in WITHOUT_PRODUCTS or tile.block_m >= 16 <= tile.block_n
        for tile in (chosen.linear_narrow, chosen.linear, chosen.linear_float32):
            sizes.append(tile.block_k)
            assert tile.block_k >= 32, "a product is 16 deep, and a byte may have two numbers"
        assert all(size > 0 and size & (size - 1) == 0 for size in sizes)


GPU = cpu_facts(kind="cuda", arch=(9, 0), dtypes=frozenset({"float32", "bfloat16"}))


def test_requires_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "missing", lambda: None)
    problem = Problem("rms_norm", "bfloat16", {"width": 4096})
    assert register.requires(GPU, problem) is None
    for facts, asked, reason in [
        (GPU, replace(problem, dtype="float16"), "test CPU does not compute in float16"),
        (GPU, replace(problem, dtype="int8"), "serves float32, float16, bfloat16, not int8"),
        (GPU, replace(problem, dims={"width": 1 << 16}), "rows of up to 32768 columns, not 65536"),
        (GPU, Problem("layer_norm", "float32", {"width": 1 << 16}), "rows of up to 32768 columns"),
        (GPU, Problem("mhc_pre", "float32", {"streams": 3}), "a power of two of streams, not 3"),
        (
            GPU,
            Problem("latent_attention", "bfloat16", {"dim": 576, "value_dim": 1024}),
            "vectors of up to 512 numbers in bfloat16 on test CPU, not 1024",
        ),
        (
            GPU,
            Problem("compressed_attention", "float32", {"dim": 512}),
            "vectors of up to 256 numbers in float32",
        ),
        (GPU, replace(problem, weights="gptq_int4"), "has no gptq_int4 weights"),
        (replace(GPU, arch=(7, 5)), problem, "architecture 7.5 of test CPU is in no row"),
    ]:
        assert reason in (register.requires(facts, asked) or "")
    monkeypatch.undo()
    monkeypatch.setattr(register, "missing", lambda: "triton is not installed")
    assert register.requires(GPU, problem) == "triton is not installed"


def test_without_triton_everything_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(register, "missing", lambda: "triton is not installed")
    registry = KernelRegistry()
    device = CpuDevice(GPU, threads=1)
    register_generic(registry, device)
    register.register_triton(registry, device)
    few = {"linear": "gptq_int4"}  # plain matrices pass its kernel over
    problems = [Problem(op, "float32", weights=few.get(op, "")) for op in register.OPS]
    table = registry.resolve(problems, GPU, {})
    assert all(("triton", "triton is not installed") in d.rejected for d in table.decisions)
    assert all(d.fallback for d in table.decisions)
    spec = AttentionSpec(4, 2, 64, 1.0)
    _, decision = registry.resolve_attention([spec], GPU, None)
    assert decision.rejected == (("triton", "triton is not installed"),)
    with pytest.raises(KernelError, match="'triton' cannot serve op 'attention': triton is not"):
        registry.resolve_attention([spec], GPU, "triton")
    for kernel in registry.kernels():
        if kernel.provider == "triton":
            with pytest.raises(KernelError, match="no Triton kernels: triton is not installed"):
                kernel.fn()
    backend = next(b for b in registry.backends() if b.name == "triton")
    for method in ("layout", "plan", "bind", "run"):
        with pytest.raises(KernelError, match="triton is not installed"):
            getattr(backend, method)()


def test_importing_the_register_imports_no_triton() -> None:
    code = (
        "import sys, sixfold.platforms.triton_kernels.register\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('triton', 'torch')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stderr
