"""The Executor of Apple silicon: one thread that loads an mlx-lm model and runs its steps.

MLX's streams belong to the thread that made them: an array that is still lazy cannot be evaluated
from another. So loading, building steps and reading results all happen on one worker thread.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from ...common.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ...common.decisions import DecisionLog
from ...common.errors import ConfigError, OutOfMemory
from ...common.ops.registry import KernelRegistry
from ..cache_plan import CachePlan, CachePlanner, GroupNeed, gib, group_needs
from ..device_thread import DeviceThread
from ..interface import (
    DeviceFacts,
    EngineSpec,
    ExecutorInfo,
    LoadProgress,
    Status,
    Support,
)
from ..interface_kernels import Kernel, KernelTable, Problem
from ..interface_kv import KVKind
from ..interface_step import StepBatch, StepResult
from ..judgement import SERVED
from .caches import Cache, CacheGroup, PagedCache, StateCache
from .compiled_steps import TOY_PAGES, CompiledSteps
from .declared import check_caps, context_length, note_angles
from .forms import choose
from .kernels import register
from .loading import DTYPES, compute_dtype, load_model, weight_bytes
from .matrices import arrange
from .memory import keep_freed, on_metal, set_limits, working_set
from .metal.register import decisions
from .paged_decode import OP as PAGED
from .paged_decode import PRODUCTS
from .pools import LayerPages, LayerStates, MLXPages
from .product_threads import ProductThreads, product_threads
from .recognise import Recognised, recognise_model
from .runner import MLXRunner, Started
from .substitution import SHARED

OPS = ("sample", "logprobs")
TEXT_ONLY = Support(Status.NO, "It runs mlx-lm's models, which read text only.")
NO_DRAFTS = Support(
    Status.NO, "The MLX executor samples one token of a row in a step, and verifies no drafts."
)
KINDS = frozenset({KVKind.FULL, KVKind.WINDOW, KVKind.RECURRENT})
CACHE_SHARE = 8
"""Of a CPU's memory: MLX writes every page at the start, so all of it is taken then."""
NOT_COMPILED = "--graphs on compiles decode steps; what that gains on an Apple GPU is not measured"


