"""An executor in numpy whose "model" is a hash, so that any wrong page changes the tokens.

It has two layers. Each stores one 64-bit value per token in the pages of every cache group, exactly
where a device would, and "attends" by adding up the values that it reads back through the row's
page table (of a window group only the window). Layer 2 stores what layer 1 read, so a page that was
wrong for one moment leaves its mark. A recurrent group has one 64-bit state per layer and slot, a
running hash of all tokens. `mock_model.alone` is the oracle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from support.mock_model import U64, attend, embed, log_softmax, logits_of, row_sampling, scan

from sixfold.platforms.interface import DeviceFacts, ExecutorInfo, Status, Support
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.interface_step import (
    LAST_TOKEN,
    PromptLogprobs,
    SamplingArrays,
    StepBatch,
    StepResult,
    Want,
)

FULL, WINDOW, RECURRENT = KVKind.FULL, KVKind.WINDOW, KVKind.RECURRENT


class MockFault(Exception):
    """The engine broke the contract of the step."""


def group(name: str, pages: int, page_size: int, window: int = 0) -> KVGroup:
    """`pages` usable ones; the null page comes on top."""
    return KVGroup(name, WINDOW if window else FULL, page_size, pages + 1, window)


def state(name: str, slots: int, page_size: int) -> KVGroup:
    """A recurrent group of `slots` usable slots."""
    return KVGroup(name, RECURRENT, page_size, slots + 1)


def mock_info(groups: Sequence[KVGroup], **changes: Any) -> ExecutorInfo:
    facts = DeviceFacts("mock", "mock", (), 0, True, 1, frozenset(), "none", "none", {})
    values: dict[str, Any] = {
        "groups": tuple(groups),
        "vocab_size": 32,
        "max_context": 256,
        "page_size": groups[0].page_size,
        "max_rows": 8,
        "max_step_tokens": 64,
        "overlap": True,
        "mixed_steps": True,
        "dtype": "float32",
        "weight_bytes": 0,
        "cache_bytes": 0,
        "device": facts,
        "features": MappingProxyType({"drafts": Support(Status.YES)}),
        "decisions": (),
    }
    return ExecutorInfo(**{**values, **changes})


class MockExecutor:
    """`lazy`: steps are computed at `collect` and not at `submit`; both must give the same."""

    def __init__(self, info: ExecutorInfo, lazy: bool = True) -> None:
        self.info = info
        self.lazy = lazy
        self.batches: list[StepBatch] = []
        self.computed = 0  # positions computed in all steps
        self.depth = 0  # most steps ever in flight
        self.fail_at: int | None = None  # step whose collect raises
        self.closed = False
        self._pending: deque[tuple[StepBatch, bytes, StepResult | None]] = deque()
        self._last: dict[int, tuple[int, int]] = {}  # handle -> last sampled token, its position
        self._promised: dict[int, tuple[int, int]] = {}  # handle -> next token, as told; its place
        self._poison = np.random.default_rng(0)
        per_page = [1 if g.kind is RECURRENT else g.page_size for g in info.groups]
        shapes = [(2, g.pages * n) for g, n in zip(info.groups, per_page, strict=True)]
        self._stores = [self._poison.integers(0, 2**63, s).astype(U64) for s in shapes]

    def load(self, progress: Any = None) -> ExecutorInfo:
        return self.info

    def health(self) -> Support:
        return Support(Status.YES)

    def close(self) -> None:
        self.closed = True

    def submit(self, batch: StepBatch) -> None:
        self._check(batch)
        self.batches.append(batch)
        self._pending.append((batch, _bytes(batch), None if self.lazy else self._run(batch)))
        self.depth = max(self.depth, len(self._pending))
        if self.depth > (2 if self.info.overlap else 1):
            raise MockFault("too many steps in flight")

    def collect(self) -> StepResult:
        if not self._pending:
            raise RuntimeError("no step is pending")
        batch, content, result = self._pending.popleft()
        if self.fail_at == batch.step:
            raise RuntimeError("the device is gone")
        if _bytes(batch) != content:
            raise MockFault("the arrays of a step changed while it was in flight")
        return self._run(batch) if result is None else result

    def spoil(self, group: int, slots: Sequence[int]) -> None:
        """Put nonsense into slots of a recurrent group that nobody may read."""
        self._stores[group][:, slots] = self._poison.integers(0, 2**63, (2, len(slots)))

    def _check(self, b: StepBatch) -> None:
        counts = np.diff(b.query_start)
        ok = (
            b.query_start[0] == 0
            and (counts >= 1).all()
            and len(b.token_ids) == b.query_start[-1] <= self.info.max_step_tokens
            and 1 <= b.rows <= self.info.max_rows
            and len(set(b.row_ids.tolist())) == b.rows
            and ((b.row_ids >= 0) & (b.row_ids < self.info.max_rows)).all()
            and len(b.context_lens) == len(b.want) == b.rows
            and set(b.page_tables) == {g.name for g in self.info.groups if g.kind != RECURRENT}
            and set(b.state_slots) == {g.name for g in self.info.groups if g.kind == RECURRENT}
            and all(len(t) == b.rows for t in b.page_tables.values())
            and all(len(set(s.tolist()) - {0}) == b.rows for s in b.state_slots.values())
            and (b.context_lens + counts <= self.info.max_context).all()
            and len(b.sampling.temperature) == b.line_start[-1]
            and (b.draft_counts is None or (b.draft_counts < counts).all())
        )
        if not ok:
            raise MockFault(f"step {b.step} is malformed")
        if not self.info.mixed_steps and (b.token_ids == LAST_TOKEN).any() and counts.max() > 1:
            raise MockFault("a step mixes prompts and decoding")

    def _slots(self, b: StepBatch, g: int, row: int, end: int) -> Any:
        spec = self.info.groups[g]
        if spec.kind is RECURRENT:
            return b.state_slots[spec.name][row : row + 1]
        positions = np.arange(end)
        table = b.page_tables[spec.name][row]
        return table[positions // spec.page_size] * spec.page_size + positions % spec.page_size

    def _move(self, b: StepBatch) -> None:
        recurrent = {g.name: i for i, g in enumerate(self.info.groups) if g.kind is RECURRENT}
        for move in b.moves:
            store = self._stores[recurrent[move.group]]
            if not (0 < move.source < store.shape[1] and 0 < move.target < store.shape[1]):
                raise MockFault(f"{move} is of no slot")
            store[:, move.target] = store[:, move.source]

    def _run(self, b: StepBatch) -> StepResult:
        self._move(b)
        ends = (b.context_lens + np.diff(b.query_start)).tolist()
        news = [np.arange(c, e) for c, e in zip(b.context_lens.tolist(), ends, strict=True)]
        slots = [
            [self._slots(b, g, r, ends[r]) for g in range(len(self._stores))] for r in range(b.rows)
        ]
        self.computed += sum(map(len, news))
        tokens, pending = self._resolve(b, news)
        self._check_promises(b, tokens)
        first = self._embed(b, tokens, news)
        states = self._write(0, first, slots, news)
        hidden = [self._read(0, slots[r], news[r], states[r]) for r in range(b.rows)]
        states = self._write(1, hidden, slots, news)
        return self._results(b, slots, news, pending, states)

    def _embed(self, b: StepBatch, tokens: list[Any], news: list[Any]) -> list[Any]:
        return [embed(t, n) for t, n in zip(tokens, news, strict=True)]

    def _resolve(self, b: StepBatch, news: list[Any]) -> tuple[list[Any], list[int | None]]:
        """Token ids per row, and the pending token of rows that have one."""
        tokens, pending = [], []
        for r, handle in enumerate(b.row_ids.tolist()):
            ids = b.token_ids[b.query_start[r] : b.query_start[r + 1]].copy()
            last = None
            if ids[0] == LAST_TOKEN:
                last, position = self._last.get(handle, (-1, -1))
                if position != news[r][0]:
                    raise MockFault("LAST_TOKEN of a row that sampled nothing in its last step")
                ids[0] = last
            if (ids < 0).any():
                raise MockFault("LAST_TOKEN is not the only new token of its row")
            tokens.append(ids)
            pending.append(last)
        return tokens, pending

    def _check_promises(self, b: StepBatch, tokens: list[Any]) -> None:
        """What was told of the next token must come true, where the row goes on from there. For
        rows that keep their handles: none is given up or preempted."""
        pairs = zip(b.row_ids.tolist(), b.context_lens.tolist(), strict=True)
        for r, (handle, context) in enumerate(pairs):
            token, place = self._promised.pop(handle, (-1, -1))
            if place == context and context and token != tokens[r][0]:
                raise MockFault(f"row {r} goes on with {tokens[r][0]}, not with {token} as told")
            told = -1 if b.next_tokens is None else int(b.next_tokens[r])
            if told >= 0:
                self._promised[handle] = told, context + len(tokens[r])

    def _write(self, layer: int, values: Any, slots: Any, news: Any) -> list[dict[int, Any]]:
        """Returns per row, for each recurrent group, the states at the new positions."""
        states: list[dict[int, Any]] = [{} for _ in values]
        for g, store in enumerate(self._stores):
            if self.info.groups[g].kind is RECURRENT:
                for r, new in enumerate(news):
                    states[r][g] = self._advance(store[layer], values[r], int(slots[r][g][0]), new)
                store[layer, 0] = self._poison.integers(0, 2**63)  # the null slot
                continue
            new_slots = np.concatenate([s[g][n] for s, n in zip(slots, news, strict=True)])
            size = self.info.groups[g].page_size
            real = new_slots[new_slots >= size]
            if len(np.unique(real)) != len(real):
                raise MockFault("two rows write to one slot")
            store[layer, new_slots] = np.concatenate(values)
            store[layer, :size] = self._poison.integers(0, 2**63, size)  # the null page
        return states

    def _advance(self, store: Any, values: Any, slot: int, new: Any) -> Any:
        """(L,) the states after each token; of the context nobody needs them."""
        states = scan(store[slot] if new[0] else U64(0), values)
        store[slot] = states[-1]
        return np.concatenate([np.zeros(new[0], U64), states])

    def _read(self, layer: int, slots: Any, queries: Any, states: dict[int, Any]) -> Any:
        pairs = enumerate(zip(self._stores, slots, strict=True))
        values = [states[g] if g in states else store[layer, s] for g, (store, s) in pairs]
        return attend(values, queries, self.info.groups)

    def _results(
        self, b: StepBatch, slots: Any, news: Any, pending: Any, states: Any
    ) -> StepResult:
        vocab, s = self.info.vocab_size, b.sampling
        width = max(0, int(s.logprobs.max()))
        starts = b.line_start
        ids = np.full((b.rows, int(np.diff(starts).max())), -1, np.int32)
        accepted = np.zeros(b.rows, np.int32)
        logprobs = np.zeros(starts[-1], np.float32)
        top_ids = np.zeros((starts[-1], width), np.int32)
        top_logprobs = np.zeros((starts[-1], width), np.float32)
        prompts = []
        for r in range(b.rows):
            if b.want[r] & Want.PROMPT_LOGPROBS:
                logits = logits_of(self._read(1, slots[r], news[r], states[r]), vocab)
                prompts.append(self._prompt_logprobs(b, r, logits))
            if b.want[r] & Want.SAMPLE:
                count = int(starts[r + 1] - starts[r])
                last = self._read(1, slots[r], news[r][-count:], states[r])
                tokens, raw = self._choose(b, r, logits_of(last, vocab), pending[r])
                lines = slice(starts[r], starts[r] + len(tokens))
                best = np.argsort(-raw, axis=1, kind="stable")[:, :width]
                accepted[r], ids[r, : len(tokens)] = len(tokens), tokens
                logprobs[lines] = raw[np.arange(len(tokens)), tokens]
                top_ids[lines], top_logprobs[lines] = best, np.take_along_axis(raw, best, 1)
                where = int(news[r][-1]) + 1 - count + len(tokens)
                self._last[int(b.row_ids[r])] = (tokens[-1], where)
        asked = bool((s.logprobs >= 0).any())
        return StepResult(
            step=b.step,
            token_ids=ids,
            accepted=accepted,
            logprobs=logprobs if asked else None,
            top_ids=top_ids if asked else None,
            top_logprobs=top_logprobs if asked else None,
            prompt_logprobs=tuple(prompts),
            device_seconds=0.001,
            drafts=self._drafts(b, slots),
        )

    def _choose(self, b: StepBatch, r: int, logits: Any, pending: int | None) -> Any:
        """The row's samples that count, and their log-probabilities (n, vocabulary)."""
        end, first = int(b.query_start[r + 1]), int(b.line_start[r])
        drafts = b.token_ids[end - len(logits) + 1 : end].tolist()
        tokens: list[int] = []
        while tokens == drafts[: len(tokens)] and len(tokens) < len(logits):
            place = len(tokens)
            tokens.append(row_sampling(b.sampling, first + place, pending).choose(logits[place]))
        return tokens, log_softmax(logits[: len(tokens)])

    def _drafts(self, b: StepBatch, slots: Any) -> Any:
        """A head whose guesses are seldom right; they need places, as its keys would."""
        if b.drafts_wanted is None:
            return None
        made = self._poison.integers(0, 3, (b.rows, int(b.drafts_wanted.max()))).astype(np.int32)
        for r, wanted in enumerate(b.drafts_wanted.tolist()):
            end = int(b.context_lens[r] + b.query_start[r + 1] - b.query_start[r]) + wanted - 1
            for spec in self.info.groups:
                if wanted and spec.kind is not RECURRENT:
                    last = b.page_tables[spec.name][r][(end - 1) // spec.page_size]
                    if not last:
                        raise MockFault("drafts are wanted that have no place in the cache")
            made[r, wanted:] = -1
        return made

    def _prompt_logprobs(self, b: StepBatch, r: int, logits: Any) -> PromptLogprobs:
        if b.prompt_targets is None:
            raise MockFault("prompt log-probabilities without targets")
        targets = b.prompt_targets[b.query_start[r] : b.query_start[r + 1]]
        raw = log_softmax(logits)[targets >= 0]
        targets = targets[targets >= 0]
        best = np.argsort(-raw, axis=1, kind="stable")[:, : int(b.sampling.logprobs[r])]
        chosen = np.take_along_axis(raw, targets[:, None].astype(np.int64), 1)[:, 0]
        return PromptLogprobs(
            r, chosen, best.astype(np.int32), np.take_along_axis(raw, best, 1).astype(np.float32)
        )


def _bytes(b: StepBatch) -> bytes:
    arrays = [b.row_ids, b.token_ids, b.query_start, b.context_lens, b.want]
    arrays += [*b.page_tables.values(), *b.state_slots.values()]
    arrays += [getattr(b.sampling, name) for name in SamplingArrays.__dataclass_fields__]
    return b"".join(a.tobytes() for a in arrays)
