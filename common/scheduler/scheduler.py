"""The one scheduler: which rows run in the next step, with how many tokens and which pages.

Each step has a token budget. Rows that decode come first, then prompts that are under way, in
chunks, then waiting requests, whose longest cached prefix comes from the tree. When a decoding row
can get no page, the row of lowest priority that came last gives up its pages and is computed anew
later. In a model with recurrent groups chunks also end where a snapshot of the state is to stand.

Steps may overlap: `schedule` may be called again before the step before is `apply`ed. Devices run
steps in order, so pages may be released, and prefixes published, as soon as a step is scheduled.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator

from ...platforms.interface import ExecutorInfo
from ...platforms.interface_step import StepBatch, StepResult
from ..cache.kv_cache import KVCache
from ..cache.prefix_tree import Node
from ..config import EngineConfig
from ..errors import CacheCorrupted, QueueFull, RequestError
from ..messages import AddRequest, Output, TokenLogprobs
from ..telemetry.load import LoadCounters
from .admission import check_lengths, check_params, check_prompt
from .batch import BatchBuilder, Part, held
from .delivery import StepReader, extend_prompt_logprobs, message, no_token
from .images import ImageKeys, check_images
from .row import Row
from .speculation import Speculation
from .waiting import WaitingQueue


class Scheduler:
    """Owns every request from `add` to its last message, and the cache."""

    def __init__(
        self,
        info: ExecutorInfo,
        config: EngineConfig,
        eos_token_ids: frozenset[int],
        counters: LoadCounters,
    ) -> None:
        self._info = info
        self._eos = eos_token_ids
        self._counters = counters
        self._max_rows = min(info.max_rows, info.max_step_tokens)
        self._max_queue = config.max_queue
        self.cache = KVCache(
            info.groups, self._max_rows, info.max_context, config.prefix_cache, config.eviction
        )
        self._builder = BatchBuilder(self.cache)
        self.speculation: Speculation | None = None
        if config.draft is not None:
            given = config.draft, config, info, self.cache, counters
            self.speculation = Speculation(*given)
        self._image_keys = ImageKeys()
        self._open: dict[str, Row] = {}
        self._waiting = WaitingQueue()
        self._running: list[Row] = []  # in order of priority, then arrival
        self._steps: deque[tuple[StepBatch, list[Part]]] = deque()  # submitted, not collected
        self._arrivals = 0
        self._step = 0
        self._prefilled = False  # the last step computed prompts (where steps are not mixed)

    @property
    def in_flight(self) -> int:
        """Steps scheduled and not yet applied."""
        return len(self._steps)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def open_requests(self) -> list[str]:
        return list(self._open)

    # ---- requests

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError, ContextLengthExceeded or QueueFull."""
        if request.request_id in self._open:
            raise RequestError(
                f"A request with id {request.request_id!r} is already open.", "request_id"
            )
        prompt = check_prompt(request, self._info)
        check_params(request.params, self._info)
        limit = check_lengths(request, self._info, self.cache)
        # Rows that will start with the next step do not count as queued.
        if self.waiting >= self._max_queue + self._max_rows - self.running:
            raise QueueFull(self._max_queue)
        images = check_images(request, prompt, self._info, self._image_keys)
        row = Row(request, prompt, limit, self._arrivals, self._eos, images)
        self._arrivals += 1
        self._open[request.request_id] = row
        self._waiting.push(row)

    def abort(self, request_ids: Iterable[str]) -> list[Output]:
        """End requests now, also in the middle of a step; ids that are not open are ignored."""
        rows = [self._open[i] for i in dict.fromkeys(request_ids) if i in self._open]
        for row in rows:
            self._end(row, "abort")
        return [Output(request_id=row.request_id, finish_reason="abort") for row in rows]

    def _end(self, row: Row, reason: str) -> None:
        row.done = True
        if row.sequence is None:
            self._waiting.forget()
        else:
            self._leave(row)
        del self._open[row.request_id]
        self._counters.finish(reason)

    def _leave(self, row: Row) -> None:
        """Take a row out of the running ones; what it has computed stays in the tree."""
        self._publish(row, row.computed)
        self.cache.close(held(row))
        self._running.remove(row)

    def _publish(self, row: Row, end: int) -> None:
        self.cache.publish(held(row), row.keys[: min(row.known, end)], row.priority)

    # ---- choosing a step

    def schedule(self) -> StepBatch | None:
        """The next step; None when nothing can run now (with a step in flight: apply it first)."""
        speculation = self.speculation
        if self.in_flight > (1 if speculation is None else 0):
            return None
        for row in self._running:
            self.cache.slide(held(row), row.computed)
        parts = self._choose()
        while not parts:
            if parts is None or self.in_flight or not self._running:
                return None
            self._preempt(self._running[-1])  # prompts block one another
            parts = self._choose()
        wanted = None
        if speculation is not None:
            parts = speculation.extend(parts, self.running)
            wanted = speculation.wanted(parts, self.running)
        batch = self._builder.build(self._step, parts, self._running, wanted)
        self._step += 1
        self._steps.append((batch, parts))
        for part in parts:
            if part.samples:
                part.row.in_flight += 1
                part.row.decoding = True
            # With a state the row may have to go back and write the same places once more.
            back = bool(part.drafts and self.cache.recurrent)
            self._publish(part.row, part.start if back else part.row.computed)
        self.cache.states.settle()
        self.cache.check()
        return batch

    def _choose(self) -> list[Part] | None:
        """Rows for one step, none when no row can go on, None when steps in flight must end first.
        Where prompts and decoding may not share a step they take turns."""
        if self._info.mixed_steps:
            parts = self._decode()
            if parts is None:
                return None
            return parts + self._prefill(sum(part.count for part in parts))
        # A decoding row that was preempted in its turn leaves pages to the prompts.
        turns = [self._decode, self._prefill]
        for turn in turns if self._prefilled else [self._prefill, *turns]:
            parts = turn()
            if parts is None or parts:
                self._prefilled = turn == self._prefill
                return parts
        return []

    def _decode(self) -> list[Part] | None:
        """One token for every decoding row, and those that it must compute again; None when a row
        needs a page and must wait for steps in flight, since only a row without one can be
        preempted."""
        rows = [row for row in self._running if row.decoding and not row.exhausted]
        size = self.cache.page_size
        for row in rows:
            while row.sequence is not None and row.computed == row.sequence.pages * size:
                if self.cache.grow(row.sequence, 1):
                    break
                if self.in_flight:
                    return None
                self._preempt(self._running[-1])
        rows = [row for row in rows if row.sequence is not None]
        spare = self._info.max_step_tokens - len(rows)
        parts = []
        for row in rows:
            parts.append(self._take(row, min(row.known + row.in_flight - row.computed, 1 + spare)))
            spare -= parts[-1].count - 1
        return parts

    def _prefill(self, planned: int = 0) -> list[Part]:
        """Chunks of prompts, those under way first; `planned` tokens of the budget are spent."""
        budget = self._info.max_step_tokens - planned
        parts: list[Part] = []
        under_way = [row for row in self._running if not row.decoding]
        if self.cache.recurrent:
            # Before any of them leaves a snapshot, maybe in the slot of one that another waits for.
            for row in under_way:
                self._serve(row)
        for row in under_way:
            if not self._awaits(row):
                budget -= self._chunk(row, budget, parts)
        admissions = self._admissions()
        while budget > 0 and (new := next(admissions, None)) is not None:
            if self._awaits(new):
                continue
            taken = self._chunk(new, budget, parts)
            if not taken:
                break
            budget -= taken
        return parts

    def _admissions(self) -> Iterator[Row]:
        """Start waiting rows, one by one, while there is a place for a row and its whole prompt has
        room beside the running ones. A row that does not fit holds back those behind it; so does
        one whose slot is promised to a snapshot, until the next step."""
        root, states = self.cache.tree.root, self.cache.states
        while self.running < self._max_rows and states.has_room:
            row = self._waiting.first()
            if row is None:
                return
            tokens = row.keys[: row.known]
            nodes = [] if row.scores_prompt else self.cache.match(root, tokens).nodes
            if self._running and not self._fits(row, nodes):
                return
            self._waiting.pop()
            row.sequence = self.cache.open()
            insort(self._running, row, key=lambda r: r.order)
            yield row

    def _fits(self, row: Row, nodes: list[Node]) -> bool:
        """Whether every group has pages for the prompt, for the rest of the prompts under way, and
        one more for each running row, so that a new row does not at once push out an old one."""
        cache = self.cache
        under_way = [(r.known, held(r).pages) for r in self._running if not r.decoding]
        under_way.append((row.known, len(nodes)))
        for g in cache.paged:
            needed = sum(cache.pages_ahead(g, tokens, have) for tokens, have in under_way)
            if cache.pools[g].available - cache.unused(g, nodes) < needed + self.running:
                return False
        return True

    def _awaits(self, row: Row) -> bool:
        """Whether a row before it in this step computes what it needs, and leaves a snapshot that
        can be gone on from in the next. It waits only beside a row that gets on."""
        tokens = row.keys[: row.known]
        return not row.scores_prompt and self.cache.awaits(held(row), tokens, row.computed)

    def _chunk(self, row: Row, budget: int, parts: list[Part]) -> int:
        """Add to `parts` as much of a prompt as budget and pages allow, after whatever the tree has
        of it by now; returns the number of tokens. A chunk that does not end its prompt ends with a
        page, so that rows with equal prompts do not compute parts of the same page; only the
        first of a step may do otherwise, lest a small budget bring none on."""
        sequence, size = held(row), self.cache.page_size
        snapshot = self._serve(row)
        decoding = sum(1 for r in self._running if r.decoding)  # leave a page for each
        room = sequence.pages + max(0, self.cache.room() - decoding)
        end = min(snapshot or row.known, row.computed + budget, room * size)
        if end < row.known and (parts or end // size * size > row.computed):
            end = end // size * size
        more = max(0, self.cache.pages_for(end) - sequence.pages)
        if end <= row.computed or not self.cache.grow(sequence, more):
            return 0
        parts.append(self._take(row, end - row.computed))
        # At once, so that the next row of this very step can share the pages.
        self.cache.publish(sequence, row.keys[:end], row.priority, may_swap=False)
        if end == snapshot:
            self.cache.states.promise(sequence, row.keys[:end])
        return parts[-1].count

    def _serve(self, row: Row) -> int:
        """Take over what the tree has of a prompt by now; returns the token count at which to leave
        the next snapshot, 0 for none. A prompt that is scored neither finds nor leaves any."""
        if row.scores_prompt:
            return 0
        nodes, reach = self.cache.match(held(row).node, row.keys[: row.known])
        if nodes:
            self._adopt(row, nodes)
        return self.cache.next_snapshot(row.known, row.computed, reach)

    def _adopt(self, row: Row, nodes: list[Node]) -> None:
        sequence = held(row)
        self.cache.adopt(sequence, nodes, row.priority)
        end = sequence.pages * self.cache.page_size
        gained = max(0, min(end, row.prompt_length) - row.reached)
        row.cached += gained
        self._counters.cached_tokens += gained
        row.computed = end
        row.reached = max(row.reached, end)

    def _take(self, row: Row, count: int) -> Part:
        """Commit the next `count` positions of a row to the step under construction."""
        start, end = row.computed, row.computed + count
        row.computed = end
        row.reached = max(row.reached, end)
        self._counters.prompt_tokens += max(0, min(end, row.prompt_length) - start)
        return Part(row, start, count, end == row.known + row.in_flight)

    def _preempt(self, row: Row) -> None:
        """Send a running row back to the queue; its tokens stay, its pages go."""
        if self.running == 1:
            raise CacheCorrupted(
                f"Request {row.request_id} fits the cache alone and yet gets no page. This is a "
                f"bug; report it."
            )
        self._leave(row)
        row.restart()
        self._waiting.push(row)
        self._counters.preemptions += 1

    # ---- results

    def apply(self, result: StepResult) -> Iterator[Output]:
        """Take in the result of the oldest step in flight and give its messages, one by one, so
        that none is lost should a later row fail. Raises EngineDied when it does not fit."""
        batch, parts = self._steps.popleft()
        reader = StepReader(batch, result, self._info.vocab_size)
        self._counters.steps += 1
        self._counters.device_seconds += result.device_seconds
        for scores in result.prompt_logprobs:
            extend_prompt_logprobs(parts[scores.row], scores)
        for index, part in enumerate(parts):
            if part.samples:
                part.row.in_flight -= 1
                if not part.row.done:
                    yield self._advance(part, index, reader)

    def _advance(self, part: Part, index: int, reader: StepReader) -> Output:
        row, sampled = part.row, reader.tokens(index, part.drafts)
        if self.speculation is not None:
            self.speculation.settle(part, len(sampled))
            row.proposed = reader.proposed(index)
        taken: list[int] = []
        logprobs: list[TokenLogprobs] | None = None if row.params.logprobs is None else []
        for place, token in enumerate(sampled):
            if token is None:
                self._end(row, "error")
                return no_token(row, taken, logprobs)
            if token in row.stops:
                output = message(row, taken, logprobs, "stop", token)
                self._end(row, "stop")
                return output
            if logprobs is not None:
                logprobs.append(reader.logprobs(index, place, token, row.params.logprobs or 0))
            taken.append(token)
            row.append(token)
            self._counters.output_tokens += 1
        reason = "length" if row.known >= row.limit else None
        output = message(row, taken, logprobs, reason, None)
        if reason is not None:
            self._end(row, reason)
        elif self.speculation is not None:
            self.speculation.restore(part, len(sampled))
        return output
