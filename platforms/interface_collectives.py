"""Several devices of one platform, joined. No model is spread over them: what there is is a check
that the platform's process groups compute what they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .interface import DeviceFacts


@dataclass(frozen=True, slots=True)
class CollectivesFound:
    backend: str  # of the process group; "" when no device came so far as to say it
    devices: int
    cases: int  # that every device ran to its end
    failures: tuple[str, ...] = ()  # each names its rank; what stopped others stands first


@runtime_checkable
class JoinsDevices(Protocol):
    """What a platform that may have several devices offers beside `Platform`."""

    def check_collectives(self, devices: Sequence[DeviceFacts]) -> CollectivesFound:
        """One process per device, which is killed when it does not answer. Blocks until all have
        ended. A device's fault is in the result, never raised."""
        ...
