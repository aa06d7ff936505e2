"""Triton kernels of LayerNorm with a parallel adapter. launch.py launches them.

x has T rows of width C, the adapter's hidden width is R. With t = x (or x + residual), x̂ = (t − mean) / std, and
A(z) = relu(z Wdᵀ + bd) Wuᵀ + bu:

    y = x̂ ∘ γ + β + s · A(t)         the stream is t

or, where the adapter has a LayerNorm of its own, of the same statistics (OWN_NORM):

    y = x̂ ∘ γ + β                    the stream is t + s · A(x̂ ∘ γ' + β')

    forward              one program per block of rows, two walks over the width: the first collects the
                         statistics and the hidden activations, the second writes y (its reads hit the cache; with a
                         residual it reads the sum that the first walk wrote).
                         With OWN_NORM the hidden activations need the statistics first, and a walk of their own.
                         Wd (γ' ∘ t) − mean · Wd γ' would save that walk, but lose all digits of rows with a large mean
    input_gradient       the same two walks: the first collects dh and LayerNorm's two row sums,
                         the second writes dx
    parameter_gradient   one program per block of columns and share of the rows: each element of dy and t is
                         read once for all of dWd, dWu, dbd, dbu, dγ, dβ. No atomics, the same bits at every repetition
    finish               one program per few columns: sums the shares in order, transposes, scales, casts, and finds ds

Statistics need no reduction inside of a walk: the sums of d and d², with d the distance from a pivot, are kept per
column of a step. The pivot is the mean of a row's first step, a share f of the row. For any row
(pivot − mean)² ≤ var (1 − f) / f, so that Σd² − (Σd)² / C loses at most log₂(1 / f) bits of the variance.

Backward never needs A: Σ dy ∘ A = Σ (dyᵀ h) ∘ Wu + Σ (Σ dy) ∘ bu, so ds follows from dWu and dbu (OWN_NORM: the same
with the stream's gradient). OWN_NORM adds no walk to backward either: dz = dh Wd, the gradient of the adapter's input,
adds Σ_c dz γ' = dh · (Wd γ') and Σ_c dz γ' x̂ = Σ_r dh (h − bd − Wd β') to LayerNorm's two row sums, because h is the
value before ReLU wherever dh is not 0.

The hidden width lies in one or two pieces, R = 64 + 32 of 96, so that nothing is padded (tiles.hidden_pieces). Both
weights come in the dtype of x.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask. EVEN: nothing to be masked on that axis.
"""

# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# A kernel's constants are constexpr to Triton and plain values to its caller, which a type checker cannot see; nor that
# Triton's ranges are iterated.

import triton
import triton.language as tl

from upperson_kernels.rows import load_tile, store_tile

COUNTS = ["T", "rows_per_share", "SHARES"]      # they change from batch to batch


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
    C: tl.constexpr,            # width
    HAS_RESIDUAL: tl.constexpr, # whether there is a residual
    EVEN_C: tl.constexpr,       # whether C is a multiple of the block
):
    """x, or x + residual rounded to x's dtype as in PyTorch.  [T, C]"""
    b_x = load_tile(p_x, o_t, stride_x, o_c, T, C, EVEN_COLUMNS=EVEN_C)
    if HAS_RESIDUAL:
        b_x += load_tile(p_residual, o_t, stride_residual, o_c, T, C, EVEN_COLUMNS=EVEN_C)
    return b_x


@triton.jit
def load_vector(
    p_base,                     # (C,)
    o_c,                        # offsets
    C: tl.constexpr,            # length
    ACC: tl.constexpr,          # dtype of the result
    EVEN: tl.constexpr,         # whether all offsets lie in the vector
):
    """A part of a vector, zero outside of it."""
    return (tl.load(p_base + o_c) if EVEN else tl.load(p_base + o_c, mask=o_c < C, other=0.0)).to(ACC)


