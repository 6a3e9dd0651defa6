"""Contract guarded: the command line. Few flags, one sentence of help each, help without delay, bad
input answered by one sentence; chat, generate and bench work against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from serving import Launcher, Running

from sixfold.server.cli import COMMANDS, sixfold


def commands(group: click.Group = sixfold, prefix: str = "") -> dict[str, click.Command]:
    """All commands, also those of groups, by the words that call them."""
    context = click.Context(group)
    found: dict[str, click.Command] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found[prefix + name] = command
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix}{name} ")
    return found


def options() -> list[tuple[str, click.Option]]:
    everything = {"": sixfold, **commands()}
    return [
        (name, parameter)
        for name, command in everything.items()
        for parameter in command.params
        if isinstance(parameter, click.Option)
    ]


def test_fewer_than_60_flags_in_all() -> None:
    """A flag that several commands have is one flag to learn: names are counted."""
    assert set(commands()) == {*COMMANDS, "bench peers"}
    names = {name for _, option in options() for name in option.opts if name.startswith("--")}
    assert 30 < len(names) < 60


def test_each_help_text_is_one_sentence() -> None:
    for name, option in options():
        text = option.help or ""
        assert text.endswith("."), (name, option.name)
        assert text.count(". ") == 0, (name, option.name)
        assert 10 <= len(text) <= 80, (name, option.name)


def test_no_option_is_read_from_the_environment() -> None:
    assert all(option.envvar is None for _, option in options())
    assert sixfold.context_settings.get("auto_envvar_prefix") is None


def test_help_imports_nothing_heavy() -> None:
    """What makes help slow is imports; so they are counted, not the time."""
    code = (
        "import sys\n"
        "from sixfold.server.cli import sixfold\n"
        "for arguments in ([], ['serve'], ['chat'], ['generate'], ['bench'], ['bench',"
        " 'peers']):\n"
        "    sixfold.main([*arguments, '--help'], standalone_mode=False)\n"
        "heavy = {'numpy', 'fastapi', 'uvicorn', 'tokenizers', 'torch', 'mlx', 'zmq', 'rich.table',"
        " 'httpx', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


def test_version(launcher: Launcher) -> None:
    assert launcher.run("--version").stdout.startswith("sixfold, version ")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "/no/such/model"], 1, "/no/such/model"),
        (["serve", "--port", "high"], 2, "--port"),
        (["serve", "--dtype", "int3"], 2, "dtype must be float32"),
        (["serve", "--draft", "magic"], 2, "draft must be mtp or ngram"),
        (["serve", "--draft", "ngram:x"], 2, "behind the colon stands a number"),
        (["serve", "--draft", "ngram:0"], 2, "draft_tokens must be at least 1"),
        (["serve", "TOY", "--platform", "toy", "--draft", "ngram"], 1, "--draft ngram cannot be"),
        (["serve", "--max-rows", "0"], 2, "max_rows must be at least 1"),
        (["serve", "--kernel", "rope"], 2, "op=provider"),
        (["serve", "--host", "no.such.host.invalid"], 2, "--host"),
        (["serve", "TOY", "--platform", "gameboy"], 1, "gameboy"),
        (["serve", "TOY", "--platform", "toy", "--device-index", "7"], 1, "device_index 7"),
        (["generate"], 2, "PROMPT"),
        (["generate", "x", "/no/such/model"], 1, "/no/such/model"),
        (["chat", "--url", "http://127.0.0.1:9"], 1, "does not answer"),
        (["bench", "--url", "http://127.0.0.1:9"], 1, "Is it running?"),
        (["bench", "--rate", "0"], 2, "--rate"),
        (["bench", "--seed", "1", "peers"], 2, "--seed before `peers`"),
        (["fly"], 2, "No such command"),
    ],
)
def test_bad_input_is_one_message_and_no_traceback(
    launcher: Launcher, toy_model: Path, arguments: list[str], code: int, words: str
) -> None:
    done = launcher.run(*(str(toy_model) if a == "TOY" else a for a in arguments))
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_template_that_cannot_be_compiled(
    launcher: Launcher, toy_model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "broken.jinja"
    template.write_text("{% for")
    done = launcher.run("serve", toy_model, "--platform", "toy", "--port", "0",
                        "--chat-template", template)  # fmt: skip
    assert done.returncode == 1
    assert "template cannot be compiled" in done.stderr


def test_explain_prints_every_decision_and_exits(launcher: Launcher, toy_model: Path) -> None:
    done = launcher.run("serve", toy_model, "--platform", "toy", "--max-rows", "3", "--explain")
    assert done.returncode == 0, done.stderr
    for words in ("platform: toy", "page size", "max rows: 3", "set by the user", "overlap: on"):
        assert words in done.stdout


def test_generate(launcher: Launcher, scripted_model: Path, script: str) -> None:
    base = ["generate", "Talk.", scripted_model, "--platform", "toy", "--chat"]
    done = launcher.run(*base)
    assert done.stdout == script + "\n", done.stderr
    assert launcher.run(*base, "--stop", " STOP").stdout == script.partition(" STOP")[0] + "\n"
    read = launcher.run("generate", "-", *base[2:], "--max-tokens", "3", input="Talk.")
    assert read.stdout == "Gr\ufffd\n"


def test_generate_is_the_same_for_the_same_seed(launcher: Launcher, toy_model: Path) -> None:
    base = ["generate", "a", toy_model, "--platform", "toy", "--temperature", "1", "--seed"]
    assert launcher.run(*base, "5").stdout == launcher.run(*base, "5").stdout
    assert launcher.run(*base, "5").stdout != launcher.run(*base, "6").stdout


def test_chat_against_a_server_and_in_process(
    launcher: Launcher, scripted: Running, scripted_model: Path, script: str
) -> None:
    remote = launcher.run("chat", "--url", scripted.url, input="Hi\nAgain\n")
    assert remote.stdout == (script + "\n\n") * 2, remote.stderr
    local = launcher.run("chat", scripted_model, "--platform", "toy", input="Hi\n")
    assert local.stdout == script + "\n\n", local.stderr
    wrong = launcher.run("chat", "other", "--url", scripted.url, input="Hi\n")
    assert wrong.returncode == 1
    assert "The server answered 404" in wrong.stderr


def test_bench_counts_what_the_server_did(
    launcher: Launcher, server: Running, tmp_path: Path
) -> None:
    before = server.metric("generation_tokens_total")
    page = server.http.get("/v1/platform").json()["page_size"]
    shared = max(80, page + 16)  # a whole page, for no part of one is shared
    report = tmp_path / "report.json"
    plot = tmp_path / "plot.png"
    done = launcher.run(
        "bench", "--url", server.url, "--requests", 6, "--concurrency", 3, "--output-tokens", 9,
        "--prompt-tokens", shared + 40, "--shared-prefix", shared, "--seed", 1,
        "--json", report, "--plot", plot,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    assert (figures["completed"], figures["errors"]) == (6, 0)
    assert figures["output_tokens"] == 6 * 9
    assert figures["cached_tokens"] > 0
    assert abs(figures["prompt_tokens"] / 6 - shared - 40) < 25
    assert server.metric("generation_tokens_total") - before >= 6 * 9
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        spread = figures[name]
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "output tok/s" in done.stdout
    rate = launcher.run("bench", "--url", server.url, "--endpoint", "chat", "--requests", 3,
                        "--rate", 50, "--prompt-tokens", 20, "--output-tokens", 2)  # fmt: skip
    assert rate.returncode == 0, rate.stderr


def test_bench_reports_errors_and_fails(launcher: Launcher, server: Running) -> None:
    done = launcher.run("bench", "--url", server.url, "--model", "other", "--requests", 1)
    assert done.returncode == 1
    assert "does not exist here" in done.stderr
