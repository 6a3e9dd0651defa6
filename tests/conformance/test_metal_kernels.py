"""Guards the Metal kernels without a GPU: their very sources, compiled for a CPU, pass all cases of
their ops in every dtype; a fault in one is caught, here and by the comparison at start; and what
was refused is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.metal_emulator import Emulator, needs_compiler
from support.run_mlx import complete, mlx_facts
from support.tiny_mlx import VOCAB, own_greedy, write

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import check_op
from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.sample import LONGEST
from sixfold.common.ops.suite import kernel_subject
from sixfold.platforms.interface import EngineSpec, ExecutorInfo
from sixfold.platforms.interface_kernels import Kernel, Problem
from sixfold.platforms.mlx import executor
from sixfold.platforms.mlx.conformance import MLXRunner, arguments
from sixfold.platforms.mlx.executor import MLXExecutor
from sixfold.platforms.mlx.kernels import GENERIC, register
from sixfold.platforms.mlx.loading import DTYPES
from sixfold.platforms.mlx.metal import page_digest, page_gather, paged_attention, sample
from sixfold.platforms.mlx.metal.check import refusal
from sixfold.platforms.mlx.metal.launch import Launch, Launcher, MetalSource, launch
from sixfold.platforms.mlx.metal.register import KERNELS, NEEDS_METAL
from sixfold.platforms.mlx.paged_decode import GATHERED, PRODUCTS

ON_METAL = replace(mlx_facts(), features=frozenset({"metal"}))
SOURCES = [module.SOURCE for module in (page_digest, page_gather, paged_attention, sample)]
WITHOUT_FLOATS = ("sample", "page_digest")  # the dtype of the model does not reach them


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("metal"))


def of_op(op: str, *values: str) -> Any:
    """A test's parameters; the many head sizes of attention take long to compile."""
    return pytest.param(op, *values, marks=[pytest.mark.slow] if op == "paged_attention" else [])


EVERY = [
    of_op(op, kind) for op in KERNELS for kind in (["float32"] if op in WITHOUT_FLOATS else DTYPES)
]


# ---- the sources


@needs_compiler()
@pytest.mark.parametrize(("op", "kind"), EVERY)
def test_emulated_kernel_equals_its_reference(op: str, kind: str, emulator: Emulator) -> None:
    before = emulator.launches
    fn = partial(KERNELS[op], emulator.launch)
    kernel = Kernel(op, "metal", lambda facts, problem: None, fn)
    subject = kernel_subject(OPS[op], kernel, ON_METAL, MLXRunner())
    (verdict,) = check_op(OPS[op], [subject], dtypes=[kind])
    assert verdict.status == "pass", verdict
    assert emulator.launches > before


@needs_compiler()
def test_a_digest_is_of_bits_whatever_they_stand_for(emulator: Emulator) -> None:
    values = mx.array(np.random.default_rng(0).standard_normal((3, 4, 2, 8)).astype(np.float32))
    for dtype in DTYPES.values():
        pool = values.astype(dtype)
        bits = np.array(pool.view({2: mx.uint16, 4: mx.uint32}[pool.itemsize]))
        wanted = OPS["page_digest"].reference(bits, np.array([2, 0]))
        pages = mx.array([2, 0])
        np.testing.assert_array_equal(
            np.array(page_digest.page_digest(emulator.launch, pool, pages)), wanted
        )
        np.testing.assert_array_equal(np.array(GENERIC["page_digest"](pool, pages)), wanted)


@needs_compiler()
def test_variates_are_those_of_the_contract(emulator: Emulator) -> None:
    """A token tells little of them: only near ties feel the last digits."""
    low = np.concatenate([np.arange(99), 2 ** np.arange(32), np.arange(0, 2**32, 1048573)])
    h = np.concatenate([low, 2**32 - 1 - low]).astype(np.uint32)
    body = "y[thread_position_in_grid.x] = sixfold_variate(x[thread_position_in_grid.x]);"
    source = MetalSource("variates", ("x",), ("y",), body, header=sample.VARIATE)
    call = Launch([mx.array(h)], [], (len(h), 1, 1), 32, [h.shape], [mx.float32])
    (found,) = emulator.launch(source, call)
    exact = np.minimum(-np.log1p(-(h + 0.5) / 2.0**32), LONGEST)
    np.testing.assert_allclose(np.array(found), exact, rtol=5e-7)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_sources_name_no_address_space(source: MetalSource) -> None:
    """MLX's choice depends on the size of the input."""
    assert not re.search(r"\b(device|constant|thread)\b", source.header + source.body)


