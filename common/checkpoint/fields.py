"""Typed access to a checkpoint's configuration. Every error names the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


class Fields:
    """Reads typed values from a configuration mapping. A field that is null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: Path) -> None:
        self.values = values
        self.source = source

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer. Without a default the field must be there. Raises CheckpointError."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "an integer")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.integer(name, default)
        if value < 1:
            raise self._wrong(name, value, "at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def optional(self, name: str) -> Any:
        """The raw value, or None when absent or null."""
        return self.values.get(name)

    def unsupported(self, name: str, supported: str) -> CheckpointError:
        """The error for a value that is understood but cannot be served."""
        value = self.values.get(name)
        return CheckpointError(
            f"{self.source}: field {name!r} has the value {value!r}, which is not supported; "
            f"supported: {supported}."
        )

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(
                f"{self.source}: field {name!r} is missing; the model cannot be built without it."
            )
        return default

    def _wrong(self, name: str, value: Any, want: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: field {name!r} must be {want}, got {value!r}.")
