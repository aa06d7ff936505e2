"""Triton kernels of LayerNorm with a parallel adapter. launch.py launches them.

x has T rows of width C, the adapter's hidden width is R. With t = x (or x + residual), x̂ = (t − mean) / std, and
A(z) = relu(z Wdᵀ + bd) Wuᵀ + bu:

    y = x̂ ∘ γ + β + s · A(t)         the stream is t

or, where the adapter has a LayerNorm of its own, of the same statistics (OWN_NORM):

    y = x̂ ∘ γ + β                    the stream is t + s · A(x̂ ∘ γ' + β')

    forward              one program per block of rows, two walks over the width: the first collects the
                         statistics and the hidden activations, the second writes y (its reads hit the cache).
                         With OWN_NORM the hidden activations need the statistics first, and a walk of their own.
                         Wd (γ' ∘ t) − mean · Wd γ' would save that walk, but lose all digits of rows with a large mean
    input_gradient       the same two walks: the first collects dh and LayerNorm's two row sums,
                         the second writes dx
    parameter_gradient   one program per block of columns and share of the rows: each element of dy and t is
                         read once for all of dWd, dWu, dbd, dbu, dγ, dβ; the shares are summed in a second,
                         ordered step (no atomics, the same bits at every repetition)

Backward never needs A: Σ dy ∘ A = Σ (dyᵀ h) ∘ Wu + Σ (Σ dy) ∘ bu, so ds follows from dWu and dbu (OWN_NORM: the same
with the stream's gradient). OWN_NORM adds no walk to backward either: dz = dh Wd, the gradient of the adapter's input,
adds Σ_c dz γ' = dh · (Wd γ') and Σ_c dz γ' x̂ = Σ_r dh (h − bd − Wd β') to LayerNorm's two row sums, because h is the
value before ReLU wherever dh is not 0.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask.
"""

import triton
import triton.language as tl

from upperson_kernels.rows import load_tile, store_tile

COUNTS = ["T", "rows_per_share"]        # they change from batch to batch


# ---------------------------------------------------------------------------------------- shared pieces


@triton.jit
def load_sum(
    p_x,                        # (T, C)
    p_residual,                 # (T, C), unused without a residual
    o_t,                        # offsets of rows
    stride_x,                   # of x, from row to row
    stride_residual,            # of the residual, from row to row
    o_c,                        # offsets of columns
    T,                          # rows
    C,                          # width
    HAS_RESIDUAL: tl.constexpr, # whether there is a residual
):
    """x, or x + residual rounded to x's dtype as in PyTorch.  [T, C]"""
    b_x = load_tile(p_x, o_t, stride_x, o_c, T, C)
    if HAS_RESIDUAL:
        b_x += load_tile(p_residual, o_t, stride_residual, o_c, T, C)
    return b_x


