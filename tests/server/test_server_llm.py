"""Contract guarded: `from sixfold import LLM`. Offline results are those of the engine: in order,
equal alone and together, with logprobs, stop strings and errors as over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Launcher, Options

from sixfold import LLM, SamplingParams
from sixfold.common.errors import ConfigError, ContextLengthExceeded, RequestError, SixfoldError

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def installed(launcher: Launcher) -> Iterator[None]:
    """The toy platform in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(launcher.folder / "env"))
        yield


@pytest.fixture(scope="module")
def llm(installed: None, served_options: Options) -> Iterator[LLM]:
    with LLM(**{**served_options, "max_context": 1024, "max_queue": 8}) as llm:
        yield llm


@pytest.fixture(scope="module")
def parrot(installed: None, scripted_model: Path) -> Iterator[LLM]:
    with LLM(str(scripted_model), platform="toy") as llm:
        yield llm


def test_one_prompt_several_prompts_and_ids(llm: LLM) -> None:
    texts = ["Once", "upon a time there", "was"]
    alone = [llm.generate(text, GREEDY, progress=False)[0] for text in texts]
    together = llm.generate(texts, GREEDY, progress=False)
    assert [one.text for one in together] == [one.text for one in alone]
    ids = [llm.tokenizer.encode(text) for text in texts]
    assert [one.token_ids for one in llm.generate(ids, GREEDY, progress=False)] == [
        one.token_ids for one in alone
    ]
    assert llm.generate(ids[1], GREEDY, progress=False)[0].text == alone[1].text
    assert alone[0].prompt_token_ids == ids[0]
    assert alone[0].finish_reason in ("stop", "length")


def test_more_prompts_than_the_queue_holds(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [f"{i} bottles" for i in range(30)]
    each = [SamplingParams(temperature=0, max_tokens=1 + i % 4) for i in range(30)]
    results = llm.generate(prompts, each)
    assert [len(r.token_ids) <= 1 + i % 4 for i, r in enumerate(results)] == [True] * 30
    assert results[7].text == llm.generate(prompts[7], each[7], progress=False)[0].text
    assert "30/30" in capsys.readouterr().err


def test_logprobs_belong_to_the_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=0)
    result = llm.generate("Once upon", params, progress=False)[0]
    assert result.logprobs is not None
    assert [one.token_id for one in result.logprobs] == result.token_ids
    assert all(one.top_ids[0] == one.token_id for one in result.logprobs)
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)


def test_chat_stop_and_stream(parrot: LLM, script: str) -> None:
    talk = [{"role": "user", "content": "Talk."}]
    assert parrot.chat(talk, GREEDY, progress=False)[0].text == script.encode()[:12].decode()
    both = parrot.chat([talk, talk], SamplingParams(max_tokens=99), stop=[" STOP"], progress=False)
    assert [one.text for one in both] == [script.partition(" STOP")[0]] * 2
    assert [one.finish_reason for one in both] == ["stop"] * 2
    assert bytes(both[0].token_ids).decode() == both[0].text
    pieces = list(parrot.stream(parrot.chat_prompt(talk), SamplingParams(max_tokens=99)))
    assert pieces == list(script)


def test_a_stream_that_is_left_frees_the_engine(llm: LLM) -> None:
    stream = llm.stream("Go on", SamplingParams(temperature=0, max_tokens=900, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    free = llm.generate("Hi", GREEDY, progress=False)
    assert free[0].text
    stats = llm._engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def test_errors_name_the_field_and_leave_the_engine_usable(llm: LLM) -> None:
    with pytest.raises(RequestError, match="top_p") as wrong:
        llm.generate("x", SamplingParams(top_p=0.0), progress=False)
    assert wrong.value.param == "top_p"
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 1024 tokens"):
        llm.generate(["fine", "x " * 3000], GREEDY, progress=False)
    with pytest.raises(ConfigError, match="2 prompts but 1 params"):
        llm.generate(["a", "b"], [GREEDY], progress=False)
    assert llm.generate("fine", GREEDY, progress=False)[0].token_ids


def test_unknown_options_and_use_after_close(installed: None, toy_model: Path) -> None:
    with pytest.raises(ConfigError, match="no option gpu_memory"):
        LLM(str(toy_model), gpu_memory=1)
    llm = LLM(str(toy_model), platform="toy")
    llm.close()
    llm.close()
    with pytest.raises(SixfoldError, match="closed"):
        llm.generate("x", progress=False)


def test_strict_refuses_generic_choices_by_name(
    installed: None, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_platform

    from sixfold.common.errors import KernelError
    from sixfold.platforms.interface import Decision, ExecutorInfo, LoadProgress

    load = toy_platform.ToyExecutor.load

    def with_fallback(self: object, progress: LoadProgress | None = None) -> ExecutorInfo:
        from dataclasses import replace

        generic = Decision("kernel rope", "generic", "nothing better is installed", fallback=True)
        return replace(load(self, progress), decisions=(generic,))

    monkeypatch.setattr(toy_platform.ToyExecutor, "load", with_fallback)
    with LLM(str(toy_model), platform="toy") as lenient:
        assert [d.what for d in lenient.decisions.fallbacks()] == ["kernel rope"]
    with pytest.raises(KernelError, match="kernel rope: generic"):
        LLM(str(toy_model), platform="toy", strict=True)
