"""The CPU as a TorchDevice: host memory, threads, dtypes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch import Tensor

from ..interface import Decision, DeviceFacts, Status, Support
from ..machine_topology import Topology, without_details
from ..torch_runtime.device import TorchDevice
from .host_memory import keep_freed_memory
from .linear_preference import preference
from .native_library import LEVELS, Team, missing, usable_levels
from .native_ops import Issuer
from .placement import place
from .step_recorder import StepRecorder

CACHE_SHARE = 4
"""One part in this many of the memory left beside the weights: other programs live here too."""


def _lacks(features: frozenset[str]) -> str:
    if features:
        return f"needs {', '.join(sorted(features))}"
    return "this CPU has it, but the compiler did not know it or the system refuses it"


def _set_affinity(cpus: Iterable[int]) -> bool:
    """Of the calling thread alone. The kernel takes what a control group allows of a set, so that
    what it made of it must be read back."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:
        return False
    if os.sched_getaffinity(0) == set(cpus):
        return True
    os.sched_setaffinity(0, before)
    return False


class HostEvent:
    """Work on a CPU is done when its call returns, so there is nothing to wait for."""

    def wait(self) -> None:
        return


class CpuDevice(TorchDevice):
    """`threads` None: as many as `place` finds right for the topology; with no topology, one per
    core of the facts, and no thread is held anywhere."""

    feature_support = Support(Status.YES, "tested on CPU")

    def __init__(
        self, facts: DeviceFacts, threads: int | None = None, topology: Topology | None = None
    ) -> None:
        super().__init__(facts, "cpu")
        self._placement = place(topology or without_details(max(1, facts.cores)), threads)
        self._keeps_memory = False
        self._issuer: Issuer | None = None

    @property
    def threads(self) -> int:
        return self._placement.threads

    @property
    def level(self) -> str | None:
        """The best instruction-set level that the library has and this CPU runs."""
        return next(iter(usable_levels(self.facts.features)), None)

    @property
    def issuer(self) -> Issuer | None:
        """The native kernels on this device's threads; None where there is no library."""
        level = self.level
        if self._issuer is None and level is not None:
            self._issuer = Issuer(Team(self.threads, level))
        return self._issuer

    def prepare(self) -> None:
        self._keeps_memory = keep_freed_memory()

    def attach(self) -> None:
        placement = self._placement
        if placement.cpus and not self._hold(placement.cpus):
            self._placement = placement.left_to_system("it refused the CPUs that it had named")
        torch.set_num_threads(self.threads)  # starts threads, so after their mask is settled

    def _hold(self, cpus: tuple[int, ...]) -> bool:
        """Keep the calling thread and those it starts on `cpus`: memory is taken from the node of
        the thread that first writes it, so this comes before loading. torch's OpenMP threads are
        among those started and stay free within `cpus`: held to one each, they would need it again
        whenever OpenMP replaces them, and they only work while the native team waits."""
        before = os.sched_getaffinity(0)
        if not _set_affinity(cpus):
            return False
        if not self._placement.has_one_each or self.issuer is None or self.issuer.team.place(cpus):
            return True
        self._issuer = None  # some of its threads are held already
        os.sched_setaffinity(0, before)
        return False

    def decisions(self) -> tuple[Decision, ...]:
        kept = self._keeps_memory
        return (
            *self._placement.decisions(),
            self._native_decision(),
            preference(self.facts.features).decision,
            Decision(
                "freed memory",
                "kept for reuse" if kept else "left to the C library",
                "mapping a step's buffers anew at every layer costs more than the step"
                if kept
                else "this C library has no mallopt",
            ),
        )

    def _native_decision(self) -> Decision:
        reason = missing()
        if reason is not None:
            return Decision("native kernels", "none", reason, fallback=True)
        usable = usable_levels(self.facts.features)
        rejected = tuple(
            (name, _lacks(needs - self.facts.features))
            for name, needs in LEVELS
            if name not in usable and ("neon" in name) == ("asimd" in self.facts.features)
        )
        return Decision("native kernels", usable[0], "the best level of this CPU", rejected)

    def default_dtype(self, checkpoint_dtype: str) -> tuple[str, str]:
        if "amx_bf16" not in self.facts.features:
            return "float32", "this CPU has no 16-bit matrix units; float32 is its fast dtype"
        if checkpoint_dtype in ("float32", "float16"):
            return "float32", f"the checkpoint is {checkpoint_dtype}; bfloat16 would round it"
        return "bfloat16", "this CPU has bfloat16 matrix units (AMX)"

    def default_kv_dtype(self, dtype: str, quantised: bool) -> tuple[str, str]:
        if quantised and dtype == "float32":
            return "float16", "half the bytes of float32 to read; the weights are rounded far more"
        return dtype, "the dtype of the activations"

    def memory(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def cache_budget(self, free: int, weights: int) -> tuple[int, str]:
        return (free - weights) // CACHE_SHARE, "a quarter of the memory left beside the weights"

    def synchronize(self) -> None:
        """Nothing is ever outstanding: see HostEvent."""

    @property
    def graphs(self) -> StepRecorder | None:
        return None if self.issuer is None else StepRecorder(self.issuer)

    def event(self) -> HostEvent:
        return HostEvent()

    def to_host(self, tensor: Tensor) -> Any:
        return tensor.detach().numpy()

    @property
    def collectives(self) -> str:
        return "gloo"

    @property
    def collectives_advice(self) -> str:
        return "GLOO_SOCKET_IFNAME=lo joins over the loopback interface."
