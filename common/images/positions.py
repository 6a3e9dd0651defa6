"""Rotary positions of a prompt with images: three per token, of time, height and width.

Multimodal rotary embedding (Wang et al. 2024, Qwen2-VL, section 2.1): text counts on all three axes
at once, an image's tokens count frames, rows and columns from where it begins, and the text behind
goes on after the largest of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...platforms.interface_kv import I32
from .patches import Grid, tokens_of


def rotary_positions(
    length: int, images: Iterable[tuple[int, Grid]], merge: int
) -> tuple[I32, int]:
    """`images`: (first token, grid) in order of the prompt of `length` tokens -> ((3, length), what
    to add to the place of every token behind the prompt)."""
    places = np.empty((3, length), np.int32)
    done, at = 0, 0  # tokens that have a position, and the next position
    for start, grid in images:
        places[:, done:start] = np.arange(at, at + start - done)
        at += start - done
        frames, down, across = grid[0], grid[1] // merge, grid[2] // merge
        done = start + tokens_of(grid, merge)
        places[:, start:done] = at + np.indices((frames, down, across)).reshape(3, -1)
        at += max(down, across)
    places[:, done:] = np.arange(at, at + length - done)
    return places, at - done
