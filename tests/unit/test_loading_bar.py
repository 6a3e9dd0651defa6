"""Guards what a person is told while a model loads: a bar per stage that counts captured buckets,
and a line per stage where nobody watches."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from sixfold.common.messages import Loading
from sixfold.server.loading_bar import LoadingBar

CAPTURING = "capturing decode steps"


def told(messages: list[Loading], terminal: bool) -> str:
    out = StringIO()
    bar = LoadingBar(Console(file=out, force_terminal=terminal, width=100, color_system=None))
    for message in messages:
        bar.show(message)
    bar.close()
    return out.getvalue()


WEIGHTS = [Loading(stage="loading weights", done=done, total=5 << 20) for done in (0, 1 << 20)]
BUCKETS = [Loading(stage=CAPTURING, done=done, total=5) for done in range(1, 6)]


def test_a_line_per_stage_where_nobody_watches() -> None:
    assert told([*WEIGHTS, *BUCKETS], False) == f"loading weights ...\n{CAPTURING} ...\n"


def test_buckets_are_counted_on_a_bar_and_bytes_are_not() -> None:
    text = told([*WEIGHTS, *BUCKETS], True)
    assert "loading weights" in text
    assert "20%" in text
    assert f"/{5 << 20}" not in text
    last = text[text.rindex(CAPTURING) :]
    assert "100%" in last
    assert "5/5" in last


@pytest.mark.parametrize("count", [1, 3])
def test_the_count_is_the_last_that_was_told(count: int) -> None:
    text = told(BUCKETS[:count], True)
    assert f"{count}/5" in text[text.rindex(CAPTURING) :]
    assert "5/5" not in text


def test_a_stage_that_does_not_say_how_far_it_is() -> None:
    assert "starting" in told([Loading(stage="starting")], True)
