"""Contract: on real checkpoints, 64 greedy tokens in float32 equal transformers', token for token.

The oracle reads the same file by its own route (`from_pretrained(gguf_file=…)`: its own reader,
dequantiser, name mapping and un-permutation) under a configuration stated in
`support/real_oracles.py` from what the models' authors published. `pytest --checkpoint PATH` adds
files by hand.

Equality is shown by teacher forcing: the oracle's 64 tokens are one prompt to our model, and at
every position our argmax must be its next token, which by induction is our own continuation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.real_oracles import GEMMA3, LONG, PROMPTS, SMOLLM2, continuation, oracle_for
from support.run_model import load, logits

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.checkpoint.source import resolve_model
from sixfold.common.checkpoint.tokenizer import load_tokenizer


def check(path: Path, oracle: Any, prompts: list[str]) -> None:
    tokenizer, model = load_tokenizer(open_checkpoint(path)), load(path)
    for text in prompts:
        ids = tokenizer.encode(text)
        theirs = continuation(oracle, ids)
        ours = logits(model, torch.tensor(ids + theirs[:-1]), last=len(theirs))
        assert ours.argmax(-1).tolist() == theirs, text


@pytest.mark.slow
def test_smollm2_135m() -> None:
    path = resolve_model("")
    chat = load_tokenizer(open_checkpoint(path)).apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer with the name."}]
    )
    check(path, oracle_for(path, SMOLLM2), [chat, PROMPTS[1], PROMPTS[3]])


@pytest.mark.wide
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
