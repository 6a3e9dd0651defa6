"""A KVCache filled by hand: prefixes computed, remembered, and with states saved."""

from __future__ import annotations

import numpy as np

from sixfold.common.cache.kv_cache import KVCache
from sixfold.common.cache.sequence import Sequence
from sixfold.platforms.interface_kv import I32, KVGroup

from .mock_executor import group

SIZE = 4
FULL = group("full", 20, SIZE)


def cache_of(*groups: KVGroup, eviction: str = "lru", prefix_cache: bool = True) -> KVCache:
    return KVCache(groups or (FULL,), 8, 80, prefix_cache, eviction)


def tokens(*values: int) -> I32:
    """One page per value."""
    return np.repeat(np.array(values, np.int32), SIZE)


def computed(cache: KVCache, text: I32, priority: int = 0) -> Sequence:
    """A row that computed `text` in one step, sharing what there was."""
    row = cache.open()
    nodes = cache.match(row.node, np.append(text, 99).astype(np.int32)).nodes
    if nodes:
        cache.adopt(row, nodes, priority)
    assert cache.grow(row, cache.pages_for(len(text)) - row.pages)
    cache.publish(row, text, priority)
    cache.slide(row, len(text))
    cache.check()
    return row


def remember(cache: KVCache, text: I32, priority: int = 0) -> None:
    cache.close(computed(cache, text, priority))


def depth(cache: KVCache, text: I32) -> int:
    """Pages of `text` that the cache would serve to a prompt that goes on after it."""
    return len(cache.match(cache.tree.root, np.append(text, 99).astype(np.int32)).nodes)


def snapshot(cache: KVCache, text: I32) -> None:
    """A row computed `text` and left its state there; the copy is carried out."""
    row = cache.open()
    nodes = cache.match(row.node, np.append(text, 99).astype(np.int32)).nodes
    if nodes:
        cache.adopt(row, nodes, 0)
    assert cache.grow(row, cache.pages_for(len(text)) - row.pages)
    cache.states.promise(row, text)
    cache.publish(row, text, 0)
    cache.states.settle()
    cache.close(row)
    cache.states.take_moves()
    cache.check()
