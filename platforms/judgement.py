"""What all probes share: how to say that something lacks, and what torch must be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .interface import Accelerator, DeviceFacts, Machine, Probe, Status, Support

RANK_ACCELERATOR = 50
RANK_CPU = 10
RANK_BY_NAME = 5
"""Usable but below the CPU: served when it is named with --platform, never picked."""

UNVERIFIED = "not yet verified on this device"
OLDEST_TORCH = (2, 9)
TORCH_SELECTOR = "https://pytorch.org/get-started/locally"
SERVED = frozenset(
    "logprobs prompt_logprobs logit_bias penalties top_k top_p min_p seed grammar".split()
)
"""Features of the shared torch sampler."""


@dataclass(frozen=True, slots=True)
class Lack:
    """One thing that stands between a machine and a platform, and the step that mends it."""

    what: str
    remedy: str


def judge(
    rank: int,
    reason: str,
    found: Sequence[str],
    lacks: Sequence[Lack],
    devices: Sequence[DeviceFacts],
) -> Probe:
    """Usable when nothing lacks. Else the first lack is the reason; remedies stand one a line."""
    if not lacks:
        return Probe(True, rank, reason, tuple(found), devices=tuple(devices))
    remedies = dict.fromkeys(lack.remedy for lack in lacks if lack.remedy)
    missing = tuple(lack.what for lack in lacks)
    return Probe(False, 0, lacks[0].what, tuple(found), missing, "\n".join(remedies))


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0), "12.8" -> (12, 8)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def of_vendor(machine: Machine, vendor: str) -> list[Accelerator]:
    return [a for a in machine.accelerators if a.vendor == vendor]


def libraries(machine: Machine, device: Accelerator, names: Sequence[str]) -> dict[str, str]:
    """Versions of a device's driver and of those named distributions that are installed."""
    found = {name: version for name, version in machine.packages.items() if name in names}
    return {**found, "driver": device.driver}


def describe(devices: Sequence[Accelerator]) -> list[str]:
    """One line for each kind of device, with how many there are."""
    lines = [_line(device) for device in devices]
    return [f"{n} x {x}" if (n := lines.count(x)) > 1 else x for x in dict.fromkeys(lines)]


def _line(device: Accelerator) -> str:
    size = f"{device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else ""
    driver = f"driver {device.driver}" if device.driver else ""
    details = ", ".join(filter(None, (device.arch, size, driver)))
    return f"{device.name} ({details})" if details else device.name


def torch_found(machine: Machine) -> list[str]:
    version = machine.packages.get("torch")
    return [f"torch {version} (build: {machine.torch_build or 'unknown'})"] if version else []


def torch_lacks(machine: Machine, build: str, extra: str, index: str) -> list[Lack]:
    """What is wrong with the installed torch for a platform that needs `build` ("cuda", "hip",
    "xpu"; "" = any). `index`: pip's arguments that select the build, "" for the default index."""
    torch = "pip install --upgrade torch" + (f" {index}" if index else "")
    install = f"pip install 'sixfold[{extra}]'" + (f" {index}" if index else "")
    version = machine.packages.get("torch")
    if version is None:
        return [Lack("torch is not installed", install)]
    if numbers(version)[:2] < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return [Lack(f"torch {version} is older than {oldest}", torch)]
    kind = machine.torch_build.split(" ")[0]
    if build and kind != build:
        again = torch.replace("--upgrade", "--force-reinstall")
        return [Lack(f"the installed torch {version} is built for {kind or 'cpu'}", again)]
    return []


def node_lacks(machine: Machine, prefix: str, missing: Lack, group: str) -> list[Lack]:
    """Of the nodes named `prefix` and a number: are there any, and may this user open one?"""
    nodes = [node for node in machine.device_nodes if re.fullmatch(prefix + r"\d*", node)]
    if not nodes:
        return [missing]
    if all(node in machine.denied_nodes for node in nodes):
        remedy = f"sudo usermod -aG {group} $USER  # then log out and in again"
        if "container" in machine.tools:
            groups = " ".join(f"--group-add {name}" for name in group.split(","))
            remedy = f"docker run {groups} ...  # give the container the group of the node"
        return [Lack(f"this user may not open {nodes[0]}", remedy)]
    return []


def absent(machine: Machine, thing: str, variables: Sequence[str]) -> list[Lack]:
    """No device was seen. A variable that hides devices is named, for it is easily forgotten."""
    for name in variables:
        if name in machine.tools:
            hidden = f"{name}={machine.tools[name]!r} leaves none visible"
            return [Lack(f"no {thing} found; {hidden}", f"unset {name}")]
    return [Lack(f"no {thing} found", f"none in software: this platform needs an {thing}")]


def generic_support(feature: str) -> Support:
    """What a platform with generic kernels, unseen on its hardware, may claim."""
    if feature in SERVED | {"drafts"}:
        return Support(Status.UNVERIFIED, UNVERIFIED)
    return Support(Status.NO, f"{feature} is not served by this version")
