"""How large the cache is: layers -> groups -> pages, within a budget, each choice with a reason."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import lcm

from ..common.decisions import DecisionLog
from ..common.errors import CheckpointError, ConfigError, OutOfMemory
from .interface import EngineSpec
from .interface_kv import ITEM_BYTES, CacheNeed, KVGroup, KVKind

DEFAULT_PAGE_SIZE = 16


def kv_row_bytes(dtype: str, dim: int) -> int:
    """Bytes of the keys, or the values, of one head of one token. An int8 row ends with its float32
    scale."""
    return dim * ITEM_BYTES[dtype] + (4 if dtype == "int8" else 0)


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """Cache sites of a model with the same need."""

    name: str
    need: CacheNeed
    sites: tuple[int, ...]

    def page_bytes(self, page_size: int, kv_dtype: str) -> int:
        """Over all sites; `kv_dtype` is of keys and values."""
        need = self.need
        if need.one_vector:
            one = need.entries(page_size) * need.head_dim * ITEM_BYTES[need.dtype]
        else:
            rows = kv_row_bytes(kv_dtype, need.head_dim) + kv_row_bytes(kv_dtype, need.values_dim)
            one = page_size * need.kv_heads * rows
        return one * len(self.sites)


@dataclass(frozen=True, slots=True)
class CachePlan:
    groups: tuple[KVGroup, ...]
    max_context: int

    @property
    def bytes(self) -> int:
        return sum(group.bytes_per_page * group.pages for group in self.groups)


def group_needs(
    needs: Sequence[CacheNeed], kinds: Collection[KVKind] = tuple(KVKind)
) -> tuple[GroupNeed, ...]:
    """Groups in order of their first site. `kinds`: what the runtime has. Raises CheckpointError
    for another."""
    sites: dict[CacheNeed, list[int]] = {}
    for site, need in enumerate(needs):
        if need.kind not in kinds:
            served = " and ".join(sorted(kind.value for kind in kinds))
            raise CheckpointError(
                f"Cache site {site} needs a cache of kind {need.kind.value!r}; this runtime has "
                f"{served}."
            )
        sites.setdefault(need, []).append(site)
    names = _names(list(sites))
    return tuple(
        GroupNeed(name, need, tuple(members))
        for name, (need, members) in zip(names, sites.items(), strict=True)
    )


def _names(needs: Sequence[CacheNeed]) -> list[str]:
    """ "full", "window"; with sizes where two groups are of one kind."""
    kinds = [need.kind for need in needs]
    return [
        need.kind.value if kinds.count(need.kind) == 1 else f"{need.kind.value}-{_size(need)}"
        for need in needs
    ]


def _size(need: CacheNeed) -> str:
    if need.kind is KVKind.RECURRENT:
        return str(need.state_bytes)
    if need.kind is KVKind.COMPRESSED:
        return f"{need.ratio}-{need.head_dim}"
    values = f"+{need.value_dim}" if need.value_dim else ""
    return f"{need.window}-{need.kv_heads}x{need.head_dim}{values}"


class CachePlanner:
    """`budget` is in bytes for the cache alone, with the sentence that says where it comes from."""

    def __init__(
        self,
        spec: EngineSpec,
        needs: Sequence[GroupNeed],
        kv_dtype: str,
        context_length: int,
        budget: tuple[int, str],
        log: DecisionLog,
        page_size: int = DEFAULT_PAGE_SIZE,
    ) -> None:
        """`page_size`: tokens that pages have where nothing says otherwise."""
        self._spec = spec
        self._needs = needs
        self._kv_dtype = kv_dtype
        self._context_length = context_length
        self._budget, self._budget_reason = budget
        self._log = log
        ratios = [need.need.ratio for need in needs]
        self._page_size = spec.page_size or lcm(page_size, *ratios)
        self._usual = page_size

    def plan(self) -> CachePlan:
        """Raises OutOfMemory with numbers, ConfigError for limits beyond the model's."""
        because = "short pages share more of a prefix; gathers stay long"
        if self._usual != DEFAULT_PAGE_SIZE:
            because = "what the attention kernel's pages have"
        if self._page_size != self._usual:
            because = "the least with no room for compressed entries to waste"
        if self._spec.page_size is not None:
            because = "set by the user"
        self._log.add("page size", f"{self._page_size} tokens", because)
        limit = self._context_limit()
        pages = self._pages(limit)
        capacity = (pages - 1) * self._page_size
        context = self._max_context(limit, capacity)
        groups = tuple(self._group(need, pages) for need in self._needs)
        return CachePlan(groups, context)

    def _context_limit(self) -> int:
        wanted, most = self._spec.max_context, self._context_length
        if wanted is not None and wanted > most:
            raise ConfigError(
                f"max_context {wanted} is more than the model's {most}; choose at most {most}."
            )
        return most if wanted is None else wanted

    def _pages(self, context: int) -> int:
        """Pages of a full group, the null page included."""
        size = self._page_size
        if self._spec.cache_tokens is not None:
            pages = -(-self._spec.cache_tokens // size) + 1
            self._require(self._bytes(pages), f"cache_tokens {self._spec.cache_tokens}")
            self._log_cache(pages, "set by the user")
            return pages
        most = self._spec.max_rows * -(-context // size) + 1
        if self._bytes(most) <= self._budget:
            self._log_cache(
                most, f"all {self._spec.max_rows} rows at {context} tokens; {self._budget_reason}"
            )
            return most
        low, high = 1, most  # `low` pages fit (or nothing does), `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._bytes(middle) <= self._budget else (low, middle)
        if low < 2:
            self._require(self._bytes(2), "a cache of one page")
        self._log_cache(low, self._budget_reason)
        return low

    def _max_context(self, limit: int, capacity: int) -> int:
        wanted = self._spec.max_context
        if wanted is not None:
            if wanted > capacity:
                need = self._bytes(-(-wanted // self._page_size) + 1)
                raise OutOfMemory(
                    f"max_context {wanted} does not fit the cache of {capacity} tokens: it needs "
                    f"{gib(need)}, the cache may have {gib(self._budget)}. Lower max_context, or "
                    "raise cache_tokens or memory_fraction."
                )
            self._log.add("max context", f"{wanted} tokens", "set by the user")
            return wanted
        context = min(limit, capacity)
        because = "the model's own limit" if context == limit else "what the cache can hold"
        self._log.add("max context", f"{context} tokens", because)
        return context

    def _bytes(self, pages: int) -> int:
        groups = [self._group(need, pages) for need in self._needs]
        return sum(group.bytes_per_page * group.pages for group in groups)

    def _group(self, need: GroupNeed, pages: int) -> KVGroup:
        size = self._page_size
        if need.need.kind is KVKind.RECURRENT:
            cost = need.need.state_bytes * len(need.sites)
            return KVGroup(need.name, KVKind.RECURRENT, size, self._slots(cost) + 1, 0, cost)
        cost = need.page_bytes(size, self._kv_dtype)
        if need.need.kind.keeps_all:
            return KVGroup(need.name, need.need.kind, size, pages, 0, cost)
        # Twice what full rows hold, so that the prefix tree can keep windows too.
        held = self._spec.max_rows * (-(-need.need.window // size) + 2)
        most = 2 * held + -(-self._spec.max_step_tokens // size) + 1
        return KVGroup(need.name, KVKind.WINDOW, size, min(pages, most), need.need.window, cost)

    def _slots(self, cost: int) -> int:
        """Slots of `cost` bytes: one for each row, one more to go back to where there are drafts,
        and two snapshots for each where they take at most a quarter of the budget."""
        rows = self._spec.max_rows
        each = 1 if self._spec.draft is None else 2
        if each * rows * cost > self._budget:
            raise OutOfMemory(
                f"The states of {rows} rows need {gib(each * rows * cost)}, there is room for "
                f"{gib(max(0, self._budget))} ({self._budget_reason}). Lower max_rows to at most "
                f"{max(0, self._budget) // cost // each}."
            )
        return each * rows + min(2 * rows, self._budget // 4 // cost)

    def _require(self, needed: int, what: str) -> None:
        if needed > self._budget:
            raise OutOfMemory(
                f"{what} needs {gib(needed)} for keys and values; there is room for "
                f"{gib(max(0, self._budget))} ({self._budget_reason}). Lower cache_tokens or "
                "page_size, use a 16-bit dtype, or free memory."
            )

    def _log_cache(self, pages: int, because: str) -> None:
        tokens = (pages - 1) * self._page_size
        self._log.add("cache", f"{tokens} tokens, {gib(self._bytes(pages))}", because)


def gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
