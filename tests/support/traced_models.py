"""Models and steps for traces on devices that are not here (`fake_device`)."""

from __future__ import annotations

from typing import Any

from support.fake_device import FakeExecutor
from support.tiny_deepseek_v4 import CONFIG as DEEPSEEK_V4
from support.tiny_experts import DEEPSEEK_V3, GPT_OSS
from support.tiny_models import TINY
from support.tiny_qwen3_5 import EXPERTS
from support.tiny_qwen3_5 import TEXT as QWEN3_5
from support.tiny_step3p7 import PUBLISHED as STEP3P7
from support.tiny_torch_model import Driver

from sixfold.platforms.interface_step import LAST_TOKEN

PLAIN = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3")
OWN = ("qwen3_5_text", "qwen3_5_moe_text", "deepseek_v3", "deepseek_v4", "gpt_oss", "step3p5")
FAMILIES = (*PLAIN, *OWN)
MIXTURES = {"qwen3_moe", *OWN} - {"qwen3_5_text"}
# One layer of each kind that has entries; few Sinkhorn steps make short traces.
FEWER_LAYERS = {"num_hidden_layers": 2, "compress_ratios": [128, 4, 0], "hc_sinkhorn_iters": 2}
SIZES = {"rms_norm_eps": 1e-6, "max_position_embeddings": 256, "tie_word_embeddings": False}
OTHER_HEADS = {**STEP3P7["attention_other_setting"], "head_dim": 64}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**QWEN3_5, "head_dim": 64},
    "qwen3_5_moe_text": {**QWEN3_5, **EXPERTS, "head_dim": 64},
    "deepseek_v3": {**DEEPSEEK_V3, "rope_theta": 1e4},
    "deepseek_v4": {**DEEPSEEK_V4, **FEWER_LAYERS},
    "step3p5": {**STEP3P7, "head_dim": 64, "attention_other_setting": OTHER_HEADS},
    "gpt_oss": {**GPT_OSS, "head_dim": 64, "rope_theta": 1e4, "attention_bias": True},
}


def config(name: str) -> dict[str, Any]:
    """Few layers, one of each kind, with heads that libraries take."""
    if name in OTHERS:
        return {**SIZES, **OTHERS[name], "model_type": name}
    types = ["sliding_attention", "full_attention"]
    kinds = {"layer_types": types, "head_dim": 256} if name == "gemma3" else {"head_dim": 64}
    return {**TINY[name].config().to_dict(), "num_hidden_layers": 2, **kinds}


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
]


def steps(made: FakeExecutor) -> int:
    """Prefill, decode, mixed with every kind of sampling, decode of fewer rows. How many ran."""
    driver = Driver(made.info)
    batches = [
        ([(0, [1, 2, 3]), (1, [4] * 20)], None),
        ([(0, [LAST_TOKEN]), (1, [LAST_TOKEN])], None),
        ([(0, [LAST_TOKEN]), (1, [LAST_TOKEN]), (2, [5, 6, 7])], SAMPLING),
        ([(2, [LAST_TOKEN]), (0, [LAST_TOKEN]), (1, [LAST_TOKEN])], None),
    ]
    for rows, params in batches:
        made.run(driver.batch(rows, params=params))
    return len(batches)
