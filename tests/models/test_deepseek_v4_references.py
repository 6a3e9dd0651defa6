"""Guards the meaning of DeepSeek-V4's ops: the numpy references equal transformers' own modules on
the cases of their contracts, or on rows of their own where a module holds its projections."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_deepseek_v4 import CONFIG
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek

from sixfold.common.ops import OPS
from sixfold.common.ops.compressed_pages import entry_slots
from sixfold.platforms.interface_kernels import Case


def cases(op: str) -> list[Case]:
    """Without the empty ones, which transformers does not reshape."""
    every = OPS[op].cases(np.random.default_rng(3))
    return [case for case in every if case.name != "no_tokens"]


def config() -> Any:
    return DeepseekV4Config(**{k: v for k, v in CONFIG.items() if k != "architectures"})


def fill(module: torch.nn.Module, **values: Any) -> None:
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(torch.as_tensor(value))


def equal(found: Any, expected: Any, atol: float = 2e-5) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else found
    np.testing.assert_allclose(found, expected, atol=atol, rtol=2e-5)


def _sizes(a: dict[str, Any]) -> Any:
    _, streams, width = a["streams"].shape
    steps = a.get("iterations", 1)
    numbers = {"hc_eps": a["eps"], "rms_norm_eps": a["norm_eps"], "hc_sinkhorn_iters": steps}
    return SimpleNamespace(hc_mult=streams, hidden_size=width, **numbers)


@pytest.mark.parametrize("case", cases("mhc_pre"), ids=lambda c: c.name)
def test_mixing(case: Case) -> None:
    a = dict(case.args)
    module = deepseek.DeepseekV4HyperConnection(_sizes(a))
    fill(module, fn=a["fn"], base=a["base"], scale=a["scale"])
    post, mixing, x = module(torch.from_numpy(a["streams"])[None])
    found = OPS["mhc_pre"].reference(**a)
    atol = 2e-5 * max(1.0, float(np.abs(a["streams"]).max(initial=0)))
    for ours, theirs in zip(found, (x, post, mixing), strict=True):
        equal(theirs[0], ours, atol)


@pytest.mark.parametrize("case", cases("mhc_head"), ids=lambda c: c.name)
def test_collapse(case: Case) -> None:
    a = dict(case.args)
    module = deepseek.DeepseekV4HyperHead(_sizes(a))
    fill(module, hc_fn=a["fn"], hc_base=a["base"], hc_scale=a["scale"])
    made = module(torch.from_numpy(a["streams"])[None])[0]
    equal(made, OPS["mhc_head"].reference(**a))


@pytest.mark.parametrize("case", cases("mhc_post_pre"), ids=lambda c: c.name)
def test_write_back_joined_to_the_next_mixing(case: Case) -> None:
    """Streams by the decoder layer's own expression, then the next module and norm."""
    a = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in case.args.items()}
    streams = a["post"][..., None] * a["made"][:, None] + a["mixing"].mT @ a["streams"]
    module = deepseek.DeepseekV4HyperConnection(_sizes(a))
    fill(module, fn=a["fn"], base=a["base"], scale=a["scale"])
    norm = deepseek.DeepseekV4RMSNorm(streams.shape[-1], a["norm_eps"])
    fill(norm, weight=a["norm_weight"])
    post, mixing, x = module(streams[None])
    expected = (streams, norm(x)[0], post[0], mixing[0])
    for ours, theirs in zip(OPS["mhc_post_pre"].reference(**case.args), expected, strict=True):
        equal(theirs, ours, 5e-5)


@pytest.mark.parametrize("case", cases("interleaved_rope"), ids=lambda c: c.name)
def test_rotation(case: Case) -> None:
    a = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in case.args.items()}
    sin = -a["sin"] if a["inverse"] else a["sin"]
    made = deepseek.apply_rotary_pos_emb(a["x"], a["cos"], sin)
    equal(made, OPS["interleaved_rope"].reference(**case.args))


@pytest.mark.parametrize("case", cases("grouped_linear"), ids=lambda c: c.name)
def test_grouped_product(case: Case) -> None:
    x, weight = (torch.from_numpy(case.args[name]) for name in ("x", "weight"))
    groups, outputs, inputs = weight.shape
    module = deepseek.DeepseekV4GroupedLinear(inputs, groups * outputs, groups)
    fill(module, weight=weight.flatten(0, 1))
    made = module(x.view(len(x), groups, inputs)).flatten(1)
    equal(made, OPS["grouped_linear"].reference(**case.args))


