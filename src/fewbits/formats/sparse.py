"""Single weights beside the codes, as our layout stores them: SpQR's entries of 32 bits (arXiv 2306.03078, section 5).

``<module>.sparse`` int32 ``[entries]``: the float16 value in the high half, the column in the low half (unsigned);
``<module>.sparse_rows`` int32 ``[out + 1]``: row ``r`` has the entries from ``sparse_rows[r]`` to ``sparse_rows[r +
1]``, columns rising. The value is added to what the codes give.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbits.errors import CheckpointError
from fewbits.formats import common
from fewbits.tensor import Sparse

SUFFIXES = frozenset({"sparse", "sparse_rows"})


def pack(name: str, s: Sparse | None) -> dict[str, Tensor]:
    """The tensors of ``s``; none when nothing is kept."""
    if s is None:
        return {}
    words = s.values.contiguous().view(torch.int16).int() << 16 | s.columns
    return {f"{name}.sparse": words, f"{name}.sparse_rows": s.offsets.contiguous()}


def unpack(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Sparse | None:
    """Inverse of :func:`pack`, ``tensors`` by suffix. Raises CheckpointError for anything that it cannot have made."""
    if not SUFFIXES.intersection(tensors):
        return None
    words = common.tensor(name, tensors, "sparse", (torch.int32,), None)
    offsets = common.tensor(name, tensors, "sparse_rows", (torch.int32,), (shape[0] + 1,))
    counts = offsets.diff()
    if words.ndim != 1 or int(offsets[0]) != 0 or int(counts.min()) < 0 or int(offsets[-1]) != len(words):
        raise CheckpointError(f"tensor {name}.sparse_rows does not cut {name}.sparse into rows; it is damaged")
    columns = words & 0xFFFF
    rows = torch.repeat_interleave(counts.long())
    place = rows * shape[1] + columns
    if len(words) and (int(columns.max()) >= shape[1] or bool((place.diff() <= 0).any())):
        raise CheckpointError(f"tensor {name}.sparse has columns that cannot be in rows of {shape[1]}; it is damaged")
    values = (words >> 16).to(torch.int16).view(torch.float16)
    common.finite(name, "sparse", values.float())
    return Sparse(offsets, columns, values, shape)
