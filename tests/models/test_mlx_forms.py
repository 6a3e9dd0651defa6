"""Guards that a model answers the same in every form its functions may have: mlx-lm's own greedy
tokens with attention and activation fused and in parts, whatever this machine would choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.run_mlx import GREEDY, complete, running
from support.tiny_mlx import VOCAB, build, own_greedy, write

from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.interface_kv import KVGroup, KVKind
from sixfold.platforms.interface_step import StepBatch
from sixfold.platforms.mlx import page_products
from sixfold.platforms.mlx.caches import PagedCache
from sixfold.platforms.mlx.forms import forms
from sixfold.platforms.mlx.kernels import GENERIC
from sixfold.platforms.mlx.page_kernels import paged_attention
from sixfold.platforms.mlx.pools import LayerPages
from sixfold.platforms.mlx.step_plan import Rows, plan_pages
from sixfold.platforms.mlx.substitution import called


def decoding(group: KVGroup, table: np.ndarray, context: tuple[int, ...]) -> StepBatch:
    rows = len(context)
    return StepBatch(
        step=0,
        row_ids=np.arange(rows, dtype=np.int32),
        token_ids=np.zeros(rows, np.int32),
        query_start=np.arange(rows + 1, dtype=np.int32),
        context_lens=np.array(context, np.int32),
        page_tables={group.name: table},
        want=np.zeros(rows, np.uint8),
        sampling=sampling_arrays([{}] * rows),
    )


FAMILIES = ("llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_5_moe", "granitemoehybrid")


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_mlx_lms_in_either_form(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, name)
    rng = np.random.default_rng(11)
    asked = [rng.integers(0, VOCAB, length).tolist() for length in (1, 9, 34, 70)]
    expected = own_greedy(path, asked, GREEDY.max_tokens or 0)
    for number in (0, 1):  # mlx-lm's own, and the other
        kernels = {op: list(forms(op))[number] for op in called(build(name))}
        with running(path, kernels=kernels, max_step_tokens=67) as (engine, info):
            assert complete(engine, asked) == expected
        chosen = {d.what: (d.chosen, d.because) for d in info.decisions}
        for op, form in kernels.items():
            assert chosen[f"kernel {op}"] == (form, "named by the user")


# Latent attention hands on keys of its own making, not those that it fetched.
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_mlx_lms_when_decode_reads_pages(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def counted(*args: Any) -> mx.array:
        nonlocal calls
        calls += 1
        return paged_attention(*args)

    monkeypatch.setitem(GENERIC, "paged_attention", counted)
    path = write(tmp_path / name, name)
    rng = np.random.default_rng(11)
    asked = [rng.integers(0, VOCAB, length).tolist() for length in (1, 9, 34, 70)]
    with running(path, kernels={"paged_attention": "generic"}) as (engine, info):
        assert complete(engine, asked) == own_greedy(path, asked, GREEDY.max_tokens or 0)
    said = {d.what: d for d in info.decisions}
    assert said["decode attention"].chosen == "in pages"
    assert (calls > 10) == (name != "deepseek_v3")


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_mlx_lms_when_decode_multiplies_pages(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def counted(*args: Any) -> mx.array:
        runs.append(args[3].runs)
        return attend(*args)

    attend = page_products.attend
    monkeypatch.setattr(page_products, "attend", counted)
    path = write(tmp_path / name, name)
    rng = np.random.default_rng(11)
    asked = [rng.integers(0, VOCAB, length).tolist() for length in (40, 1, 9, 70)]
    with running(path, kernels={"paged_attention": "products"}, page_size=4) as (engine, info):
        for prompts in (asked, asked[::3]):
            assert complete(engine, prompts) == own_greedy(path, prompts, GREEDY.max_tokens or 0)
    said = {d.what: d for d in info.decisions}
    assert said["decode attention"].chosen == "products"
    assert bool(runs) == (name != "deepseek_v3")
    assert not runs or {0} < set(runs)  # with and without larger blocks


def test_a_cache_gives_its_pages_for_its_own_arrays_and_mask_alone() -> None:
    group = KVGroup("full", KVKind.FULL, page_size=2, pages=9, window=0)
    cache = PagedCache(LayerPages(group, 2, 4, 4, mx.float32), 0)
    table = np.array([[3, 1], [2, 5]], np.int32)
    cache.plan = plan_pages(Rows(decoding(group, table, (2, 1)), 0, 2), group)
    new = mx.ones((2, 2, 1, 4))
    keys, values = cache.update_and_fetch(new, new)
    mask, window = cache.make_mask(1), cache.make_mask(1, window_size=2)
    found = cache.in_place(keys, values, mask)
    assert found is not None
    assert found.window == 0
    assert found.lengths.tolist() == [3, 2]
    assert found.pages.tolist() == [[3, 1], [2, 2]]  # what a row lacks is its first page
    limited = cache.in_place(keys, values, window)
    assert limited is not None
    assert limited.window == 2
    assert cache.in_place(keys + 0, values, mask) is None
    assert cache.in_place(keys, values, mask & True) is None
    assert cache.in_place(keys, values, None) is None  # of two rows, one has less
    del keys
    assert cache.in_place(values, values, mask) is None
