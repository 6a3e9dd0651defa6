"""Guards the KVPool contract of the torch runtime: writes, copies and the canonical page form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.attention_checks import cpu_backends
from support.kernel_checks import cpu_device, cpu_facts, cpu_registry

from sixfold.platforms.interface_attention import AttentionSpec
from sixfold.platforms.interface_kernels import Problem
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.torch_runtime.pools import TorchKVPool

LAYERS, PAGES, HEADS, DIM = 3, 6, 2, 8


def make_pool(page_size: int = 4, dtype: str = "float32") -> TorchKVPool:
    problems = [Problem(op, dtype) for op in ("kv_write", "page_copy")]
    table = cpu_registry().resolve(problems, cpu_facts(), {})
    group = KVGroup("full", KVKind.FULL, page_size, PAGES)
    spec = AttentionSpec(4, HEADS, DIM, 1.0, dtype=dtype)
    layout = cpu_backends()[0].layout(group, spec, LAYERS)
    pool = TorchKVPool(group, layout, cpu_device(), table)
    torch.manual_seed(0)
    pool.data.copy_(torch.randn(layout.shape))
    return pool


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_page_travels_through_the_canonical_form(page_size: int, dtype: str) -> None:
    source, target = make_pool(page_size, dtype), make_pool(page_size, dtype)
    target.data.zero_()
    target.import_page(5, source.export_page(2))
    assert torch.equal(target.data[:, 5], source.data[:, 2])
    assert not bool(target.data[:, :5].any()), "another page was touched"


def test_the_canonical_form_is_layer_kv_token_head_dim_little_endian() -> None:
    pool = make_pool()
    got = np.frombuffer(pool.export_page(3), "<f4").reshape(LAYERS, 2, 4, HEADS, DIM)
    k, v = torch.randn(1, HEADS, DIM), torch.randn(1, HEADS, DIM)
    pool.write(1, torch.tensor([3 * 4 + 2]), k, v)
    again = np.frombuffer(pool.export_page(3), "<f4").reshape(LAYERS, 2, 4, HEADS, DIM)
    np.testing.assert_array_equal(again[1, 0, 2], k[0].numpy())
    np.testing.assert_array_equal(again[1, 1, 2], v[0].numpy())
    changed = np.argwhere(got != again)
    assert {tuple(c[[0, 2]]) for c in changed} == {(1, 2)}


def test_a_page_of_the_wrong_length_is_refused() -> None:
    pool = make_pool()
    with pytest.raises(ValueError, match="has 1536 bytes, got 12"):
        pool.import_page(1, b"too short ..")


def test_copy_reads_all_sources_first() -> None:
    pool = make_pool()
    before = pool.data.clone()
    pool.copy([1, 2, 3], [2, 1, 4])
    assert torch.equal(pool.data[:, [2, 1, 4]], before[:, [1, 2, 3]])
    assert torch.equal(pool.data[:, [0, 3, 5]], before[:, [0, 3, 5]])


def test_a_page_view_shares_the_memory() -> None:
    pool = make_pool()
    pool.page_view(2, 3).fill_(9.0)
    assert bool((pool.data[2, 3] == 9.0).all())
    assert not bool((pool.data[1, 3] == 9.0).any())


def test_gather_gives_the_pages_in_the_order_asked() -> None:
    pool = make_pool()
    got = pool.gather(1, torch.tensor([4, 2]))
    want = torch.cat((pool.data[1, 4], pool.data[1, 2]))
    assert torch.equal(got, want)
