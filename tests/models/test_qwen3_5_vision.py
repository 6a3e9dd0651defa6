"""Contract: the vision tower gives the rows that transformers' Qwen3.5 tower gives for the same
patches, over grids of every kind and several images at once, and images do not see one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_kernels import reference_table
from support.kernel_checks import cpu_facts, cpu_registry
from support.tiny_qwen3_5 import VISION, build
from torch import Tensor, nn

from sixfold.common.checkpoint.fields import Fields
from sixfold.common.errors import CheckpointError
from sixfold.models.layers import Build, Layer
from sixfold.models.qwen3_5_vision import PatchProjection, Qwen35Vision
from sixfold.platforms.interface_kernels import KernelTable

GRIDS = {
    "one_block": [(1, 2, 2)],
    "square": [(1, 6, 6)],
    "larger_than_the_learned_square": [(1, 14, 4)],
    "strip": [(1, 2, 18)],
    "several": [(1, 4, 4), (1, 2, 6), (1, 8, 10), (1, 4, 4)],
    "a_film": [(3, 4, 6), (1, 2, 2)],
}


def fields(**changes: Any) -> Fields:
    return Fields({**VISION, **changes}, Path("config.json"))


def ours(oracle: Any, ops: KernelTable, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The tower with the oracle's weights, prepared as a loader does."""
    with torch.device("meta"):
        tower = Qwen35Vision(fields(**config), Build(ops, dtype)).eval()
    values = oracle.state_dict()
    for name, module in tower.named_modules():
        for leaf, meta in list(module.named_parameters(recurse=False)):
            value = values.pop(f"{name}.{leaf}")
            assert value.shape == meta.shape, name
            setattr(module, leaf, nn.Parameter(value.to(meta.dtype), requires_grad=False))
        if isinstance(module, Layer):
            module.prepare()
    assert not values  # nothing of the oracle is left out
    return tower


def native_table(oracle: Any) -> KernelTable:
    with torch.device("meta"):
        tower = Qwen35Vision(fields(), Build(KernelTable({}, ()), torch.float32))
    problems = [p for m in tower.modules() if isinstance(m, Layer) for p in m.problems()]
    return cpu_registry().resolve(problems, cpu_facts(), {})


def pixels(grids: list[tuple[int, int, int]], seed: int = 1) -> Tensor:
    count = sum(int(np.prod(grid)) for grid in grids)
    return torch.randn(count, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(seed))


def expected(oracle: Any, patches: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    with torch.inference_mode():
        return oracle(patches, torch.tensor(grids)).pooler_output


@pytest.fixture(scope="module")
def oracle() -> Any:
    torch.set_num_threads(1)
    return build("dense").model.visual


@pytest.mark.parametrize("name", GRIDS)
def test_rows_equal_transformers(name: str, oracle: Any, table: KernelTable) -> None:
    grids = GRIDS[name]
    patches = pixels(grids)
    wanted = expected(oracle, patches, grids)
    assert wanted.std() > 0.1  # flat rows would prove nothing
    with torch.inference_mode():
        found = ours(oracle, table)(patches, grids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_rows_on_this_machines_own_kernels(oracle: Any) -> None:
    grids = GRIDS["several"]
    patches = pixels(grids)
    with torch.inference_mode():
        found = ours(oracle, native_table(oracle))(patches, grids)
    torch.testing.assert_close(found, expected(oracle, patches, grids), atol=1e-4, rtol=1e-4)


def test_a_large_image_goes_through_the_mlp_in_parts(
    oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sixfold.models.qwen3_5_vision.ROWS_AT_ONCE", 7)
    grids = GRIDS["several"]
    patches = pixels(grids)
    with torch.inference_mode():
        found = ours(oracle, reference_table())(patches, grids)
    torch.testing.assert_close(found, expected(oracle, patches, grids), atol=1e-4, rtol=1e-4)


def test_an_image_gives_the_same_rows_alone_and_in_company(oracle: Any) -> None:
    grids = GRIDS["several"]
    patches = pixels(grids)
    tower = ours(oracle, reference_table())
    with torch.inference_mode():
        together = tower(patches, grids)
        patches[:16] = torch.nan  # the first image alone is spoilt
        spoilt = tower(patches, grids)
    assert spoilt[:4].isnan().all()
    torch.testing.assert_close(spoilt[4:], together[4:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("fault", ["no_positions", "no_rotation", "columns_first", "erf_inside"])
def test_the_comparison_sees_each_part(
    fault: str, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sixfold.models import qwen3_5_vision as module

    grids = GRIDS["several"]
    patches = pixels(grids)
    tower = ours(oracle, reference_table())
    if fault == "no_positions":
        tower.pos_embed.table = torch.zeros_like(tower.pos_embed.table)
    elif fault == "no_rotation":
        tower.rope.inverse = torch.zeros_like(tower.rope.inverse)
    elif fault == "columns_first":
        places = module.patch_places
        swapped = lambda g, m: tuple(x[::-1].copy() for x in places(g, m))  # noqa: E731
        monkeypatch.setattr(module, "patch_places", swapped)
    else:
        monkeypatch.setattr(module.F, "gelu", lambda x, approximate="none": torch.relu(x))
    with torch.inference_mode():
        found = tower(patches, grids)
    assert (found - expected(oracle, patches, grids)).abs().max() > 1e-2


def test_bfloat16_stays_near_float32(oracle: Any, table: KernelTable) -> None:
    grids = GRIDS["several"]
    patches = pixels(grids)
    wanted = expected(oracle, patches, grids)
    with torch.inference_mode():
        found = ours(oracle, table, torch.bfloat16)(patches, grids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().mean() < 0.05 * wanted.std()


def test_problems_name_exactly_the_ops_called(oracle: Any) -> None:
    called: set[str] = set()

    class Recorder:
        kernels = reference_table().kernels

        def __getattr__(self, op: str) -> Any:
            called.add(op)
            return getattr(reference_table(), op)

    recorder: Any = Recorder()
    tower = ours(oracle, recorder)
    with torch.inference_mode():
        tower(pixels([(1, 2, 4)]), [(1, 2, 4)])
    problems = [p for m in tower.modules() if isinstance(m, Layer) for p in m.problems()]
    assert {p.op for p in problems} == called
    sizes = {(p.dims["k"], p.dims["n"]) for p in problems if p.op == "linear"}
    assert {(1536, 32), (32, 96), (32, 32), (32, 64), (64, 32), (128, 128), (128, 64)} == sizes


def test_the_towers_matrices_are_not_rounded() -> None:
    with torch.device("meta"):
        tower = Qwen35Vision(fields(), Build(KernelTable({}, ()), torch.float32))
    matrices = [m for m in tower.modules() if isinstance(m, Layer) and hasattr(m, "matrix")]
    assert any(isinstance(m, PatchProjection) for m in matrices)
    assert not any(m.rounds_on_load for m in [*matrices, tower.pos_embed])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"deepstack_visual_indexes": [1]}, "deepstack"),
        ({"hidden_size": 36}, "hidden_size"),
        ({"num_position_embeddings": 35}, "num_position_embeddings"),
        ({"depth": None}, "depth"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_tower_cannot_be_is_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        Qwen35Vision(fields(**change), Build(KernelTable({}, ()), torch.float32))
