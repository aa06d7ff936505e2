"""Matrices of rows in memory, and tiles of them; the kernels over rows share these. Imports Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}  # of accumulators


def as_rows(tensor: Tensor) -> Tensor:
    """(..., C) as (T, C) with neighbouring columns adjacent in memory; a copy only where necessary."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def load_tile(
    p_base,  # a (rows, columns) matrix
    o_row,  # offsets of rows
    stride_row,  # from row to row
    o_column,  # offsets of columns
    rows,  # rows of the matrix
    columns,  # columns of the matrix
):
    """A tile of a matrix, zero outside of it."""
    m_tile = (o_row[:, None] < rows) & (o_column[None, :] < columns)
    return tl.load(p_base + o_row[:, None].to(tl.int64) * stride_row + o_column[None, :], mask=m_tile, other=0.0)


@triton.jit
def store_tile(
    p_base,  # a (rows, columns) matrix
    b_tile,  # the values
    o_row,  # offsets of rows
    stride_row,  # from row to row
    o_column,  # offsets of columns
    rows,  # rows of the matrix
    columns,  # columns of the matrix
):
    """Writes a tile of a matrix, in the matrix's dtype; nothing outside of it."""
    m_tile = (o_row[:, None] < rows) & (o_column[None, :] < columns)
    p_tile = p_base + o_row[:, None].to(tl.int64) * stride_row + o_column[None, :]
    tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_tile)
