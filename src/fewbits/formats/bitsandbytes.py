"""bitsandbytes checkpoints as transformers writes them: NF4 and FP4 in blocks, and LLM.int8()'s rows.

4 bits, ``n`` weights ``[out, in]`` row by row in ``N`` blocks:

    weight                               uint8   [ceil(n/2), 1]   two codes a byte, the first in the high half
    weight.absmax                        float32 [N]; uint8 [N] with double quantization
    weight.quant_map                     float32 [16]             the table
    weight.nested_absmax                 float32 [ceil(N/256)]    with double quantization, and
    weight.nested_quant_map              float32 [256]            its table
    weight.quant_state.bitsandbytes__nf4 uint8   [bytes]          JSON: block size, shape, dtype, offset; or ...__fp4

8 bits: ``weight`` int8 ``[out, in]``, ``SCB`` float32 ``[out]`` (absolute maxima, not scales), ``weight_format`` uint8
``[]``, 0 for "row by row".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.activations import Activations, Inputs
from fewbits.errors import CheckpointError, RequestError
from fewbits.formats import common
from fewbits.formats.base import Entry, Refusal
from fewbits.grids import Params, Table, Vectorwise, groups_of
from fewbits.grids.codebook import codebook
from fewbits.grids.double import BLOCK, dynamic_map
from fewbits.tensor import Quantized

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = ("nf4", "fp4")
DTYPES = ("float32", "float16", "bfloat16")
_STATE = "weight.quant_state.bitsandbytes__"
_SHARED = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}
_LONGEST = 4096  # bytes of JSON; real ones have less than 200
_THRESHOLD = 6.0


@dataclass(frozen=True)
class BitsAndBytes:
    """``dtype`` is that of the model, in which bitsandbytes computes. How a module is stored is said by its tensors.

    Layers of int8 rows take their inputs vector-wise in int8, but for columns that reach ``threshold``.
    """

    dtype: str = "float16"
    threshold: float = _THRESHOLD

    name: ClassVar[str] = "bitsandbytes"
    scale_dtype: ClassVar[str | None] = None
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"weight", "SCB", "weight_format", *(_STATE + t for t in TYPES)}
        | {f"weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    )

    def check(self, entries: Sequence[Entry]) -> list[Refusal]:
        found = [Refusal(e.name, reason) for e in entries if e.grid is not None for reason in _reasons(e)]
        kinds = {e.name: _kind(e.grid) for e in entries if isinstance(e.grid, (Table, Vectorwise))}
        usual = max(set(kinds.values()), key=list(kinds.values()).count, default=None)
        reason = "all modules must have the same codebook and nesting; use format fewbits"
        return found + [Refusal(name, reason) for name, kind in kinds.items() if kind != usual]

    def activations(self, e: Entry) -> str | None:
        """Why the inputs of an entry cannot be described: they are what bitsandbytes does, or nothing."""
        if isinstance(e.grid, Vectorwise) and e.activations == _inputs(e.activations.outliers if e.activations else 0):
            return None
        return "its inputs stay in 16 bits, but for those of --method llm.int8; use format fewbits"

    def pack(self, name: str, q: Quantized) -> dict[str, Tensor]:
        """See the file's head. Raises RequestError when ``q`` is not what :meth:`check` let through."""
        residual = type(q.residual).__name__ if q.residual else None
        if reasons := list(_reasons(Entry(name, q.shape, q.grid, "g_idx" in q.params, residual))):
            raise RequestError(f"{name}: format bitsandbytes cannot store it: {reasons[0]}")
        want = q.grid.blocks(q.shape) if isinstance(q.grid, Table) else (q.shape[0], 1)
        if (shape := tuple(q.params["absmax"].shape)) != want:
            raise RequestError(f"{name}: absmax of shape {shape} does not fit the grid; expected {want}")
        packed = _pack_rows(q) if isinstance(q.grid, Vectorwise) else _pack_blocks(q, self.dtype)
        return {f"{name}.{suffix}": t for suffix, t in packed.items()}

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> Quantized:
        if "SCB" not in tensors:
            return _unpack_blocks(name, tensors)
        return replace(_unpack_rows(name, tensors), inputs=Inputs(_inputs(self.threshold)))

    def config(self, entries: Sequence[Entry]) -> dict[str, Any]:
        grid = next((e.grid for e in entries if e.grid is not None), None)
        table = grid if isinstance(grid, Table) else None
        dense = [e.name for e in entries if e.grid is None]
        thresholds = [e.activations.outliers for e in entries if e.activations is not None]
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": table is not None,
            "_load_in_8bit": table is None,
            "load_in_4bit": table is not None,
            "load_in_8bit": table is None,
            "bnb_4bit_quant_type": table.codebook if table else "fp4",
            "bnb_4bit_use_double_quant": table.nested if table else False,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": thresholds[0] if thresholds else _THRESHOLD,
            "llm_int8_skip_modules": [*dense, "lm_head"] if dense else None,  # None leaves out lm_head alone
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    def files(self, entries: Sequence[Entry]) -> dict[str, str]:
        return {}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> BitsAndBytes:
        for key in ("load_in_4bit", "load_in_8bit"):
            common.setting(config, (key,), common.is_flag, False)
        # What is computed in does not concern the numbers; bitsandbytes knows more dtypes than it stores.
        dtype = config.get("bnb_4bit_compute_dtype")
        threshold = common.setting(config, ("llm_int8_threshold",), _is_threshold, _THRESHOLD)
        return cls(dtype if dtype in DTYPES else "float32", float(threshold))


