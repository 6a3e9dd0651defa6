"""What one running row holds of the cache."""

from __future__ import annotations

from .prefix_tree import Node


class Sequence:
    """A handle (the row's line in the page tables), `pages` slots of every paged group, of which
    those before `first[group]` are released, the row's place in the tree, and after how many tokens
    a copy of its state is kept beside the working one (-1: none is)."""

    __slots__ = ("first", "handle", "kept_at", "node", "pages")

    def __init__(self, handle: int, groups: int, root: Node) -> None:
        self.handle = handle
        self.pages = 0
        self.first = [0] * groups
        self.node = root
        self.kept_at = -1
