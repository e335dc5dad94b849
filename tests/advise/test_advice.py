"""Advice: what comes first in each scenario, with the figure that says why; and the rules themselves as data."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fewbits.activations import PRESETS
from fewbits.advise import Situation, advise, targets
from fewbits.advise.advice import _data, applies
from fewbits.cli import main
from fewbits.errors import RequestError
from fewbits.formats import LAYOUTS
from fewbits.methods import METHODS
from fewbits.pipeline.mixture import NAMES
from tests.tiny import tiny_model

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float16",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}

# scenario: (situation, what comes first, a part of the figure behind it)
SCENARIOS: dict[str, tuple[Situation, str, str]] = {
    "production serving": (Situation("hopper", batch=32), "fp8", "FP8 1.30 times 16 bits"),
    "batch 64 on a Hopper GPU": (Situation("hopper", batch=64), "fp8", "INT4-AWQ 0.83 times"),
    "one user on a Hopper GPU": (Situation("hopper"), "fp8", "MMLU loss 1.5 % against 5.7 %"),
    "one user on a Hopper GPU, little memory": (Situation("hopper", bits=5.0), "int4-awq", "INT4-AWQ 1.33"),
    "a batch on a full Hopper GPU": (Situation("hopper", batch=64, bits=4.5), "int4-awq", "4.156 bits per weight"),
    "long context on a Hopper GPU": (Situation("hopper", batch=64, context=65536), "fp8", "0.83 times"),
    "one user on Ada": (Situation("ada"), "int4-awq", "214 at 4"),
    "a batch on Ada": (Situation("ada", batch=32), "fp8", "1.56 times the speed"),
    "24 GB card with a 70B model": (Situation("ada", bits=2.58), "int2-gptq", "only codebooks hold"),
    "48 GB card with a 70B model": (Situation("ada", bits=5.56), "int4-awq", "214 at 4"),
    "one user on Ampere": (Situation("ampere"), "int4-gptq", "107 tokens/s at 16 bits, 201"),
    "a batch on Ampere": (Situation("ampere", batch=64), "w8a8", "5.515 against 5.47"),
    "little memory on Ampere": (Situation("ampere", bits=3.4), "int3-gptq", "3 bits 3.148"),
    "Blackwell FP4": (Situation("blackwell"), "nvfp4", "3.56 times the tokens per second"),
    "a batch on Blackwell": (Situation("blackwell", batch=64), "nvfp4", "4.5 bits per weight (NVFP4)"),
    "Blackwell with less than NVFP4 needs": (Situation("blackwell", bits=4.3), "int4-awq", "4.156 bits"),
    "CPU deployment": (Situation("cpu"), "q4_k_m", "0.0127, 94.7 %"),
    "CPU, somewhat less memory": (Situation("cpu", bits=4.7), "q4_0", "0.0127, 94.7 %"),
    "CPU, little memory": (Situation("cpu", bits=4.0), "q3_k_m", "0.102 to 0.084"),
    "CPU, hardly any memory": (Situation("cpu", bits=3.3), "q2_k", "0.445 to 0.331"),
    "edge device": (Situation("edge"), "q4_0", "q4_0 0.0719 at 4.6 bits"),
    "a small edge device": (Situation("edge", bits=4.0), "q3_k_m", "q3_k_m 0.102"),
    "fine-tuning on one consumer card": (Situation("finetune"), "nf4-dq", "780 GB to less than 48 GB"),
    "fine-tuning where every bit counts": (Situation("finetune", bits=4.2), "nf4-dq", "0.5 to 0.127 bits"),
    "maximum quality": (Situation("quality"), "q8_0", "0.00037 (98.8 % same top-1)"),
    "maximum quality in seven bits": (Situation("quality", bits=7.0), "q6_k", "5.808 with q6_k against 5.795"),
    "maximum quality in three bits": (Situation("quality", bits=3.2), "int3-gptq", "8.06 at 3 bits"),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios(scenario):
    situation, first, figure = SCENARIOS[scenario]
    found = advise(situation)
    best = found.choices[0]
    assert best.name == first, [(c.name, c.points, c.fits) for c in found.choices]
    assert best.fits and any(figure in r.figure for r in best.reasons), best.reasons
    assert all(r.why and r.figure and r.source for c in found.choices for r in c.reasons)


def test_what_else_is_said():
    long = advise(Situation("cpu", context=131072))
    assert [flags for flags, _ in long.also] == ["--kv-cache int8"] and "10 GiB" in long.also[0][1].figure
    server = advise(Situation("hopper", batch=64, context=65536))
    assert "--kv-cache fp8" in [flags for flags, _ in server.also]
    assert "0.75 at batch 8" in server.warnings[0][1].figure
    assert any("0.71 times" in r.figure for _, r in advise(Situation("ada")).warnings)
    assert any("2.5 times slower" in r.figure for _, r in advise(Situation("finetune")).warnings)
    assert not advise(Situation("cpu")).also


def test_rules_are_sound():
    """Every option names what exists, and every rule names options that its targets can have."""
    data = _data()
    for name, o in data["options"].items():
        assert o["method"] in METHODS or o["method"] in NAMES, name
        assert o["format"] in LAYOUTS and set(o["for"]) <= set(targets()), name
        assert o.get("activations") is None or o["activations"] in PRESETS, name
    for rule in data["rules"]:
        assert {"why", "figure", "source"} <= set(rule), rule
        assert ("options" in rule) + ("also" in rule) + ("warn" in rule) == 1
        for name in rule.get("options") or {}:
            reach = set(rule["when"].get("target", targets()))
            assert name in data["options"] and reach & set(data["options"][name]["for"]), name
    for target in targets():
        assert advise(Situation(target)).choices


def test_conditions():
    s = Situation("ada", batch=8, context=100, bits=4.0)
    assert applies({"batch": ">=8"}, s) and not applies({"batch": "<8"}, s)
    assert applies({"tight": True, "at_most": 4.0}, s) and not applies({"at_most": 3.9}, s)
    assert not applies({"tight": True}, Situation("ada"))
    assert applies({"target": ["ada", "hopper"]}, s) and not applies({"target": ["cpu"]}, s)
    with pytest.raises(RequestError, match="target 'gpu' is unknown; allowed: blackwell, hopper"):
        Situation("gpu")


def test_the_command_on_a_70b_model(capsys, tmp_path):
    """From a config.json alone: two bits are all that a card of 24 GiB holds."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    assert main(["plan", str(tmp_path), "--for", "ada", "--memory", "24GiB", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert [c["name"] for c in found["choices"] if c["fits"]] == ["int2-gptq"]
    assert 2.1 < found["choices"][0]["bits_per_weight"] < 2.2 and "only codebooks hold" in " ".join(err.split())


def test_the_command_takes_groups_that_fit(capsys, tmp_path):
    tiny_model("llama", tmp_path / "model")
    assert main(["plan", str(tmp_path / "model"), "--for", "ampere", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["choices"][0]["name"] == "int4-gptq" and found["choices"][0]["size_bytes"] > 0
    assert main(["plan", str(tmp_path / "model"), "--for", "toaster"]) == 2
