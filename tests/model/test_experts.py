"""Experts one by one are the stacked experts."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.model import Experts, unstack_experts
from tests.tiny import config


def stacked(family):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family), experts_implementation="eager").double()
    return model.model.layers[0].mlp.experts


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_same_function_as_stacked(family):
    module = stacked(family)
    torch.nn.init.normal_(module.gate_up_proj, std=0.1)
    torch.nn.init.normal_(module.down_proj, std=0.1)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(33, 64, generator=g, dtype=torch.float64)
    index = torch.rand(33, 4, generator=g).topk(2).indices
    index[index == 2] = 4  # expert 2 gets no token; 4 marks a token of another device
    weight = torch.rand(33, 2, generator=g, dtype=torch.float64)
    holder = torch.nn.ModuleDict({"experts": module})
    with torch.no_grad():
        before = module(x, index, weight)
        assert unstack_experts(holder) == 1 and isinstance(holder["experts"], Experts)
        calls = []
        holder["experts"][2].register_forward_hook(lambda *a: calls.append(a))
        torch.testing.assert_close(holder["experts"](x, index, weight), before, rtol=0, atol=1e-10)
    assert not calls
    assert holder["experts"][1].up_proj.weight.data_ptr() != 0
    names = [n for n, _ in holder.named_parameters()]
    assert names[:3] == [f"experts.0.{p}_proj.weight" for p in ("gate", "up", "down")] and len(names) == 12
    assert unstack_experts(holder) == 0


def test_weights_are_views_and_meta_stays_meta():
    module = stacked("mixtral")
    holder = torch.nn.ModuleDict({"experts": module})
    unstack_experts(holder)
    half = holder["experts"][1].up_proj.weight
    assert half.data_ptr() == module.gate_up_proj[1, half.shape[0] :].data_ptr()
    meta = torch.nn.ModuleDict({"experts": stacked("mixtral").to("meta")})
    unstack_experts(meta)
    assert all(p.is_meta for p in meta.parameters())


def test_another_way_of_stacking_is_refused():
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING["gpt_oss"](
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RequestError, match="not supported yet"):
        unstack_experts(model)
