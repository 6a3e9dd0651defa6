"""Guards the Triton attention backend in the buckets of captured steps, uncaptured and interpreted:
plans copied into reserved buffers, of fewer rows than the bucket has, give what fresh ones give."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support.graph_stand_in import StandInGraphs
from support.random_source import RandomSource
from support.recorded_machines import load
from support.tiny_torch_model import Driver

from sixfold.platforms import select
from sixfold.platforms.cuda.kernels import register
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.interpreted import HostedDevice

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
STEPS = [[(0, [3, 4, 5])], [(1, [7])], [(0, [8]), (1, [9])], [(1, [2]), (0, [6]), (2, [1])]]


class Hosted(HostedDevice):
    stand_in: Any = None

    @property
    def graphs(self) -> Any:
        return self.stand_in

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30


def logprobs(stand_in: StandInGraphs | None) -> tuple[list[Any], dict[str, str]]:
    facts = select.probe_all(load("nvidia_h100")[0])["cuda"].devices[0]
    device = Hosted(facts)
    device.stand_in = stand_in
    sizes = {"max_rows": 4, "page_size": 16, "cache_tokens": 128, "max_context": 32}
    spec = EngineSpec("", dtype="float32", **sizes)  # type: ignore[arg-type]
    source = RandomSource(CONFIG)
    made = TorchExecutor(spec, device, lambda r: register(r, device), lambda _: source)
    info = made.load()
    driver, results = Driver(info), []
    for rows in STEPS:
        if stand_in is not None:
            stand_in.poison()
        asked = [{"temperature": 0.0, "logprobs": 1}] * len(rows)
        made.submit(driver.batch(rows, params=asked))
        results.append(made.collect().logprobs)
    made.close()
    return results, {d.what: d.chosen for d in info.decisions}


def test_buckets_give_what_fresh_buffers_give() -> None:
    torch.set_num_threads(1)
    fresh, _ = logprobs(None)
    bucketed, chosen = logprobs(StandInGraphs(captures=False))
    assert (chosen["kernel attention"], chosen["step"]) == ("triton", "in buckets")
    for got, want in zip(bucketed, fresh, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