def _inputs(threshold: float) -> Activations:
    return Activations("int8", outliers=threshold)


def _is_threshold(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _kind(grid: Table | Vectorwise) -> tuple[Any, ...]:
    return (grid.codebook, grid.nested) if isinstance(grid, Table) else ("int8",)


def _reasons(e: Entry) -> Iterator[str]:
    grid = e.grid
    if e.residual is not None:
        yield f"it has no place for a {e.residual} part beside the codes; use format fewbits"
    if e.scattered:
        yield "blocks must be consecutive columns (no activation order with g_idx); use static groups or format fewbits"
    if isinstance(grid, Table):
        if grid.codebook not in TYPES:
            yield f"its tables are {' and '.join(TYPES)}, not {grid.codebook}; use format fewbits"
        if grid.group not in BLOCKS:
            yield f"its blocks are {', '.join(map(str, BLOCKS))} long, not {grid.group}; use format fewbits"
    elif not isinstance(grid, Vectorwise):
        yield (
            f"it stores the tables nf4 and fp4 and LLM.int8() rows, not {type(grid).__name__}; "
            "use --method nf4 or llm.int8, or another format"
        )


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def _pack_blocks(q: Quantized, dtype: str) -> dict[str, Tensor]:
    grid: Table = q.grid  # type: ignore[assignment]
    codes = torch.nn.functional.pad(q.codes.reshape(-1), (0, q.codes.numel() % 2)).view(-1, 2)
    state: dict[str, Any] = {"quant_type": grid.codebook, "blocksize": grid.group, "dtype": dtype}
    state["shape"] = list(q.shape)
    found = {
        "weight": (codes[:, :1] << 4) | codes[:, 1:],
        "weight.absmax": q.params["absmax"].reshape(-1).clone(),
        "weight.quant_map": codebook(grid.codebook).values.clone(),
    }
    if grid.nested:
        found |= {"weight.nested_absmax": q.params["nested"].clone()}
        found |= {"weight.nested_quant_map": dynamic_map().values.clone()}
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": q.params["offset"].item()}
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return found | {_STATE + grid.codebook: text}


def _unpack_blocks(name: str, tensors: Mapping[str, Tensor]) -> Quantized:
    state, nested = _state(name, tensors)
    grid, shape = Table(state["quant_type"], state["blocksize"], nested), (state["shape"][0], state["shape"][1])
    count, blocks = math.prod(shape), grid.blocks(shape)
    packed = tensors.get("weight")
    if packed is None or not packed.is_contiguous() or packed.numel() * packed.itemsize != -(-count // 2):
        held = "nothing" if packed is None else f"{packed.numel() * packed.itemsize} bytes"
        raise CheckpointError(f"tensor {name}.weight holds {held}; {shape[0]} x {shape[1]} codes are {-(-count // 2)}")
    pairs = packed.reshape(-1).view(torch.uint8)  # some store the bytes under a float dtype
    codes = torch.stack([pairs >> 4, pairs & 15], 1).view(-1)[:count].view(shape)
    _map(name, tensors, "weight.quant_map", codebook(grid.codebook).values)
    dtype = torch.uint8 if nested else torch.float32
    absmax = common.tensor(name, tensors, "weight.absmax", (dtype,), (math.prod(blocks),))
    params: Params = {"absmax": absmax.reshape(blocks)}
    if nested:
        groups = groups_of(absmax.numel(), BLOCK)
        _map(name, tensors, "weight.nested_quant_map", dynamic_map().values)
        found = common.tensor(name, tensors, "weight.nested_absmax", (torch.float32,), (groups,))
        params["nested"] = common.finite(name, "weight.nested_absmax", found)
        params["offset"] = torch.tensor([state["nested_offset"]], dtype=torch.float32)
    else:
        common.finite(name, "weight.absmax", absmax)
    return Quantized(grid, codes, params)


def _state(name: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], bool]:
    """The JSON of a module, every field of it sound, and whether it has double quantization."""
    keys = [_STATE + t for t in TYPES if _STATE + t in tensors]
    if len(keys) != 1:
        raise CheckpointError(f"{name} has {len(keys)} tensors {_STATE}*; expected one for nf4 or fp4")
    stored = common.tensor(name, tensors, keys[0], (torch.uint8,), None)
    try:
        state = json.loads(bytes(stored.reshape(-1)[: _LONGEST + 1].tolist())) if stored.numel() <= _LONGEST else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"tensor {name}.{keys[0]} holds no JSON object; the checkpoint is damaged")
    nested = "weight.nested_absmax" in tensors
    wanted = _SHARED | _NESTED if nested else _SHARED
    if set(state) != wanted:
        odd = sorted(map(str, set(state) ^ wanted))[0][:80]
        raise CheckpointError(f"tensor {name}.{keys[0]}: field {odd!r} is {'extra' if odd in state else 'missing'}")
    checks: dict[str, bool] = {
        "quant_type": keys[0] == _STATE + str(state["quant_type"]),
        "blocksize": type(state["blocksize"]) is int and state["blocksize"] in BLOCKS,
        "dtype": state["dtype"] in DTYPES if isinstance(state["dtype"], str) else False,
        "shape": _is_shape(state["shape"]),
    }
    if nested:
        checks["nested_blocksize"] = state["nested_blocksize"] == BLOCK
        checks["nested_dtype"] = state["nested_dtype"] == "float32"
        checks["nested_offset"] = type(state["nested_offset"]) in (float, int) and _is_float32(state["nested_offset"])
    for field, sound in checks.items():
        if not sound:
            raise CheckpointError(f"tensor {name}.{keys[0]} says {field} = {repr(state[field])[:80]}, which cannot be")
    return state, nested


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and 0 < v < 2**31 for v in value)


