"""Rotary position embedding: the frequencies of each scaling rule, and cos / sin per token.

Rules: plain (Su et al. 2021), "linear" (position interpolation, Chen et al. 2023), "yarn" (Peng et
al. 2023, section 3), "llama3" (the wavelength rule of Llama 3.1), explicit factors (GGUF).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.checkpoint.fields import Fields
from ..common.checkpoint.gguf_config import FREQUENCY_FACTORS
from ..common.errors import CheckpointError
from ..platforms.interface_kernels import Problem
from .layers import Build, Layer

SUPPORTED = ("default", "linear", "llama3", "yarn")


class Rope(Layer):
    """cos and sin (T, rotary/2) float32 for positions (T,)."""

    inverse: Tensor

    def __init__(self, settings: Fields, head_dim: int, build: Build) -> None:
        super().__init__(build)
        rotary = int(head_dim * settings.number("partial_rotary_factor", 1.0))
        inverse, self.scale = frequencies(settings, rotary)
        self.rotary_dim = rotary
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.ops.rope_angles(positions, self.inverse, self.scale)
        return cos, sin

    def problems(self) -> Iterable[Problem]:
        yield self.build.problem("rope_angles", half=self.rotary_dim // 2)


class MultiAxisRope(Rope):
    """For positions (T,) as Rope; for (3, T), of time, height and width, each frequency turns with
    one of the three (multimodal rotary embedding, Wang et al. 2024, section 2.1; interleaved as in
    Qwen3-VL, 2025). Equal positions on all axes give the angles of Rope."""

    axes: Tensor

    def __init__(self, settings: Fields, head_dim: int, build: Build) -> None:
        super().__init__(settings, head_dim, build)
        self.register_buffer("axes", _axes(settings, self.rotary_dim // 2), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if positions.dim() == 1:
            return super().forward(positions)
        tokens = positions.shape[1]
        chosen = self.axes.expand(1, tokens, -1)
        cos, sin = (
            angles.view(3, tokens, -1).gather(0, chosen)[0]
            for angles in super().forward(positions.reshape(-1))
        )
        return cos, sin


def _axes(settings: Fields, half: int) -> Tensor:
    """(half,) int64: 0 time, 1 height, 2 width. Every third frequency is of height and every third
    of width, up to the number that the sections give them; the others are of time."""
    sections = settings.optional("mrope_section") or (11, 11, 10)
    if len(sections) != 3 or not all(isinstance(size, int) for size in sections):
        raise settings.unsupported("mrope_section", "three integers: time, height, width")
    if not settings.flag("mrope_interleaved", True):
        raise settings.unsupported("mrope_interleaved", "true, as in Qwen3.5")
    axes = torch.zeros(half, dtype=torch.int64, device="cpu")
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def rope_settings(fields: Fields, layer_type: str | None = None) -> Fields:
    """The rope parameters of a layer type, from any of the forms in use: rope_theta and
    rope_scaling at the top level, rope_parameters, or rope_parameters by layer type."""
    values: Any = fields.optional("rope_parameters") or fields.optional("rope_scaling") or {}
    if not isinstance(values, Mapping):
        raise fields.unsupported("rope_parameters", "an object")
    if layer_type is not None and isinstance(values.get(layer_type), Mapping):
        values = values[layer_type]
    merged = {key: value for key, value in values.items() if value is not None}
    merged.setdefault("rope_type", merged.get("type", "default"))
    for name in ("rope_theta", "partial_rotary_factor"):
        if fields.optional(name) is not None:
            merged.setdefault(name, fields.number(name))
    if merged["rope_type"] in ("llama3", "yarn"):
        merged.setdefault(
            "original_max_position_embeddings", fields.positive("max_position_embeddings")
        )
    return Fields(merged, fields.source)


def frequencies(settings: Fields, rotary: int) -> tuple[Tensor, float]:
    """(inverse frequencies (rotary/2,) float32 on the CPU, factor for cos and sin)."""
    exponents = torch.arange(0, rotary, 2, dtype=torch.float32, device="cpu") / rotary
    powers = settings.number("rope_theta") ** exponents
    kind = settings.text("rope_type")
    if kind == "default":
        return 1.0 / powers, 1.0
    if kind == "linear":
        return 1.0 / powers / settings.number("factor"), 1.0
    if kind == "llama3":
        return _llama3(1.0 / powers, settings), 1.0
    if kind == "yarn":
        return _yarn(powers, settings, rotary)
    if kind == FREQUENCY_FACTORS:
        return _explicit(1.0 / powers, settings), 1.0
    raise CheckpointError(
        f"{settings.source}: rope type {kind!r} is not supported; supported: {' '.join(SUPPORTED)}."
    )


def _llama3(inverse: Tensor, settings: Fields) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor = settings.number("factor")
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    original = settings.number("original_max_position_embeddings")
    wavelengths = 2 * math.pi / inverse
    blend = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    blended = (1 - blend) * inverse / factor + blend * inverse
    stretched = torch.where(wavelengths > original / low, inverse / factor, inverse)
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(between, blended, stretched)


def _yarn(powers: Tensor, settings: Fields, rotary: int) -> tuple[Tensor, float]:
    factor = settings.number("factor")
    original = settings.number("original_max_position_embeddings")
    theta = settings.number("rope_theta")

    def dimension(rotations: float) -> float:
        """The dimension that turns this often over the original length (equation 17)."""
        turns = original / (rotations * 2 * math.pi)
        return rotary * math.log(turns) / (2 * math.log(theta))

    low, high = (dimension(settings.number(*end)) for end in (("beta_fast", 32), ("beta_slow", 1)))
    if settings.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    positions = torch.arange(rotary // 2, dtype=torch.float32, device="cpu")
    ramp = ((positions - low) / ((high - low) or 0.001)).clamp(0.0, 1.0)
    inverse = 1.0 / (factor * powers) * ramp + 1.0 / powers * (1 - ramp)
    return inverse, _yarn_scale(settings, factor)


def _yarn_scale(settings: Fields, factor: float) -> float:
    if settings.optional("attention_factor") is not None:
        return settings.number("attention_factor")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.optional("mscale") and settings.optional("mscale_all_dim"):
        return scale(settings.number("mscale")) / scale(settings.number("mscale_all_dim"))
    return scale(1.0)


def _explicit(inverse: Tensor, settings: Fields) -> Tensor:
    factors = torch.tensor(settings.values["factors"], dtype=torch.float32, device="cpu")
    if factors.shape != inverse.shape:
        raise CheckpointError(
            f"{settings.source}: tensor 'rope_freqs.weight' has {len(factors)} factors, "
            f"{len(inverse)} are needed."
        )
    return inverse / factors
