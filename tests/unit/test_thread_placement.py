"""Guards where compute threads run: how many on which CPUs, from recorded topologies; and that a
process really holds its compute threads there, and no others."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kernel_checks import cpu_facts

from sixfold.platforms.cpu import device as cpu_device
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.native_library import missing
from sixfold.platforms.cpu.placement import SYSTEM, place, spelled
from sixfold.platforms.machine_source import Source
from sixfold.platforms.machine_topology import LogicalCpu, Topology, topology, usable_cpus


def machine(nodes: int, cores: int, smt: int = 1, quota: float = math.inf) -> Topology:
    """`cores` per node. Second hardware threads are numbered after all the first, as usual."""
    total = nodes * cores
    cpus = (
        LogicalCpu(thread * total + core, (str(core // cores), str(core)), core // cores)
        for thread in range(smt)
        for core in range(total)
    )
    return Topology(tuple(cpus), quota)


def write(root: Path, files: dict[str, str]) -> Source:
    for name, text in files.items():
        path = root / "sys/devices/system" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return Source(root, lambda command: "", {})


def of_cpu(number: int, core: int, siblings: str, package: int = 0) -> dict[str, str]:
    folder = f"cpu/cpu{number}/topology"
    texts = {"physical_package_id": package, "core_id": core, "thread_siblings_list": siblings}
    return {f"{folder}/{name}": str(text) for name, text in texts.items()}


# ---- what is read


def test_two_packages_with_hardware_threads_are_read(tmp_path: Path) -> None:
    files = {"cpu/online": "0-7", "node/node0/cpulist": "0-1,4-5", "node/node1/cpulist": "2-3,6-7"}
    for n in range(8):  # core numbers start again in the second package
        files |= of_cpu(n, n % 2, f"{n % 4},{n % 4 + 4}", package=n % 4 // 2)
    seen = topology(write(tmp_path, files), range(8))
    assert seen.known
    assert [cpu.node for cpu in seen.cpus] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [cpu.number for cpu in seen.first_of_each_core()] == [0, 1, 2, 3]


def test_a_mask_of_odd_cpus_and_one_that_went_offline(tmp_path: Path) -> None:
    files = {"cpu/online": "0-4,6-7", "node/node0/cpulist": "0-4,6-7"}
    for n in (0, 1, 2, 3, 4, 6, 7):
        files |= of_cpu(n, n // 2, f"{n // 2 * 2}-{n // 2 * 2 + 1}" if n != 4 else "4")
    seen = topology(write(tmp_path, files), (1, 3, 5, 7))
    assert seen.known
    assert place(seen).cpus == (1, 3, 7)  # one of each core that is left, whichever thread it is


def test_cores_that_are_all_numbered_0_are_told_apart_by_their_siblings(tmp_path: Path) -> None:
    source = write(tmp_path, of_cpu(0, 0, "0") | of_cpu(1, 0, "1"))
    assert len(topology(source, (0, 1)).first_of_each_core()) == 2


def test_without_a_topology_every_cpu_is_a_core_and_none_is_held(tmp_path: Path) -> None:
    seen = topology(Source(tmp_path, lambda command: "", {}), (2, 3, 4, 5))
    placed = place(seen)
    assert (placed.threads, placed.cpus, placed.where) == (4, (), SYSTEM)
    assert "share a core" in placed.where_because
    assert not topology(write(tmp_path, of_cpu(2, 0, "2")), (2, 3, 4, 5)).known  # a part of it


@given(text=st.text(max_size=30) | st.sampled_from(["5-2", "0-999999999", "-1", ",", "٣-٤"]))
def test_nonsense_in_the_lists_never_raises(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("root")
    (root / "sys/devices/system/cpu").mkdir(parents=True)
    (root / "sys/devices/system/node/node0").mkdir(parents=True)
    for name in ("cpu/online", "node/node0/cpulist"):
        (root / "sys/devices/system" / name).write_text(text, errors="replace")
    assert len(topology(Source(root, lambda command: "", {}), range(3)).cpus) in range(1, 4)


# ---- what follows


def test_a_core_for_each_thread_and_the_second_hardware_threads_left_free() -> None:
    for smt in (1, 2):
        placed = place(machine(1, 8, smt))
        assert (placed.threads, placed.cpus) == (8, tuple(range(8)))
        assert placed.has_one_each
        threads, where = placed.decisions()
        assert threads.because == "one per physical core that this process may use"
        assert where.chosen == "a core for each thread: CPUs 0-7"


def test_one_node_of_two() -> None:
    placed = place(machine(2, 16, smt=2))
    assert placed.cpus == tuple(range(16))
    assert "NUMA node 0" in placed.threads_because
    mask = Topology(tuple(c for c in machine(2, 16).cpus if c.number >= 10))
    assert place(mask).cpus == tuple(range(16, 32))  # more cores of the second are allowed


@pytest.mark.parametrize(
    ("quota", "threads"), [(0.5, 1), (1.5, 1), (2.0, 2), (3.99, 3), (8.0, 8), (64.0, 8)]
)
def test_a_quota_is_rounded_down(quota: float, threads: int) -> None:
    placed = place(machine(1, 8, quota=quota))
    assert placed.threads == threads
    assert (f"quota of {quota:g}" in placed.threads_because) == (threads < 8)
    assert bool(placed.cpus) == (threads == 8)  # else others use these CPUs too


def test_fewer_threads_than_a_nodes_cores_share_all_of_it() -> None:
    assert place(machine(1, 8, smt=2), 3).where == SYSTEM
    placed = place(machine(2, 4, smt=2), 3)
    assert (placed.threads, placed.cpus) == (3, (0, 1, 2, 3, 8, 9, 10, 11))
    assert placed.where == "NUMA node 0: CPUs 0-3,8-11"
    assert place(machine(2, 4, quota=2.5)).cpus == (0, 1, 2, 3)


def test_more_threads_than_a_node_has_take_the_next_node_too() -> None:
    placed = place(machine(2, 4), 8)
    assert placed.cpus == tuple(range(8))
    assert "more than one NUMA node's 4 cores" in placed.threads_because
    assert place(machine(3, 4, smt=2), 6).cpus == (*range(8), *range(12, 20))


def test_more_threads_than_cores_are_served_and_named_so() -> None:
    placed = place(machine(2, 4, smt=2), 9)
    assert (placed.threads, placed.where) == (9, SYSTEM)
    assert "oversubscribed" in placed.threads_because
    assert "8 physical cores" in placed.threads_because
    assert "quota of 2 cores" in place(machine(1, 4, quota=2.0), 4).threads_because


def test_few_cores_are_shared_with_the_server_unless_a_node_must_be_chosen() -> None:
    for cores in (1, 2):
        placed = place(machine(1, cores, smt=2))
        assert (placed.threads, placed.where) == (cores, SYSTEM)
        assert "the server needs" in placed.where_because
    assert place(machine(2, 1)).cpus == (0,)
    assert place(Topology(())).threads == 1


@given(
    nodes=st.integers(1, 4),
    cores=st.integers(1, 8),
    smt=st.integers(1, 2),
    quota=st.sampled_from([math.inf, 0.3, 1.5, 5.0]),
    wanted=st.none() | st.integers(1, 80),
    keep=st.sets(st.integers(0, 63), min_size=1),
)
def test_any_machine(
    nodes: int, cores: int, smt: int, quota: float, wanted: int | None, keep: set[int]
) -> None:
    whole = machine(nodes, cores, smt, quota).cpus
    cpus = tuple(c for c in whole if c.number in keep) or whole[:1]
    seen = Topology(cpus, quota)
    placed = place(seen, wanted)
    numbers = {c.number: c for c in cpus}
    assert placed.threads == wanted or wanted is None
    assert set(placed.cpus) <= set(numbers)
    held = {numbers[n].core for n in placed.cpus}
    if placed.cpus:
        assert len(held) >= placed.threads
    if placed.has_one_each:
        assert len(held) == len(placed.cpus) == placed.threads
    if wanted is None:
        assert 1 <= placed.threads <= (seen.whole_quota or len(cpus))
        assert len({numbers[n].node for n in placed.cpus}) <= 1
    assert all(d.chosen and d.because for d in placed.decisions())


@given(st.sets(st.integers(0, 40)))
def test_spelled_lists(numbers: set[int]) -> None:
    parts = [p.split("-") for p in spelled(numbers).split(",") if p]
    assert {n for p in parts for n in range(int(p[0]), int(p[-1]) + 1)} == numbers


# ---- what is done

HOLD = """
import json, os, sys, threading
import torch
from support.kernel_checks import cpu_facts
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.machine import observe
from sixfold.platforms.machine_topology import LogicalCpu, Topology

