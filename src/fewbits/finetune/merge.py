"""An adapter taken up by its base: ``W + scale * B A`` of the dequantized weights, as a dense checkpoint.

That is the model that was trained, in another form: its logits are those of base and adapter. Rounding it again is
another matter, which is to be measured (``fewbits merge``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.errors import CheckpointError, RequestError
from fewbits.finetune.adapter import QuantLora, load_adapter, read_config
from fewbits.finetune.model import BASE
from fewbits.runtime import QuantLinear, load

REQUEST = "finetune.json"


def base_of(adapter: str | Path) -> str:
    """The base that an adapter was trained on: the checkpoint beside it, else the model that it names."""
    path, named = Path(adapter), read_config(adapter).base_model_name_or_path
    if (path / BASE / "config.json").is_file():
        return str(path / BASE)
    if not named:
        raise RequestError(f"{adapter} does not name its base; give --base")
    return str(named)


def text_of(adapter: str | Path) -> str | None:
    """The plain text that an adapter was trained on, where it was one and is still there."""
    file = Path(adapter) / REQUEST
    data = json.loads(file.read_text()).get("data") if file.is_file() else None
    if data is None or Path(data).suffix in (".jsonl", ".parquet"):
        return None
    return str(data) if Path(data).is_file() or Path(data).suffix == "" else None


def merge_dense(adapter: str | Path, out: str | Path, base: str | None = None) -> Path:
    """Write base and adapter as one dense checkpoint in float32 into directory ``out``, and return it.

    Needs the memory of the dense model. Raises RequestError, CheckpointError.
    """
    model, tokenizer = load(base or base_of(adapter), dtype=torch.float32)
    tuned = load_adapter(model, adapter)
    merged = _plain(tuned)
    merged.save_pretrained(str(out))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(out))
    return Path(out)


@torch.no_grad()
def _plain(tuned: Any) -> Any:
    """The model of transformers without adapters or quantized layers."""
    name = tuned.active_adapter
    for path, module in list(tuned.named_modules()):
        if isinstance(module, QuantLora):
            _replace(tuned, path, _linear(module.get_base_layer(), _merged(module, name, path)))
    model = tuned.merge_and_unload(safe_merge=True)  # what peft knows: adapters of layers that were dense
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            _replace(model, path, _linear(module, module.dequantize()))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model


def _merged(module: Any, name: str, path: str) -> torch.Tensor:
    weight: torch.Tensor = module.get_base_layer().dequantize()
    variant = module.lora_variant.get(name)
    if variant is None:
        merged = weight + module.get_delta_weight(name).to(weight.dtype)
    else:
        merged = variant.merge_safe(module, name, weight)
    if not bool(torch.isfinite(merged).all()):
        raise CheckpointError(f"the adapter makes {path} infinite or NaN; train it again with a lower rate")
    return merged


def _linear(layer: QuantLinear, weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return made


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
