"""Draft heads in the published form, and what they must guess. transformers has no draft head, so a
head is put together here from its published description: norms and products in plain torch, around
transformers' own layer (a model of one layer with the head's weights), the whole text at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support import tiny_deepseek_v4, tiny_experts, tiny_qwen3_5
from torch import Tensor

Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@dataclass(frozen=True)
class Oracle:
    """`hidden`: token ids (T,) -> the main model's hidden states (T, …). `layer`: embedded tokens
    (T, D) and hidden states -> the head's hidden states and its logits (T, V)."""

    path: Path
    embedding: Tensor
    hidden: Callable[[Tensor], Tensor]
    layer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def guesses(self, tokens: list[int], count: int) -> list[int]:
        """What follows `tokens`: the first guess is made of the last hidden state but one and the
        last token, the others of the head's own hidden states and guesses."""
        with torch.inference_mode():
            states, following = self.hidden(torch.tensor(tokens))[:-1], tokens[1:]
            for _ in range(count):
                own, logits = self.layer(self.embedding[following], states)
                states = torch.cat((states, own[-1:]))
                following = [*following, int(logits[-1].argmax())]
        return following[-count:]


def _added(path: Path, head: Mapping[str, Tensor], **config: Any) -> Path:
    """The checkpoint with a head's tensors, and what its configuration says of it."""
    file = path / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("mtp.")}
    save_file({**kept, **{k: v.contiguous() for k, v in head.items()}}, file)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, **config}))
    return path


def _last_output(module: torch.nn.Module) -> list[Tensor]:
    """A list that holds what the module gave last."""
    kept: list[Tensor] = []

    def keep(_module: Any, _given: Any, made: Any) -> None:
        kept[:] = [made[0] if isinstance(made, tuple) else made]

    module.register_forward_hook(keep)
    return kept


def qwen3_5(folder: Path, name: str) -> Oracle:
    path, main = tiny_qwen3_5.write(folder, name)
    one = tiny_qwen3_5.build(name, 5, num_hidden_layers=1, layer_types=["full_attention"])
    text, trunk = one.model.language_model, main.model.language_model
    generator = torch.Generator().manual_seed(6)
    width = tiny_qwen3_5.TEXT["hidden_size"]
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    own = {
        "pre_fc_norm_embedding.weight": 0.3 * normal(width),
        "pre_fc_norm_hidden.weight": 0.3 * normal(width),
        "fc.weight": 0.1 * normal(width, 2 * width),
    }
    layer = {k: v for k, v in text.state_dict().items() if k.startswith(("layers.0.", "norm."))}
    _added(path, {f"mtp.{k}": v for k, v in (own | layer).items()})

    def run(embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        parts = (
            rms(embedded, 1 + own["pre_fc_norm_embedding.weight"]),
            rms(hidden, 1 + own["pre_fc_norm_hidden.weight"]),
        )
        made = text(inputs_embeds=(torch.cat(parts, -1) @ own["fc.weight"].T)[None])
        states = made.last_hidden_state[0]
        return states, main.lm_head(states)

    def hidden(tokens: Tensor) -> Tensor:
        states: Tensor = trunk(input_ids=tokens[None]).last_hidden_state[0]
        return states

    return Oracle(path, trunk.embed_tokens.weight.detach(), hidden, run)


def deepseek_v3(folder: Path) -> Oracle:
    main = tiny_experts.build("deepseek_v3")
    path = tiny_experts.save(main, folder)
    fields = {**tiny_experts.DEEPSEEK_V3, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    tiny_experts.MODELS["one"] = ("DeepseekV3", fields)
    try:
        one = tiny_experts.build("one")
    finally:
        del tiny_experts.MODELS["one"]
    for parameter in one.parameters():  # not the main model's own
        parameter.data = parameter.data.roll(1, 0)
    width, layers = fields["hidden_size"], tiny_experts.DEEPSEEK_V3["num_hidden_layers"]
    generator = torch.Generator().manual_seed(6)
    own = {
        "enorm.weight": 1 + 0.3 * torch.randn(width, generator=generator),
        "hnorm.weight": 1 + 0.3 * torch.randn(width, generator=generator),
        "eh_proj.weight": 0.15 * torch.randn(width, 2 * width, generator=generator),
        "shared_head.norm.weight": one.model.norm.weight,
        "shared_head.head.weight": main.lm_head.weight,
        "embed_tokens.weight": main.model.embed_tokens.weight,
    }
    layer = one.model.layers[0].state_dict()
    head = {f"model.layers.{layers}.{k}": v.detach() for k, v in {**own, **layer}.items()}
    _added(path, {k: v.clone() for k, v in head.items()}, num_nextn_predict_layers=1)
    before = _last_output(one.model.layers[0])

    def run(embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        parts = rms(embedded, own["enorm.weight"]), rms(hidden, own["hnorm.weight"])
        made = one.model(inputs_embeds=(torch.cat(parts, -1) @ own["eh_proj.weight"].T)[None])
        return before[0][0], main.lm_head(made.last_hidden_state[0])

    def hidden(tokens: Tensor) -> Tensor:
        states: Tensor = main.model(input_ids=tokens[None]).last_hidden_state[0]
        return states

    return Oracle(path, main.model.embed_tokens.weight.detach(), hidden, run)


def deepseek_v4(folder: Path) -> Oracle:
    stored = tiny_deepseek_v4.tensors()
    path = tiny_deepseek_v4.write(folder / "main", stored)
    main = tiny_deepseek_v4.oracle(path)
    alone = {k.removeprefix("mtp.0."): v for k, v in stored.items() if k.startswith("mtp.0.")}
    own = {k: alone.pop(f"{k}.weight") for k in ("e_proj", "h_proj", "enorm", "hnorm")}
    ends = ("hc_head", "norm.weight")
    layer = {k if k.startswith(ends) else f"layers.0.{k}": v for k, v in alone.items()}
    shared = {k: stored[k] for k in ("embed.weight", "head.weight")}
    config = {
        **tiny_deepseek_v4.CONFIG,
        "num_hidden_layers": 1,
        "num_hash_layers": 0,
        "compress_ratios": [0, 0],
    }
    one = tiny_deepseek_v4.oracle(tiny_deepseek_v4.write(folder / "one", layer | shared, config))
    begun: list[Tensor] = []
    first = one.model.layers[0]
    first.register_forward_pre_hook(lambda module, given: (begun[0], *given[1:]))
    streams, made = _last_output(main.model.layers[-1]), _last_output(first)

    def run(embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        token = rms(embedded, own["enorm"]) @ own["e_proj"].T
        begun[:] = [(rms(hidden, own["hnorm"]) @ own["h_proj"].T + token.unsqueeze(1))[None]]
        logits = one(inputs_embeds=embedded[None], use_cache=False).logits[0]
        return made[0][0], logits

    def hidden(tokens: Tensor) -> Tensor:
        main(input_ids=tokens[None], use_cache=False)
        return streams[0][0]

    return Oracle(path, stored["embed.weight"], hidden, run)


MAKE: dict[str, Callable[[Path], Oracle]] = {
    "qwen3_5": lambda folder: qwen3_5(folder, "dense"),
    "qwen3_5_moe": lambda folder: qwen3_5(folder, "moe"),
    "deepseek_v3": deepseek_v3,
    "deepseek_v4": deepseek_v4,
}
