"""Triton kernels of QuickGELU with a bias. launch.py launches them.

x has T rows of width C. With u = x + bias, σ = sigmoid(1.702 u):

    forward     y = u σ                             reads x, writes y
    backward    dx = dy σ (1 + 1.702 u (1 − σ))     reads x and dy, writes dx

Memory bounds both: each element is read and written once, and σ is computed again. The bias costs one row per block of
rows. So that instructions do not bound them instead, 16-bit types (FAST) take a cheaper way: with a = −1.702 log₂e · u,

    σ = 1 / (1 + 2^a) = rsqrt(1 + 2^a)²             dx = dy σ (1 − ln 2 · a (1 − σ))

where the slope and log₂e are one factor, the bias is multiplied once a column, and no division is needed. The
hardware's exp2 and rsqrt err by some 2⁻²², which disappears in the rounding to 16 bits.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask.
"""

import math

import triton
import triton.language as tl

from upperson_kernels.quick_gelu import reference
from upperson_kernels.rows import load_tile, store_tile

COUNTS = ["T"]                          # changes from batch to batch
SLOPE = tl.constexpr(reference.SLOPE)
EXPONENT = tl.constexpr(-reference.SLOPE * math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def load_bias(
    p_bias,                     # (C,), unused without a bias
    o_c,                        # offsets of columns
    C,                          # width
    HAS_BIAS: tl.constexpr,     # whether there is a bias
    ACC: tl.constexpr,          # dtype of the computation
    EVEN: tl.constexpr,         # whether C is a multiple of the tile's columns
):
    """The bias of the tile's columns; zero without a bias.  [1, C]"""
    if not HAS_BIAS:
        return tl.zeros([1, o_c.shape[0]], ACC)
    b_bias = tl.load(p_bias + o_c) if EVEN else tl.load(p_bias + o_c, mask=o_c < C, other=0.0)
    return b_bias.to(ACC)[None, :]


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_x,                        # (T, C)
    p_bias,                     # (C,), unused without a bias
    p_y,                        # written: (T, C)
    stride_x,                   # of x, from row to row
    T,                          # rows
    C,                          # width
    HAS_BIAS: tl.constexpr,     # whether there is a bias
    FAST: tl.constexpr,         # whether the results are rounded to 16 bits
    EVEN: tl.constexpr,         # whether C is a multiple of BLOCK_C
    ACC: tl.constexpr,          # dtype of the computation
    BLOCK_T: tl.constexpr,      # rows of a program
    BLOCK_C: tl.constexpr,      # columns of a program
):
    """y = u σ for a tile of x."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_u = load_tile(p_x, o_t, stride_x, o_c, T, C, EVEN_COLUMNS=EVEN).to(ACC)
    b_u += load_bias(p_bias, o_c, C, HAS_BIAS=HAS_BIAS, ACC=ACC, EVEN=EVEN)
    if FAST:
        b_root = tl.rsqrt(1.0 + tl.exp2(b_u * EXPONENT))
        b_y = b_u * (b_root * b_root)
    else:
        b_slope = tl.full([], SLOPE, ACC)                               # a Python float would be rounded to float32
        b_y = b_u / (1.0 + tl.exp(-b_slope * b_u))
    store_tile(p_y, b_y, o_t, C, o_c, T, C, EVEN_COLUMNS=EVEN)


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
    FAST: tl.constexpr,         # whether the results are rounded to 16 bits
    EVEN: tl.constexpr,         # whether C is a multiple of BLOCK_C
    ACC: tl.constexpr,          # dtype of the computation
    BLOCK_T: tl.constexpr,      # rows of a program
    BLOCK_C: tl.constexpr,      # columns of a program
):
    """dx for a tile of x."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_x = load_tile(p_x, o_t, stride_x, o_c, T, C, EVEN_COLUMNS=EVEN).to(ACC)
    b_bias = load_bias(p_bias, o_c, C, HAS_BIAS=HAS_BIAS, ACC=ACC, EVEN=EVEN)
    b_dy = load_tile(p_dy, o_t, stride_dy, o_c, T, C, EVEN_COLUMNS=EVEN).to(ACC)
    if FAST:
        b_a = b_x * EXPONENT + b_bias * EXPONENT
        b_root = tl.rsqrt(1.0 + tl.exp2(b_a))
        b_sigmoid = b_root * b_root
        b_dx = b_dy * b_sigmoid * (1.0 - LN_2 * (b_a * (1.0 - b_sigmoid)))
    else:
        b_slope = tl.full([], SLOPE, ACC)
        b_u = b_x + b_bias
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_slope * b_u))
        b_dx = b_dy * b_sigmoid * (1.0 + b_slope * b_u * (1.0 - b_sigmoid))
    store_tile(p_dx, b_dx, o_t, C, o_c, T, C, EVEN_COLUMNS=EVEN)
