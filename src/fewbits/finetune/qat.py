"""Quantization-aware training: a model is trained as its quantized self, then written as an ordinary checkpoint.

The linear layers of the blocks are :class:`FakeLinear`, their norms are trained too, embeddings and head stay as they
are. Inputs of the layers can be quantized too. The loss is the distance from the original model (LLM-QAT, arXiv
2305.17888) or that of the text. What is written are the codes of the last forward pass: the checkpoint is the trained
model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits import formats, storage
from fewbits.activations import BINS, Activations, Inputs, histogram, static_scale
from fewbits.errors import RequestError
from fewbits.fake import TERNARY, fake_linears, learns, replace_linears
from fewbits.finetune.base import Qat, Training
from fewbits.finetune.data import Row
from fewbits.finetune.model import NAMES, observe
from fewbits.formats import Entry
from fewbits.methods import altered, named
from fewbits.model import Source, is_linear

GRIDS = ("ternary",)
"""Grids that only training makes usable, beside the named ones."""

CALIBRATED = 8
"""Rows from which static scales of inputs begin."""


def grid_of(name: str, how: Qat) -> Any:
    """The grid of a name, with the group size that was asked for. Raises RequestError."""
    grid: Any = TERNARY if name in GRIDS else named(name)
    return grid if how.group_size is None else altered(grid, {"group": how.group_size}, "method 'qat'", name)


def prepare(model: Any, source: Source, grid: Any, how: Qat, rows: Sequence[Row]) -> Any:
    """Make the linear layers of the blocks of ``model`` (float32, dense) trainable on ``grid``. Static scales of inputs
    begin with what the first ``rows`` show.

    Raises Refused, RequestError before any work when the format cannot store the result.
    """
    names = [name for entries in _places(source).values() for name in entries]
    missing = [n for n in names if not is_linear(_module(model, n))]
    if missing:
        raise RequestError(f"{missing[0]} is no layer of its own in memory (stacked experts); qat needs a dense model")
    formats.writer(how.format, _entries(source, grid, how.activations), NAMES[torch.float32])
    found = {} if how.activations is None else inputs(model, source, how.activations, rows)
    replace_linears(model, names, grid, found)
    model.requires_grad_(False)
    blocks = [model.get_submodule(source.block_prefix(i)) for i in range(source.n_blocks)]
    for block in blocks:
        for p in block.parameters():
            p.requires_grad_(True)
    return model


def inputs(model: Any, source: Source, scheme: Activations, rows: Sequence[Row]) -> dict[str, Inputs]:
    """What becomes of the input of each layer. Static scales that can be learned are parameters of the block; layers
    that read the same input share one, as servers that fuse them do.
    """
    groups = _readers(source)
    if scheme.dynamic:
        return {name: Inputs(scheme) for names in groups.values() for name in names}
    seen = {place: _Magnitudes(scheme) for place in groups}
    watched = {model.get_submodule(names[0]): seen[place].add for place, names in groups.items()}
    observe(model, watched, rows[:CALIBRATED])
    found: dict[str, Inputs] = {}
    for (i, stage), names in groups.items():
        scale = seen[i, stage].scale()
        if learns(scheme):
            scale = nn.Parameter(scale)
            model.get_submodule(source.block_prefix(i)).register_parameter(f"input_scale_{stage}", scale)
        found |= {name: Inputs(scheme, scale) for name in names}
    return found


def write(model: Any, source: Source, grid: Any, how: Qat, out: Path) -> dict[str, Any]:
    """The trained model as a checkpoint in ``out``, where other files may be already."""
    entries = _entries(source, grid, how.activations)
    layout = formats.writer(how.format, entries, NAMES[torch.float32])
    tensors: dict[str, Tensor] = {n: source.checkpoint.tensor(n).clone() for n in source.outside()}
    layers = fake_linears(model)
    for i, places in _places(source).items():
        local = [n.removeprefix(f"{source.block_prefix(i)}.") for n in places]
        block = model.get_submodule(source.block_prefix(i))
        tensors |= source.state(block, i, without=local, dtype=torch.float32)
        for name, disk in places.items():
            tensors |= layout.pack(disk, layers[name].quantized())
    storage.save(out / "model.safetensors", tensors, {"format": "pt"})
    for file in source.copy_files():
        shutil.copy2(file, out / file.name)
    config = dict(source.raw_config) | {"quantization_config": layout.config(entries), "dtype": "float32"}
    config.pop("torch_dtype", None)
    for name, text in layout.files(entries).items():
        (out / name).write_text(text)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    bits = [(q.bits_per_weight(), m.weight.numel()) for m in layers.values() for q in [m.quantized()]]
    return {"bits_per_weight": sum(b * n for b, n in bits) / sum(n for _, n in bits)}


@torch.no_grad()
def generated(model: Any, rows: int, length: int, seed: int) -> list[Row]:
    """Data without data (LLM-QAT, section 3.1): from a random token on, the model goes on by itself: three times the
    likeliest token, then sampled from all of them.
    """
    torch.manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (rows, 1))
    kept = {"min_new_tokens": 1, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    ids = model.generate(ids, do_sample=False, max_new_tokens=min(3, length - 1), **kept)
    if length > ids.shape[1]:
        kept |= {"attention_mask": torch.ones_like(ids), "min_new_tokens": length - ids.shape[1]}
        ids = model.generate(ids, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length - ids.shape[1], **kept)
    positions = torch.arange(ids.shape[1])
    return [Row(row, torch.cat([torch.tensor([-100]), row[1:]]), positions) for row in ids.cpu()]


def count(training: Training) -> int:
    """Rows that are generated: each is seen a few times in long runs."""
    per_step = training.batch * training.accumulate
    return min((training.steps or 256) * per_step, 256)


def _places(source: Source) -> dict[int, dict[str, str]]:
    """For each block the layers that are trained: name in memory, name on disk."""
    found = {}
    for i in range(source.n_blocks):
        local = source.linears(source.skeleton(i))
        found[i] = {f"{source.block_prefix(i)}.{n}": source.disk_name(i, n) for n in local}
    return found


class _Magnitudes:
    """How large the inputs of a layer become: what a static scale is chosen from."""

    def __init__(self, scheme: Activations):
        self.scheme, self.absmax = scheme, torch.zeros(1)
        self.counts = torch.zeros(BINS, dtype=torch.int64) if "histogram" in scheme.needs else None

    def add(self, x: Tensor) -> None:
        self.absmax = torch.maximum(self.absmax, x.abs().amax())
        if self.counts is not None:
            self.counts += histogram(x)

    def scale(self) -> Tensor:
        return static_scale(self.scheme, self.absmax, self.counts)


def _readers(source: Source) -> dict[tuple[int, int], list[str]]:
    """For each block and stage the layers that read the same input, by their names in memory."""
    found = {}
    for i in range(source.n_blocks):
        block = source.skeleton(i)
        linears = source.linears(block)
        for stage, names in enumerate(source.stages(block)):
            if here := [f"{source.block_prefix(i)}.{n}" for n in names if n in linears]:
                found[i, stage] = here
    return found


def _entries(source: Source, grid: Any, scheme: Activations | None) -> list[Entry]:
    found = []
    for i in range(source.n_blocks):
        for local, module in source.linears(source.skeleton(i)).items():
            weight: Any = module.weight
            out, columns = weight.shape if isinstance(module, torch.nn.Linear) else tuple(reversed(weight.shape))
            found.append(Entry(source.disk_name(i, local), (int(out), int(columns)), grid, activations=scheme))
    return found


def _module(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
