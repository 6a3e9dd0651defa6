"""Contract: keys and values may be kept in fewer bits than activations have. Which dtype they get
is decided with a reason or honoured as asked; the cache's size follows; answers stay near."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.kernel_checks import cpu_facts
from support.tiny_models import TINY, save

from sixfold.common.config import EngineConfig
from sixfold.common.errors import ConfigError, KernelError
from sixfold.platforms.cpu.device import CpuDevice
from sixfold.platforms.cpu.kernels import register
from sixfold.platforms.cpu.native_library import missing
from sixfold.platforms.interface import EngineSpec, ExecutorInfo
from sixfold.platforms.interface_step import StepBatch, Want
from sixfold.platforms.sampling_rows import no_sampling
from sixfold.platforms.torch_runtime.executor import TorchExecutor

pytestmark = pytest.mark.skipif(missing() is not None, reason="no native kernels here")
TOKENS = 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(TINY["llama"].model(), folder)
    return folder


def loaded(path: Path, **fields: object) -> tuple[TorchExecutor, ExecutorInfo]:
    device = CpuDevice(cpu_facts(), threads=1)
    spec = EngineSpec(str(path), max_context=64, cache_tokens=128, **fields)  # type: ignore[arg-type]
    executor = TorchExecutor(spec, device, lambda registry: register(registry, device))
    return executor, executor.load()


def scores(path: Path, **fields: object) -> np.ndarray:
    """Log-probabilities of a prompt in two steps: the second reads what the first kept."""
    executor, info = loaded(path, **fields)
    ids = np.random.default_rng(0).integers(0, info.vocab_size, TOKENS + 1).astype(np.int32)
    found = []
    for first, last in ((0, 25), (25, TOKENS)):
        count = last - first
        batch = StepBatch(
            step=0,
            row_ids=np.zeros(1, np.int32),
            token_ids=ids[first:last],
            query_start=np.array([0, count], np.int32),
            context_lens=np.array([first], np.int32),
            page_tables={"full": np.array([[3, 1, 5]], np.int32)},
            want=np.full(1, Want.PROMPT_LOGPROBS, np.uint8),
            sampling=no_sampling(1),
            prompt_targets=ids[first + 1 : last + 1],
        )
        executor.submit(batch)
        found.append(executor.collect().prompt_logprobs[0].token_logprobs)
    executor.close()
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("fields", "chosen", "because"),
    [
        ({}, "float32", "dtype of the activations"),
        ({"quantize": "int8"}, "float16", "half the bytes"),
        ({"quantize": "int8", "kv_dtype": "float32"}, "float32", "set by the user"),
        ({"kv_dtype": "int8"}, "int8", "set by the user"),
        ({"quantize": "int8", "kernels": {"attention": "sdpa"}}, "float32", "kernel sdpa keeps"),
    ],
)
def test_the_dtype_is_decided_and_the_cache_follows(
    path: Path, fields: dict[str, object], chosen: str, because: str
) -> None:
    executor, info = loaded(path, **fields)
    executor.close()
    decision = {d.what: d for d in info.decisions}["keys and values"]
    assert decision.chosen == chosen
    assert because in decision.because
    config = TINY["llama"].model().config
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    dim = config.head_dim
    row = {"float32": 4 * dim, "float16": 2 * dim, "int8": dim + 4}[chosen]
    pages = info.groups[0].pages
    assert info.cache_bytes == 2 * row * heads * layers * info.page_size * pages


@pytest.mark.parametrize(
    ("kv_dtype", "near"), [("float16", 0.02), ("bfloat16", 0.2), ("int8", 0.4)]
)
def test_answers_stay_near_those_of_float32(path: Path, kv_dtype: str, near: float) -> None:
    """Scores of other weights or of keys out of place are off by several units."""
    want, got = scores(path), scores(path, kv_dtype=kv_dtype)
    assert 0 < np.abs(got - want).max() < near


def test_a_kernel_that_does_not_keep_it_is_refused(path: Path) -> None:
    with pytest.raises(KernelError, match="keeps keys and values in float32, not int8"):
        loaded(path, kv_dtype="int8", kernels={"attention": "sdpa"})
    with pytest.raises(ConfigError, match="float32, bfloat16, float16 or int8"):
        EngineConfig(model="m", kv_dtype="fp8")
