"""Contract: over the engine's pages and slots, unmodified mlx-lm models give mlx-lm's own greedy
tokens: alone, among others of other lengths, in chunks, and after a cached prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.run_mlx import GREEDY, complete, finish, running
from support.tiny_mlx import CONFIGS, HYBRID, VOCAB, own_greedy, write

from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams

LENGTHS = (1, 3, 9, 21, 34)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlx")


def model(folder: Path, name: str) -> Path:
    path = folder / name
    return path if path.exists() else write(path, name)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_depend_on_early_tokens(folder: Path, name: str) -> None:
    """Of models that go on from their last token alone, the tests below would show nothing."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, 20).tolist() for _ in range(4)]
    for place in (0, 10):
        others = [[*t[:place], (t[place] + 7) % VOCAB, *t[place + 1 :]] for t in texts]
        found = own_greedy(model(folder, name), texts + others, 8)
        assert sum(a != b for a, b in zip(found[:4], found[4:], strict=True)) >= 1
        assert max(len(set(tokens)) for tokens in found) > 2


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_mlx_lms_alone_and_batched(folder: Path, name: str) -> None:
    path, asked = model(folder, name), prompts()
    expected = own_greedy(path, asked, GREEDY.max_tokens or 0)
    with running(path, max_step_tokens=16) as (engine, _):
        assert complete(engine, asked) == expected
    with running(path, page_size=16) as (engine, _):
        assert [complete(engine, [prompt])[0] for prompt in asked] == expected


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5", "granitemoehybrid"])
@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_page_sizes_and_repeats(folder: Path, name: str, page_size: int) -> None:
    path, asked = model(folder, name), prompts()
    expected = own_greedy(path, asked, GREEDY.max_tokens or 0)
    with running(path, page_size=page_size) as (engine, _):
        assert complete(engine, asked) == expected
        assert complete(engine, asked[::-1]) == expected[::-1]


@pytest.mark.parametrize("name", ["llama", *HYBRID])
def test_a_repeat_computes_a_page_at_most_and_is_bit_equal(folder: Path, name: str) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=5, ignore_eos=True)
    prompt = np.random.default_rng(5).integers(0, VOCAB, 50).tolist()
    # Of mlx-lm's own form of attention: in parts a product's rows are tokens of several heads, and
    # a library may add up the last of few rows in another order than those of many.
    own = {"attention": "mlx-lm"}
    with running(model(folder, name), page_size=16, kernels=own) as (engine, _):
        found = []
        for _ in range(2):
            engine.add(AddRequest(request_id="a", prompt_ids=prompt, params=params))
            outputs = finish(engine)["a"]
            found.append([entry for output in outputs for entry in output.logprobs or []])
        assert outputs[0].cached_tokens == 48
        assert found[0] == found[1]
