"""Which type each tensor gets in llama.cpp's mixtures (Q4_K_M and its kin), as ordered rules.

A :class:`Rule` says: tensors of this role, in these layers, under this condition, get this type; the first that fits
wins, and what no rule names gets the mixture's base type. (Facts from llama.cpp's llama-quant.cpp.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewbits.errors import RequestError
from fewbits.grids import BLOCK_TYPES

Layers = Callable[[int, int], bool]
"""Whether a layer ``i`` of ``n`` is meant."""


@dataclass(frozen=True)
class Model:
    """What mixtures ask of a model: ``layers``, query heads per key-value head, and whether it is tied.

    ``weighted``: an importance matrix is used. ``experts``: number of experts, 0 for a dense model.
    """

    layers: int
    queries: int = 1
    tied: bool = False
    weighted: bool = False
    experts: int = 0
    llama: bool = True


@dataclass(frozen=True)
class Rule:
    role: str
    kind: str
    layers: Layers = lambda i, n: True
    when: Callable[[Model], bool] = lambda m: True


def first(divisor: int) -> Layers:
    """The first ``1/divisor`` of the layers."""
    return lambda i, n: i < n // divisor


def below(count: int) -> Layers:
    """The first ``count`` layers."""
    return lambda i, n: i < count


def more_bits(i: int, n: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def grouped(m: Model) -> bool:
    """Four queries or more share a key."""
    return m.queries >= 4


def weighted(m: Model) -> bool:
    return m.weighted


def unweighted(m: Model) -> bool:
    return not m.weighted


@dataclass(frozen=True)
class Mixture:
    """``base`` type, ``rules``, the ``file_type`` number that the file states, and the type of the ``embedding``."""

    base: str
    file_type: int
    rules: tuple[Rule, ...] = ()
    embedding: str | None = None


def _only(kind: str, file_type: int, embedding: str | None = None) -> Mixture:
    return Mixture(kind, file_type, (), embedding)


_IQ4 = (Rule("attn_v", "q5_k", when=grouped), Rule("ffn_down", "q5_k", first(8), unweighted))
_M = (Rule("attn_v", "q6_k", more_bits), Rule("ffn_down", "q6_k", more_bits))

MIXTURES: dict[str, Mixture] = {
    "q2_k": Mixture(
        "q2_k",
        10,
        (
            Rule("attn_v", "q4_k", when=grouped),
            Rule("attn_v", "q3_k"),
            Rule("ffn_down", "q3_k"),
            Rule("attn_output", "q3_k"),
        ),
    ),
    "q3_k_s": _only("q3_k", 11),
    "q3_k_m": Mixture(
        "q3_k",
        12,
        (
            Rule("attn_v", "q5_k", below(2)),
            Rule("attn_v", "q4_k"),
            Rule("ffn_down", "q5_k", first(16)),
            Rule("ffn_down", "q4_k"),
            Rule("attn_output", "q4_k"),
        ),
    ),
    "q3_k_l": Mixture(
        "q3_k",
        13,
        (Rule("attn_v", "q5_k"), Rule("ffn_down", "q5_k"), Rule("attn_output", "q5_k")),
    ),
    "q4_k_s": Mixture("q4_k", 14, (Rule("attn_v", "q5_k", below(4)), Rule("ffn_down", "q5_k", first(8)))),
    "q4_k_m": Mixture("q4_k", 15, _M),
    "q5_k_s": _only("q5_k", 16),
    "q5_k_m": Mixture("q5_k", 17, _M),
    "q6_k": _only("q6_k", 18),
    "q8_0": _only("q8_0", 7),
    "q4_0": Mixture("q4_0", 2, (Rule("ffn_down", "q4_1", first(8), weighted),)),
    "q4_1": _only("q4_1", 3),
    "q5_0": Mixture("q5_0", 8, (Rule("ffn_down", "q5_1", first(8), weighted),)),
    "q5_1": _only("q5_1", 9),
    "iq4_nl": Mixture("iq4_nl", 25, _IQ4),
    "iq4_xs": Mixture("iq4_xs", 30, _IQ4),
    "tq1_0": _only("tq1_0", 36, "q4_k"),
    "tq2_0": _only("tq2_0", 37, "q4_k"),
    "f16": _only("f16", 1),
    "bf16": _only("bf16", 32),
    "f32": _only("f32", 0),
}

# A fused matrix gets what the most sensitive of its parts would get.
FUSED = {"attn_qkv": "attn_v"}

# Attention is a small part of a model of eight experts, so it is given more bits.
EIGHT = {"attn_v": "q8_0", "attn_k": "q8_0", "attn_output": "q5_k"}
EIGHT_OUTPUT = frozenset({10, 11, 12, 14, 15, 25, 30})
"""File types of mixtures whose attn_output is; the others' keep the base type."""

# What takes the place of a type whose blocks of 256 do not divide a row.
FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
FALLBACK |= {"iq4_xs": "iq4_nl", "tq1_0": "q4_0", "tq2_0": "q4_0"}


def mixture(name: str) -> Mixture:
    """A mixture by name. Raises RequestError."""
    if name not in MIXTURES:
        raise RequestError(f"GGUF mixture {name!r} is unknown; allowed: {', '.join(MIXTURES)}")
    return MIXTURES[name]


def fits(kind: str, columns: int) -> str:
    """``kind``, or what llama.cpp falls back to when rows of ``columns`` are no whole blocks; f16 in the end."""
    for k in (kind, FALLBACK.get(kind, "f16")):
        if columns % (BLOCK_TYPES[k].shape.block if k in BLOCK_TYPES else 1) == 0:
            return k
    return "f16"


def wanted(mix: Mixture, name: str, columns: int, model: Model) -> str:
    """The type that the mixture wants for the tensor ``name`` (GGUF's name), before any fallback."""
    dense = mix.base not in BLOCK_TYPES
    role = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
    if not dense and (role == "output" or (role == "token_embd" and model.tied)):
        whole = columns % BLOCK_TYPES[mix.base].shape.block == 0
        return "q8_0" if not whole or mix.base == "q8_0" else "q6_k"
    if role == "token_embd":
        return mix.embedding or mix.base
    role = role.removesuffix("_exps")
    if model.experts == 8 and not dense and role in EIGHT:
        return mix.base if role == "attn_output" and mix.file_type not in EIGHT_OUTPUT else EIGHT[role]
    role, layer = FUSED.get(role, role), int(name.split(".")[1]) if name.startswith("blk.") else 0
    for r in mix.rules:
        if r.role == role and r.layers(layer, model.layers) and r.when(model):
            return _seventy(r.kind, role, model)
    return _seventy(mix.base, role, model)


def _seventy(kind: str, role: str, m: Model) -> str:
    """Llama 70B shares one value head among eight queries: its small attn_v is given more bits."""
    more = role == "attn_v" and m.layers == 80 and m.llama and m.queries > 1 and kind in ("q3_k", "q4_k")
    return "q5_k" if more else kind


def kind_of(mix: Mixture, name: str, shape: tuple[int, ...], model: Model) -> str:
    """The type of a tensor in the file: vectors, norms and routers are f32, the rest as :func:`wanted` and
    :func:`fits` say.
    """
    vector = len(shape) < 2 or not name.endswith(".weight")
    if vector or "_norm." in name or "ffn_gate_inp" in name or name.startswith("rope_"):
        return "f32"
    return fits(wanted(mix, name, shape[-1], model), shape[-1])
