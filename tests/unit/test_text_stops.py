"""Contract guarded: common/text/stops. A stop string never leaks, nothing else is lost or held, and
the result does not depend on how the text is cut into chunks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sixfold.common.text.stops import StopMatcher

ALPHABET = "aab🙂"
texts = st.text(ALPHABET, max_size=30)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


def oracle(text: str, stops: list[str], include: bool, armed_from: int = 0) -> tuple[str, bool]:
    """By definition: the first character at which a stop string is complete; the longest there."""
    for end in range(armed_from + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end if include else end - len(max(ending, key=len))], True
    return text, False


def chunked(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(texts, stop_lists, st.booleans(), st.lists(st.integers(0, 100), max_size=6))
def test_any_chunking_gives_what_the_definition_says(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    matcher = StopMatcher(stops, include)
    got = "".join(matcher.push(chunk) for chunk in chunked(text, cuts))
    if matcher.matched is None:
        got += matcher.flush()
    assert (got, matcher.matched is not None) == oracle(text, stops, include)


@given(texts, stop_lists)
def test_holds_back_exactly_the_longest_suffix_that_may_become_a_stop(
    text: str, stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    released = ""
    for index, character in enumerate(text):
        released += matcher.push(character)
        if matcher.matched is not None:
            return
        seen = text[: index + 1]
        held = [n for n in range(len(seen) + 1) for s in stops if s[:n] == seen[len(seen) - n :]]
        assert released == seen[: len(seen) - max(held, default=0)]


@given(texts, texts, stop_lists, st.booleans())
def test_matches_complete_in_unarmed_text_do_not_count(
    before: str, after: str, stops: list[str], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    got = "".join(matcher.push(c, armed=False) for c in before)
    got += "".join(matcher.push(c) for c in after)
    if matcher.matched is None:
        got += matcher.flush()
    expected = oracle(before + after, stops, include, armed_from=len(before))
    assert (got, matcher.matched is not None) == expected


@pytest.mark.parametrize(
    ("stops", "chunks", "released"),
    [
        (["abcd", "bc"], ["abcd"], "a"),  # "bc" is complete first
        (["bc", "abc"], ["xab", "c!"], "x"),  # both are complete at once: the longest
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb"),
        (["STOP"], ["ST", "OPE"], ""),
        (["STOP"], ["STSTO", "P"], "ST"),
    ],
)
def test_examples(stops: list[str], chunks: list[str], released: str) -> None:
    matcher = StopMatcher(stops)
    assert "".join(matcher.push(chunk) for chunk in chunks) == released
    assert matcher.matched in stops
    assert matcher.push("more") == "" == matcher.flush()
