"""llm-compressor's round to nearest, in ``FEWBITS_LLMCOMPRESSOR_PYTHON`` (a Python that has it): our bytes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fewbits
from fewbits.storage import Checkpoint
from tests.tiny import tiny_model, tiny_tokenizer

PYTHON = os.environ.get("FEWBITS_LLMCOMPRESSOR_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="set FEWBITS_LLMCOMPRESSOR_PYTHON to a Python that has llm-compressor"),
]
SCHEMES = {
    "W8A8": {"method": "w8a8"},
    "FP8_DYNAMIC": {"method": "fp8", "activations": "fp8"},
    "FP8_BLOCK": {"method": "fp8-block", "activations": "fp8-block"},
    "NVFP4A16": {"method": "nvfp4"},
    "MXFP4A16": {"method": "mxfp4"},
    "MXFP8A16": {"method": "mxfp8"},
}
STATIC = {"FP8": {"method": "fp8-tensor", "activations": "fp8-static"}}
IDS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))
SCRIPT = """
import sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, out, ids, *schemes = sys.argv[1:]
ids = torch.load(ids).tolist()
data = dict(dataset=Dataset.from_list([dict(input_ids=row, attention_mask=[1] * len(row)) for row in ids]))
data |= dict(max_seq_length=16, num_calibration_samples=len(ids), shuffle_calibration_samples=False)
for scheme in schemes:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    recipe = [QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])]
    oneshot(model=model, recipe=recipe, **(data if scheme == "FP8" else {}))
    model.save_pretrained(f"{out}/{scheme}", save_compressed=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llmcompressor")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    tiny_tokenizer(tiny_model("llama", path / "source", **shape))
    torch.save(IDS, path / "ids.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [
        str(PYTHON),
        "-c",
        SCRIPT,
        str(path / "source"),
        str(path / "theirs"),
        str(path / "ids.pt"),
        *SCHEMES,
        *STATIC,
    ]
    subprocess.run(command, check=True, timeout=900, env=env)
    return path


def largest_inputs(path: Path) -> dict[str, torch.Tensor]:
    """What each layer of a checkpoint sees of the calibration rows, by name."""
    model, _ = fewbits.load(path, dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        found[name] = x.abs().max()

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
    with torch.no_grad():
        model(IDS)
    return found


@pytest.mark.parametrize("scheme", [*SCHEMES, *STATIC])
def test_every_byte_is_theirs(folder: Path, scheme: str) -> None:
    """All but static scales of inputs: they calibrate them in the original model, we behind layers that are quantized
    already, which is what the layer will see. Both are held to that.
    """
    save_file({"ids": IDS}, folder / "ids.safetensors")
    how: dict[str, Any] = {"dtype": "float32", "format": "compressed-tensors", "compute": "fp32"}
    how |= {"calibration": folder / "ids.safetensors", "samples": 4, "seq_len": 16}
    out = folder / "ours" / scheme
    fewbits.quantize(folder / "source", out, **how, **(SCHEMES | STATIC)[scheme])
    a, b = Checkpoint.open(out), Checkpoint.open(folder / "theirs" / scheme)
    assert set(a.names()) == set(b.names())
    static = [largest_inputs(p) for p in (out, folder / "source")] if scheme in STATIC else []
    for name in a.names():
        x, y = a.tensor(name), b.tensor(name)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        if name.endswith("input_scale"):
            layer = name.removesuffix(".input_scale")
            for scale, seen in zip((x, y), static, strict=True):
                torch.testing.assert_close(scale[0], seen[layer] / 448, rtol=1e-4, atol=0)
            continue
        assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)), name
