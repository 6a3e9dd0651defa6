"""Guards the generic `sample` kernel against the numpy reference over many random parameter sets,
and that a row's token depends on nothing but the row."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from support.graph_stand_in import READS, CannotRecord, Recording

from sixfold.common.ops.sample import sample as reference
from sixfold.common.ops.sample import unpack_mask as unpack_reference
from sixfold.common.ops.sample_cases import pack_mask, random_row, sampling_arrays
from sixfold.platforms.sampling_rows import select_rows
from sixfold.platforms.torch_runtime.sampler import sample, unpack_mask

KERNELS = {
    "generic": sample,
    "shortlist": partial(sample, shortlist=64),
    "float32_sums": partial(sample, wide=torch.float32),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(kernel: str, logits: np.ndarray, rows: list, **extra: np.ndarray) -> np.ndarray:
    given = {name: torch.from_numpy(value) for name, value in extra.items()}
    return KERNELS[kernel](torch.from_numpy(logits), sampling_arrays(rows), **given).numpy()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vocab", [7, 100, 1003, 8191])
def test_random_parameters_give_the_reference_token(kernel: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    count = 1200 if vocab <= 100 else 240
    rows = [random_row(rng, vocab) for _ in range(count)]
    logits = (rng.standard_normal((count, vocab)) * rng.uniform(0.1, 6, (count, 1))).astype(
        np.float32
    )
    pending = np.where(rng.random(count) < 0.5, rng.integers(0, vocab, count), -1)
    allowed = rng.random((count, vocab)) < 0.7
    allowed[:, 0] = True
    mask = pack_mask(allowed)
    want = reference(logits, sampling_arrays(rows), mask, pending)
    got = draw(kernel, logits, rows, grammar_mask=mask.view(np.int32), pending=pending)
    different = np.flatnonzero(got != want)
    # A draw within rounding of a boundary may fall to either side of it; more would be a fault.
    limit = 2 if kernel == "float32_sums" else 1
    assert len(different) <= limit, [(i, got[i], want[i], rows[i]) for i in different[:3]]


def test_same_draw_gives_the_same_token_whatever_else_is_in_the_batch() -> None:
    rng = np.random.default_rng(3)
    vocab = 503
    subject = {"temperature": 0.8, "top_p": 0.9, "uniform": 0.37, "output": [1, 2, 3]}
    subject["frequency_penalty"] = 0.5
    logits = rng.standard_normal((1, vocab)).astype(np.float32) * 3
    alone = draw("shortlist", logits, [subject])[0]
    for _ in range(30):
        others = [random_row(rng, vocab) for _ in range(int(rng.integers(1, 9)))]
        place = int(rng.integers(0, len(others) + 1))
        rows = [*others[:place], subject, *others[place:]]
        around = rng.standard_normal((len(rows), vocab)).astype(np.float32)
        around[place] = logits[0]
        assert draw("shortlist", around, rows)[place] == alone


def test_draws_follow_the_distribution() -> None:
    shares, count = np.array([0.1, 0.2, 0.3, 0.4]), 20000
    logits = np.log(shares[None].astype(np.float32)).repeat(count, axis=0)
    draws = [{"uniform": u} for u in np.random.default_rng(4).random(count)]
    made = np.bincount(draw("generic", logits, draws), minlength=4)
    spread = np.sqrt(count * shares * (1 - shares))
    assert (abs(made - count * shares) < 4 * spread).all(), made


def test_rounding_seldom_changes_a_draw() -> None:
    """A flat distribution over many tokens, where a cumulative search would slip by whole
    tokens: logits that differ in their last bits draw the same one."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1, (64, 49152)).astype(np.float32)
    nearly = logits + rng.normal(0, 2e-6, logits.shape).astype(np.float32)
    draws = [{"uniform": u} for u in rng.random(64)]
    np.testing.assert_array_equal(draw("generic", logits, draws), draw("generic", nearly, draws))


def test_logits_are_left_as_they_were() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 50)).astype(np.float32)
    logits[0, 3] = np.nan
    before = logits.copy()
    draw("generic", logits, [random_row(rng, 50) for _ in range(4)])
    np.testing.assert_array_equal(logits, before)


def test_mask_words_unpack_as_in_the_reference() -> None:
    allowed = np.random.default_rng(0).random((3, 77)) < 0.5
    words = pack_mask(allowed)
    np.testing.assert_array_equal(
        unpack_mask(torch.from_numpy(words.view(np.int32)), 77).numpy(), allowed
    )
    np.testing.assert_array_equal(unpack_reference(words[1], 77), allowed[1])


def test_selected_rows_carry_their_ragged_parts() -> None:
    rng = np.random.default_rng(1)
    rows = [random_row(rng, 40) for _ in range(9)]
    chosen = np.array([0, 3, 4, 8])
    got = select_rows(sampling_arrays(rows), chosen)
    want = sampling_arrays([rows[i] for i in chosen])
    for name in want.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


# ---- reads on the host


def filtered(rng: np.random.Generator, rows: int, vocab: int) -> list[dict[str, object]]:
    """Rows with every filter and every adjustment."""
    made = [random_row(rng, vocab) for _ in range(rows - 1)]
    every = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "uniform": 0.3}
    return [*made, {**every, "output": [1, 2, 3], "frequency_penalty": 0.5}]


class HostRead(Exception):
    pass


def refuse(*_: object) -> None:
    raise HostRead


def test_filters_read_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row asks for is in host arrays, which are copied to the device before they are used:
    so a step is submitted without waiting. `draw`, which recordings hold, has them there."""
    rng = np.random.default_rng(5)
    rows, vocab = 16, 211
    logits = rng.standard_normal((rows, vocab)).astype(np.float32) * 3
    arrays = sampling_arrays(filtered(rng, rows, vocab))
    with monkeypatch.context() as patch:
        for read in READS:
            patch.setattr(torch.Tensor, read, refuse)
        found = sample(torch.from_numpy(logits), arrays)
        with pytest.raises(HostRead):
            sample(torch.from_numpy(logits), arrays, shortlist=64)
    np.testing.assert_array_equal(found.numpy(), reference(logits, arrays))
    with pytest.raises(CannotRecord, match="from host values"):
        Recording(lambda: sample(torch.from_numpy(logits), arrays))
