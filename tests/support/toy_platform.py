"""A whole platform in pure numpy, outside the tree: the proof that the contracts suffice.

Its "model" remembers (token, position) in real pages, reads its context back through the page
tables of the step and derives logits from what it read, so a page lost, shared wrongly or
overwritten changes the text or raises. Config `script` makes it answer that text exactly after an
`assistant_token_id`; otherwise it babbles printable ASCII. Steps run in `collect`, so arrays that
were changed after `submit` show. The checkpoint comes from `toy_checkpoint.py`.
"""

from __future__ import annotations

import json
from collections import deque
from hashlib import blake2b
from pathlib import Path

import numpy as np
from toy_sampling import best, log_softmax, prompt_logprobs, sample

from sixfold.common.errors import ConfigError, PlatformError
from sixfold.platforms import interface as hw
from sixfold.platforms.interface_kernels import Suite
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.interface_step import StepBatch, StepResult, Want

FEATURES = "logprobs prompt_logprobs logit_bias penalties top_k top_p min_p seed grammar overlap"
DTYPES = frozenset({"float32"})
FACTS = hw.DeviceFacts("toy", "toy device", (), 2**20, True, 1, DTYPES, "none", "none", {})


class ToyPlatform:
    name = "toy"

    def probe(self, machine: hw.Machine) -> hw.Probe:
        return hw.Probe(True, 1, "pure numpy runs anywhere", ("numpy",), devices=(FACTS,))

    def supports(self, feature: str, facts: hw.DeviceFacts) -> hw.Support:
        known = feature in FEATURES.split()
        return hw.Support(hw.Status.YES if known else hw.Status.NO, f"toy: {feature} ({known})")

    def executor(self, spec: hw.EngineSpec, facts: hw.DeviceFacts) -> hw.Executor:
        return ToyExecutor(spec, facts)

    def conformance(self, facts: hw.DeviceFacts | None, interpreted: bool = False) -> Suite:
        raise PlatformError("The toy has no kernels: its model is plain numpy.")


