"""Guards whole models on the npu platform over the emulator of torch_npu: through its executor, the
greedy tokens are those of the generic kernels. Evidence of the kind "emulated"."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulated_npu import matmul as emulated_matmul
from support.emulated_npu import module
from support.emulated_npu.platform import PLATFORM, EmulatedDevice, facts
from support.tiny_models import TINY, Tiny, save
from support.tiny_torch_model import Driver

from sixfold.common.errors import KernelError
from sixfold.platforms.interface import EngineSpec, ExecutorInfo
from sixfold.platforms.interface_step import LAST_TOKEN
from sixfold.platforms.npu import quantised
from sixfold.platforms.torch_runtime.executor import TorchExecutor

FAMILIES = ("llama", "qwen2", "qwen3", "mistral_window", "qwen3_moe", "gemma3")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3] * 14, [27, 18, 28]]
STEPS = 4


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """A family's tiny checkpoint; the emulator comes after `transformers`, which would look in it
    for a real device."""

    def made(family: str) -> Path:
        torch.set_num_threads(1)
        path = save(TINY[family].model(), tmp_path)
        config = json.loads((path / "config.json").read_text())
        config["max_position_embeddings"] = 512  # room for more than one page
        (path / "config.json").write_text(json.dumps(config))
        monkeypatch.setitem(sys.modules, "torch_npu", module())
        return path

    return made


def spec(path: Path, **fields: Any) -> EngineSpec:
    usual = {"max_rows": 4, "max_context": 512, "cache_tokens": 2048, "dtype": "float16"}
    return EngineSpec(str(path), **{**usual, **fields})


def greedy(executor: Any) -> tuple[list[list[int]], ExecutorInfo]:
    """A prompt of more than a page in two chunks, the second beside another prompt; then both
    decode."""
    try:
        info = executor.load()
        driver = Driver(info)
        first, second = PROMPTS
        batches = [
            driver.batch([(0, first[:126])], want=[0]),
            driver.batch([(1, second), (0, first[126:])]),
        ]
        batches += [driver.batch([(1, [LAST_TOKEN]), (0, [LAST_TOKEN])]) for _ in range(STEPS)]
        results = []
        for batch in batches:
            executor.submit(batch)
            results.append(executor.collect().token_ids[:, 0].tolist())
        return results[1:], info
    finally:
        executor.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_tokens_of_the_generic_kernels(
    family: str, saved: Callable[[str], Path]
) -> None:
    path = saved(family)
    plain = EmulatedDevice(replace(facts(), libraries={}))
    want, _ = greedy(TorchExecutor(spec(path), plain))
    got, info = greedy(PLATFORM.executor(spec(path), facts()))
    assert got == want
    chosen = {decision.what: decision.chosen for decision in info.decisions}
    assert chosen["page size"] == "128 tokens"
    assert chosen["kernel attention"] == "fused_infer"
    assert chosen["step"] == "captured"
    # Gemma's norm weights are float32, which the library does not take beside float16.
    assert chosen["kernel rms_norm"] == ("generic" if family == "gemma3" else "torch_npu")


def test_int8_on_load_serves_a_head_that_the_op_takes_in_parts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dtype is named. The op's limit is lowered to 100 outputs: this head is of 256. The same
    tokens come out where the op takes it whole. Real sizes: `test_emulated_npu_matmul`."""
    torch.set_num_threads(1)
    path = save(Tiny("Llama", {"tie_word_embeddings": True}).model().bfloat16(), tmp_path)
    monkeypatch.setitem(sys.modules, "torch_npu", module())
    asked = spec(path, quantize="int8", dtype=None, graphs="off")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    for limited in (quantised, emulated_matmul):
        monkeypatch.setattr(limited, "WIDEST", 100)
    got, info = greedy(PLATFORM.executor(asked, facts()))
    chosen = {decision.what: decision.chosen for decision in info.decisions}
    assert (chosen["weights"], chosen["dtype"]) == ("int8", "bfloat16")
    assert chosen["kernel linear"] == chosen["kernel embedding"] == "torch_npu"
    for limited in (quantised, emulated_matmul):
        monkeypatch.setattr(limited, "WIDEST", 65535)
    whole, _ = greedy(PLATFORM.executor(asked, facts()))
    assert got == whole


def test_a_page_size_that_the_user_names_is_refused_with_those_there_are(
    saved: Callable[[str], Path],
) -> None:
    path = saved("llama")
    executor = PLATFORM.executor(spec(path, page_size=16), facts())
    with pytest.raises(KernelError, match="128, 256, 384, 512 tokens, not 16"):
        executor.load()
    executor.close()
    named = {"attention": "sdpa"}
    _, info = greedy(PLATFORM.executor(spec(path, page_size=16, kernels=named), facts()))
    assert info.page_size == 16
