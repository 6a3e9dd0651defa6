"""The contract between the shared engine and one kind of hardware.

Facts, platform, device and executor are here. Only protocols and frozen dataclasses live in the
`interface*` modules (numpy and typing, no framework).
`interface_step` holds what crosses at every step, `interface_kernels` the kernel registry,
`interface_attention` attention backends, `interface_kv` cache groups and layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from .interface_kv import KVGroup
from .interface_step import StepBatch, StepResult

if TYPE_CHECKING:
    from .interface_kernels import Suite


class Status(Enum):
    """What is known about a feature. `UNVERIFIED`: should work, not yet seen on this hardware."""

    YES = "supported"
    NO = "unsupported"
    UNVERIFIED = "unverified"


@dataclass(frozen=True, slots=True)
class Support:
    """An answer to "can this platform do X?", with the reason in one sentence."""

    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice: what, the value, why, and every candidate refused with its reason."""

    what: str
    chosen: str
    because: str
    rejected: tuple[tuple[str, str], ...] = ()
    fallback: bool = False  # a generic choice where a better one exists; `--strict` refuses it


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator as the operating system shows it, read without initialising the device."""

    vendor: str  # "nvidia", "amd", "huawei", "intel", "apple"
    name: str
    arch: str = ""  # vendor's own word: "sm_90", "gfx942", "ascend910b", "bmg", ""
    memory_bytes: int = 0
    driver: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one look at the machine found. Recorded for real machines in `tests/facts/*.toml`,
    so that every platform's selection rules are tested on any machine."""

    os: str  # "linux", "darwin", "windows"
    os_version: str
    arch: str  # "x86_64", "arm64" (aarch64 is spelled arm64)
    python: str
    cpu_name: str
    cpu_features: frozenset[str]  # names as in /proc/cpuinfo flags
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    available_bytes: int
    packages: Mapping[str, str]  # installed distribution -> version, of those platforms ask about
    torch_build: str = ""  # "cpu", "cuda 12.8", "hip 6.4", "xpu 2025.1", "" when torch is absent
    accelerators: tuple[Accelerator, ...] = ()
    device_nodes: tuple[str, ...] = ()  # existing nodes such as /dev/nvidia0, /dev/kfd
    denied_nodes: tuple[str, ...] = ()  # of these, the ones that this user may not open
    tools: Mapping[str, str] = field(default_factory=dict)  # vendor tool or library -> version/path


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Everything selection may ask about one device. Read before anything is built."""

    kind: str  # the platform's name
    name: str
    arch: tuple[int, ...]  # sm_90 -> (9, 0), gfx942 -> (9, 4, 2), () where meaningless
    memory_bytes: int
    unified_memory: bool
    lane_width: int  # 32, 64; for a CPU the fp32 lanes of its widest vector unit
    dtypes: frozenset[str]  # dtypes with native compute units
    fp8: Literal["none", "ocp", "fnuz"]
    graphs: Literal["none", "stream", "tasks", "traced"]
    libraries: Mapping[str, str]
    features: frozenset[str] = frozenset()  # e.g. CPU flags "avx512_vnni", "amx_int8"
    cores: int = 0  # CPU: physical cores usable by this process
    float64: bool = True  # whether it computes in 64-bit floats at all


@dataclass(frozen=True, slots=True)
class Probe:
    """A platform's judgement of a machine. `reason` is always filled, also when usable;
    `remedy` is the exact command or step that would make an unusable platform usable."""

    usable: bool
    rank: int  # among usable platforms the highest is chosen; a tie is an error
    reason: str
    found: tuple[str, ...] = ()  # what is there, one short line each
    missing: tuple[str, ...] = ()  # what is not, one short line each
    remedy: str = ""
    devices: tuple[DeviceFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an executor is built from. A value that is None was left to the platform, which records
    a `Decision`; a value that is set was set by the user and is honoured or refused."""

    model_path: str  # local directory or .gguf file
    device_index: int = 0
    dtype: str | None = None  # "float32" | "bfloat16" | "float16"
    page_size: int | None = None  # tokens per page
    cache_tokens: int | None = None  # capacity of the full-attention group, in tokens
    memory_fraction: float | None = None  # share of free memory for weights and cache, 0..1
    max_context: int | None = None
    max_rows: int = 64
    max_step_tokens: int = 2048
    threads: int | None = None
    quantize: str | None = None  # "int8" | "int4" | "fp8", on load; "none": in the dtype
    kv_dtype: str | None = None  # of keys and values: as dtype, or "int8"
    graphs: str | None = None  # "on" | "off": capture steps and replay them
    draft: str | None = None  # "mtp": load the model's draft head; "ngram": the engine drafts
    draft_tokens: int = 3  # most drafts of a row in one step
    weight_cache: bool = False  # keep packed matrices on disk, for the next start
    kernels: Mapping[str, str] = field(default_factory=dict)  # op -> provider, chosen by the user
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ImageInput:
    """How a loaded model takes images: each is a run of `token_id` in the prompt, one per block of
    merge x merge patches. Patches are rows of `patch_values` float32, as `common/images` cuts them.
    Rotary positions of such a prompt are those of `common/images/positions.py`, or with
    `sequential` those of a text of as many tokens."""

    token_id: int
    merge: int
    patch_values: int
    sequential: bool = False


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """What the engine must know of a loaded model."""

    groups: tuple[KVGroup, ...]
    vocab_size: int
    max_context: int  # tokens, prompt plus output
    page_size: int
    max_rows: int
    max_step_tokens: int
    overlap: bool  # submit(N+1) is allowed before collect(N)
    mixed_steps: bool  # prefill and decode rows may share one step
    dtype: str
    weight_bytes: int
    cache_bytes: int
    device: DeviceFacts
    features: Mapping[str, Support]  # "logprobs", "prompt_logprobs", "logit_bias", "grammar", ...
    decisions: tuple[Decision, ...]
    max_logprobs: int = 20
    images: ImageInput | None = None  # None: the model, or the platform, takes no images


