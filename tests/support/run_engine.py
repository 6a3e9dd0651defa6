"""An engine over an executor of a test's own, run to the end of its requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.kernel_checks import cpu_facts

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.messages import AddRequest, Output
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.interface import EngineSpec, Executor, ExecutorInfo
from sixfold.platforms.torch_runtime.executor import TorchExecutor

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def torch_executor(path: Path | str, **fields: Any) -> TorchExecutor:
    """On this machine's CPU kernels, with one thread."""
    device = CpuDevice(cpu_facts(), threads=1)
    spec = {"max_rows": 8, "max_context": 128, "page_size": 4, **fields}
    return TorchExecutor(
        EngineSpec(str(path), **spec), device, lambda registry: register(registry, device)
    )


@contextmanager
def serving(
    executor: Executor, config: EngineConfig | None = None
) -> Iterator[tuple[Engine, ExecutorInfo]]:
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
