"""Contract: the whole engine on a real model, as a user of `LLM` sees it. Log-probabilities of a
prompt equal transformers' (through chunks, a batch, and although its prefix is cached), and a seed
gives the same tokens whatever else runs and whatever is cached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.real_oracles import LONG, PROMPTS, SMOLLM2, oracle_for

from sixfold import LLM, SamplingParams
from sixfold.common.checkpoint.source import resolve_model

pytestmark = pytest.mark.slow
TEXTS = [*PROMPTS, LONG[:1500]]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # Chunks of 64 tokens cut the long prompt; one thread, as tests share the machine.
    options = {"dtype": "float32", "threads": 1, "max_rows": 8, "max_step_tokens": 64}
    with LLM(platform="cpu", max_context=1024, cache_tokens=8192, **options) as llm:
        yield llm


def test_prompt_logprobs_equal_transformers(llm: LLM) -> None:
    scoring = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=3, logprobs=2)
    found = llm.generate(TEXTS, scoring, progress=False)
    oracle = oracle_for(resolve_model(""), SMOLLM2)
    worst = 0.0
    for made in found:
        ids = made.prompt_token_ids + made.token_ids
        with torch.inference_mode():
            wanted = oracle(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        assert made.prompt_logprobs is not None
        assert made.logprobs is not None
        assert made.prompt_logprobs[0] is None  # nothing comes before the first token
        scored = [*made.prompt_logprobs[1:], *made.logprobs]
        assert len(scored) == len(ids) - 1
        for position, entry in enumerate(scored):
            assert entry is not None
            assert entry.token_id == ids[position + 1]
            best = wanted[position].topk(len(entry.top_ids))
            for ours, theirs in (
                (entry.logprob, wanted[position, entry.token_id].item()),
                *zip(entry.top_logprobs, best.values.tolist(), strict=True),
            ):
                worst = max(worst, abs(ours - theirs))
    assert worst < 1e-3, worst  # nats; 0.05 is what is promised


def test_a_seed_means_the_same_under_load_and_from_the_cache(llm: LLM) -> None:
    hot = {"temperature": 1.0, "max_tokens": 48, "ignore_eos": True}
    alone = [
        llm.generate(text, SamplingParams(seed=i, **hot), progress=False)[0].token_ids
        for i, text in enumerate(TEXTS)
    ]
    params = [SamplingParams(seed=i, **hot) for i in range(len(TEXTS))]
    again = llm.generate(TEXTS, params, progress=False)
    assert again[-1].cached_tokens > 0
    assert [made.token_ids for made in again] == alone
