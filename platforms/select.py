"""Which platform serves: probe all that are known, choose one, say why and what the others said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from ..common.errors import PlatformError
from .interface import (
    Decision,
    DeviceFacts,
    EngineSpec,
    Executor,
    Machine,
    Platform,
    Probe,
    Support,
    usable,
)
from .interface_kernels import Suite

IN_TREE = ("cuda", "rocm", "npu", "xpu", "mlx", "cpu")
GROUP = "sixfold.platforms"

# What `pip install 'sixfold[extra]'` puts on a machine: (torch build, packages beside torch).
INSTALLED_BY = {
    "cuda": ("cuda", ()),
    "rocm": ("hip", ()),
    "npu": ("cpu", ("torch_npu",)),
    "xpu": ("xpu", ()),
    "mlx": ("", ("mlx", "mlx-lm")),
    "cpu": ("cpu", ()),
}


@dataclass(frozen=True, slots=True)
class BrokenPlatform:
    """Stands for an out-of-tree platform that could not be loaded, so that its reason is shown."""

    name: str
    reason: str
    remedy: str

    def probe(self, machine: Machine) -> Probe:
        return Probe(False, 0, self.reason, missing=(self.reason,), remedy=self.remedy)

    def supports(self, feature: str, facts: DeviceFacts) -> Support:
        raise PlatformError(f"The platform {self.name!r} cannot be used: {self.reason}.")

    def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
        raise PlatformError(f"The platform {self.name!r} cannot be used: {self.reason}.")

    def conformance(self, facts: DeviceFacts | None, interpreted: bool = False) -> Suite:
        raise PlatformError(f"The platform {self.name!r} cannot be used: {self.reason}.")


def platforms() -> dict[str, Platform]:
    """All six, and those that installed distributions declare in the entry point group
    `sixfold.platforms`. A broken one becomes a `BrokenPlatform`; nothing raises."""
    found: dict[str, Platform] = {}
    for name in IN_TREE:
        found[name] = import_module(f".{name}", __package__).PLATFORM
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        platform = _load(entry)
        name = platform.name
        if name in found:
            reason = f"the name {name!r} of {entry.value} is taken by another platform"
            name = f"{name} ({entry.value})"
            platform = BrokenPlatform(name, reason, _uninstall(entry))
        found[name] = platform
    return found


def _load(entry: EntryPoint) -> Platform:
    """The platform of an entry point: an object, or what its zero-argument callable gives."""
    try:
        loaded = entry.load()
        platform = loaded() if callable(loaded) else loaded
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = f"loading {entry.value} raised {type(error).__name__}: {error}"
        return BrokenPlatform(entry.name, reason, _uninstall(entry))
    if not isinstance(platform, Platform) or not isinstance(platform.name, str):
        members = "name, probe, supports, executor and conformance"
        reason = f"{entry.value} is not a Platform: it needs {members}"
        return BrokenPlatform(entry.name, reason, _uninstall(entry))
    return platform


def _uninstall(entry: EntryPoint) -> str:
    distribution = entry.dist.name if entry.dist is not None else entry.value
    return f"pip install --upgrade {distribution}  # or: pip uninstall {distribution}"


def probe_all(machine: Machine) -> dict[str, Probe]:
    """Every platform's judgement. One that raises, or gives no reason, is unusable for that."""
    return {name: _probe(platform, machine) for name, platform in platforms().items()}


def _probe(platform: Platform, machine: Machine) -> Probe:
    try:
        probe = platform.probe(machine)
    except Exception as error:
        reason = f"its probe raised {type(error).__name__}: {error}"
        return Probe(False, 0, reason, missing=(reason,), remedy="report this to its author")
    if not isinstance(probe, Probe) or not probe.reason:
        reason = "its probe gave no reason"
        return Probe(False, 0, reason, missing=(reason,), remedy="report this to its author")
    if probe.usable and not probe.devices:
        reason = "its probe says usable but names no device"
        return replace(probe, usable=False, reason=reason, missing=(reason,))
    return probe


def choose(found: Mapping[str, Probe], wanted: str | None = None) -> Decision:
    """The platform named `wanted`, or the usable one of highest rank. Raises PlatformError when the
    named one cannot serve, when none can, and when two share the highest rank."""
    if wanted is not None:
        return _named(found, wanted)
    ranked = usable(found)
    if not ranked:
        raise PlatformError("No platform can serve on this machine.\n" + _reasons(found))
    best = [name for name in ranked if found[name].rank == found[ranked[0]].rank]
    if len(best) > 1:
        listed = " and ".join(best)
        flags = " or ".join(f"--platform {name}" for name in best)
        raise PlatformError(f"{listed} can serve equally well here; choose with {flags}.")
    return Decision("platform", best[0], found[best[0]].reason, _rejected(found, best[0]))


def _named(found: Mapping[str, Probe], wanted: str) -> Decision:
    if wanted not in found:
        raise PlatformError(f"There is no platform {wanted!r}; there are {', '.join(found)}.")
    if not found[wanted].usable:
        sentence = f"The platform {wanted!r} cannot serve here: {found[wanted].reason}."
        raise PlatformError(f"{sentence} All platforms:\n{_reasons(found)}")
    because = f"set by the user; {found[wanted].reason}"
    return Decision("platform", wanted, because, _rejected(found, wanted))


def _rejected(found: Mapping[str, Probe], chosen: str) -> tuple[tuple[str, str], ...]:
    def why(probe: Probe) -> str:
        return f"usable, rank {probe.rank}: {probe.reason}" if probe.usable else probe.reason

    return tuple((name, why(probe)) for name, probe in found.items() if name != chosen)


def _reasons(found: Mapping[str, Probe]) -> str:
    lines = []
    for name, probe in found.items():
        lines.append(f"  {name}: {'usable' if probe.usable else 'unusable'}: {probe.reason}")
        lines += [f"      mend: {line}" for line in probe.remedy.splitlines()]
    return "\n".join(lines)


def install_extra(machine: Machine) -> tuple[str, str]:
    """(extra to install, why) for this hardware, whatever is installed now: the platform that would
    be chosen if its packages were there. Never fails: a tie or a doubt gives "cpu"."""
    found = {name: _probe(p, _with_packages(machine, name)) for name, p in platforms().items()}
    found = {name: probe for name, probe in found.items() if name in INSTALLED_BY}
    try:
        choice = choose(found)
    except PlatformError as error:
        return "cpu", str(error).splitlines()[0]
    (device, *_) = found[choice.chosen].devices
    return choice.chosen, f"for {device.name}"


def _with_packages(machine: Machine, extra: str) -> Machine:
    """The machine as it would be with the extra installed, in versions that fit each other."""
    if extra not in INSTALLED_BY:
        return machine
    build, beside = INSTALLED_BY[extra]
    installed = {"torch": "99.0.0"} | dict.fromkeys(beside, "99.0.0")
    return replace(machine, packages={**machine.packages, **installed}, torch_build=build)