@triton.jit
def add_down(
    b_hidden,                   # running sum, [T, R]
    b_x,                        # what the adapter reads, [T, C]
    p_down_weight,              # (R, C), Wd
    o_r,                        # hidden units of the piece
    o_c,                        # offsets of columns
    R: tl.constexpr,            # hidden width
    C: tl.constexpr,            # width
    EVEN_R: tl.constexpr,       # whether R is the sum of the pieces
    EVEN_C: tl.constexpr,       # whether C is a multiple of the block
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
):
    """Adds some columns of x Wdᵀ for a piece of the hidden units.  [T, R]"""
    b_down = load_tile(p_down_weight, o_r, C, o_c, R, C, EVEN_ROWS=EVEN_R, EVEN_COLUMNS=EVEN_C)         # [R, C]
    return tl.dot(b_x, tl.trans(b_down), b_hidden, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def add_up(
    b_dhidden,                  # running sum, [T, R]
    b_dy,                       # gradient of the adapter's output, [T, C]
    p_up_weight,                # (C, R), Wu
    o_r,                        # hidden units of the piece
    o_c,                        # offsets of columns
    R: tl.constexpr,            # hidden width
    C: tl.constexpr,            # width
    EVEN_R: tl.constexpr,       # whether R is the sum of the pieces
    EVEN_C: tl.constexpr,       # whether C is a multiple of the block
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
):
    """Adds some columns of dy Wu for a piece of the hidden units.  [T, R]"""
    b_up = load_tile(p_up_weight, o_c, R, o_r, C, R, EVEN_ROWS=EVEN_C, EVEN_COLUMNS=EVEN_R)             # [C, R]
    return tl.dot(b_dy, b_up, b_dhidden, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def store_hidden(
    p_hidden,                   # written: (T, R), hidden activations
    b_hidden,                   # before the bias, [T, R]
    p_down_bias,                # (R,), bd
    o_t,                        # offsets of rows
    o_r,                        # hidden units of the piece
    T,                          # rows
    R: tl.constexpr,            # hidden width
    EVEN_R: tl.constexpr,       # whether R is the sum of the pieces
    ACC: tl.constexpr,          # dtype of sums
):
    """relu(hidden + bd) in the dtype of x, which is also written.  [T, R]"""
    b_hidden += load_vector(p_down_bias, o_r, R, ACC=ACC, EVEN=EVEN_R)[None, :]
    b_hidden = tl.maximum(b_hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(p_hidden.dtype.element_ty)
    store_tile(p_hidden, b_hidden, o_t, R, o_r, T, R, EVEN_COLUMNS=EVEN_R)
    return b_hidden


# ---------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_x,                        # (T, C)
    p_residual,                 # (T, C), unused without a residual
    p_weight,                   # (C,), γ of LayerNorm
    p_bias,                     # (C,), β of LayerNorm
    p_down_weight,              # (R, C), Wd, in the dtype of x
    p_down_bias,                # (R,), bd
    p_up_weight,                # (C, R), Wu, in the dtype of x
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
    C: tl.constexpr,            # width
    R: tl.constexpr,            # hidden width
    EPS: tl.constexpr,          # added to the variance
    HAS_RESIDUAL: tl.constexpr, # whether there is a residual
    OWN_NORM: tl.constexpr,     # whether the adapter has a LayerNorm of its own
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of statistics and sums
    BLOCK_T: tl.constexpr,      # rows of a program
    BLOCK_C: tl.constexpr,      # columns of a step
    FIRST: tl.constexpr,        # hidden units of the first piece
    SECOND: tl.constexpr,       # and of the second one, or 0
):
    """Computes a block of rows of y, of the stream, and of everything that backward needs."""
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    EVEN_R: tl.constexpr = FIRST + SECOND == R
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_1, o_2 = tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND if SECOND else 1)
    b_hidden1, b_hidden2 = tl.zeros([BLOCK_T, FIRST], ACC), tl.zeros([BLOCK_T, SECOND if SECOND else 1], ACC)

    o_c = tl.arange(0, BLOCK_C)
    b_x = load_sum(p_x, p_residual, o_t, stride_x, stride_residual, o_c, T, C, HAS_RESIDUAL=HAS_RESIDUAL,
                   EVEN_C=EVEN_C)
    b_pivot = tl.sum(b_x.to(ACC), 1) / min(BLOCK_C, C)
    b_sum, b_squares = tl.zeros([BLOCK_T, BLOCK_C], ACC), tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_x = load_sum(p_x, p_residual, o_t, stride_x, stride_residual, o_c, T, C, HAS_RESIDUAL=HAS_RESIDUAL,
                       EVEN_C=EVEN_C)
        if HAS_RESIDUAL:
            store_tile(p_total, b_x, o_t, C, o_c, T, C, EVEN_COLUMNS=EVEN_C)
        b_distance = b_x.to(ACC) - b_pivot[:, None]
        if not EVEN_C:
            b_distance = tl.where((o_c < C)[None, :], b_distance, 0.0)
        b_sum += b_distance
        b_squares += b_distance * b_distance
        if not OWN_NORM:
            b_hidden1 = add_down(b_hidden1, b_x, p_down_weight, o_1, o_c, R, C, EVEN_R=EVEN_R, EVEN_C=EVEN_C,
                                 PRECISION=PRECISION, ACC=ACC)
            if SECOND:
                b_hidden2 = add_down(b_hidden2, b_x, p_down_weight, o_2, o_c, R, C, EVEN_R=EVEN_R, EVEN_C=EVEN_C,
                                     PRECISION=PRECISION, ACC=ACC)
    b_shift = tl.sum(b_sum, 1) / C                                      # of the mean from the pivot
    b_mean = b_pivot + b_shift
    b_variance = tl.maximum(tl.sum(b_squares, 1) / C - b_shift * b_shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_rstd = 1.0 / tl.sqrt(b_variance + EPS)
    if HAS_RESIDUAL:
        tl.debug_barrier()                                              # the sum is written; it is read from here on
        p_x, stride_x = p_total, C

    if OWN_NORM:
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            b_x = load_tile(p_x, o_t, stride_x, o_c, T, C, EVEN_COLUMNS=EVEN_C)
            b_weight = load_vector(p_norm_weight, o_c, C, ACC=ACC, EVEN=EVEN_C)
            b_bias = load_vector(p_norm_bias, o_c, C, ACC=ACC, EVEN=EVEN_C)
            b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
            b_read = (b_normalised * b_weight[None, :] + b_bias[None, :]).to(b_x.dtype)                 # [T, C]
            b_hidden1 = add_down(b_hidden1, b_read, p_down_weight, o_1, o_c, R, C, EVEN_R=EVEN_R, EVEN_C=EVEN_C,
                                 PRECISION=PRECISION, ACC=ACC)
            if SECOND:
                b_hidden2 = add_down(b_hidden2, b_read, p_down_weight, o_2, o_c, R, C, EVEN_R=EVEN_R, EVEN_C=EVEN_C,
                                     PRECISION=PRECISION, ACC=ACC)

    tl.store(p_mean + o_t, b_mean, mask=o_t < T)
    tl.store(p_rstd + o_t, b_rstd, mask=o_t < T)
    b_hidden1 = store_hidden(p_hidden, b_hidden1, p_down_bias, o_t, o_1, T, R, EVEN_R=EVEN_R, ACC=ACC)
    if SECOND:
        b_hidden2 = store_hidden(p_hidden, b_hidden2, p_down_bias, o_t, o_2, T, R, EVEN_R=EVEN_R, ACC=ACC)

    b_scale = tl.load(p_scale).to(ACC)
    b_shift = -b_mean * b_rstd
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_x = load_tile(p_x, o_t, stride_x, o_c, T, C, EVEN_COLUMNS=EVEN_C)
        b_up = load_tile(p_up_weight, o_c, R, o_1, C, R, EVEN_ROWS=EVEN_C, EVEN_COLUMNS=EVEN_R)         # [C, R]
        b_adapter = tl.dot(b_hidden1, tl.trans(b_up), input_precision=PRECISION, out_dtype=ACC)         # [T, C]
        if SECOND:
            b_up = load_tile(p_up_weight, o_c, R, o_2, C, R, EVEN_ROWS=EVEN_C, EVEN_COLUMNS=EVEN_R)
            b_adapter = tl.dot(b_hidden2, tl.trans(b_up), b_adapter, input_precision=PRECISION, out_dtype=ACC)
        b_weight = load_vector(p_weight, o_c, C, ACC=ACC, EVEN=EVEN_C)
        b_bias = load_vector(p_bias, o_c, C, ACC=ACC, EVEN=EVEN_C)
        b_up_bias = load_vector(p_up_bias, o_c, C, ACC=ACC, EVEN=EVEN_C)
        b_normalised = b_x.to(ACC) * b_rstd[:, None] + b_shift[:, None]
        if OWN_NORM:
            b_y = b_normalised * b_weight[None, :] + b_bias[None, :]
            b_stream = b_x.to(ACC) + b_scale * (b_adapter + b_up_bias[None, :])
            store_tile(p_stream, b_stream, o_t, C, o_c, T, C, EVEN_COLUMNS=EVEN_C)
        else:
            b_bias += b_scale * b_up_bias
            b_y = b_normalised * b_weight[None, :] + b_bias[None, :] + b_scale * b_adapter
        store_tile(p_y, b_y, o_t, C, o_c, T, C, EVEN_COLUMNS=EVEN_C)


# ---------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=COUNTS)
def input_gradient_kernel(
    p_dy,                       # (T, C), gradient of y
    p_dstream,                  # (T, C), gradient of the stream; unused without HAS_DSTREAM and OWN_NORM
    p_x,                        # (T, C), t
    p_weight,                   # (C,), γ of LayerNorm
    p_down_weight,              # (R, C), Wd, in the dtype of x
    p_up_weight,                # (C, R), Wu, in the dtype of x
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
    C: tl.constexpr,            # width
    R: tl.constexpr,            # hidden width
    NEED_DX: tl.constexpr,      # whether the gradient of x is wanted
    HAS_DSTREAM: tl.constexpr,  # whether the stream has a gradient
    OWN_NORM: tl.constexpr,     # whether the adapter has a LayerNorm of its own
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of statistics and sums
    BLOCK_T: tl.constexpr,      # rows of a program
    BLOCK_C: tl.constexpr,      # columns of a step
    FIRST: tl.constexpr,        # hidden units of the first piece
    SECOND: tl.constexpr,       # and of the second one, or 0
):
    """dh = s (dy Wu) ∘ [h > 0], and dx = LN'(dy ∘ γ) + dh Wd (+ the gradient of the residual stream).

    OWN_NORM: dh = s (dstream Wu) ∘ [h > 0], and dx = LN'(dy ∘ γ + dh Wd ∘ γ') + dstream.

    With g the argument of LN', m₁ and m₂ the means of g and g x̂ over a row, LN'(g) = (g − m₁ − x̂ m₂) / std is
    evaluated as g / std + a t + b, with a and b of the row.
    """
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    EVEN_R: tl.constexpr = FIRST + SECOND == R
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_1, o_2 = tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND if SECOND else 1)
    b_dhidden1, b_dhidden2 = tl.zeros([BLOCK_T, FIRST], ACC), tl.zeros([BLOCK_T, SECOND if SECOND else 1], ACC)
    b_mean = tl.load(p_mean + o_t, mask=o_t < T, other=0.0)
    b_rstd = tl.load(p_rstd + o_t, mask=o_t < T, other=0.0)
    b_shift = -b_mean * b_rstd

    b_g, b_gx = tl.zeros([BLOCK_T, BLOCK_C], ACC), tl.zeros([BLOCK_T, BLOCK_C], ACC)    # Σ g and Σ g x̂ by column
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        if NEED_DX or not OWN_NORM:
            b_dy = load_tile(p_dy, o_t, stride_dy, o_c, T, C, EVEN_COLUMNS=EVEN_C)                      # [T, C]
        if NEED_DX:
            b_x = load_tile(p_x, o_t, stride_x, o_c, T, C, EVEN_COLUMNS=EVEN_C).to(ACC)
            b_dnormalised = b_dy.to(ACC) * load_vector(p_weight, o_c, C, ACC=ACC, EVEN=EVEN_C)[None, :]
            b_g += b_dnormalised
            b_gx += b_dnormalised * (b_x * b_rstd[:, None] + b_shift[:, None])
        if OWN_NORM:
            b_dy = load_tile(p_dstream, o_t, stride_dstream, o_c, T, C, EVEN_COLUMNS=EVEN_C)
        b_dhidden1 = add_up(b_dhidden1, b_dy, p_up_weight, o_1, o_c, R, C, EVEN_R=EVEN_R, EVEN_C=EVEN_C,
                            PRECISION=PRECISION, ACC=ACC)
        if SECOND:
            b_dhidden2 = add_up(b_dhidden2, b_dy, p_up_weight, o_2, o_c, R, C, EVEN_R=EVEN_R, EVEN_C=EVEN_C,
                                PRECISION=PRECISION, ACC=ACC)

    b_mean_g, b_mean_gx = tl.sum(b_g, 1), tl.sum(b_gx, 1)
    b_scale = tl.load(p_scale).to(ACC)
    b_dhidden1, b_of_g, b_of_gx = store_dhidden(
        p_dhidden, b_dhidden1, b_scale, p_hidden, p_down_norm, p_down_shift, o_t, o_1, T, R, OWN_NORM=OWN_NORM,
        EVEN_R=EVEN_R, ACC=ACC)
    if OWN_NORM:
        b_mean_g += b_of_g
        b_mean_gx += b_of_gx
    if SECOND:
        b_dhidden2, b_of_g, b_of_gx = store_dhidden(
            p_dhidden, b_dhidden2, b_scale, p_hidden, p_down_norm, p_down_shift, o_t, o_2, T, R, OWN_NORM=OWN_NORM,
            EVEN_R=EVEN_R, ACC=ACC)
        if OWN_NORM:
            b_mean_g += b_of_g
            b_mean_gx += b_of_gx

    if NEED_DX:
        b_mean_g, b_mean_gx = b_mean_g / C, b_mean_gx / C
        b_of_x = -b_mean_gx * b_rstd * b_rstd
        b_constant = -(b_mean_g + b_shift * b_mean_gx) * b_rstd
        for start in range(0, C, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            b_dy = load_tile(p_dy, o_t, stride_dy, o_c, T, C, EVEN_COLUMNS=EVEN_C).to(ACC)
            b_x = load_tile(p_x, o_t, stride_x, o_c, T, C, EVEN_COLUMNS=EVEN_C).to(ACC)
            b_down = load_tile(p_down_weight, o_1, C, o_c, R, C, EVEN_ROWS=EVEN_R, EVEN_COLUMNS=EVEN_C)     # [R, C]
            b_dread = tl.dot(b_dhidden1, b_down, input_precision=PRECISION, out_dtype=ACC)                  # [T, C]
            if SECOND:
                b_down = load_tile(p_down_weight, o_2, C, o_c, R, C, EVEN_ROWS=EVEN_R, EVEN_COLUMNS=EVEN_C)
                b_dread = tl.dot(b_dhidden2, b_down, b_dread, input_precision=PRECISION, out_dtype=ACC)
            b_dnormalised = b_dy * load_vector(p_weight, o_c, C, ACC=ACC, EVEN=EVEN_C)[None, :]
            if OWN_NORM:
                b_dnormalised += b_dread * load_vector(p_norm_weight, o_c, C, ACC=ACC, EVEN=EVEN_C)[None, :]
            b_dx = b_dnormalised * b_rstd[:, None] + (b_x * b_of_x[:, None] + b_constant[:, None])
            if not OWN_NORM:
                b_dx += b_dread
            if HAS_DSTREAM:
                b_dx += load_tile(p_dstream, o_t, stride_dstream, o_c, T, C, EVEN_COLUMNS=EVEN_C).to(ACC)
            store_tile(p_dx, b_dx, o_t, C, o_c, T, C, EVEN_COLUMNS=EVEN_C)


@triton.jit
def store_dhidden(
    p_dhidden,                  # written: (T, R), gradient of the hidden activations before ReLU
    b_dhidden,                  # dy Wu, [T, R]
    b_scale,                    # s
    p_hidden,                   # (T, R), hidden activations
    p_down_norm,                # (R,), Wd γ'; unused without OWN_NORM
    p_down_shift,               # (R,), bd + Wd β'; unused without OWN_NORM
    o_t,                        # offsets of rows
    o_r,                        # hidden units of the piece
    T,                          # rows
    R: tl.constexpr,            # hidden width
    OWN_NORM: tl.constexpr,     # whether the adapter has a LayerNorm of its own
    EVEN_R: tl.constexpr,       # whether R is the sum of the pieces
    ACC: tl.constexpr,          # dtype of sums
):
    """dh in the dtype of x, [T, R], which is also written; and with OWN_NORM its parts of Σ g and Σ g x̂, [T] each."""
    b_hidden = load_tile(p_hidden, o_t, R, o_r, T, R, EVEN_COLUMNS=EVEN_R)
    b_dhidden = tl.where(b_hidden > 0, b_dhidden * b_scale, 0.0).to(p_dhidden.dtype.element_ty)
    store_tile(p_dhidden, b_dhidden, o_t, R, o_r, T, R, EVEN_COLUMNS=EVEN_R)
    if OWN_NORM:
        b_down_norm = load_vector(p_down_norm, o_r, R, ACC=ACC, EVEN=EVEN_R)
        b_down_shift = load_vector(p_down_shift, o_r, R, ACC=ACC, EVEN=EVEN_R)
        b_of_g = tl.sum(b_dhidden.to(ACC) * b_down_norm[None, :], 1)
        b_of_gx = tl.sum(b_dhidden.to(ACC) * (b_hidden.to(ACC) - b_down_shift[None, :]), 1)
        return b_dhidden, b_of_g, b_of_gx
    else:
        return b_dhidden, 0.0, 0.0


@triton.jit(do_not_specialize=COUNTS)
def parameter_gradient_kernel(
    p_dy,                       # (T, C), gradient of y, or of the stream with OWN_NORM
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
    rows_per_share,             # rows of a share, a multiple of BLOCK_T
    C: tl.constexpr,            # width
    R: tl.constexpr,            # hidden width
    NEED_UP: tl.constexpr,      # which sums are wanted
    NEED_COLUMN: tl.constexpr,
    NEED_DOWN: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    OWN_NORM: tl.constexpr,     # whether the adapter has a LayerNorm of its own
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_T: tl.constexpr,      # rows of a step
    BLOCK_C: tl.constexpr,      # columns of a program
    FIRST: tl.constexpr,        # hidden units of the first piece
    SECOND: tl.constexpr,       # and of the second one, or 0
    STAGES: tl.constexpr,       # steps whose loads are under way
):
    """Share i of  dyᵀ h (C, R),  Σ dy (C),  (dhᵀ x)ᵀ (C, R),  Σ dh (R),  Σ dy x̂ (C); OWN_NORM: x̂ in the place of x."""
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    EVEN_R: tl.constexpr = FIRST + SECOND == R
    OTHER: tl.constexpr = SECOND if SECOND else 1
    i_share = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_1, o_2 = tl.arange(0, FIRST), FIRST + tl.arange(0, OTHER)
    b_dup1, b_dup2 = tl.zeros([BLOCK_C, FIRST], ACC), tl.zeros([BLOCK_C, OTHER], ACC)
    b_ddown1, b_ddown2 = tl.zeros([BLOCK_C, FIRST], ACC), tl.zeros([BLOCK_C, OTHER], ACC)
    b_bias1, b_bias2 = tl.zeros([FIRST], ACC), tl.zeros([OTHER], ACC)
    b_dcolumn, b_dweight = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_C], ACC)

    begin = tl.program_id(1) * rows_per_share
    end = tl.minimum(begin + rows_per_share, T)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        o_t = start + tl.arange(0, BLOCK_T)
        if NEED_UP or NEED_COLUMN or NEED_WEIGHT:
            b_dy = load_tile(p_dy, o_t, stride_dy, o_c, end, C, EVEN_COLUMNS=EVEN_C)                    # [T, C]
        if NEED_DOWN or NEED_WEIGHT:
            b_x = load_tile(p_x, o_t, stride_x, o_c, end, C, EVEN_COLUMNS=EVEN_C)
        if NEED_WEIGHT or (NEED_DOWN and OWN_NORM):
            b_mean = tl.load(p_mean + o_t, mask=o_t < end, other=0.0)
            b_rstd = tl.load(p_rstd + o_t, mask=o_t < end, other=0.0)
            b_normalised = (b_x.to(ACC) - b_mean[:, None]) * b_rstd[:, None]
        if NEED_UP:
            b_hidden = load_tile(p_hidden, o_t, R, o_1, end, R, EVEN_COLUMNS=EVEN_R)                    # [T, R]
            b_dup1 = tl.dot(tl.trans(b_dy), b_hidden, b_dup1, input_precision=PRECISION, out_dtype=ACC)
            if SECOND:
                b_hidden = load_tile(p_hidden, o_t, R, o_2, end, R, EVEN_COLUMNS=EVEN_R)
                b_dup2 = tl.dot(tl.trans(b_dy), b_hidden, b_dup2, input_precision=PRECISION, out_dtype=ACC)
        if NEED_DOWN:
            b_read = tl.trans(b_normalised.to(b_x.dtype) if OWN_NORM else b_x)                          # [C, T]
            b_dhidden = load_tile(p_dhidden, o_t, R, o_1, end, R, EVEN_COLUMNS=EVEN_R)                  # [T, R]
            b_ddown1 = tl.dot(b_read, b_dhidden, b_ddown1, input_precision=PRECISION, out_dtype=ACC)
            if tl.program_id(0) == 0:
                b_bias1 += tl.sum(b_dhidden.to(ACC), 0)
            if SECOND:
                b_dhidden = load_tile(p_dhidden, o_t, R, o_2, end, R, EVEN_COLUMNS=EVEN_R)
                b_ddown2 = tl.dot(b_read, b_dhidden, b_ddown2, input_precision=PRECISION, out_dtype=ACC)
                if tl.program_id(0) == 0:
                    b_bias2 += tl.sum(b_dhidden.to(ACC), 0)
        if NEED_COLUMN:
            b_dcolumn += tl.sum(b_dy.to(ACC), 0)
        if NEED_WEIGHT:
            b_dweight += tl.sum(b_dy.to(ACC) * b_normalised, 0)

    m_c = o_c < C
    if NEED_UP:
        store_tile(p_dup + i_share * C * R, b_dup1, o_c, R, o_1, C, R, EVEN_ROWS=EVEN_C, EVEN_COLUMNS=EVEN_R)
        if SECOND:
            store_tile(p_dup + i_share * C * R, b_dup2, o_c, R, o_2, C, R, EVEN_ROWS=EVEN_C, EVEN_COLUMNS=EVEN_R)
    if NEED_COLUMN:
        tl.store(p_dcolumn + i_share * C + o_c, b_dcolumn, mask=m_c)
    if NEED_DOWN:
        store_tile(p_ddown + i_share * C * R, b_ddown1, o_c, R, o_1, C, R, EVEN_ROWS=EVEN_C, EVEN_COLUMNS=EVEN_R)
        if SECOND:
            store_tile(p_ddown + i_share * C * R, b_ddown2, o_c, R, o_2, C, R, EVEN_ROWS=EVEN_C, EVEN_COLUMNS=EVEN_R)
        if tl.program_id(0) == 0:
            tl.store(p_ddown_bias + i_share * R + o_1, b_bias1, mask=o_1 < R)
            if SECOND:
                tl.store(p_ddown_bias + i_share * R + o_2, b_bias2, mask=o_2 < R)
    if NEED_WEIGHT:
        tl.store(p_dweight + i_share * C + o_c, b_dweight, mask=m_c)


