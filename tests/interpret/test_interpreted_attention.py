"""Guards the Triton attention backend in Triton's interpreter: every case of the contract, cut as
the table says and cut small; plans in reserved buffers; the grid; faults that must be caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.attention_checks import run_case
from support.kernel_checks import cpu_device, cpu_facts, cpu_registry
from support.triton_checks import attention_backend, small_cut, triton_facts, with_fault
from torch.utils._python_dispatch import TorchDispatchMode

from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops.attention import flat_slots
from sixfold.common.ops.conformance import round_case
from sixfold.common.ops.suite import group_of, step_of
from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Case, Problem
from sixfold.platforms.torch_runtime.conformance import LAYER, LAYERS, TorchRunner
from sixfold.platforms.torch_runtime.pools import TorchKVPool
from sixfold.platforms.triton_kernels import attention

OP = OPS["attention"]
LONGEST = 1 << 20  # more than any group here has pages for
CASES = {case.name: case for case in OP.cases(np.random.default_rng(7))}


def agrees(case: Case, dtype: str, backend: Any) -> TorchKVPool:
    case = round_case(OP, case, dtype)
    got, pool = run_case(backend, case, dtype)
    tolerance = OP.tolerance[dtype]
    want = OP.reference(**case.args)
    np.testing.assert_allclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)
    return pool


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cut_small_it_equals_the_reference(case: Case) -> None:
    pool = agrees(case, "float32", attention_backend(small_cut()))
    assert bool((pool.data[1 - LAYER] == 7.0).all()), "another layer was touched"
    slots = flat_slots(*(case.args[n] for n in ("page_table", "query_start", "context_lens",
                                                "page_size")))  # fmt: skip
    written = pool.tokens[LAYER].flatten(0, 1)[slots].numpy()
    np.testing.assert_array_equal(written[:, 0], case.args["k"])
    np.testing.assert_array_equal(written[:, 1], case.args["v"])


@pytest.mark.parametrize("case", list(CASES.values())[::2], ids=list(CASES)[::2])
def test_cut_as_the_table_says_it_equals_the_reference(case: Case) -> None:
    agrees(case, "float16", attention_backend())


@pytest.mark.parametrize("name", ["mixed_mqa_128", "decode_page_boundary"])
def test_a_row_alone_gives_what_it_gives_in_the_batch(name: str) -> None:
    args = CASES[name].args
    backend = attention_backend(small_cut())
    together, _ = run_case(backend, CASES[name], "float32")
    for row in range(len(args["context_lens"])):
        where = slice(args["query_start"][row], args["query_start"][row + 1])
        changes = {
            **{part: args[part][where] for part in "qkv"},
            "page_table": args["page_table"][row : row + 1],
            "query_start": np.array([0, where.stop - where.start], np.int32),
            "context_lens": args["context_lens"][row : row + 1],
        }
        alone, _ = run_case(backend, Case(name, {**args, **changes}), "float32")
        np.testing.assert_array_equal(alone, together[where])


# ---- plans in reserved buffers


class World:
    """A backend, its group and a pool filled as a case wants it."""

    def __init__(self, case: Case) -> None:
        self.case, args = case, dict(case.args)
        self.args = args
        window = args["window"]
        _, kv_heads, dim = args["keys"].shape
        self.group = group_of(case)
        self.spec = AttentionSpec(args["q"].shape[1], kv_heads, dim, args["scale"], window)
        self.backend = attention_backend(small_cut())
        ops = [Problem(op, "float32") for op in ("kv_write", "page_copy")]
        table = cpu_registry().resolve(ops, cpu_facts(), {})
        layout = self.backend.layout(self.group, self.spec, LAYERS)
        self.pool = TorchKVPool(self.group, layout, cpu_device(), table)
        TorchRunner(cpu_device()).fill(self.pool, args["keys"], args["values"])

    def plan(self) -> Any:
        return self.backend.plan(step_of(self.case), self.group)

    def run(self, bound: Any, tokens: int = 0) -> torch.Tensor:
        """`tokens`: of the room, those beyond the step's filled with something else."""
        parts = []
        for name in "qkv":
            part = torch.from_numpy(self.args[name])
            beyond = torch.full((max(0, tokens - len(part)), *part.shape[1:]), 3.0)
            parts.append(torch.cat((part, beyond)))
        return self.backend.run(bound, self.pool, LAYER, *parts, self.spec)


