"""What drafts save: tokens per step and tokens per second of one request, with and without, on
texts that repeat and on one that does not. The engines take turns, so that a busy machine is busy
for both.

python ci/bench/drafts.py [MODEL] [--draft ngram] [--draft-tokens 3] [--rounds 5] [--rows 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

from sixfold import LLM
from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams

LIST = "\n".join(f"{n}. The {c} box is on the table in the hall." for n, c in enumerate(
    ("red", "blue", "green", "white", "black", "brown", "grey", "pink"), 1))  # fmt: skip
TEXTS = {
    "copy a list": f"Repeat this list word by word.\n\n{LIST}\n\nThe list again:\n\n1. The red",
    "code": "def area_of_square(a):\n    return a * a\n\n\n"
    "def area_of_circle(r):\n    return 3.14 * r * r\n\n\n"
    "def area_of_triangle(a, h):\n    return a * h / 2\n\n\ndef area_of_",
    "a story": "On a cold morning the old fisherman looked at the grey sea and",
}


@dataclass(frozen=True)
class Run:
    steps: int
    seconds: float
    drafted: int
    accepted: int
    tokens: list[int]


def run(llm: LLM, text: str, count: int, rows: int) -> Run:
    """The prompt is computed first; time and steps are of the tokens behind the first."""
    engine, prompt = llm._engine, llm.tokenizer.encode(text)
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    for row in range(rows):
        engine.add(AddRequest(request_id=str(row), prompt_ids=prompt, params=params))
    made: dict[str, list[int]] = {str(row): [] for row in range(rows)}
    begun, before = 0.0, engine.stats()
    while engine.has_work:
        for output in engine.step():
            made[output.request_id] += output.token_ids
        if not begun and all(made.values()):
            begun, before = time.perf_counter(), engine.stats()
    after = engine.stats()
    return Run(
        after.steps - before.steps,
        time.perf_counter() - begun,
        after.drafted_tokens - before.drafted_tokens,
        after.accepted_drafts - before.accepted_drafts,
        [token for tokens in made.values() for token in tokens],
    )


def compare(
    name: str, engines: dict[str, LLM], text: str, count: int, rounds: int, rows: int
) -> None:
    found: dict[str, list[Run]] = {draft: [] for draft in engines}
    for _ in range(rounds):
        for draft, llm in engines.items():
            found[draft].append(run(llm, text, count, rows))
    answers = {tuple(run.tokens) for runs in found.values() for run in runs}
    rates = {}
    for draft, runs in found.items():
        made = rows * (count - 1)
        rates[draft] = [made / run.seconds for run in runs]
        share = runs[0].accepted / runs[0].drafted if runs[0].drafted else 0.0
        print(
            f"{name:12} {draft:6} {made / rows / runs[0].steps:5.2f} tokens of a row per step, "
            f"{statistics.median(rates[draft]):7.1f} tokens/s "
            f"({min(rates[draft]):.1f} to {max(rates[draft]):.1f}), {share:4.0%} of drafts right"
        )
    plain, drafted = rates.values()
    gain = statistics.median(b / a for a, b in zip(plain, drafted, strict=True))
    same = "equal answers" if len(answers) == 1 else f"{len(answers)} different answers"
    print(f"{name:12} x{gain:.2f} in the median round, {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--draft", default="ngram")
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    common = {"max_context": 1024, "max_rows": max(args.rows, 4), "prefix_cache": False}
    engines = {
        "none": LLM(args.model, **common),
        args.draft: LLM(args.model, draft=args.draft, draft_tokens=args.draft_tokens, **common),
    }
    for name, text in TEXTS.items():
        compare(name, engines, text, args.tokens, args.rounds, args.rows)
    for llm in engines.values():
        llm.close()


if __name__ == "__main__":
    main()
