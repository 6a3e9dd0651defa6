"""Guards the Executor contract of the torch runtime, on a tiny model against a dense oracle: steps
in any mixture, overlap by LAST_TOKEN, log-probabilities, errors, choices at load, closing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.tiny_torch_model import (
    POISON_TOKEN,
    VOCAB,
    Driver,
    cpu_facts,
    dense_greedy,
    dense_logits,
    tiny_executor,
)

from sixfold.common.errors import ConfigError, KernelError, OutOfMemory
from sixfold.common.ops.sample_cases import pack_mask
from sixfold.platforms.interface import ExecutorInfo, Status
from sixfold.platforms.interface_kv import KVKind
from sixfold.platforms.interface_step import LAST_TOKEN, PageCopy, StepResult, Want
from sixfold.platforms.torch_runtime import model_runner
from sixfold.platforms.torch_runtime.executor import TorchExecutor

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [27, 18, 28], [31] * 17, [8]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def loaded() -> Iterator[tuple[TorchExecutor, Driver]]:
    executor = tiny_executor()
    yield executor, Driver(executor.load())
    executor.close()


def run(executor: TorchExecutor, *args, **kwargs) -> StepResult:
    """One step through a driver: run(executor, driver.batch(...))."""
    executor.submit(*args, **kwargs)
    return executor.collect()


def test_chunked_and_batched_rows_continue_as_each_alone(loaded) -> None:
    executor, driver = loaded
    outputs: list[list[int]] = [[] for _ in PROMPTS]
    left = [list(p) for p in PROMPTS]
    sizes = [4, 3, 6, 1]  # chunks, so that prefill and decode share steps
    for _ in range(16):
        rows, want = [], []
        for row, rest in enumerate(left):
            chunk = rest[: sizes[row]] if rest else [outputs[row][-1]]
            left[row] = rest[len(chunk) :] if rest else []
            rows.append((row, chunk))
            want.append(Want.NOTHING if left[row] else Want.SAMPLE)
        result = run(executor, driver.batch(rows, want))
        for row, wanted in enumerate(want):
            assert result.accepted[row] == bool(wanted)
            if wanted:
                outputs[row].append(int(result.token_ids[row, 0]))
            else:
                assert result.token_ids[row, 0] == -1
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output == dense_greedy(prompt, len(output))


def test_overlapped_steps_equal_steps_one_at_a_time(loaded) -> None:
    executor, driver = loaded
    first = driver.batch(list(enumerate(PROMPTS)))
    penalised = [{"temperature": 0.0}, {"temperature": 0.9, "uniform": 0.3, "top_k": 9}] * 2
    steps = 9
    batches = [first] + [
        driver.batch([(row, [LAST_TOKEN]) for row in (2, 0, 3, 1)], params=penalised)
        for _ in range(steps)
    ]
    for batch in batches:
        executor.submit(batch)
    overlapped = [executor.collect().token_ids[:, 0] for _ in batches]

    other = tiny_executor()
    driver = Driver(other.load(), seed=9)
    got = [run(other, driver.batch(list(enumerate(PROMPTS)))).token_ids[:, 0]]
    last = {row: int(got[0][row]) for row in range(4)}
    for _ in range(steps):
        order = (2, 0, 3, 1)
        result = run(other, driver.batch([(r, [last[r]]) for r in order], params=penalised))
        got.append(result.token_ids[:, 0])
        last = {row: int(token) for row, token in zip(order, got[-1], strict=True)}
    other.close()
    np.testing.assert_array_equal(overlapped, got)


def test_a_pending_token_counts_as_output_for_penalties(loaded) -> None:
    executor, driver = loaded
    run(executor, driver.batch([(0, [3, 4])], params=[{"temperature": 0.0, "bias": {7: 1e4}}]))
    logits = dense_logits([3, 4, 7])[-1]
    logits[7] = -np.inf
    rival = int(logits.argmax())
    lead = float(logits[rival] - dense_logits([3, 4, 7])[-1][7]) + 3.0
    penalised = {"temperature": 0.0, "bias": {7: lead}}
    penalised |= {"presence_penalty": 2.0, "frequency_penalty": 2.0}  # 4 in all, 7 leads by 3
    result = run(executor, driver.batch([(0, [LAST_TOKEN])], params=[penalised]))
    assert int(result.token_ids[0, 0]) == rival


def test_logprobs_are_of_raw_logits(loaded) -> None:
    executor, driver = loaded
    params = [
        {"temperature": 0.0, "bias": {11: 1e4}, "logprobs": 3},
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 0},
    ]
    result = run(executor, driver.batch(list(enumerate(PROMPTS[:3])), params=params))
    logits = dense_logits(PROMPTS[0])[-1].astype(np.float64)
    want = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert result.token_ids[0, 0] == 11
    assert result.logprobs is not None
    assert result.top_ids is not None
    assert result.logprobs[0] == pytest.approx(want[11], abs=1e-4)
    assert result.top_ids[0].tolist() == np.argsort(-want)[:3].tolist()
    np.testing.assert_allclose(result.top_logprobs[0], np.sort(want)[::-1][:3], 1e-5, 1e-4)
    assert np.isnan(result.logprobs[1])
    assert result.top_ids[1].tolist() == [-1, -1, -1]
    assert np.isfinite(result.logprobs[2])


def test_nobody_asking_means_no_logprobs(loaded) -> None:
    executor, driver = loaded
    result = run(executor, driver.batch([(0, [1])]))
    assert result.logprobs is None
    assert result.top_ids is None
    assert result.prompt_logprobs == ()


@pytest.mark.parametrize("at_once", [1, 5 * VOCAB, 1 << 24])
def test_prompt_logprobs_in_chunks_and_slices_equal_the_whole(
    loaded, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "LOGITS_AT_ONCE", at_once)
    executor, driver = loaded
    prompt = PROMPTS[2] + PROMPTS[0]
    pieces = [prompt[:7], prompt[7:20], prompt[20:]]
    got = []
    for index, piece in enumerate(pieces):
        start = sum(map(len, pieces[:index]))
        targets = [*prompt[start + 1 : start + 1 + len(piece)]]
        targets += [-1] * (len(piece) - len(targets))
        params = [{"temperature": 0.0, "logprobs": 2}, {"temperature": 0.0}]
        want = [Want.PROMPT_LOGPROBS, Want.SAMPLE]
        other = [5] if index == 0 else [LAST_TOKEN]
        result = run(
            executor,
            driver.batch([(0, piece), (1, other)], want, params, [*targets, -1]),
        )
        (found,) = result.prompt_logprobs
        assert found.row == 0
        assert found.top_ids.shape == (len(found.token_logprobs), 2)
        got.append(found)
    logits = dense_logits(prompt).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.concatenate([part.token_logprobs for part in got])
    want = logprobs[np.arange(len(prompt) - 1), prompt[1:]]
    np.testing.assert_allclose(chosen, want, atol=1e-4)
    best = np.concatenate([part.top_ids for part in got])
    np.testing.assert_array_equal(best, np.argsort(-logprobs[:-1], -1)[:, :2])


def test_a_row_with_nothing_allowed_fails_alone(loaded) -> None:
    executor, driver = loaded
    allowed = np.ones((2, VOCAB), bool)
    allowed[0] = False
    result = run(executor, driver.batch([(0, [1]), (1, [2])], mask=pack_mask(allowed)))
    assert result.token_ids[0, 0] == -1
    assert result.accepted.tolist() == [0, 1]
    assert result.token_ids[1, 0] == dense_greedy([2], 1)[0]
    again = run(executor, driver.batch([(0, [LAST_TOKEN]), (1, [LAST_TOKEN])]))
    assert again.token_ids[1, 0] == dense_greedy([2], 2)[1]


def test_moves_copy_pages_before_the_step(loaded) -> None:
    executor, driver = loaded
    prompt = PROMPTS[0][:6]  # one full page and a partly filled one
    run(executor, driver.batch([(0, prompt)]))
    moves = []
    for name, table in driver.tables.items():
        between, copy = driver.free[name].pop(), driver.free[name].pop()
        moves += [PageCopy(name, int(table[0, 1]), between), PageCopy(name, between, copy)]
        table[1, :2] = table[0, 0], copy
    driver.lengths[1] = 6
    result = run(executor, driver.batch([(0, [40]), (1, [41])], moves=tuple(moves)))
    assert result.token_ids[0, 0] == dense_greedy([*prompt, 40], 1)[0]
    assert result.token_ids[1, 0] == dense_greedy([*prompt, 41], 1)[0]


def test_a_row_may_read_pages_that_another_writes_in_the_same_step(loaded) -> None:
    executor, driver = loaded
    prompt = PROMPTS[0][:8]
    first = driver.batch([(0, prompt)])
    for table in driver.tables.values():
        table[1, :2] = table[0, :2]
    driver.lengths[:] = [0, 8, *[0] * 6]
    both = driver.batch([(0, prompt), (1, [50, 51])])
    assert first.rows == 1
    result = run(executor, both)
    assert result.token_ids[1, 0] == dense_greedy([*prompt, 50, 51], 1)[0]


def test_a_step_that_raises_surfaces_at_its_collect(loaded) -> None:
    executor, driver = loaded
    batches = [driver.batch([(row, [token])]) for row, token in ((0, 1), (1, POISON_TOKEN), (2, 3))]
    for batch in batches:
        executor.submit(batch)
    assert executor.collect().token_ids[0, 0] == dense_greedy([1], 1)[0]
    assert executor.health().status is Status.YES
    with pytest.raises(ValueError, match="poisoned"):
        executor.collect()
    assert executor.health().status is Status.NO
    assert executor.collect().token_ids[0, 0] == dense_greedy([3], 1)[0]
    with pytest.raises(RuntimeError, match="no step is pending"):
        executor.collect()


def test_submit_does_not_wait_for_the_step(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    executor, driver = loaded
    gate = threading.Event()
    real = model_runner.ModelRunner.run

    def held(self, batch):
        gate.wait(10)
        return real(self, batch)

    monkeypatch.setattr(model_runner.ModelRunner, "run", held)
    executor.submit(driver.batch([(0, [1])]))
    executor.submit(driver.batch([(0, [LAST_TOKEN])]))
    gate.set()  # reached, although no step can have finished
    assert [executor.collect().step for _ in range(2)] == [0, 1]


def test_close_is_idempotent_and_abandons_what_is_pending() -> None:
    executor = tiny_executor()
    driver = Driver(executor.load())
    executor.submit(driver.batch([(0, [1])]))
    executor.close()
    executor.close()
    assert executor.health().status is Status.NO
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit(driver.batch([(0, [1])]))
    with pytest.raises(RuntimeError, match="no step is pending"):
        executor.collect()


def test_submit_before_load_is_an_error() -> None:
    executor = tiny_executor()
    with pytest.raises(RuntimeError, match="loaded"):
        executor.submit(None)
    executor.close()


def load(**changes) -> ExecutorInfo:
    executor = tiny_executor(**changes)
    try:
        return executor.load()
    finally:
        executor.close()


def test_what_is_left_open_is_decided_with_a_reason() -> None:
    info = load(page_size=None)
    decided = {d.what: d for d in info.decisions}
    for what in (
        "threads",
        "thread placement",
        "dtype",
        "page size",
        "cache",
        "max context",
        "kernel attention",
    ):
        assert decided[what].because, what
    assert info.page_size == 16
    assert info.max_context == 256
    kinds = [(g.name, g.kind, g.window) for g in info.groups]
    assert kinds == [("full", KVKind.FULL, 0), ("window", KVKind.WINDOW, 6)]
    full = info.groups[0]
    assert full.pages == 8 * 16 + 1  # every row at the full context
    assert full.bytes_per_page == 2 * 2 * 2 * 8 * 4 * 16  # layers, kv, heads, dim, bytes, tokens
    assert info.cache_bytes == sum(g.pages * g.bytes_per_page for g in info.groups)
    assert info.overlap
    assert info.mixed_steps
    assert info.features["prompt_logprobs"].status is Status.YES


def test_what_is_set_is_kept() -> None:
    info = load(page_size=8, cache_tokens=100, dtype="bfloat16", threads=1)
    assert (info.page_size, info.dtype) == (8, "bfloat16")
    assert info.groups[0].pages == 13 + 1
    assert info.max_context == 104  # what the cache can hold
    reasons = {d.what: d.because for d in info.decisions}
    assert reasons["cache"] == reasons["page size"] == "set by the user"
    native = "bfloat16" in cpu_facts().dtypes
    assert reasons["dtype"].startswith("set by the user")
    assert ("slow on this device: without --dtype" in reasons["dtype"]) != native


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache_tokens": 10**12}, OutOfMemory, r"needs .* GiB .* there is room for .* GiB"),
        ({"cache_tokens": 64, "max_context": 128}, OutOfMemory, "does not fit the cache of 64"),
        ({"memory_fraction": 1e-9}, OutOfMemory, "a cache of one page needs"),
        ({"max_context": 1000}, ConfigError, "more than the model's 256"),
        ({"kernels": {"linear": "cutlass"}}, KernelError, "there are: native, generic, onednn"),
        ({"kernels": {"attention": "flash"}}, KernelError, "there are: native, sdpa"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes, error, message: str) -> None:
    with pytest.raises(error, match=message):
        load(**changes)


def test_a_named_kernel_is_used_and_gives_the_same_tokens() -> None:
    executor = tiny_executor(kernels={"linear": "generic", "sample": "generic"}, strict=True)
    driver = Driver(executor.load())
    result = run(executor, driver.batch(list(enumerate(PROMPTS))))
    want = [dense_greedy(p, 1)[0] for p in PROMPTS]
    assert result.token_ids[:, 0].tolist() == want
    executor.close()


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    executor = tiny_executor()
    executor.load(lambda done, total: seen.append((done, total)))
    executor.close()
    assert seen
