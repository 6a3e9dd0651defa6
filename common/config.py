"""What a user may set. A field left at None is decided later, with a recorded reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's configuration as the user gave it. A set value is honoured or startup fails."""

    model: str = ""  # directory, .gguf file, hub id; "" = the bundled demo model
    platform: str | None = None
    device_index: int = 0
    dtype: str | None = None
    max_context: int | None = None
    page_size: int | None = None
    cache_tokens: int | None = None
    memory_fraction: float | None = None
    max_rows: int = 64  # sequences in one step
    max_step_tokens: int = 2048  # token budget of one step
    max_queue: int = 1024  # waiting requests before 429
    prefix_cache: bool = True
    eviction: str = "lru"  # lru | lfu | priority
    overlap: bool = True
    threads: int | None = None
    quantize: str | None = None  # int8 | int4 | fp8: matrices, on load; none: in the dtype
    kv_dtype: str | None = None  # of keys and values: as dtype, or int8
    graphs: str | None = None  # on | off: capture steps and replay them
    draft: str | None = None  # mtp | ngram: who guesses tokens that a step then verifies
    draft_tokens: int = 3  # most of them for a row in one step
    weight_cache: bool = True  # packed matrices on disk, for the next start
    kernels: dict[str, str] = field(default_factory=dict)  # op -> provider
    strict: bool = False

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, want: str) -> None:
            if not ok:
                raise ConfigError(f"{name} must be {want}, got {getattr(self, name)!r}.")

        for name in ("max_context", "page_size", "cache_tokens", "threads"):
            value = getattr(self, name)
            need(value is None or value >= 1, name, "at least 1")
        for name in ("max_rows", "max_step_tokens", "max_queue", "draft_tokens"):
            need(getattr(self, name) >= 1, name, "at least 1")
        fraction = self.memory_fraction
        need(fraction is None or 0 < fraction <= 1, "memory_fraction", "in (0, 1]")
        dtypes = (None, "float32", "bfloat16", "float16")
        need(self.dtype in dtypes, "dtype", "float32, bfloat16 or float16")
        forms = (None, "none", "int8", "int4", "fp8")
        need(self.quantize in forms, "quantize", "int8, int4, fp8 or none")
        kv_dtypes = (*dtypes, "int8")
        need(self.kv_dtype in kv_dtypes, "kv_dtype", "float32, bfloat16, float16 or int8")
        need(self.graphs in (None, "on", "off"), "graphs", "on or off")
        need(self.draft in (None, "mtp", "ngram"), "draft", "mtp or ngram")
        need(self.eviction in ("lru", "lfu", "priority"), "eviction", "lru, lfu or priority")
        need(self.device_index >= 0, "device_index", "at least 0")
        need(
            self.max_step_tokens >= self.max_rows,
            "max_step_tokens",
            f"at least max_rows ({self.max_rows})",
        )
