"""Chat templates of families whose checkpoints come with none, by architecture. Used where a
directory has no template of its own."""

from __future__ import annotations

from .deepseek_v4_template import DEEPSEEK_V4

BUILT_IN = {"deepseek_v4": DEEPSEEK_V4}
