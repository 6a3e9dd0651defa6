"""Accelerators as the operating system and the vendors' own tools show them. Nothing here opens a
device node or loads a driver library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .interface import Accelerator
from .machine_source import Source

MIB = 2**20
GPU_CLASSES = ("0x03", "0x12")  # PCI base class: display, processing accelerator

# Intel graphics by PCI device id (kernel's include/drm/intel/pciids.h), most significant digits.
INTEL_ARCHITECTURES = {
    "0x0bd": "pvc", "0x56a": "dg2", "0x56b": "dg2", "0x56c": "dg2", "0x569": "dg2",
    "0xe20": "bmg", "0xe21": "bmg", "0xe22": "bmg", "0x64a": "lnl", "0x64b": "lnl",
    "0x7d4": "mtl", "0x7d5": "mtl", "0x7dd": "mtl", "0xb08": "ptl", "0xb09": "ptl",
}  # fmt: skip
INTEL_NAMES = {
    "0xe20b": "Arc B580", "0xe20c": "Arc B570", "0xe211": "Arc Pro B60", "0xe212": "Arc Pro B50",
    "0x56a0": "Arc A770", "0x56a1": "Arc A750", "0x56a2": "Arc A580", "0x56a5": "Arc A380",
    "0x0bd5": "Data Center GPU Max 1550", "0x0bda": "Data Center GPU Max 1100",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PCIDevice:
    address: str
    device: str  # "0x2330"
    driver: str  # name of the bound kernel driver, "" when none
    folder: str


def pci_devices(source: Source, vendor: str) -> list[PCIDevice]:
    """GPUs and accelerators of a PCI vendor ("0x10de"), in bus order."""
    found = []
    for folder in source.glob("/sys/bus/pci/devices/*"):
        if source.text(f"{folder}/vendor") != vendor:
            continue
        if source.text(f"{folder}/class").startswith(GPU_CLASSES):
            device, driver = source.text(f"{folder}/device"), source.link(f"{folder}/driver")
            found.append(PCIDevice(folder.rsplit("/", 1)[-1], device, driver, folder))
    return found


def accelerators(source: Source) -> tuple[Accelerator, ...]:
    """Of every vendor; what `*_VISIBLE_DEVICES` and the like hide is left out."""
    found: list[Accelerator] = []
    for vendor, (look, variables) in VENDORS.items():
        seen = list(look(source))
        for variable in variables:
            if variable in source.environment:
                seen = visible(seen, source.environment[variable])
                break
        found += [replace(a, vendor=vendor) for a in seen]
    return tuple(found)


def visible(devices: list[Accelerator], value: str) -> list[Accelerator]:
    """What a variable such as CUDA_VISIBLE_DEVICES leaves, in its order. Like the runtimes, stops
    at the first index that does not exist; uuids are taken as they come."""
    chosen: list[Accelerator] = []
    for word in filter(None, (w.strip() for w in value.split(","))):
        if word.removeprefix("-").isdecimal():
            if not 0 <= int(word) < len(devices):
                break
            chosen.append(devices[int(word)])
        elif len(chosen) < len(devices):
            chosen.append(devices[len(chosen)])
    return chosen


def nvidia(source: Source) -> Iterator[Accelerator]:
    version = re.search(
        r"Kernel Module.*?\s(\d+\.[\d.]+)", source.text("/proc/driver/nvidia/version")
    )
    driver = version[1] if version else ""
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    listed = source.run(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    for name, megabytes, capability, smi_driver in rows:
        arch = "sm_" + capability.replace(".", "") if re.fullmatch(r"\d+\.\d", capability) else ""
        size = int(megabytes) * MIB if megabytes.isdigit() else 0
        yield Accelerator("nvidia", name, arch, size, smi_driver or driver)
    if rows:
        return
    models = source.glob("/proc/driver/nvidia/gpus/*/information")
    for model in models:
        found = re.search(r"Model:\s*(.+)", source.text(model))
        yield Accelerator("nvidia", found[1].strip() if found else "GPU", driver=driver)
    if not models:
        for device in pci_devices(source, "0x10de"):
            bound = driver if device.driver == "nvidia" else ""
            yield Accelerator("nvidia", f"GPU {device.device} at {device.address}", driver=bound)


def gfx_name(target: int) -> str:
    """KFD's gfx_target_version -> LLVM's name: 90402 -> gfx942, 90010 -> gfx90a."""
    return f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"


def amd(source: Source) -> Iterator[Accelerator]:
    """From the kernel's KFD topology; a card without it is listed as PCI shows it."""
    driver = source.text("/sys/module/amdgpu/version")
    names = _rocm_smi_names(source)
    seen = 0
    for node in source.glob("/sys/class/kfd/kfd/topology/nodes/*/properties"):
        words = [line.split() for line in source.text(node).splitlines()]
        properties = {w[0]: int(w[1]) for w in words if len(w) == 2 and w[1].isdigit()}
        target = properties.get("gfx_target_version", 0)
        if target == 0:
            continue  # a CPU node
        location = properties.get("location_id", 0)
        address = f"{properties.get('domain', 0):04x}:{location >> 8:02x}:{location >> 3 & 31:02x}"
        folder = f"/sys/bus/pci/devices/{address}.{location & 7}"
        size = source.number(f"{folder}/mem_info_vram_total") or _kfd_memory(source, node)
        arch = gfx_name(target)
        name = source.text(f"{folder}/product_name") or (names[seen] if seen < len(names) else "")
        yield Accelerator("amd", name or f"Radeon {arch}", arch, size, driver or "amdgpu")
        seen += 1
    if not seen:
        for device in pci_devices(source, "0x1002"):
            bound = driver or device.driver if device.driver == "amdgpu" else ""
            yield Accelerator("amd", f"GPU {device.device} at {device.address}", driver=bound)


