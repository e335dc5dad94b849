"""Tables of families: every site keeps the function, every stage shares one input, nothing protected is listed."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fewbits.errors import RequestError
from fewbits.model import Source, fold, get_weight, set_weight
from fewbits.model.families import PROTECTED
from tests.tiny import FAMILIES, tiny_model

SITES = {
    "llama": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "gemma3_text": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    "phi3": ["input_layernorm", "self_attn.qkv_proj", "post_attention_layernorm", "mlp.gate_up_proj"],
    "opt": ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"],
    "gpt2": ["ln_1", "attn.c_attn", "ln_2"],
    "mixtral": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm"]
    + [f"mlp.experts.{e}.up_proj" for e in range(4)],
}
SITES |= dict.fromkeys(("mistral", "qwen2", "qwen3"), SITES["llama"])
SITES |= {"gemma3": SITES["gemma3_text"], "qwen3_moe": SITES["mixtral"]}
TOKENS = 24


@torch.no_grad()
def run(source: Source, block: torch.nn.Module, i: int, x: torch.Tensor) -> torch.Tensor:
    kwargs = source.block_kwargs(TOKENS)[i]
    # Gemma's norms multiply in float32 whatever the input; the laws are about the algebra, so let them use float64.
    with mock.patch.object(
        torch.Tensor, "float", torch.Tensor.double if x.dtype == torch.float64 else torch.Tensor.float
    ):
        out = block(x, **kwargs)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_keeps_the_function(family, source):
    s = source(family)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, TOKENS, 64, generator=g, dtype=torch.float64)
    block = s.block(0, torch.float64)
    found = s.sites(block)
    assert [site.producer for site in found] == SITES[family]
    before = run(s, block, 0, x)
    for site in found:
        changed = s.block(0, torch.float64)
        scale = torch.exp(torch.randn(site.size(changed), generator=g, dtype=torch.float64))
        fold(changed, site, scale)
        for name in site.consumers:
            assert not torch.equal(get_weight(changed.get_submodule(name)), get_weight(block.get_submodule(name)))
        torch.testing.assert_close(run(s, changed, 0, x), before, rtol=0, atol=1e-10)
        fold(block, site, scale)
    torch.testing.assert_close(run(s, block, 0, x), before, rtol=0, atol=1e-10)  # all of them at once


@pytest.mark.parametrize("family", FAMILIES)
def test_consumers_see_the_scaled_activation(family, source):
    """The law behind a site: its consumers' inputs become ``x / s``, not only the block's output the same."""
    s = source(family)
    x = torch.randn(2, TOKENS, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def inputs(block, name):
        seen = []
        hook = block.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
        run(s, block, 0, x)
        hook.remove()
        return seen[0]

    for site in s.sites(s.block(0)):
        plain, changed = s.block(0, torch.float64), s.block(0, torch.float64)
        scale = torch.linspace(0.5, 2, site.size(plain), dtype=torch.float64)
        fold(changed, site, scale)
        name = site.consumers[0]
        expected = inputs(plain, name) / site.expand(scale)
        torch.testing.assert_close(inputs(changed, name), expected, rtol=0, atol=1e-10)
        assert torch.allclose(site.reduce(site.expand(scale)), scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_list_every_linear_once_and_share_one_input(family, source):
    s = source(family)
    for i in range(s.n_blocks):
        block = s.block(i)
        names = [n for stage in s.stages(block) for n in stage]
        assert list(s.linears(block)) == names and len(set(names)) == len(names)
        linear = {n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear) or hasattr(m, "nf")}
        assert set(names) == linear and not [n for n in names if PROTECTED.search(n)]
        seen: dict[str, torch.Tensor] = {}
        order: list[str] = []
        for n in names:

            def hook(m, a, n=n, seen=seen, order=order):
                seen[n] = a[0]
                order.append(n)

            block.get_submodule(n).register_forward_pre_hook(hook)
        run(s, block, i, torch.randn(4, TOKENS, 64, generator=torch.Generator().manual_seed(3)))
        assert order == [n for n in names if n in seen]
        for stage in s.stages(block):
            assert len({seen[n].data_ptr() for n in stage if n in seen}) <= 1


def test_ties(source):
    block = source("qwen3_moe").block(0)
    ties = source("qwen3_moe").ties(block)
    assert ties[0] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert ties[1] == ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj") and len(ties) == 5
    dense = source("qwen3_moe").block(1)
    assert source("qwen3_moe").ties(dense)[1] == ("mlp.gate_proj", "mlp.up_proj")


def test_routing_does_not_change(source):
    s = source("mixtral")
    block, changed = s.block(0, torch.float64), s.block(0, torch.float64)
    site = next(x for x in s.sites(block) if x.also)
    assert site.also == ("mlp.gate",) and len(site.consumers) == 8
    fold(changed, site, torch.linspace(0.25, 4, 64))
    logits = []
    for b in (block, changed):
        b.mlp.gate.register_forward_hook(lambda m, a, out: logits.append(out[0]))
        run(s, b, 0, torch.randn(2, TOKENS, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)


def test_sites_that_a_config_makes_illegal(tmp_path):
    """OPT-350m normalises after the sum, Galactica uses GELU: those sites would change the function."""
    post = Source.open(tiny_model("opt", tmp_path / "post", do_layer_norm_before=False))
    assert [x.producer for x in post.sites(post.block(0))] == ["self_attn.v_proj", "fc1"]
    gelu = Source.open(tiny_model("opt", tmp_path / "gelu", activation_function="gelu"))
    assert [x.producer for x in gelu.sites(gelu.block(0))] == SITES["opt"][:-1]


def test_fused_and_grouped_sizes(source):
    s = source("phi3")
    v, up = (x for x in s.sites(s.block(0)) if x.rows)
    assert (v.rows, v.heads) == ((96, 128), (2, 2, 16))  # q 64, k 32, v 32 rows
    assert (up.rows, up.heads) == ((96, 192), None)
    assert torch.equal(v.expand(torch.arange(32.0)).view(4, 16)[1], torch.arange(16.0))


@pytest.mark.parametrize("bad", [torch.ones(63), torch.zeros(64), torch.full((64,), float("nan")), -torch.ones(64)])
def test_a_scale_that_cannot_be_folded(bad, source):
    s = source("llama")
    block = s.block(0)
    with pytest.raises(RequestError, match="64 positive finite numbers"):
        fold(block, s.sites(block)[0], bad)


def test_conv1d_is_hidden(source):
    block = source("gpt2").block(0)
    module = block.attn.c_attn
    assert module.weight.shape == (64, 192) and get_weight(module).shape == (192, 64)
    w = torch.randn(192, 64)
    set_weight(module, w)
    assert torch.equal(module.weight, w.t())
    x = torch.randn(5, 64)
    torch.testing.assert_close(module(x), torch.nn.functional.linear(x, get_weight(module), module.bias))
    with pytest.raises(ValueError, match="shape"):
        set_weight(module, w.t())
