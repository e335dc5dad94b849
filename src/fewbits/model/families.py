"""Model families as tables of names, and what can be said of a decoder that is in no table.

To add a family: add one entry to ``FAMILIES`` and its model type to ``tests/tiny.py``; the tests then check that the
blocks reproduce the whole model and that every site keeps the function.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fewbits.model.base import Family, Site, SiteRule, expanded, get_weight, is_linear

V = "self_attn.v_proj"
QKV = ("self_attn.q_proj", "self_attn.k_proj", V)
O = ("self_attn.o_proj",)
GATE_UP, DOWN = ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
EXPERT_GATE_UP = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj")
EXPERT_DOWN = ("mlp.experts.{e}.down_proj",)

V_TO_O = SiteRule(V, "linear", O, heads=True)
UP_TO_DOWN = SiteRule("mlp.up_proj", "linear", DOWN)
EXPERT_UP_TO_DOWN = SiteRule("mlp.experts.{e}.up_proj", "linear", EXPERT_DOWN)
NORM_TO_QKV = SiteRule("input_layernorm", "norm", QKV)
NORM_TO_MLP = SiteRule("post_attention_layernorm", "norm", GATE_UP)
# A router reads the norm's output too: it must follow the scale although it is never quantized.
NORM_TO_EXPERTS = SiteRule("post_attention_layernorm", "norm", EXPERT_GATE_UP, also=("mlp.gate",))

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        stages=(QKV, O, GATE_UP, DOWN),
        sites=(NORM_TO_QKV, V_TO_O, NORM_TO_MLP, UP_TO_DOWN),
        ties=(QKV, GATE_UP),
        values=V,
    ),
    Family(
        model_types=("gemma3_text", "gemma3"),
        stages=(QKV, O, GATE_UP, DOWN),
        sites=(
            SiteRule("input_layernorm", "norm+1", QKV),
            V_TO_O,
            SiteRule("pre_feedforward_layernorm", "norm+1", GATE_UP),
            UP_TO_DOWN,
        ),
        ties=(QKV, GATE_UP),
        values=V,
    ),
    Family(
        model_types=("phi3",),
        stages=(("self_attn.qkv_proj",), O, ("mlp.gate_up_proj",), DOWN),
        sites=(
            SiteRule("input_layernorm", "norm", ("self_attn.qkv_proj",)),
            SiteRule("self_attn.qkv_proj", "linear", O, rows="v", heads=True),
            SiteRule("post_attention_layernorm", "norm", ("mlp.gate_up_proj",)),
            SiteRule("mlp.gate_up_proj", "linear", DOWN, rows="up"),
        ),
    ),
    Family(
        model_types=("opt",),
        stages=(QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        sites=(
            # OPT-350m normalises after the residual sum: its norms feed the residual stream too.
            SiteRule("self_attn_layer_norm", "norm", QKV, requires=("do_layer_norm_before", True)),
            SiteRule(V, "linear", ("self_attn.out_proj",)),
            SiteRule("final_layer_norm", "norm", ("fc1",), requires=("do_layer_norm_before", True)),
            # relu(a x) = a relu(x) for a > 0; no other activation here commutes with a scale.
            SiteRule("fc1", "linear", ("fc2",), requires=("activation_function", "relu")),
        ),
        ties=(QKV,),
        values=V,
    ),
    Family(
        model_types=("gpt2",),
        stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        sites=(
            SiteRule("ln_1", "norm", ("attn.c_attn",)),
            SiteRule("attn.c_attn", "linear", ("attn.c_proj",), rows="v", heads=True),
            SiteRule("ln_2", "norm", ("mlp.c_fc",)),
        ),
    ),
    Family(
        model_types=("mixtral",),
        stages=(QKV, O, EXPERT_GATE_UP, EXPERT_DOWN),
        sites=(NORM_TO_QKV, V_TO_O, NORM_TO_EXPERTS, EXPERT_UP_TO_DOWN),
        ties=(QKV, EXPERT_GATE_UP),
        values=V,
        names=(
            (".w1.", ".gate_proj."),
            (".w3.", ".up_proj."),
            (".w2.", ".down_proj."),
            (".block_sparse_moe.", ".mlp."),
        ),
    ),
    Family(
        model_types=("qwen3_moe",),
        stages=(QKV, O, GATE_UP, DOWN, EXPERT_GATE_UP, EXPERT_DOWN),
        sites=(NORM_TO_QKV, V_TO_O, NORM_TO_MLP, UP_TO_DOWN, NORM_TO_EXPERTS, EXPERT_UP_TO_DOWN),
        ties=(QKV, GATE_UP, EXPERT_GATE_UP),
        values=V,
    ),
)

PROTECTED = re.compile(
    r"(^|[._])(router|gate|shared_expert_gate|norm|layernorm|ln|conv\w*|embed\w*|lm_head|rotary\w*)$"
)
"""Last parts of names that are never quantized in a decoder that is in no table."""


def find_family(model_type: str) -> Family:
    """The table of a model type; a family without stages or sites when there is none (see :func:`stages`)."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    return Family((model_type,), ())