class MLXExecutor:
    """`submit` returns at once, `collect` waits; steps run in order. A step may be submitted while
    the one before runs. An exception in a step surfaces at its `collect`."""

    def __init__(self, spec: EngineSpec, facts: DeviceFacts, os_version: str = "") -> None:
        self._spec = spec
        self._facts = facts
        self._os_version = os_version
        self._thread: DeviceThread[Started] = DeviceThread()
        self._runner: MLXRunner | None = None
        self.pools: dict[str, MLXPages] = {}

    def load(self, progress: LoadProgress | None = None) -> ExecutorInfo:
        """Raises CheckpointError, KernelError, ConfigError, or OutOfMemory with numbers."""
        return self._thread.run(self._load, progress)

    def submit(self, batch: StepBatch) -> None:
        if self._runner is None:
            raise RuntimeError("submit needs an executor that is loaded and not closed")
        self._thread.start(self._runner.start, batch)

    def collect(self) -> StepResult:
        return self._thread.take(lambda started: self._thread.run(self._finish, started))

    def health(self) -> Support:
        return self._thread.health(self._runner is not None)

    def close(self) -> None:
        self._thread.close(self._release)

    def _finish(self, started: Started) -> StepResult:
        if self._runner is None:
            raise RuntimeError("the executor was closed")
        return self._runner.finish(started)

    def _release(self) -> None:
        """On the worker: what is in flight must end where it began."""
        mx.synchronize()
        self._runner = None
        self.pools.clear()
        mx.clear_cache()
        # A stream's own thread that outlives the worker aborts the process when it exits.
        mx.clear_streams()

    def _load(self, progress: LoadProgress | None) -> ExecutorInfo:
        spec = self._spec
        log = DecisionLog()
        self._device(log)
        if spec.draft is not None:
            raise ConfigError(
                f"--draft {spec.draft} cannot be had: {NO_DRAFTS.reason} Leave it out."
            )
        checkpoint = open_checkpoint(spec.model_path)
        model, _ = load_model(checkpoint, spec, log)
        weights = weight_bytes(model)
        self._check_weights(weights)
        if progress is not None:
            progress(0, weights)
        mx.eval(model.parameters())
        if progress is not None:
            progress(weights, weights)
        threads = self._threads(log)
        dtype = compute_dtype(model)
        registry = KernelRegistry()
        register(registry)
        paged = self._kernels(registry, [Problem(PAGED, dtype)])
        check_caps(model, checkpoint)
        note_angles(checkpoint, log)
        found = self._recognised(model, DTYPES[dtype], paged.kernels[PAGED], log)
        context = context_length(checkpoint, found.windows, spec.max_context, log)
        kv_dtype = self._kv_dtype(found, log)
        problems = [*(Problem(op, dtype) for op in OPS), Problem("page_gather", kv_dtype)]
        ops = self._kernels(registry, problems)
        log.extend((*paged.decisions, *ops.decisions, *decisions(paged, ops)))
        needs = group_needs([layer.need for layer in found.layers], KINDS)
        budget = self._budget(weights, needs)
        plan = CachePlanner(spec, needs, kv_dtype, context, budget, log).plan()
        compiles = self._may_compile(found, plan, needs, kv_dtype, ops, log)
        groups, caches = self._reserve(found, plan, needs, kv_dtype, ops)
        compiled = CompiledSteps(found.model, groups, caches) if compiles else None
        log.extend(set_limits(weights, plan.bytes, self._os_version))
        self._runner = MLXRunner(
            found.model, groups, caches, ops, spec.max_rows, checkpoint.vocab_size,
            compiled, threads,
        )  # fmt: skip
        return self._info(checkpoint, plan, dtype, weights, log)

    def _device(self, log: DecisionLog) -> None:
        if on_metal():
            if self._spec.threads is not None:
                raise ConfigError("threads has no meaning on Metal; leave it out.")
            log.add("MLX device", "Metal", "the GPU of this machine")
            log.add("fused functions", "compiled", "by MLX, once for each shape")
            return
        log.add("MLX device", "CPU", "MLX has no Metal here")
        log.extend([keep_freed()])
        if self._spec.graphs == "on":
            mx.enable_compile()
            log.add("fused functions", "compiled", "MLX runs g++ for each of them: --graphs on")
            return
        mx.disable_compile()
        log.add("fused functions", "not compiled", "on a CPU MLX would run g++ for each of them")

    def _recognised(
        self, model: Any, dtype: mx.Dtype, paged: Kernel, log: DecisionLog
    ) -> Recognised:
        """The model in the forms that are faster here, each layer checked in them."""
        log.extend(arrange(model))
        forms, chosen = choose(model, dtype, self._spec.kernels, paged)
        log.extend(chosen)
        found = recognise_model(model, dtype, forms)
        log.extend(found.decisions)
        return found

    def _threads(self, log: DecisionLog) -> ProductThreads | None:
        if on_metal():
            return None
        threads, decision = product_threads(self._spec.threads)
        log.extend([decision])
        return threads

    def _may_compile(
        self,
        found: Recognised,
        plan: CachePlan,
        needs: tuple[GroupNeed, ...],
        kv_dtype: str,
        ops: KernelTable,
        log: DecisionLog,
    ) -> bool:
        """Whether decode steps are compiled: where the user says so, and a toy step on a few pages
        comes out as it does op by op."""
        if self._spec.graphs != "on":
            because = "set by the user" if self._spec.graphs else NOT_COMPILED
            log.add("step", "op by op", because)
            return False
        small = tuple(replace(group, pages=TOY_PAGES) for group in plan.groups)
        toy = self._reserve(found, replace(plan, groups=small), needs, kv_dtype, ops)
        try:
            apart = CompiledSteps(found.model, *toy).difference()
            reason = None if apart <= 1e-2 else f"a compiled step differs by {apart:.1g}"
        except (RuntimeError, TypeError, ValueError) as error:
            reason = f"mx.compile refuses this model's step ({error})"
        if reason is not None:
            raise ConfigError(f"--graphs on cannot be had: {reason}. Use off.")
        because = f"decode steps, by rows and pages; largest difference {apart:.1g}"
        log.add("step", "compiled", because)
        return True

    def _check_weights(self, weights: int) -> None:
        total, because = working_set()
        if weights > total:
            raise OutOfMemory(
                f"The weights need {gib(weights)}; there is room for {gib(total)} ({because}). Use "
                "a quantised checkpoint, --quantize int4, or a smaller model."
            )

    def _budget(self, weights: int, needs: tuple[GroupNeed, ...]) -> tuple[int, str]:
        """Bytes for the cache, and why so many."""
        total, because = working_set()
        states = sum(n.need.state_bytes * len(n.sites) for n in needs) * self._spec.max_rows
        also = f" and the states of {self._spec.max_rows} rows in a step" if states else ""
        room = total - weights - states
        fraction = self._spec.memory_fraction
        if fraction is not None:
            reason = f"memory_fraction {fraction} of {because}, less the weights{also}"
            return int(total * fraction) - weights - states, reason
        if on_metal():
            return room // 2, f"half of what the weights{also} leave of {because}"
        return room // CACHE_SHARE, f"an eighth of what the weights{also} leave of {because}"

    def _kernels(self, registry: KernelRegistry, problems: list[Problem]) -> KernelTable:
        elsewhere = {*SHARED, PAGED, *OPS, "page_gather"} - {problem.op for problem in problems}
        named = {
            op: form
            for op, form in self._spec.kernels.items()
            if op not in elsewhere and (op, form) != (PAGED, PRODUCTS)
        }
        return registry.resolve(problems, self._facts, named, self._spec.strict)

    def _kv_dtype(self, found: Recognised, log: DecisionLog) -> str:
        wanted = self._spec.kv_dtype
        if wanted == "int8":
            raise ConfigError(
                "kv_dtype int8 is not served on this platform; use float32, float16 or bfloat16."
            )
        if wanted is not None:
            log.add("keys and values", wanted, "set by the user")
            return wanted
        log.add("keys and values", found.kv_dtype, "the dtype in which the model makes them")
        return found.kv_dtype

    def _reserve(
        self,
        found: Recognised,
        plan: CachePlan,
        needs: tuple[GroupNeed, ...],
        kv_dtype: str,
        ops: KernelTable,
    ) -> tuple[list[CacheGroup], list[Cache]]:
        by_layer: dict[int, Cache] = {}
        groups = []
        for group, need in zip(plan.groups, needs, strict=True):
            pools: list[LayerPages | LayerStates] = []
            pages: list[LayerPages] = []
            for index in need.sites:
                layer = found.layers[index]
                if group.kind is KVKind.RECURRENT:
                    states = LayerStates(group, need.need.states)
                    pools.append(states)
                    by_layer[index] = StateCache(states)
                    continue
                sizes = layer.need.kv_heads, layer.need.head_dim, layer.need.values_dim
                pages.append(LayerPages(group, *sizes, DTYPES[kv_dtype], ops.page_gather))
                by_layer[index] = PagedCache(pages[-1], group.window)
            if pages:
                self.pools[group.name] = MLXPages(group, pages, kv_dtype)
            members = tuple(by_layer[index] for index in need.sites)
            groups.append(CacheGroup(group, (*pools, *pages), members))
        mx.eval([array for g in groups for pool in g.pools for array in pool.arrays])
        return groups, [by_layer[index] for index in range(len(found.layers))]

    def _info(
        self, checkpoint: Checkpoint, plan: CachePlan, dtype: str, weights: int, log: DecisionLog
    ) -> ExecutorInfo:
        status = Status.YES if not on_metal() else Status.UNVERIFIED
        features = dict.fromkeys(sorted(SERVED), Support(status, "tested on MLX's CPU backend"))
        return ExecutorInfo(
            groups=plan.groups,
            vocab_size=checkpoint.vocab_size,
            max_context=plan.max_context,
            page_size=plan.groups[0].page_size,
            max_rows=self._spec.max_rows,
            max_step_tokens=self._spec.max_step_tokens,
            overlap=True,
            mixed_steps=True,
            dtype=dtype,
            weight_bytes=weights,
            cache_bytes=plan.bytes,
            device=self._facts,
            features={**features, "images": TEXT_ONLY, "drafts": NO_DRAFTS},
            decisions=tuple(log),
        )
