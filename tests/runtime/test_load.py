"""Every layout and family through fewbits.load and through transformers' own from_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbits
from fewbits import storage
from fewbits.errors import CheckpointError, RequestError
from fewbits.grids import Int
from fewbits.runtime import QuantLinear
from tests.runtime.rtn import twin, write_rtn
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

GRIDS = {
    "fewbits": Int(3, 32),
    "gptq": Int(4, 32),
    "awq": Int(4, 32),
    "compressed-tensors": Int(4, 32, symmetric=True, scale="float32"),
}
IDS = torch.arange(3, 27).view(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def oracle(path: Path) -> torch.Tensor:
    """Logits of transformers' dense model, which knows nothing of ours."""
    return logits(AutoModelForCausalLM.from_pretrained(twin(path)))


@pytest.mark.parametrize("layout", GRIDS)
def test_from_pretrained_and_load_equal_the_dense_twin(tmp_path: Path, layout: str) -> None:
    path = write_rtn(tiny_model("llama", tmp_path / "src"), tmp_path / "q", layout, GRIDS[layout])
    want = oracle(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14 and not any(isinstance(m, torch.nn.Linear) for m in model.model.modules())
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    loaded, tokenizer = fewbits.load(path)
    assert tokenizer is None and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight  # tied
    mapped = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    assert torch.equal(logits(mapped), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    path = write_rtn(tiny_model(family, tmp_path / "src"), tmp_path / "q", "fewbits", Int(4, 32))
    model, _ = fewbits.load(path)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    torch.testing.assert_close(logits(model), oracle(path), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", GRIDS)
def test_generate(tmp_path: Path, layout: str) -> None:
    path = write_rtn(tiny_model("qwen3", tmp_path / "src"), tmp_path / "q", layout, GRIDS[layout])
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model, _ = fewbits.load(path)
    dense = AutoModelForCausalLM.from_pretrained(twin(path))
    assert torch.equal(model.generate(IDS, **kwargs), dense.generate(IDS, **kwargs))


def test_bfloat16(tmp_path: Path) -> None:
    path = write_rtn(tiny_model("llama", tmp_path / "src"), tmp_path / "q", "gptq", GRIDS["gptq"], torch.bfloat16)
    model, _ = fewbits.load(path)
    assert model.dtype == torch.bfloat16
    full, _ = fewbits.load(path, dtype=torch.float32)
    assert full.dtype == torch.float32
    torch.testing.assert_close(logits(model).float(), logits(full), rtol=0.1, atol=0.1)


def test_dense_models_load_too(tmp_path: Path) -> None:
    path = tiny_model("mistral", tmp_path / "src")
    tiny_tokenizer(path)
    model, tokenizer = fewbits.load(path)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(path)))
    assert tokenizer("the dog")["input_ids"]


def test_saving_a_loaded_model_says_what_to_do(tmp_path: Path) -> None:
    path = write_rtn(tiny_model("llama", tmp_path / "src"), tmp_path / "q", "gptq", GRIDS["gptq"])
    model, _ = fewbits.load(path)
    with pytest.raises(RequestError, match="copy its checkpoint"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.scale"), "q_proj.scale is missing"),
        (lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unexpected tensor extra"),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.codes": torch.ones(2)}), "no linear layer of that name"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "norm.weight"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, edit, message: str) -> None:
    path = write_rtn(tiny_model("llama", tmp_path / "src"), tmp_path / "q", "fewbits", Int(4, 32))
    file = storage.Checkpoint.open(path)
    tensors = {n: file.tensor(n).clone() for n in file.names()}
    edit(tensors)
    storage.save(path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        fewbits.load(path)


def test_import_is_light_and_the_hook_works() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import fewbits; t = time.perf_counter() - t\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules and t < 0.3, t\n"
        "from transformers.quantizers import auto; assert 'fewbits' in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert sum(type(f).__module__ == 'fewbits.runtime.hook' for f in sys.meta_path) == 0\n"
        "import fewbits.evaluate.api; assert callable(fewbits.evaluate) and callable(fewbits.load)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_others_keep_what_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.runtime import plugin

    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    fp8 = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    assert plugin.takes("gptq", gptq) and not plugin.takes("compressed-tensors", fp8)
    monkeypatch.setenv("FEWBITS_PLUGIN", "0")
    assert not plugin.takes("gptq", gptq)


def test_config_is_kept_as_written(tmp_path: Path) -> None:
    path = write_rtn(tiny_model("llama", tmp_path / "src"), tmp_path / "q", "gptq", GRIDS["gptq"])
    model, _ = fewbits.load(path)
    written = json.loads((path / "config.json").read_text())["quantization_config"]
    assert model.config.to_dict()["quantization_config"] == written
