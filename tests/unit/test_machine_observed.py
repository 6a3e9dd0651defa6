"""Guards `platforms.machine.observe`: what it reads from files, vendor tools and variables, over
fake file systems and canned tool output, and that nonsense in either never raises."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold.platforms import machine_processor
from sixfold.platforms.interface import Accelerator
from sixfold.platforms.machine import observe, packages, tools, torch_build
from sixfold.platforms.machine_accelerators import accelerators, gfx_name, visible
from sixfold.platforms.machine_processor import memory, processor
from sixfold.platforms.machine_source import Source, run_tool

MIB = 2**20
Make = Callable[..., Source]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A Source over files {path: text}, tool outputs {name: text} and variables."""

    def source(
        files: Mapping[str, str] | None = None,
        tools: Mapping[str, str] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Source:
        for name, text in (files or {}).items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

        def run(command: Sequence[str]) -> str:
            return (tools or {}).get(" ".join(command), (tools or {}).get(command[0], ""))

        return Source(tmp_path, run, variables or {})

    return source


def pci(vendor: str, device: str, address: str = "0000:41:00.0", kind: str = "0x030200") -> dict:
    folder = f"/sys/bus/pci/devices/{address}"
    return {f"{folder}/vendor": vendor, f"{folder}/device": device, f"{folder}/class": kind}


# ---- processor and memory

X86 = """processor\t: 0
model name\t: Some CPU @ 2.0GHz
flags\t\t: fpu avx2 avx512f amx_int8

processor\t: 1
model name\t: Another
flags\t\t: none
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


def cores(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_processor, "usable_cpus", lambda: list(range(count)))


def topology(*core_ids: int) -> dict[str, str]:
    folder = "/sys/devices/system/cpu/cpu{}/topology"
    files = {f"{folder.format(i)}/core_id": str(core) for i, core in enumerate(core_ids)}
    return files | {f"{folder.format(i)}/physical_package_id": "0" for i in range(len(core_ids))}


def test_cpuinfo_of_x86_and_arm(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(2, monkeypatch)
    x86 = processor(make({"/proc/cpuinfo": X86}), "linux")
    assert (x86.name, x86.features) == (
        "Some CPU @ 2.0GHz",
        frozenset({"fpu", "avx2", "avx512f", "amx_int8"}),
    )
    arm = processor(make({"/proc/cpuinfo": ARM}), "linux")
    assert (arm.name, arm.features) == ("Neoverse-V1", frozenset({"fp", "asimd", "i8mm"}))


def test_hyperthreads_are_one_core(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(4, monkeypatch)
    seen = processor(make(topology(0, 0, 1, 1)), "linux")
    assert (seen.physical_cores, seen.logical_cores) == (2, 4)
    cores(3, monkeypatch)  # an affinity mask takes the last thread away
    assert processor(make(), "linux").physical_cores == 2


def test_cores_without_a_topology_count_each(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cores(3, monkeypatch)
    assert processor(make(), "linux").physical_cores == 3


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000"}, 1),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        (
            {
                "/proc/self/cgroup": "3:cpu,cpuacct:/x\n0::/\n",
                "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "50000",
                "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {
                "/proc/self/cgroup": "3:cpu,cpuacct:/x\n",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_cpu_quota_of_the_control_group(
    make: Make, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], want: int
) -> None:
    cores(8, monkeypatch)
    seen = processor(make(files), "linux")
    assert (seen.physical_cores, seen.logical_cores) == (want, want)


@pytest.mark.parametrize(
    "files",
    [
        {
            "/proc/self/cgroup": "0::/box\n",
            "/sys/fs/cgroup/box/memory.max": str(64 * MIB),
            "/sys/fs/cgroup/box/memory.current": str(40 * MIB),
            "/sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {10 * MIB}\n",
        },
        {
            "/proc/self/cgroup": "4:memory:/host/path\n",  # only the mount's root is visible
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(64 * MIB),
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(40 * MIB),
            "/sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {10 * MIB}\n",
        },
    ],
)
def test_memory_limit_of_the_control_group(make: Make, files: dict[str, str]) -> None:
    assert memory(make(files)) == (64 * MIB, 34 * MIB)


def test_memory_without_a_limit_is_the_machines(make: Make) -> None:
    unlimited = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "max"}
    total, available = memory(make(unlimited))
    assert total > available > 64 * MIB
    huge = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": str(2**63 - 4096)}
    assert memory(make(huge))[0] == total


def test_mac(make: Make) -> None:
    answers = {
        "sysctl -n machdep.cpu.brand_string": "Apple M4\n",
        "sysctl -n hw.physicalcpu": "10\n",
        "sysctl -n hw.logicalcpu": "10\n",
        "sysctl hw.optional": "hw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_SME: 0\n"
        "hw.optional.AdvSIMD: 1\n",
        "sysctl": "",
    }
    seen = processor(make(tools=answers), "darwin")
    assert (seen.name, seen.physical_cores) == ("Apple M4", 10)
    assert seen.features == {"bf16", "asimd"}


# ---- accelerators


def test_nvidia_smi(make: Make) -> None:
    listed = "NVIDIA H100 80GB HBM3, 81559, 9.0, 550.54.15\nNVIDIA GB10, [N/A], 12.1, 580.1\n"
    seen = accelerators(make(tools={"nvidia-smi": listed}))
    assert seen == (
        Accelerator("nvidia", "NVIDIA H100 80GB HBM3", "sm_90", 81559 * MIB, "550.54.15"),
        Accelerator("nvidia", "NVIDIA GB10", "sm_121", 0, "580.1"),
    )


def test_nvidia_without_its_tool(make: Make) -> None:
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 2024"
    files = {
        "/proc/driver/nvidia/version": version,
        "/proc/driver/nvidia/gpus/0000:41:00.0/information": "Model: \t\t NVIDIA A10\nIRQ: 1\n",
    }
    assert accelerators(make(files)) == (Accelerator("nvidia", "NVIDIA A10", "", 0, "550.54.15"),)


def test_nvidia_open_kernel_module(make: Make) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build"
    files = {
        "/proc/driver/nvidia/version": version,
        "/proc/driver/nvidia/gpus/0000:41:00.0/information": "Model: NVIDIA B200\n",
    }
    assert accelerators(make(files))[0].driver == "570.124.06"


def test_nvidia_without_a_driver_is_seen_on_the_bus(make: Make) -> None:
    files = pci("0x10de", "0x2330") | pci("0x10de", "0x22e8", "0000:41:00.1", kind="0x040300")
    (seen,) = accelerators(make(files))  # its sound device is not counted
    assert (seen.vendor, seen.driver, seen.memory_bytes) == ("nvidia", "", 0)
    assert "0x2330" in seen.name


KFD = "/sys/class/kfd/kfd/topology/nodes"


def kfd_node(number: int, target: int, location: int, simds: int = 1216) -> dict[str, str]:
    text = f"simd_count {simds}\ngfx_target_version {target}\nlocation_id {location}\ndomain 0\n"
    return {f"{KFD}/{number}/properties": text}


def test_amd_from_the_kernels_topology(make: Make) -> None:
    files = kfd_node(0, 0, 0, simds=0) | kfd_node(1, 90402, 0x0500) | kfd_node(2, 110000, 0x0300)
    files |= {
        "/sys/bus/pci/devices/0000:05:00.0/product_name": "AMD Instinct MI300X OAM",
        "/sys/bus/pci/devices/0000:05:00.0/mem_info_vram_total": str(192 * 2**30),
        f"{KFD}/2/mem_banks/0/properties": f"heap_type 1\nsize_in_bytes {24 * 2**30}\n",
        f"{KFD}/2/mem_banks/1/properties": "heap_type 4\nsize_in_bytes 65536\n",
        "/sys/module/amdgpu/version": "6.12.12\n",
    }
    assert accelerators(make(files)) == (
        Accelerator("amd", "AMD Instinct MI300X OAM", "gfx942", 192 * 2**30, "6.12.12"),
        Accelerator("amd", "Radeon gfx1100", "gfx1100", 24 * 2**30, "6.12.12"),
    )


def test_amd_name_from_its_tool(make: Make) -> None:
    listed = json.dumps({"card0": {"Card Series": "Radeon RX 7900 XTX"}, "system": {}})
    seen = accelerators(make(kfd_node(1, 110000, 0x0300), {"rocm-smi": listed}))
    assert seen[0].name == "Radeon RX 7900 XTX"


def test_amd_on_the_bus_without_a_driver(make: Make) -> None:
    (seen,) = accelerators(make(pci("0x1002", "0x74a1", kind="0x120000")))
    assert (seen.vendor, seen.driver) == ("amd", "")


@pytest.mark.parametrize(
    ("target", "name"),
    [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (110501, "gfx1151")],
)
def test_gfx_names(target: int, name: str) -> None:
    assert gfx_name(target) == name


NPU_SMI = """
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4-1             | OK            | 91.3        33                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3197 / 65536         |
+===========================+===============+====================================================+
| 1     Ascend910           | Warning       | 178.5       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3416 / 65536         |
+------------------------------------------------------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""


def test_npu_smi(make: Make) -> None:
    version = {"/usr/local/Ascend/driver/version.info": "Version=25.2.0\nascendhal_version=7\n"}
    assert accelerators(make(version, {"npu-smi": NPU_SMI})) == (
        Accelerator("huawei", "Ascend 910B4-1", "ascend910b", 65536 * MIB, "25.2.0"),
        Accelerator("huawei", "Ascend 910C", "ascend910c", 65536 * MIB, "25.2.0"),
    )


@pytest.mark.parametrize(
    ("device", "printed", "megabytes", "arch"),
    [
        ("0xd801", "Ascend910", 65536, "ascend910"),
        ("0xd803", "Ascend910", 65536, "ascend910c"),
        ("0xd801", "910B", 32768, "ascend910"),
        ("", "Ascend910", 32768, "ascend910"),
        ("", "Ascend910", 65536, "ascend910c"),
        ("", "910ProB", 32768, "ascend910"),
        ("", "910B3", 65536, "ascend910b"),
        ("", "310P3", 21527, "ascend310p"),
    ],
)
def test_generations_of_npus(
    make: Make, device: str, printed: str, megabytes: int, arch: str
) -> None:
    """The tool prints one name for the first 910 and for the 910C."""
    text = NPU_SMI.replace("Ascend910", printed).replace("3416 / 65536", f"3416 / {megabytes}")
    files = {"/sys/bus/pci/devices/0000:9d:00.0/device": device} if device else {}
    assert accelerators(make(files, {"npu-smi": text}))[1].arch == arch


def test_npu_without_its_tool(make: Make) -> None:
    nodes = {"/dev/davinci0": "", "/dev/davinci1": "", "/dev/davinci_manager": ""}
    assert len(accelerators(make(nodes))) == 2


def test_npu_on_the_bus_only(make: Make) -> None:
    (seen,) = accelerators(make(pci("0x19e5", "0xd802", kind="0x120000")))
    assert (seen.vendor, seen.driver) == ("huawei", "")


def test_intel(make: Make, tmp_path: Path) -> None:
    source = make(
        pci("0x8086", "0xe20b", "0000:03:00.0", "0x030000")
        | pci("0x8086", "0x5917", "0000:00:02.0", "0x030000")
        | pci("0x8086", "0x1533", "0000:04:00.0", "0x020000")
        | {"/sys/bus/pci/devices/0000:03:00.0/resource": "0xf0 0xff 0x2\n0x0 0x3ffffffff 0x1\n"}
    )
    driver = tmp_path / "sys/bus/pci/drivers/xe"
    driver.mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0000:03:00.0/driver").symlink_to(driver)
    assert accelerators(source) == (
        Accelerator("intel", "graphics 0x5917", "", 0, ""),
        Accelerator("intel", "Arc B580", "bmg", 2**34, "xe"),
    )


def test_intel_name_from_its_tool(make: Make) -> None:
    row = {"pci_bdf_address": "0000:03:00.0", "device_name": "Intel(R) Arc(TM) B580 Graphics"}
    listed = json.dumps({"device_list": [row]})
    seen = accelerators(make(pci("0x8086", "0xe20b", "0000:03:00.0"), {"xpu-smi": listed}))
    assert seen[0].name == "Intel(R) Arc(TM) B580 Graphics"


@pytest.mark.parametrize(
    ("value", "want"),
    [("", []), ("1", ["b"]), ("2,0", ["c", "a"]), ("0,7,1", ["a"]), ("-1", []), ("GPU-x", ["a"])],
)
def test_visible_devices(value: str, want: list[str]) -> None:
    devices = [Accelerator("nvidia", name) for name in "abc"]
    assert [d.name for d in visible(devices, value)] == want


def test_hidden_devices_are_left_out_and_the_variable_is_told(make: Make) -> None:
    listed = "A, 1, 9.0, 5\nB, 1, 9.0, 5\n"
    source = make(tools={"nvidia-smi": listed}, variables={"CUDA_VISIBLE_DEVICES": "1"})
    assert [a.name for a in accelerators(source)] == ["B"]
    assert tools(source)["CUDA_VISIBLE_DEVICES"] == "1"


PIECES = [NPU_SMI, "a, b, c, d", "[]", "{}", '{"card0":1}', '{"device_list":[1]}']
ANY_TEXT = st.text(max_size=200) | st.sampled_from(PIECES)


@settings(max_examples=40, deadline=None)
@given(text=ANY_TEXT)
def test_nonsense_from_tools_and_files_never_raises(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("root")
    names = "/proc/cpuinfo /proc/self/cgroup /proc/driver/nvidia/version /etc/os-release "
    names += f"{KFD}/1/properties /sys/bus/pci/devices/x/resource /sys/fs/cgroup/memory.max "
    names += "/usr/local/Ascend/driver/version.info /opt/rocm/.info/version "
    names += "/sys/fs/cgroup/cpu.max /sys/devices/system/cpu/online "
    names += "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list "
    names += "/sys/devices/system/node/node0/cpulist"
    for name in names.split():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    seen = observe(Source(root, lambda command: text, {"CUDA_VISIBLE_DEVICES": text}))
    assert seen.physical_cores >= 1


# ---- tools, libraries, packages


def test_cann_with_and_without_its_environment(make: Make) -> None:
    home = "/usr/local/Ascend/ascend-toolkit/latest"
    files = {f"{home}/aarch64-linux/ascend_toolkit_install.info": "version=8.3.RC1\narch=aarch64\n"}
    assert tools(make(files)) == {"cann": "8.3.RC1"}
    loaded = make(files, variables={"ASCEND_HOME_PATH": home})
    assert tools(loaded)["cann-environment"] == home


def test_libraries_and_rocm(make: Make) -> None:
    library = "/usr/lib/x86_64-linux-gnu/libze_intel_gpu.so.1"
    files = {library: "", "/opt/rocm/.info/version": "6.4.1-83\n", "/.dockerenv": ""}
    want = {"rocm": "6.4.1-83", "level-zero-gpu": library, "container": "yes"}
    assert tools(make(files)) == want


def test_device_nodes_and_those_denied(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make({"/dev/kfd": "", "/dev/dri/renderD128": "", "/dev/dri/card0": ""})
    monkeypatch.setattr(Source, "allowed", lambda self, name: name != "/dev/kfd")
    seen = observe(source)
    assert seen.device_nodes == ("/dev/kfd", "/dev/dri/renderD128")
    assert seen.denied_nodes == ("/dev/kfd",)


VERSION_FILE = "__version__ = '2.13.0'\ncuda: Optional[str] = {}\nhip: Optional[str] = {}\n"


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("", ""),
        (VERSION_FILE.format("None", "None"), "cpu"),
        (VERSION_FILE.format("'12.8'", "None"), "cuda 12.8"),
        (VERSION_FILE.format("None", "'6.4.43484'"), "hip 6.4.43484"),
        (VERSION_FILE.format("'12.8'", "'6.4.43484'"), "hip 6.4.43484"),
        ("xpu: Optional[str] = '20250301'\ncuda = None", "xpu 20250301"),
        ("hip = None\ncuda = '11.8'\n", "cuda 11.8"),
    ],
)
def test_torch_build_from_its_version_file(text: str, build: str) -> None:
    assert torch_build(text) == build


def test_this_machine() -> None:
    seen = observe()
    assert seen.packages == packages()
    assert ("torch" in seen.packages) == bool(seen.torch_build)
    assert 1 <= seen.physical_cores <= seen.logical_cores
    assert 0 < seen.available_bytes <= seen.memory_bytes
    assert seen.cpu_name


def test_a_tool_that_hangs_fails_or_is_absent_gives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sixfold.platforms import machine_source

    monkeypatch.setattr(machine_source, "TOOL_TIMEOUT_S", 0.2)
    assert run_tool([sys.executable, "-c", "print('fine')"]) == "fine\n"
    assert run_tool([sys.executable, "-c", "print('bad'); raise SystemExit(1)"]) == ""
    assert run_tool([sys.executable, "-c", "import threading; threading.Event().wait()"]) == ""
    assert run_tool(["no-such-tool-anywhere"]) == ""
