"""What was seen of a platform on one machine: the report that `sixfold verify` and
`ci/run_platform` write and that `docs/hardware-status.md` is made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..platforms.interface import Machine, Probe
from .errors import ConfigError

SCHEMA = 1
KINDS = ("device", "emulated", "interpreted", "compiled", "traced")
"""Of evidence, the strongest first."""
STATES = ("passed", "failed", "skipped")


@dataclass(frozen=True, slots=True)
class Result:
    """One check. `figures` are few and kept; `details` are for whoever has to find a fault."""

    evidence: str  # of KINDS
    state: str  # of STATES
    reason: str = ""  # why it was skipped, or what failed; "" when it passed
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError for a kind or state that there is not, and for a missing reason."""
        for value, known in ((self.evidence, KINDS), (self.state, STATES)):
            if value not in known:
                raise ConfigError(f"A result says {value!r}; there are {', '.join(known)}.")
        if self.state != "passed" and not self.reason:
            raise ConfigError(f"A {self.state} result gives no reason.")


@dataclass(slots=True)
class Report:
    platform: str
    machine: str  # such as "linux-x86_64"
    began: str  # UTC, ISO 8601 to the second
    source: str  # the commit, or the version of an installed package
    versions: Mapping[str, str]
    facts: Mapping[str, Any]
    results: dict[str, Result] = field(default_factory=dict)  # by the name of the check

    @property
    def failed(self) -> list[str]:
        return [name for name, result in self.results.items() if result.state == "failed"]

    @property
    def ran(self) -> list[str]:
        return [name for name, result in self.results.items() if result.state != "skipped"]

    def write(self, path: Path, details: bool = True) -> None:
        plain = {"schema": SCHEMA, **asdict(self)}
        for result in plain["results"].values():
            if not details:
                del result["details"]
        path.write_text(json.dumps(plain, indent=1, default=_plain) + "\n", "utf-8")


def read(path: Path) -> Report:
    """Raises ConfigError for what is not such a report."""
    try:
        plain = json.loads(path.read_text("utf-8"))
        schema = plain.pop("schema")
        results = {name: Result(**one) for name, one in plain.pop("results").items()}
        report = Report(**plain, results=results)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a report: {type(error).__name__}: {error}") from None
    if schema != SCHEMA:
        raise ConfigError(f"{path} has schema {schema}; this version reads {SCHEMA}.")
    return report


def machine_name(machine: Machine) -> str:
    return f"{machine.os}-{machine.arch}"


def versions(machine: Machine, own: str) -> dict[str, str]:
    packages = dict(sorted(machine.packages.items()))
    found = {"sixfold": own, "python": machine.python, **packages}
    return found | ({"torch build": machine.torch_build} if machine.torch_build else {})


def facts(machine: Machine, probe: Probe) -> dict[str, Any]:
    """Of the machine, and of the platform's device or why there is none."""
    device = asdict(probe.devices[0]) if probe.usable else {"none": probe.reason}
    return {
        "system": machine.os_version,
        "processor": machine.cpu_name,
        "cores": machine.physical_cores,
        "memory_bytes": machine.memory_bytes,
        "accelerators": [asdict(one) for one in machine.accelerators],
        "device": {name: _plain(value) for name, value in device.items()},
    }


def _plain(value: Any) -> Any:
    """Numbers of a framework, sets and mappings as JSON has them."""
    if isinstance(value, (frozenset, set)):
        return sorted(value)
    if isinstance(value, (str, int, float, bool, list, tuple, dict)) or value is None:
        return value
    if isinstance(value, Mapping):
        return dict(value)
    return float(value)
