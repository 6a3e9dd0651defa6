"""What crosses between the shared engine and an executor at every step. Plain numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

LAST_TOKEN = -1
"""In `StepBatch.token_ids`: the token that this row sampled in its previous step."""


class Want(IntFlag):
    """What a row wants from a step."""

    NOTHING = 0
    SAMPLE = 1  # one token from the logits of the row's last position, and one before each draft
    PROMPT_LOGPROBS = 2  # log-probabilities of `prompt_targets` at every position of the row


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy one page, or one slot of a RECURRENT group, inside a group before the step runs."""

    group: str
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepImage:
    """A run of an image's rows: row `first` and on replace the embeddings of `count` tokens of the
    step, from `token` on. An image may be cut over steps; each of them brings it whole."""

    key: int  # of the image: equal pixels have equal keys, others never
    grid: tuple[int, int, int]  # patches: frames, down, across
    patches: F32  # (frames * down * across, values of a patch), see `ImageInput`
    first: int
    token: int
    count: int


@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """Sampling parameters of the R rows of a step, as arrays of length R unless stated. In a step
    with drafts a row has a line for each token that it samples: R is then the number of lines.

    Order of application (fixed, see `common/ops/sample.py`): logit bias, repetition, presence and
    frequency penalty, grammar mask, temperature, top-k, top-p, min-p, the draw by `uniform`.
    Log-probabilities are of the raw logits, before all of these.
    """

    temperature: F32  # 0 = greedy (lowest id wins a tie)
    top_k: I32  # 0 = off
    top_p: F32  # 1 = off
    min_p: F32  # 0 = off
    repetition_penalty: F32  # 1 = off; over prompt and output
    presence_penalty: F32  # 0 = off; over output
    frequency_penalty: F32  # 0 = off; over output
    uniform: NDArray[np.float64]  # the draw in [0, 1), from (seed, position)
    # -1 = none, n = the chosen token and the n best. For a row with PROMPT_LOGPROBS it is the
    # larger of both counts: the scheduler trims either to what was asked.
    logprobs: I32
    bias_start: I32  # (R+1,) offsets into bias_ids / bias_values; -inf bans a token
    bias_ids: I32
    bias_values: F32
    # Tokens so far of rows that have a penalty (empty range for others); a pending LAST_TOKEN is
    # not among them: the executor adds it to the output part.
    prompt_start: I32  # (R+1,)
    prompt_ids: I32
    output_start: I32  # (R+1,)
    output_ids: I32


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step. R rows, T new tokens in all, each row has n >= 1 of them.

    Guarantee that executors give: within a step, and per layer, all new keys and values are written
    before any row attends; so a row may read pages that another row of the same step writes.
    Page 0 of every group is the null page: never read for its value, free to be written to.

    In a RECURRENT group a row has one slot and no pages. With context_lens 0 it begins from the
    zero state, whatever the slot holds; otherwise from what the slot holds once the moves are done.
    After the step the slot holds the state after the row's new tokens. The slots of a step differ.

    Moves take effect one after the other, in order, after the step before and before this one: one
    may copy from the target of an earlier one. A snapshot is saved by a move in the next step that
    is scheduled, even if the row is not in it or has ended; it is restored, into a row's slot, by a
    move in that row's own step or an earlier one.
    """

    step: int
    row_ids: I32  # (R,) stable handle of each sequence, 0 <= handle < max_rows
    token_ids: I32  # (T,) LAST_TOKEN = what this row sampled last
    query_start: I32  # (R+1,)
    context_lens: I32  # (R,) tokens already in the cache before this step
    # FULL and WINDOW groups -> (R, P); 0 = padding, or released by a window group
    page_tables: Mapping[str, I32]
    want: U8  # (R,) Want flags
    sampling: SamplingArrays
    state_slots: Mapping[str, I32] = field(default_factory=dict)  # RECURRENT groups -> (R,)
    moves: tuple[PageCopy, ...] = ()
    grammar_mask: U32 | None = None  # (R or lines, ceil(V/32)), bit set = allowed
    prompt_targets: I32 | None = None  # (T,) the next prompt token of each position, -1 = none
    # (T, W) bool, W the most new tokens of a row: which of its row's new tokens a new token sees,
    # itself always, later ones never; None = all up to itself. Context is seen in any case.
    tree_mask: NDArray[np.bool_] | None = None
    images: tuple[StepImage, ...] = ()
    # Keys of images that no row of a later step is known to need: what is kept of them may go.
    images_done: tuple[int, ...] = ()
    # (3, T) rotary positions (time, height, width) where a row of the step has images; None: a
    # token's position is its place in its row. Caches go by the place in any case.
    rotary: I32 | None = None
    # (R,) how many of a row's last new tokens are drafts, which may be wrong; None = none at all.
    # Row r then samples 1 + draft_counts[r] tokens, each as its own line of `sampling` says: one in
    # place of every draft, by what is before it, and one behind the last.
    draft_counts: I32 | None = None
    # (R,) most drafts that the model's head is to make for what follows the row's last token, whose
    # places in the cache the row has; and the token after its new ones where that is known, -1: the
    # one that it samples. Both where the head drafts.
    drafts_wanted: I32 | None = None
    next_tokens: I32 | None = None

    @property
    def rows(self) -> int:
        return len(self.row_ids)

    @property
    def line_start(self) -> I32:
        """(R+1,) where each row's lines of `sampling` begin."""
        if self.draft_counts is None:
            return np.arange(self.rows + 1, dtype=np.int32)
        return np.concatenate(([0], np.cumsum(1 + self.draft_counts))).astype(np.int32)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of one row's prompt targets, for its positions that have a target (n)."""

    row: int  # index into the step's rows
    token_logprobs: F32  # (n,)
    top_ids: I32  # (n, K), best first
    top_logprobs: F32  # (n, K)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Rows are those of the StepBatch of the same `step`; rows that did not sample hold -1.

    Of a row's samples those count whose drafts before them are what was sampled in their place:
    the first ones, up to and with the first that differs from its draft.
    """

    step: int
    token_ids: I32  # (R, k) sampled tokens, -1 behind those that count; k = 1 without drafts
    accepted: I32  # (R,) how many of the k are real (0 for rows that did not sample)
    # By lines of `sampling`, L of them, which are rows where there are no drafts.
    logprobs: F32 | None = None  # (L,) of the sampled token; None when no row asked
    top_ids: I32 | None = None  # (L, K)
    top_logprobs: F32 | None = None  # (L, K)
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    device_seconds: float = 0.0
    drafts: I32 | None = None  # (R, K) what the head made of `drafts_wanted`, -1 behind them
