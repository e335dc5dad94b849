"""Quantizing with quantized inputs: what the walk sees is what a reader computes; save, load, generate."""

import json

import pytest
import torch

from fewbits import api, load
from fewbits.activations import PRESETS, Inputs
from fewbits.errors import FewbitsError, RequestError
from fewbits.model import Source
from fewbits.runtime.decode import generate
from fewbits.runtime.linear import QuantLinear
from fewbits.stats import Stats
from fewbits.storage import Checkpoint
from tests.pipeline.test_quantize import SMALL, make

QUICK = SMALL | {"samples": 8}
QUICK.pop("group_size")
CASES = {
    "w8a8": {"method": "w8a8"},
    "smoothquant": {"method": "smoothquant"},
    "smoothquant-static": {"method": "smoothquant-static"},
    "w4a8": {"method": "smoothquant+gptq", "group_size": 16},
    "gptq-int4": {"method": "gptq", "bits": 8, "group_size": 16, "activations": "int4"},
    "fp8": {"method": "awq", "bits": 8, "group_size": 16, "activations": "fp8"},
    "fp8-static": {"method": "rtn", "bits": 8, "group_size": 16, "activations": "fp8-static"},
    "nvfp4": {"method": "rtn", "bits": 8, "group_size": 16, "activations": "nvfp4"},
    "mxfp4": {"method": "rtn", "bits": 8, "group_size": 16, "activations": "mxfp4"},
    "llm.int8": {"method": "llm.int8"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make("llama", tmp_path_factory.mktemp("llama"))


def specification(model):
    """The model with every layer computing ``inputs(x) @ W.T`` in float64 from its own weights."""
    for m in model.modules():
        if isinstance(m, QuantLinear):
            weight, inputs = m.dequantize().double(), m.inputs
            m.forward = lambda x, w=weight, i=inputs: (i(x.double()) @ w.T).to(x.dtype)
    return model


@pytest.mark.parametrize("layout", ["fewbits", "compressed-tensors"])
@pytest.mark.parametrize("case", CASES)
def test_save_load_generate(case, layout, llama, tmp_path):
    out, given = tmp_path / "out", QUICK | CASES[case]
    if layout == "compressed-tensors" and case in ("nvfp4", "mxfp4", "llm.int8"):
        with pytest.raises(RequestError, match="use format fewbits"):
            api.quantize(llama, out, format=layout, **given)
        return
    api.quantize(llama, out, format=layout, **given)
    ids = torch.tensor([[5, 9, 40, 7, 77, 31]])
    model, _ = load(out, dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14 and all(m.inputs is not None for m in layers)
    with torch.no_grad():
        logits = model(ids).logits
        tokens = generate(model, ids, 5)
        again = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        exact = specification(model)(ids).logits
    assert tokens == again[0, 6:].tolist()[: len(tokens)]
    near = 2e-2 if case == "llm.int8" else 2e-3  # LLM.int8() has bitsandbytes' roundings to float16 at run time
    assert torch.allclose(logits, exact, atol=near * float(exact.abs().max()))


def test_static_scales_come_from_the_smoothed_stream(llama, tmp_path):
    """scale * 127 of every layer of the first block is the largest input that the smoothed block saw; nothing else."""
    out = tmp_path / "out"
    api.quantize(llama, out, format="fewbits", dtype="float32", method="smoothquant-static", **QUICK)
    job = api.quantize(llama, tmp_path / "x", format="fewbits", method="smoothquant-static", dry_run=True, **QUICK)
    model, _ = load(out, dtype=torch.float32)
    seen = {}
    for name, m in model.model.layers[0].named_modules():
        if isinstance(m, QuantLinear):
            m.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, float(a[0].abs().max())))
    with torch.no_grad():
        model(job.rows)
    plain = Checkpoint.open(llama).tensor("model.layers.0.input_layernorm.weight")
    assert not torch.allclose(model.model.layers[0].input_layernorm.weight, plain.float(), rtol=0.05)
    for name, m in model.model.layers[0].named_modules():
        if isinstance(m, QuantLinear):
            assert float(m.inputs.scale) * 127 == pytest.approx(seen[name], rel=1e-3)


def test_a_static_layer_takes_no_maximum(llama, tmp_path, monkeypatch):
    api.quantize(llama, tmp_path / "out", format="fewbits", method="smoothquant-static", **QUICK)
    model, _ = load(tmp_path / "out", dtype=torch.float32)
    monkeypatch.setattr(torch.Tensor, "amax", lambda *a, **k: pytest.fail("a maximum was computed"))
    with torch.no_grad():
        model(torch.tensor([[5, 9]]))


def test_static_rules_reach_the_file(llama, tmp_path):
    from dataclasses import replace

    scales = {}
    for rule in ("minmax", "percentile", "mse"):
        scheme = replace(PRESETS["int8-static"], rule=rule, percentile=99.0)
        api.quantize(llama, tmp_path / rule, format="fewbits", method="rtn", bits=8, activations=scheme, **QUICK)
        scales[rule] = Checkpoint.open(tmp_path / rule).tensor("model.layers.0.mlp.down_proj.input_scale")
    assert float(scales["percentile"]) < float(scales["minmax"]) and float(scales["mse"]) <= float(scales["minmax"])


def test_same_bytes_when_the_batches_are_repeated(llama, tmp_path):
    """The stages run again for each layer when memory is short: the stream and the scales are the same."""
    from tests.pipeline.test_quantize import tree

    given = QUICK | {"method": "smoothquant-static", "format": "fewbits"}
    for name, memory in (("a", None), ("b", 20_000)):
        api.quantize(llama, tmp_path / name, max_memory=memory, **given)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_compressed_tensors_says_what_it_holds(llama, tmp_path):
    api.quantize(llama, tmp_path / "a", method="smoothquant-static", **QUICK)
    found = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    group = found["config_groups"]["group_0"]
    assert found["format"] == group["format"] == "int-quantized"
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "dynamic": False,
    }
    stored = Checkpoint.open(tmp_path / "a")
    assert stored.dtype("model.layers.0.mlp.up_proj.weight") == torch.int8
    assert stored.shape("model.layers.0.mlp.up_proj.input_scale") == (1,)


