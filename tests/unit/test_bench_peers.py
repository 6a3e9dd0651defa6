"""Contract guarded: a comparison is fair and says what it left out. Prompts are fixed by the round,
rounds are interleaved, figures come from requests that succeeded, ratios from peers without errors,
and who cannot take part is named with the reason. No server runs here; see
tests/server/test_server_bench_peers.py."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from sixfold.common.errors import ConfigError
from sixfold.server.peers import launchers, summary, workloads
from sixfold.server.peers.client import Outcome, Reply, ask
from sixfold.server.peers.launchers import Peer, Wanted, choose, known
from sixfold.server.peers.report import Comparison, markdown
from sixfold.server.peers.rounds import Results, measure

A, B = Peer("sixfold", "a", "m"), Peer("other", "b", "m")


def reply(text: str = "x", first: float = 0.5, gap: float = 0.1, **changes: object) -> Reply:
    """11 tokens, a piece each, `gap` seconds apart."""
    arrivals = tuple(first + gap * index for index in range(11))
    answer = Reply(text, 11, 100, 0, arrivals, arrivals[-1], None)
    return replace(answer, **changes)  # type: ignore[arg-type]


FAILED = reply("", output_tokens=0, arrivals=(), error="HTTP 500: no")


def outcome(*replies: Reply, wall: float = 1.0, workload: str = "B") -> Outcome:
    return Outcome(workload, 0, wall, replies)


# Prompts


def test_prompts_of_a_round_never_change() -> None:
    """Figures of different days are of the same prompts."""
    found = {}
    for workload in "ABCDW":
        text = "\n".join(workloads.prompts(workload, 0))
        found[workload] = hashlib.sha256(text.encode()).hexdigest()[:8]
    assert found == {
        "A": "2a2f4f5e", "B": "ed76de7c", "C": "ed2210e1", "D": "7b1835a0", "W": "7b1835a0",
    }  # fmt: skip
    assert workloads.prompts("A", 1) != workloads.prompts("A", 0)


def test_prefill_prompts_share_no_beginning() -> None:
    texts = [text for seed in range(3) for text in workloads.prompts("P", seed)]
    beginnings = {" ".join(text.split()[:4]) for text in texts}
    assert len(beginnings) == len(texts)
    sizes = [len(text.split()) for text in workloads.prompts("P", 0)]
    assert sizes == [474, 986, 2010, 4058]


@pytest.mark.parametrize(("letters", "words"), [("AX", "got X"), ("", "nothing"), ("W", "for D")])
def test_workloads_that_mean_nothing(letters: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        workloads.parse(letters)


def test_workloads_run_in_one_order() -> None:
    assert workloads.parse("swdpa") == "ADWPS"


# Rounds


def test_rounds_are_interleaved_and_turned() -> None:
    log: list[str] = []

    @contextmanager
    def turn(name: str):  # type: ignore[no-untyped-def]
        log.append(f"<{name}")
        yield
        log.append(f"{name}>")

    async def runner(api: str, model: str, workload: str, seed: int) -> Outcome:
        log.append(f"{api}{workload}{seed}")
        return Outcome(workload, seed, 1.0, (reply(),))

    told: list[str] = []
    results = measure([A, B], "ADS", 3, turn, told.append, runner)
    sent = [entry for entry in log if not set(entry) & set("<>")]
    assert sent == "aA0 bA0 aD0 bD0 bA1 aA1 bD1 aD1 aA2 bA2 aD2 bD2".split()
    assert log[:3] == ["<sixfold", "aA0", "sixfold>"]
    assert len(told) == len(sent)
    assert [o.round for o in results["other"]["A"]] == [0, 1, 2]
    assert "S" not in results["other"]


# Figures


def results(**by_peer: list[Outcome]) -> Results:
    return {name: {runs[0].workload: runs} for name, runs in by_peer.items()}


def test_figures_of_a_row() -> None:
    runs = [outcome(reply(first=0.1), reply(first=0.3), wall=wall) for wall in (1.0, 2.0, 4.0)]
    (row,) = summary.rows(results(sixfold=runs))
    assert row.tokens_per_s == 11.0  # 22 tokens in the median of 1, 2 and 4 s
    assert row.ttft_p50_s == pytest.approx(0.2)
    assert row.ttft_p99_s == pytest.approx(0.3)
    assert (row.requests, row.errors, row.likeness, row.ratio) == (6, 0, 1.0, None)
    assert row.decode_tokens_per_s is None
    (row,) = summary.rows(results(sixfold=[outcome(reply(gap=0.05), workload="A")]))
    assert row.decode_tokens_per_s == pytest.approx(20)


def test_decode_rate_counts_tokens_of_a_piece() -> None:
    """21 tokens in 11 pieces 0.1 s apart are 20 tokens a second, not 10."""
    assert reply(output_tokens=21).decode_tokens_per_s == pytest.approx(20)
    assert reply(arrivals=(0.5,)).decode_tokens_per_s is None


def test_ratio_is_against_the_best_of_the_others() -> None:
    table = summary.rows(
        {
            "sixfold": {"B": [outcome(reply(), wall=1.0)]},
            "sixfold-no-tree": {"B": [outcome(reply(), wall=0.1)]},
            "slow": {"B": [outcome(reply(), wall=4.0)]},
            "best": {"B": [outcome(reply(), wall=2.0)]},
        }
    )
    assert {row.peer: row.ratio for row in table} == {
        "sixfold": 2.0, "sixfold-no-tree": None, "slow": None, "best": None,
    }  # fmt: skip


def test_prefill_ratio_is_of_the_time_to_first_token() -> None:
    ours = outcome(*(reply(first=t) for t in (0.1, 0.2, 0.4, 0.8)), workload="P")
    theirs = outcome(*(reply(first=t) for t in (0.2, 0.2, 0.2, 0.2)), workload="P")
    table = summary.rows(results(sixfold=[ours], other=[theirs]))
    ratios = {row.workload: row.ratio for row in table if row.peer == "sixfold"}
    assert ratios == pytest.approx({"P 512": 2.0, "P 1024": 1.0, "P 2048": 0.5, "P 4096": 0.25})
    assert all(row.tokens_per_s is None for row in table)


def test_errors_count_and_whoever_has_some_is_no_yardstick() -> None:
    """Half of the requests in a quarter of the time would look like the better server."""
    table = summary.rows(
        results(
            sixfold=[outcome(reply(), reply(), wall=1.0)],
            broken=[outcome(FAILED, reply(), wall=0.1)],
            other=[outcome(reply(), reply(), wall=2.0)],
        )
    )
    ours, broken, _ = table
    assert ours.ratio == 2.0
    assert (broken.errors, broken.requests, broken.first_error) == (1, 2, "HTTP 500: no")
    assert broken.likeness == 1.0  # of the answers that came
    (ours, _) = summary.rows(results(sixfold=[outcome(FAILED)], other=[outcome(reply())]))
    assert (ours.ratio, ours.tokens_per_s, ours.ttft_p50_s, ours.likeness) == (None,) * 4


def test_likeness_is_to_the_first_peer_round_by_round() -> None:
    first = [outcome(reply("same words here")), outcome(reply("of another round"))]
    table = summary.rows(
        results(sixfold=first, equal=first, other=[first[0], outcome(reply("of a different day"))])
    )
    assert [row.likeness for row in table[:2]] == [1.0, 1.0]
    assert 0.5 < (table[2].likeness or 0) < 1.0


def test_likeness_of_long_texts_sees_what_is_equal_after_a_difference() -> None:
    """difflib's speed-up for texts above 200 characters would call these unlike."""
    text = "the river and the stone and the winter market " * 10
    alike = summary.likeness([reply(text)], [reply("A" + text[1:])])
    assert 0.99 < (alike or 0) < 1.0


