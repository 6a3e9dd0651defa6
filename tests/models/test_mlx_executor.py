"""Guards the traps of MLX: streams that belong to threads, lazy graphs that keep old arrays alive,
pools that are copied instead of written, padding that leaks into real rows. And what a user may set
is honoured or refused."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from mlx_lm.utils import load_model
from support.run_mlx import GREEDY, complete, finish, mlx_executor, running
from support.tiny_mlx import VOCAB, own_greedy, own_sampled, write

from sixfold.common.errors import CheckpointError, ConfigError, KernelError, OutOfMemory
from sixfold.common.messages import AddRequest
from sixfold.common.sampling import SamplingParams
from sixfold.platforms.interface_kv import KVKind
from sixfold.platforms.mlx.memory import working_set


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mlx") / "llama", "llama")


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


# ---- threads


def test_loading_and_steps_may_be_asked_from_different_threads(llama: Path) -> None:
    executor = mlx_executor(llama)
    loaded: list[Any] = []
    thread = threading.Thread(target=lambda: loaded.append(executor.load()))
    thread.start()
    thread.join()
    from sixfold.common.config import EngineConfig
    from sixfold.common.engine import Engine

    try:
        engine = Engine(executor, loaded[0], EngineConfig(max_rows=8), frozenset())
        assert complete(engine, [prompt(5)]) == own_greedy(llama, [prompt(5)], 12)
    finally:
        executor.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("sixfold-device")]


def test_the_trap_is_real(llama: Path) -> None:
    """A lazy array of one thread cannot be evaluated by another: why the executor has a worker."""
    lazy: list[Any] = []
    thread = threading.Thread(target=lambda: lazy.append(mx.ones((2, 2)) @ mx.ones((2, 2))))
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match=r"[Ss]tream"):
        mx.eval(lazy[0])


def test_closing_with_a_step_in_flight_ends(llama: Path) -> None:
    with running(llama) as (engine, _):
        engine.add(AddRequest(request_id="a", prompt_ids=prompt(40), params=GREEDY))
        engine._submit()
    assert engine.stats() is not None


# ---- memory


def test_memory_does_not_grow_with_steps_and_pools_are_written_in_place(llama: Path) -> None:
    fields = {"max_context": 250, "cache_tokens": 400_000, "max_rows": 4}
    with running(llama, **fields) as (engine, info):
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        complete(engine, [prompt(20, i) for i in range(4)], params)
        mx.clear_cache()
        settled = mx.get_active_memory()
        mx.reset_peak_memory()
        long = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        complete(engine, [prompt(20, 10 + i) for i in range(4)], long)
        mx.clear_cache()
        assert mx.get_active_memory() < settled + 2_000_000, "old arrays stay alive"
        assert info.cache_bytes > 100_000_000
        # One layer's keys are a quarter of the cache: a copy of them alone would show.
        assert mx.get_peak_memory() < settled + info.cache_bytes // 8, "a pool was copied"


def test_steps_of_several_pieces_write_in_place(llama: Path) -> None:
    """Long prompts run alone, beside rows that decode: each piece writes to pools that the one
    before has read."""
    fields = {"max_context": 250, "cache_tokens": 400_000, "max_rows": 4}
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    asked = [prompt(length, length) for length in (9, 140, 150, 12)]
    with running(llama, page_size=16, **fields) as (engine, info):
        expected = [complete(engine, [one], params)[0] for one in asked]
        mx.clear_cache()
        settled = mx.get_active_memory()
        mx.reset_peak_memory()
        asked_anew = [[t, *one] for t, one in enumerate(asked)]  # no prefix of these is cached
        complete(engine, asked_anew, params)
        assert mx.get_peak_memory() < settled + info.cache_bytes // 8, "a pool was copied"
        assert complete(engine, asked, params) == expected


def test_snapshots_of_states_hold_no_old_arrays(tmp_path: Path) -> None:
    """Copies between slots are arrays of their own: a lazy one would keep the pool of its step."""
    wide = {f"linear_{kind}_head_dim": 64 for kind in ("key", "value")}
    wide |= {"linear_num_value_heads": 16, "linear_num_key_heads": 4}
    path = write(tmp_path / "hybrid", "qwen3_5", **wide)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    base = prompt(24)
    with running(path, page_size=8, max_rows=32) as (engine, info):
        complete(engine, [base], params)
        mx.clear_cache()
        settled = mx.get_active_memory()
        mx.reset_peak_memory()
        for turn in range(12):
            complete(engine, [base[: 8 * (1 + turn % 3)] + prompt(9, 50 + turn)], params)
        assert engine.stats().cached_tokens > 100, "no state was restored"
        mx.clear_cache()
        assert mx.get_active_memory() < settled + 1_000_000, "old states stay alive"
        (states,) = [g for g in info.groups if g.kind is KVKind.RECURRENT]
        pool = states.bytes_per_page * states.pages // 3  # of one of its layers
        assert pool > 20_000_000
        assert mx.get_peak_memory() < settled + pool // 2, "a pool of states was copied"


def test_weights_that_do_not_fit_are_refused_with_numbers(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "sixfold.platforms.mlx.executor.working_set"
    monkeypatch.setattr(module, lambda: (1000, "the working set of a test"))
    executor = mlx_executor(llama)
    try:
        with pytest.raises(OutOfMemory, match=r"GiB \(the working set of a test\).*--quantize"):
            executor.load()
    finally:
        executor.close()
    assert working_set()[0] > 0


# ---- padding


def test_padding_never_reaches_a_row(llama: Path) -> None:
    """Rows of unlike lengths in one step: the draw of each is the one it has alone, and a row whose
    numbers are all NaN harms no other."""
    params = [
        SamplingParams(max_tokens=8, temperature=0.9, seed=i, ignore_eos=True) for i in range(4)
    ]
    asked = [prompt(n, n) for n in (1, 5, 6, 9)]
    with running(llama, page_size=4) as (engine, _):
        together = complete(engine, asked, params)
        alone = [complete(engine, [a], [p])[0] for a, p in zip(asked, params, strict=True)]
    assert together == alone


def test_nan_of_one_row_stays_there(tmp_path: Path) -> None:
    """A row whose embedding is NaN gets no token and leaves NaN in its pages; rows beside it and
    after it, on the same pages, do not see them."""
    path = write(tmp_path / "poisoned", "llama", tie_word_embeddings=False)
    weights = mx.load(str(path / "model.safetensors"))
    table = np.array(weights["model.embed_tokens.weight"])
    table[VOCAB - 1] = np.nan
    weights["model.embed_tokens.weight"] = mx.array(table)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    clean = [t % (VOCAB - 1) for t in prompt(7)]
    with running(path, cache_tokens=64, max_context=48) as (engine, _):
        expected = complete(engine, [clean, clean[:3]])
        bad = AddRequest(request_id="bad", prompt_ids=[VOCAB - 1] * 33, params=GREEDY)
        for _ in range(3):  # so that every page has held NaN
            engine.add(bad)
            while engine.has_work:
                engine.step()
        assert complete(engine, [clean, clean[:3]]) == expected
        engine.add(bad)
        for i, asked in enumerate([clean, clean[:3]]):
            engine.add(AddRequest(request_id=str(i), prompt_ids=asked, params=GREEDY))
        outputs: dict[str, list[int]] = {"0": [], "1": [], "bad": []}
        while engine.has_work:
            for output in engine.step():
                outputs[output.request_id] += output.token_ids
        assert [outputs["0"], outputs["1"]] == expected


# ---- what the scheduler offers


ASKED = [
    SamplingParams(max_tokens=6, temperature=0.0),
    SamplingParams(max_tokens=6, temperature=1.5, seed=3),
    SamplingParams(max_tokens=6, temperature=2.0, seed=4, top_k=5, top_p=0.9, min_p=0.01),
    SamplingParams(max_tokens=6, temperature=0.0, repetition_penalty=1.9),
    SamplingParams(max_tokens=6, temperature=0.0, logit_bias={7: 100.0}),
    SamplingParams(max_tokens=6, temperature=2.0, seed=5, frequency_penalty=2.0),
    SamplingParams(max_tokens=6, temperature=2.0, seed=6, presence_penalty=2.0, top_p=0.7),
]


def test_every_way_of_sampling_is_the_contracts(llama: Path) -> None:
    asked = [prompt(9, i) for i in range(len(ASKED))]
    expected = [own_sampled(llama, p, s, 6) for p, s in zip(asked, ASKED, strict=True)]
    with running(llama) as (engine, info):
        said = {name: support.status.value for name, support in info.features.items()}
        assert (said.pop("images"), said.pop("drafts")) == ("unsupported", "unsupported")
        assert set(said.values()) == {"supported"}
        params = [msgspec.structs.replace(s, ignore_eos=True) for s in ASKED]
        assert complete(engine, asked, params) == expected
    assert expected[4] == [7] * 6


def test_log_probabilities_of_prompt_and_output(llama: Path) -> None:
    asked = prompt(9)
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3, prompt_logprobs=2)
    with running(llama, max_step_tokens=8) as (engine, _):
        engine.add(AddRequest(request_id="a", prompt_ids=asked, params=params))
        outputs = finish(engine)["a"]
    model, _ = load_model(llama)
    text = asked + [t for o in outputs for t in o.token_ids]
    logits = np.array(model(mx.array([text]))[0]).astype(np.float64)
    values = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    values -= logits.max(-1, keepdims=True)
    scored = outputs[0].prompt_logprobs
    assert scored is not None
    assert scored[0] is None
    entries = [*scored[1:], *(e for o in outputs for e in o.logprobs or [])]
    assert len(entries) == 8 + 4
    for position, entry in enumerate(entries):
        assert entry is not None
        assert entry.token_id == text[position + 1]
        np.testing.assert_allclose(entry.logprob, values[position, entry.token_id], atol=1e-4)
        count = 2 if position < 8 else 3
        best = np.argsort(-values[position])[:count]
        assert entry.top_ids == best.tolist()
        np.testing.assert_allclose(entry.top_logprobs, values[position, best], atol=1e-4)


def test_a_preempted_request_goes_on_as_it_would_have(llama: Path) -> None:
    asked = [prompt(12, i) for i in range(4)]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    expected = own_greedy(llama, asked, 20)
    with running(llama, cache_tokens=60, max_context=40) as (engine, _):
        assert complete(engine, asked, params) == expected
        assert engine.stats().preemptions > 0


# ---- settings


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_is_honoured(llama: Path, dtype: str) -> None:
    with running(llama, dtype=dtype) as (engine, info):
        assert info.dtype == dtype
        assert ("keys and values", dtype) in [(d.what, d.chosen) for d in info.decisions]
        assert len(complete(engine, [prompt(6), prompt(3)])[0]) == 12


def test_keys_and_values_in_another_dtype(llama: Path) -> None:
    with running(llama, kv_dtype="float16") as (engine, info):
        narrow = info.cache_bytes
        assert len(complete(engine, [prompt(6), prompt(3)])[0]) == 12
    with running(llama) as (_, info):
        assert info.cache_bytes == 2 * narrow
    with pytest.raises(ConfigError, match="verifies no drafts"):
        mlx_executor(llama, draft="ngram").load()
    with pytest.raises(ConfigError, match="int8"), running(llama, kv_dtype="int8"):
        pass


@pytest.mark.parametrize(("quantize", "bits"), [("int8", "8 bits"), ("int4", "4 bits")])
def test_quantize_on_load(tmp_path: Path, quantize: str, bits: str) -> None:
    path = write(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=128)
    with running(path) as (_, info):
        whole = info.weight_bytes
    with running(path, quantize=quantize) as (engine, info):
        assert [d.chosen for d in info.decisions if d.what == "weights"] == [
            f"{bits}, groups of 64"
        ]
        assert info.weight_bytes < whole / 2
        assert len(complete(engine, [prompt(6), prompt(3)])[1]) == 12


def test_impossible_settings_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="sample"), running(llama, kernels={"sample": "metal"}):
        pass
    odd = tmp_path / "odd"
    odd.mkdir()
    text = (llama / "config.json").read_text().replace('"llama"', '"no_such_type"')
    (odd / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="no_such_type"), running(odd):
        pass


def test_a_process_that_loaded_and_closed_ends_well(llama: Path) -> None:
    """A stream's thread that outlived the worker aborted about every second process at its exit."""
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from support.run_mlx import mlx_executor\n"
        "executor = mlx_executor(sys.argv[1]); executor.load(); executor.close()\n"
    )
    for _ in range(4):
        command = [sys.executable, "-c", script, str(llama), *sys.path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
