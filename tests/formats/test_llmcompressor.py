"""llm-compressor's round to nearest, in ``FEWBITS_LLMCOMPRESSOR_PYTHON`` (a Python that has it): our bytes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

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
SCRIPT = """
import sys, torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, out, *schemes = sys.argv[1:]
for scheme in schemes:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    oneshot(model=model, recipe=[QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])])
    model.save_pretrained(f"{out}/{scheme}", save_compressed=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llmcompressor")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    tiny_tokenizer(tiny_model("llama", path / "source", **shape))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(PYTHON), "-c", SCRIPT, str(path / "source"), str(path / "theirs"), *SCHEMES]
    subprocess.run(command, check=True, timeout=900, env=env)
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_byte_is_theirs(folder: Path, scheme: str) -> None:
    out, how = folder / "ours" / scheme, {"dtype": "float32", "format": "compressed-tensors"}
    fewbits.quantize(folder / "source", out, **how, **SCHEMES[scheme])
    a, b = Checkpoint.open(out), Checkpoint.open(folder / "theirs" / scheme)
    assert set(a.names()) == set(b.names())
    for name in a.names():
        x, y = a.tensor(name), b.tensor(name)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)), name