def tasks():
    return {int(n) for n in os.listdir("/proc/self/task")}

cpus, threads, elsewhere = map(json.loads, sys.argv[1:])
near = [LogicalCpu(n, ("0", str(n))) for n in cpus]
seen = Topology((*near, LogicalCpu(elsewhere, ("1", "0"), 1)))
device = CpuDevice(cpu_facts(features=observe().cpu_features), threads, seen)
said = {}

def compute():
    before = tasks()
    device.attach()
    team = tasks() - before  # and torch's own idle pool
    said["started"] = [sorted(os.sched_getaffinity(t)) for t in team]
    before = tasks()
    torch.ones(1 << 20).add_(1)
    said["openmp"] = [sorted(os.sched_getaffinity(t)) for t in tasks() - before]
    # A run begins on the first CPU, wherever the thread was, and leaves its mask as it is.
    said["homes"] = []
    ops = device.issuer
    for away in cpus if ops is not None else ():
        os.sched_setaffinity(0, {away})
        os.sched_setaffinity(0, cpus)
        ops.team.run(ops._one, 0, 1)
        said["homes"].append(int(open("/proc/thread-self/stat").read().rsplit(")")[1].split()[36]))
    said["worker"] = sorted(os.sched_getaffinity(0))

others = tasks()
thread = threading.Thread(target=compute)
thread.start(); thread.join()
said["others"] = [sorted(os.sched_getaffinity(t)) for t in others]
said["placed"] = {d.what: d.chosen for d in device.decisions()}["thread placement"]
print(json.dumps(said))
"""

pinnable = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(usable_cpus()) < 2,
    reason="needs Linux and two CPUs",
)


def held(cpus: Iterable[int], threads: int | None, elsewhere: int = 4000) -> dict:
    """What became of a process whose first node has `cpus` and whose second has `elsewhere`."""
    arguments = map(json.dumps, (list(cpus), threads, elsewhere))
    command = [sys.executable, "-c", HOLD, *arguments]
    tests = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([tests, *filter(None, sys.path)])
    run = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pinnable
def test_compute_threads_are_held_and_no_others() -> None:
    cpus = usable_cpus()[:2]
    said = held(cpus, None)
    assert said["placed"].startswith("a core for each thread")
    assert said["worker"] == cpus
    assert said["started"].count([cpus[1]]) == (missing() is None)
    assert all(mask in ([cpus[1]], cpus) for mask in said["started"])
    assert all(mask == cpus for mask in said["openmp"])
    assert set(said["homes"]) <= {cpus[0]}
    assert all(mask == usable_cpus() for mask in said["others"])


@pinnable
def test_fewer_threads_than_the_node_has_cores_share_its_cpus() -> None:
    cpus = usable_cpus()[:2]
    said = held(cpus, 1)
    assert said["placed"] == f"NUMA node 0: CPUs {spelled(cpus)}"
    assert said["worker"] == cpus


@pinnable
def test_the_rest_of_the_process_stays_free_of_the_node() -> None:
    cpus = usable_cpus()
    said = held(cpus[:1], None, elsewhere=cpus[1])
    assert said["placed"] == f"a core for each thread: CPUs {cpus[0]}"
    assert said["worker"] == [cpus[0]]
    assert all(mask == [cpus[0]] for mask in (*said["started"], *said["openmp"]))
    assert all(mask == cpus for mask in said["others"])


@pinnable
def test_a_refused_place_is_left_to_the_system_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    before = usable_cpus()
    device = CpuDevice(cpu_facts(), 3, machine(1, 3))
    monkeypatch.setattr(cpu_device, "_set_affinity", lambda cpus: False)
    monkeypatch.setattr(cpu_device.torch, "set_num_threads", lambda threads: None)
    device.attach()
    decisions = {d.what: d for d in device.decisions()}
    assert decisions["thread placement"].chosen == SYSTEM
    assert "refused" in decisions["thread placement"].because
    assert usable_cpus() == before


@pinnable
def test_a_set_that_the_kernel_narrows_is_refused_and_undone() -> None:
    before = usable_cpus()
    assert not cpu_device._set_affinity([before[0], 4000])
    assert usable_cpus() == before
