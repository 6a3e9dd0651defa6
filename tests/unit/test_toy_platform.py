"""Guards the claim that the contracts suffice for a platform: the toy, its length, its imports, and
that its answers depend on the pages alone (an injected fault in a page is seen)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_platform
from toy_checkpoint import ASSISTANT, END, VOCABULARY, toy_environment, write_toy_checkpoint
from toy_sampling import draw, log_softmax, sample

from sixfold.common.errors import ConfigError
from sixfold.common.ops.sample import sample as reference_sample
from sixfold.platforms.interface import EngineSpec, Platform
from sixfold.platforms.interface_step import (
    LAST_TOKEN,
    PageCopy,
    SamplingArrays,
    StepBatch,
    StepResult,
    Want,
)

FILE = Path(toy_platform.__file__)


def i32(values: object) -> np.ndarray:
    return np.array(values, np.int32)


def sampling(rows: int, **given: object) -> SamplingArrays:
    """Greedy rows without penalties, but for the fields given."""
    zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    nothing, starts = i32([]), np.zeros(rows + 1, np.int32)
    fields: dict[str, object] = {
        "temperature": zeros,
        "top_k": i32([0] * rows),
        "top_p": ones,
        "min_p": zeros,
        "repetition_penalty": ones,
        "presence_penalty": zeros,
        "frequency_penalty": zeros,
        "uniform": np.zeros(rows, np.float64),
        "logprobs": i32([-1] * rows),
        "bias_start": starts,
        "bias_ids": nothing,
        "bias_values": np.array([], np.float32),
        "prompt_start": starts,
        "prompt_ids": nothing,
        "output_start": starts,
        "output_ids": nothing,
    }
    return SamplingArrays(**{**fields, **given})  # type: ignore[arg-type]


def step(
    rows: list[tuple[int, list[int], int, list[int]]], want: int = Want.SAMPLE, **given: object
) -> StepBatch:
    """Rows of (handle, new tokens, context length, pages)."""
    widest = max(len(pages) for *_, pages in rows)
    fields: dict[str, object] = {
        "step": 0,
        "row_ids": i32([handle for handle, *_ in rows]),
        "token_ids": i32([t for _, tokens, *_ in rows for t in tokens]),
        "query_start": i32(np.cumsum([0] + [len(tokens) for _, tokens, *_ in rows])),
        "context_lens": i32([context for _, _, context, _ in rows]),
        "page_tables": {"full": i32([p + [0] * (widest - len(p)) for *_, p in rows])},
        "want": np.full(len(rows), want, np.uint8),
        "sampling": sampling(len(rows)),
    }
    return StepBatch(**{**fields, **given})  # type: ignore[arg-type]


@pytest.fixture
def executor(tmp_path: Path) -> toy_platform.ToyExecutor:
    return loaded(write_toy_checkpoint(tmp_path / "toy"))


def loaded(path: Path, **spec: object) -> toy_platform.ToyExecutor:
    platform = toy_platform.ToyPlatform()
    fields = {"page_size": 4, "cache_tokens": 64, "max_rows": 4, **spec}
    made = platform.executor(EngineSpec(str(path), **fields), toy_platform.FACTS)  # type: ignore[arg-type]
    made.load()
    assert isinstance(made, toy_platform.ToyExecutor)
    return made


def run(executor: toy_platform.ToyExecutor, batch: StepBatch) -> StepResult:
    executor.submit(batch)
    return executor.collect()


PROMPT = [*b"once upon"]  # 9 tokens: 3 pages of 4


def test_the_contracts_suffice() -> None:
    assert len(FILE.read_text().splitlines()) < 155
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(FILE.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    ours = {name for name in imported if name and name.split(".")[0] not in sys.stdlib_module_names}
    allowed = ("numpy", "toy_sampling", "sixfold.common.errors", "sixfold.platforms")
    assert {n for n in ours if n not in allowed and ".interface" not in n} == set()
    assert isinstance(toy_platform.ToyPlatform(), Platform)


def test_chunks_pages_and_batching_do_not_change_the_tokens(
    executor: toy_platform.ToyExecutor,
) -> None:
    alone = run(executor, step([(0, PROMPT, 0, [1, 2, 3])])).token_ids[0, 0]
    run(executor, step([(1, PROMPT[:3], 0, [9, 5, 7])], want=Want.NOTHING))
    other = (2, [*b"some other"], 0, [10, 11, 12])
    both = run(executor, step([other, (1, PROMPT[3:], 3, [9, 5, 7])]))
    assert both.token_ids[1, 0] == alone
    again = run(executor, step([(0, [LAST_TOKEN], 9, [1, 2, 3])])).token_ids[0, 0]
    explicit = run(executor, step([(1, [int(alone)], 9, [9, 5, 7])])).token_ids[0, 0]
    assert again == explicit


def test_a_row_may_read_pages_that_another_row_writes_in_the_same_step(
    executor: toy_platform.ToyExecutor,
) -> None:
    reader, writer = (0, PROMPT[8:], 8, [1, 2, 3]), (1, PROMPT[:8], 0, [1, 2])
    shared = run(executor, step([reader, writer])).token_ids[0, 0]
    assert shared == run(executor, step([(2, PROMPT, 0, [4, 5, 6])])).token_ids[0, 0]


def test_a_lost_page_a_wrong_page_and_a_null_page_are_seen(
    executor: toy_platform.ToyExecutor,
) -> None:
    run(executor, step([(0, PROMPT, 0, [1, 2, 3])]))
    for pages in ([1, 8, 3], [2, 1, 3], [1, 0, 3]):
        executor.submit(step([(0, [LAST_TOKEN], 9, pages)]))
        with pytest.raises(RuntimeError, match="do not hold its context"):
            executor.collect()
    moved = step([(0, [LAST_TOKEN], 9, [1, 8, 3])], moves=(PageCopy("full", 2, 8),))
    assert run(executor, moved).accepted[0] == 1


def test_tokens_differ_when_an_early_token_differs(executor: toy_platform.ToyExecutor) -> None:
    changed = [*b"Once upon"]
    logits = [executor.logits(i32(tokens), 1)[0] for tokens in (PROMPT, changed)]
    assert np.abs(logits[0] - logits[1]).max() > 0.5


def test_submit_ahead_of_collect_resolves_last_token(executor: toy_platform.ToyExecutor) -> None:
    executor.submit(step([(3, PROMPT, 0, [1, 2, 3])]))
    executor.submit(step([(3, [LAST_TOKEN], 9, [1, 2, 3])]))
    first, second = executor.collect().token_ids[0, 0], executor.collect().token_ids[0, 0]
    whole = run(executor, step([(0, [*PROMPT, int(first)], 0, [4, 5, 6])])).token_ids[0, 0]
    assert second == whole
    with pytest.raises(RuntimeError, match="no step is pending"):
        executor.collect()


def test_logprobs_and_prompt_logprobs(executor: toy_platform.ToyExecutor) -> None:
    targets = i32([*PROMPT[1:], -1])
    batch = step(
        [(0, PROMPT, 0, [1, 2, 3])],
        want=Want.SAMPLE | Want.PROMPT_LOGPROBS,
        prompt_targets=targets,
        sampling=sampling(1, logprobs=i32([3])),
    )
    result = run(executor, batch)
    logs = log_softmax(executor.logits(i32(PROMPT), len(PROMPT)))
    (prompt,) = result.prompt_logprobs
    assert prompt.top_ids.shape == (8, 3)
    np.testing.assert_allclose(prompt.token_logprobs, logs[np.arange(8), targets[:8]], rtol=1e-5)
    assert result.top_ids is not None
    assert result.top_logprobs is not None
    assert result.logprobs is not None
    assert result.top_ids[0, 0] == result.token_ids[0, 0] == logs[-1].argmax()
    np.testing.assert_allclose(result.logprobs, result.top_logprobs[:, 0])
    assert np.exp(result.top_logprobs).sum() <= 1


def test_penalties_count_the_pending_token_as_output(executor: toy_platform.ToyExecutor) -> None:
    first = int(run(executor, step([(0, PROMPT, 0, [1, 2, 3])])).token_ids[0, 0])
    logits = executor.logits(i32([*PROMPT, first]), 1)[0]
    logits[first] = 30  # as if it would repeat itself
    executor.logits = lambda context, count: logits[None]  # type: ignore[method-assign]
    plain = run(executor, step([(0, [LAST_TOKEN], 9, [1, 2, 3])]))
    assert plain.token_ids[0, 0] == first
    executor.last[0] = first
    penalty = sampling(1, frequency_penalty=np.array([40], np.float32))
    other = run(executor, step([(0, [LAST_TOKEN], 9, [1, 2, 3])], sampling=penalty))
    assert other.token_ids[0, 0] != first


def test_bias_and_grammar_decide(executor: toy_platform.ToyExecutor) -> None:
    row = [(0, PROMPT, 0, [1, 2, 3])]
    bias = sampling(
        1, bias_start=i32([0, 1]), bias_ids=i32([7]), bias_values=np.array([99], np.float32)
    )
    assert run(executor, step(row, sampling=bias)).token_ids[0, 0] == 7
    mask = np.zeros((1, -(-VOCABULARY // 32)), np.uint32)
    mask[0, END // 32] = 1 << END % 32
    assert run(executor, step(row, grammar_mask=mask)).token_ids[0, 0] == END


def test_a_row_without_any_allowed_token_samples_nothing(
    executor: toy_platform.ToyExecutor,
) -> None:
    mask = np.zeros((1, -(-VOCABULARY // 32)), np.uint32)
    result = run(executor, step([(0, PROMPT, 0, [1, 2, 3])], grammar_mask=mask))
    assert (result.token_ids[0, 0], result.accepted[0]) == (-1, 0)


@pytest.mark.parametrize("seed", range(60))
def test_two_samplers_written_apart_agree(seed: int) -> None:
    """The toy's sampler and the reference of the op, over random rows with everything set."""
    rng, rows, vocab = np.random.default_rng(seed), 8, 40

    def often(off: float, low: float, high: float) -> np.ndarray:
        return np.where(rng.random(rows) < 0.5, off, rng.uniform(low, high, rows)).astype(
            np.float32
        )

    def lists(limit: int) -> tuple[np.ndarray, np.ndarray]:
        counts = rng.integers(0, limit, rows)
        starts = i32(np.concatenate([[0], np.cumsum(counts)]))
        return starts, i32(rng.integers(0, vocab, starts[-1]))

    prompt, output = lists(9), lists(9)
    counts = rng.integers(0, 4, rows)
    bias = [i for n in counts for i in rng.choice(vocab, n, replace=False)]
    values = np.where(rng.random(len(bias)) < 0.2, -np.inf, rng.normal(0, 3, len(bias)))
    arrays = sampling(
        rows,
        temperature=often(0, 0.3, 2),
        top_k=i32(rng.choice([0, 1, 3, 12, 99], rows)),
        top_p=often(1, 0.05, 1),
        min_p=often(0, 0, 0.5),
        repetition_penalty=often(1, 0.5, 2),
        presence_penalty=often(0, -2, 2),
        frequency_penalty=often(0, -2, 2),
        uniform=rng.random(rows),
        bias_start=i32(np.concatenate([[0], np.cumsum(counts)])),
        bias_ids=i32(bias),
        bias_values=values.astype(np.float32),
        prompt_start=prompt[0],
        prompt_ids=prompt[1],
        output_start=output[0],
        output_ids=output[1],
    )
    logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    mask = rng.integers(0, 2**32, (rows, 2), dtype=np.uint32)
    mask[0] = 0
    last = np.where(rng.random(rows) < 0.5, rng.integers(0, vocab, rows), -1)
    batch = step(
        [(r, [LAST_TOKEN if last[r] >= 0 else 5], 0, [1]) for r in range(rows)],
        sampling=arrays,
        grammar_mask=mask,
    )
    ours = [sample(logits[r], batch, r, last[r : r + 1]) for r in range(rows)]
    theirs = reference_sample(logits, arrays, mask, last.astype(np.int64))
    assert ours == theirs.tolist()
    assert ours[0] == -1


