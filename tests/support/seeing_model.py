"""A tiny model that sees: Qwen3's layers with Qwen3.5's vision tower and its three-axis rotary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support.image_mock import PAD, Seen
from support.random_source import RandomSource
from support.reference_kernels import reference_table
from torch import Tensor, nn

from sixfold.common.checkpoint.fields import Fields
from sixfold.common.images.positions import rotary_positions
from sixfold.models.base import Model
from sixfold.models.layers import Build, Layer
from sixfold.models.qwen3 import Qwen3Model
from sixfold.models.qwen3_5_vision import Qwen35Vision
from sixfold.models.rope import MultiAxisRope
from sixfold.models.vision import ImageRows
from sixfold.platforms.interface import ImageInput

FAMILY = "seeing"
MERGE, VALUES = 2, 12
CONFIG: dict[str, Any] = {
    "model_type": FAMILY,
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [3, 3, 2]},
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "patch_size": 2,
        "temporal_patch_size": 1,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": 16,
        "out_hidden_size": 32,
    },
}


class SeeingModel(Qwen3Model):
    def __init__(self, fields: Fields, build: Build) -> None:
        super().__init__(fields, build)
        self.rope = MultiAxisRope(self.args.rope, self.args.head_dim, build)
        self.vision = Qwen35Vision(Fields(fields.values["vision_config"], fields.source), build)

    def images(self) -> ImageInput | None:
        return ImageInput(PAD, self.vision.merge, self.vision.patch_values)

    def image_rows(self, patches: Tensor, grids: Sequence[Any]) -> Tensor:
        return self.vision(patches, grids)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Any, images: ImageRows | None = None
    ) -> Tensor:
        x, residual = self.model.embed_tokens(token_ids), None
        if images is not None:
            x = images.placed(x)
        rotary = self.rope(positions)
        for block in self.model.layers:
            x, residual = block(x, residual, rotary, attend)
        return self.model.norm.add(x, residual)[0]


class SeeingSource(RandomSource):
    """Weights of a size at which every token's answer hangs on all before it."""

    def load(self, model: Model, to_device: Any, progress: Any) -> None:
        generator = torch.Generator().manual_seed(11)
        for module in model.modules():
            for leaf, meta in list(module.named_parameters(recurse=False)):
                value = torch.randn(meta.shape, generator=generator)
                if meta.dim() > 1:
                    value *= 2.0 * meta[0].numel() ** -0.5
                else:
                    value = 0.1 * value + (leaf == "weight")
                setattr(module, leaf, nn.Parameter(to_device(value), requires_grad=False))
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, leaf, to_device(buffer))
        for module in model.modules():
            if isinstance(module, Layer):
                module.prepare()


def dense_greedy(seen: Seen, steps: int, attend: Any) -> list[int]:
    """Whole sequences, no cache, no runtime; `attend(specs)` makes a fresh dense attention. The
    family must be registered."""
    source = SeeingSource(CONFIG)
    model = source.build(reference_table(), torch.float32, "")
    source.load(model, lambda tensor: tensor, None)
    grids = [(image.start, image.grid) for image in seen.images]
    places, shift = rotary_positions(len(seen.prompt), grids, MERGE)
    known = torch.from_numpy(places).long()
    tokens = list(seen.prompt)
    images = _rows(model, seen)
    with torch.inference_mode():
        for _ in range(steps):
            behind = torch.arange(len(seen.prompt), len(tokens)) + shift
            positions = torch.cat([known, behind.expand(3, -1)], dim=1)
            given = {} if images is None else {"images": images}
            hidden = model(
                torch.tensor(tokens), positions, attend(model.attention_specs()), **given
            )
            logits = model.logits(hidden[-1:])
            logits[:, PAD] = -torch.inf
            tokens.append(int(logits.argmax()))
    return tokens[len(seen.prompt) :]


def _rows(model: Any, seen: Seen) -> ImageRows | None:
    if not seen.images:
        return None
    where, rows = [], []
    with torch.inference_mode():
        for image in seen.images:
            patches = torch.frombuffer(bytearray(image.patches), dtype=torch.float32)
            rows.append(model.image_rows(patches.view(-1, VALUES), [image.grid]))
            where.append(torch.arange(image.start, image.start + len(rows[-1])))
    return ImageRows(torch.cat(where), torch.cat(rows))
