"""The worlds of the engine's random tests with mlx-lm's models in them: an executor of about the
same pages, and an oracle that is the model alone over mlx-lm's own caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from support.engine_traffic import EOS, Arrival, draw
from support.engine_worlds import VOCAB
from support.mock_model import Alone, RowSampling, follow
from support.run_mlx import mlx_executor
from support.tiny_mlx import write

from sixfold.common.ops.sample import sample
from sixfold.common.ops.sample_cases import sampling_arrays
from sixfold.platforms.interface import Executor, ExecutorInfo
from sixfold.platforms.interface_kv import KVKind
from sixfold.platforms.mlx.substitution import called


class Models:
    """Tiny models by what their layers remember, each written and loaded once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[Path, Any] = {}

    def path(self, info: ExecutorInfo) -> Path:
        kinds = {group.kind for group in info.groups}
        windows = [group.window for group in info.groups if group.window]
        name, changes = "llama", dict[str, Any]()
        if KVKind.RECURRENT in kinds:
            name = "qwen3_5"
        elif windows:
            name, changes = "gemma3_text", {"sliding_window": max(2, windows[0])}
        elif KVKind.LATENT in kinds:
            name = "deepseek_v3"
        path = self._folder / "-".join([name, *map(str, changes.values())])
        return path if path.exists() else write(path, name, vocab_size=VOCAB, **changes)

    def model(self, path: Path) -> Any:
        if path not in self._loaded:
            self._loaded[path], _ = load_model(path)
        return self._loaded[path]

    @contextmanager
    def executor(self, info: ExecutorInfo) -> Iterator[tuple[Executor, ExecutorInfo]]:
        """Over a model with the page size, the limits and about the pages of `info`."""
        pages = [group.pages - 1 for group in info.groups if group.kind is not KVKind.RECURRENT]
        longest = -(-info.max_context // info.page_size)
        path = self.path(info)
        # No clocks: they take longer than a small world.
        forms = dict.fromkeys(called(self.model(path)), "mlx-lm")
        executor = mlx_executor(
            path, page_size=info.page_size, max_rows=info.max_rows,
            max_context=info.max_context, max_step_tokens=info.max_step_tokens, threads=1,
            cache_tokens=max([longest, *pages]) * info.page_size, kernels=forms,
        )  # fmt: skip
        try:
            loaded = executor.load()
            yield executor, replace(loaded, overlap=info.overlap, mixed_steps=info.mixed_steps)
        finally:
            executor.close()

    def oracle(self, path: Path) -> Any:
        """`engine_traffic.Oracle` of the model at `path`."""
        model = self.model(path)

        def alone(arrival: Arrival, info: ExecutorInfo) -> Alone:
            cache, known = make_prompt_cache(model), 0

            def read(tokens: list[int]) -> Any:
                nonlocal known
                new, known = tokens[known:], len(tokens)
                return np.array(model(mx.array([new]), cache=cache)[0].astype(mx.float32))

            return follow(read, arrival.prompt, arrival.params, info, EOS, draw, by_contract)

        return alone


def by_contract(row: RowSampling, logits: Any) -> int:
    """The contract's draw; the mock's own is another."""
    fields = {
        "temperature": row.temperature,
        "top_k": row.top_k,
        "top_p": row.top_p,
        "min_p": row.min_p,
        "repetition_penalty": row.repetition,
        "presence_penalty": row.presence,
        "frequency_penalty": row.frequency,
        "bias": dict(zip(row.bias_ids.tolist(), row.bias_values.tolist(), strict=True)),
        "prompt": row.prompt.tolist(),
        "output": row.output.tolist(),
        "uniform": row.uniform,
    }
    return int(sample(logits[None], sampling_arrays([fields]))[0])
