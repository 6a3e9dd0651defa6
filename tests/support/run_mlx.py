"""An engine over the MLX executor, run to the end of its requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.messages import AddRequest, Output
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface import DeviceFacts, EngineSpec, ExecutorInfo
from sixfold.platforms.mlx.executor import MLXExecutor

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


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
    executor = mlx_executor(path, **fields)
    try:
        info = executor.load()
        steps = {"max_rows": info.max_rows, "max_step_tokens": info.max_step_tokens}
        yield Engine(executor, info, config or EngineConfig(**steps), frozenset()), info
    finally:
        executor.close()


def finish(engine: Engine) -> dict[str, list[Output]]:
    """Step until nothing is left; outputs by request."""
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(output.request_id, []).append(output)
    return found


def complete(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
) -> list[list[int]]:
    """Tokens of all prompts, asked at once."""
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for i, (prompt, own) in enumerate(zip(prompts, every, strict=True)):
        engine.add(AddRequest(request_id=str(i), prompt_ids=list(prompt), params=own))
    found = finish(engine)
    return [[t for o in found[str(i)] for t in o.token_ids] for i in range(len(prompts))]
