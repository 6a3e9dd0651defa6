"""The Executor of every torch platform: one worker thread that loads a model and runs steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...common.decisions import DecisionLog
from ...common.errors import ConfigError, KernelError, OutOfMemory
from ...common.ops.registry import KernelRegistry
from ...models.base import Model
from ...models.quantization import FLOATS, has_quantised
from ...models.quantization import weight_bytes as bytes_of_weights
from ..cache_plan import DEFAULT_PAGE_SIZE, CachePlan, CachePlanner, GroupNeed, gib, group_needs
from ..device_thread import DeviceThread
from ..interface import Decision, EngineSpec, ExecutorInfo, LoadProgress, Status, Support
from ..interface_attention import AttentionBackend, AttentionSpec
from ..interface_kernels import KernelTable, Problem
from ..interface_kv import KVKind
from ..interface_step import StepBatch, StepResult
from .activation_rounding import rounding_decisions
from .attention_check import resolve_right
from .device import TorchDevice
from .dtypes import DTYPES
from .image_rows import tower_memory
from .kernels import register_generic
from .model_runner import ModelRunner
from .model_source import ModelSource, open_source
from .pools import TorchKVPool
from .site_pools import TorchRowPool, TorchStatePool
from .step_caches import CacheGroup, Pool
from .step_program import StepProgram
from .widened_linear import refuse_widening

RUNTIME_OPS = ("kv_write", "page_copy", "sample", "draw", "logprobs")
"""Ops that the runtime calls beside the model's."""

ENDS = {
    "int4": "; the embedding, the head and the way down of dense MLPs are int8",
    "fp8": "; the embedding, the head and experts stay in the dtype",
}

FEATURES = (
    "logprobs",
    "prompt_logprobs",
    "logit_bias",
    "penalties",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "grammar",
    "drafts",
)


TEXT_ONLY = Support(Status.NO, "The model reads text only.")


