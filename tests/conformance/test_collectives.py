"""Guards `check_collectives`: two processes over gloo give numpy's sums; a rank that is wrong,
silent, dead or never there is named, and nothing hangs. The fault's group is in `faulty_groups`."""

from __future__ import annotations

import multiprocessing
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial

import faulty_groups as groups
import numpy as np
import pytest
import recorded_machines
import torch.distributed as dist

from sixfold.platforms import select
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface_collectives import CollectivesFound, JoinsDevices
from sixfold.platforms.torch_runtime import collectives_check, members
from sixfold.platforms.torch_runtime.collectives import Collectives
from sixfold.platforms.torch_runtime.collectives_check import (
    LIMIT_S,
    Case,
    Join,
    check,
    difference,
)

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
HANGING_S = 2.0  # the only limit that is ever reached
FEW = 9  # cases of one dtype


@pytest.fixture(scope="module")
def start() -> str:
    """Processes forked from one that has torch are there at once, where a system has such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload([Collectives.__module__, CpuDevice.__module__])
    return "forkserver"


@needs_gloo
def test_two_processes_give_what_numpy_gives() -> None:
    found = check(groups.openers(2, *groups.DTYPES), start="spawn")
    assert found == CollectivesFound("gloo", 2, FEW * len(groups.DTYPES))


@needs_gloo
def test_three_processes(start: str) -> None:
    assert check(groups.openers(3), start=start) == CollectivesFound("gloo", 3, FEW)


@needs_gloo
@pytest.mark.parametrize(
    ("join", "cases", "expected"),
    [
        (groups.Adding, FEW, [r"rank 1: all_reduce of 1001 float32: 1001 of 1001 elements differ"]),
        (
            groups.Lazy,
            FEW,
            [rf"rank {rank}: all_reduce of {n} " for n in (1, 1001, 262144) for rank in (0, 1)],
        ),
        (
            groups.Hanging,
            0,
            [
                r"rank 1: no answer for 3 s in: all_gather of 1 float32; killed",
                r"rank 0: PlatformError: gloo, rank 0 of 2 on cpu: all_gather \(limit 2 s\): .*"
                r"Next: GLOO_SOCKET_IFNAME",
            ],
        ),
        (
            groups.Dying,
            0,
            [
                r"rank 1: its process ended with status 3 in: broadcast of 1 float32",
                r"rank 0: PlatformError: gloo, rank 0 of 2 on cpu: broadcast",
            ],
        ),
    ],
)
def test_a_faulty_rank_is_named(join: Join, cases: int, expected: list[str], start: str) -> None:
    limit_s = HANGING_S if join is groups.Hanging else LIMIT_S
    found = check(groups.openers(2), join, limit_s, start)
    assert found.cases == cases
    matched = [[text for text in found.failures if re.match(e, text)] for e in expected]
    assert all(len(one) == 1 for one in matched), found.failures
    assert len(found.failures) == len(expected)
    if not cases:
        assert re.match(expected[0], found.failures[0])  # what stopped the others stands first


@needs_gloo
def test_a_process_that_does_not_end_is_named(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "ENDING_S", 0.5)
    found = check(groups.openers(2), groups.Lingering, start=start)
    assert "rank 1: did not end within 0.5 s; killed" in found.failures
    assert found.cases == FEW


@needs_gloo
def test_a_device_that_cannot_be_opened_leaves_nobody_waiting(start: str) -> None:
    found = check([*groups.openers(1), groups.no_device], start=start)
    assert "rank 1: PlatformError: no such device" in found.failures
    assert found.cases == 0
    assert [text[:6] for text in found.failures].count("rank 0") == 1


@needs_gloo
def test_a_backend_that_torch_lacks_names_those_it_has(start: str) -> None:
    if dist.is_nccl_available():
        pytest.skip("this torch has NCCL")
    (text,) = check([groups.of_nccl], start=start).failures
    assert re.search(r"nccl: this build of torch lacks it; it has .*gloo.*Install the torch", text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x, ""),
        (lambda x: x[:2], r"shape \(2, 5\) instead of \(3, 5\)"),
        (lambda x: np.where(x == x[2, 4], np.nan, x), "elements differ.*nan instead of"),
        (lambda x: x[[0, 2, 1]], r"the first at \(1, "),
    ],
)
def test_a_gathered_piece_that_differs_is_found(
    spoil: Callable[[np.ndarray], np.ndarray], said: str
) -> None:
    right = collectives_check.expected(Case("all_gather", 5, "float32"), 3)
    found = difference(spoil(right), right)
    assert re.search(said, found) if said else found == ""


def test_every_sum_is_exact_in_the_narrowest_dtype() -> None:
    """Of 42 ranks: as many as the check says."""
    assert np.iinfo(np.int8).max >= collectives_check.LARGEST * 42
    case = Case("all_reduce", 1001, "int8")
    brought = [collectives_check.given(case, rank) for rank in range(42)]
    assert np.abs(brought).max() == collectives_check.LARGEST
    assert len({array.tobytes() for array in brought}) == 42


@pytest.mark.parametrize(
    ("machine", "platform", "device", "backend"),
    [
        ("nvidia_h100", "cuda", "cuda:1", "nccl"),
        ("amd_mi300x", "rocm", "cuda:1", "nccl"),
        ("intel_arc_b580", "xpu", "xpu:1", "xccl"),
    ],
)
def test_a_platform_gives_every_process_its_device(
    machine: str, platform: str, device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its real classes, without its hardware: a process gets its opener pickled."""

    def note(openers: Sequence[partial[object]]) -> CollectivesFound:
        given.extend(pickle.loads(pickle.dumps(openers)))
        return CollectivesFound(backend, len(openers), 1)

    given: list[partial[object]] = []
    monkeypatch.setattr(collectives_check, "check", note)
    found, _ = recorded_machines.load(machine)
    facts = select.probe_all(found)[platform].devices[0]
    joins = select.platforms()[platform]
    assert isinstance(joins, JoinsDevices)
    assert joins.check_collectives([facts, facts]).devices == 2
    second = given[1]()
    assert (str(second.torch_device), second.collectives) == (device, backend)  # type: ignore[attr-defined]
    assert second.collectives_advice  # type: ignore[attr-defined]
