"""Guards `platforms.select` and all probes: on every recorded machine which platform serves, why,
what the others say and how to mend them; explicit choices, ties, out-of-tree platforms."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace

import pytest
import recorded_machines
import toy_platform

from sixfold.common.errors import PlatformError
from sixfold.platforms import select
from sixfold.platforms.interface import EngineSpec, Machine, Platform, Probe, Status

MACHINES = recorded_machines.names()
DEVICE = toy_platform.FACTS


def load(name: str) -> Machine:
    return recorded_machines.load(name)[0]


@pytest.mark.parametrize("name", MACHINES)
def test_every_recorded_machine(name: str) -> None:
    machine, expected = recorded_machines.load(name)
    found = select.probe_all(machine)
    for platform, part in (expected.others or {}).items():
        probe = found[platform]
        said = f"usable, rank {probe.rank}: {probe.reason}" if probe.usable else probe.reason
        assert part in said
    for platform, part in (expected.remedies or {}).items():
        assert part in found[platform].remedy
    if expected.error:
        with pytest.raises(PlatformError) as error:
            select.choose(found)
        assert all(part in str(error.value) for part in expected.error)
        return
    choice = select.choose(found)
    assert choice.chosen == expected.chosen
    assert all(part in choice.because for part in expected.because)
    assert {rejected for rejected, _ in choice.rejected} == set(found) - {choice.chosen}
    device = found[choice.chosen].devices[0]
    for field, value in (expected.device or {}).items():
        seen = getattr(device, field)
        assert sorted(seen) == value if isinstance(seen, frozenset) else list_of(seen) == value


def list_of(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", MACHINES)
def test_every_probe_has_a_reason_and_every_unusable_one_a_remedy(name: str) -> None:
    for probe in select.probe_all(load(name)).values():
        assert probe.reason
        assert probe.usable == bool(probe.devices)
        assert probe.usable == (not probe.missing)
        assert probe.usable or probe.remedy


@pytest.mark.parametrize("name", MACHINES)
def test_facts_name_their_source(name: str) -> None:
    header = recorded_machines.header(name)
    assert header.startswith(
        ("Observed, by", "Written from published specifications, not observed")
    )


@pytest.mark.parametrize("name", MACHINES)
def test_recording_round_trips(name: str) -> None:
    text = recorded_machines.dump(load(name))
    assert recorded_machines.machine_from(tomllib.loads(text)["machine"]) == load(name)


def test_an_accelerator_is_preferred_and_the_cpu_can_be_named() -> None:
    found = select.probe_all(load("nvidia_h100"))
    choice = select.choose(found, "cpu")
    assert choice.chosen == "cpu"
    assert choice.because.startswith("set by the user")
    assert dict(choice.rejected)["cuda"].startswith("usable, rank 50: NVIDIA H100")


def test_a_named_platform_is_honoured_though_it_is_never_picked() -> None:
    found = select.probe_all(load("amd_integrated_gfx1036"))
    assert select.choose(found).chosen == "cpu"
    assert select.choose(found, "rocm").chosen == "rocm"


def test_a_named_platform_that_cannot_serve_raises_with_every_reason_and_remedy() -> None:
    found = select.probe_all(load("nvidia_cpu_only_torch"))
    with pytest.raises(PlatformError) as error:
        select.choose(found, "cuda")
    text = str(error.value)
    assert "'cuda' cannot serve here: the installed torch 2.13.0+cpu is built for cpu" in text
    assert "mend: pip install --force-reinstall torch" in text
    for name, probe in found.items():
        assert f"{name}: " in text
        assert probe.reason in text
        assert all(line in text for line in probe.remedy.splitlines())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PlatformError, match="no platform 'tpu'; there are cuda, rocm, npu, xpu"):
        select.choose(select.probe_all(load("xeon_amx")), "tpu")


def test_two_accelerators_tie_is_settled_by_name() -> None:
    found = select.probe_all(load("two_accelerators_tie"))
    with pytest.raises(PlatformError, match="choose with --platform"):
        select.choose(found)
    assert select.choose(found, "npu").chosen == "npu"


def test_every_lack_is_listed_not_only_the_first() -> None:
    probe = select.probe_all(load("intel_arc_no_runtime"))["xpu"]
    assert len(probe.missing) == 2
    assert len(probe.remedy.splitlines()) == 2
    bare = replace(load("nvidia_no_driver"), packages={}, torch_build="")
    probe = select.probe_all(bare)["cuda"]
    assert probe.missing == ("the NVIDIA driver is not loaded", "torch is not installed")


def test_in_a_container_the_remedy_is_the_containers() -> None:
    denied = load("amd_kfd_denied")
    assert "usermod" in select.probe_all(denied)["rocm"].remedy
    inside = replace(denied, tools={**denied.tools, "container": "yes"})
    assert (
        "docker run --group-add render --group-add video" in select.probe_all(inside)["rocm"].remedy
    )


def test_old_torch_is_refused() -> None:
    old = replace(load("xeon_vnni"), packages={"torch": "2.1.2+cpu"})
    probe = select.probe_all(old)["cpu"]
    assert probe.reason == "torch 2.1.2+cpu is older than 2.9"
    assert "pip install --upgrade torch" in probe.remedy


@pytest.mark.parametrize("name", ["cuda", "rocm", "npu", "xpu"])
def test_unseen_hardware_claims_nothing_verified(name: str) -> None:
    platform = select.platforms()[name]
    assert platform.supports("logprobs", DEVICE).status is Status.UNVERIFIED
    assert platform.supports("logprobs", DEVICE).reason
    assert platform.supports("telepathy", DEVICE).status is Status.NO


def test_support_of_cpu_and_mlx() -> None:
    platforms = select.platforms()
    assert platforms["cpu"].supports("seed", DEVICE).status is Status.YES
    assert platforms["cpu"].supports("telepathy", DEVICE).status is Status.NO
    assert platforms["mlx"].supports("telepathy", DEVICE).status is Status.NO
    assert platforms["mlx"].supports("seed", DEVICE).status is Status.YES
    metal = replace(DEVICE, features=frozenset({"metal"}))
    assert platforms["mlx"].supports("seed", metal).status is Status.UNVERIFIED


@pytest.mark.parametrize(
    ("machine", "platform", "torch_device", "collectives"),
    [
        ("nvidia_h100", "cuda", "cuda:1", "nccl"),
        ("amd_mi300x", "rocm", "cuda:1", "nccl"),
        ("intel_arc_b580", "xpu", "xpu:1", "xccl"),
    ],
)
def test_an_executor_is_built_without_its_hardware(
    machine: str, platform: str, torch_device: str, collectives: str
) -> None:
    """Nothing of a device is touched before `load`; index and facts arrive as chosen."""
    facts = select.probe_all(load(machine))[platform].devices[0]
    executor = select.platforms()[platform].executor(EngineSpec("model", device_index=1), facts)
    device = executor._device  # type: ignore[attr-defined]
    assert str(device.torch_device) == torch_device
    assert device.facts is facts
    assert device.collectives == collectives
    assert device.feature_support.status is Status.UNVERIFIED
    executor.close()


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("no_torch", "cuda"),
        ("nvidia_cpu_only_torch", "cuda"),
        ("nvidia_no_driver", "cpu"),
        ("two_accelerators_tie", "cpu"),
        ("amd_mi300x", "rocm"),
        ("amd_integrated_gfx1036", "cpu"),
        ("ascend_version_skew", "npu"),
        ("intel_arc_b580", "xpu"),
        ("intel_core_ultra", "cpu"),
        ("apple_m4", "mlx"),
        ("graviton3", "cpu"),
    ],
)
def test_what_to_install_follows_the_hardware(name: str, extra: str) -> None:
    chosen, why = select.install_extra(load(name))
    assert chosen == extra
    assert why
    assert "\n" not in why + chosen


# ---- out of tree


class Wrong:
    """Not a platform."""


class Liar(toy_platform.ToyPlatform):
    name = "liar"

    def probe(self, machine: Machine) -> Probe:
        return Probe(True, 99, "")


class Homeless(Liar):
    def probe(self, machine: Machine) -> Probe:
        return Probe(True, 99, "usable, trust me")


class Thrower(Liar):
    def probe(self, machine: Machine) -> Probe:
        raise ZeroDivisionError("a bug of its author")


class Impostor(toy_platform.ToyPlatform):
    name = "cpu"


class Rival(toy_platform.ToyPlatform):
    name = "rival"

    def probe(self, machine: Machine) -> Probe:
        return Probe(True, 50, "rank of an accelerator", devices=(DEVICE,))


def explode() -> Platform:
    raise SystemExit("an out-of-tree package that exits on import")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Probe]]:
    """Probe this machine's platforms and those of the objects given as if by entry points."""

    def install(machine: str, **objects: object) -> dict[str, Probe]:
        class Entry:
            dist = None

            def __init__(self, name: str, loaded: object) -> None:
                self.name, self.value, self._loaded = name, f"somewhere:{name}", loaded

            def load(self) -> object:
                if isinstance(self._loaded, Exception):
                    raise self._loaded
                return self._loaded

        entries = [Entry(name, loaded) for name, loaded in objects.items()]
        monkeypatch.setattr(select, "entry_points", lambda group: entries)
        return select.probe_all(load(machine))

    return install


