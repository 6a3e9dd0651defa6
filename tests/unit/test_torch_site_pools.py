"""Contract guarded: pages of single vectors and slots of states. Copies, the canonical round trip,
and what a step's layers get of them, bound fresh and into reserved buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.kernel_checks import cpu_facts

from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.interface_kv import CacheNeed, KVGroup, KVKind, StateArray
from sixfold.platforms.interface_step import StepBatch
from sixfold.platforms.torch_runtime.kernels import page_copy
from sixfold.platforms.torch_runtime.site_pools import TorchRowPool, TorchStatePool
from sixfold.platforms.torch_runtime.step_caches import (
    NO_SLOT,
    BoundStep,
    CacheGroup,
    PagesPart,
    RowsPart,
    SlotsPart,
)

STATES = (StateArray((3, 4), "float32"), StateArray((2,), "bfloat16"))
PAGES = 6


class _Ops:
    page_copy = staticmethod(page_copy)


def device() -> CpuDevice:
    return CpuDevice(cpu_facts(), threads=1)


def rows(page_size: int = 16, ratio: int = 4) -> TorchRowPool:
    need = CacheNeed(KVKind.COMPRESSED, 1, 5, ratio=ratio, dtype="float16")
    group = KVGroup("c", KVKind.COMPRESSED, page_size, PAGES)
    pool = TorchRowPool(group, need, 2, device(), _Ops())  # type: ignore[arg-type]
    pool.data.copy_(torch.randn(pool.data.shape))
    return pool


def states() -> TorchStatePool:
    group = KVGroup("s", KVKind.RECURRENT, 16, PAGES)
    pool = TorchStatePool(group, STATES, 3, device(), _Ops())  # type: ignore[arg-type]
    for array in pool.data:
        array.copy_(torch.randn(array.shape))
    return pool


@pytest.mark.parametrize(
    ("page_size", "ratio", "entries"), [(16, 4, 4), (1, 4, 1), (24, 16, 2), (8, 1, 8)]
)
def test_a_page_has_room_for_the_entries_that_its_tokens_complete(
    page_size: int, ratio: int, entries: int
) -> None:
    pool = rows(page_size, ratio)
    assert pool.entries == entries
    assert pool.cache(1).shape == (PAGES * entries, 5)
    ends = [t for t in range(3 * page_size * ratio) if (t + 1) % ratio == 0]
    places = {(t // page_size, t % page_size // ratio) for t in ends}
    assert len(places) == len(ends)
    assert max(place for _, place in places) < entries


@pytest.mark.parametrize("make", [rows, states])
def test_copies_and_canonical_pages(make: type) -> None:
    pool = make()
    arrays = [pool.data] if isinstance(pool.data, torch.Tensor) else pool.data
    before = [array.clone() for array in arrays]
    pool.copy([1, 2], [2, 3])
    for array, old in zip(arrays, before, strict=True):
        assert torch.equal(array[:, 2], old[:, 1])
        assert torch.equal(array[:, 3], old[:, 2])
        assert torch.equal(array[:, [0, 1, 4, 5]], old[:, [0, 1, 4, 5]])
    data = pool.export_page(4)
    assert len(data) == sum(array[:, 4].nbytes for array in arrays)
    pool.import_page(5, data)
    for array, old in zip(arrays, before, strict=True):
        assert torch.equal(array[:, 5], old[:, 4])
    with pytest.raises(ValueError, match=f"has {len(data)} bytes, got 3"):
        pool.import_page(5, b"abc")


def batch(lengths: list[int], contexts: list[int]) -> StepBatch:
    count = len(lengths)
    return StepBatch(
        step=0,
        row_ids=np.arange(count, dtype=np.int32),
        token_ids=np.zeros(sum(lengths), np.int32),
        query_start=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        page_tables={"c": np.arange(1, 2 * count + 1, dtype=np.int32).reshape(count, 2)},
        want=np.zeros(count, np.uint8),
        sampling=sampling_arrays([{}] * count),
        state_slots={"s": np.arange(3, 3 + count, dtype=np.int32)},
    )


def test_reserved_buffers_hold_any_smaller_step_and_pad_it() -> None:
    where = device()
    parts = [PagesPart(rows().group, where), SlotsPart(states().group, where), RowsPart(where)]
    reserved = [part.reserve(4, 4, 60) for part in parts]
    for lengths, contexts in (([1] * 4, [9, 8, 7, 6]), ([1, 1], [5, 4])):
        step = batch(lengths, contexts)
        table, slots, (start, context) = (
            part.bind(part.plan(step), place) for part, place in zip(parts, reserved, strict=True)
        )
        assert table is reserved[0]
        assert slots is reserved[1]
        assert start is reserved[2][0]
        count, more = len(lengths), 4 - len(lengths)
        assert table[:count, :2].tolist() == step.page_tables["c"].tolist()
        assert not table[count:].any()
        assert slots.tolist() == step.state_slots["s"].tolist() + [NO_SLOT] * more
        assert start.tolist() == list(range(5))
        assert context.tolist() == contexts + [0] * more


def test_a_step_gives_each_site_its_own_part_of_a_group() -> None:
    kept, vectors = states(), rows()
    place = {
        0: (CacheGroup(kept.group, kept, (0, 2)), torch.tensor([3]), 0),
        1: (CacheGroup(vectors.group, vectors, (1,)), torch.tensor([[1, 2]]), 0),
        2: (CacheGroup(kept.group, kept, (0, 2)), torch.tensor([3]), 1),
    }
    step = BoundStep(None, place, (torch.tensor([0, 1]), torch.tensor([7])))
    second = step.state(2)
    assert second.slots.tolist() == [3]
    second.arrays[0].fill_(2.0)  # in place: of the second site only
    assert bool((kept.data[0][1] == 2.0).all())
    assert not bool((kept.data[0][0] == 2.0).any())
    found = step.pages(1)
    assert (found.page_size, found.entries, found.cache.shape) == (16, 4, (PAGES * 4, 5))
    with pytest.raises(TypeError, match="site 1 keeps compressed pages"):
        step.state(1)
    with pytest.raises(TypeError, match=r"site 0 .* has no vectors"):
        step.pages(0)
