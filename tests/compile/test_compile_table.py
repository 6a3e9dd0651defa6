"""Guards the gate of offline compilation: it fires on a kernel that really spills, on one that
really needs more registers, on every other change for the worse; and its page is its baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import compile_table
import pytest
from compile_targets import TARGETS, Resources, compile_work
from compile_workload import work
from triton.runtime.errors import OutOfResources

from sixfold.platforms.triton_kernels import attention, register, tuning
from sixfold.platforms.triton_kernels.tuning import Tile

RECORDED = json.loads(compile_table.BASELINE.read_text())
TABLE: compile_table.Table = RECORDED["targets"]

Cut = Callable[..., list[Resources]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Cut:
    """One piece of work for a target, cut otherwise than the table says."""
    own = tuning.choose

    def run(target: str, name: str, **changes: Any) -> list[Resources]:
        def changed(facts: Any) -> Any:
            return replace(own(facts), **changes)

        monkeypatch.setattr(register.tuning, "choose", changed)
        monkeypatch.setattr(attention, "choose", changed)
        chosen = {name: work(TARGETS[target])[name]}
        return list(compile_work(TARGETS[target], chosen))

    return run


def complaints(found: list[Resources], target: str) -> str:
    names = {kernel.kernel for kernel in found}
    before = {name: row for name, row in TABLE[target].items() if name in names}
    return "; ".join(compile_table.complaints(found, before))


def test_what_the_table_says_is_what_was_recorded(compiled: Cut) -> None:
    assert complaints(compiled("gfx942", "rms_norm 4096"), "gfx942") == ""
    assert complaints(compiled("sm_90", "rms_norm 4096"), "sm_90") == ""


def test_it_fires_on_a_real_spill(compiled: Cut) -> None:
    tile = Tile(block_m=16, block_n=64, warps=4, stages=2)
    found = compiled("gfx1100", "attention 128", narrow=tile, keys_bytes=16384)
    assert "attention_kernel (attention 128): spills" in complaints(found, "gfx1100")


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_it_fires_on_a_real_jump_in_registers(compiled: Cut, target: str) -> None:
    found = compiled(target, "rms_norm 4096", most_warps=1)
    assert "rms_norm_kernel (rms_norm 4096): registers" in complaints(found, target)


def test_more_shared_memory_than_the_part_has_is_an_error(
    compiled: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "sm_80", replace(TARGETS["sm_80"], shared=1 << 14))
    with pytest.raises(OutOfResources, match="shared memory"):
        compiled("sm_80", "attention 128")


GOOD = Resources("k", 40, 0, 0, 1024, 8, "v_mfma", 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 1}, "k: spills 1 to memory"),
        ({"registers": 49}, "k: registers 49, were 40"),
        ({"scalar_spills": 9}, "k: scalar_spills 9, were 0"),
        ({"shared": 1025}, "k: shared 1025, were 1024"),
        ({"occupancy": 7}, "k: occupancy 7, was 8"),
        ({"matrix": ""}, "k: multiplies by '', did by 'v_mfma'"),
        ({"seconds": 20.5}, "k: compiled for 20.5 s, more than 20.0"),
        ({"kernel": "new"}, "new: not in the baseline; renew it with --write; "
                            "k: in the baseline, not compiled"),
    ],
)  # fmt: skip
def test_it_fires_on(change: dict[str, Any], said: str) -> None:
    before = compile_table.plain([GOOD])
    assert compile_table.complaints([GOOD], before) == []
    assert compile_table.complaints([replace(GOOD, registers=48)], before) == []
    assert "; ".join(compile_table.complaints([replace(GOOD, **change)], before)) == said


def test_the_baseline_has_every_target_and_no_spill() -> None:
    assert TABLE.keys() == TARGETS.keys()
    for target, rows in TABLE.items():
        assert len(rows) > 20, target
        assert not any(row["spills"] for row in rows.values())
        products = [row for name, row in rows.items() if name.startswith("attention_kernel (")]
        assert all(row["matrix"] for row in products if row is products[0])


def test_the_page_is_the_baseline() -> None:
    if RECORDED["triton"] != compile_table.triton.__version__:
        pytest.skip(f"recorded with Triton {RECORDED['triton']}")
    assert compile_table.PAGE.read_text() == compile_table.page(TABLE)
