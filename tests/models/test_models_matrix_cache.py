"""Contract: a second start maps what the first one packed and answers with the same bits; another
scheme or a changed checkpoint is packed anew; where nothing can be kept the model still loads."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
import torch
from support.kernel_checks import cpu_facts, cpu_registry
from support.run_model import logits
from support.tiny_models import TINY, prompt, save
from support.tiny_packed import gptq, write_packed_model

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.models import matrix_cache
from sixfold.models.base import Model
from sixfold.models.loading import build_model, kernel_problems, load_weights, open_cache
from sixfold.models.matrix_cache import FOLDER, MatrixCache, folder_for
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.cpu.native_library import missing
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.torch_runtime.executor import TorchExecutor

pytestmark = pytest.mark.skipif(missing() is not None, reason="no native kernels here")


def start(path: Path, quantize: str) -> tuple[Model, MatrixCache]:
    checkpoint = open_checkpoint(path)
    problems = kernel_problems(checkpoint, "float32", quantize)
    table = cpu_registry().resolve(problems, cpu_facts(), {})
    model = build_model(checkpoint, table, torch.float32, quantize)
    cache = open_cache(model, checkpoint)
    assert cache is not None
    load_weights(model, checkpoint, lambda tensor: tensor, cache=cache)
    return model, cache


@pytest.mark.parametrize(
    ("family", "quantize"),
    [*product(("llama", "qwen2", "gemma3", "qwen3_moe"), ("", "int8", "int4"))],
)
def test_a_second_start_maps_what_the_first_packed(
    family: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(TINY[family].model(), tmp_path)
    first, cache = start(path, quantize)
    assert not cache.found
    assert cache.save() == ""
    # A kernel that packs now would be one whose matrix was not restored.
    monkeypatch.setattr("sixfold.platforms.cpu.packing.PANEL", None)
    second, cache = start(path, quantize)
    assert cache.found
    monkeypatch.undo()
    assert torch.equal(logits(second, prompt()), logits(first, prompt()))


def test_columns_out_of_order_are_kept_too(tmp_path: Path) -> None:
    form = gptq("gptq", 4, 32, reordered=True)
    write_packed_model(tmp_path, TINY["llama"], form)
    first, cache = start(tmp_path, "stored")
    assert cache.save() == ""
    second, cache = start(tmp_path, "stored")
    assert cache.found
    assert torch.equal(logits(second, prompt()), logits(first, prompt()))


def test_other_settings_and_other_weights_are_packed_anew(tmp_path: Path) -> None:
    path = save(TINY["llama"].model(), tmp_path)
    _, cache = start(path, "int8")
    cache.save()
    assert not start(path, "int4")[1].found
    weights = path / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert not start(path, "int8")[1].found


def test_packages_and_folders_that_are_not_ours_keep_nothing_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert folder_for(tmp_path) == tmp_path / FOLDER
    assert folder_for(tmp_path / "model.gguf") == tmp_path / FOLDER
    package = tmp_path / "site-packages" / "demo"
    package.mkdir(parents=True)
    assert folder_for(package / "model.gguf") == tmp_path / "cache" / "sixfold"
    monkeypatch.setattr(matrix_cache.os, "access", lambda path, mode: False)
    assert folder_for(tmp_path) == tmp_path / "cache" / "sixfold"


def test_what_becomes_of_packed_weights_is_decided(tmp_path: Path) -> None:
    path = save(TINY["llama"].model(), tmp_path)

    def decision(**fields: object) -> str | None:
        device = CpuDevice(cpu_facts(), threads=1)
        spec = EngineSpec(str(path), max_context=64, quantize="int8", **fields)  # type: ignore[arg-type]
        executor = TorchExecutor(spec, device, lambda registry: register(registry, device))
        found = {d.what: d.chosen for d in executor.load().decisions}
        executor.close()
        return found.get("packed weights")

    assert decision() is None
    assert not (tmp_path / FOLDER).exists()
    start(path, "int8")[1].save()
    assert decision(weight_cache=True) == "mapped"
    for kept in (tmp_path / FOLDER).iterdir():
        kept.unlink()
    assert decision(weight_cache=True) == "made, and kept"
