"""Offline use: the engine in this process, no HTTP.

from sixfold import LLM, SamplingParams
with LLM() as llm:
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].text)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..common.checkpoint.checkpoint import open_checkpoint
from ..common.checkpoint.tokenizer import load_tokenizer
from ..common.config import EngineConfig
from ..common.errors import ConfigError, RequestError, SixfoldError
from ..common.messages import AddRequest, Image, Output, TokenLogprobs
from ..common.sampling import SamplingParams
from ..common.text.output import OutputText, TextDelta
from .images import NoImages, open_reader, place
from .launch import build, locate
from .llm_images import take_images
from .seeds import random_seed

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(slots=True)
class Completion:
    """The output of one prompt. `token_ids` and `logprobs` belong to `text`: tokens that only made
    up a stop string are not among them."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: list[int]
    params: SamplingParams
    text: OutputText
    result: Completion
    images: Sequence[Image] = ()


class LLM:
    """A model, loaded once. Not for use from several threads at a time."""

    def __init__(
        self, model: str = "", *, chat_template: str | None = None, **options: Any
    ) -> None:
        """`options` are the fields of EngineConfig. Raises SixfoldError."""
        try:
            config = EngineConfig(model=model, **options)
        except TypeError:
            known = set(EngineConfig.__dataclass_fields__)
            unknown = ", ".join(sorted(set(options) - known))
            raise ConfigError(
                f"LLM knows no option {unknown}. Possible: {', '.join(sorted(known))}."
            ) from None
        located = locate(model)
        launched = build(config, located)
        self._engine = launched.engine
        self._ready = launched.ready
        self._closed = False
        self._numbers = itertools.count()
        self.decisions = launched.decisions
        checkpoint = open_checkpoint(located.path)
        self.tokenizer = load_tokenizer(checkpoint)
        self._reader = open_reader(
            checkpoint, self.tokenizer, launched.ready, max_bytes=0, fetch=False
        )
        if chat_template is not None:
            self.tokenizer.use_chat_template(chat_template)

    @property
    def max_context(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return self._ready.max_context

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        progress: bool = True,
    ) -> list[Completion]:
        """Complete every prompt (texts or token ids), batched by the engine; results in the order
        of the prompts. `params`: one for all, one each, or None for the defaults with a random
        seed. Raises RequestError."""
        return self._complete([(p, ()) for p in _as_list(prompts)], params, stop, progress)

    def _complete(
        self,
        prompts: Sequence[tuple[Prompt, Sequence[Image]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        stop: Sequence[str],
        progress: bool,
    ) -> list[Completion]:
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ConfigError(f"There are {len(prompts)} prompts but {len(each)} params.")
        jobs = [
            self._job(prompt, one or SamplingParams(seed=random_seed()), stop, images)
            for (prompt, images), one in zip(prompts, each, strict=True)
        ]
        with _Bar(len(jobs)) if progress else nullcontext() as bar:
            for _, delta in self._deltas(jobs):
                if bar is not None and delta.finish_reason is not None:
                    bar.advance()
        return [job.result for job in jobs]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        progress: bool = True,
        **template_variables: Any,
    ) -> list[Completion]:
        """Answer one conversation or several; a content may be a list of parts, as over HTTP, with
        images as {"type": "image", "image": path or bytes} too. Raises RequestError."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several else [messages]
        prompts = [self._conversation(each, template_variables) for each in conversations]
        return self._complete(prompts, params, stop, progress)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """The text of one completion as it comes. Ending the iteration ends the work."""
        job = self._job(prompt, params or SamplingParams(seed=random_seed()), stop)
        for _, delta in self._deltas([job]):
            if delta.text:
                yield delta.text

    def chat_prompt(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """A conversation in the model's own template, as token ids; a placeholder for each token
        of an image."""
        return list(self._conversation(messages, variables)[0])

    def _conversation(
        self, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> tuple[list[int], Sequence[Image]]:
        rendered, pieces = take_images(messages, self._reader)
        text = self.tokenizer.apply_chat_template(rendered, True, **variables)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        reader = self._reader
        return (ids, ()) if isinstance(reader, NoImages) else place(ids, pieces, reader.taken)

    def close(self) -> None:
        """Release the device. Idempotent."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _job(
        self,
        prompt: Prompt,
        params: SamplingParams,
        stop: Sequence[str],
        images: Sequence[Image] = (),
    ) -> _Job:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        params.validate(self._ready.vocab_size, self._ready.max_logprobs)
        stops = [stop] if isinstance(stop, str) else list(stop)
        text = OutputText(self.tokenizer.stream(), stops, min_tokens=params.min_tokens)
        logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        return _Job(ids, params, text, Completion(ids, logprobs=logprobs), images)

    def _deltas(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, TextDelta]]:
        """Run all jobs, never more at a time than the queue takes."""
        if self._closed:
            raise SixfoldError("This LLM is closed. Make a new one.")
        waiting = iter(jobs)
        running: dict[str, _Job] = {}
        try:
            while True:
                for job in itertools.islice(waiting, self._ready.max_queue - len(running)):
                    request_id = str(next(self._numbers))
                    request = AddRequest(
                        request_id=request_id,
                        prompt_ids=job.prompt,
                        params=job.params,
                        images=list(job.images),
                    )
                    self._engine.add(request)
                    running[request_id] = job
                if not running:
                    return
                for output in self._engine.step():
                    yield from self._collect(running, output)
        finally:
            if running:
                self._engine.abort(list(running))

    def _collect(
        self, running: dict[str, _Job], output: Output
    ) -> Iterator[tuple[_Job, TextDelta]]:
        job = running.get(output.request_id)
        if job is None:
            return
        if output.error is not None:
            del running[output.request_id]
            raise RequestError(output.error.message, output.error.param, output.error.code)
        result = job.result
        if output.cached_tokens is not None:
            result.cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None:
            result.prompt_logprobs = output.prompt_logprobs
        delta = job.text.feed(output)
        result.text += delta.text
        for token in delta.tokens:
            result.token_ids.append(token.token_id)
            if result.logprobs is not None and token.logprobs is not None:
                result.logprobs.append(token.logprobs)
        if delta.finish_reason is not None:
            result.finish_reason = delta.finish_reason
            del running[output.request_id]
            if output.finish_reason is None:
                self._engine.abort([output.request_id])
        yield job, delta


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a text or a list of ids; several are a list of either."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [[token for token in prompts if isinstance(token, int)]]
    return [prompt for prompt in prompts if not isinstance(prompt, int)]


class _Bar(AbstractContextManager["_Bar"]):
    """A progress bar on standard error."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(
            "generating", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
