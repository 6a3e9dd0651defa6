"""Decisions as text for a person: what was chosen, why, and what was refused for which reason."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from ..platforms.interface import Decision

WIDTH = 80


def render(decisions: Iterable[Decision], width: int = WIDTH) -> str:
    """Every decision in order, generic fallbacks first. Only a long word exceeds `width`."""
    records = list(decisions)
    fallbacks = [d for d in records if d.fallback]
    others = [d for d in records if not d.fallback]
    parts = []
    if fallbacks:
        title = f"{len(fallbacks)} generic choice(s) where a better one exists (--strict refuses):"
        parts += ["\n".join(textwrap.wrap(title, width)), *(_block(d, width) for d in fallbacks)]
        parts.append("Everything else:")
    else:
        parts.append("No generic fallbacks. Every decision:")
    return "\n".join([*parts, *(_block(d, width) for d in others)])


def _block(decision: Decision, width: int) -> str:
    lines = _wrap(f"{decision.what}: {decision.chosen}", width, "  ", "    ")
    lines += _wrap(f"because {decision.because}", width, "      ", "        ")
    for candidate, reason in decision.rejected:
        lines += _wrap(f"not {candidate}: {reason}", width, "      ", "        ")
    return "\n".join(lines)


def _wrap(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