class _Rows:
    """One row of tokens in pages, compressed in pieces by the reference."""

    page_size = 6

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.table = np.arange(1, -(-tokens // self.page_size) + 1, dtype=np.int32)[None]
        generator = torch.Generator().manual_seed(4)
        self.x = torch.randn(tokens, CONFIG["hidden_size"], generator=generator)

    def compress(self, module: Any, ratio: int, dim: int, pieces: list[int]) -> np.ndarray:
        """(entries, dim) by the op, with the module's parameters."""
        parts = module.position_bias.shape[1] // dim
        kv, gate = (p.weight for p in (module.kv_proj, module.gate_proj))
        projected = (self.x @ torch.cat((kv, gate)).T).detach().numpy()
        cache = np.full((100, dim), np.nan, np.float32)
        state = np.full((2, parts * ratio, projected.shape[1]), np.nan, np.float32)
        done = 0
        for count in pieces:
            where = np.arange(done, done + count)
            at = torch.from_numpy(where // ratio * ratio)[None]
            cos, sin = module.rotary_emb(self.x, at, "compress")
            state, cache = OPS["compress_norm_rope_store"].reference(
                projected=projected[where],
                state=state,
                slots=np.array([1], np.int32),
                ape=module.position_bias.detach().numpy(),
                weight=module.kv_norm.weight.detach().numpy(),
                eps=1e-6,
                cos=cos[0].numpy(),
                sin=sin[0].numpy(),
                cache=cache,
                page_table=self.table,
                query_start=np.array([0, count], np.int32),
                context_lens=np.array([done], np.int32),
                page_size=self.page_size,
            )
            done += count
        entries = np.arange(done // ratio)
        return cache[entry_slots(self.table[0], entries, ratio, self.page_size)]


def _randomised(module: torch.nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return module


@pytest.mark.parametrize("pieces", [[40], [3, 37], [1] * 40, [7, 9, 17, 7]], ids=len)
def test_dense_compressor(pieces: list[int]) -> None:
    module = _randomised(deepseek.DeepseekV4HCACompressor(config()), 1)
    rows = _Rows(40)
    expected, _ = module(rows.x[None], None, torch.arange(40)[None], None, 0)
    equal(expected[0, 0], rows.compress(module, 16, CONFIG["head_dim"], pieces))


@pytest.mark.parametrize("first", range(1, 12))
def test_sparse_compressor_cut_anywhere(first: int) -> None:
    """Every cut of three windows in two."""
    module = _randomised(deepseek.DeepseekV4CSACompressor(config()), 2)
    rows = _Rows(12)
    low = torch.zeros(1, 12, CONFIG["q_lora_rank"])
    expected, _ = module(rows.x[None], low, torch.arange(12)[None], None, 0)
    equal(expected[0, 0], rows.compress(module, 4, CONFIG["head_dim"], [first, 12 - first]))


def test_indexer_selects_the_same_entries() -> None:
    module = _randomised(deepseek.DeepseekV4Indexer(config()), 3)
    rows, positions = _Rows(60), torch.arange(60)[None]
    low = torch.randn(60, CONFIG["q_lora_rank"], generator=torch.Generator().manual_seed(5))
    expected = module(rows.x[None], low[None], positions, None, 0)[0]
    heads, dim = CONFIG["index_n_heads"], CONFIG["index_head_dim"]
    angles = module.rotary_emb(rows.x, positions, "compress")
    q = module.q_b_proj(low).view(60, heads, dim)
    q = deepseek.apply_rotary_pos_emb(q, angles[0][0], angles[1][0])
    keys = rows.compress(module, 4, dim, [60])
    cache = np.full((100, dim), np.nan, np.float32)
    cache[entry_slots(rows.table[0], np.arange(len(keys)), 4, rows.page_size)] = keys
    found = OPS["index_topk"].reference(
        q=q.detach().numpy(),
        weights=module.scorer.weights_proj(rows.x).detach().numpy(),
        cache=cache,
        page_table=rows.table,
        query_start=np.array([0, 60], np.int32),
        context_lens=np.zeros(1, np.int32),
        page_size=rows.page_size,
        ratio=4,
        top_k=CONFIG["index_topk"],
    )
    assert (found >= 0).sum() > 100
    np.testing.assert_array_equal(np.sort(found, -1), expected.sort(-1)[0])


@pytest.mark.parametrize("name", ["sqrt_softplus_bias", "by_token_id"])
def test_routing(name: str) -> None:
    a = next(case for case in cases("moe_route") if case.name == name).args
    experts = a["logits"].shape[1]
    sizes = SimpleNamespace(
        num_experts_per_tok=a["top_k"],
        num_local_experts=experts,
        hidden_size=experts,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=a["scale"],
        vocab_size=50,
    )
    given = [torch.from_numpy(a["logits"])]
    if a["table"] is None:
        router = deepseek.DeepseekV4TopKRouter(sizes)
        router.e_score_correction_bias.copy_(torch.from_numpy(a["bias"]))
    else:
        router = deepseek.DeepseekV4HashRouter(sizes)
        router.tid2eid.copy_(torch.from_numpy(a["table"]))
        given.append(torch.from_numpy(a["token_ids"]))
    fill(router, weight=torch.eye(experts))
    _, weights, chosen = router(*given)
    made, ids = OPS["moe_route"].reference(**a)
    order = np.argsort(ids, -1, kind="stable")
    same = torch.sort(chosen, dim=-1, stable=True)
    np.testing.assert_array_equal(np.take_along_axis(ids, order, -1), same[0])
    equal(weights.gather(1, same[1]), np.take_along_axis(made, order, -1))
