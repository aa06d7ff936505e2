"""Triton kernels of QuickGELU with a bias. launch.py launches them.

x has T rows of width C. With u = x + bias, σ = sigmoid(1.702 u):

    forward     y = u σ                             reads x, writes y
    backward    dx = dy (σ + 1.702 u σ (1 − σ))     reads x and dy, writes dx

Memory bounds both: each element is read and written once, and σ is computed again. The bias costs one row per block of
rows.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask.
"""

import triton
import triton.language as tl

from upperson_kernels.quick_gelu import reference
from upperson_kernels.rows import load_tile, store_tile

COUNTS = ["T"]                          # changes from batch to batch
SLOPE = tl.constexpr(reference.SLOPE)


@triton.jit
def load_u(
    p_x,                        # (T, C)
    p_bias,                     # (C,), unused without a bias
    o_t,                        # offsets of rows
    stride_x,                   # of x, from row to row
    o_c,                        # offsets of columns
    T,                          # rows
    C,                          # width
    HAS_BIAS: tl.constexpr,     # whether there is a bias
    ACC: tl.constexpr,          # dtype of the computation
):
    """u = x + bias, and its sigmoid.  [T, C] each"""
    b_u = load_tile(p_x, o_t, stride_x, o_c, T, C).to(ACC)
    if HAS_BIAS:
        b_u += tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(ACC)[None, :]
    b_slope = tl.full([], SLOPE, ACC)                                   # a Python float would be rounded to float32
    return b_u, 1.0 / (1.0 + tl.exp(-b_slope * b_u))


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_x,                        # (T, C)
    p_bias,                     # (C,), unused without a bias
    p_y,                        # written: (T, C)
    stride_x,                   # of x, from row to row
    T,                          # rows
    C,                          # width
    HAS_BIAS: tl.constexpr,     # whether there is a bias
    ACC: tl.constexpr,          # dtype of the computation
    BLOCK_T: tl.constexpr,      # rows of a program
    BLOCK_C: tl.constexpr,      # columns of a program
):
    """y = u σ for a tile of x."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_u, b_sigmoid = load_u(p_x, p_bias, o_t, stride_x, o_c, T, C, HAS_BIAS=HAS_BIAS, ACC=ACC)
    store_tile(p_y, b_u * b_sigmoid, o_t, C, o_c, T, C)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    p_dy,                       # (T, C), gradient of y
    p_x,                        # (T, C)
    p_bias,                     # (C,), unused without a bias
    p_dx,                       # written: (T, C), gradient of u
    stride_dy,                  # of dy, from row to row
    stride_x,                   # of x, from row to row
    T,                          # rows
    C,                          # width
    HAS_BIAS: tl.constexpr,     # whether there is a bias
    ACC: tl.constexpr,          # dtype of the computation
    BLOCK_T: tl.constexpr,      # rows of a program
    BLOCK_C: tl.constexpr,      # columns of a program
):
    """dx = dy (σ + 1.702 u σ (1 − σ)) for a tile of x."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_u, b_sigmoid = load_u(p_x, p_bias, o_t, stride_x, o_c, T, C, HAS_BIAS=HAS_BIAS, ACC=ACC)
    b_dy = load_tile(p_dy, o_t, stride_dy, o_c, T, C).to(ACC)
    b_slope = tl.full([], SLOPE, ACC)
    store_tile(p_dx, b_dy * b_sigmoid * (1.0 + b_slope * b_u * (1.0 - b_sigmoid)), o_t, C, o_c, T, C)
