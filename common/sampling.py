"""Sampling parameters of a request, as the engine takes them (already validated by type)."""

from __future__ import annotations

import math

import msgspec

from .errors import RequestError


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides which tokens a request gets. Stop strings are applied where text
    exists (common/text), not here."""

    max_tokens: int | None = None  # None = up to the context limit
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0  # always set by the caller: a request without a seed gets a random one
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None = none, n = chosen and n best
    prompt_logprobs: int | None = None

    def validate(self, vocab_size: int, max_logprobs: int) -> None:
        """Raises RequestError naming the first field out of range."""

        def need(ok: bool, field: str, want: str) -> None:
            if not ok:
                raise RequestError(
                    f"{field} must be {want}, got {getattr(self, field)!r}.", field, "invalid_value"
                )

        def finite(x: float) -> bool:
            return math.isfinite(x)

        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        need(self.min_tokens >= 0, "min_tokens", "at least 0")
        limit = self.max_tokens
        need(
            limit is None or self.min_tokens <= limit, "min_tokens", f"at most max_tokens ({limit})"
        )
        need(finite(self.temperature) and 0 <= self.temperature <= 2, "temperature", "in [0, 2]")
        need(0 <= self.top_k <= 2**31 - 1, "top_k", "0 (off) or a positive integer")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        penalty = self.repetition_penalty
        need(finite(penalty) and 0 < penalty <= 10, "repetition_penalty", "in (0, 10]")
        need(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        need(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        need(-(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        bias = self.logit_bias
        need(
            all(0 <= t < vocab_size for t in bias),
            "logit_bias",
            f"keyed by ids in 0..{vocab_size - 1}",
        )
        need(all(-100 <= v <= 100 for v in bias.values()), "logit_bias", "valued in [-100, 100]")
        stops = self.stop_token_ids
        need(
            all(0 <= t < vocab_size for t in stops), "stop_token_ids", f"ids in 0..{vocab_size - 1}"
        )
        for field in ("logprobs", "prompt_logprobs"):
            n = getattr(self, field)
            need(n is None or 0 <= n <= max_logprobs, field, f"in 0..{max_logprobs}")
