"""The workloads that every peer gets: chat requests of random words, greedy, streamed over HTTP.

All requests of a workload are sent at once, except for P, which is one request at a time.
"""

from __future__ import annotations

import random

from ...common.errors import ConfigError

WORDS = """
river stone winter market garden bridge letter window morning captain silver forest engine
harbor village thunder candle orchard ribbon valley compass lantern meadow pepper saddle
copper hammer island jacket kettle ladder mirror needle ocean parcel quarry rocket sailor
""".split()

TITLES = {
    "A": "one stream, 512 prompt tokens → 128",
    "B": "8 concurrent of the same",
    "C": "32 concurrent of the same",
    "D": "16 requests sharing 1,024 tokens (+ 64 of their own) → 16, cold",
    "W": "D again, warm",
    "P": "prefill: one request at a time, N prompt tokens → 1",
    "S": "start: launch → first token, and the memory held after the workloads",
}
"""In the order in which they are run; token counts are approximate (a word is about a token)."""

PREFILL_SIZES = (512, 1024, 2048, 4096)
CONCURRENT = {"A": 1, "B": 8, "C": 32}


def parse(letters: str) -> str:
    """The workloads asked for, in the order of TITLES. Raises ConfigError."""
    asked = set(letters.upper())
    if not asked or not asked <= set(TITLES):
        wrong = "".join(sorted(asked - set(TITLES))) or "nothing"
        raise ConfigError(f"--workloads takes letters of {''.join(TITLES)}, got {wrong}.")
    if "W" in asked and "D" not in asked:
        raise ConfigError("--workloads: W repeats the requests of D, so ask for D too.")
    return "".join(letter for letter in TITLES if letter in asked)


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def prompts(workload: str, seed: int) -> list[str]:
    """Equal for every peer in a round; a new seed gives prompts that no cache has seen."""
    rng = random.Random(f"{seed}/{'D' if workload == 'W' else workload}")
    ask = "Write a long story that uses these words: "
    if workload in CONCURRENT:
        return [ask + words(rng, 465) for _ in range(CONCURRENT[workload])]
    if workload == "P":
        # No common beginning: what one size computed must not help the next. The chat template
        # adds about as many tokens as in A.
        return [words(rng, size - 38) for size in PREFILL_SIZES]
    shared = ask + words(rng, 992)
    return [f"{shared} {words(rng, 60)}" for _ in range(16)]


def output_limit(workload: str) -> int:
    if workload == "P":
        return 1
    return 128 if workload in CONCURRENT else 16
