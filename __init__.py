"""Sixfold: an LLM serving engine where the same command works on any hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from .common.sampling import SamplingParams
    from .server.llm import LLM


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import sixfold` stays cheap."""
    if name == "LLM":
        from .server.llm import LLM

        return LLM
    if name == "SamplingParams":
        from .common.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'sixfold' has no attribute {name!r}")
