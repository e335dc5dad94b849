"""Products with the single weights that stay beside the codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import RequestError
from fewbits.kernels import gpu
from fewbits.kernels._table import C, native, register, shape, threads

register(
    "sparse_matmul",
    "(x: f32[T,in], offsets: i32[out+1], columns: i32[n], values: f16[n]) -> f32[T,out]",
    lambda level: "rows shared among threads" + ("" if level == "portable" else ", AVX2"),
)


def sparse_matmul(x: Tensor, offsets: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``x @ S.T`` float32 ``[..., out]`` for ``S [out, in]`` given by rows: row ``r`` has the entries ``offsets[r]`` to
    ``offsets[r + 1]``, at ``columns`` with ``values``. ``x`` is of any floating dtype. Raises RequestError on wrong
    dtypes or shapes; that columns lie inside ``x`` is the caller's promise.
    """
    integers = offsets.dtype == columns.dtype == torch.int32
    if not integers or values.dtype != torch.float16 or values.shape != columns.shape:  # a message takes microseconds
        raise RequestError(
            f"sparse_matmul needs int32 offsets and columns and float16 values; got {shape(offsets)}, {shape(columns)} "
            f"and {shape(values)}"
        )
    out, twin = len(offsets) - 1, gpu.twin("sparse_product", x)
    if twin is not None:
        found: Tensor = twin(gpu.rows_of(x.detach()), offsets, columns, values)
        return found.view(*x.shape[:-1], out)
    flat = x.detach().reshape(-1, x.shape[-1])
    if not native(flat, offsets, columns, values):
        return reference_sparse_matmul(flat.float(), offsets, columns, values).view(*x.shape[:-1], out)
    bfloat = flat.dtype == torch.bfloat16
    flat = flat.contiguous() if bfloat else flat.float().contiguous()
    y = torch.empty(*x.shape[:-1], out)
    rest = (t.data_ptr() for t in (offsets, columns, values, y))
    C.sparse_product(flat.data_ptr(), bfloat, *rest, len(flat), flat.shape[1], out, threads())
    return y


def reference_sparse_matmul(x: Tensor, offsets: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """The specification, for ``x`` float32 ``[T, in]``."""
    rows = torch.repeat_interleave(offsets.diff().long())
    products = x[:, columns.long()] * values.float()
    return torch.zeros(len(x), len(offsets) - 1, device=x.device).index_add_(1, rows, products)


def matmul_transposed(dy: Tensor, offsets: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """``dy @ S`` ``[..., width]`` in the dtype of ``dy [..., out]``: the gradient of :func:`sparse_matmul`."""
    rows = torch.repeat_interleave(offsets.diff().long())
    flat = dy.reshape(-1, dy.shape[-1]).float()
    dx = torch.zeros(len(flat), width, device=dy.device)
    dx.index_add_(1, columns.long(), flat[:, rows] * values.float())
    return dx.to(dy.dtype).view(*dy.shape[:-1], width)
