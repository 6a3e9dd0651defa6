"""Guards GPT-OSS's experts as checkpoints store them: MXFP4 stacks are handed to the Triton kernel
unconverted, and give the tokens of the same numbers converted at load."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.kernel_checks import cpu_facts
from support.tiny_experts import build, save, write_mxfp4
from support.tiny_torch_model import Driver
from support.triton_checks import InterpretedDevice, triton_facts

from sixfold.common.checkpoint.block_floats import Mxfp4Rows
from sixfold.common.ops.registry import KernelRegistry
from sixfold.models import gpt_oss
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import LAST_TOKEN
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.triton_kernels.register import register_triton

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [27, 18, 28]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = build("gpt_oss"), tmp_path_factory.mktemp("stacks")
    write_mxfp4(save(model, tmp_path_factory.mktemp("plain")), folder, model)
    return folder


def tokens(path: Path, triton: bool) -> tuple[list[list[int]], dict[str, str]]:
    """Only experts by Triton: the other kernels have models of their own."""
    device = InterpretedDevice(triton_facts() if triton else cpu_facts(features=frozenset()))

    def register(registry: KernelRegistry) -> None:
        every = KernelRegistry()
        register_triton(every, device)
        for kernel in every.kernels():
            if triton and kernel.op == "moe_experts":
                registry.add(kernel)

    sizes = {"max_rows": 2, "max_context": 64, "page_size": 4, "cache_tokens": 128}
    executor = TorchExecutor(EngineSpec(str(path), **sizes), device, register)
    info = executor.load()
    driver, made = Driver(info), []
    for batch in (list(enumerate(PROMPTS)), *[[(0, [LAST_TOKEN]), (1, [LAST_TOKEN])]] * 3):
        executor.submit(driver.batch(batch))
        made.append(executor.collect().token_ids[:, 0].tolist())
    executor.close()
    return made, {d.what: d.chosen for d in info.decisions}


def test_stacks_are_kept_as_they_are_stored(path: Path) -> None:
    got, chosen = tokens(path, triton=True)
    want, converted = tokens(path, triton=False)
    assert (chosen["weights"], chosen["kernel moe_experts"]) == ("mxfp4", "triton")
    assert converted["weights"] == "float32"
    assert got == want


@pytest.mark.wide
def test_gate_and_up_in_each_others_place_show(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack has the rows of gate and up in turns; the kernel wants one after the other."""
    want, _ = tokens(path, triton=False)
    rows = Mxfp4Rows.rows

    def without_turns(self: Mxfp4Rows, chosen: slice) -> Mxfp4Rows:
        if chosen.step != 2:
            return rows(self, chosen)
        first, count = chosen.start // 2 * 2, (chosen.stop - chosen.start + 1) // 2
        begin = first + chosen.start % 2 * count
        return rows(self, slice(begin, begin + count))

    monkeypatch.setattr(gpt_oss.Mxfp4Rows, "rows", without_turns)
    assert tokens(path, triton=True)[0] != want
