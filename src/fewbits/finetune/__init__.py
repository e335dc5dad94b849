"""Fine-tuning on few bits: adapters on a frozen quantized base (QLoRA), paged optimizer states, merging; training of
the quantized model itself (QAT).

Imports nothing until it is asked to: peft and transformers' Trainer are heavy, and optional.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.finetune.adapter import load_adapter
    from fewbits.finetune.api import finetune
    from fewbits.finetune.base import Adapter, Qat, Result, Rows, Training
    from fewbits.finetune.merge import merge_dense
    from fewbits.finetune.paged import PagedAdamW

__all__ = ["Adapter", "PagedAdamW", "Qat", "Result", "Rows", "Training", "finetune", "load_adapter", "merge_dense"]

_HOMES = {
    "finetune": "api",
    "Adapter": "base",
    "Qat": "base",
    "Result": "base",
    "Rows": "base",
    "Training": "base",
    "load_adapter": "adapter",
    "merge_dense": "merge",
    "PagedAdamW": "paged",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fewbits.finetune.{_HOMES[name]}"), name)
