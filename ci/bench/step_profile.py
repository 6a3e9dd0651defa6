"""Where the time of a step goes, by op: every instruction of the recorded step timed alone, beside
the whole step run as the engine runs it.

    python ci/bench/step_profile.py [--model M] [--rows 1] [--new 1] [--context 512] [--runs 6]

`--rows` sequences with `--new` tokens each after `--context` tokens. `--runs` times the whole step
that many times, for machines that are noisy, and prints the range of its host part. The parts add
up to more than the step, because timing an instruction alone costs a call and a wake-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import numpy as np
import torch

from sixfold.common.checkpoint.source import resolve_model
from sixfold.platforms.cpu.native_library import Instruction, Team
from sixfold.platforms.cpu.step_recorder import RecordedRunner
from sixfold.platforms.interface import EngineSpec
from sixfold.platforms.interface_step import StepBatch, Want
from sixfold.platforms.machine import observe
from sixfold.platforms.sampling_rows import no_sampling
from sixfold.platforms.select import platforms
from sixfold.platforms.torch_runtime.executor import TorchExecutor
from sixfold.platforms.torch_runtime.model_runner import ModelRunner

NAMES = (
    "EMBED RMS_NORM ANGLES ROPE GATE LINEAR QUANTISE KV_WRITE ATTENTION MERGE "
    "ROUTE SORT_ROWS EXPERTS_UP EXPERTS_DOWN COMBINE"
).split()
REPEATS = 15


def batch(executor: TorchExecutor, rows: int, new: int, context: int) -> StepBatch:
    """Rows on pages of their own; what the cache holds does not matter for time."""
    tables = {}
    for name, pool in executor.pools.items():
        pages = -(-(context + new) // pool.group.page_size)
        pool.data.zero_()
        order = 1 + np.random.default_rng(0).permutation(rows * pages).astype(np.int32)
        tables[name] = order.reshape(rows, pages)
    return StepBatch(
        step=0,
        row_ids=np.arange(rows, dtype=np.int32),
        token_ids=np.random.default_rng(1).integers(0, 1000, rows * new).astype(np.int32),
        query_start=np.arange(rows + 1, dtype=np.int32) * new,
        context_lens=np.full(rows, context, np.int32),
        page_tables=tables,
        want=np.full(rows, int(Want.SAMPLE), np.uint8),
        sampling=no_sampling(rows),
    )


def median(call: object, repeats: int = REPEATS) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _whole(runner: ModelRunner, team: Team, work: StepBatch) -> tuple[float, float]:
    """Medians over steps: seconds of one, and of it outside the native kernels."""
    native = 0.0

    def timed(*arguments: object) -> None:
        nonlocal native
        start = time.perf_counter()
        run(*arguments)  # type: ignore[arg-type]
        native += time.perf_counter() - start

    run, team.run = team.run, timed  # type: ignore[method-assign]
    steps = []
    for _ in range(4 * REPEATS):
        native, start = 0.0, time.perf_counter()
        runner.run(work)
        steps.append((time.perf_counter() - start, native))
    team.run = run  # type: ignore[method-assign]
    return statistics.median(s for s, _ in steps), statistics.median(s - n for s, n in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--new", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--quantize")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=int, default=1)
    asked = parser.parse_args()
    platform = platforms()["cpu"]
    facts = platform.probe(observe()).devices[0]
    tokens = asked.rows * (asked.new + asked.context + 32)
    spec = EngineSpec(
        str(resolve_model(asked.model)),
        quantize=asked.quantize,
        threads=asked.threads,
        max_rows=max(64, asked.rows),
        max_step_tokens=max(2048, asked.rows * asked.new),
        cache_tokens=tokens + 64,
        max_context=min(2048, tokens + 64),
    )
    executor = platform.executor(spec, facts)
    if not isinstance(executor, TorchExecutor):
        raise SystemExit("the cpu platform has another executor now")
    info = executor.load()
    runner = executor._runner
    captured = None if runner is None else runner._step
    if runner is None or not isinstance(captured, RecordedRunner):
        raise SystemExit("this model's step is not recorded")
    step = captured.recorded
    work = batch(executor, asked.rows, asked.new, asked.context)
    with torch.inference_mode():
        runs = [_whole(runner, step._team, work) for _ in range(asked.runs)]
        whole, outside = (statistics.median(column) for column in zip(*runs, strict=True))
        captured.program.bind(captured.program.plan(work))
        count = len(work.token_ids)
        ids = torch.from_numpy(work.token_ids.astype(np.int64))
        positions = torch.arange(count) % asked.new + asked.context
        recorded = median(lambda: step(ids, positions))
        by_op: dict[str, list[float]] = defaultdict(list)
        for each in step._instructions:
            one = (Instruction * 1)(each)
            one[0].chain = one[0].ahead = 0
            by_op[NAMES[each.op]].append(median(lambda one=one: step._team.run(one, 1, count), 5))  # type: ignore[misc]
        hidden = step(ids, positions)[:: asked.new]
        head = median(lambda: runner._model.logits(hidden))
    decided = {d.what: d.chosen for d in info.decisions}
    print(f"{decided['weights']}, {decided['native kernels']}, {decided['threads']} threads")
    print(f"whole step {1e3 * whole:9.3f} ms   ({asked.rows} rows x {asked.new} tokens)")
    print(f"recorded   {1e3 * recorded:9.3f} ms   {100 * recorded / whole:5.1f} %")
    print(f"head       {1e3 * head:9.3f} ms   {100 * head / whole:5.1f} %")
    print(f"host       {1e3 * outside:9.3f} ms   {100 * outside / whole:5.1f} %  (not native code)")
    if asked.runs > 1:
        parts = sorted(100 * host / all_of_it for all_of_it, host in runs)
        middle = statistics.median(parts)
        print(f"  in {asked.runs} runs: {parts[0]:.1f} to {parts[-1]:.1f} %, median {middle:.1f} %")
    for name, times in sorted(by_op.items(), key=lambda item: -sum(item[1])):
        print(f"  {name:10s} x {len(times):4d} {1e3 * sum(times):9.3f} ms alone")
    executor.close()


if __name__ == "__main__":
    main()