def test_starts_compare_time_and_memory() -> None:
    table = summary.starts({"sixfold": (2.0, 10**9), "other": (4.0, 5 * 10**8), "url": None})
    ours, _, running = table
    assert (ours.cold_start_ratio, ours.resident_ratio) == (2.0, 0.5)
    assert (running.cold_start_s, running.resident_bytes) == (None, None)


# Who takes part


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.touch()
    return path


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs, and no other place to find them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(launchers.sys, "executable", str(folder / "python"))
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda package: None)
    return folder


def install(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch(mode=0o755)


def test_known_peers_are_complete() -> None:
    for name, engine in known().items():
        assert set(engine.reads) <= {"any", *launchers.FORMS}, name
        assert {"{port}", "{model}"} <= set(engine.arguments), name
        fields = dict.fromkeys("model port threads dtype kv_dtype quantize python".split(), "1")
        for part in (*engine.arguments, *engine.dtype, *engine.quantize, *engine.prefill):
            part.format(**fields)


def test_missing_programs_and_forms_are_reasons(programs: Path, gguf: Path) -> None:
    install(programs, "vllm")
    chosen, left_out = choose(Wanted(model=str(gguf)))
    assert [peer.name for peer in chosen] == ["sixfold"]
    assert "llama-server is neither" in left_out["llama.cpp"]
    assert left_out["vllm"] == "it reads a Hugging Face directory (as MODEL or with --hf)"
    assert "openvino_genai is not installed" in left_out["openvino-genai"]
    assert set(left_out) == {n for n, k in known().items() if not k.asked_only} - {"sixfold"}


def test_command_of_a_peer(programs: Path, gguf: Path, tmp_path: Path) -> None:
    server = tmp_path / "my-llama-server"
    wanted = Wanted(
        model=str(gguf), hf=tmp_path, dtype="bfloat16", quantize="int8", prefill=True,
        names=("llama.cpp", "sixfold"), programs={"llama.cpp": server},
        arguments=("llama.cpp=-c 99 --name 'a b'",),
    )  # fmt: skip
    chosen, left_out = choose(wanted)
    assert not left_out
    theirs, ours = (peer.on(77) for peer in chosen)
    assert theirs.command[:3] == (str(server), "-m", str(gguf))
    assert theirs.command[-9:] == (
        "--cache-type-k", "bf16", "--cache-type-v", "bf16", "--kv-unified",
        "-c", "99", "--name", "a b",
    )  # fmt: skip
    assert theirs.api == "http://127.0.0.1:77/v1"
    assert " ".join(ours.command).endswith("--port 77 --dtype bfloat16 --quantize int8")


def test_running_servers(gguf: Path) -> None:
    urls = ("one=http://h:1/", "two=http://h:2/v3,name", "sixfold=http://h:3/v1")
    chosen, _ = choose(Wanted(model="/no/model", urls=urls, names=("two", "sixfold", "one")))
    assert chosen == [
        Peer("two", "http://h:2/v3", "name"),
        Peer("sixfold", "http://h:3/v1", ""),
        Peer("one", "http://h:1/v1", ""),
    ]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted(names=("vlm",)), "no peer vlm; there are sixfold, .*vllm"),
        (Wanted(urls=("http://h:1",)), "NAME=URL"),
        (Wanted(urls=("a=h:1",)), "NAME=URL"),
        (Wanted(names=("sixfold",), arguments=("vllm=-x",)), "NAME of sixfold, got 'vllm=-x'"),
        (Wanted(dtype="int3"), "dtype must be"),
        (Wanted(quantize="int3"), "quantize must be"),
    ],
)
def test_what_means_nothing_is_refused(wanted: Wanted, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(wanted)


# One request


def stream(*events: object, status: int = 200) -> Reply:
    lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    async def run() -> Reply:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=lines))
        async with httpx.AsyncClient(transport=transport) as client:
            return await ask(client, "http://h/v1", "m", "Hi", 8)

    return asyncio.run(run())


