"""An engine over the cpu platform's torch executor, run to the end of its requests."""

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
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.torch_runtime.executor import TorchExecutor


@contextmanager
def running(path: Path, **fields: Any) -> Iterator[Engine]:
    """`fields` of EngineSpec; one thread, float32."""
    spec = EngineSpec(str(path), **{"dtype": "float32", "max_rows": 8, **fields})
    device = CpuDevice(cpu_facts(), threads=1)
    executor = TorchExecutor(spec, device, lambda registry: register(registry, device))
    try:
        info = executor.load()
        config = EngineConfig(max_rows=info.max_rows, max_step_tokens=info.max_step_tokens)
        yield Engine(executor, info, config, frozenset())
    finally:
        executor.close()


def complete(engine: Engine, prompts: Sequence[Sequence[int]], steps: int) -> list[list[Output]]:
    """All prompts at once, greedily, without an end: what was said about each."""
    params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(AddRequest(request_id=str(i), prompt_ids=list(prompt), params=params))
    found: list[list[Output]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(output.error)
            found[int(output.request_id)].append(output)
    return found


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def cached_of(outputs: Sequence[Output]) -> int:
    """Tokens of the prompt that were found in the cache."""
    return next(o.cached_tokens for o in outputs if o.cached_tokens is not None)
