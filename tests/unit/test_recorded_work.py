"""Guards what records device work: the stand-in for a device graph replays on the same memory and
refuses what a graph cannot hold; streams are recorded as torch wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.graph_stand_in import CannotRecord, Recording, address
from support.recorded_machines import load

from sixfold.platforms import select
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.torch_runtime.step_program import NotCaptured
from sixfold.platforms.torch_runtime.stream_graphs import StreamGraphs
from sixfold.platforms.xpu.device import XPUDevice, XPUGraphs


def test_a_recording_runs_on_the_same_memory() -> None:
    x, table = torch.arange(4.0), torch.zeros(3, 4)

    def work() -> torch.Tensor:
        view = x.view(2, 2).t()
        table[1].copy_(x)
        return (view * 2).add_(1).reshape(4)

    recording = Recording(work)
    place = address(recording.result)
    x.copy_(torch.tensor([3.0, 1.0, -2.0, 0.5]))
    assert recording.poison() > 0
    got = recording()
    assert address(got) == place
    assert torch.equal(got, (x.view(2, 2).t() * 2 + 1).reshape(4))
    assert torch.equal(table[1], x)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 0),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: torch.from_numpy(np.ones(3)),
        lambda x: torch.tensor([1, 2]),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.unique(x),
        lambda x: x[[0, 1]],
    ],
)
@torch.inference_mode()
def test_the_stand_in_refuses_what_a_graph_cannot_hold(work: Any) -> None:
    with pytest.raises(CannotRecord):
        Recording(lambda: work(torch.arange(4.0)))


@torch.inference_mode()
def test_the_stand_in_takes_what_a_graph_can_hold() -> None:
    x, rows = torch.arange(4.0), torch.tensor([2, 0])
    recording = Recording(lambda: x[rows] + torch.arange(2) + x.index_select(0, rows))
    x += 1
    assert recording().tolist() == [6.0, 3.0]


# ---- recording a stream, with a library that takes notes


class Library:
    """torch's module of a device, as far as recording a stream goes."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def graph_pool_handle(self) -> str:
        self.notes.append("pool")
        return f"pool {self.notes.count('pool')}"

    def CUDAGraph(self) -> Any:  # noqa: N802 (torch's name)
        return SimpleNamespace(replay=lambda: self.notes.append("replay"))

    @contextmanager
    def graph(self, graph: Any, pool: str, **options: Any) -> Iterator[None]:
        self.notes.append(("begin", pool, options))
        yield
        self.notes.append("end")


def test_a_stream_is_recorded_after_rehearsals_into_one_pool() -> None:
    library = Library()
    graphs = StreamGraphs(torch.device("cpu"), library, "CUDAGraph", capture_error_mode="relaxed")
    result = torch.zeros(2)

    def work() -> torch.Tensor:
        library.notes.append("work")
        return result

    first, second = graphs.record(work), graphs.record(work)
    begin = ("begin", "pool 1", {"capture_error_mode": "relaxed"})
    assert library.notes == [
        *["work", "work", "pool", begin, "work", "end"],
        *["work", "work", begin, "work", "end"],
    ]
    assert first() is result
    assert second() is result
    assert library.notes[-2:] == ["replay", "replay"]


@pytest.mark.parametrize(
    ("name", "kind", "library"),
    [
        ("nvidia_h100", "cuda", torch.cuda),
        ("amd_mi300x", "rocm", torch.cuda),
        ("intel_arc_b580", "xpu", torch.xpu),
    ],
)
def test_gpus_record_streams(name: str, kind: str, library: Any) -> None:
    facts = select.probe_all(load(name)[0])[kind].devices[0]
    made = select.platforms()[kind].executor(EngineSpec("model"), facts)
    graphs = made._device.graphs  # type: ignore[attr-defined]
    made.close()
    assert facts.graphs == "stream"
    assert isinstance(graphs, StreamGraphs)
    assert graphs._library is library
    assert {"graph", "graph_pool_handle", graphs._kind} <= set(dir(library))


def test_an_intel_gpu_without_graphs_says_why() -> None:
    facts = select.probe_all(load("intel_arc_b580")[0])["xpu"].devices[0]
    assert XPUDevice(replace(facts, graphs="none"), "xpu:0").graphs is None

    class Refuses(Library):
        def graph(self, graph: Any, pool: str, **options: Any) -> Any:
            raise RuntimeError("device does not support command graphs")

    graphs = XPUGraphs(torch.device("cpu"), Refuses(), "CUDAGraph")
    with pytest.raises(NotCaptured, match="records no CUDAGraph: device does not support command"):
        graphs.record(lambda: torch.zeros(2))
