"""Loading a checkpoint, dense or quantized."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import CheckpointError, FewbitsError
from fewbits.formats import gguf, gguf_import
from fewbits.model import locate
from fewbits.storage import Checkpoint


def load(
    path: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a transformers directory, a hub id or a GGUF file, dense or in any layout that fewbits
    reads.

    ``dtype`` is that of dense tensors and activations, by default the checkpoint's; ``device`` by default the CPU. The
    model is a transformers model in eval mode, with QuantLinear layers where the checkpoint is quantized; the tokenizer
    is None when the directory has none. Raises RequestError when there is nothing to load, CheckpointError when tensors
    are missing, left over, misshapen or damaged.
    """
    with _no_collection():
        file = gguf_file(path)
        return _load(path, dtype, device) if file is None else _load_gguf(file, dtype, device)


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that ``path`` means: itself, or the only kind of weights in a directory; None for anything else."""
    path = Path(path)
    if path.suffix == ".gguf":
        return path
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return next(iter(sorted(path.glob("*.gguf"))), None)
    return None


def _load_gguf(file: Path, dtype: torch.dtype | str | None, device: torch.device | str | None) -> tuple[Any, Any]:
    """Decoded into a directory that is gone once the model is in memory; in ``dtype``, by default float32."""
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "", torch.float32)
    with tempfile.TemporaryDirectory(prefix="fewbits-gguf-") as folder:
        return _load(gguf_import.convert(file, Path(folder), wanted), wanted, device)


def gguf_tokenizer(file: gguf.File) -> Any:
    """The tokenizer of a GGUF file as transformers', without its weights; None when it has none."""
    with tempfile.TemporaryDirectory(prefix="fewbits-gguf-") as folder:
        gguf_import.write_tokenizer(file, Path(folder))
        return _tokenizer(Path(folder))


def _load(path: str | Path, dtype: torch.dtype | str | None, device: torch.device | str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    import fewbits.runtime.plugin  # noqa: F401 - registers itself

    model: Any
    info: Any

    folder = locate.directory(path)
    config = locate.config(folder, locate.read_config(folder), trust_remote_code=False)
    Checkpoint.open(folder)  # headers that lie are named here, before anything is read
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                folder,
                config=config,
                dtype="auto" if dtype is None else dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except FewbitsError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, ImportError) as e:
        raise CheckpointError(f"{folder} cannot be loaded: {locate.first_line(e)}") from e
    _require_complete(folder, info)
    return model.to(device or "cpu").eval(), _tokenizer(folder)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the cyclic collector: it would walk the many objects of transformers' modules again and again, which
    takes a fifth of the time to load a small model, and finds nothing."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of tensors and progress bar: what is wrong is raised instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _require_complete(folder: Path, info: dict[str, Any]) -> None:
    for what in ("missing", "mismatched", "unexpected"):
        names = sorted(str(n[0] if isinstance(n, tuple) else n) for n in info.get(f"{what}_keys") or ())
        if names:
            more = "" if len(names) == 1 else f" and {len(names) - 1} more"
            raise CheckpointError(
                f"{folder}: {what} tensor {names[0]}{more}; the checkpoint does not fit its config.json"
            )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    known = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in known):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # tokenizers raise exceptions of many kinds
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {locate.first_line(e)}") from e
