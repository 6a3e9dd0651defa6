"""How much a restored state saves: a hybrid model's prompt computed, then asked again.

python ci/bench/prefix_hit.py [--tokens 512] [--rounds 5]

A random Qwen3.5-shaped model (gated delta rule and attention) on the MLX platform, in process. The
repeat must give the same tokens and bit-equal log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams
from sixfold.server.launch import build, locate

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


def write_model(folder: Path) -> None:
    mx.random.seed(0)
    model_class, arguments = _get_classes(CONFIG)
    model = model_class(arguments.from_dict(CONFIG))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, Any]:
    """Seconds to the first token, and that token with its log-probabilities."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, ignore_eos=True)
    started = time.perf_counter()
    engine.add(AddRequest(request_id="a", prompt_ids=prompt, params=params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return time.perf_counter() - started, outputs[0].logprobs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        config = EngineConfig(model=name, platform="mlx", max_rows=8, cache_tokens=32768)
        engine = build(config, locate(name)).engine
    rng = np.random.default_rng(0)
    first_token(engine, rng.integers(0, 8192, 64).tolist())  # warm-up
    cold, warm = [], []
    for _ in range(asked.rounds):
        prompt = rng.integers(0, CONFIG["vocab_size"], asked.tokens).tolist()
        seconds, found = first_token(engine, prompt)
        cold.append(seconds)
        seconds, again = first_token(engine, prompt)
        warm.append(seconds)
        if found != again:
            raise SystemExit("the repeat gave other numbers")
    engine.close()
    before, after = statistics.median(cold), statistics.median(warm)
    print(f"{asked.tokens} tokens: {before:.3f} s computed, {after:.3f} s repeated: "
          f"{before / after:.1f} x, bit-equal")  # fmt: skip


if __name__ == "__main__":
    main()