# ---------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_x,                        # (T, C)
    p_residual,                 # (T, C), unused without a residual
    p_weight,                   # (C,), γ of LayerNorm
    p_bias,                     # (C,), β of LayerNorm
    p_down_weight,              # (R, C), Wd
    p_down_bias,                # (R,), bd
    p_up_weight,                # (C, R), Wu
    p_up_bias,                  # (C,), bu
    p_scale,                    # (), s
    p_norm_weight,              # (C,), γ' of the adapter's own LayerNorm; unused without OWN_NORM
    p_norm_bias,                # (C,), β' of the adapter's own LayerNorm; unused without OWN_NORM
    p_y,                        # written: (T, C)
    p_stream,                   # written with OWN_NORM: (T, C), t + s · A
    p_total,                    # written with a residual: (T, C), t
    p_mean,                     # written: (T,)
    p_rstd,                     # written: (T,), 1 / std
    p_hidden,                   # written: (T, R), hidden activations
    stride_x,                   # of x, from row to row
    stride_residual,            # of the residual, from row to row
    T,                          # rows
    C,                          # width
    R,                          # hidden width
    EPS: tl.constexpr,          # added to the variance
    HAS_RESIDUAL: tl.constexpr, # whether there is a residual
    OWN_NORM: tl.constexpr,     # whether the adapter has a LayerNorm of its own
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of statistics and sums
    BLOCK_T: tl.constexpr,      # rows of a program
    BLOCK_C: tl.constexpr,      # columns of a step
    BLOCK_R: tl.constexpr,      # R, rounded up
):
    """Computes a block of rows of y, of the stream, and of everything that backward needs."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, BLOCK_R)
    b_mean = tl.zeros([BLOCK_T], ACC)
    b_m2 = tl.zeros([BLOCK_T], ACC)                                     # sum of squared distances from the mean
    b_hidden = tl.zeros([BLOCK_T, BLOCK_R], ACC)

    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_x = load_sum(p_x, p_residual, o_t, stride_x, stride_residual, o_c, T, C, HAS_RESIDUAL=HAS_RESIDUAL)
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

        if not OWN_NORM:
            b_down = load_tile(p_down_weight, o_r, C, o_c, R, C).to(b_x.dtype)                          # [R, C]
            b_hidden += tl.dot(b_x, tl.trans(b_down), input_precision=PRECISION, out_dtype=ACC)

    b_rstd = 1.0 / tl.sqrt(b_m2 / C + EPS)
    if OWN_NORM:
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            b_x = load_sum(p_x, p_residual, o_t, stride_x, stride_residual, o_c, T, C, HAS_RESIDUAL=HAS_RESIDUAL)
            b_weight = tl.load(p_norm_weight + o_c, mask=o_c < C, other=0.0).to(ACC)
            b_bias = tl.load(p_norm_bias + o_c, mask=o_c < C, other=0.0).to(ACC)
            b_down = load_tile(p_down_weight, o_r, C, o_c, R, C).to(b_x.dtype)                          # [R, C]
            b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
            b_read = (b_normalised * b_weight[None, :] + b_bias[None, :]).to(b_x.dtype)                 # [T, C]
            b_hidden += tl.dot(b_read, tl.trans(b_down), input_precision=PRECISION, out_dtype=ACC)

    b_hidden += tl.load(p_down_bias + o_r, mask=o_r < R, other=0.0).to(ACC)[None, :]
    b_hidden = tl.maximum(b_hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(p_hidden.dtype.element_ty)   # [T, R]
    tl.store(p_mean + o_t, b_mean, mask=o_t < T)
    tl.store(p_rstd + o_t, b_rstd, mask=o_t < T)
    store_tile(p_hidden, b_hidden, o_t, R, o_r, T, R)

    b_scale = tl.load(p_scale).to(ACC)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_x = load_sum(p_x, p_residual, o_t, stride_x, stride_residual, o_c, T, C, HAS_RESIDUAL=HAS_RESIDUAL)
        b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(ACC)
        b_bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(ACC)
        b_up = load_tile(p_up_weight, o_c, R, o_r, C, R).to(b_x.dtype)                                  # [C, R]
        b_up_bias = tl.load(p_up_bias + o_c, mask=o_c < C, other=0.0).to(ACC)
        b_adapter = tl.dot(b_hidden, tl.trans(b_up), input_precision=PRECISION, out_dtype=ACC) + b_up_bias[None, :]
        b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
        b_y = b_normalised * b_weight[None, :] + b_bias[None, :]                                        # [T, C]
        if OWN_NORM:
            store_tile(p_stream, b_x.to(ACC) + b_scale * b_adapter, o_t, C, o_c, T, C)
        else:
            b_y += b_scale * b_adapter
        store_tile(p_y, b_y, o_t, C, o_c, T, C)


# ---------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=COUNTS)
def input_gradient_kernel(
    p_dy,                       # (T, C), gradient of y
    p_dstream,                  # (T, C), gradient of the stream; unused without HAS_DSTREAM and OWN_NORM
    p_x,                        # (T, C), t
    p_weight,                   # (C,), γ of LayerNorm
    p_down_weight,              # (R, C), Wd
    p_up_weight,                # (C, R), Wu
    p_scale,                    # (), s
    p_norm_weight,              # (C,), γ'; unused without OWN_NORM
    p_down_norm,                # (R,), Wd γ'; unused without OWN_NORM
    p_down_shift,               # (R,), bd + Wd β'; unused without OWN_NORM
    p_mean,                     # (T,), from forward
    p_rstd,                     # (T,), from forward
    p_hidden,                   # (T, R), from forward
    p_dx,                       # written if NEED_DX: (T, C)
    p_dhidden,                  # written: (T, R), gradient of the hidden activations before ReLU
    stride_dy,                  # of dy, from row to row
    stride_dstream,             # of dstream, from row to row
    stride_x,                   # of x, from row to row
    T,                          # rows
    C,                          # width
    R,                          # hidden width
    NEED_DX: tl.constexpr,      # whether the gradient of x is wanted
    HAS_DSTREAM: tl.constexpr,  # whether the stream has a gradient
    OWN_NORM: tl.constexpr,     # whether the adapter has a LayerNorm of its own
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of statistics and sums
    BLOCK_T: tl.constexpr,      # rows of a program
    BLOCK_C: tl.constexpr,      # columns of a step
    BLOCK_R: tl.constexpr,      # R, rounded up
):
    """dh = s (dy Wu) ∘ [h > 0], and dx = LN'(dy ∘ γ) + dh Wd (+ the gradient of the residual stream).

    OWN_NORM: dh = s (dstream Wu) ∘ [h > 0], and dx = LN'(dy ∘ γ + dh Wd ∘ γ') + dstream.
    """
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, BLOCK_R)
    b_mean = tl.load(p_mean + o_t, mask=o_t < T, other=0.0)
    b_rstd = tl.load(p_rstd + o_t, mask=o_t < T, other=0.0)
    b_sum_g = tl.zeros([BLOCK_T], ACC)                                  # Σ g, where g is the argument of LN'
    b_sum_gx = tl.zeros([BLOCK_T], ACC)                                 # Σ g x̂
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
        b_dsum = load_tile(p_dstream, o_t, stride_dstream, o_c, T, C) if OWN_NORM else b_dy     # of the sum with A
        b_up = load_tile(p_up_weight, o_c, R, o_r, C, R).to(b_dy.dtype)                                 # [C, R]
        b_dhidden += tl.dot(b_dsum, b_up, input_precision=PRECISION, out_dtype=ACC)

    b_hidden = load_tile(p_hidden, o_t, R, o_r, T, R)
    b_dhidden = tl.where(b_hidden > 0, b_dhidden * tl.load(p_scale).to(ACC), 0.0)
    b_dhidden = b_dhidden.to(p_dhidden.dtype.element_ty)                                                # [T, R]
    store_tile(p_dhidden, b_dhidden, o_t, R, o_r, T, R)

    if NEED_DX:
        if OWN_NORM:
            b_down_norm = tl.load(p_down_norm + o_r, mask=o_r < R, other=0.0).to(ACC)
            b_down_shift = tl.load(p_down_shift + o_r, mask=o_r < R, other=0.0).to(ACC)
            b_sum_g += tl.sum(b_dhidden.to(ACC) * b_down_norm[None, :], 1)
            b_sum_gx += tl.sum(b_dhidden.to(ACC) * (b_hidden.to(ACC) - b_down_shift[None, :]), 1)
        b_sum_g /= C
        b_sum_gx /= C
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            b_dy = load_tile(p_dy, o_t, stride_dy, o_c, T, C)
            b_x = load_tile(p_x, o_t, stride_x, o_c, T, C)
            b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(ACC)
            b_down = load_tile(p_down_weight, o_r, C, o_c, R, C).to(b_dy.dtype)                         # [R, C]
            b_dread = tl.dot(b_dhidden, b_down, input_precision=PRECISION, out_dtype=ACC)               # [T, C]
            b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
            b_g = b_dy.to(ACC) * b_weight[None, :]
            if OWN_NORM:
                b_norm_weight = tl.load(p_norm_weight + o_c, mask=o_c < C, other=0.0).to(ACC)
                b_g += b_dread * b_norm_weight[None, :]
            b_dx = (b_g - b_sum_g[:, None] - b_normalised * b_sum_gx[:, None]) * b_rstd[:, None]
            if not OWN_NORM:
                b_dx += b_dread
            if HAS_DSTREAM:
                b_dx += load_tile(p_dstream, o_t, stride_dstream, o_c, T, C).to(ACC)
            store_tile(p_dx, b_dx, o_t, C, o_c, T, C)


@triton.jit(do_not_specialize=COUNTS)
def parameter_gradient_kernel(
    p_dy,                       # (T, C), gradient of y, or of the stream
    p_x,                        # (T, C), t
    p_mean,                     # (T,), from forward
    p_rstd,                     # (T,), from forward
    p_hidden,                   # (T, R), from forward
    p_dhidden,                  # (T, R), from input_gradient_kernel
    p_dup,                      # written if NEED_UP: (shares, C, R), dyᵀ h
    p_dcolumn,                  # written if NEED_COLUMN: (shares, C), Σ dy
    p_ddown,                    # written if NEED_DOWN: (shares, C, R), (dhᵀ x)ᵀ
    p_ddown_bias,               # written if NEED_DOWN: (shares, R), Σ dh
    p_dweight,                  # written if NEED_WEIGHT: (shares, C), Σ dy x̂
    stride_dy,                  # of dy, from row to row
    stride_x,                   # of x, from row to row
    T,                          # rows
    C,                          # width
    R,                          # hidden width
    rows_per_share,             # rows of a share, a multiple of BLOCK_T
    NEED_UP: tl.constexpr,      # which sums are wanted
    NEED_COLUMN: tl.constexpr,
    NEED_DOWN: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    OWN_NORM: tl.constexpr,     # whether the adapter has a LayerNorm of its own
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_T: tl.constexpr,      # rows of a step
    BLOCK_C: tl.constexpr,      # columns of a program
    BLOCK_R: tl.constexpr,      # R, rounded up
):
    """Share i of  dyᵀ h (C, R),  Σ dy (C),  (dhᵀ x)ᵀ (C, R),  Σ dh (R),  Σ dy x̂ (C); OWN_NORM: x̂ in the place of x."""
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
        if NEED_WEIGHT or (NEED_DOWN and OWN_NORM):
            b_mean = tl.load(p_mean + o_t, mask=o_t < end, other=0.0)
            b_rstd = tl.load(p_rstd + o_t, mask=o_t < end, other=0.0)
            b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
        if NEED_UP:
            b_hidden = load_tile(p_hidden, o_t, R, o_r, end, R)                                         # [T, R]
            b_dup += tl.dot(tl.trans(b_dy), b_hidden, input_precision=PRECISION, out_dtype=ACC)
        if NEED_COLUMN:
            b_dcolumn += tl.sum(b_dy.to(ACC), 0)
        if NEED_DOWN:
            b_dhidden = load_tile(p_dhidden, o_t, R, o_r, end, R)                                       # [T, R]
            b_read = b_normalised.to(b_x.dtype) if OWN_NORM else b_x
            b_ddown += tl.dot(tl.trans(b_read), b_dhidden, input_precision=PRECISION, out_dtype=ACC)
            b_ddown_bias += tl.sum(b_dhidden.to(ACC), 0)
        if NEED_WEIGHT:
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