@pytest.mark.parametrize(
    ("name", "more"),
    [("mixed", (1, 3)), ("window_chunk", (0, 0)), ("decode_page_1", (2, 2)), ("prefill", (0, 5))],
)
def test_a_reserved_plan_gives_what_an_eager_one_gives(name: str, more: tuple[int, int]) -> None:
    eager, reserved = World(CASES[name]), World(CASES[name])
    want = eager.run(eager.backend.bind(eager.plan()))
    rows, tokens = len(eager.args["context_lens"]) + more[0], len(eager.args["q"]) + more[1]
    room = reserved.backend.reserve(reserved.group, rows, tokens, LONGEST)
    bound = reserved.backend.bind(reserved.plan(), room)
    got = reserved.run(bound, tokens)
    assert torch.equal(got[: len(want)], want)
    assert not bool(got[len(want) :].any()), "padding is not zero"
    size = eager.group.page_size
    same = eager.pool.tokens.flatten(1, 2)[:, size:], reserved.pool.tokens.flatten(1, 2)[:, size:]
    assert torch.equal(*(torch.nan_to_num(pool, nan=-1.0) for pool in same)), "a page was touched"


@pytest.mark.parametrize("stale", [-1, 1 << 20])
def test_a_second_plan_leaves_nothing_of_the_first(stale: int) -> None:
    world = World(CASES["decode_page_boundary"])
    want = World(CASES["decode_page_boundary"])
    bound = world.backend.reserve(world.group, 5, 5, LONGEST)
    addresses = [t.data_ptr() for t in (bound.slots, bound.narrow, bound.pages, bound.partial)]
    bound.buffer.fill_(stale)
    bound.partial.fill_(torch.nan)
    bound.stats.fill_(torch.nan)
    assert world.backend.bind(world.plan(), bound) is bound
    again = [t.data_ptr() for t in (bound.slots, bound.narrow, bound.pages, bound.partial)]
    assert again == addresses
    got = world.run(bound, 5)
    assert torch.equal(got[:3], want.run(want.backend.bind(want.plan())))
    assert not bool(got[3:].any())


