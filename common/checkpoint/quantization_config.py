"""From config.json's "quantization_config" to the scheme that its matrices lie in, or a refusal.

A field that changes what numbers mean and is not understood is refused, never passed over. Which
modules are quantised is read from the files' tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .block_floats import SQUARE
from .packed_schemes import AWQ, GPTQ, Compressed, Described, PackedScheme
from .quantised_rows import GROUP

SUPPORTED = (
    "gptq (4 and 8 bits), awq (4 bits, version gemm), compressed-tensors (int-quantized and "
    "pack-quantized), msModelSlim (W8A8_DYNAMIC), fp8 (e4m3 in blocks of 128 x 128), mxfp4 (stacks "
    "of experts), and directories in float32, float16 or bfloat16; or a GGUF file"
)


DESCRIBED = "model_quant_type"
"""Field that a description of msModelSlim has, in a file of its own or in config.json."""


def packed_scheme(config: Mapping[str, Any], source: Path) -> PackedScheme | None:
    """None when nothing is quantised. Raises CheckpointError naming the field."""
    stated = _stated(config, source)
    if stated is None or has_block_scales(config, source) or has_mxfp4_stacks(config, source):
        return None
    if stated.method not in _METHODS:
        raise CheckpointError(
            f"{source}: field 'quantization_config' ({stated.method}) is not supported; supported: "
            f"{SUPPORTED}."
        )
    return _METHODS[stated.method](stated)


def has_block_scales(config: Mapping[str, Any], source: Path) -> bool:
    """Whether matrices may be small floats with a scale per block (`block_scaled`). Which are, and
    in which form, is told by their tensors. Raises CheckpointError naming the field."""
    stated = _stated(config, source)
    if stated is None or stated.method != "fp8":
        return False
    stated.one_of("fmt", ("e4m3",), "e4m3")
    stated.one_of("scale_fmt", ("ue8m0", "float"), "float")
    stated.one_of("activation_scheme", ("dynamic",), "dynamic")
    stated.one_of("weight_block_size", ([SQUARE, SQUARE],))
    return True


def has_mxfp4_stacks(config: Mapping[str, Any], source: Path) -> bool:
    """Whether experts are MXFP4 stacks, as GPT-OSS's are."""
    stated = _stated(config, source)
    return stated is not None and stated.method == "mxfp4"


def _stated(config: Mapping[str, Any], source: Path) -> _Stated | None:
    stated = config.get("quantization_config") or config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, dict):
        raise CheckpointError(f"{source}: field 'quantization_config' must be an object.")
    unnamed = "modelslim" if DESCRIBED in stated else "unnamed method"
    method = str(stated.get("quant_method") or unnamed).lower()
    return _Stated(stated, source, method)