def _kfd_memory(source: Source, node: str) -> int:
    """Device memory of a KFD node: its banks of heap type 1 (public) and 2 (private)."""
    total = 0
    for bank in source.glob(node.replace("/properties", "/mem_banks/*/properties")):
        text = source.text(bank)
        heap, size = (re.search(rf"{n} (\d+)", text) for n in ("heap_type", "size_in_bytes"))
        if heap and size and heap[1] in ("1", "2"):
            total += int(size[1])
    return total


def _rocm_smi_names(source: Source) -> list[str]:
    try:
        cards = json.loads(source.run(["rocm-smi", "--showproductname", "--json"]) or "{}")
        rows = [cards[key] for key in sorted(cards) if key.startswith("card")]
        return [str(row.get("Card Series") or row.get("Card series") or "") for row in rows]
    except (ValueError, AttributeError, TypeError):
        return []


# Generations by PCI device id, from general knowledge and seen on no machine; the tool prints
# "Ascend910" for the first and the third alike.
ASCEND_GENERATIONS = {"0xd801": "910", "0xd802": "910B", "0xd803": "910C"}
FIRST_910_BYTES = 32 * 2**30


def huawei(source: Source) -> Iterator[Accelerator]:
    """From `npu-smi info` (two lines a chip), else the device nodes, else PCI."""
    found = re.search(r"[Vv]ersion=(\S+)", source.text("/usr/local/Ascend/driver/version.info"))
    driver = found[1] if found else ""
    name, listed = "", 0
    for line in source.run(["npu-smi", "info"]).splitlines():
        first = re.match(r"\|\s*\d+\s+(\w[\w-]*)\s*\|\s*[A-Z][A-Za-z]+\s*\|", line)
        second = re.match(
            r"\|\s*\d+[\s\d]*\|\s*([0-9A-Fa-fx]{4}:[\w:.]+).*?(\d+)\s*/\s*(\d+)\s*\|$", line
        )
        if first:
            name = first[1]
        elif second and name:
            listed += 1
            folder = f"/sys/bus/pci/devices/{second[1].lower()}"
            yield _ascend(name, int(second[3]) * MIB, driver, source.text(f"{folder}/device"))
    if not listed:
        nodes = source.glob("/dev/davinci[0-9]*")
        for _ in nodes:
            yield _ascend("", 0, driver, "")
        for device in [] if nodes else pci_devices(source, "0x19e5"):
            label = f"NPU {device.device} at {device.address}"
            yield Accelerator("huawei", label, driver=driver if device.driver else "")


def _ascend(name: str, memory: int, driver: str, device: str) -> Accelerator:
    """The tool prints "910B3", "910ProB" or "Ascend910"; the arch word is "ascend910b". Where the
    bus does not tell generations apart, memory does: the first 910 had 32 GiB, a 910C has 64."""
    short = name.removeprefix("Ascend")
    if short == "910":
        larger = "910C" if memory > FIRST_910_BYTES else "910"
        short = ASCEND_GENERATIONS.get(device, larger)
    generation = ASCEND_GENERATIONS.get(device, short)
    arch = re.match(r"\d+(?:[A-Z](?=\d|-|$))?", generation)
    word = "ascend" + arch[0].lower() if arch else ""
    return Accelerator("huawei", f"Ascend {short}".strip(), word, memory, driver)


def intel(source: Source) -> Iterator[Accelerator]:
    """From PCI; names from `xpu-smi discovery -j` where it is there."""
    names = _xpu_smi_names(source)
    for device in pci_devices(source, "0x8086"):
        arch = INTEL_ARCHITECTURES.get(device.device[:5], "")
        name = names.get(device.address) or INTEL_NAMES.get(device.device)
        memory = source.number(f"{device.folder}/tile0/physical_vram_size_bytes")
        memory = memory or (_largest_bar(source, device) if arch in ("bmg", "dg2", "pvc") else 0)
        driver = device.driver if device.driver in ("xe", "i915") else ""
        yield Accelerator("intel", name or f"graphics {device.device}", arch, memory, driver)


def _largest_bar(source: Source, device: PCIDevice) -> int:
    """Bytes of the largest PCI window: with Resizable BAR about the card's whole memory."""
    sizes = [0]
    for line in source.text(f"{device.folder}/resource").splitlines():
        words = line.split()
        if len(words) == 3 and int(words[1], 16):
            sizes.append(int(words[1], 16) - int(words[0], 16) + 1)
    return max(sizes)


def _xpu_smi_names(source: Source) -> dict[str, str]:
    try:
        listed = json.loads(source.run(["xpu-smi", "discovery", "-j"]) or "{}")
        rows = listed.get("device_list", [])
        return {str(row["pci_bdf_address"]): str(row["device_name"]) for row in rows}
    except (ValueError, AttributeError, TypeError, KeyError):
        return {}


VENDORS = {
    "nvidia": (nvidia, ("CUDA_VISIBLE_DEVICES",)),
    "amd": (amd, ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")),
    "huawei": (huawei, ("ASCEND_RT_VISIBLE_DEVICES",)),
    "intel": (intel, ("ZE_AFFINITY_MASK",)),
}