@triton.jit(do_not_specialize=COUNTS)
def finish_kernel(
    p_dup,                      # (shares, C, R), from parameter_gradient_kernel; unused without NEED_UP
    p_dcolumn,                  # (shares, C); unused without NEED_COLUMN
    p_ddown,                    # (shares, C, R); unused without NEED_DOWN
    p_ddown_bias,               # (shares, R); unused without NEED_DOWN
    p_down_weight,              # (R, C), Wd; read with OWN_NORM
    p_up_weight,                # (C, R), Wu
    p_up_bias,                  # (C,), bu
    p_scale,                    # (), s
    p_norm_weight,              # (C,), γ'; read with OWN_NORM
    p_norm_bias,                # (C,), β'; read with OWN_NORM
    p_of_down_weight,           # written if NEED_DOWN: (R, C), gradient of Wd
    p_of_down_bias,             # written if NEED_DOWN: (R,), of bd
    p_of_up_weight,             # written if NEED_UP: (C, R), of Wu
    p_of_up_bias,               # written if NEED_COLUMN: (C,), of bu
    p_of_scale,                 # written if NEED_UP and NEED_COLUMN: a share of ds for each program
    p_of_norm_weight,           # written if NEED_DOWN, with OWN_NORM: (C,), of γ'
    p_of_norm_bias,             # written if NEED_DOWN, with OWN_NORM: (C,), of β'
    SHARES,                     # shares; none where there are no rows
    C: tl.constexpr,            # width
    R: tl.constexpr,            # hidden width
    NEED_UP: tl.constexpr,      # which sums there are
    NEED_COLUMN: tl.constexpr,
    NEED_DOWN: tl.constexpr,
    OWN_NORM: tl.constexpr,     # whether the adapter has a LayerNorm of its own
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_C: tl.constexpr,      # columns of a program
    BLOCK_R: tl.constexpr,      # R, rounded up
):
    """The gradients of the adapter's parameters from the shares, in the parameters' dtypes.

    OWN_NORM: the adapter reads x̂ ∘ γ' + β', so that dWd = (dhᵀ x̂) ∘ γ' + (Σ dh) ⊗ β', dγ' = Σ_r Wd ∘ (dhᵀ x̂), and
    dβ' = (Σ dh) Wd.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_r = tl.arange(0, BLOCK_R)
    m_c, m_r = o_c < C, o_r < R
    b_up, b_down = tl.zeros([BLOCK_C, BLOCK_R], ACC), tl.zeros([BLOCK_C, BLOCK_R], ACC)
    b_column, b_down_bias = tl.zeros([BLOCK_C], ACC), tl.zeros([BLOCK_R], ACC)
    for i_share in range(SHARES):
        first = tl.cast(i_share, tl.int64) * (C * R)
        if NEED_UP:
            b_up += load_tile(p_dup + first, o_c, R, o_r, C, R)
        if NEED_COLUMN:
            b_column += tl.load(p_dcolumn + i_share * C + o_c, mask=m_c, other=0.0)
        if NEED_DOWN:
            b_down += load_tile(p_ddown + first, o_c, R, o_r, C, R)
            b_down_bias += tl.load(p_ddown_bias + i_share * R + o_r, mask=m_r, other=0.0)

    b_scale = tl.load(p_scale).to(ACC)
    if NEED_UP and NEED_COLUMN:
        b_of_scale = tl.sum(b_up * load_tile(p_up_weight, o_c, R, o_r, C, R).to(ACC), 1)
        b_of_scale += b_column * tl.load(p_up_bias + o_c, mask=m_c, other=0.0).to(ACC)
        tl.store(p_of_scale + tl.program_id(0), tl.sum(b_of_scale, 0))
    if NEED_UP:
        store_tile(p_of_up_weight, b_up * b_scale, o_c, R, o_r, C, R)
    if NEED_COLUMN:
        tl.store(p_of_up_bias + o_c, (b_column * b_scale).to(p_of_up_bias.dtype.element_ty), mask=m_c)
    if NEED_DOWN:
        if OWN_NORM:
            b_weight = tl.trans(load_tile(p_down_weight, o_r, C, o_c, R, C)).to(ACC)                    # [C, R]
            b_of_weight, b_of_bias = tl.sum(b_weight * b_down, 1), tl.sum(b_weight * b_down_bias[None, :], 1)
            tl.store(p_of_norm_weight + o_c, b_of_weight.to(p_of_norm_weight.dtype.element_ty), mask=m_c)
            tl.store(p_of_norm_bias + o_c, b_of_bias.to(p_of_norm_bias.dtype.element_ty), mask=m_c)
            b_down *= tl.load(p_norm_weight + o_c, mask=m_c, other=0.0).to(ACC)[:, None]
            b_down += b_down_bias[None, :] * tl.load(p_norm_bias + o_c, mask=m_c, other=0.0).to(ACC)[:, None]
        store_tile(p_of_down_weight, tl.trans(b_down), o_r, C, o_c, R, C)
        if tl.program_id(0) == 0:
            tl.store(p_of_down_bias + o_r, b_down_bias.to(p_of_down_bias.dtype.element_ty), mask=m_r)
