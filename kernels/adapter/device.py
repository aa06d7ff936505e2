"""Triton kernels of LayerNorm with a parallel adapter, and the functions that launch them.

x has T rows of width C, the adapter's hidden width is R. With t = x (or x + residual):

    y = LN(t) ∘ γ + β + s · A        A = relu(t Wdᵀ + bd) Wuᵀ + bu

    forward              one program per block of rows, two walks over the width: the first collects the
                         statistics and the hidden activations, the second writes y (its reads hit the cache)
    input_gradient       the same two walks: the first collects dh and LayerNorm's two row sums,
                         the second writes dx
    parameter_gradient   one program per block of columns and share of the rows: each element of dy and t is
                         read once for all of dWd, dWu, dbd, dbu, dγ, dβ; the shares are summed in a second,
                         ordered step (no atomics, the same bits at every repetition)

A is never needed in backward: Σ dy ∘ A = Σ (dyᵀ h) ∘ Wu + Σ (Σ dy) ∘ bu, so ds falls out of dWu and dbu.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.backend import accumulator, capability, float32_precision
from kernels.rows import TRITON_DTYPES, as_rows, load_tile, store_tile

COUNTS = ["T", "rows_per_share"]        # change from batch to batch
MAX_SHARES = 32     # partial sums of the parameter gradients


# ---------------------------------------------------------------------------------------- shared pieces


@triton.jit
def load_sum(p_x, p_residual, o_t, stride_x, stride_residual, o_c, T, C, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to x's dtype as PyTorch would.  [T, C]"""
    b_x = load_tile(p_x, o_t, stride_x, o_c, T, C)
    if HAS_RESIDUAL:
        b_x += load_tile(p_residual, o_t, stride_residual, o_c, T, C)
    return b_x


