"""Contract: DeepSeek-V4 computes transformers' logits from one published directory that both read,
whatever the pages' size and the pieces of a prompt; each wiring mistake would show.

Oracle: tiny random weights, float32, 75 tokens: over nine windows, four dense entries, and more
entries than the indexer selects.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernel_checks import generic_table
from support.plain_step import logits
from support.tiny_deepseek_v4 import CONFIG, expected_logits, oracle, prompt, tensors, write

from sixfold.common.checkpoint.checkpoint import open_checkpoint
from sixfold.common.errors import CheckpointError
from sixfold.models.deepseek_v4 import DeepseekV4Model
from sixfold.models.loading import build_model, kernel_problems, load_weights
from sixfold.platforms.interface_kernels import KernelTable
from sixfold.platforms.interface_kv import KVKind
from sixfold.platforms.torch_runtime import interleaved_rope
from sixfold.platforms.torch_runtime.kernels import GENERIC

TOKENS = prompt(75)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deepseek_v4"), tensors())


@pytest.fixture(scope="module")
def expected(path: Path) -> torch.Tensor:
    found = expected_logits(oracle(path), TOKENS)
    assert found.std() > 1  # a flat model would prove nothing
    return found


def load(path: Path, table: KernelTable | None = None, dtype: torch.dtype = torch.float32) -> Any:
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, table or generic_table(), dtype)
    load_weights(model, checkpoint, lambda tensor: tensor)
    return model


CHUNKS = [[75], [30, 1, 1, 1, 10, 32], [3, 5, 7, 11, 13, 17, 19]]


@pytest.mark.parametrize("page_size", [1, 6, 16, 128])
@pytest.mark.parametrize("chunks", CHUNKS, ids=len)
def test_logits_equal_transformers(path, expected, page_size: int, chunks: list[int]) -> None:
    found = logits(load(path), TOKENS, chunks, page_size)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_one_token_at_a_time(path: Path, expected: torch.Tensor) -> None:
    found = logits(load(path), TOKENS[:40], [1] * 40)
    torch.testing.assert_close(found, expected[:40], atol=2e-4, rtol=1e-4)


def test_published_rates_over_two_dense_entries(tmp_path: Path) -> None:
    """128 tokens an entry and in the window, as released; more than 256 tokens."""
    changes = {"num_hidden_layers": 3, "compress_ratios": [128, 4, 128, 0], "num_hash_layers": 2}
    sizes = {"sliding_window": 128, "index_topk": 16}
    config = {k: v for k, v in CONFIG.items() if k != "compress_rate_hca"} | changes | sizes
    path, token_ids = write(tmp_path, tensors(config), config), prompt(300)
    wanted = expected_logits(oracle(path), token_ids)
    for page_size, chunks in ((128, [300]), (16, [140, 100, 60])):
        found = logits(load(path), token_ids, chunks, page_size)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32(path: Path, expected: torch.Tensor) -> None:
    model = load(path, dtype=torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {name.split(".")[-1] for name in kept} >= {"fn", "ape", "attn_sink", "scores", "bias"}
    found = logits(model, TOKENS, dtype=torch.bfloat16)
    assert (found - expected).abs().mean() < 0.15 * expected.std()


def _frequencies_of_windows_everywhere(model: DeepseekV4Model) -> None:
    model.entry_rope = model.window_rope


def _frequencies_of_entries_everywhere(model: DeepseekV4Model) -> None:
    model.window_rope = model.entry_rope


def _shared_expert_unclamped(model: DeepseekV4Model) -> None:
    for block in model.layers:
        block.ffn.shared_experts.limit = 1e30


def _experts_unclamped(model: DeepseekV4Model) -> None:
    for block in model.layers:
        block.ffn.limit = 1e30


def _every_layer_routed_by_scores(model: DeepseekV4Model) -> None:
    gate = model.layers[0].ffn.gate
    gate.tid2eid, gate.bias = None, model.layers[1].ffn.gate.bias


def _bias_left_out(model: DeepseekV4Model) -> None:
    for block in model.layers:
        block.ffn.gate.bias = None


def _all_entries_instead_of_the_selected(model: DeepseekV4Model) -> None:
    for block in model.layers:
        if block.attn.indexer is not None:
            block.attn.indexer.args = _Wide(block.attn.indexer.args)


class _Wide:
    """Arguments that select more entries than there are."""

    def __init__(self, args: Any) -> None:
        self._args = args

    index_top_k = 1000

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)


MISWIRED = [
    _frequencies_of_windows_everywhere,
    _frequencies_of_entries_everywhere,
    _shared_expert_unclamped,
    _experts_unclamped,
    _every_layer_routed_by_scores,
    _bias_left_out,
    _all_entries_instead_of_the_selected,
]


@pytest.mark.parametrize("miswire", MISWIRED, ids=lambda f: f.__name__)
def test_a_wiring_mistake_shows(path, expected, miswire: Callable[..., None]) -> None:
    model = load(path)
    miswire(model)
    assert (logits(model, TOKENS) - expected).abs().max() > 0.02


def test_one_frequency_base_is_invisible_within_the_window(path: Path) -> None:
    """Why the test above needs its 75 tokens: the layers without entries see eight."""
    token_ids = prompt(4)
    right, wrong = load(path), load(path)
    wrong.entry_rope = wrong.window_rope
    assert (logits(right, token_ids) - logits(wrong, token_ids)).abs().max() < 0.5


def test_results_that_are_not_turned_back_show(path: Path, expected: torch.Tensor) -> None:
    def not_turned_back(x, cos, sin, weight):
        return interleaved_rope.grouped_linear(x.flatten(1), weight)

    table = generic_table()
    kernel = table.kernels["inverse_rope_grouped_linear"]
    broken = {**table.kernels, kernel.op: type(kernel)(kernel.op, "test", None, not_turned_back)}
    model = load(path, KernelTable(broken, ()))
    assert (logits(model, TOKENS) - expected).abs().max() > 0.02


def test_problems_name_exactly_the_ops_called(path: Path) -> None:
    called: set[str] = set()

    class Recorder:
        kernels = generic_table().kernels

        def __getattr__(self, op: str) -> Any:
            called.add(op)
            return GENERIC[op]

    logits(load(path, Recorder()), prompt(5))
    problems = kernel_problems(open_checkpoint(path), "bfloat16")
    assert {p.op for p in problems} == called
    assert {p.dtype for p in problems} == {"bfloat16"}


def test_sites_follow_the_kinds_of_layers(path: Path) -> None:
    model = build_model(open_checkpoint(path), generic_table(), torch.float32)
    window, state, entries = KVKind.WINDOW, KVKind.RECURRENT, KVKind.COMPRESSED
    sparse, dense = [window, state, entries, entries], [window, state, entries]
    needs = model.cache_needs()
    assert [n.kind for n in needs] == [window, window, *sparse, *dense, *sparse]
    assert [n.ratio for n in needs if n.kind is entries] == [4, 4, 16, 4, 4]
    assert [s.shape for s in needs[3].states] == [(8, 128), (8, 64)]
    assert set(model.attention_specs()) == {None}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compress_ratios", [0, 0, 4]),
        ("compress_ratios", [0, 0, 4, 8, 4]),
        ("scoring_func", "sigmoid"),
        ("n_group", 4),
        ("num_key_value_heads", 2),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("tie_word_embeddings", True),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = write(tmp_path, {}, {**CONFIG, field: value})
    with pytest.raises(CheckpointError, match=field):
        build_model(open_checkpoint(path), generic_table(), torch.float32)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    stored = tensors()
    del stored["layers.2.attn.indexer.compressor.ape"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn\.indexer\.compressor\.ape"):
        load(write(tmp_path, stored))
