"""From what the user gave to a directory, a config and a model without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.errors import CheckpointError, FetchError, RequestError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


def directory(source: str | Path) -> Path:
    """The local directory of a model; a hub id is downloaded (safetensors and text files only).

    Raises RequestError when there is no such directory or hub model, FetchError when the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise RequestError(f"{source} is a file; give the directory that holds config.json and the safetensors files")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source) or Path(source).suffix in (".gguf", ".safetensors"):
        raise RequestError(f"no such directory: {source}; give a transformers directory or a hub id such as org/name")
    return _download(source)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except RepositoryNotFoundError as e:
        raise RequestError(f"{name} is neither a directory nor a model on the hub (or it is private)") from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, RuntimeError) as e:
        raise FetchError(
            f"{name} is not a directory here and the hub cannot be reached ({first_line(e)}); "
            "give a directory, or try again with a network"
        ) from e


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is. Raises RequestError when it is missing, CheckpointError when it is damaged."""
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path} has no config.json; give a directory that transformers can load") from None
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{file} cannot be read: {first_line(e)}") from e
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return raw


def config(path: Path, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    """Transformers' config object. Raises RequestError for code of the model's own and for anything but a causal LM."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        own = ", and code that comes with a model is not run" if "auto_map" in raw else ""
        raise RequestError(f"{path}: model type {model_type!r} is not known to this version of transformers{own}")
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:  # a config class checks its fields with exceptions of many kinds
        raise CheckpointError(f"{path}/config.json is not valid: {first_line(e)}") from e
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise RequestError(f"{path}: {model_type!r} is not a causal language model")
    return found


def skeleton(config: Any) -> nn.Module:
    """Transformers' model on the meta device: no weights, no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model.eval()


def find_blocks(model: nn.Module) -> str:
    """Path of the list of decoder blocks. Raises RequestError when the decoder has none."""
    decoder = model.get_decoder()  # type: ignore[operator]
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    inside = {id(m) for m in decoder.modules()}
    for name, module in model.named_modules():
        if id(module) in inside and isinstance(module, nn.ModuleList) and len(module) == count > 0:
            return name
    raise RequestError(f"{type(model).__name__} has no list of {count} decoder blocks; it cannot be quantized")


def renaming(model: nn.Module) -> Callable[[str], str]:
    """Transformers' own renaming of a checkpoint's names for this model (not its conversions of tensors)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    steps = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]  # type: ignore[arg-type]

    def rename(name: str) -> str:
        for step in steps:
            name, _ = step.rename_source_key(name)
        return name

    return rename


def first_line(e: BaseException) -> str:
    """The first line of an error's message, for messages of one line."""
    lines = str(e).strip().splitlines()
    return lines[0][:300] if lines else type(e).__name__
