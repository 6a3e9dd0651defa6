"""Guards images in the torch runtime, on a tiny model that sees: the engine over TorchExecutor
gives what the model gives densely, whatever is cut, recorded, captured or kept, and the tower runs
once per image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.dense_attend import DenseAttend
from support.engine_traffic import EOS, run
from support.graph_stand_in import StandInGraphs
from support.image_mock import MERGE, PAD, Seen, pixels
from support.kernel_checks import cpu_facts
from support.plain_paged import PlainPaged
from support.seeing_model import CONFIG, FAMILY, VALUES, SeeingModel, SeeingSource, dense_greedy

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.sampling import SamplingParams
from sixfold.models import loading
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.cpu.native_library import missing
from sixfold.platforms.interface import EngineSpec, ExecutorInfo, ImageInput, Status
from sixfold.platforms.torch_runtime import image_rows, model_runner
from sixfold.platforms.torch_runtime.executor import TorchExecutor

STEPS = 6
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(loading.FAMILIES, FAMILY, SeeingModel)


class GraphDevice(CpuDevice):
    """Captures as a card does, without native kernels."""

    @property
    def graphs(self) -> Any:
        return StandInGraphs()


def executor(how: str, config: dict[str, Any] = CONFIG, **fields: Any) -> TorchExecutor:
    kind = GraphDevice if how == "captured" else CpuDevice
    device = kind(cpu_facts(), threads=1)

    def kernels(registry: Any) -> None:
        if how == "captured":
            registry.add_attention(PlainPaged(device), priority=5)
        else:
            register(registry, device)

    values = {"dtype": "float32", "max_rows": 4, "page_size": 4, "cache_tokens": 320}
    graphs = "off" if how == "op by op" else None
    spec = EngineSpec("", graphs=graphs, max_context=64, **{**values, **fields})
    return TorchExecutor(spec, device, kernels, lambda _: SeeingSource(config))


def image(seed: int, down: int = 4, across: int = 4) -> Any:
    return pixels(seed, down, across, values=VALUES)


TALKS = (
    Seen.of([1, 2, 3], image(0, 6, 8), [4, 5]),
    Seen.of([9, 8, 7, 6]),
    Seen.of(image(1), [5], image(2, 2, 10)),
    Seen.of([1, 2, 3], image(3, 6, 8), [4, 5]),
    Seen.of([1, 2, 3], image(0, 6, 8), [4, 6]),
)


def served(made: TorchExecutor, budget: int) -> tuple[ExecutorInfo, list[list[int]], list[Any]]:
    info = made.load()
    config = EngineConfig(max_rows=4, max_step_tokens=budget)
    engine = Engine(made, info, config, EOS)
    arrivals = [talk.arrival(3 * i, GREEDY) for i, talk in enumerate(TALKS)]
    heard = run(engine, arrivals, audit=False)
    assert not made._runner._images._kept  # type: ignore[union-attr]
    engine.close()
    return info, [one.tokens for one in heard], [one.cached for one in heard]


@pytest.fixture(scope="module")
def wanted() -> list[list[int]]:
    before = dict(loading.FAMILIES)
    loading.FAMILIES[FAMILY] = SeeingModel
    answers = [dense_greedy(talk, STEPS, DenseAttend) for talk in TALKS]
    loading.FAMILIES.clear()
    loading.FAMILIES.update(before)
    return answers


def test_the_answers_depend_on_what_is_seen(wanted: list[list[int]]) -> None:
    assert wanted[0] != wanted[3]  # the same text around other pixels
    assert len({tuple(answer) for answer in wanted}) > 3


@pytest.mark.parametrize("budget", [4, 9, 64])
@pytest.mark.parametrize("how", ["op by op", "recorded", "captured"])
def test_served_answers_equal_the_dense_model(
    how: str, budget: int, wanted: list[list[int]]
) -> None:
    if how == "recorded" and missing():
        pytest.skip(f"no native kernels: {missing()}")
    info, answers, cached = served(executor(how, max_step_tokens=budget), budget)
    step = {d.what: d for d in info.decisions}["step"].chosen
    assert step == how, info.decisions
    assert answers == wanted
    assert cached == [0, 0, 0, 0, 16]  # all of the first talk's full pages before its last tokens


def test_the_tower_runs_once_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    right = SeeingModel.image_rows

    def counted(self: Any, patches: Any, grids: Any) -> Any:
        ran.extend(grids)
        return right(self, patches, grids)

    monkeypatch.setattr(SeeingModel, "image_rows", counted)
    served(executor("op by op", max_step_tokens=4), 4)
    assert sorted(ran) == sorted([(1, 6, 8), (1, 4, 4), (1, 2, 10), (1, 6, 8)])


def test_images_that_are_many_patches_are_made_apart(
    wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Talk 2 has images of 16 and 20 patches in one step."""
    calls: list[int] = []
    right = SeeingModel.image_rows

    def counted(self: Any, patches: Any, grids: Any) -> Any:
        calls.append(len(grids))
        return right(self, patches, grids)

    monkeypatch.setattr(SeeingModel, "image_rows", counted)
    for most, together in ((36, [1, 2, 1]), (35, [1, 1, 1, 1])):
        monkeypatch.setattr(image_rows, "PATCHES_AT_ONCE", most)
        calls.clear()
        assert served(executor("op by op"), 64)[1] == wanted
        assert calls == together


@pytest.mark.parametrize("fault", ["rows_swapped", "time_alone"])
def test_a_fault_in_the_runtime_is_seen(
    fault: str, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "time_alone":
        right = model_runner.rotary_positions
        flat = lambda batch: right(batch)[0] if right(batch).ndim == 2 else right(batch)  # noqa: E731
        monkeypatch.setattr(model_runner, "rotary_positions", flat)
    else:
        rows = image_rows.ImageEncoder._rows

        def swapped(self: Any, images: Any) -> Any:
            found = rows(self, images)
            return type(found)(found.where, found.rows.flip(0))

        monkeypatch.setattr(image_rows.ImageEncoder, "_rows", swapped)
    assert served(executor("op by op"), 64)[1] != wanted


def test_what_the_model_takes_is_told() -> None:
    made = executor("op by op")
    info = made.load()
    made.close()
    assert info.images == ImageInput(PAD, MERGE, VALUES)
    assert info.features["images"].status is Status.YES


def test_a_text_model_says_that_it_takes_none() -> None:
    made = executor("op by op", {**CONFIG, "model_type": "qwen3"})
    info = made.load()
    made.close()
    assert info.images is None
    assert info.features["images"].status is Status.NO
    assert "text" in info.features["images"].reason


def test_axes_that_agree_are_plain_positions() -> None:
    rotary_positions = model_runner.rotary_positions
    batch: Any = SimpleNamespace(
        rotary=None, query_start=np.array([0, 2, 3]), context_lens=np.array([5, 9])
    )
    assert rotary_positions(batch).tolist() == [5, 6, 9]
    batch.rotary = np.array([[3, 4, 9]] * 3, np.int32)
    assert rotary_positions(batch).tolist() == [3, 4, 9]
    batch.rotary[1, 2] = 8
    assert rotary_positions(batch).shape == (3, 3)