# ---------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_x, p_residual, p_weight, p_bias, p_down_weight, p_down_bias, p_up_weight, p_up_bias, p_scale,
    p_y, p_total, p_mean, p_rstd, p_hidden,
    stride_x, stride_residual, T, C, R,
    EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, BLOCK_R)
    b_mean = tl.zeros([BLOCK_T], ACC)
    b_m2 = tl.zeros([BLOCK_T], ACC)                                     # sum of squared distances from the mean
    b_hidden = tl.zeros([BLOCK_T, BLOCK_R], ACC)

    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_x = load_sum(p_x, p_residual, o_t, stride_x, stride_residual, o_c, T, C, HAS_RESIDUAL)        # [T, C]
        if HAS_RESIDUAL:
            store_tile(p_total, b_x, o_t, C, o_c, T, C)
        # Mean and squared distances of this block of columns join those so far (Chan, Golub and LeVeque 1979);
        # E[x²] − E[x]² would lose the variance of rows whose mean is large.
        b_wide = b_x.to(ACC)
        count = tl.minimum(BLOCK_C, C - start).to(ACC)
        b_block_mean = tl.sum(b_wide, 1) / count
        b_centred = tl.where(o_c[None, :] < C, b_wide - b_block_mean[:, None], 0.0)
        b_shift = b_block_mean - b_mean
        b_m2 += tl.sum(b_centred * b_centred, 1) + b_shift * b_shift * (start * count / (start + count))
        b_mean += b_shift * (count / (start + count))

        b_down = load_tile(p_down_weight, o_r, C, o_c, R, C).to(b_x.dtype)                              # [R, C]
        b_hidden += tl.dot(b_x, tl.trans(b_down), input_precision=PRECISION, out_dtype=ACC)

    b_rstd = 1.0 / tl.sqrt(b_m2 / C + EPS)
    b_hidden += tl.load(p_down_bias + o_r, mask=o_r < R, other=0.0).to(ACC)[None, :]
    b_hidden = tl.maximum(b_hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(p_hidden.dtype.element_ty)   # [T, R]
    tl.store(p_mean + o_t, b_mean, mask=o_t < T)
    tl.store(p_rstd + o_t, b_rstd, mask=o_t < T)
    store_tile(p_hidden, b_hidden, o_t, R, o_r, T, R)

    b_scale = tl.load(p_scale).to(ACC)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_x = load_sum(p_x, p_residual, o_t, stride_x, stride_residual, o_c, T, C, HAS_RESIDUAL)
        b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(ACC)
        b_bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(ACC)
        b_up = load_tile(p_up_weight, o_c, R, o_r, C, R).to(b_x.dtype)                                  # [C, R]
        b_up_bias = tl.load(p_up_bias + o_c, mask=o_c < C, other=0.0).to(ACC)
        b_adapter = tl.dot(b_hidden, tl.trans(b_up), input_precision=PRECISION, out_dtype=ACC) + b_up_bias[None, :]
        b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
        b_y = b_normalised * b_weight[None, :] + b_bias[None, :] + b_scale * b_adapter                  # [T, C]
        store_tile(p_y, b_y, o_t, C, o_c, T, C)


# ---------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=COUNTS)
def input_gradient_kernel(
    p_dy, p_dtotal, p_x, p_weight, p_down_weight, p_up_weight, p_scale, p_mean, p_rstd, p_hidden,
    p_dx, p_dhidden,
    stride_dy, stride_dtotal, stride_x, T, C, R,
    NEED_DX: tl.constexpr, HAS_DTOTAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """dh = s (dy Wu) ∘ [h > 0], and dx = LN'(dy ∘ γ) + dh Wd (+ the gradient of the residual stream)."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, BLOCK_R)
    b_mean = tl.load(p_mean + o_t, mask=o_t < T, other=0.0)
    b_rstd = tl.load(p_rstd + o_t, mask=o_t < T, other=0.0)
    b_sum_g = tl.zeros([BLOCK_T], ACC)                                  # Σ dy γ
    b_sum_gx = tl.zeros([BLOCK_T], ACC)                                 # Σ dy γ x̂
    b_dhidden = tl.zeros([BLOCK_T, BLOCK_R], ACC)

    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_dy = load_tile(p_dy, o_t, stride_dy, o_c, T, C)                                               # [T, C]
        if NEED_DX:
            b_x = load_tile(p_x, o_t, stride_x, o_c, T, C)
            b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(ACC)
            b_g = b_dy.to(ACC) * b_weight[None, :]
            b_sum_g += tl.sum(b_g, 1)
            b_sum_gx += tl.sum(b_g * (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None], 1)
        b_up = load_tile(p_up_weight, o_c, R, o_r, C, R).to(b_dy.dtype)                                 # [C, R]
        b_dhidden += tl.dot(b_dy, b_up, input_precision=PRECISION, out_dtype=ACC)

    b_hidden = load_tile(p_hidden, o_t, R, o_r, T, R)
    b_dhidden = tl.where(b_hidden > 0, b_dhidden * tl.load(p_scale).to(ACC), 0.0)
    b_dhidden = b_dhidden.to(p_dhidden.dtype.element_ty)                                                # [T, R]
    store_tile(p_dhidden, b_dhidden, o_t, R, o_r, T, R)

    if NEED_DX:
        b_sum_g /= C
        b_sum_gx /= C
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            b_dy = load_tile(p_dy, o_t, stride_dy, o_c, T, C)
            b_x = load_tile(p_x, o_t, stride_x, o_c, T, C)
            b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(ACC)
            b_down = load_tile(p_down_weight, o_r, C, o_c, R, C).to(b_dy.dtype)                         # [R, C]
            b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
            b_dx = b_dy.to(ACC) * b_weight[None, :] - b_sum_g[:, None] - b_normalised * b_sum_gx[:, None]
            b_dx = b_dx * b_rstd[:, None]
            b_dx += tl.dot(b_dhidden, b_down, input_precision=PRECISION, out_dtype=ACC)
            if HAS_DTOTAL:
                b_dx += load_tile(p_dtotal, o_t, stride_dtotal, o_c, T, C).to(ACC)
            store_tile(p_dx, b_dx, o_t, C, o_c, T, C)


@triton.jit(do_not_specialize=COUNTS)
def parameter_gradient_kernel(
    p_dy, p_x, p_mean, p_rstd, p_hidden, p_dhidden,
    p_dup, p_dcolumn, p_ddown, p_ddown_bias, p_dweight,
    stride_dy, stride_x, T, C, R, rows_per_share,
    NEED_UP: tl.constexpr, NEED_COLUMN: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Share i of  dyᵀ h (C, R),  Σ dy (C),  (dhᵀ x)ᵀ (C, R),  Σ dh (R),  Σ dy x̂ (C)."""
    i_share = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_r = tl.arange(0, BLOCK_R)
    b_dup = tl.zeros([BLOCK_C, BLOCK_R], ACC)
    b_ddown = tl.zeros([BLOCK_C, BLOCK_R], ACC)
    b_ddown_bias = tl.zeros([BLOCK_R], ACC)
    b_dcolumn = tl.zeros([BLOCK_C], ACC)
    b_dweight = tl.zeros([BLOCK_C], ACC)

    begin = tl.program_id(1) * rows_per_share
    end = tl.minimum(begin + rows_per_share, T)
    for start in range(begin, end, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        if NEED_UP or NEED_COLUMN or NEED_WEIGHT:
            b_dy = load_tile(p_dy, o_t, stride_dy, o_c, end, C)                                         # [T, C]
        if NEED_DOWN or NEED_WEIGHT:
            b_x = load_tile(p_x, o_t, stride_x, o_c, end, C)
        if NEED_UP:
            b_hidden = load_tile(p_hidden, o_t, R, o_r, end, R)                                         # [T, R]
            b_dup += tl.dot(tl.trans(b_dy), b_hidden, input_precision=PRECISION, out_dtype=ACC)
        if NEED_COLUMN:
            b_dcolumn += tl.sum(b_dy.to(ACC), 0)
        if NEED_DOWN:
            b_dhidden = load_tile(p_dhidden, o_t, R, o_r, end, R)                                       # [T, R]
            b_ddown += tl.dot(tl.trans(b_x), b_dhidden, input_precision=PRECISION, out_dtype=ACC)
            b_ddown_bias += tl.sum(b_dhidden.to(ACC), 0)
        if NEED_WEIGHT:
            b_mean = tl.load(p_mean + o_t, mask=o_t < end, other=0.0)
            b_rstd = tl.load(p_rstd + o_t, mask=o_t < end, other=0.0)
            b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
            b_dweight += tl.sum(b_dy.to(ACC) * b_normalised, 0)

    if NEED_UP:
        store_tile(p_dup + i_share * C * R, b_dup, o_c, R, o_r, C, R)
    if NEED_COLUMN:
        tl.store(p_dcolumn + i_share * C + o_c, b_dcolumn, mask=o_c < C)
    if NEED_DOWN:
        store_tile(p_ddown + i_share * C * R, b_ddown, o_c, R, o_r, C, R)
        if tl.program_id(0) == 0:
            tl.store(p_ddown_bias + i_share * R + o_r, b_ddown_bias, mask=o_r < R)
    if NEED_WEIGHT:
        tl.store(p_dweight + i_share * C + o_c, b_dweight, mask=o_c < C)


# ---------------------------------------------------------------------------------------- launchers


def launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, down_weight: Tensor,
                   down_bias: Tensor, up_weight: Tensor, up_bias: Tensor, scale: Tensor,
                   eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y, x + residual (empty without a residual), and per row: mean, 1/std, hidden activations (T, R)."""
    hidden_width, width = down_weight.shape
    rows = x.numel() // width
    acc_dtype = accumulator(x.dtype)
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    mean = x.new_empty(rows, dtype=acc_dtype)
    rstd = x.new_empty(rows, dtype=acc_dtype)
    hidden = x.new_empty(rows, hidden_width)
    if rows:
        x_rows = as_rows(x)
        residual_rows = x_rows if residual is None else as_rows(residual)
        chosen = tiles.choose("adapter_rows", hidden_width, x.element_size(), capability(x))
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(rows, chosen["BLOCK_T"]),)](
                x_rows, residual_rows, weight.contiguous(), bias.contiguous(), down_weight.contiguous(),
                down_bias.contiguous(), up_weight.contiguous(), up_bias.contiguous(), scale,
                y, total, mean, rstd, hidden,
                x_rows.stride(0), residual_rows.stride(0), rows, width, hidden_width,
                EPS=eps, HAS_RESIDUAL=residual is not None,
                PRECISION=float32_precision(), ACC=TRITON_DTYPES[acc_dtype], **chosen,
            )
    return y, total, mean, rstd, hidden


def launch_backward(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, down_weight: Tensor,
                    up_weight: Tensor, up_bias: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, hidden: Tensor,
                    needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, down_weight, down_bias, up_weight, up_bias and scale, where x is what was
    normalised (the sum, if there was a residual); an empty tensor for each that `needs` denies."""
    need_x, need_weight, need_bias, need_down, need_down_bias, need_up, need_up_bias, need_scale = needs
    hidden_width, width = down_weight.shape
    rows = x.numel() // width
    acc_dtype = accumulator(x.dtype)
    chosen = tiles.choose("adapter_rows", hidden_width, x.element_size(), capability(x))
    dy_rows, x_rows = as_rows(dy), as_rows(x)

    dx = x.new_empty(x.shape if need_x else 0)
    dhidden = x.new_empty(rows, hidden_width)
    compute_down = need_down or need_down_bias
    if rows and (need_x or compute_down):
        dtotal_rows = dy_rows if dtotal is None else as_rows(dtotal)
        with torch.cuda.device_of(x):
            input_gradient_kernel[(triton.cdiv(rows, chosen["BLOCK_T"]),)](
                dy_rows, dtotal_rows, x_rows, weight.contiguous(), down_weight.contiguous(), up_weight.contiguous(),
                scale, mean, rstd, hidden, dx, dhidden,
                dy_rows.stride(0), dtotal_rows.stride(0), x_rows.stride(0), rows, width, hidden_width,
                NEED_DX=need_x, HAS_DTOTAL=dtotal is not None,
                PRECISION=float32_precision(), ACC=TRITON_DTYPES[acc_dtype], **chosen,
            )

    compute_up = need_up or need_scale
    compute_column = need_bias or need_up_bias or need_scale
    chosen = tiles.choose("adapter_parameters", hidden_width, x.element_size(), capability(x))
    row_blocks = triton.cdiv(rows, chosen["BLOCK_T"])
    shares = min(MAX_SHARES, row_blocks)

    def buffer(needed: bool, *shape: int) -> Tensor:
        return x.new_empty((shares, *shape) if needed else 0, dtype=acc_dtype)

    dup, ddown = buffer(compute_up, width, hidden_width), buffer(compute_down, width, hidden_width)
    dcolumn, dgamma = buffer(compute_column, width), buffer(need_weight, width)
    ddown_bias = buffer(compute_down, hidden_width)
    if rows and (compute_up or compute_column or compute_down or need_weight):
        with torch.cuda.device_of(x):
            parameter_gradient_kernel[(triton.cdiv(width, chosen["BLOCK_C"]), shares)](
                dy_rows, x_rows, mean, rstd, hidden, dhidden, dup, dcolumn, ddown, ddown_bias, dgamma,
                dy_rows.stride(0), x_rows.stride(0), rows, width, hidden_width,
                triton.cdiv(row_blocks, shares) * chosen["BLOCK_T"],
                NEED_UP=compute_up, NEED_COLUMN=compute_column, NEED_DOWN=compute_down, NEED_WEIGHT=need_weight,
                PRECISION=float32_precision(), ACC=TRITON_DTYPES[acc_dtype], **chosen,
            )
    dup, dcolumn, ddown, ddown_bias, dgamma = (
        t.sum(0) if t.dim() > 1 else t for t in (dup, dcolumn, ddown, ddown_bias, dgamma))

    wide_scale = scale.to(acc_dtype)
    adapter_sum = None
    if need_scale:
        adapter_sum = (dup * up_weight.to(acc_dtype)).sum() + (dcolumn * up_bias.to(acc_dtype)).sum()

    def result(needed: bool, value: Callable[[], Tensor], like: Tensor) -> Tensor:
        return value().to(like.dtype) if needed else x.new_empty(0)

    return (
        dx,
        result(need_weight, lambda: dgamma, weight),
        result(need_bias, lambda: dcolumn, weight),
        result(need_down, lambda: ddown.t().contiguous(), down_weight),
        result(need_down_bias, lambda: ddown_bias, down_weight),
        result(need_up, lambda: wide_scale * dup, up_weight),
        result(need_up_bias, lambda: wide_scale * dcolumn, up_bias),
        result(need_scale, lambda: adapter_sum, scale),
    )
