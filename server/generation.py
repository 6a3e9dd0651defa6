"""From checked sequences to text: what chat and text completions have in common."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..common.messages import Image, Output, TokenLogprobs
from ..common.sampling import SamplingParams
from ..common.text.output import OutputText, TextDelta
from .engine_client import Wanted
from .errors import ApiError, bad_request, engine_gone
from .protocol import Sampled
from .seeds import nth_seed, random_seed
from .service import Service, check_length, check_sampling


def sampling(body: Sampled, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """The engine's parameters; a field that was left out or is null has its default."""
    fields = (
        "frequency_penalty presence_penalty temperature top_p top_k min_p repetition_penalty "
        "min_tokens ignore_eos prompt_logprobs"
    ).split()
    given = {name: getattr(body, name) for name in fields if getattr(body, name) is not None}
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        logprobs=logprobs,
        seed=random_seed() if body.seed is None else body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logit_bias={int(key): value for key, value in (body.logit_bias or {}).items()},
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the request's field that they came from."""

    ids: list[int]
    param: str
    text: str = ""  # for an echo, and how a chat's answer begins
    images: Sequence[Image] = ()


@dataclass(slots=True)
class Choice:
    """One sequence of a request while it runs."""

    index: int
    prompt: Prompt
    text: OutputText
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    arrived: float = 0.0  # time of the last tokens, 0 before the first


Event = tuple[Choice, TextDelta]


class Run:
    """A request in the engine. `events` until it gives []; `close` in every case."""

    def __init__(
        self,
        service: Service,
        body: Sampled,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        shown: Collection[str] = (),
    ) -> None:
        """Checks everything, then queues n sequences per prompt; special tokens in `shown` are part
        of the text. Raises RequestError, ApiError."""
        loaded = service.loaded
        check_sampling(params, loaded.ready)
        n = body.n or 1
        if len(prompts) * n > loaded.ready.max_queue:
            raise bad_request(
                f"This asks for {len(prompts) * n} sequences; at most {loaded.ready.max_queue} "
                "(--max-queue) fit in one request.",
                "n" if n > 1 else "prompt",
                "invalid_value",
            )
        for prompt in prompts:
            check_length(prompt.ids, params, loaded.ready, prompt.param)
        self.tokenizer = loaded.tokenizer
        self._metrics = service.metrics
        self._begun = time.perf_counter()
        self.n = n
        self.choices = [
            Choice(index, prompts[index // n], self._text(body, params, shown))
            for index in range(len(prompts) * n)
        ]
        seeds = [nth_seed(params.seed, i) for i in range(n)]
        variants = [msgspec.structs.replace(params, seed=seed) for seed in seeds]
        self._generation = loaded.client.submit(
            Wanted(
                choice.prompt.ids,
                variants[choice.index % n],
                body.priority or 0,
                choice.prompt.images,
            )
            for choice in self.choices
        )

    def _text(self, body: Sampled, params: SamplingParams, shown: Collection[str]) -> OutputText:
        return OutputText(
            self.tokenizer.stream(shown=shown),
            body.stops,
            bool(body.include_stop_str_in_output),
            params.min_tokens,
        )

    async def events(self) -> list[Event]:
        """What became certain since the last call; [] at the end. Raises ApiError, EngineDied."""
        while True:
            outputs = await self._generation.next()
            if not outputs:
                self._metrics.whole.observe(time.perf_counter() - self._begun)
                return []
            now = time.perf_counter()
            events: list[Event] = []
            for index, output in outputs:
                choice = self.choices[index]
                if not choice.text.finished:
                    events.append((choice, self._feed(choice, output, now)))
            events = [event for event in events if not event[1].empty]
            if events:
                return events

    def _feed(self, choice: Choice, output: Output, now: float) -> TextDelta:
        if output.error is not None:
            raise ApiError(output.error)
        if output.finish_reason in ("abort", "error"):
            raise engine_gone()
        if output.cached_tokens is not None:
            choice.cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None:
            choice.prompt_logprobs = output.prompt_logprobs
        if output.token_ids:
            if choice.arrived:
                self._metrics.between_tokens.observe(now - choice.arrived)
            else:
                self._metrics.first_token.observe(now - self._begun)
            choice.arrived = now
        delta = choice.text.feed(output)
        if delta.finish_reason is not None:
            self._metrics.finished.labels(delta.finish_reason).inc()
            if output.finish_reason is None:
                self._generation.stop(choice.index)
        return delta

    def usage(self) -> dict[str, Any]:
        """Each prompt counts once, however many choices were made from it."""
        firsts = self.choices[:: self.n]
        prompt = sum(len(choice.prompt.ids) for choice in firsts)
        completion = sum(choice.text.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in firsts)},
        }

    def close(self) -> None:
        """Free what the engine still holds of this request. Idempotent."""
        self._generation.close()
