"""Prometheus metrics, in the names and units of the ecosystem, with the prefix `sixfold_`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..common.messages import EngineStats

# Clients need no second series that says when each counter was made.
disable_created_metrics()

_TTFT = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_E2E = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class _EngineCollector(Collector):
    """Reads the newest EngineStats at scrape time."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats() or EngineStats(
            waiting=0, running=0, pages={}, steps=0, prompt_tokens=0, cached_tokens=0,
            output_tokens=0, preemptions=0, finished={}, step_seconds=0.0, device_seconds=0.0,
        )  # fmt: skip
        yield _gauge("num_requests_running", "Sequences in the running batch.", stats.running)
        yield _gauge("num_requests_waiting", "Sequences waiting for a place.", stats.waiting)
        usage = GaugeMetricFamily(
            "sixfold_kv_cache_usage_ratio",
            "Pages in use, 0 to 1; slots where a group is recurrent.",
            labels=["group"],
        )
        pages = GaugeMetricFamily(
            "sixfold_kv_cache_pages",
            "Pages; slots where a group is recurrent, cached ones being snapshots.",
            labels=["group", "state"],
        )
        for group, (free, evictable, pinned, total) in stats.pages.items():
            usage.add_metric([group], pinned / total if total else 0.0)
            for state, count in (("free", free), ("cached", evictable), ("in_use", pinned)):
                pages.add_metric([group, state], count)
        yield usage
        yield pages
        asked = stats.prompt_tokens + stats.cached_tokens
        yield _counter("prompt_tokens", "Prompt tokens, cached ones included.", asked)
        yield _counter("cached_tokens", "Prompt tokens from the prefix cache.", stats.cached_tokens)
        yield _counter("generation_tokens", "Tokens generated.", stats.output_tokens)
        yield _counter("num_preemptions", "Sequences that had to be recomputed.", stats.preemptions)
        yield _counter("draft_tokens", "Tokens guessed and verified.", stats.drafted_tokens)
        yield _counter("accepted_draft_tokens", "Guesses that were right.", stats.accepted_drafts)
        yield _counter("engine_steps", "Steps run.", stats.steps)
        yield _counter("engine_step_seconds", "Time spent in steps.", stats.step_seconds)
        yield _counter("engine_device_seconds", "Time the device worked.", stats.device_seconds)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"sixfold_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"sixfold_{name}", text, value=value)


class Metrics:
    """One registry per server; nothing global."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.stats: Callable[[], EngineStats | None] = lambda: None
        self._registry.register(_EngineCollector(lambda: self.stats()))
        self.finished = Counter(
            "sixfold_request_success",
            "Choices finished, by reason.",
            ["finished_reason"],
            registry=self._registry,
        )
        self.http = Counter(
            "sixfold_http_requests",
            "HTTP requests answered.",
            ["path", "status"],
            registry=self._registry,
        )
        self.aborted = self._plain("request_aborted", "Requests whose client went away.")
        self.first_token = self._seconds("time_to_first_token", "Until a first token.", _TTFT)
        self.between_tokens = self._seconds("inter_token_latency", "Between tokens.", _ITL)
        self.whole = self._seconds("e2e_request_latency", "Whole requests.", _E2E)

    def _plain(self, name: str, text: str) -> Counter:
        return Counter(f"sixfold_{name}", text, registry=self._registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sixfold_{name}_seconds", text, buckets=buckets, registry=self._registry)

    def render(self) -> bytes:
        return generate_latest(self._registry)