def test_an_out_of_tree_platform_is_one_among_others(
    installed: Callable[..., dict[str, Probe]],
) -> None:
    found = installed("xeon_amx", toy=toy_platform.ToyPlatform, object=Rival())
    assert select.choose(found, "toy").chosen == "toy"
    assert select.choose(found).chosen == "rival"
    assert "toy" in dict(select.choose(found).rejected)
    with pytest.raises(PlatformError, match="cuda and rival"):
        select.choose(installed("nvidia_h100", rival=Rival))


def test_an_out_of_tree_platform_is_never_an_extra_to_install(
    installed: Callable[..., dict[str, Probe]],
) -> None:
    assert installed("xeon_amx", rival=Rival)["rival"].usable
    assert select.install_extra(load("xeon_amx"))[0] == "cpu"


@pytest.mark.parametrize(
    ("loaded", "reason"),
    [
        (ImportError("no module named 'libmissing'"), "ImportError: no module named 'libmissing'"),
        (explode, "SystemExit: an out-of-tree package that exits"),
        (Wrong, "is not a Platform"),
        (42, "is not a Platform"),
    ],
)
def test_a_broken_entry_point_is_an_unusable_probe(
    installed: Callable[..., dict[str, Probe]], loaded: object, reason: str
) -> None:
    found = installed("xeon_amx", broken=loaded)
    assert not found["broken"].usable
    assert reason in found["broken"].reason
    assert "pip uninstall" in found["broken"].remedy
    assert select.choose(found).chosen == "cpu"
    with pytest.raises(PlatformError, match="'broken' cannot serve"):
        select.choose(found, "broken")
    with pytest.raises(PlatformError, match="cannot be used"):
        select.platforms()["broken"].executor(EngineSpec("model"), DEVICE)


@pytest.mark.parametrize(
    ("platform", "reason"),
    [
        (Thrower, "its probe raised ZeroDivisionError: a bug of its author"),
        (Liar, "gave no reason"),
        (Homeless, "names no device"),
    ],
)
def test_a_probe_that_misbehaves_is_unusable(
    installed: Callable[..., dict[str, Probe]], platform: object, reason: str
) -> None:
    found = installed("xeon_amx", liar=platform)
    assert not found["liar"].usable
    assert reason in found["liar"].reason
    assert select.choose(found).chosen == "cpu"


def test_a_taken_name_does_not_replace_a_platform(
    installed: Callable[..., dict[str, Probe]],
) -> None:
    found = installed("xeon_amx", cpu=Impostor)
    assert "AMX" in found["cpu"].reason
    assert "is taken" in found["cpu (somewhere:cpu)"].reason


def test_the_six_come_first_and_are_platforms() -> None:
    found = select.platforms()
    assert list(found)[:6] == ["cuda", "rocm", "npu", "xpu", "mlx", "cpu"]
    assert all(isinstance(platform, Platform) for platform in found.values())
    assert all(name == found[name].name for name in list(found)[:6])
