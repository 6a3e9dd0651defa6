"""Choosing a kernel per op and an attention backend, once, before anything runs.

Candidates for an op are asked in order of priority; the first that qualifies for *every* problem
the model poses is bound. Three policies: the best that qualifies; one named by the user (`chosen`),
honoured or refused with every reason, never replaced; and strict, which refuses a fallback.

A choice is a *fallback* when a candidate of higher priority was refused by the machine or the
model; one that is there for other weights than the model has (`Kernel.schemes`) is no candidate. A
generic kernel that is an op's only candidate on a platform is therefore no fallback: there
is nothing better that the user misses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from ...platforms.interface import Decision, DeviceFacts
from ...platforms.interface_attention import AttentionBackend, AttentionSpec
from ...platforms.interface_kernels import Kernel, KernelTable, Problem
from ..errors import KernelError

T = TypeVar("T")


class KernelRegistry:
    """The kernels and attention backends that one platform has. Filled once, then resolved."""

    def __init__(self) -> None:
        self._kernels: dict[str, dict[str, Kernel]] = {}
        self._backends: dict[str, tuple[int, AttentionBackend]] = {}

    def add(self, kernel: Kernel) -> None:
        providers = self._kernels.setdefault(kernel.op, {})
        if kernel.provider in providers:
            raise KernelError(f"Two kernels claim op {kernel.op!r}, provider {kernel.provider!r}.")
        providers[kernel.provider] = kernel

    def add_attention(self, backend: AttentionBackend, priority: int = 0) -> None:
        if backend.name in self._backends:
            raise KernelError(f"Two attention backends are named {backend.name!r}.")
        self._backends[backend.name] = (priority, backend)

    def kernels(self) -> list[Kernel]:
        return [kernel for providers in self._kernels.values() for kernel in providers.values()]

    def backends(self) -> list[AttentionBackend]:
        return [backend for _, backend in self._backends.values()]

    def resolve(
        self,
        problems: Iterable[Problem],
        facts: DeviceFacts,
        chosen: Mapping[str, str],
        strict: bool = False,
    ) -> KernelTable:
        """Bind one kernel per op named in `problems`. `chosen` may also name "attention", which
        is left to `resolve_attention`. Raises KernelError."""
        posed: dict[str, list[Problem]] = {}
        for problem in problems:
            posed.setdefault(problem.op, []).append(problem)
        for op in chosen.keys() - posed.keys() - {"attention"}:
            raise KernelError(
                f"No op named {op!r} is called by this model; --kernel takes one of: "
                f"{', '.join(sorted({*posed, 'attention'}))}."
            )
        bound: dict[str, Kernel] = {}
        decisions = []
        for op, sites in posed.items():
            providers = self._kernels.get(op, {})
            aside = {name: _aside(kernel, sites) for name, kernel in providers.items()}
            reasons = {n: aside[n] or _refusal(k, facts, sites) for n, k in providers.items()}
            # Kernels for other weights come last: nothing is a fallback for want of them.
            rank = {n: (aside[n] is not None, -kernel.priority) for n, kernel in providers.items()}
            order = sorted(providers, key=rank.__getitem__)
            choice, decision = _choose(op, order, reasons, chosen.get(op), strict)
            bound[op] = providers[choice]
            decisions.append(decision)
        return KernelTable(bound, tuple(decisions))

    def resolve_attention(
        self,
        specs: Sequence[AttentionSpec],
        facts: DeviceFacts,
        chosen: str | None,
        strict: bool = False,
        wrong: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[AttentionBackend, Decision]:
        """The backend for all of a model's attention call sites. `wrong`: backends that were seen
        to fail, and how. Raises KernelError."""
        reasons: dict[str, str | None] = {}
        for name, (_, backend) in self._backends.items():
            found = dict.fromkeys(r for spec in specs for r in refusals(backend, spec, facts))
            reasons[name] = "; ".join(found) or wrong.get(name)
        order = sorted(reasons, key=lambda name: -self._backends[name][0])
        name, decision = _choose("attention", order, reasons, chosen, strict)
        return self._backends[name][1], decision


def refusals(backend: AttentionBackend, spec: AttentionSpec, facts: DeviceFacts) -> tuple[str, ...]:
    """All reasons why a backend cannot serve a call site, of which no backend need know the last:
    one that does not say that it has tree masks has none."""
    reasons = backend.accepts(spec, facts)
    if spec.tree and not getattr(backend, "tree_masks", False):
        return (*reasons, "has no tree masks")
    return reasons


def _aside(kernel: Kernel, sites: Sequence[Problem]) -> str | None:
    """Why a kernel for certain weights is none for this model, or None."""
    if not kernel.schemes or any(site.weights in kernel.schemes for site in sites):
        return None
    kept = ", ".join(sorted({site.weights or site.dtype for site in sites}))
    return f"is for quantised matrices in other schemes; this model's are {kept}"


def _refusal(kernel: Kernel, facts: DeviceFacts, sites: Sequence[Problem]) -> str | None:
    for site in sites:
        reason = kernel.requires(facts, site)
        if reason is not None:
            return reason
    return None


def _choose(
    op: str,
    order: Sequence[str],
    reasons: Mapping[str, str | None],
    wanted: str | None,
    strict: bool,
) -> tuple[str, Decision]:
    refused = [(name, reason) for name in order if (reason := reasons[name]) is not None]
    listing = "; ".join(f"{name}: {reason}" for name, reason in refused) or "nothing registered"
    what = f"kernel {op}"
    if wanted is not None:
        if wanted not in reasons:
            raise KernelError(
                f"No provider {wanted!r} for op {op!r}; there are: {', '.join(order) or 'none'}."
            )
        if reasons[wanted] is not None:
            raise KernelError(f"{wanted!r} cannot serve op {op!r}: {reasons[wanted]}.")
        return wanted, Decision(what, wanted, "named by the user", tuple(refused))
    usable = [name for name in order if reasons[name] is None]
    if not usable:
        raise KernelError(f"No kernel can serve op {op!r} ({listing}).")
    best = usable[0]
    better = [(name, reason) for name, reason in refused if order.index(name) < order.index(best)]
    if better and strict:
        raise KernelError(
            f"Strict mode refuses the fallback to {best!r} for op {op!r} ({listing}). "
            f"Name it with --kernel {op}={best} or drop --strict."
        )
    passed = [(name, f"lower priority than {best}") for name in usable[1:]]
    because = _because(best, order, bool(better))
    return best, Decision(what, best, because, (*refused, *passed), fallback=bool(better))


def _because(best: str, order: Sequence[str], fallback: bool) -> str:
    if len(order) == 1:
        return "the only provider on this platform"
    if fallback:
        return "the best that qualifies; a preferred provider was refused"
    return "first in this platform's order of preference"
