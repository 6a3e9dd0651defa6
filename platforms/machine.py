"""One look at the machine. Reads files and asks vendor tools; never imports a framework, never
initialises a device. `observe` is all that others need; the platforms judge what it returns."""

from __future__ import annotations

import platform as python_platform
import re
from importlib import metadata

from .interface import Accelerator, Machine
from .machine_accelerators import VENDORS, accelerators
from .machine_processor import memory, processor
from .machine_source import Source

PACKAGES = ("torch", "torch_npu", "mlx", "mlx-lm", "triton", "triton-xpu", "numpy",
    "flashinfer-python", "amd-aiter", "intel-extension-for-pytorch",
)  # fmt: skip
NODES = (
    "/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/dxg", "/dev/kfd",
    "/dev/dri/renderD*", "/dev/davinci[0-9]*", "/dev/davinci_manager", "/dev/devmm_svm",
    "/dev/hisi_hdc",
)  # fmt: skip
CANN_HOMES = (
    "/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/opt/Ascend/cann",
)  # fmt: skip
LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
LIBRARIES = {"level-zero": "libze_loader.so.1", "level-zero-gpu": "libze_intel_gpu.so.1"}
VISIBILITY = tuple(dict.fromkeys(name for _, names in VENDORS.values() for name in names))


def observe(source: Source | None = None) -> Machine:
    """What is here and usable by this process. Takes well under a second without vendor tools."""
    source = source or Source()
    system = python_platform.system().lower()
    cpu = processor(source, system)
    total, available = memory(source)
    arch = python_platform.machine().lower()
    arch = {"aarch64": "arm64", "amd64": "x86_64"}.get(arch, arch)
    nodes = tuple(node for pattern in NODES for node in source.glob(pattern))
    devices = accelerators(source)
    if system == "darwin" and arch == "arm64":
        word = cpu.name.removeprefix("Apple ").replace(" ", "-").lower()
        devices = (*devices, Accelerator("apple", cpu.name, word, total))
    return Machine(
        os=system,
        os_version=_os_version(source, system),
        arch=arch,
        python=python_platform.python_version(),
        cpu_name=cpu.name,
        cpu_features=cpu.features,
        physical_cores=cpu.physical_cores,
        logical_cores=cpu.logical_cores,
        memory_bytes=total,
        available_bytes=available,
        packages=packages(),
        torch_build=torch_build(_torch_version_file()),
        accelerators=devices,
        device_nodes=nodes,
        denied_nodes=tuple(node for node in nodes if not source.allowed(node)),
        tools=tools(source),
    )


def packages() -> dict[str, str]:
    """Installed distributions that platforms ask about, without importing any."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _torch_version_file() -> str:
    """The text of torch's version.py; "" when torch is not installed."""
    try:
        path = metadata.distribution("torch").locate_file("torch/version.py")
        return str(path.read_text()) if hasattr(path, "read_text") else ""
    except (metadata.PackageNotFoundError, OSError):
        return ""


def torch_build(version_file: str) -> str:
    """What torch was built for, from the text of its version.py: "cuda 12.8", "hip 6.4", "xpu
    2025.1", "cpu", or "" for no text."""
    if not version_file:
        return ""
    for kind in ("hip", "cuda", "xpu"):  # a HIP build may set cuda too
        value = re.search(rf"^{kind}\b[^=\n]*=\s*['\"]([^'\"]+)", version_file, re.MULTILINE)
        if value:
            return f"{kind} {value[1]}"
    return "cpu"


def tools(source: Source) -> dict[str, str]:
    """Vendor tools, libraries and variables: name -> version, path or value."""
    found: dict[str, str] = {}
    rocm = source.text("/opt/rocm/.info/version")
    if rocm:
        found["rocm"] = rocm
    for name, library in LIBRARIES.items():
        paths = [p for folder in LIBRARY_FOLDERS for p in source.glob(f"{folder}/{library}")]
        if paths:
            found[name] = paths[0]
    found |= _cann(source)
    if source.path("/.dockerenv").exists() or source.path("/run/.containerenv").exists():
        found["container"] = "yes"
    for name in (*VISIBILITY, "HSA_OVERRIDE_GFX_VERSION"):
        if name in source.environment:
            found[name] = source.environment[name]
    return found


def _cann(source: Source) -> dict[str, str]:
    """CANN's version and, where its set_env.sh has been sourced, the folder that says so."""
    loaded = source.environment.get("ASCEND_HOME_PATH", "")
    for home in filter(None, (loaded, *CANN_HOMES)):
        if not source.path(home).is_dir():
            continue
        for name in ("*/ascend_toolkit_install.info", "version.cfg", "version.info"):
            for file in source.glob(f"{home}/{name}"):
                version = re.search(r"(?im)version\S*?=\[?([\w.]*?\d[\w.]*)", source.text(file))
                if version:
                    return {"cann": version[1]} | ({"cann-environment": loaded} if loaded else {})
        return {"cann": home} | ({"cann-environment": loaded} if loaded else {})
    return {}


def _os_version(source: Source, system: str) -> str:
    if system == "linux":
        pretty = re.search(r'^PRETTY_NAME="?([^"\n]+)', source.text("/etc/os-release"), re.M)
        return pretty[1] if pretty else python_platform.release()
    return python_platform.mac_ver()[0] if system == "darwin" else python_platform.version()
