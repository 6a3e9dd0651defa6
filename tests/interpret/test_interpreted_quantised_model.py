"""Guards the whole on quantised weights, interpreted: a two-layer Llama rounded on load gives the
greedy tokens of the matrices that it was rounded to, and a packed one those of the generic kernel
that widens the same numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from support.kernel_checks import cpu_facts
from support.tiny_gguf import write_model
from support.tiny_models import Tiny, save
from support.tiny_packed import Form, compressed, gptq, write_packed_model
from support.tiny_torch_model import Driver
from support.triton_checks import InterpretedDevice, triton_facts

from sixfold.common.ops.registry import KernelRegistry
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import LAST_TOKEN
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.rounding import round_int4, round_int8
from sixfold.platforms.triton_kernels.register import register_triton

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [27, 18, 28]]
STEPS = 2
LLAMA = Tiny("Llama", {"num_hidden_layers": 2})


def products(device: InterpretedDevice, registry: KernelRegistry) -> None:
    """Only what reads matrices: the other kernels have a model of their own, and take long here."""
    every = KernelRegistry()
    register_triton(every, device)
    for kernel in every.kernels():
        if kernel.op in ("linear", "embedding"):
            registry.add(kernel)


def greedy(
    path: Path, triton: bool, quantize: str | None = None, kernels: dict[str, str] | None = None
) -> tuple[list[list[int]], dict[str, str]]:
    """Tokens of two rows beside one another, and what was chosen."""
    device = InterpretedDevice(triton_facts() if triton else cpu_facts(features=frozenset()))
    spec = EngineSpec(
        str(path), max_rows=4, max_context=64, page_size=4, cache_tokens=256, quantize=quantize,
        kernels=kernels or {},
    )  # fmt: skip
    executor = TorchExecutor(spec, device, partial(products, device) if triton else None)
    try:
        info = executor.load()
        driver = Driver(info)
        batches = [driver.batch(list(enumerate(PROMPTS)))]
        batches += [driver.batch([(1, [LAST_TOKEN]), (0, [LAST_TOKEN])]) for _ in range(STEPS)]
        results = []
        for batch in batches:
            executor.submit(batch)
            results.append(executor.collect().token_ids[:, 0].tolist())
        return results, {d.what: d.chosen for d in info.decisions}
    finally:
        executor.close()


def as_rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What the numbers of `round_int8` or `round_int4` stand for, (n, k) float32."""
    if bits == 8:
        q, scale = round_int8(weight)
        values = q * scale.float()[..., None]
    else:
        q, scale, minimum = round_int4(weight)
        values = q * scale.float()[..., None] - minimum.float()[..., None]
    return values.flatten(1)[:, : weight.shape[1]].contiguous()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_model_rounded_on_load_is_the_model_of_the_rounded_matrices(
    quantize: str, tmp_path: Path
) -> None:
    path = save(LLAMA.model(), tmp_path)
    got, chosen = greedy(path, True, quantize)
    assert (chosen["kernel linear"], chosen["kernel embedding"]) == ("triton", "triton")
    assert chosen["weights"] == quantize
    stored = load_file(path / "model.safetensors")
    for name, weight in stored.items():
        if weight.dim() == 2:
            eight = any(word in name for word in ("embed", "lm_head", "down_proj"))
            stored[name] = as_rounded(weight.float(), 8 if eight or quantize == "int8" else 4)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    want, _ = greedy(path, False)
    assert got == want


def widen_the_rest(path: Path) -> None:
    """What is not quantised in float32, the dtype of the interpreted step."""
    stored = load_file(path / "model.safetensors")
    for name, tensor in stored.items():
        if tensor.dtype == torch.float16 and name.endswith(".weight"):
            stored[name] = tensor.float()
    save_file(stored, path / "model.safetensors", {"format": "pt"})


PACKED = {
    "int8, by output": compressed(packed=False, bits=8, group_size=-1),
    "gptq, out of order": gptq("gptq", 4, 32, reordered=True),
}


@pytest.mark.parametrize("form", PACKED.values(), ids=PACKED)
def test_a_packed_model_gives_what_the_widened_kernel_gives(form: Form, tmp_path: Path) -> None:
    write_packed_model(tmp_path, LLAMA, form)
    widen_the_rest(tmp_path)
    got, chosen = greedy(tmp_path, True)
    assert chosen["kernel linear"] == "triton"
    assert "int" in chosen["weights"], "kept as it is stored"
    want, widened = greedy(tmp_path, True, kernels={"linear": "widened"})
    assert widened["kernel linear"] == "widened"
    assert got == want


@pytest.mark.parametrize("kind", [Kind.Q4_1])
def test_a_file_of_blocks_is_served_on_its_blocks(kind: Kind, tmp_path: Path) -> None:
    """And gives the tokens of the matrices that they stand for."""
    oracle = LLAMA.model()
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    path = write_model(tmp_path / "m.gguf", "llama", oracle.config, state, kind)
    got, chosen = greedy(path, True)
    assert (chosen["weights"], chosen["kernel linear"]) == (kind.name.lower(), "triton")
    want, other = greedy(path, False)
    assert other["weights"] == "float32"
    assert got == want