@pytest.mark.parametrize("op", KERNELS)
def test_mlx_takes_every_launch_as_far_as_it_can_be_tried_here(op: str) -> None:
    """MLX looks at a launch's arguments before it misses the GPU."""
    if mx.metal.is_available():
        pytest.skip("there is a GPU: the comparison at start runs the kernels")
    tried = 0

    def through(source: MetalSource, call: Launch) -> list[mx.array]:
        nonlocal tried
        tried += 1
        with pytest.raises(RuntimeError, match="No Metal back-end"):
            launch(source, call)
        return [mx.zeros(shape, kind) for shape, kind in zip(call.shapes, call.dtypes, strict=True)]

    for case in OPS[op].cases(np.random.default_rng(0)):
        KERNELS[op](through, **arguments(OPS[op], case.args, mx.float32))
    assert tried > 5


# ---- faults are caught


def changed(old: str, new: str, launcher: Launcher) -> Launcher:
    """A launcher of the same sources with a fault in them."""

    def faulty(source: MetalSource, call: Launch) -> list[mx.array]:
        assert old in source.body + source.header, "the fault is nowhere in the source"
        body, header = source.body.replace(old, new), source.header.replace(old, new)
        return launcher(replace(source, body=body, header=header), call)

    return faulty


FAULTS = [
    ("page_gather", "pages[row * columns + column]", "pages[row * columns + column] + 1"),
    ("page_gather", "target * uint(value_words) + i", "target * uint(value_words) + i + 1"),
    ("page_gather", "uint(key_words); i += step", "uint(key_words) - 1; i += step"),
    ("page_digest", "i < count", "i + 1 < count"),
    ("page_digest", "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    ("page_digest", "token * size_t(pool_strides[1])", "head * size_t(pool_strides[1])"),
    ("sample", "x > value ||", "x >= value ||"),
    ("sample", "(bits & 0x7FFFFFFFu) <= 0x7F800000u", "true"),
    ("sample", "2.0f * s * sum", "s * sum"),
    ("sample", "(t % 32)", "(t % 31)"),
    ("paged_attention", "length - window : 0", "length - window - 1 : 0"),
    ("paged_attention", "head / group_size", "head % group_size"),
    ("paged_attention", "total * kept + weight", "total + weight"),
    ("paged_attention", "has_sink ? 1.0f : 0.0f", "0.0f"),
    ("paged_attention", "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
]


@needs_compiler()
@pytest.mark.parametrize(("op", "old", "new"), [of_op(*fault) for fault in FAULTS])
def test_a_faulty_source_is_refused(op: str, old: str, new: str, emulator: Emulator) -> None:
    kernel = partial(KERNELS[op], changed(old, new, emulator.launch))
    reason = refusal(op, kernel, GENERIC[op], mx.float32)
    assert reason is not None
    assert "on this device, case" in reason


@needs_compiler()
def test_a_good_kernel_is_not_refused(emulator: Emulator) -> None:
    for op in ("page_gather", "page_digest", "sample"):
        kernel = partial(KERNELS[op], emulator.launch)
        assert refusal(op, kernel, GENERIC[op], mx.float16) is None


def test_refusals_name_the_case_and_what_is_wrong() -> None:
    def late(**args: Any) -> mx.array:
        return GENERIC["page_digest"](**args) + 1

    def wide(**args: Any) -> mx.array:
        return GENERIC["page_digest"](**args).astype(mx.int32)

    def broken(**args: Any) -> mx.array:
        raise RuntimeError("program_source:12: error: use of undeclared identifier\nand more")

    def said(kernel: Callable[..., Any]) -> str:
        return refusal("page_digest", kernel, GENERIC["page_digest"], mx.float32) or ""

    assert "differs from the generic kernel on this device, case 'one_page_8': 2 of 2" in said(late)
    assert "mlx.core.int32 (1, 2) instead of mlx.core.uint32 (1, 2)" in said(wide)
    assert said(broken).endswith("RuntimeError: program_source:12: error: use of undeclared identifier")  # fmt: skip # noqa: E501


# ---- selection


def chosen(launcher: Launcher, facts: Any, op: str = "page_gather", **named: str) -> Any:
    registry = KernelRegistry()
    register(registry, launcher)
    table = registry.resolve([Problem(op, "float32")], facts, named)
    return table.kernels[op].provider, table.decisions[0]


def test_metal_kernels_need_metal() -> None:
    for op in KERNELS:
        provider, decision = chosen(launch, mlx_facts(), op)
        assert provider == "generic"
        assert decision.rejected == (("metal", NEEDS_METAL),)
    with pytest.raises(KernelError, match="needs Metal"):
        chosen(launch, mlx_facts(), page_gather="metal")


@needs_compiler()
def test_on_metal_a_kernel_that_agrees_is_chosen(emulator: Emulator) -> None:
    assert chosen(emulator.launch, ON_METAL)[0] == "metal"


@needs_compiler()
def test_on_metal_a_kernel_that_differs_is_not(emulator: Emulator) -> None:
    faulty = changed("column]", "column] ^ 1", emulator.launch)
    provider, decision = chosen(faulty, ON_METAL)
    assert provider == "generic"
    assert decision.fallback
    ((name, reason),) = decision.rejected
    assert name == "metal"
    assert "on this device, case 'one_row'" in reason


# ---- a whole model


def served(
    path: Path, prompts: list[list[int]], paged: bool = False
) -> tuple[list[list[int]], ExecutorInfo]:
    named = {"paged_attention": "metal"} if paged else {}
    spec = EngineSpec(str(path), max_rows=8, max_context=128, page_size=4, kernels=named)
    device = MLXExecutor(spec, ON_METAL)
    try:
        info = device.load()
        engine = Engine(device, info, EngineConfig(max_rows=8), frozenset())
        return complete(engine, prompts), info
    finally:
        device.close()


@needs_compiler()
def test_a_model_over_emulated_kernels_gives_the_same_tokens(
    tmp_path: Path, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "llama", "llama")
    prompts = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (5, 11, 3)]
    monkeypatch.setattr(executor, "register", partial(register, launcher=emulator.launch))
    before = emulator.launches
    tokens, info = served(path, prompts, paged=True)
    assert tokens == own_greedy(path, prompts, 12)
    assert emulator.launches - before > 24 + 2 * 11  # a layer's attention in each decode step
    said = {d.what: d for d in info.decisions}
    assert said["kernel page_gather"].chosen == said["kernel sample"].chosen == "metal"
    assert said["Metal kernels"].chosen == "page_gather, paged_attention, sample"
    assert (said["kernel paged_attention"].chosen, said["decode attention"].chosen) == (
        "metal",
        "in pages",
    )
    assert "never run on an Apple GPU" in said["Metal kernels"].because


@pytest.mark.skipif(mx.metal.is_available(), reason="here the kernels run")
def test_a_device_on_which_they_fail_serves_without_them(tmp_path: Path) -> None:
    path = write(tmp_path / "llama", "llama")
    tokens, info = served(path, [[1, 2, 3], [4, 5]])
    assert tokens == own_greedy(path, [[1, 2, 3], [4, 5]], 12)
    said = {d.what: d for d in info.decisions}
    (refused,) = said["kernel page_gather"].rejected
    assert "fails on this device, case 'one_row': RuntimeError: [metal_kernel] No M" in refused[1]
    assert said["Metal kernels"].chosen == "none"
    assert said["kernel paged_attention"].chosen == "generic"
    assert said["decode attention"].chosen in (GATHERED, PRODUCTS)  # as the clock says
