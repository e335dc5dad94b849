"""The transformers plug-in: ``from_pretrained`` loads every layout that fewbits writes.

Importing this file adds the method ``fewbits`` to transformers and takes the place of its readers of ``gptq``,
``awq`` and ``compressed-tensors``. A configuration goes to fewbits when it says weight-only integers, which it runs
from C++ on any CPU; others, and models for a CUDA device whose own kernels are installed, go where they went before.
``FEWBITS_PLUGIN=0`` leaves those three alone, ``FEWBITS_PLUGIN=1`` takes them whatever is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbits import formats
from fewbits.errors import FewbitsError, RequestError
from fewbits.runtime import place
from fewbits.storage import Checkpoint

FOREIGN = {
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
}
"""Methods that transformers loads itself, as it names them, and the package with which it runs them."""


class FewbitsConfig(QuantizationConfigMixin):
    """A ``quantization_config`` exactly as it stands in config.json."""

    def __init__(self, **raw: Any):
        self.quant_method: Any = "fewbits"
        self.raw = raw

    def to_dict(self) -> dict[str, Any]:
        return dict(self.raw)


class FewbitsQuantizer(HfQuantizer):
    """Replaces linear layers before transformers loads the dense tensors, and fills them afterwards."""

    requires_calibration = True

    def __init__(self, quantization_config: FewbitsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.layout = formats.detect(quantization_config.raw)
        self._checkpoint: Checkpoint | None = None
        self._placed: list[place.Placed] = []

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not checkpoint_files:
            raise RequestError("a quantized model is loaded from its directory; a state_dict alone is not enough")
        self._checkpoint = _open(checkpoint_files)
        self._placed = place.place(model, self._checkpoint, self.layout)
        suffixes = "|".join(map(re.escape, sorted(self.layout.suffixes - {"weight"})))
        ignored = {rf"\.({suffixes})$"}  # every one of them has its layer, else `place` had raised
        if named := [re.escape(p.module) for p in self._placed if "weight" in p.suffixes]:
            ignored.add(rf"^({'|'.join(named)})\.weight$")
        if any(".experts." in p.module for p in self._placed):
            ignored.add(r"\.experts\.")  # transformers would stack them; they are ours
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._checkpoint is not None
        place.fill(self._placed, self._checkpoint, self.layout)
        self._checkpoint, self._placed = None, []
        return model

    def is_serializable(self) -> bool:
        """Always raises: packed layers do not go back to disk."""
        raise RequestError(
            "a loaded quantized model cannot be saved; copy its checkpoint directory, or use `fewbits convert`"
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the layers can be trained: the layers hand gradients through to their inputs."""
        return True


class _Route:
    """Stands for a configuration class of transformers and decides who reads a configuration."""

    def __init__(self, method: str, original: Any):
        self.method, self.original = method, original

    def from_dict(self, config: Mapping[str, Any], **kwargs: Any) -> Any:
        if not takes(self.method, config):
            return self.original.from_dict(config, **kwargs)
        return FewbitsConfig(**config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def takes(method: str, config: Mapping[str, Any]) -> bool:
    """Whether fewbits loads a model with this configuration."""
    wanted = os.environ.get("FEWBITS_PLUGIN", "auto")
    if wanted == "0":
        return False
    if wanted != "1" and torch.cuda.is_available() and importlib.util.find_spec(FOREIGN[method]) is not None:
        return False
    try:
        formats.detect(dict(config) | {"quant_method": method.partition("_")[0]})
    except FewbitsError:
        return False
    return True


def _register() -> None:
    """Make transformers use fewbits; calling it again changes nothing."""
    if "fewbits" in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config("fewbits")(FewbitsConfig)
    auto.register_quantizer("fewbits")(FewbitsQuantizer)
    configs: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method in FOREIGN:
        if method in configs:
            configs[method] = _Route(method, configs[method])


def _open(files: Any) -> Checkpoint:
    paths = [Path(f) for f in files]
    return Checkpoint.open(paths[0] if len(paths) == 1 else paths[0].parent)


_register()