def delta(end: str | None = None, **content: str) -> dict[str, object]:
    return {"choices": [{"delta": content, "finish_reason": end}]}


def test_reply_of_a_stream() -> None:
    usage = {
        "prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip
    got = stream(
        delta(content=""), delta(reasoning_content="hm "), delta(content="yes"), delta("stop"),
        {"choices": [], "usage": usage},
    )  # fmt: skip
    assert (got.text, got.error) == ("hm yes", None)
    assert (got.output_tokens, got.prompt_tokens, got.cached_tokens) == (5, 9, 4)
    got = stream(delta(content="a"), delta(content="b"), delta("length"))
    assert (got.output_tokens, got.prompt_tokens, got.cached_tokens) == (2, None, None)


def test_failures_of_a_stream() -> None:
    assert "HTTP 503" in (stream(status=503).error or "")
    assert "broke" in (stream(delta(content="a"), {"error": {"message": "broke"}}).error or "")
    assert stream().error == "the stream held no text"
    assert stream(delta("length")).error is None  # its only token had no text


# The table


def comparison(table: list[summary.Row], **changes: object) -> Comparison:
    settings = {"model": "m", "workloads": "BP", "rounds": 2, "dtype": None, "quantize": None}
    whole = Comparison(settings, (A, B), {}, tuple(table), (), {}, {})
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_table_has_every_row_and_every_absence() -> None:
    table = summary.rows(
        results(sixfold=[outcome(reply(first=0.25), wall=0.5)], other=[outcome(FAILED)])
    )
    text = markdown(comparison(table, left_out={"vllm": "not here"}, ended={"other": "its log"}))
    assert "| B | sixfold | 22.0 | 250.0 | 250.0 | - | 1.000 | 0 | - |" in text
    assert "| B | other | - | - | - | - | - | 1 of 1 | - |" in text
    assert "other, B: 1 of 1 requests failed, the first with: HTTP 500: no" in text
    assert "Left out: vllm: not here" in text
    assert "other ended while it was measured: its log" in text


def test_prompts_that_were_cached_are_pointed_out() -> None:
    warm = outcome(reply(cached_tokens=90))
    assert "sixfold, B: 90% of the prompt tokens" in markdown(
        comparison(summary.rows(results(sixfold=[warm])))
    )
    cold = outcome(reply(cached_tokens=20))
    assert "of the prompt tokens" not in markdown(comparison(summary.rows(results(sixfold=[cold]))))
    twice = replace(warm, workload="W")
    assert "of the prompt tokens" not in markdown(
        comparison(summary.rows(results(sixfold=[twice])))
    )
