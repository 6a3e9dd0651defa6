"""Contract: matrices stored as small floats with a scale per block are read for what they are: by
their tensors' types and not by the configuration, in DeepSeek-V4's form and in the older one; what
does not fit is refused by name.

Oracle: the same checkpoint with its matrices widened beforehand, by code of this file's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.kernel_checks import generic_table
from support.plain_step import logits
from support.run_model import load_on_cpu
from support.tiny_deepseek_v4 import CONFIG, prompt, tensors, write
from torch import Tensor

from sixfold.common.checkpoint import block_floats
from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.errors import CheckpointError
from sixfold.models.block_weights import BlockWeights
from sixfold.models.loading import build_model, load_weights

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
TABLE = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def to_fp8(x: Tensor, powers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, columns) -> codes, scales of 128 x 128 blocks, and the numbers that they stand for.
    `powers`: scales are e8m0."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % 128, 0, -rows % 128))
    blocks = padded.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-4) / 448
    scale = torch.exp2(torch.log2(scale).ceil()) if powers else scale
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    codes = (x / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale.to(torch.float8_e8m0fnu) if powers else scale, codes.float() * wide


def to_fp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, columns) -> bytes of two codes, e8m0 scales per 32 columns, and their numbers."""
    rows, columns = x.shape
    groups = x.reshape(rows, columns // 32, 32)
    scale = torch.exp2(torch.log2(groups.abs().amax(-1, keepdim=True) / 6).ceil())
    table = torch.tensor(TABLE)
    codes = ((groups / scale).unsqueeze(-1) - table).abs().argmin(-1)
    numbers = (table[codes] * scale).reshape(rows, columns)
    pairs = codes.reshape(rows, columns // 2, 2)
    packed = (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8).view(torch.int8)
    return packed, scale.squeeze(-1).to(torch.float8_e8m0fnu), numbers


def stored(experts: str, powers: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(a checkpoint in small floats, the same in float32)."""
    small, wide = {}, {}
    for name, tensor in tensors().items():
        scales = name.removesuffix("weight") + "scale"
        in_blocks = ("wq_a.", "wq_b.", "wkv.", "wo_a.", "wo_b.", "shared_experts.")
        wide[name] = tensor
        if ".experts." in name and experts == "fp4":
            small[name], small[scales], wide[name] = to_fp4(tensor)
        elif ".experts." in name or (any(n in name for n in in_blocks) and "compr" not in name):
            small[name], small[scales], wide[name] = to_fp8(tensor, powers)
        else:
            small[name] = tensor
    return small, wide


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, generic_table(), dtype)
    load_weights(model, checkpoint, lambda tensor: tensor)
    return model


@pytest.mark.parametrize(
    ("experts", "powers", "stated"),
    [
        ("fp4", True, {"expert_dtype": "fp4"}),
        ("fp4", True, {"expert_dtype": "fp8"}),
        ("fp4", True, {}),
        ("fp8", False, {"expert_dtype": "fp4"}),
    ],
)
def test_it_is_the_model_of_the_widened_matrices(
    tmp_path: Path, experts: str, powers: bool, stated: dict[str, str]
) -> None:
    """The configuration's word for the experts' dtype may be absent or wrong."""
    small, wide = stored(experts, powers)
    config = {**CONFIG, **stated, "quantization_config": QUANTIZATION}
    ours, plain = load(write(tmp_path / "small", small, config)), load(write(tmp_path / "w", wide))
    known = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, known[name], rtol=0, atol=0)
    token_ids = prompt(20)
    torch.testing.assert_close(logits(ours, token_ids), logits(plain, token_ids))


def test_that_they_are_widened_is_said_and_is_a_fallback(tmp_path: Path) -> None:
    config = {**CONFIG, "torch_dtype": "bfloat16", "quantization_config": QUANTIZATION}
    info = load_on_cpu(write(tmp_path, stored("fp4")[0], config))
    (decision,) = (d for d in info.decisions if d.what == "weights")
    assert decision.fallback
    assert "fp8_block" in decision.rejected[0][0]
    assert "mxfp4" in decision.rejected[0][0]


def test_the_even_column_is_in_the_low_nibble(tmp_path: Path) -> None:
    codes = torch.arange(32).remainder(16)
    packed = (codes[0::2] | (codes[1::2] << 4)).to(torch.uint8).view(torch.int8).view(1, 16)
    scales = torch.tensor([[2.0]]).to(torch.float8_e8m0fnu)
    path = write(tmp_path, {"m.weight": packed, "m.scale": scales})
    found = torch.empty(1, 32)
    BlockWeights(path).copy_into("m.weight", found)
    assert found[0].tolist() == [2 * TABLE[code] for code in codes.tolist()]


def test_a_swapped_nibble_would_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def swapped(self: block_floats.Mxfp4Rows) -> Any:
        other = block_floats.Mxfp4Rows((self.codes >> 4) | (self.codes << 4), self.scales)
        return real(other)

    real = block_floats.Mxfp4Rows.values
    monkeypatch.setattr(block_floats.Mxfp4Rows, "values", swapped)
    with pytest.raises(AssertionError):
        test_the_even_column_is_in_the_low_nibble(tmp_path)


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (300, 129), (257, 40)])
@pytest.mark.parametrize("suffix", ["scale", "weight_scale_inv"])
def test_blocks_at_the_edges(tmp_path: Path, shape: tuple[int, int], suffix: str) -> None:
    """Also the older name of scales, and more rows than are read at once."""
    codes, scales, wide = to_fp8(torch.randn(shape), powers=suffix == "scale")
    source = BlockWeights(write(tmp_path, {"m.weight": codes, f"m.{suffix}": scales}))
    found = torch.empty(shape)
    source.copy_into("m.weight", found)
    torch.testing.assert_close(found, wide, rtol=0, atol=0)
    assert (source.names(), source.shape("m.weight")) == (["m.weight"], shape)
    assert source.scheme("m.weight") == "fp8_block"
    np.testing.assert_array_equal(source.quantised("m.weight").values(), wide.numpy())


def test_rows_read_in_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sixfold.models.block_weights._BLOCK_ELEMENTS", 128 * 40)
    test_blocks_at_the_edges(tmp_path / "fp8", (300, 40), "scale")
    packed, scales, wide = to_fp4(torch.randn(300, 64))
    found = torch.empty(300, 64)
    path = write(tmp_path / "fp4", {"m.weight": packed, "m.scale": scales})
    BlockWeights(path).copy_into("m.weight", found)
    torch.testing.assert_close(found, wide, rtol=0, atol=0)


def _fp8(*shape: int) -> Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"m.weight": _fp8(8, 8)}, "m.scale and m.weight_scale_inv"),
        ({"m.weight": _fp8(200, 8), "m.scale": torch.ones(1, 1)}, r"asks for \(2, 1\)"),
        ({"m.weight": _fp8(8, 8), "m.scale": torch.ones(1, 1).half()}, "F8_E8M0 or F32"),
        (
            {"m.weight": torch.zeros(4, 8).char(), "m.scale": torch.zeros(4, 0)},
            "multiples of 32",
        ),
        (
            {"m.weight": torch.zeros(4, 16).char(), "m.scale": torch.ones(4, 1)},
            "F8_E8M0 or U8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, parts: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BlockWeights(write(tmp_path, parts))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_block_size", None),
        ("weight_block_size", [64, 128]),
        ("fmt", "e5m2"),
        ("activation_scheme", "static"),
        ("scale_fmt", "other"),
    ],
)
def test_other_forms_of_fp8_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    config = {**CONFIG, "quantization_config": {**QUANTIZATION, field: value}}
    with pytest.raises(CheckpointError, match=field):
        open_checkpoint(write(tmp_path, {}, config))