class ToyExecutor:
    def __init__(self, spec: hw.EngineSpec, facts: hw.DeviceFacts) -> None:
        self.spec, self.facts, self.pending = spec, facts, deque[StepBatch]()
        self.last = np.full(spec.max_rows, -1, np.int32)  # by row handle: its newest token

    def load(self, progress: hw.LoadProgress | None = None) -> hw.ExecutorInfo:
        spec = self.spec
        self.config = config = json.loads((Path(spec.model_path) / "config.json").read_text())
        limit, size = config["max_position_embeddings"], spec.page_size or 16
        context = limit if spec.max_context is None else spec.max_context
        if context > limit or spec.dtype not in (None, "float32"):
            raise ConfigError(f"The toy has float32 and at most {limit} tokens of context.")
        pages = -(-(spec.cache_tokens or 8 * context) // size) + 1
        window = config.get("sliding_window") or 0
        full = KVGroup("full", KVKind.FULL, size, pages, 0, size * 8)
        local = KVGroup("window", KVKind.WINDOW, size, pages, window, size * 8)
        self.groups = (full, local) if window else (full,)
        self.pools = {g.name: np.full((pages, size, 2), -1, np.int32) for g in self.groups}
        self.script = [*config.get("script", "").encode(), config["eos_token_id"]]
        self.base = np.zeros(config["vocab_size"])  # how much each token is favoured
        self.base[32:127], self.base[ord("a") : ord("z") + 1], self.base[32] = 3, 6, 7
        self.base[config["eos_token_id"]] = 4.5
        features = {f: ToyPlatform().supports(f, self.facts) for f in FEATURES.split()}
        decisions = (hw.Decision("page size", str(size), "as set, else 16"),)
        model = (self.groups, config["vocab_size"], context)
        limits = (size, spec.max_rows, spec.max_step_tokens)
        rest = (self.facts, features, decisions)
        return hw.ExecutorInfo(*model, *limits, True, True, "float32", 0, pages * size * 8, *rest)

    def submit(self, batch: StepBatch) -> None:
        self.pending.append(batch)

    def collect(self) -> StepResult:
        if not self.pending:
            raise RuntimeError("no step is pending")
        batch = self.pending.popleft()
        for move in batch.moves:
            self.pools[move.group][move.target] = self.pools[move.group][move.source]
        tokens = batch.token_ids.copy()
        for r in range(batch.rows):  # all rows write before any row reads
            start, end = batch.query_start[r : r + 2]
            part = tokens[start:end]
            part[part < 0] = self.last[batch.row_ids[r]]
            positions = batch.context_lens[r] + np.arange(end - start)
            for group in self.groups:
                pages = batch.page_tables[group.name][r][positions // group.page_size]
                cells = np.stack([part, positions], 1)
                self.pools[group.name][pages, positions % group.page_size] = cells
        wanted = int(batch.sampling.logprobs.max(initial=-1))
        chosen, prompts = np.full((batch.rows, 1), -1, np.int32), []
        logprobs = np.zeros(batch.rows, np.float32)
        top_ids = np.zeros((batch.rows, max(wanted, 0)), np.int32)
        top = np.zeros(top_ids.shape, np.float32)
        for r in range(batch.rows):
            start, end = batch.query_start[r : r + 2]
            context = self.read(batch, r)
            raw = self.logits(context, end - start if batch.want[r] else 0)
            if batch.want[r] & Want.PROMPT_LOGPROBS:
                prompts.append(prompt_logprobs(batch, r, raw))
            if batch.want[r] & Want.SAMPLE:
                chosen[r] = self.last[batch.row_ids[r]] = sample(
                    raw[-1], batch, r, tokens[start:end]
                )
                logs = log_softmax(raw[-1])
                logprobs[r], top_ids[r] = logs[chosen[r, 0]], best(logs, top_ids.shape[1])
                top[r] = logs[top_ids[r]]
        accepted = (chosen[:, 0] >= 0).astype(np.int32)
        extra = (logprobs, top_ids, top) if wanted >= 0 else (None, None, None)
        return StepResult(batch.step, chosen, accepted, *extra, tuple(prompts))

    def read(self, batch: StepBatch, r: int) -> np.ndarray:
        """The row's tokens so far, out of its pages; every cell must be the one it should be."""
        held, context = {}, batch.context_lens[r]
        end = context + batch.query_start[r + 1] - batch.query_start[r]
        for group in self.groups:
            first = max(0, context - group.window + 1) if group.window else 0
            positions = np.arange(first, end)
            pages = batch.page_tables[group.name][r][positions // group.page_size]
            cells = self.pools[group.name][pages, positions % group.page_size]
            held[group.name] = cells[:, 0]
            wrong = (pages == 0).any() or (cells[:, 1] != positions).any()
            if wrong or not np.array_equal(held["full"][first:], held[group.name]):
                raise RuntimeError(f"row {r}: the pages of {group.name!r} do not hold its context")
        return held["full"]

    def logits(self, context: np.ndarray, count: int) -> np.ndarray:
        """(count, vocab) logits after each of the last `count` tokens, keyed by all up to it."""
        digest, rows = blake2b(digest_size=8), []
        answer = 1  # where the text being answered begins
        for i, token in enumerate(context):
            digest.update(int(token).to_bytes(4, "little"))
            answer = i + 1 if token == self.config["assistant_token_id"] else answer
            if i < len(context) - count:
                continue
            noise = np.random.default_rng(int.from_bytes(digest.digest(), "little"))
            rows.append(self.base + noise.standard_normal(len(self.base)))
            if len(self.script) > 1:
                rows[-1][self.script[min(i + 1 - answer, len(self.script) - 1)]] += 50
        return np.array(rows)

    def health(self) -> hw.Support:
        return hw.Support(hw.Status.YES, "pure numpy")

    def close(self) -> None:
        self.pending.clear()
