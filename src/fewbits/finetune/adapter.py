"""Adapters of peft on QuantLinear, through peft's own mechanism for layers that it does not know.

The files are peft's: an adapter trained here loads with plain peft on the dense model, and the other way round.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from fewbits.errors import CheckpointError, RequestError
from fewbits.finetune.base import Adapter
from fewbits.model import is_linear, locate
from fewbits.runtime import QuantLinear


class QuantLora(LoraLinear):
    """peft's LoRA (and DoRA) beside a QuantLinear: the same forward pass; the codes cannot take the adapter up."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises RequestError."""
        raise RequestError("codes cannot be changed in place; `fewbits merge` dequantizes, merges and quantizes again")

    def unmerge(self) -> None:
        """Nothing was merged."""


def attach(model: Any, adapter: Adapter, source: str, seed: int) -> Any:
    """``model`` with new adapters as a PeftModel, everything else frozen. ``source`` is written down as the base."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=source,
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        bias="none",
        target_modules=targets(model, adapter.targets),
    )
    config._register_custom_module({QuantLinear: QuantLora})
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # about a layer that peft does not know, and the base's name
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        found = get_peft_model(model, config)
    found.peft_config["default"].base_model_name_or_path = source
    return found


def load_adapter(model: Any, path: str | Path) -> Any:
    """``model``, dense or quantized, with the adapter in directory ``path`` (peft's files), in eval mode.

    Raises RequestError when there is no adapter, CheckpointError when it does not fit the model.
    """
    config = read_config(path)
    config._register_custom_module({QuantLinear: QuantLora})
    try:
        return PeftModel.from_pretrained(model, str(path), config=config).eval()
    except (RuntimeError, ValueError, KeyError) as e:
        raise CheckpointError(f"the adapter {path} does not fit the model: {locate.first_line(e)}") from e


def read_config(path: str | Path) -> Any:
    """peft's configuration of an adapter directory. Raises RequestError, CheckpointError."""
    if not (Path(path) / "adapter_config.json").is_file():
        raise RequestError(f"{path} holds no adapter_config.json; give the directory of an adapter")
    try:
        config = LoraConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError) as e:
        raise CheckpointError(f"{path}/adapter_config.json cannot be read: {locate.first_line(e)}") from e
    if not isinstance(config, LoraConfig):
        raise RequestError(f"{path} is an adapter of kind {type(config).__name__}; only LoRA and DoRA are known here")
    return config


def targets(model: Any, names: tuple[str, ...]) -> list[str]:
    """What ``all-linear`` means, or ``names`` if layers have them: last names where these mean linear layers of the
    blocks and nothing else, else whole paths. Raises RequestError.
    """
    head = model.get_output_embeddings()
    linear = {n for n, m in model.named_modules() if m is not head and (isinstance(m, QuantLinear) or is_linear(m))}
    leaves = {n.rpartition(".")[2] for n in linear}
    if names != ("all-linear",):
        if unknown := sorted(set(names) - leaves):
            raise RequestError(
                f"--targets {unknown[0]!r} is no linear layer; allowed: all-linear, {', '.join(sorted(leaves))}"
            )
        return sorted(names)
    ambiguous = any(n.rpartition(".")[2] in leaves and n not in linear for n, _ in model.named_modules())
    return sorted(linear if ambiguous else leaves)


def trainable(model: nn.Module) -> int:
    """Number of parameters that get gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
