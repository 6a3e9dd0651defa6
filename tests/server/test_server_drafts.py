"""Contract: `--draft` changes nothing that a client sees: texts, stop strings inside a run of right
guesses, log-probabilities, streams, usage. Metrics count guesses, and the decisions that
`--explain` prints say who makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import Launcher
from support.tiny_deepseek_v4 import CONFIG, tensors, write
from support.tiny_models import Tiny, save
from toy_checkpoint import VOCABULARY, write_toy_checkpoint

from sixfold import LLM, SamplingParams
from sixfold.server.explain import render

SIZES: dict[str, Any] = {"max_context": 256, "cache_tokens": 2048, "page_size": 16, "threads": 1}
PROMPTS = ("over and over and over", "The sea is made of water", "1 2 3 4 1 2 3 4 1 2")
TOKENS = 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = write_toy_checkpoint(tmp_path_factory.mktemp("models") / "tiny-v4")
    (path / "tokenizer_config.json").write_text("{}")  # and so no chat template of its own
    config = {**CONFIG, "vocab_size": VOCABULARY}
    return write(path, tensors(config), config)


def flags(draft: str) -> list[str]:
    sizes = [part for k, v in SIZES.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return ["--platform", "cpu", "--draft", f"{draft}:4", *sizes]


def test_a_client_sees_no_difference(
    launcher: Launcher, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without a head in the model, which is a Llama."""
    path: Path = write_toy_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")
    tiny = Tiny("Llama", {"vocab_size": VOCABULARY, "max_position_embeddings": 256})
    save(tiny.model(), path)
    drafting = launcher.start(path, *flags("ngram"))
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
    with LLM(str(path), platform="cpu", **SIZES) as plain:
        answers = plain.generate(PROMPTS, params, progress=False)
    body: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    more = {"model": "tiny-llama", "extra_body": {"ignore_eos": True}}
    with drafting.openai() as client:
        for prompt, want in zip(PROMPTS, answers, strict=True):
            found = client.completions.create(prompt=prompt, **body, **more)
            assert found.choices[0].text == want.text
            assert found.usage.completion_tokens == TOKENS
            expected = [entry.logprob for entry in want.logprobs or ()]
            assert found.choices[0].logprobs.token_logprobs == pytest.approx(expected, abs=1e-3)
            parts = client.completions.create(prompt=prompt, stream=True, **body, **more)
            assert "".join(part.choices[0].text for part in parts) == want.text
            for at in (9, 14, 23):
                stop = want.text[at : at + 3]
                cut = client.completions.create(prompt=prompt, stop=[stop], **body, **more)
                assert cut.choices[0].text == want.text.partition(stop)[0]
                assert cut.choices[0].finish_reason == "stop"
                assert cut.usage.completion_tokens <= TOKENS
    assert drafting.metric("draft_tokens_total") > 10
    accepted = drafting.metric("accepted_draft_tokens_total")
    assert 0 < accepted < drafting.metric("draft_tokens_total")


def test_offline_with_the_models_own_head(checkpoint: Path) -> None:
    params = [
        SamplingParams(temperature=0.8, seed=seed, max_tokens=TOKENS, ignore_eos=True)
        for seed in range(len(PROMPTS))
    ]
    with LLM(str(checkpoint), platform="cpu", **SIZES) as llm:
        want = llm.generate(PROMPTS, params, progress=False)
    with LLM(str(checkpoint), platform="cpu", draft="mtp", draft_tokens=2, **SIZES) as llm:
        found = llm.generate(PROMPTS, params, progress=False)
        said = {decision.what: decision for decision in llm.decisions}
    assert [one.text for one in found] == [one.text for one in want]
    assert said["drafts"].chosen == "mtp, up to 2 of a row in a step"
    assert "of weights" in said["draft head"].because
    assert said["overlap"].chosen == "off"
    assert "draft head: loaded" in render(llm.decisions)
