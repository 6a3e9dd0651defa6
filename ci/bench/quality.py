"""What a scheme costs in quality and gives in speed: perplexity, divergence and greedy agreement
against float32 on real English text, with decode and prefill speed of the same process.

    python ci/bench/quality.py [--model MODEL] [--schemes none,int8,int4,stored] [--windows 8]

The text is CPython's own language reference (pydoc_data.topics), cut into windows of 512 tokens.
KL is over float32's 20 likeliest tokens and all others as one, so a lower bound. "none" of a
quantised checkpoint is its dequantised form: int8 and int4 of it show what a second rounding costs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sixfold import LLM, SamplingParams

WINDOW = 512
TOP = 20
GREEDY = 64


@dataclass(frozen=True, slots=True)
class Measured:
    losses: list[float]  # nat per token
    tops: list[dict[int, float]]  # log-probabilities of the likeliest tokens per position
    greedy: list[list[int]]
    decode_tokens_per_s: float
    prefill_ms: float


def text() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def measure(model: str, scheme: str, windows: int, threads: int | None) -> Measured:
    options = {} if scheme == "stored" else {"quantize": scheme}
    with LLM(model, prefix_cache=False, threads=threads, **options) as llm:
        ids = llm.tokenizer.encode(text())[: WINDOW * windows]
        prompts = [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
        ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP, ignore_eos=True)
        losses, tops = [], []
        for prompt in prompts:
            (done,) = llm.generate([prompt], ask, progress=False)
            for token in (done.prompt_logprobs or [])[1:]:
                if token is not None:
                    losses.append(-token.logprob)
                    tops.append(dict(zip(token.top_ids, token.top_logprobs, strict=True)))
        follow = SamplingParams(temperature=0, max_tokens=GREEDY, ignore_eos=True)
        greedy, decode, prefill = [], [], []
        one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        for prompt in prompts:
            start = time.perf_counter()
            llm.generate([prompt], one, progress=False)
            first = time.perf_counter() - start
            (done,) = llm.generate([prompt], follow, progress=False)
            whole = time.perf_counter() - start - first
            greedy.append(done.token_ids)
            prefill.append(1000 * first)
            decode.append((GREEDY - 1) / max(1e-9, whole - first))
        return Measured(losses, tops, greedy, statistics.median(decode), statistics.median(prefill))


def divergence(exact: dict[int, float], other: dict[int, float]) -> float:
    """KL over the tokens that both list, all others taken together; nat."""
    shared = exact.keys() & other.keys()
    p = np.exp([exact[token] for token in shared])
    q = np.exp([other[token] for token in shared])
    rest_p, rest_q = max(1e-9, 1 - p.sum()), max(1e-9, 1 - q.sum())
    return float((p * np.log(p / q)).sum() + rest_p * math.log(rest_p / rest_q))


def agreement(exact: list[list[int]], other: list[list[int]]) -> float:
    """Mean length of the common beginning of both continuations, in tokens."""
    lengths = []
    for a, b in zip(exact, other, strict=True):
        same = [x == y for x, y in zip(a, b, strict=True)]
        lengths.append(same.index(False) if False in same else len(same))
    return statistics.mean(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--schemes", default="none,int8,int4,stored")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = {
        scheme: measure(asked.model, scheme, asked.windows, asked.threads)
        for scheme in asked.schemes.split(",")
    }
    exact = next(iter(found.values()))
    base = math.exp(statistics.mean(exact.losses))
    rows = []
    for scheme, m in found.items():
        perplexity = math.exp(statistics.mean(m.losses))
        rows.append({
            "scheme": scheme, "tokens": len(m.losses), "perplexity": round(perplexity, 4),
            "change_percent": round(100 * (perplexity / base - 1), 3),
            "kl_nat": round(statistics.mean(map(divergence, exact.tops, m.tops)), 5),
            "greedy_same_of_64": round(agreement(exact.greedy, m.greedy), 1),
            "decode_tokens_per_s": round(m.decode_tokens_per_s, 1),
            "prefill_512_ms": round(m.prefill_ms, 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