def test_a_room_for_as_many_tokens_as_rows_takes_longer_rows_too() -> None:
    eager, reserved = World(CASES["mixed_mqa_128"]), World(CASES["mixed_mqa_128"])
    bound = reserved.backend.reserve(reserved.group, 13, 13, LONGEST)
    assert bound.room.wide == 0
    reserved.backend.bind(reserved.plan(), bound)
    want = eager.run(eager.backend.bind(eager.plan()))
    torch.testing.assert_close(reserved.run(bound, 13)[: len(want)], want, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_a_room_is_refused() -> None:
    world = World(CASES["prefill"])
    with pytest.raises(KernelError, match="21 tokens does not fit a room for 20"):
        world.backend.bind(world.plan(), world.backend.reserve(world.group, 1, 20, LONGEST))
    narrow = replace(world.group, pages=1)
    with pytest.raises(KernelError, match="lists 2 pages, its room has 1"):
        world.backend.bind(world.plan(), world.backend.reserve(narrow, 1, 21, LONGEST))
    mixed = World(CASES["mixed"])
    with pytest.raises(KernelError, match="has 3 narrow items, its room 1"):
        mixed.backend.bind(mixed.plan(), mixed.backend.reserve(mixed.group, 1, 64, LONGEST))


class Allocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view:
            self.made.append(name)
        return func(*args, **(kwargs or {}))


class Recorded:
    """In a kernel's place: keeps grids and addresses."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            fixed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
            self.log.append((grid, fixed[3:], named))

        return launch


def test_a_run_depends_on_the_room_alone_and_makes_only_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs: list[list[Any]] = []
    world = World(CASES["decode_unlike_lengths"])
    bound = world.backend.reserve(world.group, 5, 12, LONGEST)
    for kernel in ("attention_kernel", "merge_kernel"):
        monkeypatch.setattr(attention, kernel, Recorded([]))
    monkeypatch.setattr(attention, "write_pages", lambda *_: None)
    q, k, v = (torch.zeros(12, *world.args[name].shape[1:]) for name in "qkv")
    kept = []  # so that no result takes the place of an earlier one
    for rows in (5, 2):
        logs.append([])
        for kernel in ("attention_kernel", "merge_kernel"):
            monkeypatch.setattr(attention, kernel, Recorded(logs[-1]))
        for name in ("page_table", "context_lens"):
            world.args[name] = world.args[name][:rows]
        world.args["query_start"] = world.args["query_start"][: rows + 1]
        for name in "qkv":
            world.args[name] = world.args[name][:rows]
        world.backend.bind(world.plan(), bound)
        with Allocations() as seen:
            kept.append(world.backend.run(bound, world.pool, LAYER, q, k, v, world.spec))
        assert seen.made == ["empty"]
        place = kept[-1].data_ptr()
        logs[-1] = [
            (grid, ["result" if value == place else value for value in values], options)
            for grid, values, options in logs[-1]
        ]
    assert len(logs[0]) == 3, "narrow, merge, wide"
    assert logs[0] == logs[1]


# ---- refusals and faults


def test_refusals_are_all_told() -> None:
    backend = attention.TritonAttention(cpu_device_of(triton_facts()))
    spec = AttentionSpec(7, 2, 512, 1.0, dtype="float64", kv_dtype="float32")
    facts = triton_facts()
    found = backend.accepts(spec, facts)
    assert found == (
        "7 heads do not divide among 2 kv heads",
        "head sizes up to 256, not 512",
        "serves float32, bfloat16, float16, not float64",
        "keeps keys and values in float64 or int8, not float32",
    )
    assert backend.accepts(AttentionSpec(128, 1, 64, 1.0), facts) == (
        "up to 64 heads of a kv head, not 128",
    )
    old = triton_facts(dtypes=frozenset({"float32"}))
    assert backend.accepts(AttentionSpec(4, 2, 64, 1.0, dtype="bfloat16"), old) == (
        "test GPU does not compute in bfloat16",
    )


def cpu_device_of(facts: Any) -> Any:
    from support.triton_checks import InterpretedDevice

    return InterpretedDevice(facts)


FAULTS = [
    ("key[None, :] <= place[:, None]", "key[None, :] < place[:, None]", "prefill"),
    ("> place[:, None] - WINDOW", ">= place[:, None] - WINDOW", "window_chunk"),
    ("tl.cdiv(end, BLOCK_N) - first", "end // BLOCK_N - first", "decode_one"),
    ("tl.sum(total * kept, axis=0)", "tl.sum(total, axis=0)", "decode_unlike_lengths"),
    ("key // PAGE_SIZE, mask", "(key + 1) // PAGE_SIZE, mask", "prefill_two"),
    ("denominator += tl.exp2(sink - most)", "denominator += 0.0", "sinks"),
    ("kv_ptr += kv_head * 2 *", "kv_ptr += kv_head * 1 *", "decode_one"),
]


@pytest.mark.parametrize(("old", "new", "case"), FAULTS)
def test_a_faulty_source_is_caught(
    old: str, new: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_fault("attention_kernels", old, new, tmp_path)
    for kernel in ("attention_kernel", "merge_kernel"):
        monkeypatch.setattr(attention, kernel, getattr(made, kernel))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        agrees(CASES[case], "float32", attention_backend(small_cut()))