def _is_float32(value: float) -> bool:
    return abs(value) <= torch.finfo(torch.float32).max


def _map(name: str, tensors: Mapping[str, Tensor], suffix: str, table: Tensor) -> None:
    """bitsandbytes' CPU code takes its own table whatever is stored, so another one would be read in two ways."""
    stored = common.tensor(name, tensors, suffix, (torch.float32,), tuple(table.shape))
    if not torch.allclose(stored, table, rtol=0, atol=1e-6):
        raise CheckpointError(f"tensor {name}.{suffix} is not bitsandbytes' own table; such checkpoints cannot be read")


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def _pack_rows(q: Quantized) -> dict[str, Tensor]:
    return {
        "weight": (q.codes ^ 128).view(torch.int8),
        "SCB": q.params["absmax"].reshape(-1).clone(),
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }


def _unpack_rows(name: str, tensors: Mapping[str, Tensor]) -> Quantized:
    weight = common.tensor(name, tensors, "weight", (torch.int8,), None)
    if weight.ndim != 2:
        raise CheckpointError(f"tensor {name}.weight must be a matrix; the checkpoint is damaged")
    absmax = common.tensor(name, tensors, "SCB", (torch.float32,), (len(weight),))
    order = tensors.get("weight_format")
    if order is not None and (order.numel() != 1 or int(order) != 0):
        raise CheckpointError(
            f"tensor {name}.weight_format says {order.reshape(-1)[:4].tolist()}; readable: 0, by rows"
        )
    params = {"absmax": common.finite(name, "SCB", absmax).reshape(-1, 1)}
    return Quantized(Vectorwise(), weight.contiguous().view(torch.uint8) ^ 128, params)
