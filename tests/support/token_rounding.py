"""What a platform's product of bytes by bytes has to show, whichever library it calls: the frame of
`test_emulated_npu_w8a8` and `test_xpu_w8a8`, and the oracle of whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.run_model import logits
from support.tiny_models import TINY, expected_logits, prompt
from support.tiny_packed import Form, write_packed_model

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.errors import KernelError
from sixfold.common.ops import OPS
from sixfold.common.ops.conformance import Verdict, check_op, round_to
from sixfold.common.ops.quantised_linear import awq_int4, int8_channel
from sixfold.common.ops.registry import KernelRegistry
from sixfold.common.ops.suite import suite_of
from sixfold.common.ops.token_rounded_linear import round_tokens, token_rounded_linear
from sixfold.models.loading import build_model, kernel_problems, load_weights
from sixfold.platforms.interface_kernels import KernelTable, Problem
from sixfold.platforms.torch_runtime.conformance import TorchRunner
from sixfold.platforms.torch_runtime.device import TorchDevice
from sixfold.platforms.torch_runtime.kernels import register_generic

TITLE, N, K = "linear/int8_token", 24, 96
CLOSE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Of results near 1: products of whole numbers are exact, what is rounded is the result."""


@dataclass(frozen=True)
class Product:
    """One platform's product, its device and the platform's own kernels."""

    provider: str
    prepare: Callable[..., Any]
    linear: Callable[..., Any]
    device: TorchDevice
    register: Callable[..., None]
    dtypes: tuple[str, ...]

    def registry(self) -> KernelRegistry:
        registry = KernelRegistry()
        register_generic(registry, self.device)
        self.register(registry, self.device)
        return registry

    def verdict(self) -> Verdict:
        suite = suite_of(self.registry(), self.device.facts, TorchRunner(self.device), "emulated")
        wanted = [s for s in suite.subjects if (s.op, s.provider) == (TITLE, self.provider)]
        (found,) = check_op(OPS[TITLE], wanted)
        return found

    def made(self, dtype: str, form: Any = int8_channel, **change: Any) -> Any:
        """(the rows, their form here) of a matrix of N by K."""
        rows = replace(form(np.random.default_rng(5), N, K), **change)
        problem = Problem("linear", dtype, {"k": K, "n": N}, "int8_token")
        return rows, self.prepare(rows, problem, self.device)


def rounded_logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """transformers' model, with what goes into each linear layer but the head rounded."""
    hooks = [
        module.register_forward_pre_hook(_round_input)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    try:
        return expected_logits(model, token_ids)
    finally:
        for hook in hooks:
            hook.remove()


def _round_input(module: Any, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    (x,) = given
    flat = x.flatten(0, -2).numpy()
    return torch.from_numpy(round_tokens(flat)).view_as(x)


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).norm() / want.norm())


class TokenRounded:
    """Inherited by each platform's tests, which name `product`."""

    product: Product

    def test_it_keeps_the_contract(self) -> None:
        found = self.product.verdict()
        assert (found.status, found.failures) == ("pass", [])
        assert found.passed == 11 * len(self.product.dtypes)

    def test_it_rounds_as_the_reference_does(self) -> None:
        """Far below the tolerance, which admits kernels that round less."""
        for dtype in self.product.dtypes:
            rows, made = self.product.made(dtype)
            rng = np.random.default_rng(7)
            x = round_to(rng.standard_normal((9, K)).astype(np.float32), dtype)
            bias = round_to(rng.standard_normal(N).astype(np.float32), dtype)
            want = token_rounded_linear(x, rows, bias)
            kind = getattr(torch, dtype)
            got = self.product.linear(
                torch.from_numpy(x).to(kind), made, torch.from_numpy(bias).to(kind)
            )
            np.testing.assert_allclose(got.float().numpy(), want, CLOSE[dtype], CLOSE[dtype])

    def test_a_row_is_rounded_alone(self) -> None:
        """What a row gives does not depend on what is beside it: not even on NaN."""
        _, made = self.product.made("float16")
        x = torch.randn(5, K, dtype=torch.float16)
        others = torch.stack([500 * x[1], x[2] * 0, x[3] * torch.inf, x[4] * torch.nan])
        alone = self.product.linear(x[:1], made)
        beside = self.product.linear(torch.cat([x[:1], others]), made)
        assert torch.equal(beside[:1], alone)
        assert not beside[2].any(), "a row of zeros stays zero"
        assert beside[3:].isnan().all(), "what is not a number is not made one"

    def test_strided_activations_and_columns_out_of_order(self) -> None:
        """As a model cuts them from one product, and as a checkpoint may order its columns."""
        order = np.random.default_rng(3).permutation(K).astype(np.int64)
        _, made = self.product.made("float16", order=order)
        whole, bias = torch.randn(5, 2 * K + 8).half(), torch.randn(N).half()
        cut = whole[:, K : 2 * K]
        assert not cut.is_contiguous()
        got = self.product.linear(cut, made, bias)
        assert torch.equal(got, self.product.linear(cut.clone(), made, bias))

    def test_forms_without_one_scale_an_output_are_refused(self) -> None:
        rows = int8_channel(np.random.default_rng(5), N, K)
        with pytest.raises(KernelError, match="this matrix has groups"):
            self.product.made("float16", scale=rows.scale * np.array([1, 2, 1], np.float32))
        with pytest.raises(KernelError, match="has no form for QuantisedRows"):
            self.product.made("float16", awq_int4)

    def table(self, path: Path, dtype: str) -> KernelTable:
        problems = kernel_problems(open_checkpoint(path), dtype, "stored")
        return self.product.registry().resolve(problems, self.product.device.facts, {})

    def test_a_checkpoint_that_asks_is_served_by_it_and_no_other_is(
        self, asking: Form, plain: Form, tmp_path: Path
    ) -> None:
        for form, chosen in ((asking, True), (plain, False)):
            path = tmp_path / str(chosen)
            write_packed_model(path, TINY["qwen2"], form)
            decisions = {d.what: d for d in self.table(path, "float16").decisions}
            linear = decisions["kernel linear"]
            assert (linear.chosen == self.product.provider) == chosen
            assert not linear.fallback
            reason = dict(linear.rejected).get(self.product.provider, "")
            assert chosen or "is for quantised matrices in other schemes" in reason

    def test_a_model_equals_one_of_reference_products(self, asking: Form, tmp_path: Path) -> None:
        """In float16, where transformers in float32 rounds other numbers up."""
        oracle = write_packed_model(tmp_path, TINY["llama_biases"], asking)
        table = self.table(tmp_path, "float16")
        product = replace(table.kernels["linear"], fn=_reference, prepare=lambda weight, _: weight)
        plain = KernelTable({**table.kernels, "linear": product}, ())
        found, want = (model_logits(tmp_path, kernels, "float16") for kernels in (table, plain))
        assert relative(found, want) < 0.008
        assert 0.02 < relative(found, expected_logits(oracle, prompt())) < 0.06


def _reference(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(weight, torch.Tensor):
        return torch.nn.functional.linear(x, weight, bias)
    added = None if bias is None else bias.float().numpy()
    return torch.from_numpy(token_rounded_linear(x.float().numpy(), weight, added)).to(x.dtype)


def model_logits(path: Path, table: KernelTable, dtype: str) -> torch.Tensor:
    """Of the prompt, by our model with matrices as the directory stores them."""
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, table, getattr(torch, dtype), "stored")
    load_weights(model, checkpoint, lambda tensor: tensor)
    return logits(model, prompt())
