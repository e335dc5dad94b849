"""Quantized checkpoints of nearest codes, and their dense twins, written without the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from fewbits import formats, storage
from fewbits.grids import Int
from fewbits.model import Source
from fewbits.model.base import get_weight, is_transposed
from fewbits.tensor import Quantized


def write_rtn(src: Path, out: Path, layout_name: str, grid: Int, dtype: torch.dtype | None = None) -> Path:
    """Quantize every linear of every block of ``src`` into ``out``; ``out``-dense holds the dequantized model."""
    source = Source.open(src)
    tensors, dense, entries, codes = {}, {}, [], {}
    for i in range(source.n_blocks):
        block = source.block(i)
        linears = source.linears(block)
        for local, module in linears.items():
            w, name = get_weight(module), source.disk_name(i, local)
            params = grid.fit(w)
            q = Quantized(grid, grid.encode(w, params), params)
            entries.append(formats.Entry(name, q.shape, grid))
            codes[name] = q
            dense[f"{name}.weight"] = q.dense().t().contiguous() if is_transposed(module) else q.dense()
        tensors |= source.state(block, i, without=set(linears), dtype=dtype)
    for name in source.outside():
        tensors[name] = source.checkpoint.tensor(name).clone()
    layout = formats.writer(layout_name, entries)
    config = json.loads((src / "config.json").read_text())
    packed: dict[str, Tensor] = {}
    for name, q in codes.items():
        packed |= layout.pack(name, q)
    main = dtype or source.dtype
    tensors = {n: t.to(main) if t.is_floating_point() else t for n, t in tensors.items()}
    config["dtype"] = str(main).removeprefix("torch.")
    _save(src, out, tensors | packed, config | {"quantization_config": layout.config(entries)})
    _save(src, twin(out), tensors | {n: w.to(main) for n, w in dense.items()}, config)
    return out


def twin(path: Path) -> Path:
    """Where the dense model of a checkpoint lies."""
    return path.with_name(path.name + "-dense")


def _save(src: Path, out: Path, tensors: dict[str, Tensor], config: dict) -> None:
    out.mkdir(parents=True)
    storage.save(out / "model.safetensors", tensors)
    (out / "config.json").write_text(json.dumps(config))
    for file in src.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())
