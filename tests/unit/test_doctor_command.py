"""Guards `sixfold doctor` and `--explain`: everything that was found is shown, commands can be
copied, 80 columns suffice, exit codes are right, and neither needs a tensor framework."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import recorded_machines
from click.testing import CliRunner
from rich.console import Console
from toy_checkpoint import toy_environment

from sixfold.platforms import machine as machines
from sixfold.platforms.interface import Decision, Machine
from sixfold.server.doctor import diagnose, doctor, record, show, summary
from sixfold.server.explain import render

MACHINES = recorded_machines.names()


def load(name: str) -> Machine:
    return recorded_machines.load(name)[0]


def shown(machine: Machine, width: int = 80) -> str:
    out = io.StringIO()
    show(diagnose(machine), Console(file=out, width=width, highlight=False, markup=False))
    return out.getvalue()


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("width", [40, 80])
def test_nothing_is_lost_and_commands_stand_on_one_line(name: str, width: int) -> None:
    lines = shown(load(name), width).splitlines()
    words = " ".join(" ".join(lines).split())
    diagnosis = diagnose(load(name))
    for platform, probe in diagnosis.found.items():
        for line in probe.remedy.splitlines():
            assert any(shown_line.endswith(line) for shown_line in lines), f"{platform}: {line}"
        for line in (*probe.found, *(probe.missing if probe.found else ())):
            assert any(shown_line.endswith(line) for shown_line in lines), f"{platform}: {line}"
        if width == 80:
            assert any(shown_line.split()[:1] == [platform] for shown_line in lines)
    outcome = diagnosis.choice.because if diagnosis.choice else diagnosis.problem
    assert " ".join(outcome.split()) in words


@pytest.mark.parametrize("name", MACHINES)
def test_table_and_sentences_fit_80_columns(name: str) -> None:
    text = shown(load(name))
    table = text.split("\n\n")[1].splitlines()
    assert len(table) >= 7
    assert all(len(line.rstrip()) <= 80 for line in table)


@pytest.mark.parametrize("name", MACHINES)
def test_json_holds_everything(name: str) -> None:
    machine, expected = recorded_machines.load(name)
    data = json.loads(json.dumps(record(diagnose(machine))))
    assert data["serve"]["chosen"] == (expected.chosen or None)
    assert data["serve"]["because"]
    assert list(data["platforms"])[:6] == ["cuda", "rocm", "npu", "xpu", "mlx", "cpu"]
    for probe in data["platforms"].values():
        assert probe["reason"]
        assert probe["usable"] or probe["remedy"]
    assert data["machine"]["cpu_features"] == sorted(machine.cpu_features)
    assert len(data["machine"]["accelerators"]) == len(machine.accelerators)


@pytest.mark.parametrize(
    ("name", "code"),
    [("xeon_amx", 0), ("nvidia_cpu_only_torch", 0), ("two_accelerators_tie", 0), ("no_torch", 1)],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_exit_code(monkeypatch: pytest.MonkeyPatch, name: str, code: int, flags: list[str]) -> None:
    monkeypatch.setattr(machines, "observe", lambda: load(name))
    assert CliRunner().invoke(doctor, flags).exit_code == code


def test_equal_devices_are_counted() -> None:
    assert "accelerator: 2 x NVIDIA H100 80GB HBM3, sm_90, 79.6 GiB, driver 570.124.06" in summary(
        load("nvidia_h100")
    )
    assert summary(load("xeon_amx"))[-1] == "accelerator: none found"


def test_a_tie_is_shown_as_what_serve_would_say() -> None:
    text = " ".join(shown(load("two_accelerators_tie")).split())
    assert "`sixfold serve` refuses: cuda and npu can serve equally well here" in text


WITHOUT_FRAMEWORKS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "mlx", "mlx_lm", "triton", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
sys.argv = ["sixfold", "doctor", *sys.argv[1:]]
from sixfold.server.cli import main
main()
"""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_command_in_a_pipe_without_frameworks_in_ascii(tmp_path: Path, flags: list[str]) -> None:
    environment = toy_environment(tmp_path / "site")
    environment |= {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_FRAMEWORKS, *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "\x1b" not in run.stdout
    if flags:
        data = json.loads(run.stdout)
        assert data["platforms"]["toy"]["usable"]
        assert data["serve"]["chosen"] in data["platforms"]
    else:
        assert "toy" in run.stdout
        assert "pure numpy runs anywhere" in run.stdout


# ---- explain

DECISIONS = [
    Decision("platform", "cpu", "torch runs on any CPU", (("cuda", "no GPU found"),)),
    Decision("kernel rope", "generic", "better was refused", (("native", "no AVX-512"),), True),
    Decision("cache", "2048 tokens", "a quarter of what is left " * 8),
]


def test_explain_shows_everything_fallbacks_first() -> None:
    text = render(DECISIONS)
    assert text.index("kernel rope: generic") < text.index("platform: cpu")
    assert text.startswith("1 generic choice(s)")
    plain = " ".join(text.split())
    for decision in DECISIONS:
        assert f"{decision.what}: {decision.chosen} because {decision.because.strip()}" in plain
        for candidate, reason in decision.rejected:
            assert f"not {candidate}: {reason}" in plain
    assert max(map(len, text.splitlines())) <= 80


def test_explain_without_fallbacks_says_so() -> None:
    assert render([DECISIONS[0]]).startswith("No generic fallbacks.")


def test_explain_breaks_no_path_and_wraps_to_the_width_asked() -> None:
    path = "/a/very-long/" + "path-" * 30 + "model.gguf"
    assert path in render([Decision("model", path, "as given")], width=40)
    assert max(map(len, render(DECISIONS, width=40).splitlines())) <= 40
