"""What the kernels over rows share: a matrix of rows in memory, and tiles of it. Imports Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}  # of accumulators


def as_rows(tensor: Tensor) -> Tensor:
    """(..., C) as (T, C) with neighbouring columns adjacent in memory; copies only where it must."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def load_tile(p_base, o_row, stride_row, o_column, rows, columns):
    """A tile of a (rows, columns) matrix, zero outside of it."""
    m_tile = (o_row[:, None] < rows) & (o_column[None, :] < columns)
    return tl.load(p_base + o_row[:, None].to(tl.int64) * stride_row + o_column[None, :], mask=m_tile, other=0.0)


@triton.jit
def store_tile(p_base, b_tile, o_row, stride_row, o_column, rows, columns):
    m_tile = (o_row[:, None] < rows) & (o_column[None, :] < columns)
    p_tile = p_base + o_row[:, None].to(tl.int64) * stride_row + o_column[None, :]
    tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_tile)
