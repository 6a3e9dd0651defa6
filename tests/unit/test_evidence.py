"""Guards the report of what was seen (`common/evidence.py`): it survives its file, and a result
that could mislead (of no kind, failed without a reason) cannot be made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.recorded_machines import load

from sixfold.common import evidence
from sixfold.common.errors import ConfigError
from sixfold.common.evidence import Report, Result, read
from sixfold.platforms import select


def report_on(name: str, platform: str) -> Report:
    machine, _ = load(name)
    probe = select.probe_all(machine)[platform]
    versions, facts = evidence.versions(machine, "1.2"), evidence.facts(machine, probe)
    began = "2026-01-02T03:04:05Z"
    return Report(platform, evidence.machine_name(machine), began, "commit x", versions, facts)


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = report_on("nvidia_h100", "cuda")
    report.results["speed"] = Result(
        "device", "passed", "", 1.5, {"rate": np.float32(2.5)}, {"all": frozenset("ba")}
    )
    report.write(tmp_path / "a.json")
    again = read(tmp_path / "a.json")
    assert again.results["speed"].figures == {"rate": 2.5}
    assert again.results["speed"].details == {"all": ["a", "b"]}
    assert again.facts["device"]["name"] == "NVIDIA H100 80GB HBM3"
    assert again.facts["accelerators"][0]["arch"] == "sm_90"
    assert again.versions["torch build"].startswith("cuda")
    assert (again.machine, again.ran, again.failed) == ("linux-x86_64", ["speed"], [])
    report.write(tmp_path / "b.json", details=False)
    assert read(tmp_path / "b.json").results["speed"].details == {}


def test_without_the_device_the_facts_say_why() -> None:
    assert report_on("nvidia_no_driver", "cuda").facts["device"]["none"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("rumour", "passed"), "'rumour'; there are device, emulated"),
        (("device", "fine"), "'fine'; there are passed, failed, skipped"),
        (("device", "failed"), "A failed result gives no reason"),
        (("device", "skipped"), "A skipped result gives no reason"),
    ],
)
def test_a_result_that_could_mislead_is_refused(fields: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Result(*fields)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "results": {}}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json is not a report"):
        read(tmp_path / "a.json")


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    report_on("laptop_avx2", "cpu").write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    with pytest.raises(ConfigError, match="has schema 2; this version reads 1"):
        read(path)