class TorchExecutor:
    """`register` adds a platform's own kernels beside the generic ones; `source` opens the model.

    Everything that touches the device happens on one thread, so `submit` returns at once and
    `collect` waits; steps run in order. An exception in a step surfaces at its `collect`.
    """

    def __init__(
        self,
        spec: EngineSpec,
        device: TorchDevice,
        register: Callable[[KernelRegistry], None] | None = None,
        source: Callable[[EngineSpec], ModelSource] = open_source,
    ) -> None:
        self._spec = spec
        self._device = device
        self._register = register
        self._open = source
        self._thread: DeviceThread[StepResult] = DeviceThread()
        self._runner: ModelRunner | None = None
        self.pools: dict[str, Pool] = {}

    def load(self, progress: LoadProgress | None = None) -> ExecutorInfo:
        """Raises CheckpointError, KernelError, ConfigError, or OutOfMemory with numbers."""
        self._device.prepare()
        return self._thread.run(self._load, progress)

    def submit(self, batch: StepBatch) -> None:
        if self._runner is None:
            raise RuntimeError("submit needs an executor that is loaded and not closed")
        self._thread.start(self._runner.run, batch)

    def collect(self) -> StepResult:
        return self._thread.take(lambda result: result)

    def health(self) -> Support:
        return self._thread.health(self._runner is not None)

    def close(self) -> None:
        self._thread.close(self._release)

    def _release(self) -> None:
        self._runner = None
        self.pools.clear()

    def _load(self, progress: LoadProgress | None) -> ExecutorInfo:
        spec, device = self._spec, self._device
        device.attach()
        source = self._open(spec)
        log = DecisionLog(device.decisions())
        dtype = self._dtype(source, log)
        registry = KernelRegistry()
        register_generic(registry, device)
        if self._register is not None:
            self._register(registry)
        quantize = self._weights(source, dtype, registry, log)
        problems = self._problems(source, dtype, quantize)
        ops = registry.resolve(problems, device.facts, spec.kernels, spec.strict)
        model = source.build(ops, DTYPES[dtype], quantize)
        attention, specs, decisions = self._attention(model, dtype, registry)
        log.extend([*ops.decisions, *rounding_decisions(problems, ops, dtype), *decisions])
        needs = group_needs(model.cache_needs())
        weight_bytes, budget = self._memory(model, spec.max_context or source.context_length)
        kv_dtype = next((s.stored_dtype for s in specs if s), dtype)
        size = getattr(attention, "page_size", DEFAULT_PAGE_SIZE)
        planner = CachePlanner(spec, needs, kv_dtype, source.context_length, budget, log, size)
        plan = planner.plan()
        if spec.draft == "mtp":
            log.extend([_head_decision(model, needs)])
        packed = source.load(model, device.to_device, progress)
        if packed is not None:
            log.extend([packed])
        groups = self._reserve(plan, needs, specs, attention, ops)
        program = StepProgram(model, groups, attention, specs, ops, plan.max_context, device)
        self._runner = ModelRunner(
            model, program, self.pools, ops, device, spec.max_rows, source.vocab_size
        )
        log.extend([self._runner.capture(spec.graphs, spec.max_step_tokens, progress)])
        return self._info(source, model, plan, dtype, weight_bytes, log)

    def _dtype(self, source: ModelSource, log: DecisionLog) -> str:
        dtype, because = self._device.default_dtype(source.stored_dtype)
        named = self._spec.dtype
        if named is not None:
            native = named in self._device.facts.dtypes
            slow = f", slow on this device: without --dtype it computes in {dtype}"
            log.add("dtype", named, "set by the user" + ("" if native else slow))
            return named
        log.add("dtype", dtype, because)
        return dtype

    def _problems(self, source: ModelSource, dtype: str, quantize: str) -> list[Problem]:
        runtime = (Problem(op, dtype) for op in RUNTIME_OPS)
        return [*source.kernel_problems(dtype, quantize), *runtime]

    def _weights(
        self, source: ModelSource, dtype: str, registry: KernelRegistry, log: DecisionLog
    ) -> str:
        """How matrices are kept: "int8", "int4", "fp8", "stored", or "" for the dtype."""
        wanted = self._spec.quantize
        problems = self._problems(source, dtype, "stored")
        schemes = ", ".join(sorted({p.weights for p in problems if p.weights}))
        stores = f"; the checkpoint stores {schemes}" if schemes else ""
        if wanted is not None:
            ends = ENDS.get(wanted, "")
            because = f"set by the user{ends}{stores}"
            log.add("weights", dtype if wanted == "none" else wanted, because)
            return "" if wanted == "none" else wanted
        if not schemes:
            log.add("weights", dtype, "the checkpoint has no narrower form of its matrices")
            return ""
        if self._spec.dtype is not None:
            log.add("weights", dtype, f"dtype was set by the user{stores}")
            return ""
        try:
            kept = registry.resolve(problems, self._device.facts, self._spec.kernels)
            refuse_widening(kept, self._spec.kernels)
        except KernelError as error:
            because = f"no kernel for {schemes}: matrices are converted when they are loaded"
            # Widening a float costs memory; a quantised form lost is more than that.
            fallback = any(p.weights and p.weights not in FLOATS for p in problems)
            log.add("weights", dtype, because, [(schemes, str(error))], fallback)
            return ""
        because = f"kept as the checkpoint stores them, computed in {dtype}"
        log.add("weights", schemes, because)
        return "stored"

    def _attention(
        self, model: Model, dtype: str, registry: KernelRegistry
    ) -> tuple[AttentionBackend | None, list[AttentionSpec | None], list[Decision]]:
        """The backend, the sites' specs with the dtype of keys and values, and why. A dtype that
        the user named is served or refused; the device's own choice gives way to `dtype`."""
        spec, facts = self._spec, self._device.facts
        chosen, because = spec.kv_dtype, "set by the user"
        specs = _with_kv_dtype(model.attention_specs(), chosen or "")
        asked = [s for s in specs if s is not None]
        if not asked:
            return None, specs, _own_attention(dtype, chosen)
        named = spec.kernels.get("attention")
        if self._device.checks_attention:
            backend, decision = resolve_right(
                registry, asked, self._device, named, spec.strict, spec.page_size
            )
        else:
            backend, decision = registry.resolve_attention(asked, facts, named, spec.strict)
        rejected: tuple[tuple[str, str], ...] = ()
        if chosen is None:
            chosen, because = self._device.default_kv_dtype(dtype, has_quantised(model))
            wanted = _with_kv_dtype(specs, chosen)
            reasons = dict.fromkeys(r for s in wanted if s for r in backend.accepts(s, facts))
            if reasons:
                rejected = ((chosen, "; ".join(reasons)),)
                chosen, because = dtype, f"what the attention kernel {backend.name} keeps"
            else:
                specs = wanted
        kept = Decision("keys and values", chosen, because, rejected)
        return backend, specs, [decision, kept]

    def _memory(self, model: Model, context: int) -> tuple[int, tuple[int, str]]:
        """Bytes of the weights, and what is left for the cache with the reason."""
        weight_bytes, tower = bytes_of_weights(model), tower_memory(model, context)
        taken = f", and {gib(tower)} for images" if tower else ""
        free, _ = self._device.memory()
        fraction = self._spec.memory_fraction
        if weight_bytes > free:
            raise OutOfMemory(
                f"The weights need {gib(weight_bytes)}, {self._device.facts.name} has {gib(free)} "
                "free. Use a 16-bit dtype or a smaller model, or free memory."
            )
        if fraction is None:
            budget, because = self._device.cache_budget(free, weight_bytes)
            return weight_bytes, (budget - tower, because + taken)
        because = f"memory_fraction {fraction} of {gib(free)} free, less the weights{taken}"
        return weight_bytes, (int(free * fraction) - weight_bytes - tower, because)

    def _reserve(
        self,
        plan: CachePlan,
        needs: tuple[GroupNeed, ...],
        specs: Sequence[AttentionSpec | None],
        attention: AttentionBackend | None,
        ops: KernelTable,
    ) -> list[CacheGroup]:
        groups = []
        for group, need in zip(plan.groups, needs, strict=True):
            spec, sites = specs[need.sites[0]], len(need.sites)
            pool: Pool
            if group.kind is KVKind.RECURRENT:
                pool = TorchStatePool(group, need.need.states, sites, self._device, ops)
            elif attention is None or spec is None:
                pool = TorchRowPool(group, need.need, sites, self._device, ops)
            else:
                layout = attention.layout(group, spec, sites)
                pool = TorchKVPool(group, layout, self._device, ops)
            self.pools[group.name] = pool
            groups.append(CacheGroup(group, pool, need.sites))
        return groups

    def _info(
        self,
        source: ModelSource,
        model: Model,
        plan: CachePlan,
        dtype: str,
        weight_bytes: int,
        log: DecisionLog,
    ) -> ExecutorInfo:
        support, images = self._device.feature_support, model.images()
        features = dict.fromkeys(FEATURES, support)
        features["images"] = TEXT_ONLY if images is None else support
        return ExecutorInfo(
            groups=plan.groups,
            vocab_size=source.vocab_size,
            max_context=plan.max_context,
            page_size=plan.groups[0].page_size,
            max_rows=self._spec.max_rows,
            max_step_tokens=self._spec.max_step_tokens,
            overlap=True,
            mixed_steps=True,
            dtype=dtype,
            weight_bytes=weight_bytes,
            cache_bytes=plan.bytes,
            device=self._device.facts,
            features=features,
            decisions=tuple(log),
            images=images,
        )


def _head_decision(model: Model, needs: Sequence[GroupNeed]) -> Decision:
    size = sum(p.nbytes for name, p in model.named_parameters() if name.startswith("mtp."))
    last = len(model.cache_needs()) - 1
    (group,) = (need.name for need in needs if last in need.sites)
    because = (
        f"the checkpoint's own: {gib(size)} of weights, and a place in the cache group {group!r}"
    )
    return Decision("draft head", "loaded", because)


def _with_kv_dtype(specs: Sequence[AttentionSpec | None], dtype: str) -> list[AttentionSpec | None]:
    return [spec and replace(spec, kv_dtype=dtype) for spec in specs]


def _own_attention(dtype: str, chosen: str | None) -> list[Decision]:
    """Raises ConfigError where the user asked for what the model's ops do not keep."""
    if chosen not in (None, dtype):
        raise ConfigError(f"--kv-dtype {chosen}: this model's own ops keep {dtype}; leave it out.")
    because = "no layer attends over keys and values of its own: the model's ops do"
    return [Decision("attention", "the model's ops", because)]
