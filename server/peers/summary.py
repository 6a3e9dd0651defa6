"""From outcomes to the figures of the table: medians, percentiles, likeness, ratios."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..load import percentile
from .client import Outcome, Reply
from .rounds import Results
from .workloads import PREFILL_SIZES

OURS = "sixfold"
"""The peer that ratios are about. Others whose names begin so are it with an option changed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One peer in one workload, or in one size of P ("P 512"). None: there is no such figure."""

    workload: str
    peer: str
    requests: int
    errors: int
    first_error: str | None
    tokens_per_s: float | None  # output tokens; the median of the rounds
    ttft_p50_s: float | None  # over the requests of all rounds
    ttft_p99_s: float | None
    decode_tokens_per_s: float | None  # A: without the prompt's share
    likeness: float | None  # of its texts to the first peer's, 1 = all equal
    cached_share: float | None  # of the prompt tokens, as the server reports it
    ratio: float | None = None  # Sixfold's row: above 1, it is ahead of the best peer


@dataclass(frozen=True, slots=True)
class Start:
    """S of one peer; nothing for a server that ran already."""

    peer: str
    cold_start_s: float | None
    resident_bytes: int | None
    cold_start_ratio: float | None = None
    resident_ratio: float | None = None


def rows(results: Results) -> list[Row]:
    """By workload, then by peer. Requests that failed count as errors and nowhere else."""
    if not results:
        return []
    first = next(iter(results))
    table: list[Row] = []
    for workload in results[first]:
        if workload == "P":
            for index, size in enumerate(PREFILL_SIZES):
                part = {name: _part(runs["P"], index) for name, runs in results.items()}
                table += _ratios(_rows(f"P {size}", part, first), _earliness)
        else:
            part = {name: runs[workload] for name, runs in results.items()}
            table += _ratios(_rows(workload, part, first), _throughput)
    return table


def starts(measured: Mapping[str, tuple[float, int] | None]) -> list[Start]:
    """peer -> (seconds from launch to first token, bytes) to its row, with ratios."""
    table = [
        Start(name, *figures) if figures else Start(name, None, None)
        for name, figures in measured.items()
    ]

    def ratio(figure: Callable[[Start], float | None]) -> float | None:
        return _against_best({s.peer: _inverse(figure(s)) for s in table})

    return [
        replace(
            start,
            cold_start_ratio=ratio(lambda s: s.cold_start_s),
            resident_ratio=ratio(lambda s: s.resident_bytes),
        )
        if start.peer == OURS
        else start
        for start in table
    ]


def likeness(texts: Sequence[Reply], others: Sequence[Reply]) -> float | None:
    """Mean similarity of the answers to the same prompts; None when none of them came."""
    alike = [
        _similarity(a.text, b.text)
        for a, b in zip(texts, others, strict=True)
        if a.error is None and b.error is None
    ]
    return statistics.mean(alike) if alike else None


def _similarity(a: str, b: str) -> float:
    return 1.0 if a == b else difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def _part(outcomes: Sequence[Outcome], index: int) -> list[Outcome]:
    """Only the request of one prompt length."""
    return [replace(outcome, replies=outcome.replies[index : index + 1]) for outcome in outcomes]


def _rows(label: str, outcomes: Mapping[str, list[Outcome]], first: str) -> list[Row]:
    return [_row(label, name, runs, outcomes[first]) for name, runs in outcomes.items()]


def _row(label: str, peer: str, runs: list[Outcome], reference: list[Outcome]) -> Row:
    replies = [reply for run in runs for reply in run.replies]
    good = [reply for run in runs for reply in run.good]
    ttft = [reply.first_s for reply in good]
    alike = [likeness(a.replies, b.replies) for a, b in zip(runs, reference, strict=True)]
    whole_run = not label.startswith("P")
    return Row(
        workload=label,
        peer=peer,
        requests=len(replies),
        errors=len(replies) - len(good),
        first_error=next((reply.error for reply in replies if reply.error), None),
        tokens_per_s=statistics.median(r.tokens_per_s for r in runs)
        if good and whole_run
        else None,
        ttft_p50_s=percentile(ttft, 0.5) if good else None,
        ttft_p99_s=percentile(ttft, 0.99) if good else None,
        decode_tokens_per_s=_median([r.decode_tokens_per_s for r in good])
        if label == "A"
        else None,
        likeness=_median(alike),
        cached_share=_cached_share(good),
    )


def _median(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def _cached_share(replies: Sequence[Reply]) -> float | None:
    counted = [
        (reply.cached_tokens, reply.prompt_tokens)
        for reply in replies
        if reply.cached_tokens is not None and reply.prompt_tokens
    ]
    prompt = sum(tokens for _, tokens in counted)
    return sum(cached for cached, _ in counted) / prompt if prompt else None


def _throughput(row: Row) -> float | None:
    return row.tokens_per_s


def _earliness(row: Row) -> float | None:
    return _inverse(row.ttft_p50_s)


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def _ratios(part: list[Row], score: Callable[[Row], float | None]) -> list[Row]:
    """Whoever failed a request takes no part: fewer requests are served sooner."""
    ratio = _against_best({row.peer: None if row.errors else score(row) for row in part})
    return [replace(row, ratio=ratio) if row.peer == OURS else row for row in part]


def _against_best(scores: Mapping[str, float | None]) -> float | None:
    """Sixfold's score (more is better) over the best one of the peers that are not Sixfold."""
    ours = scores.get(OURS)
    others = [s for name, s in scores.items() if s is not None and not name.startswith(OURS)]
    return ours / max(others) if ours is not None and others else None
