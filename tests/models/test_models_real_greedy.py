"""Contract: on real checkpoints, 64 greedy tokens in float32 equal transformers', token for token.

The oracle reads the same file by its own route (`from_pretrained(gguf_file=…)`: its own reader,
dequantiser, name mapping and un-permutation) under a configuration stated here from what the
models' authors published. `pytest --checkpoint PATH` adds files by hand.

Equality is shown by teacher forcing: our 64 tokens are one prompt to the oracle, and at every
position its argmax must be our next token, which by induction is its own greedy continuation. One
prompt goes through the oracle's `generate` too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run_model import greedy, load

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.checkpoint.tokenizer import load_tokenizer

STEPS = 64
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 5, 8, 13,",
    "日本の首都は東京です。フランスの首都は",
]
# Longer than Gemma's window of 512 tokens.
LONG = "The quick brown fox jumps over the lazy dog, and then it rests for a while. " * 40


SMOLLM2 = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)
GEMMA3 = transformers.Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    query_pre_attn_scalar=256,
    sliding_window=512,
    layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
)


def oracle_for(path: Path, config: Any = None) -> Any:
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if config is not None:
        options["config"] = config
    auto = transformers.AutoModelForCausalLM
    if path.is_dir():
        return auto.from_pretrained(path, **options).eval()
    return auto.from_pretrained(path.parent, gguf_file=path.name, **options).eval()


def check(path: Path, oracle: Any, prompts: list[str], generate: bool = False) -> None:
    tokenizer, model = load_tokenizer(open_checkpoint(path)), load(path)
    for text in prompts:
        ids = tokenizer.encode(text)
        ours = greedy(model, ids, STEPS)
        with torch.inference_mode():
            logits = oracle(torch.tensor([ids + ours[:-1]])).logits[0, len(ids) - 1 :]
        assert logits.argmax(-1).tolist() == ours, text
        if generate and text == prompts[0]:
            # None of the oracle's stopping rules: the continuation has exactly 64 tokens.
            oracle.generation_config.eos_token_id = None
            whole = oracle.generate(
                torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False, pad_token_id=0
            )
            assert whole[0, len(ids) :].tolist() == ours


@pytest.mark.slow
def test_smollm2_135m() -> None:
    path = resolve_model("")
    chat = load_tokenizer(open_checkpoint(path)).apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer with the name."}]
    )
    check(path, oracle_for(path, SMOLLM2), [chat, PROMPTS[1], PROMPTS[3]], generate=True)


@pytest.mark.slow
def test_gemma3_270m(gemma3_270m: Path) -> None:
    check(gemma3_270m, oracle_for(gemma3_270m, GEMMA3), [PROMPTS[0], LONG])


@pytest.mark.slow
def test_checkpoints_given_by_hand(request: pytest.FixtureRequest) -> None:
    paths = request.config.getoption("--checkpoint")
    if not paths:
        pytest.skip("no --checkpoint PATH given: the real-model oracle ran on two models only")
    for path in map(Path, paths):
        check(path, oracle_for(path), PROMPTS)
