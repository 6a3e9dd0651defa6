"""Stop strings over a stream of text, independent of how the stream is cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases text that can no longer be part of a stop string.

    The result equals feeding one character at a time: the stop string that is complete first ends
    the text, and among those complete at the same character the longest wins. Only the longest
    suffix that could still become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """Take new text, return what is released. Matches that are complete within text pushed with
        `armed=False` do not count. After a match nothing more is released."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        if armed and text:
            found = self._find(buffer, len(self._held))
            if found is not None:
                begin, stop = found
                self.matched, self._held = stop, ""
                return buffer[: begin + len(stop)] if self._include else buffer[:begin]
        keep = pending(buffer, self._stops)
        cut = len(buffer) - keep
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        """The held text, when the stream ends without a match."""
        held, self._held = self._held, ""
        return held

    def _find(self, buffer: str, seen: int) -> tuple[int, str] | None:
        """The match with the earliest end beyond `seen`; of equal ends the longest."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            # A match that counts ends after `seen`, so it begins after seen - len(stop).
            begin = buffer.find(stop, max(0, seen - len(stop) + 1))
            if begin >= 0:
                candidate = (begin + len(stop), begin, stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else best[1:]


def pending(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix that is a proper prefix of a stop string."""
    longest = max((len(stop) for stop in stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-length:]
        if any(len(stop) > length and stop.startswith(tail) for stop in stops):
            return length
    return 0
