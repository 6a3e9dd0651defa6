"""Guards how the scheduler serves models with recurrent layers: the slot of each row, where chunks
end so that snapshots can be taken, the copies that save and restore them, who waits for one, and
what a burst of requests computes. Outputs over random traffic are in test_engine_random."""

from __future__ import annotations

from typing import Any

import pytest
from support.engine_traffic import Arrival, Wrong, compare, run, serve
from support.engine_worlds import TOKENS
from support.mock_executor import MockExecutor, group, mock_info, state
from support.mock_model import scan
from support.scheduler_bench import Bench, lengths

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.errors import ConfigError
from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface_step import PageCopy, StepBatch

SIZE = 4
FULL, STATE = group("full", 64, SIZE), state("state", 16, SIZE)
WINDOW, OTHER = group("window", 64, SIZE, window=6), state("other", 12, SIZE)
MODELS = {
    "recurrent": (STATE,),
    "full": (FULL, STATE),
    "window": (WINDOW, STATE),
    "all": (STATE, FULL, WINDOW, OTHER),
}
SHARED = TOKENS[0][:16]


def bench_of(*groups: Any, **changes: Any) -> Bench:
    return Bench(*(groups or (FULL, STATE)), **changes)


def slot(batch: StepBatch, row: int = 0) -> int:
    return int(batch.state_slots["state"][row])


def cached(bench: Bench, name: str) -> int | None:
    found = [o.cached_tokens for o in bench.outputs if o.request_id == name]
    return found[0] if found else None


# ---- slots and copies


def test_a_row_has_one_slot_and_no_pages_of_a_recurrent_group() -> None:
    bench = bench_of()
    for name, first in (("a", 1), ("b", 9)):
        bench.add(name, 3, first=first)
    batches = [bench.step() for _ in range(3)]
    for batch in batches:
        assert set(batch.page_tables) == {"full"}
        assert batch.state_slots["state"].tolist() == batches[0].state_slots["state"].tolist()
        assert batch.moves == ()
    assert len({slot(batches[0], 0), slot(batches[0], 1), 0}) == 3
    bench.finish()
    assert bench.scheduler.cache.pools[1].free == 16


