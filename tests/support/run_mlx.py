"""An engine over the MLX executor, run to the end of its requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.run_engine import GREEDY, complete, finish, serving

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.platforms.interface import DeviceFacts, EngineSpec, ExecutorInfo
from sixfold.platforms.mlx.executor import MLXExecutor

__all__ = ["GREEDY", "complete", "finish", "mlx_executor", "mlx_facts", "running"]


def mlx_facts() -> DeviceFacts:
    return DeviceFacts(
        kind="mlx", name="test CPU", arch=(), memory_bytes=8 << 30, unified_memory=True,
        lane_width=1, dtypes=frozenset({"float32"}), fp8="none", graphs="traced", libraries={},
    )  # fmt: skip


def mlx_executor(path: Path | str, **fields: Any) -> MLXExecutor:
    spec = {"max_rows": 8, "max_context": 128, "page_size": 4, **fields}
    return MLXExecutor(EngineSpec(str(path), **spec), mlx_facts())


@contextmanager
def running(
    path: Path | str, config: EngineConfig | None = None, **fields: Any
) -> Iterator[tuple[Engine, ExecutorInfo]]:
    with serving(mlx_executor(path, **fields), config) as made:
        yield made
