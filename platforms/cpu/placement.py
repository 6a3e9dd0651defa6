"""How many threads compute, and on which CPUs: a pure function of the machine's topology.

One thread per physical core (two hardware threads of a core share its vector units), all on one
NUMA node (weights are read from memory at every step, and another node's is slower to reach).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..interface import Decision
from ..machine_topology import LogicalCpu, Topology

SHARED_WITH_SERVER = 2
"""With so few cores or fewer the front end runs on the same ones, and the system shares them out
better than a fixed place for each thread would."""

SYSTEM = "left to the operating system"


@dataclass(frozen=True, slots=True)
class Placement:
    threads: int
    threads_because: str
    cpus: tuple[int, ...]  # that the threads are held to; empty: the operating system decides
    where: str
    where_because: str

    @property
    def has_one_each(self) -> bool:
        """Thread i computes on cpus[i]; otherwise every thread may use any of `cpus`."""
        return len(self.cpus) == self.threads

    def left_to_system(self, because: str) -> Placement:
        return replace(self, cpus=(), where=SYSTEM, where_because=because)

    def decisions(self) -> tuple[Decision, Decision]:
        return (
            Decision("threads", str(self.threads), self.threads_because),
            Decision("thread placement", self.where, self.where_because),
        )


def place(topology: Topology, wanted: int | None = None) -> Placement:
    """`wanted` is the user's number of threads, honoured whatever it is."""
    cores = topology.first_of_each_core()
    by_size = _nodes(cores)
    largest = len(by_size[0][1]) if by_size else 1
    threads = wanted or min(largest, topology.whole_quota or largest)
    chosen: dict[int, list[LogicalCpu]] = {}
    for node, members in by_size:
        if sum(map(len, chosen.values())) >= threads:
            break
        chosen[node] = members
    nodes = [node for node, _ in by_size]
    because = _user_because(threads, topology, len(cores), largest)
    if wanted is None:
        because = _default_because(threads, topology, nodes, largest)
    left = Placement(threads, because, (), SYSTEM, "")
    own = [cpu.number for node in chosen for cpu in chosen[node]]
    if not topology.known:
        return left.left_to_system("it does not say which CPUs share a core")
    if threads > len(own):
        return left.left_to_system("threads that outnumber the cores take turns on them")
    if len(cores) <= SHARED_WITH_SERVER and len(chosen) == len(nodes):
        count = f"{len(cores)} core{'s' if len(cores) > 1 else ''}"
        return left.left_to_system(f"this process has {count}, which the server needs too")
    if threads == len(own):
        because = "threads of one core would share its vector units"
        return replace(
            left,
            cpus=tuple(own),
            where=f"a core for each thread: CPUs {spelled(own)}",
            where_because=because + ("; one NUMA node" if len(chosen) < len(nodes) else ""),
        )
    if len(chosen) == len(nodes):
        # Fixed places would put a second server's few threads on the very same cores.
        return left.left_to_system("there are more cores than threads, and it knows the idle ones")
    near = [cpu.number for cpu in topology.cpus if cpu.node in chosen]
    names = f"NUMA node{'s' if len(chosen) > 1 else ''} {spelled(chosen)}"
    because = "the weights are kept there; which of its cores are idle, the operating system knows"
    where = f"{names}: CPUs {spelled(near)}"
    return replace(left, cpus=tuple(near), where=where, where_because=because)


def _nodes(cores: Iterable[LogicalCpu]) -> list[tuple[int, list[LogicalCpu]]]:
    """(node, its cores), the largest first."""
    nodes: dict[int, list[LogicalCpu]] = {}
    for cpu in cores:
        nodes.setdefault(cpu.node, []).append(cpu)
    return sorted(nodes.items(), key=lambda item: (-len(item[1]), item[0]))


def _default_because(threads: int, topology: Topology, nodes: list[int], largest: int) -> str:
    if threads < largest:
        return (
            f"the control group's quota of {topology.quota:g} cores; a thread more would be "
            "stopped when it is used up"
        )
    if len(nodes) > 1:
        return (
            f"one per physical core of NUMA node {nodes[0]}; the memory of another of the "
            f"{len(nodes)} nodes is slower to reach"
        )
    return "one per physical core that this process may use"


def _user_because(threads: int, topology: Topology, cores: int, largest: int) -> str:
    because = "set by the user"
    if threads > cores:
        because += f"; oversubscribed: this process may use {cores} physical cores"
    elif threads > largest:
        because += f"; more than one NUMA node's {largest} cores, so another node is used too"
    if topology.whole_quota is not None and threads > topology.whole_quota:
        because += f"; more than the control group's quota of {topology.quota:g} cores"
    return because


def spelled(numbers: Iterable[int]) -> str:
    """As the kernel writes lists: 0-3,8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
