"""Matrices of rows in memory, and tiles of them; the kernels over rows share these. Imports Triton."""

# pyright: reportArgumentType=false
# A kernel's constants are constexpr to Triton and plain values to its caller, which a type checker cannot see.

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
def mask_of(
    o_row,  # offsets of rows
    o_column,  # offsets of columns
    rows,  # rows of the matrix
    columns,  # columns of the matrix
    EVEN_ROWS: tl.constexpr,  # whether the tile's rows all lie in the matrix
    EVEN_COLUMNS: tl.constexpr,  # whether its columns do
):
    """Which elements of a tile lie in the matrix. A comparison that is not needed would cost instructions."""
    if EVEN_COLUMNS:
        return (o_row < rows)[:, None]
    elif EVEN_ROWS:
        return (o_column < columns)[None, :]
    else:
        return (o_row < rows)[:, None] & (o_column < columns)[None, :]


@triton.jit
def load_tile(
    p_base,  # a (rows, columns) matrix
    o_row,  # offsets of rows
    stride_row,  # from row to row
    o_column,  # offsets of columns
    rows,  # rows of the matrix
    columns,  # columns of the matrix
    EVEN_ROWS: tl.constexpr = False,  # whether the tile's rows all lie in the matrix
    EVEN_COLUMNS: tl.constexpr = False,  # whether its columns do
):
    """A tile of a matrix, zero outside of it."""
    p_tile = p_base + o_row[:, None].to(tl.int64) * stride_row + o_column[None, :]
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(p_tile)
    else:
        m_tile = mask_of(o_row, o_column, rows, columns, EVEN_ROWS=EVEN_ROWS, EVEN_COLUMNS=EVEN_COLUMNS)
        return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def store_tile(
    p_base,  # a (rows, columns) matrix
    b_tile,  # the values
    o_row,  # offsets of rows
    stride_row,  # from row to row
    o_column,  # offsets of columns
    rows,  # rows of the matrix
    columns,  # columns of the matrix
    EVEN_ROWS: tl.constexpr = False,  # whether the tile's rows all lie in the matrix
    EVEN_COLUMNS: tl.constexpr = False,  # whether its columns do
):
    """Writes a tile of a matrix, in the matrix's dtype; nothing outside of it."""
    p_tile = p_base + o_row[:, None].to(tl.int64) * stride_row + o_column[None, :]
    if EVEN_ROWS and EVEN_COLUMNS:
        tl.store(p_tile, b_tile.to(p_base.dtype.element_ty))
    else:
        m_tile = mask_of(o_row, o_column, rows, columns, EVEN_ROWS=EVEN_ROWS, EVEN_COLUMNS=EVEN_COLUMNS)
        tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_tile)