class Executor(Protocol):
    """Runs steps on one device. All methods are called from one thread."""

    def load(self, progress: LoadProgress | None = None) -> ExecutorInfo:
        """Load weights and reserve the cache. Raises CheckpointError or OutOfMemory."""
        ...

    def submit(self, batch: StepBatch) -> None:
        """Start a step; returns at once where the device allows. Steps run in the order submitted.
        The arrays of `batch` must not change until its `collect`."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest submitted step and return its result. Raises RuntimeError if none is
        pending; re-raises whatever the step raised."""
        ...

    def health(self) -> Support: ...

    def close(self) -> None:
        """Release the device. Idempotent; pending steps are abandoned."""
        ...


class LoadProgress(Protocol):
    """Bytes of weights, unless `stage` says what else is counted."""

    def __call__(self, done: int, total: int, stage: str = "loading weights") -> None: ...


@runtime_checkable
class Platform(Protocol):
    """One kind of hardware. In-tree platforms are a table in `select.py`; others are found by the
    entry point group `sixfold.platforms` (an object or zero-argument callable that gives one)."""

    @property
    def name(self) -> str: ...

    def probe(self, machine: Machine) -> Probe:
        """Judge a machine from what was seen. Pure: imports no framework, initialises no device."""
        ...

    def supports(self, feature: str, facts: DeviceFacts) -> Support: ...

    def executor(self, spec: EngineSpec, facts: DeviceFacts) -> Executor:
        """Build (not yet load) an executor; here, and not before, the framework is imported."""
        ...

    def conformance(self, facts: DeviceFacts | None, interpreted: bool = False) -> Suite:
        """Every kernel and attention backend, ready to be run on the cases of its op's contract.
        `facts` None with `interpreted`: the platform names a recorded device, and what can run in
        an interpreter on host memory does. Raises PlatformError with the reason where there is
        no such suite."""
        ...


class Event(Protocol):
    def wait(self) -> None: ...


class Device(Protocol):
    """The small object that framework-specific runtimes are written against."""

    @property
    def facts(self) -> DeviceFacts: ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, now."""
        ...

    def synchronize(self) -> None: ...

    def event(self) -> Event:
        """An event recorded at the current end of the device's queue."""
        ...

    def to_device(self, array: Any) -> Any:
        """Host numpy array -> device tensor (a copy; asynchronous where the device allows)."""
        ...

    def to_host(self, tensor: Any) -> Any:
        """Device tensor -> host numpy array (a copy; waits for the tensor)."""
        ...

    @property
    def graphs(self) -> Any | None:
        """Capture and replay, or None where the device has none."""
        ...

    @property
    def collectives(self) -> str:
        """Name of the process-group backend: nccl, rccl, hccl, xccl, gloo, ring."""
        ...


def usable(found: Mapping[str, Probe]) -> Sequence[str]:
    """Names of the usable platforms, highest rank first."""
    return sorted((n for n, p in found.items() if p.usable), key=lambda n: -found[n].rank)
