"""Mixtures: which type each tensor gets, by hand from llama.cpp's rules for three shapes of model."""

from __future__ import annotations

import pytest

from fewbits.errors import RequestError
from fewbits.formats.gguf_mixtures import FALLBACK, MIXTURES, Model, fits, kind_of, mixture, more_bits

ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def kinds(name: str, model: Model, width: int = 1024, inner: int = 3072) -> dict[str, str]:
    """The type of every matrix of a model of that width."""
    names = {f"blk.{i}.{r}.weight": inner if r == "ffn_down" else width for i in range(model.layers) for r in ROLES}
    names |= {"token_embd.weight": width} | ({} if model.tied else {"output.weight": width})
    return {n: kind_of(mixture(name), n, (64, columns), model) for n, columns in names.items()}


def only(found: dict[str, str], role: str) -> list[str]:
    return [k for n, k in found.items() if f".{role}." in n]


def test_layers_with_more_bits():
    assert [i for i in range(30) if more_bits(i, 30)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert sum(more_bits(i, 32) for i in range(32)) == 16


def test_q4_k_m_of_a_model_of_whole_blocks():
    found = kinds("q4_k_m", Model(32, 4))
    more = ["q6_k" if more_bits(i, 32) else "q4_k" for i in range(32)]
    assert only(found, "attn_v") == only(found, "ffn_down") == more
    assert {k for r in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up") for k in only(found, r)} == {"q4_k"}
    assert found["output.weight"] == "q6_k" and found["token_embd.weight"] == "q4_k"


def test_q4_k_m_of_smollm2_falls_back():
    """576 columns are no whole blocks of 256, 1536 are. The counts follow from llama.cpp's rules by hand."""
    found = list(kinds("q4_k_m", Model(30, 3, tied=True), 576, 1536).values())
    assert {k: found.count(k) for k in set(found)} == {"q5_0": 166, "q4_k": 16, "q8_0": 15, "q6_k": 14}


@pytest.mark.parametrize(
    ("name", "role", "want"),
    [
        ("q2_k", "attn_v", ["q4_k"] * 16),
        ("q2_k", "ffn_down", ["q3_k"] * 16),
        ("q2_k", "attn_output", ["q3_k"] * 16),
        ("q2_k", "ffn_up", ["q2_k"] * 16),
        ("q3_k_s", "ffn_down", ["q3_k"] * 16),
        ("q3_k_m", "attn_v", ["q5_k"] * 2 + ["q4_k"] * 14),
        ("q3_k_m", "ffn_down", ["q5_k"] * 1 + ["q4_k"] * 15),
        ("q3_k_m", "attn_output", ["q4_k"] * 16),
        ("q3_k_l", "ffn_down", ["q5_k"] * 16),
        ("q4_k_s", "attn_v", ["q5_k"] * 4 + ["q4_k"] * 12),
        ("q4_k_s", "ffn_down", ["q5_k"] * 2 + ["q4_k"] * 14),
        ("q5_k_s", "ffn_down", ["q5_k"] * 16),
        ("q6_k", "attn_v", ["q6_k"] * 16),
        ("q8_0", "attn_v", ["q8_0"] * 16),
        ("q4_0", "ffn_down", ["q4_0"] * 16),
        ("iq4_xs", "attn_v", ["q5_k"] * 16),
        ("iq4_xs", "ffn_down", ["q5_k"] * 2 + ["iq4_xs"] * 14),
    ],
)
def test_a_role_of_a_model_of_sixteen_layers(name, role, want):
    assert only(kinds(name, Model(16, 4)), role) == want


def test_conditions():
    assert set(only(kinds("q2_k", Model(16, 2)), "attn_v")) == {"q3_k"}
    assert only(kinds("q4_0", Model(16, 2, weighted=True)), "ffn_down") == ["q4_1"] * 2 + ["q4_0"] * 14
    assert only(kinds("iq4_nl", Model(16, 2, weighted=True)), "ffn_down") == ["iq4_nl"] * 16
    assert set(only(kinds("q4_k_s", Model(80, 8)), "attn_v")) == {"q5_k"}
    assert kinds("tq2_0", Model(2))["token_embd.weight"] == "q4_k"
    assert kinds("q8_0", Model(2))["output.weight"] == "q8_0"
    assert kinds("f16", Model(2, tied=True))["token_embd.weight"] == "f16"


def test_vectors_and_norms_are_f32():
    for name, shape in (("blk.0.attn_norm.weight", (64,)), ("blk.0.attn_q.bias", (64,)), ("output_norm.weight", (64,))):
        assert kind_of(mixture("q4_k_m"), name, shape, Model(2)) == "f32"


def test_fallbacks():
    assert [fits(k, 576) for k in FALLBACK] == list(FALLBACK.values())
    assert fits("q4_k", 40) == fits("q8_0", 40) == "f16"
    assert fits("q4_k", 512) == "q4_k" and fits("q8_0", 32) == "q8_0"


def test_unknown_mixture():
    with pytest.raises(RequestError, match="GGUF mixture 'q4_k_x' is unknown; allowed: q2_k"):
        mixture("q4_k_x")
    assert len({m.file_type for m in MIXTURES.values()}) == len(MIXTURES)
