"""The engine in process, without HTTP: prefill time and decode rate at several batch sizes.

python ci/bench/engine_steps.py [MODEL] [--platform P] [--rows 1,8,32]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from sixfold.common.config import EngineConfig
from sixfold.common.engine import Engine
from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams
from sixfold.server.launch import build, locate

PROMPT = 512
STEPS = 64


def run(engine: Engine, rows: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """(seconds of prefill for all rows, seconds a decode step, seconds of it on the host)."""
    params = SamplingParams(temperature=0, max_tokens=STEPS + 2, ignore_eos=True)
    for row in range(rows):
        prompt = rng.integers(1000, 40000, PROMPT).tolist()
        engine.add(AddRequest(request_id=str(row), prompt_ids=prompt, params=params))
    start, begun = time.perf_counter(), set()
    while len(begun) < rows:
        begun |= {output.request_id for output in engine.step() if output.token_ids}
    prefill = time.perf_counter() - start
    steps, device = [], engine.stats().device_seconds
    for _ in range(STEPS // 2):
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    device = (engine.stats().device_seconds - device) / len(steps)
    while engine.has_work:
        engine.step()
    step = statistics.median(steps)
    return prefill, step, max(0.0, statistics.mean(steps) - device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--platform")
    parser.add_argument("--rows", default="1,8,32")
    asked = parser.parse_args()
    config = EngineConfig(model=asked.model, platform=asked.platform, cache_tokens=65536)
    engine = build(config, locate(asked.model)).engine
    rng = np.random.default_rng(0)
    run(engine, 1, rng)  # warm-up
    for rows in map(int, asked.rows.split(",")):
        prefill, step, host = run(engine, rows, rng)
        rate = (
            f"{rows / step:6.1f} tok/s ({step * 1e3:.1f} ms a step, {host * 1e3:.2f} ms not device)"
        )
        print(f"{rows:3d} rows: prefill {prefill * 1e3 / rows:6.0f} ms a prompt, decode {rate}")
    engine.close()


if __name__ == "__main__":
    main()
