"""Guards the meaning of ops: the numpy references of recurrent mixers and of expert routing equal
transformers' own functions on the cases of their contracts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from sixfold.common.ops import OPS
from sixfold.common.ops.state_rows import each
from sixfold.platforms.interface_kernels import Case


def cases(op: str) -> list[Case]:
    return list(OPS[op].cases(np.random.default_rng(3)))


def tensors(case: Case) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        for name, value in case.args.items()
    }


def rows(case: Case) -> Any:
    return each(*(case.args[name] for name in ("slots", "query_start", "context_lens")))


@pytest.mark.parametrize("case", cases("gated_delta"), ids=lambda c: c.name)
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_gated_delta(case: Case, form: str) -> None:
    t, (made, state) = tensors(case), OPS["gated_delta"].reference(**case.args)
    g = -t["a_log"].exp() * torch.nn.functional.softplus(t["a"] + t["dt_bias"])
    heads = t["v"].shape[1] // t["q"].shape[1]
    q, k = (t[name].repeat_interleave(heads, 1) for name in "qk")
    for _, where, slot, fresh in rows(case):
        begun = torch.zeros_like(t["state"][slot]) if fresh else t["state"][slot]
        inputs = [x[where][None] for x in (q, k, t["v"], g, t["b"].sigmoid())]
        found, after = getattr(qwen, f"torch_{form}_gated_delta_rule")(
            *inputs,
            initial_state=begun[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        np.testing.assert_allclose(made[where], found[0], atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(state[slot], after[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", cases("conv1d_update"), ids=lambda c: c.name)
def test_conv1d_update(case: Case) -> None:
    t, (made, state) = tensors(case), OPS["conv1d_update"].reference(**case.args)
    for _, where, slot, fresh in rows(case):
        kept = torch.zeros_like(t["state"][slot]) if fresh else t["state"][slot].clone()
        kept = kept.T[None].contiguous()
        activation = "silu" if t["activate"] else None
        found = qwen.causal_conv1d_update(
            t["x"][where].T[None], kept, t["weight"], t["bias"], activation
        )
        np.testing.assert_allclose(made[where], found[0].T, atol=5e-6, rtol=5e-6)
        np.testing.assert_array_equal(state[slot], kept[0].T)


@pytest.mark.parametrize("name", ["groups", "groups_below_zero", "sigmoid_bias"])
def test_grouped_routing(name: str) -> None:
    case = next(case for case in cases("moe_route") if case.name == name)
    a = case.args
    experts = a["logits"].shape[1]
    config = SimpleNamespace(
        num_experts_per_tok=a["top_k"],
        num_local_experts=experts,
        hidden_size=experts,
        routed_scaling_factor=a["scale"],
        n_group=a["groups"],
        topk_group=a["kept_groups"],
        norm_topk_prob=a["renormalise"],
    )
    router = deepseek.DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        router.e_score_correction_bias.copy_(torch.from_numpy(a["bias"]))
        _, weights, chosen = router(torch.from_numpy(a["logits"]))
    made, ids = OPS["moe_route"].reference(**a)
    order, wanted = np.argsort(ids, -1), chosen.argsort(-1)
    np.testing.assert_array_equal(np.sort(ids, -1), chosen.sort(-1)[0])
    np.testing.assert_allclose(
        np.take_along_axis(made, order, -1), weights.gather(1, wanted), rtol=1e-5
    )


def test_sloped_experts_with_biases() -> None:
    case = next(case for case in cases("moe_experts") if case.name == "sloped_and_biased")
    t = tensors(case)
    count, both, width = t["gate_up"].shape
    config = SimpleNamespace(
        intermediate_size=both // 2,
        num_local_experts=count,
        hidden_size=width,
        swiglu_alpha=t["slope"],
        swiglu_limit=t["limit"],
        _experts_implementation="eager",
    )
    experts = gpt_oss.GptOssExperts(config)

    def interleaved(x: torch.Tensor) -> torch.Tensor:
        """gpt-oss keeps gate and up channel by channel."""
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    with torch.no_grad():
        experts.gate_up_proj.copy_(interleaved(t["gate_up"]).transpose(1, 2))
        experts.gate_up_proj_bias.copy_(interleaved(t["gate_up_bias"]))
        experts.down_proj.copy_(t["down"].transpose(1, 2))
        experts.down_proj_bias.copy_(t["down_bias"])
        found = experts(t["x"], t["experts"], t["weights"])
    made = OPS["moe_experts"].reference(**case.args)
    np.testing.assert_allclose(made, found, atol=1e-5, rtol=1e-5)