def test_the_last_page_boundary_of_a_prompt_is_saved_with_the_next_step() -> None:
    bench = bench_of()
    bench.add("a", 10)
    first, second, third = bench.step(), bench.step(), bench.step()
    assert [lengths(b) for b in (first, second, third)] == [[8], [2], [1]]
    assert first.moves == third.moves == ()
    (save,) = second.moves
    assert (save.group, save.source) == ("state", slot(first))
    assert save.target not in (0, slot(first))


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9, 10, 12])
def test_the_same_prompt_again_computes_at_most_a_page(length: int) -> None:
    bench = bench_of()
    bench.add("a", length)
    bench.finish()
    bench.add("b", length)
    again = bench.step()
    assert lengths(again) == [length - (length - 1) // SIZE * SIZE]
    assert lengths(again)[0] <= SIZE
    restores = [PageCopy("state", again.moves[0].source, slot(again))] if length > SIZE else []
    assert list(again.moves) == restores
    assert cached(bench, "b") == int(again.context_lens[0])


def test_a_save_comes_before_a_restore_from_it_in_the_same_step() -> None:
    bench = bench_of()
    bench.add("a", 10)
    bench.add("b", 10)
    assert lengths(bench.step()) == [8]  # b waits for the state that this step leaves
    second = bench.step()
    assert lengths(second) == [2, 2]
    save, restore = second.moves
    assert (save.source, restore.target) == (slot(second, 0), slot(second, 1))
    assert save.target == restore.source


def test_every_recurrent_group_has_its_own_copies() -> None:
    bench = bench_of(*MODELS["all"])
    bench.add("a", 10)
    bench.add("b", 10)
    bench.step()
    assert [m.group for m in bench.step().moves] == ["state", "other"] * 2


def test_a_chunk_that_the_budget_ends_leaves_no_snapshot() -> None:
    bench = bench_of(max_step_tokens=8)
    bench.add("a", 19)
    batches = [bench.step() for _ in range(4)]
    assert [lengths(b) for b in batches] == [[8], [8], [3], [1]]
    assert [len(b.moves) for b in batches] == [0, 0, 1, 0]  # only of 16, the last boundary


def test_without_the_prefix_cache_nothing_is_cut_or_copied() -> None:
    bench = bench_of(prefix_cache=False)
    for name in "ab":
        bench.add(name, 10)
    batch = bench.step()
    assert lengths(batch) == [10, 10]
    while bench.scheduler.running:
        assert bench.step().moves == ()


def test_a_prompt_that_is_scored_is_computed_whole() -> None:
    bench = bench_of()
    bench.add("a", 10)
    bench.finish()
    bench.add("b", 10, prompt_logprobs=0)
    batch = bench.submit()
    assert batch is not None
    assert (lengths(batch), batch.moves) == ([10], ())


def test_a_model_without_recurrent_groups_is_not_cut() -> None:
    bench = Bench()
    bench.add("a", 10)
    batch = bench.step()
    assert (lengths(batch), batch.moves, dict(batch.state_slots)) == ([10], (), {})


# ---- branches


@pytest.mark.parametrize("model", MODELS)
def test_the_second_prompt_leaves_a_snapshot_where_it_branches_and_the_third_uses_it(
    model: str,
) -> None:
    bench = bench_of(*MODELS[model])
    for name, own in (("a", 2), ("b", 3), ("c", 4)):
        bench.add_ids(name, [*SHARED, *[own] * 7])
        steps = [lengths(bench.step()) for _ in range(2)]
        if name == "a":
            assert steps == [[20], [3]]
        elif name == "b":
            assert steps == [[16], [4]]
        else:
            assert steps == [[4], [3]]
        bench.finish()
    assert [cached(bench, name) for name in "abc"] == [0, 0, 16]


def test_the_next_turn_of_a_talk_branches_at_the_end_of_the_answer() -> None:
    bench = bench_of()
    bench.add("a", 10)  # and 8 tokens of answer, of which 7 are computed
    bench.finish()
    text = [o.token_ids[0] for o in bench.outputs]
    bench.add_ids("b", [*range(2, 12), *text, 3, 4, 5, 6, 9])
    assert [lengths(bench.step()) for _ in range(3)] == [[8], [4], [3]]
    assert cached(bench, "b") == 8


@pytest.mark.parametrize("budget", [4096, 100, 33])
@pytest.mark.parametrize("model", MODELS)
def test_a_burst_computes_the_prefix_at_most_twice(model: str, budget: int) -> None:
    size, own = 16, 21
    shared = TOKENS[2][:512]
    groups = []
    for spec in MODELS[model]:
        if spec in (STATE, OTHER):
            groups.append(state(spec.name, 40, size))
        else:
            groups.append(group(spec.name, 800, size, 40 if spec.window else 0))
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    arrivals = [Arrival(0, [*shared, *TOKENS[1][i : i + own]], params) for i in range(16)]
    info = mock_info(groups, max_context=700, max_rows=16, max_step_tokens=budget)
    _, executor, heard = serve(info, EngineConfig(), arrivals)
    assert executor.computed <= 2 * 512 + 16 * (own + 2)
    assert sorted(h.cached or 0 for h in heard) == [0, 0] + [512] * 14


@pytest.mark.parametrize(("spare", "prefixes"), [(2, 2), (1, 3), (0, 4)])
def test_a_burst_with_few_slots_for_snapshots(spare: int, prefixes: int) -> None:
    """A snapshot serves all that wait for it before its slot goes to the next one."""
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    arrivals = [Arrival(0, [*TOKENS[2][:512], *TOKENS[1][i : i + 21]], params) for i in range(16)]
    groups = (group("full", 800, 16), state("state", 16 + spare, 16))
    info = mock_info(groups, max_context=700, max_rows=16, max_step_tokens=4096)
    _, executor, _ = serve(info, EngineConfig(), arrivals)
    assert executor.computed <= prefixes * 512 + 16 * (21 + 2)


# ---- waiting for a snapshot


def test_a_row_waits_only_for_what_serves_more_than_it_has() -> None:
    bench = bench_of()
    bench.add("a", 10)
    bench.finish()
    bench.add_ids("b", [*range(2, 12), 9, 9, 9])  # goes on from 8, will leave a snapshot of 12
    bench.add("c", 10)  # goes on from 8 as well
    bench.add_ids("d", [*range(2, 12), 9, 9, 7])  # waits for the 12
    batch = bench.step()
    assert (lengths(batch), batch.context_lens.tolist()) == ([4, 2], [8, 8])
    batch = bench.step()
    assert (lengths(batch), batch.context_lens.tolist()) == ([1, 1, 1], [10, 12, 12])


def test_other_rows_start_past_one_that_waits() -> None:
    bench = bench_of()
    for name, first in (("a", 1), ("b", 1), ("c", 9)):
        bench.add(name, 10, first=first)
    assert lengths(bench.step()) == [8, 8]
    assert bench.running() == ["a", "b", "c"]


def test_what_a_row_waits_for_outlives_the_row_that_computed_it() -> None:
    bench = bench_of()
    bench.add("a", 10)
    bench.add("b", 10)
    first = bench.submit()
    assert first is not None
    bench.scheduler.abort(["a"])
    second = bench.submit()
    assert second is not None
    assert (lengths(second), second.context_lens.tolist()) == ([2], [8])
    save, restore = second.moves
    assert (save.source, save.target) == (slot(first), restore.source)
    assert restore.target == slot(second)


def test_a_row_computes_itself_what_it_waited_for_in_vain() -> None:
    bench = bench_of()
    bench.add("a", 10)
    bench.add("b", 10)
    bench.step()
    bench.scheduler.abort(["a"])
    assert bench.scheduler.cache.tree.evict(1)
    batch = bench.step()
    assert (lengths(batch), batch.context_lens.tolist()) == ([8], [0])
    bench.finish()
    assert cached(bench, "b") == 0


# ---- few slots


def test_a_row_waits_a_step_for_a_slot_that_is_promised_and_then_takes_it() -> None:
    bench = bench_of(FULL, state("state", 2, SIZE), max_rows=2)
    bench.add("a", 10)
    bench.add("b", 10, first=9)
    assert lengths(bench.step()) == [8]
    assert bench.running() == ["a"]
    second = bench.step()
    assert lengths(second) == [2, 10]  # not cut: there is no slot for a snapshot
    assert second.moves[0].target == slot(second, 1)  # saved in vain, and before b begins
    assert bench.scheduler.cache.pools[1].pinned == 2


def test_snapshots_give_way_to_rows_and_working_slots_never_do() -> None:
    bench = bench_of(FULL, state("state", 3, SIZE), max_rows=3)
    pool = bench.scheduler.cache.pools[1]
    for i in range(3):
        bench.add(f"old{i}", 6, first=3 * i, max_tokens=1)
        bench.finish()
    assert (pool.free, pool.evictable, pool.pinned) == (1, 2, 0)
    slots: set[int] = set()
    for i in range(3):
        bench.add(f"new{i}", 6, first=10 + 3 * i, max_tokens=9)
        batch = bench.step()
        assert pool.pinned == i + 1
        assert len(set(batch.state_slots["state"].tolist())) == batch.rows
        assert slots <= set(batch.state_slots["state"].tolist())
        slots = set(batch.state_slots["state"].tolist())
    bench.finish()


def test_the_snapshot_used_longest_ago_goes_first() -> None:
    bench = bench_of(FULL, state("state", 4, SIZE), max_rows=2)
    for name, first in (("a", 0), ("b", 10), ("a2", 0), ("c", 20), ("d", 5)):
        bench.add(name, 6, first=first, max_tokens=1)
        bench.finish()
    bench.add("a3", 6, max_tokens=1, first=0)
    bench.finish()
    bench.add("b2", 6, max_tokens=1, first=10)
    bench.finish()
    assert [cached(bench, name) for name in ("a2", "a3", "b2")] == [4, 4, 0]


def test_a_preempted_row_goes_on_from_its_snapshot() -> None:
    bench = bench_of(group("full", 6, SIZE), STATE)
    bench.add("a", 8, max_tokens=9)
    bench.add("b", 8, first=9, max_tokens=9)
    while bench.counters.preemptions == 0:
        bench.step()
    before = bench.counters.prompt_tokens
    bench.finish()
    assert bench.counters.prompt_tokens - before < 8
    assert bench.scheduler.cache.pools[1].pinned == 0


def test_too_few_slots_for_the_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="'state' has 7 state slots; 8 rows need one each"):
        bench_of(FULL, state("state", 7, SIZE))
    bench_of(FULL, state("state", 7, SIZE), max_rows=7)