def test_draw_narrows_and_follows_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    assert {draw(logits, 2, 1, 0, u) for u in np.linspace(0, 0.999, 50)} == {1, 3}
    assert {draw(logits, 0, 0.6, 0, u) for u in np.linspace(0, 0.999, 50)} == {1, 3}
    assert {draw(logits, 0, 1, 0.6, u) for u in np.linspace(0, 0.999, 50)} == {1, 3}
    shares = [draw(logits, 0, 1, 0, u) for u in np.random.default_rng(3).random(10000)]
    np.testing.assert_allclose(np.bincount(shares) / 10000, [0.1, 0.4, 0.2, 0.3], atol=0.02)


def test_script_is_answered_after_the_assistant_token(tmp_path: Path) -> None:
    executor = loaded(write_toy_checkpoint(tmp_path / "toy", script="hé!"))
    tokens, answer = [*b"hi", END, ASSISTANT], []
    while not answer or answer[-1] != END:
        batch = step([(0, tokens + answer, 0, [1, 2, 3, 4])])
        answer.append(int(run(executor, batch).token_ids[0, 0]))
    assert bytes(answer[:-1]).decode() == "hé!"


def test_window_group_is_read_and_checked(tmp_path: Path) -> None:
    executor = loaded(write_toy_checkpoint(tmp_path / "toy", sliding_window=5))
    full, pages = i32([[1, 2, 3]]), i32([[1, 2, 3]])
    first = step([(0, PROMPT, 0, [1])], page_tables={"full": full, "window": pages})
    run(executor, first)
    released = {"full": full, "window": i32([[0, 2, 3]])}  # positions 5..9 are pages 1 and 2
    run(executor, step([(0, [LAST_TOKEN], 9, [1])], page_tables=released))
    early = {"full": full, "window": i32([[0, 0, 3]])}
    executor.submit(step([(0, [LAST_TOKEN], 10, [1])], page_tables=early))
    with pytest.raises(RuntimeError, match="'window'"):
        executor.collect()


def test_what_the_user_sets_is_honoured_or_refused(tmp_path: Path) -> None:
    path = write_toy_checkpoint(tmp_path / "toy", max_context=64)
    with pytest.raises(ConfigError, match="at most 64 tokens"):
        loaded(path, max_context=65)
    with pytest.raises(ConfigError, match="float32"):
        loaded(path, dtype="bfloat16")


def test_tokenizer_round_trips_any_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = write_toy_checkpoint(tmp_path / "toy")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "<|user|>Grüße 🐙 \n\t!<|end|><|assistant|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids[1:-2] == [*"Grüße 🐙 \n\t!".encode()]
    assert tokenizer.get_vocab_size() == VOCABULARY


def test_entry_point_is_found_by_a_subprocess(tmp_path: Path) -> None:
    program = (
        "from importlib.metadata import entry_points as e;"
        "print([p.load()().name for p in e(group='sixfold.platforms')])"
    )
    environment = toy_environment(tmp_path / "site")
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "['toy']"
