"""Triton kernels of QuickGELU with a bias, and the functions that launch them.

x has T rows of width C. With u = x + bias, σ = sigmoid(1.702 u):

    forward     y = u σ                             reads x, writes y
    backward    dx = dy (σ + 1.702 u σ (1 − σ))     reads x and dy, writes dx

Bound by memory: each element is read and written once, σ is computed again. The bias costs one row per block of rows.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from upperson_kernels.backend import accumulator
from upperson_kernels.quick_gelu import reference
from upperson_kernels.rows import TRITON_DTYPES, as_rows, load_tile, store_tile

COUNTS = ["T"]                          # changes from batch to batch
SLOPE = tl.constexpr(reference.SLOPE)
BLOCKS = dict(BLOCK_T=4, BLOCK_C=1024, num_warps=4)     # 16 bytes a load in 16 bits; no tile to tune for


@triton.jit
def load_u(p_x, p_bias, o_t, stride_x, o_c, T, C, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """x + bias, and its sigmoid.  [T, C]"""
    b_u = load_tile(p_x, o_t, stride_x, o_c, T, C).to(ACC)
    if HAS_BIAS:
        b_u += tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(ACC)[None, :]
    b_slope = tl.full([], SLOPE, ACC)                                   # a Python float would be rounded to float32
    return b_u, 1.0 / (1.0 + tl.exp(-b_slope * b_u))


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_x, p_bias, p_y, stride_x, T, C,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_u, b_sigmoid = load_u(p_x, p_bias, o_t, stride_x, o_c, T, C, HAS_BIAS, ACC)
    store_tile(p_y, b_u * b_sigmoid, o_t, C, o_c, T, C)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    p_dy, p_x, p_bias, p_dx, stride_dy, stride_x, T, C,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_u, b_sigmoid = load_u(p_x, p_bias, o_t, stride_x, o_c, T, C, HAS_BIAS, ACC)
    b_dy = load_tile(p_dy, o_t, stride_dy, o_c, T, C).to(ACC)
    b_slope = tl.full([], SLOPE, ACC)
    store_tile(p_dx, b_dy * b_sigmoid * (1.0 + b_slope * b_u * (1.0 - b_sigmoid)), o_t, C, o_c, T, C)


# ---------------------------------------------------------------------------------------- launchers


def grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, BLOCKS["BLOCK_T"]), triton.cdiv(width, BLOCKS["BLOCK_C"])


def launch_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel():
        rows = as_rows(x)
        with torch.cuda.device_of(x):
            forward_kernel[grid(*rows.shape)](
                rows, rows if bias is None else bias.contiguous(), y, rows.stride(0), *rows.shape,
                HAS_BIAS=bias is not None, ACC=TRITON_DTYPES[accumulator(x.dtype)], **BLOCKS)
    return y


def launch_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    dx = x.new_empty(x.shape)
    if x.numel():
        rows, dy_rows = as_rows(x), as_rows(dy)
        with torch.cuda.device_of(x):
            backward_kernel[grid(*rows.shape)](
                dy_rows, rows, rows if bias is None else bias.contiguous(), dx,
                dy_rows.stride(0), rows.stride(0), *rows.shape,
                HAS_BIAS=bias is not None, ACC=TRITON_DTYPES[accumulator(x.dtype)], **BLOCKS)
    return dx