def test_refusals(llama, tmp_path):
    out = tmp_path / "out"
    for change, message in (
        ({"activations": "int9"}, "allowed: int8, int8-static"),
        ({"activations": "int8", "format": "gptq"}, "weights only"),
        ({"activations": "fp8-block", "format": "fewbits"}, "multiples of 128, not 64"),
    ):
        with pytest.raises(RequestError, match=message):
            api.quantize(llama, out, **(QUICK | {"method": "rtn", "group_size": 16} | change))
    assert not out.exists()


def test_activations_that_are_not_finite_are_named(llama, tmp_path):
    """An infinity that appears in row 5 on the way into down_proj of block 1 is found there."""
    events, source = [], Source.open(llama)
    job = api.quantize(llama, tmp_path / "out", format="fewbits", method="w8a8", activations="int8-static",
                       dry_run=True, **QUICK)  # fmt: skip
    job.source, kept = source, source.block

    def block(i, **rest):
        made = kept(i, **rest)
        rows = iter([0])
        if i == 1:

            def poison(module, args, out):
                next(rows, None)
                out = out.clone()
                out[5 % len(out), 3] = float("inf")
                return out

            made.mlp.act_fn.register_forward_hook(poison)
        return made

    source.block = block
    with pytest.raises(FewbitsError, match=r"layers\.1\.mlp\.down_proj: .* row 5, token 3"):
        job.run(tmp_path / "out")
    assert not (tmp_path / "out").exists() and events == []


def test_statistics_are_of_quantized_inputs(llama, tmp_path, monkeypatch):
    """GPTQ at dynamic int4 inputs minimises the error on what the layer will see."""
    from fewbits.pipeline import walk

    seen = []
    monkeypatch.setattr(
        walk.Stats, "update", lambda s, x, *how, plain=Stats.update: (seen.append(x), plain(s, x, *how))[1]
    )
    given = QUICK | {"group_size": 16, "activations": "int4", "bits": 8, "format": "fewbits"}
    api.quantize(llama, tmp_path / "out", method="gptq", **given)
    for x in seen:
        assert torch.allclose(Inputs(PRESETS["int4"])(x), x, atol=1e-5)
