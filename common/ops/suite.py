"""A platform's Suite from its registry: kernels and backends, the problems that cases pose to them,
and the CaseRunner of their framework."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ...platforms.interface import DeviceFacts
from ...platforms.interface_attention import AttentionBackend, AttentionSpec
from ...platforms.interface_kernels import Case, CaseRunner, Kernel, Op, Problem, Subject, Suite
from ...platforms.interface_kv import KVGroup, KVKind
from ...platforms.interface_step import StepBatch
from ..checkpoint.block_floats import StoredMatrix
from . import OPS, attention
from .registry import KernelRegistry, refusals
from .sample_cases import sampling_arrays

ATTENTION = tuple(op.title for op in attention.OPS)
"""Contracts of attention backends."""


def suite_of(
    registry: KernelRegistry,
    facts: DeviceFacts,
    runner: CaseRunner,
    evidence: str,
    unverified: Callable[[str, str], str] = lambda provider, dtype: "",
) -> Suite:
    """`unverified` answers for a provider and a dtype why that cannot be run here, or ""."""
    subjects = [
        kernel_subject(op, kernel, facts, runner, partial(unverified, kernel.provider))
        for kernel in registry.kernels()
        for op in contracts(kernel.op)
    ]
    subjects += [
        attention_subject(OPS[op], backend, facts, runner, partial(unverified, backend.name))
        for op in ATTENTION
        for backend in registry.backends()
    ]
    return Suite(facts.name, evidence, tuple(subjects))


def contracts(op: str) -> list[Op]:
    """All contracts of an op: the plain one, and those of quantised weights."""
    return [contract for contract in OPS.values() if contract.name == op]


def kernel_subject(
    op: Op,
    kernel: Kernel,
    facts: DeviceFacts,
    runner: CaseRunner,
    unverified: Callable[[str], str] = lambda dtype: "",
) -> Subject:
    def requires(case: Case, dtype: str) -> str | None:
        return kernel.requires(facts, problem_of(op, case, dtype))

    def run(case: Case, dtype: str) -> Any:
        return runner.run_kernel(op, kernel, case, dtype)

    return Subject(op.title, kernel.provider, requires, run, unverified)


def attention_subject(
    op: Op,
    backend: AttentionBackend,
    facts: DeviceFacts,
    runner: CaseRunner,
    unverified: Callable[[str], str] = lambda dtype: "",
) -> Subject:
    def requires(case: Case, dtype: str) -> str | None:
        return "; ".join(refusals(backend, spec_of(case, dtype, op.kv_dtype), facts)) or None

    def run(case: Case, dtype: str) -> Any:
        return runner.run_attention(backend, case, dtype, op.kv_dtype)

    return Subject(op.title, backend.name, requires, run, unverified)


def problem_of(op: Op, case: Case, dtype: str) -> Problem:
    """The static facts of the call site that a case stands for."""
    dims = {} if op.dims is None else op.dims(case.args)
    return Problem(op.name, dtype, dims, op.weights)


def is_stored(value: object) -> bool:
    """Whether a case's argument is a matrix in a stored form, or a stack of such."""
    return isinstance(value[0] if isinstance(value, tuple) and value else value, StoredMatrix)


def spec_of(case: Case, dtype: str, kv_dtype: str = "") -> AttentionSpec:
    """The same of a case of an attention backend."""
    args = case.args
    return AttentionSpec(
        heads=args["q"].shape[1],
        kv_heads=args["k"].shape[1],
        head_dim=args["q"].shape[2],
        scale=args["scale"],
        window=args["window"],
        soft_cap=args["soft_cap"],
        sinks=args["sinks"] is not None,
        dtype=dtype,
        kv_dtype=kv_dtype,
        tree=args["tree_mask"] is not None,
    )


def group_of(case: Case) -> KVGroup:
    """The cache group of a case of an attention backend."""
    size, window = case.args["page_size"], case.args["window"]
    kind = KVKind.WINDOW if window else KVKind.FULL
    return KVGroup("conformance", kind, size, len(case.args["keys"]) // size, window)


def step_of(case: Case) -> StepBatch:
    """The step that a case of an attention backend is."""
    args = case.args
    rows = len(args["context_lens"])
    return StepBatch(
        step=0,
        row_ids=np.arange(rows, dtype=np.int32),
        token_ids=np.zeros(len(args["q"]), np.int32),
        query_start=args["query_start"],
        context_lens=args["context_lens"],
        page_tables={group_of(case).name: args["page_table"]},
        want=np.zeros(rows, np.uint8),
        sampling=sampling_arrays([{}] * rows),
        tree_mask=args["tree_mask"],
    )
