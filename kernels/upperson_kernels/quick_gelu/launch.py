"""Launches the kernels of QuickGELU (device.py): torch tensors in and out."""

# pyright: reportArgumentType=false, reportCallIssue=false
# A kernel's constants are constexpr to Triton and plain values to its caller, which a type checker cannot see.

from typing import Any

import torch
import triton
from torch import Tensor

from upperson_kernels.backend import accumulator
from upperson_kernels.quick_gelu import device
from upperson_kernels.rows import TRITON_DTYPES, as_rows

# Loads of 16 bytes in 16 bits. There is no tile to tune.
BLOCKS = dict(BLOCK_T=4, BLOCK_C=1024, num_warps=4, enable_fp_fusion=True)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """y in x's shape."""
    y = x.new_empty(x.shape)
    if x.numel():
        rows = as_rows(x)
        with torch.cuda.device_of(x):
            device.forward_kernel[grid(rows)](
                rows,
                rows if bias is None else bias.contiguous(),
                y,
                rows.stride(0),
                *rows.shape,
                HAS_BIAS=bias is not None,
                **constants(x),
            )
    return y


def backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of x + bias in x's shape."""
    dx = x.new_empty(x.shape)
    if x.numel():
        rows, dy_rows = as_rows(x), as_rows(dy)
        with torch.cuda.device_of(x):
            device.backward_kernel[grid(rows)](
                dy_rows,
                rows,
                rows if bias is None else bias.contiguous(),
                dx,
                dy_rows.stride(0),
                rows.stride(0),
                *rows.shape,
                HAS_BIAS=bias is not None,
                **constants(x),
            )
    return dx


def grid(rows: Tensor) -> tuple[int, int]:
    """The programs for (T, C)."""
    return triton.cdiv(rows.shape[0], BLOCKS["BLOCK_T"]), triton.cdiv(rows.shape[1], BLOCKS["BLOCK_C"])


def constants(x: Tensor) -> dict[str, Any]:
    """The constants and launch options of both kernels."""
    even = x.shape[-1] % BLOCKS["BLOCK_C"] == 0
    return dict(FAST=x.element_size() == 2, EVEN=even, ACC=TRITON_DTYPES[accumulator(x.dtype)], **BLOCKS)