def test_states_alone_bound_nothing_but_the_length() -> None:
    bench = bench_of(state("state", 1, SIZE), max_rows=1, max_context=50)
    assert bench.scheduler.cache.capacity == 52
    bench.add("a", 40, max_tokens=10)
    bench.finish()
    assert bench.outputs[-1].finish_reason == "length"


def test_the_load_shows_slots_of_rows_and_snapshots() -> None:
    info = mock_info((FULL, STATE))
    engine = Engine(MockExecutor(info), info, EngineConfig(overlap=False), frozenset())
    params = SamplingParams(max_tokens=4, temperature=0.0)
    engine.add(AddRequest(request_id="a", prompt_ids=SHARED[:10], params=params))
    engine.step()
    assert engine.stats().pages["state"] == [14, 1, 1, 16]  # free, snapshots, of rows, all
    while engine.has_work:
        engine.step()
    assert engine.stats().pages["state"] == [15, 1, 0, 16]


# ---- the tests above can fail


class Forgetful(MockExecutor):
    """Leaves out the restores, the saves, or the zero state of a row that begins."""

    what = ""

    def submit(self, batch: StepBatch) -> None:
        working = {(name, int(s)) for name, slots in batch.state_slots.items() for s in slots}
        moves = [
            move
            for move in batch.moves
            if ("restore" if (move.group, move.target) in working else "save") != self.what
        ]
        object.__setattr__(batch, "moves", tuple(moves))
        super().submit(batch)

    def _advance(self, store: Any, values: Any, slot: int, new: Any) -> Any:
        if self.what == "zero" and not new[0]:
            return scan(store[slot], values)
        return super()._advance(store, values, slot, new)


@pytest.mark.parametrize(("what", "wrong"), [("restore", 2), ("save", 2), ("zero", 0)])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_left_out_changes_the_tokens(model: str, what: str, wrong: int) -> None:
    """The third request goes on from a snapshot; the first begins in a slot full of nonsense."""
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [SHARED + TOKENS[i][20:25] for i in (0, 1, 2)]
    arrivals = [Arrival(40 * i, prompt, params) for i, prompt in enumerate(prompts)]
    for fault in ("", what):
        info = mock_info(MODELS[model])
        executor = Forgetful(info)
        executor.what = fault
        heard = run(Engine(executor, info, EngineConfig(), frozenset({0})), arrivals)
        assert heard[2].cached == 16
        if not fault:
            compare(arrivals, heard, info)
            continue
        compare(arrivals[:wrong], heard[:wrong], info)
        with pytest.raises(Wrong):
            compare(arrivals[wrong : wrong + 1], heard[wrong : wrong + 1], info)
