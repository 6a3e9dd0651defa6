"""Writes matrices as GPTQ, AWQ and compressed-tensors store them, number by number as the formats
define it, and knows the values that they stand for. Shares no code with what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny_models import Tiny, save

Ints = NDArray[np.int64]
Tensors = dict[str, torch.Tensor]
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output, within eight, that each nibble of a word holds, lowest nibble first."""


@dataclass(frozen=True)
class Numbers:
    """value[o, i] = scale[o, group[i]] * (q[o, i] - zero[o, group[i]])"""

    bits: int
    q: Ints
    zero: Ints
    scale: torch.Tensor  # float16 or bfloat16
    group: Ints

    @property
    def values(self) -> torch.Tensor:
        zero, scale = self.zero[:, self.group], self.scale.double().numpy()[:, self.group]
        return torch.from_numpy((scale * (self.q - zero)).astype(np.float32))


@dataclass(frozen=True)
class Form:
    """A format and its options; `write(numbers)` gives a module's tensors by their last names."""

    config: dict[str, Any]
    write: Callable[[Numbers], Tensors]
    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    reordered: bool = False
    scale_type: torch.dtype = torch.float16
    spread: int | None = None  # how far zeros lie from the middle; None: anywhere

    def draw(self, rng: np.random.Generator, outputs: int, inputs: int) -> Numbers:
        size = inputs if self.group_size == -1 else self.group_size
        groups, top = -(-inputs // size), 1 << self.bits
        group = np.arange(inputs) // size
        zero = rng.integers(0, top, (outputs, groups))
        if self.spread is not None:
            zero = top // 2 + rng.integers(-self.spread, self.spread + 1, zero.shape)
        scale = torch.from_numpy(rng.uniform(0.5, 1.5, (outputs, groups)) * 0.5 / top)
        return Numbers(
            self.bits,
            rng.integers(0, top, (outputs, inputs)),
            np.full_like(zero, top // 2) if self.symmetric else zero,
            scale.to(self.scale_type),
            rng.permutation(group) if self.reordered else group,
        )


def words(numbers: Ints, bits: int) -> torch.Tensor:
    """Along the last axis: number i begins at bit bits * i of a string of 32-bit words."""
    per = 32 // bits
    rows = numbers.reshape(-1, numbers.shape[-1]).tolist()
    packed = []
    for row in rows:
        line = [0] * -(-len(row) // per)
        for i, number in enumerate(row):
            line[i // per] += number << (bits * (i % per))
        packed.append(line)
    unsigned = np.array(packed, np.uint32).reshape(*numbers.shape[:-1], -1)
    return torch.from_numpy(unsigned.view(np.int32))


def gptq(form: str, bits: int = 4, group_size: int = 32, **options: Any) -> Form:
    """`form` "gptq" stores zeros less one; "gptq_v2" as they are."""
    less = 1 if form == "gptq" else 0
    reordered = options.get("reordered", False)

    def write(n: Numbers) -> Tensors:
        return {
            "qweight": words(n.q, bits).T.contiguous(),
            "qzeros": words((n.zero.T - less) % (1 << bits), bits),
            "scales": n.scale.T.contiguous(),
            "g_idx": torch.from_numpy(n.group.astype(np.int32)),
        }

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": reordered,
        "sym": options.get("symmetric", False),
        "checkpoint_format": form,
        "lm_head": False,
    }
    return Form(config, write, bits, group_size, **options)


def awq(group_size: int = 32, **options: Any) -> Form:
    def nibbles(numbers: Ints) -> torch.Tensor:
        eights = numbers.reshape(len(numbers), -1, 8)
        stored = np.stack([eights[..., output] for output in AWQ_NIBBLES], axis=-1)
        return words(stored.reshape(numbers.shape), 4)

    def write(n: Numbers) -> Tensors:
        return {
            "qweight": nibbles(n.q.T),
            "qzeros": nibbles(n.zero.T),
            "scales": n.scale.T.contiguous(),
        }

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    return Form(config, write, 4, group_size, **options)


def compressed(
    packed: bool, bits: int, group_size: int, by_token: bool = True, **options: Any
) -> Form:
    """Signed numbers: q and zero less half of 2 ** bits. `by_token`: bytes ask for activations of
    eight bits too."""
    symmetric = options.setdefault("symmetric", True)

    def write(n: Numbers) -> Tensors:
        half = 1 << (bits - 1)
        if not packed:
            tensors = {"weight": torch.from_numpy((n.q - half).astype(np.int8))}
            zeros = torch.from_numpy((n.zero - half).astype(np.int8))
        else:
            tensors = {
                "weight_packed": words(n.q, bits),
                "weight_shape": torch.tensor(n.q.shape),
            }
            zeros = words(n.zero.T, bits).T.contiguous()
            if options.get("reordered"):
                tensors["weight_g_idx"] = torch.from_numpy(n.group.astype(np.int32))
        if not symmetric:
            tensors["weight_zero_point"] = zeros
        return {**tensors, "weight_scale": n.scale}

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    asked = inputs if by_token and not packed else None
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": asked}
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }
    return Form(config, write, bits, group_size, **options)


def described() -> Form:
    """msModelSlim's W8A8_DYNAMIC: bytes, a scale and an offset of zero per output."""

    def write(n: Numbers) -> Tensors:
        return {
            "weight": torch.from_numpy((n.q - 128).astype(np.int8)),
            "weight_scale": n.scale.float(),
            "weight_offset": torch.zeros_like(n.scale).float(),
        }

    return Form({"model_quant_type": "W8A8_DYNAMIC"}, write, 8, -1, symmetric=True)


def describe(path: Path) -> None:
    """Moves the configuration of a directory that `write_packed_model` wrote into a description of
    every tensor."""
    config = json.loads((path / "config.json").read_text())
    listed = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        module = name.rpartition(".")[0]
        listed[name] = "W8A8_DYNAMIC" if f"{module}.weight_scale" in tensors else "FLOAT"
    (path / "model.safetensors").rename(path / "quant_model_weights.safetensors")
    (path / "quant_model_description.json").write_text(json.dumps(listed))


def write_packed_model(path: Path, tiny: Tiny, form: Form, seed: int = 0) -> Any:
    """A directory of `tiny` in float16 with its layers' matrices in `form`; returns transformers'
    model, in float32, of the values that the directory stands for."""
    model = tiny.model(seed)
    save(model.half(), path)
    rng = np.random.default_rng(seed)
    stored = load_file(path / "model.safetensors")
    values = {name: tensor.float() for name, tensor in stored.items()}
    for name, tensor in list(stored.items()):
        if ".layers." in name and tensor.dim() == 2 and "mlp.gate.weight" not in name:
            numbers = form.draw(rng, *tensor.shape)
            module = name.removesuffix(".weight")
            del stored[name]
            values[name] = numbers.values
            stored |= {f"{module}.{last}": part for last, part in form.write(numbers).items()}
    save_file(values, path / "model.safetensors", {"format": "pt"})
    kind = type(model)
    oracle = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": form.config}))
    return oracle