def stages(family: Family, block: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Linears of a block that share one input, in execution order; each expert has its own (its tokens differ).

    A decoder in no table has one stage per linear layer, in the order in which the layers were made.
    """
    if not family.stages:
        linear = (name for name, module in block.named_modules() if is_linear(module))
        return tuple((name,) for name in linear if not PROTECTED.search(name))
    found: list[tuple[str, ...]] = []
    plain = [s for s in family.stages if not _per_expert(s)]
    routed = [s for s in family.stages if _per_expert(s)]
    found += [tuple(n for n in s if _has(block, n)) for s in plain]
    for e in range(_experts(block)):
        found += [tuple(n.format(e=e) for n in s) for s in routed]
    return tuple(s for s in found if s)


def ties(family: Family, block: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Linears of a block that servers fuse into one."""
    found = []
    for names in family.ties:
        count = _experts(block) if _per_expert(names) else 1
        found += [tuple(n.format(e=e) for n in names) for e in range(count)]
    return tuple(t for t in found if all(_has(block, n) for n in t))


def sites(family: Family, block: nn.Module, config: Any) -> tuple[Site, ...]:
    """The sites of a block that are legal under ``config`` (the text config); none for a decoder in no table."""
    found: list[Site] = []
    for rule in family.sites:
        if rule.requires is None or getattr(config, rule.requires[0], None) == rule.requires[1]:
            found += _resolve(rule, block, config)
    return tuple(found)


def _resolve(rule: SiteRule, block: nn.Module, config: Any) -> list[Site]:
    experts = _experts(block)
    found = []
    for e in range(experts) if "{e}" in rule.producer else (0,):
        producer = rule.producer.format(e=e)
        own = "{e}" in rule.producer
        consumers = tuple(n.format(e=e) for n in rule.consumers) if own else tuple(expanded(rule.consumers, experts))
        if not consumers or not all(_has(block, n) for n in (producer, *consumers, *rule.also)):
            continue
        heads = _heads(config) if rule.heads else None
        rows = _rows(rule.rows, get_weight(block.get_submodule(producer)).shape[0], heads)
        found.append(Site(producer, rule.kind, consumers, rule.also, rows, heads))
    return found


def _heads(config: Any) -> tuple[int, int, int]:
    queries = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or queries
    dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return kv, queries // kv, dim


def _rows(part: str | None, out: int, heads: tuple[int, int, int] | None) -> tuple[int, int] | None:
    if part is None:
        return None
    size = out // 2 if heads is None else heads[0] * heads[2]
    return out - size, out


def _per_expert(names: tuple[str, ...]) -> bool:
    return "{e}" in names[0]


def _experts(block: nn.Module) -> int:
    return len(block.get_submodule("mlp.experts")) if _has(block, "mlp.experts") else 0  # type: ignore[arg-type]


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True
