"""Contract: the memory that a vision tower works in is part of the plan for the cache: what a model
says is not less than what its tower takes, not much more, and the cache is smaller by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_qwen3_5, tiny_step3p7
from support.run_engine import one_thread, torch_executor

from sixfold.models.base import Model
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface import ImageInput
from sixfold.platforms.torch_runtime import executor as executor_module
from sixfold.platforms.torch_runtime.image_rows import PATCHES_OF_ONE, tower_memory

WRITERS: dict[str, Callable[[Path], Any]] = {
    "qwen": lambda folder: tiny_qwen3_5.write(folder, "dense"),
    "step": lambda folder: tiny_step3p7.save(tiny_step3p7.build("published"), folder, "published"),
}


def peak(work: Callable[[], Any]) -> int:
    """Most bytes of tensors at once beyond those at the beginning."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        work()
    most = now = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.fixture(scope="module", params=WRITERS)
def folder(request: Any, tmp_path_factory: Any) -> Iterator[Path]:
    """Towers wide enough that activations are more than patches."""
    folder = tmp_path_factory.mktemp("seeing") / request.param
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        for sizes in (tiny_qwen3_5.VISION, tiny_step3p7.VISION):
            patch.setitem(sizes, "hidden_size", 256)
            patch.setitem(sizes, "intermediate_size", 1024)
            patch.setitem(sizes, "mlp_ratio", 4.0)
        WRITERS[request.param](folder)
        yield folder


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.wide)])
def test_a_tower_takes_what_its_model_says(dtype: str, folder: Path) -> None:
    executor = torch_executor(folder, max_context=256, dtype=dtype)
    executor.load()
    assert executor._runner is not None
    model = executor._runner._model
    for side in (8, 24):
        patches = torch.rand(side * side, model.images().patch_values)
        with torch.inference_mode():
            model.image_rows(patches, [(1, side, side)])  # kernels keep something of the first
            found = peak(lambda p=patches, s=side: model.image_rows(p, [(1, s, s)]))
        said = model.image_memory(side * side) - 4 * patches.numel()  # they are there already
        assert found <= said
    assert said < 4 * found  # of many patches: a kernel's copy is little then
    executor.close()


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_the_cache_leaves_it_room(
    fraction: float | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuDevice, "memory", lambda self: (512 << 20, 512 << 20))
    fields = {"max_context": 256, "max_rows": 1024, "memory_fraction": fraction}

    def planned() -> tuple[int, str]:
        executor = torch_executor(folder, cache_tokens=None, **fields)
        info = executor.load()
        (because,) = [d.because for d in info.decisions if d.what == "cache"]
        model = executor._runner._model  # type: ignore[union-attr]
        executor.close()
        return info.cache_bytes, because if tower_memory(model, 256) else ""

    with_it, because = planned()
    assert "GiB for images" in because
    monkeypatch.setattr(executor_module, "tower_memory", lambda model, context: 0)
    without, because = planned()
    assert "images" not in because
    # 4096 patches at most are in 256 tokens of 16 patches, 1024 in those of 4.
    assert without - with_it > 5 << 20


def test_what_may_come_at_once_is_bounded_by_context_and_settings() -> None:
    class Seeing(Model):
        def images(self) -> ImageInput:
            return ImageInput(0, 2, 1)

        def image_memory(self, patches: int) -> int:
            return patches

    assert tower_memory(Seeing(), 100) == 400
    assert tower_memory(Seeing(), 1 << 20) == PATCHES_OF_ONE
    assert tower_memory(Model(), 100) == 0
