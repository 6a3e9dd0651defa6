"""Guards that matrices are widened at every step only where somebody asked for it by name, and that
a packed model then gives what its dequantised weights give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_model import logits
from support.kernel_checks import cpu_device, cpu_facts, cpu_registry
from tiny_models import TINY, expected_logits, prompt
from tiny_packed import gptq, write_packed_model

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.errors import KernelError
from sixfold.common.ops.registry import KernelRegistry
from sixfold.models.loading import build_model, kernel_problems, load_weights
from sixfold.platforms.interface_kernels import KernelTable, Problem
from sixfold.platforms.torch_runtime.kernels import register_generic
from sixfold.platforms.torch_runtime.widened_linear import PROVIDER, prepare, refuse_widening

PLAIN = Problem("linear", "bfloat16", {"k": 64, "n": 64, "bias": 0})
PACKED = Problem("linear", "bfloat16", {"k": 64, "n": 64, "bias": 0}, "awq_int4")


def generic_table(problem: Problem, **named: str) -> KernelTable:
    registry = KernelRegistry()
    register_generic(registry, cpu_device())
    return registry.resolve([problem], cpu_facts(), named)


def test_it_is_never_taken_unless_it_is_named() -> None:
    assert generic_table(PLAIN).kernels["linear"].provider == "generic"
    refuse_widening(generic_table(PLAIN), {})
    table = generic_table(PACKED)
    assert table.decisions[0].fallback
    with pytest.raises(KernelError, match=f"--kernel linear={PROVIDER}"):
        refuse_widening(table, {})
    refuse_widening(generic_table(PACKED, linear=PROVIDER), {"linear": PROVIDER})


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(KernelError, match="no form for str"):
        prepare("a matrix", PACKED, cpu_device())


def test_a_packed_model_gives_what_its_weights_stand_for(tmp_path: Path) -> None:
    oracle = write_packed_model(tmp_path, TINY["llama"], gptq("gptq", 4, 32, spread=2))
    checkpoint = open_checkpoint(tmp_path)
    problems = kernel_problems(checkpoint, "float32", "stored")
    table = cpu_registry().resolve(problems, cpu_facts(), {"linear": PROVIDER})
    model = build_model(checkpoint, table, torch.float32, "stored")
    load_weights(model, checkpoint, lambda tensor: tensor)
    expected = expected_logits(oracle, prompt())
    torch.testing.assert_close(logits(model, prompt()), expected, atol=1e-4, rtol=1e-4)
