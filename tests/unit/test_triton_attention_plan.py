"""Guards the host side of the Triton attention backend, on random steps: every query is in one item
that sees all of its keys and lists their pages, in an exact room and in a bucket; what is left over
of a bucket is neutral. No Triton is needed here."""

from __future__ import annotations

import numpy as np
import pytest

from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.interface_step import StepBatch
from sixfold.platforms.triton_kernels.attention_plan import (
    COUNT,
    END,
    FIELDS,
    FIRST,
    PAGES,
    PARTIAL,
    POSITION,
    TOKEN,
    Room,
    TritonPlan,
    exact_room,
    pack,
    plan_step,
)

NARROW, WIDE = 3, 8


def step(rng: np.random.Generator, group: KVGroup) -> StepBatch:
    rows = int(rng.integers(1, 7))
    context = rng.integers(0, 60, rows).astype(np.int32)
    new = np.where(rng.random(rows) < 0.5, 1, rng.integers(1, 30, rows))
    counts = -(-(context + new) // group.page_size)
    pages = rng.permutation(np.arange(1, counts.sum() + 1))
    table = np.zeros((rows, int(counts.max()) + 1), np.int32)
    for row in range(rows):
        table[row, : counts[row]] = pages[counts[:row].sum() : counts[: row + 1].sum()]
        if group.window:
            table[row, : max(0, context[row] - group.window + 1) // group.page_size] = 0
    return StepBatch(
        step=0,
        row_ids=np.arange(rows, dtype=np.int32),
        token_ids=np.zeros(int(new.sum()), np.int32),
        query_start=np.concatenate(([0], np.cumsum(new))).astype(np.int32),
        context_lens=context,
        page_tables={group.name: table},
        want=np.zeros(rows, np.uint8),
        sampling=sampling_arrays([{}] * rows),
    )


def check(batch: StepBatch, plan: TritonPlan, room: Room) -> None:
    packed, group = pack(plan, room), plan.group
    table, tokens = batch.page_tables[group.name], len(batch.token_ids)
    items = packed[room.tokens : room.pages_at].reshape(-1, FIELDS)
    pages = packed[room.pages_at :]
    covered = np.zeros(room.tokens, int)
    for index, item in enumerate(items):
        for query in range(item[COUNT]):
            token = item[TOKEN] + query
            covered[token] += 1
            if token >= tokens:
                assert item[FIRST] == item[END] == 0, "padding sees keys"
                continue
            row = int(np.searchsorted(batch.query_start, token, side="right")) - 1
            position = batch.context_lens[row] + token - batch.query_start[row]
            assert item[POSITION] + query == position
            first = max(0, position - group.window + 1) if group.window else 0
            assert item[FIRST] <= first <= position < item[END]
            for key in range(item[FIRST], item[END]):
                page = key // group.page_size
                assert pages[item[PAGES] + page] == table[row, page] > 0
        assert item[COUNT] <= (NARROW if index < room.narrow else WIDE)
    real = np.arange(room.tokens) < tokens
    assert (covered == 1).all(), "a token is in no item, or in several"
    assert (packed[: room.tokens][~real] == 0).all(), "padding is written beyond the null page"
    assert (packed[: room.tokens][real] >= group.page_size).all()
    narrow = items[: room.narrow]
    places = [item[PARTIAL] + q for item in narrow if item[END] for q in range(item[COUNT])]
    assert sorted(places) == list(range(len(places)))
    assert len(places) <= room.partial_tokens


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("window", [0, 1, 13])
def test_random_steps(page_size: int, window: int) -> None:
    rng = np.random.default_rng(page_size * 100 + window)
    kind = KVKind.WINDOW if window else KVKind.FULL
    group = KVGroup("g", kind, page_size, 10_000, window)
    for _ in range(12):
        batch = step(rng, group)
        plan = plan_step(batch, group)
        exact = exact_room(plan, NARROW, WIDE)
        check(batch, plan, exact)
        items = pack(plan, exact)[exact.tokens : exact.pages_at].reshape(-1, FIELDS)
        assert (items[:, COUNT] > 0).all(), "a launch has nothing to do"
        rows = batch.rows + int(rng.integers(0, 4))
        tokens = plan.tokens + int(rng.integers(0, 20))
        check(batch, plan, Room.bucket(rows, tokens, NARROW, WIDE))
        check(batch, plan, Room.bucket(tokens, tokens, NARROW, WIDE))


@pytest.mark.parametrize("field", [PAGES, FIRST, END, POSITION, COUNT])
def test_the_check_fires(field: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group = KVGroup("g", KVKind.WINDOW, 4, 10_000, 13)
    batch = step(np.random.default_rng(3), group)
    plan = plan_step(batch, group)
    room = exact_room(plan, NARROW, WIDE)
    packed = pack(plan, room)
    packed[room.tokens + field] += -1 if field == END else 1
    monkeypatch.setitem(globals(), "pack", lambda plan, room: packed)
    with pytest.raises((AssertionError, IndexError)):
        check(batch, plan, room)
