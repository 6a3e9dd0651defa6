"""Guards `platforms/mlx/rotary_table.py`: equal to `mx.fast.rope` in every bit, one table for all
layers of a step, never the table of another step."""

from __future__ import annotations

import threading
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

from sixfold.platforms.mlx.rotary_table import ROPE, RotaryTable  # noqa: E402

HOW: dict[str, Any] = {"traditional": False, "base": 10000.0, "scale": 1.0}


def drawn(*shape: int) -> Any:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 3, 1, 8), (2, 3, 5, 8), (2, 3, 1, 12), (2, 5, 8)])
@pytest.mark.parametrize("offset", [0, 131_069, "rows"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("given", ["base", "freqs"])
def test_equal_in_every_bit(shape: Any, offset: Any, scale: float, given: str) -> None:
    how = {**HOW, "scale": scale, "offset": offset}
    if offset == "rows":
        how["offset"] = mx.array([7, 9000][: shape[0]])
    if given == "freqs":
        how |= {"base": None, "freqs": mx.array([1.0, 3.0, 30.0, 1e4])}
    x = drawn(*shape)
    assert mx.array_equal(RotaryTable()(x, 8, **how), ROPE(x, 8, **how))


@pytest.mark.parametrize(
    ("dtype", "traditional"), [(mx.bfloat16, False), (mx.float16, False), (mx.float32, True)]
)
def test_what_it_has_no_table_for_goes_to_mlx(dtype: Any, traditional: bool) -> None:
    asked = []

    def own(*args: Any, **how: Any) -> Any:
        asked.append(how)
        return ROPE(*args, **how)

    x, how = drawn(2, 3, 4, 8).astype(dtype), {**HOW, "traditional": traditional, "offset": 3}
    assert mx.array_equal(RotaryTable(own)(x, 8, **how), ROPE(x, 8, **how))
    assert len(asked) == 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The offsets of the tables that were made."""
    from sixfold.platforms.mlx import rotary_table

    offsets: list[Any] = []
    sines = rotary_table._sines

    def counted(offset: Any, *rest: Any) -> Any:
        offsets.append(offset)
        return sines(offset, *rest)

    monkeypatch.setattr(rotary_table, "_sines", counted)
    return offsets


def test_the_layers_of_a_step_share_a_table(made: list[Any]) -> None:
    rope, offset = RotaryTable(), mx.array([3, 4])
    for _ in range(3):
        rope(drawn(2, 4, 1, 8), 8, offset=offset, **HOW)  # queries
        rope(drawn(2, 1, 1, 8), 8, offset=offset, **HOW)  # keys
    assert len(made) == 1
    local = {**HOW, "base": 1e6}  # layers of another kind
    x = drawn(2, 4, 1, 8)
    assert mx.array_equal(rope(x, 8, offset=offset, **local), ROPE(x, 8, offset=offset, **local))
    rope(x, 8, offset=offset, **HOW)
    assert len(made) == 2


def test_another_step_has_its_own(made: list[Any]) -> None:
    rope, x = RotaryTable(), drawn(2, 4, 1, 8)
    steps = [mx.array([3, 4]), mx.array([4, 5]), 3, 4, mx.array([3, 4])]
    for offset in steps:
        assert mx.array_equal(rope(x, 8, offset=offset, **HOW), ROPE(x, 8, offset=offset, **HOW))
    assert len(made) == len(steps)


def test_frequencies_of_two_layers_are_told_apart() -> None:
    rope, x, offset = RotaryTable(), drawn(1, 2, 3, 8), 5
    how = {"traditional": False, "base": None, "scale": 1.0, "offset": offset}
    for _ in range(4):
        freqs = drawn(4) ** 2 + 1  # may lie where the one before lay
        made = rope(x, 8, freqs=freqs, **how)
        assert mx.array_equal(made, ROPE(x, 8, freqs=freqs, **how))


def test_a_thread_does_not_get_the_table_of_another(made: list[Any]) -> None:
    rope = RotaryTable()
    rope(drawn(1, 2, 3, 8), 8, offset=5, **HOW)
    found: list[Any] = []

    def other() -> None:
        found.append(mx.array_equal(rope(drawn(1, 2, 3, 8), 8, offset=5, **HOW), want).item())

    want = ROPE(drawn(1, 2, 3, 8), 8, offset=5, **HOW)
    mx.eval(want)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [True]
    assert len(made) == 2