class _Stated:
    """A quantization_config, or an object in it, read through lists of what is supported."""

    def __init__(
        self, values: Mapping[str, Any], source: Path, method: str, inside: str = ""
    ) -> None:
        self.values = values
        self.source = source
        self.method = method
        self.inside = inside  # "config_groups.group_0."

    def one_of(self, name: str, allowed: Iterable[Any], default: Any = None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        value = value.lower() if isinstance(value, str) else value
        # True would equal 1.
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise self.refusal(name, ", ".join(map(str, allowed)))
        return value

    def absent(self, *names: str) -> None:
        for name in names:
            if self.values.get(name):
                raise self.refusal(name, "none")

    def group_size(self) -> int:
        value = self.values.get("group_size")
        if isinstance(value, int) and (value == -1 or (value >= GROUP and value % GROUP == 0)):
            return value
        raise self.refusal("group_size", f"-1 and multiples of {GROUP}")

    def part(self, name: str) -> _Stated:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.refusal(name, "an object")
        return _Stated(value, self.source, self.method, f"{self.inside}{name}.")

    def refusal(self, name: str, supported: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: field '{self.inside}{name}' of 'quantization_config' ({self.method}) "
            f"has the value {self.values.get(name)!r}, which is not supported; supported: "
            f"{supported}."
        )


def _gptq(stated: _Stated) -> PackedScheme:
    form = "checkpoint_format" if stated.values.get("checkpoint_format") else "format"
    version = stated.one_of(form, ("gptq", "gptq_v2"), "gptq")
    stated.absent("is_marlin_format", "rotation", "adapter")
    stated.one_of("pack_dtype", ("int32",), "int32")
    # Rules per module: "-:pattern" leaves it in floats, others change its bits or groups.
    rules = stated.values.get("dynamic") or {}
    if any(not str(rule).startswith("-") for rule in rules):
        raise stated.refusal("dynamic", "rules that leave modules out (-:)")
    return GPTQ(
        stated.one_of("bits", (4, 8)),
        stated.group_size(),
        0 if version == "gptq_v2" else 1,
        stated.one_of("desc_act", (True, False), False),
    )


def _awq(stated: _Stated) -> PackedScheme:
    form = next((n for n in ("version", "checkpoint_format") if stated.values.get(n)), "format")
    stated.one_of(form, ("gemm",), "gemm")
    stated.one_of("zero_point", (True,), True)
    stated.one_of("bits", (4,))
    stated.absent("rotation", "adapter", "dynamic")
    return AWQ(stated.group_size())


def _compressed(stated: _Stated) -> PackedScheme:
    form = stated.one_of("format", ("int-quantized", "pack-quantized"))
    stated.absent("kv_cache_scheme", "transform_config")
    sparsity = stated.values.get("sparsity_config") or {}
    if sparsity.get("format") not in (None, "dense"):
        raise stated.refusal("sparsity_config", "none")
    listed = stated.part("config_groups")
    groups = [listed.part(name) for name in listed.values]
    schemes = {_of_group(group, form) for group in groups}
    if len(schemes) != 1:
        raise stated.refusal("config_groups", "groups that quantise weights alike")
    return replace(schemes.pop(), by_token=all(map(_rounds_tokens, groups)))


def _of_group(group: _Stated, form: str) -> Compressed:
    group.one_of("format", (form,), form)
    group.absent("output_activations")
    if group.values.get("input_activations"):
        inputs = group.part("input_activations")
        inputs.one_of("type", ("int",), "int")
        inputs.one_of("num_bits", (8,), 8)
        inputs.one_of("dynamic", (True,), False)
    weights = group.part("weights")
    weights.one_of("type", ("int",), "int")
    packed = form == "pack-quantized"
    bits = weights.one_of("num_bits", (4, 8) if packed else (8,))
    strategy = weights.one_of("strategy", ("group", "channel") if packed else _STRATEGIES)
    size = weights.group_size() if strategy == "group" else -1
    symmetric = weights.one_of("symmetric", (True, False), True)
    return Compressed(bits, packed, size, symmetric, strategy == "tensor")


def _described(stated: _Stated) -> PackedScheme:
    """A description lists every tensor with its type, and says of the whole what is quantised
    beside matrices and how they were turned before."""
    stated.absent("kv_quant_type", "kv_cache_type", "fa_quant_type", "reduce_quant_type")
    stated.absent("metadata", "optional", "group_size")
    for name in stated.values:
        if "." in name:
            stated.one_of(name, ("float", "w8a8_dynamic"))
    return Described()


def _rounds_tokens(group: _Stated) -> bool:
    """Whether activations are to be rounded with one scale a token and no zero point. Those that
    are to be rounded in another way are not: more exact, and the model before it was quantised."""
    inputs = group.values.get("input_activations") or {}
    return inputs.get("strategy") == "token" and inputs.get("symmetric", True) is True


_STRATEGIES = ("group", "channel", "tensor")

_METHODS: Mapping[str, Callable[[_Stated], PackedScheme]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "modelslim": _described,
}
