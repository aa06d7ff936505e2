"""Triton kernels of prefix attention, and the functions that launch them.

The tokens of one head of one sequence attend to columns in one softmax: first the N tokens, behind them the P
prefix columns. Nothing of size N × N and no concatenation of tokens and prefix ever exists in memory; the tile of
columns in which both meet is loaded from two places.

    0                   64                  128                 192 193         203
    ├── tokens ─────────┼── tokens ─────────┼── tokens ─────────┼─ token, prefix ─┤         N = 193, P = 10
        plain tiles: neither masked (unless causal) nor scaled    tail: 16 columns

The rows, one for each query, are cut the same way. The last tile on either axis is only as wide as it must be (a
power of two, 16 at least), which at these lengths is a third of the work.

    forward    one program per (sequence, head, block of queries): online softmax, one pass over the columns
    backward   one launch, in which a program owns the gradient of
                   a block of queries (walks over all columns), or
                   a block of columns (walks over all queries)
               The programs of one head are neighbours, so that they share its queries, keys, values and
               gradients in the L2 cache. No two programs write the same address: no atomics, and the same
               bits at every repetition. The prefix is shared by all sequences; its gradient is written per
               sequence and summed in a second, ordered step.

Sequences are the samples of a (B, N, …) tensor, or lie one behind the other in a packed (T, …) tensor between the
marks cu_seqlens. In the latter case their number of tokens is only known here, so that the last tiles are full
ones; N is the longest, and programs beyond the end of their sequence have nothing to do.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask, i_ index. N is the number of tokens of the
sequence at hand; as an argument of the two kernels, of the longest one. Two tuples travel through the functions:

    rows       pointers to queries, output gradients, outputs and log-sum-exps; two strides, N, H
    columns    pointers to keys, values, prefix keys, prefix values and λ; the stride of a token, N, H

Logits are kept in base 2 (multiplied by log2 e), because exp2 is the instruction that the hardware has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from upperson_kernels import tiles
from upperson_kernels.backend import accumulator, capability, float32_precision
from upperson_kernels.rows import TRITON_DTYPES

COUNTS = ["N", "P", "T"]        # change from batch to batch, and no code is better for knowing more about them
LOG2_E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------------------------------- shared pieces


@triton.jit
def locate_sequence(p_cu_seqlens, i_s, N, T, PACKED: tl.constexpr):
    """A sequence's first token among all T, and its number of tokens. Marks outside of the tensor are cut off."""
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + i_s).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + i_s + 1).to(tl.int64), begin), T)
        return begin, tl.minimum(end - begin, N).to(tl.int32)
    else:
        return i_s * N, N


@triton.jit
def locate_head(i_s, i_h, begin, stride_s, stride_n, stride_h, PACKED: tl.constexpr):
    """Offset of a sequence's head in a (B, N, …, H, …) or (T, …, H, …) tensor."""
    if PACKED:
        return begin * stride_n + i_h * stride_h
    else:
        return i_s * stride_s + i_h * stride_h


@triton.jit
def tile_of_rows(p_base, start, stride_row, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows start … start + BLOCK of a (rows, D) matrix, and which of them lie inside of it."""
    o_row, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    p_tile = p_base + tl.cast(start, tl.int64) * stride_row + (o_row[:, None] * stride_row + o_d[None, :])
    m_tile = (o_row[:, None] >= -start) & (o_row[:, None] < rows - start) & (o_d[None, :] < D)
    return p_tile, m_tile


@triton.jit
def load_rows(p_base, start, stride_row, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block of rows of a (rows, D) matrix, zero outside of it.  [BLOCK, BLOCK_D]"""
    p_tile, m_tile = tile_of_rows(p_base, start, stride_row, rows, D, BLOCK, BLOCK_D)
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def store_rows(p_base, b_rows, start, stride_row, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    p_tile, m_tile = tile_of_rows(p_base, start, stride_row, rows, D, BLOCK, BLOCK_D)
    tl.store(p_tile, b_rows.to(p_base.dtype.element_ty), mask=m_tile)


@triton.jit
def plain_columns(N, P, BLOCK_N: tl.constexpr):
    """How many columns lie in plain tiles: full of tokens, and not the last."""
    return tl.minimum(N // BLOCK_N, (N + P - 1) // BLOCK_N) * BLOCK_N


@triton.jit
def load_columns(columns, start, P, D: tl.constexpr, SCALE_LOGITS: tl.constexpr, ACC: tl.constexpr,
                 PLAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of columns: its offsets, keys and values [N, D], and the factors of its logits and its weights [N],
    which are λ where it acts (on prefix columns, one of the two) and 1 elsewhere."""
    p_k, p_v, p_prefix_key, p_prefix_value, p_prefix_scale, stride_n, N, H = columns
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, start, stride_n, N, D, BLOCK_N, BLOCK_D)
    b_v = load_rows(p_v, start, stride_n, N, D, BLOCK_N, BLOCK_D)
    b_one = tl.full([BLOCK_N], 1.0, ACC)
    b_factor = b_one
    if not PLAIN:
        b_k += load_rows(p_prefix_key, start - N, H * D, P, D, BLOCK_N, BLOCK_D).to(b_k.dtype)
        b_v += load_rows(p_prefix_value, start - N, H * D, P, D, BLOCK_N, BLOCK_D).to(b_v.dtype)
        b_factor = tl.where(o_n >= N, tl.load(p_prefix_scale).to(ACC), b_one)
    if SCALE_LOGITS:
        return o_n, b_k, b_v, b_factor, b_one
    else:
        return o_n, b_k, b_v, b_one, b_factor


@triton.jit
def first_query(o_n, N, P, CAUSAL: tl.constexpr):
    """The first query that sees each column: a token's own if causal, else query 0; none behind the last column."""
    b_first = tl.where(o_n < N, o_n, 0) if CAUSAL else tl.zeros_like(o_n)
    return tl.where(o_n < N + P, b_first, 2**30)


# ---------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_qkv, p_prefix_key, p_prefix_value, p_prefix_scale, p_cu_seqlens, p_out, p_lse,
    stride_qkv_s, stride_qkv_n, stride_qkv_part, stride_qkv_h, N, P, H, T,
    D: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, SCALE_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LAST_M: tl.constexpr, LAST_N: tl.constexpr, MIXED_TILES: tl.constexpr,
):
    """BLOCK_…: sizes of tiles; LAST_…: of the last tile of rows and of columns. MIXED_TILES: whether there may be full
    tiles of columns that are not plain."""
    blocks = tl.cdiv(N, BLOCK_M)
    i_block = tl.program_id(0) % blocks
    i_head = (tl.program_id(0) // blocks).to(tl.int64)                                  # sequence and head
    i_s, i_h = i_head // H, i_head % H
    begin, length = locate_sequence(p_cu_seqlens, i_s, N, T, PACKED)

    p_q = p_qkv + locate_head(i_s, i_h, begin, stride_qkv_s, stride_qkv_n, stride_qkv_h, PACKED)
    p_k = p_q + stride_qkv_part
    columns = (p_k, p_k + stride_qkv_part, p_prefix_key + i_h * D, p_prefix_value + i_h * D, p_prefix_scale,
               stride_qkv_n, length, H)
    p_o = p_out + (begin * H + i_h) * D
    p_l = p_lse + i_h * T + begin
    if LAST_M < BLOCK_M and i_block == blocks - 1:
        attend(p_q, p_o, p_l, columns, i_block * BLOCK_M, P, D, CAUSAL, SCALE_LOGITS, PRECISION, ACC,
               LAST_M, BLOCK_N, BLOCK_D, LAST_N, MIXED_TILES)
    elif i_block * BLOCK_M < length:
        attend(p_q, p_o, p_l, columns, i_block * BLOCK_M, P, D, CAUSAL, SCALE_LOGITS, PRECISION, ACC,
               BLOCK_M, BLOCK_N, BLOCK_D, LAST_N, MIXED_TILES)


@triton.jit
def attend(p_q, p_o, p_lse, columns, start_m, P, D: tl.constexpr, CAUSAL: tl.constexpr,
           SCALE_LOGITS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LAST_N: tl.constexpr, MIXED_TILES: tl.constexpr):
    """Output and log-sum-exp of a block of queries."""
    _, _, _, _, _, stride_n, N, H = columns
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q, start_m, stride_n, N, D, BLOCK_M, BLOCK_D)                                  # [M, D]
    b_max = tl.full([BLOCK_M], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_M], ACC)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    plain = plain_columns(N, P, BLOCK_N)
    last = N + P if LAST_N == BLOCK_N else (N + P - 1) // BLOCK_N * BLOCK_N
    for start in range(0, tl.minimum(plain, start_m + BLOCK_M) if CAUSAL else plain, BLOCK_N):
        b_max, b_sum, b_acc = attend_tile(b_max, b_sum, b_acc, b_q, o_m, columns, start, P, D, CAUSAL, SCALE_LOGITS,
                                          PRECISION, ACC, True, BLOCK_N, BLOCK_D)
    if MIXED_TILES:
        for start in range(plain, last, BLOCK_N):
            b_max, b_sum, b_acc = attend_tile(b_max, b_sum, b_acc, b_q, o_m, columns, start, P, D, CAUSAL,
                                              SCALE_LOGITS, PRECISION, ACC, False, BLOCK_N, BLOCK_D)
    if LAST_N < BLOCK_N:
        b_max, b_sum, b_acc = attend_tile(b_max, b_sum, b_acc, b_q, o_m, columns, last, P, D, CAUSAL, SCALE_LOGITS,
                                          PRECISION, ACC, False, LAST_N, BLOCK_D)

    store_rows(p_o, b_acc / b_sum[:, None], start_m, H * D, N, D, BLOCK_M, BLOCK_D)
    tl.store(p_lse + o_m, b_max + tl.log2(b_sum), mask=o_m < N)


@triton.jit
def attend_tile(b_max, b_sum, b_acc, b_q, o_m, columns, start, P, D: tl.constexpr,
                CAUSAL: tl.constexpr, SCALE_LOGITS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
                PLAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds a tile of columns to the running maximum, sum of exponentials and weighted sum of values."""
    o_n, b_k, b_v, b_logit_factor, b_weight_factor = load_columns(columns, start, P, D, SCALE_LOGITS, ACC, PLAIN,
                                                                  BLOCK_N, BLOCK_D)
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)     # [M, N]
    b_logits *= b_logit_factor[None, :] * (LOG2_E * D ** -0.5)
    if CAUSAL or not PLAIN:
        m_visible = first_query(o_n, columns[6], P, CAUSAL)[None, :] <= o_m[:, None]
        b_logits = tl.where(m_visible, b_logits, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
    b_correction = tl.exp2(b_max - b_new_max)
    b_weights = tl.exp2(b_logits - b_new_max[:, None])
    b_sum = b_sum * b_correction + tl.sum(b_weights, 1)
    b_weights = (b_weights * b_weight_factor[None, :]).to(b_v.dtype)                    # behind the softmax
    b_acc = b_acc * b_correction[:, None]
    b_acc += tl.dot(b_weights, b_v, input_precision=PRECISION, out_dtype=ACC)
    return b_new_max, b_sum, b_acc


# ---------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    p_qkv, p_prefix_key, p_prefix_value, p_prefix_scale, p_cu_seqlens, p_out, p_lse, p_grad,
    p_dqkv, p_dprefix_key, p_dprefix_value, p_dscale,
    stride_qkv_s, stride_qkv_n, stride_qkv_part, stride_qkv_h, stride_grad_s, stride_grad_n, stride_grad_h,
    N, P, H, T, D: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, SCALE_LOGITS: tl.constexpr,
    NEED_QKV: tl.constexpr, NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LAST_M: tl.constexpr, LAST_N: tl.constexpr, MIXED_TILES: tl.constexpr,
):
    """p_d…: where each gradient goes; those not needed are never touched. See launch_backward for shapes."""
    query_blocks = tl.cdiv(N, BLOCK_M) if NEED_QKV else 0
    column_blocks = tl.cdiv(N + P, BLOCK_N)
    i_block = tl.program_id(0) % (query_blocks + column_blocks)
    i_head = (tl.program_id(0) // (query_blocks + column_blocks)).to(tl.int64)          # sequence and head
    i_s, i_h = i_head // H, i_head % H
    begin, length = locate_sequence(p_cu_seqlens, i_s, N, T, PACKED)

    p_q = p_qkv + locate_head(i_s, i_h, begin, stride_qkv_s, stride_qkv_n, stride_qkv_h, PACKED)
    p_k = p_q + stride_qkv_part
    columns = (p_k, p_k + stride_qkv_part, p_prefix_key + i_h * D, p_prefix_value + i_h * D, p_prefix_scale,
               stride_qkv_n, length, H)
    rows = (p_q, p_grad + locate_head(i_s, i_h, begin, stride_grad_s, stride_grad_n, stride_grad_h, PACKED),
            p_out + (begin * H + i_h) * D, p_lse + i_h * T + begin, stride_qkv_n, stride_grad_n, length, H)
    p_dq = p_dqkv + (begin * 3 * H + i_h) * D                                           # contiguous (…, 3, H, D)

    if NEED_QKV and i_block < query_blocks:
        start_m = i_block * BLOCK_M
        if LAST_M < BLOCK_M and i_block == query_blocks - 1:
            query_gradient(p_dq, rows, columns, start_m, P, D, CAUSAL, SCALE_LOGITS, PRECISION, ACC,
                           LAST_M, BLOCK_N, BLOCK_D, LAST_N, MIXED_TILES)
        elif start_m < length:
            query_gradient(p_dq, rows, columns, start_m, P, D, CAUSAL, SCALE_LOGITS, PRECISION, ACC,
                           BLOCK_M, BLOCK_N, BLOCK_D, LAST_N, MIXED_TILES)
    else:
        i_column = i_block - query_blocks
        start_n = i_column * BLOCK_N
        HALF_M: tl.constexpr = BLOCK_M // 2                     # masks and dλ take registers: fewer queries at a time
        LAST_HALF_M: tl.constexpr = LAST_M if LAST_M < HALF_M else HALF_M
        PLAIN_M: tl.constexpr = HALF_M if CAUSAL else BLOCK_M
        LAST_PLAIN_M: tl.constexpr = LAST_HALF_M if CAUSAL else LAST_M
        gradients = (p_dq + H * D, p_dq + 2 * H * D,
                     p_dprefix_key + (i_s * P * H + i_h) * D, p_dprefix_value + (i_s * P * H + i_h) * D,
                     p_dscale + i_head * column_blocks + i_column)
        if start_n < plain_columns(length, P, BLOCK_N):
            if NEED_QKV:
                column_gradient(gradients, rows, columns, start_n, P, D, CAUSAL, SCALE_LOGITS, True, False, False,
                                False, PRECISION, ACC, True, PLAIN_M, BLOCK_N, BLOCK_D, LAST_PLAIN_M)
        elif LAST_N < BLOCK_N and i_column == column_blocks - 1:
            column_gradient(gradients, rows, columns, start_n, P, D, CAUSAL, SCALE_LOGITS, NEED_QKV, NEED_KEY,
                            NEED_VALUE, NEED_SCALE, PRECISION, ACC, False, HALF_M, LAST_N, BLOCK_D, LAST_HALF_M)
        elif MIXED_TILES and start_n < length + P:
            column_gradient(gradients, rows, columns, start_n, P, D, CAUSAL, SCALE_LOGITS, NEED_QKV, NEED_KEY,
                            NEED_VALUE, NEED_SCALE, PRECISION, ACC, False, HALF_M, BLOCK_N, BLOCK_D, LAST_HALF_M)


@triton.jit
def load_query_side(rows, start, D: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block of queries, its output gradients, log-sum-exps and Δ = g·o."""
    p_q, p_g, p_o, p_lse, stride_q_n, stride_g_n, N, H = rows
    b_q = load_rows(p_q, start, stride_q_n, N, D, BLOCK_M, BLOCK_D)
    b_g = load_rows(p_g, start, stride_g_n, N, D, BLOCK_M, BLOCK_D)
    b_o = load_rows(p_o, start, H * D, N, D, BLOCK_M, BLOCK_D)
    o_m = start + tl.arange(0, BLOCK_M)
    b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=0.0)
    b_delta = tl.sum(b_g.to(ACC) * b_o.to(ACC), 1)
    return b_q, b_g, b_lse, b_delta


@triton.jit
def softmax_gradient(b_x, b_y, b_x_side, b_y_side, b_lse, b_delta, m_visible, b_logit_factor, b_weight_factor,
                     D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """One tile of the softmax's backward: p, ds = p (w a − Δ), and its ingredients q·k and a = g·v.

    With x = q, y = k, x_side = g, y_side = v the tile is [queries, columns]; swapped, it is [columns, queries].
    """
    b_qk = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION, out_dtype=ACC)
    b_p = tl.exp2(b_qk * (b_logit_factor * (LOG2_E * D ** -0.5)) - b_lse)
    if m_visible is not None:
        b_p = tl.where(m_visible, b_p, 0.0)
    b_a = tl.dot(b_x_side, tl.trans(b_y_side), input_precision=PRECISION, out_dtype=ACC)
    b_ds = b_p * (b_a * b_weight_factor - b_delta)
    return b_p, b_ds, b_qk, b_a


@triton.jit
def query_gradient(p_dq, rows, columns, start_m, P, D: tl.constexpr, CAUSAL: tl.constexpr,
                   SCALE_LOGITS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LAST_N: tl.constexpr, MIXED_TILES: tl.constexpr):
    """dq_i = σ Σ_j ds_ij k_j for a block of queries; λ k_j where λ acts on the logits."""
    _, _, _, _, _, _, N, H = rows
    o_m = start_m + tl.arange(0, BLOCK_M)
    query_side = load_query_side(rows, start_m, D, ACC, BLOCK_M, BLOCK_D)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    plain = plain_columns(N, P, BLOCK_N)
    last = N + P if LAST_N == BLOCK_N else (N + P - 1) // BLOCK_N * BLOCK_N
    for start in range(0, tl.minimum(plain, start_m + BLOCK_M) if CAUSAL else plain, BLOCK_N):
        b_dq += query_gradient_tile(query_side, o_m, columns, start, P, D, CAUSAL, SCALE_LOGITS, PRECISION, ACC,
                                    True, BLOCK_N, BLOCK_D)
    if MIXED_TILES:
        for start in range(plain, last, BLOCK_N):
            b_dq += query_gradient_tile(query_side, o_m, columns, start, P, D, CAUSAL, SCALE_LOGITS, PRECISION, ACC,
                                        False, BLOCK_N, BLOCK_D)
    if LAST_N < BLOCK_N:
        b_dq += query_gradient_tile(query_side, o_m, columns, last, P, D, CAUSAL, SCALE_LOGITS, PRECISION, ACC,
                                    False, LAST_N, BLOCK_D)
    store_rows(p_dq, b_dq * D ** -0.5, start_m, 3 * H * D, N, D, BLOCK_M, BLOCK_D)


@triton.jit
def query_gradient_tile(query_side, o_m, columns, start, P, D: tl.constexpr, CAUSAL: tl.constexpr,
                        SCALE_LOGITS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, PLAIN: tl.constexpr,
                        BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """What a tile of columns adds to dq / σ."""
    b_q, b_g, b_lse, b_delta = query_side
    o_n, b_k, b_v, b_logit_factor, b_weight_factor = load_columns(columns, start, P, D, SCALE_LOGITS, ACC, PLAIN,
                                                                  BLOCK_N, BLOCK_D)
    m_visible = None
    if CAUSAL or not PLAIN:
        m_visible = first_query(o_n, columns[6], P, CAUSAL)[None, :] <= o_m[:, None]
    _, b_ds, _, _ = softmax_gradient(b_q, b_k, b_g, b_v, b_lse[:, None], b_delta[:, None], m_visible,
                                     b_logit_factor[None, :], b_weight_factor[None, :], D, PRECISION, ACC)
    b_ds = (b_ds * b_logit_factor[None, :]).to(b_k.dtype)                               # [M, N]
    return tl.dot(b_ds, b_k, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def column_gradient(gradients, rows, columns, start_n, P, D: tl.constexpr, CAUSAL: tl.constexpr,
                    SCALE_LOGITS: tl.constexpr, NEED_QKV: tl.constexpr, NEED_KEY: tl.constexpr,
                    NEED_VALUE: tl.constexpr, NEED_SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
                    PLAIN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    LAST_M: tl.constexpr):
    """dk_j = σ Σ_i ds_ij q_i and dv_j = Σ_i p_ij g_i for a block of columns, and what they add to dλ.

    λ on the weights: dλ = Σ p a over prefix columns, whose dv gains the factor λ. On the logits: dλ = Σ ds σ q·k, and
    dk gains it.
    """
    _, _, _, _, _, _, N, H = rows
    p_dk, p_dv, p_dprefix_key, p_dprefix_value, p_dscale = gradients
    column_side = load_columns(columns, start_n, P, D, SCALE_LOGITS, ACC, PLAIN, BLOCK_N, BLOCK_D)
    o_n, _, _, b_logit_factor, b_weight_factor = column_side
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    b_dscale = tl.zeros([BLOCK_N], ACC)

    last = N if LAST_M == BLOCK_M else (N - 1) // BLOCK_M * BLOCK_M
    begin = start_n // BLOCK_M * BLOCK_M if CAUSAL and PLAIN else 0                     # earlier queries see none of it
    for start in range(begin, last, BLOCK_M):
        b_dk, b_dv, b_dscale = column_gradient_tile(
            b_dk, b_dv, b_dscale, column_side, rows, start, P, D, CAUSAL, SCALE_LOGITS, NEED_QKV, NEED_KEY, NEED_VALUE,
            NEED_SCALE, PRECISION, ACC, BLOCK_M, BLOCK_D)
    if LAST_M < BLOCK_M:
        b_dk, b_dv, b_dscale = column_gradient_tile(
            b_dk, b_dv, b_dscale, column_side, rows, last, P, D, CAUSAL, SCALE_LOGITS, NEED_QKV, NEED_KEY, NEED_VALUE,
            NEED_SCALE, PRECISION, ACC, LAST_M, BLOCK_D)

    b_dk *= b_logit_factor[:, None] * D ** -0.5
    b_dv *= b_weight_factor[:, None]
    if NEED_QKV:
        store_rows(p_dk, b_dk, start_n, 3 * H * D, N, D, BLOCK_N, BLOCK_D)
        store_rows(p_dv, b_dv, start_n, 3 * H * D, N, D, BLOCK_N, BLOCK_D)
    if NEED_KEY:
        store_rows(p_dprefix_key, b_dk, start_n - N, H * D, P, D, BLOCK_N, BLOCK_D)
    if NEED_VALUE:
        store_rows(p_dprefix_value, b_dv, start_n - N, H * D, P, D, BLOCK_N, BLOCK_D)
    if NEED_SCALE:
        b_total = tl.sum(tl.where((o_n >= N) & (o_n < N + P), b_dscale, 0.0), 0)
        tl.store(p_dscale, b_total * D ** -0.5 if SCALE_LOGITS else b_total)


@triton.jit
def column_gradient_tile(b_dk, b_dv, b_dscale, column_side, rows, start, P, D: tl.constexpr,
                         CAUSAL: tl.constexpr, SCALE_LOGITS: tl.constexpr, NEED_QKV: tl.constexpr,
                         NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_SCALE: tl.constexpr,
                         PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds a block of queries to dk / (σ λ), dv / λ and, per column, dλ."""
    o_n, b_k, b_v, b_logit_factor, b_weight_factor = column_side
    o_m = start + tl.arange(0, BLOCK_M)
    b_q, b_g, b_lse, b_delta = load_query_side(rows, start, D, ACC, BLOCK_M, BLOCK_D)
    m_visible = None                    # rows of zeros behind the last query add nothing; columns there are not stored
    if CAUSAL:
        m_visible = first_query(o_n, rows[6], P, CAUSAL)[:, None] <= o_m[None, :]
    b_p, b_ds, b_qk, b_a = softmax_gradient(b_k, b_q, b_v, b_g, b_lse[None, :], b_delta[None, :], m_visible,
                                            b_logit_factor[:, None], b_weight_factor[:, None], D, PRECISION, ACC)
    if NEED_QKV or NEED_VALUE:
        b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision=PRECISION, out_dtype=ACC)
    if NEED_QKV or NEED_KEY:
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION, out_dtype=ACC)
    if NEED_SCALE:
        b_dscale += tl.sum(b_ds * b_qk if SCALE_LOGITS else b_p * b_a, 1)
    return b_dk, b_dv, b_dscale


# ---------------------------------------------------------------------------------------- launchers


def last_tiles(length: int, prefix_length: int, packed: bool, block_m: int, block_n: int) -> dict:
    """Sizes of the last tile of rows and of columns, and whether there may be full tiles of columns that are not plain;
    of packed sequences nothing is known before the kernel runs."""
    def last(count: int, block: int) -> int:
        rest = count % block
        return block if packed or rest == 0 else min(block, max(16, triton.next_power_of_2(rest)))

    columns = length + prefix_length
    last_n = last(columns, block_n)
    return dict(LAST_M=last(length, block_m), LAST_N=last_n,
                MIXED_TILES=last_n == block_n or (columns - 1) // block_n > length // block_n)


def addressable(tensor: Tensor, packed: bool) -> Tensor:
    """The tensor itself, or a copy where the kernels cannot walk it: they need neighbours of a row to be adjacent (a
    gradient of a sum has stride 0), and count the elements within a tile in 32 bits."""
    between_rows = tensor.stride(0 if packed else 1)
    return tensor if tensor.stride(-1) == 1 and between_rows < 2**24 else tensor.contiguous()


def sizes(qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[int, int, int]:
    """Number of sequences, tokens of the longest, and tokens of all."""
    if cu_seqlens is None:
        return qkv.shape[0], qkv.shape[1], qkv.shape[0] * qkv.shape[1]
    return cu_seqlens.shape[0] - 1, min(max_seqlen, qkv.shape[0]), qkv.shape[0]


def strides(tensor: Tensor, packed: bool) -> tuple[int, ...]:
    """Those of (B, N, …), or of (T, …) with a 0 in the place of the batch's; without the innermost one."""
    return (0, *tensor.stride()[:-1]) if packed else tensor.stride()[:-1]


def launch_forward(qkv: Tensor, prefix_key: Tensor, prefix_value: Tensor, prefix_scale: Tensor,
                   cu_seqlens: Tensor | None, max_seqlen: int, causal: bool,
                   scale_target: str) -> tuple[Tensor, Tensor]:
    """Returns the output, (B, N, H, D) or packed (T, H, D), and each row's log-sum-exp of logits in base 2, (H, T)
    with T = B · N."""
    sequences, length, tokens = sizes(qkv, cu_seqlens, max_seqlen)
    heads, width = qkv.shape[-2:]
    packed = cu_seqlens is not None
    acc_dtype = accumulator(qkv.dtype)
    out = qkv.new_empty(*qkv.shape[:-3], heads, width)
    lse = qkv.new_empty(heads, tokens, dtype=acc_dtype)
    if out.numel() == 0:
        return out, lse
    qkv = addressable(qkv, packed)
    chosen = tiles.choose("attention_forward", width, qkv.element_size(), capability(qkv))
    last = last_tiles(length, prefix_key.shape[0], packed, chosen["BLOCK_M"], chosen["BLOCK_N"])
    with torch.cuda.device_of(qkv):
        forward_kernel[(sequences * heads * triton.cdiv(length, chosen["BLOCK_M"]),)](
            qkv, prefix_key.contiguous(), prefix_value.contiguous(), prefix_scale, cu_seqlens, out, lse,
            *strides(qkv, packed), length, prefix_key.shape[0], heads, tokens,
            D=width, CAUSAL=causal, PACKED=packed, SCALE_LOGITS=scale_target == "logits",
            PRECISION=float32_precision(), ACC=TRITON_DTYPES[acc_dtype], **chosen, **last,
        )
    return out, lse


def launch_backward(grad: Tensor, qkv: Tensor, prefix_key: Tensor, prefix_value: Tensor, prefix_scale: Tensor,
                    cu_seqlens: Tensor | None, max_seqlen: int, out: Tensor, lse: Tensor, causal: bool,
                    scale_target: str, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, prefix_key, prefix_value and prefix_scale; an empty tensor for each that `needs` denies.

    The prefix gradients leave the kernel per sequence, (S, P, H, D), and per program, and are summed here.
    """
    sequences, length, tokens = sizes(qkv, cu_seqlens, max_seqlen)
    heads, width = qkv.shape[-2:]
    prefix_length = prefix_key.shape[0]
    packed = cu_seqlens is not None
    need_qkv, need_key, need_value, need_scale = needs
    acc_dtype = accumulator(qkv.dtype)
    chosen = tiles.choose("attention_backward", width, qkv.element_size(), capability(qkv))
    last = last_tiles(length, prefix_length, packed, chosen["BLOCK_M"], chosen["BLOCK_N"])
    query_blocks = triton.cdiv(length, chosen["BLOCK_M"]) if need_qkv else 0
    column_blocks = triton.cdiv(length + prefix_length, chosen["BLOCK_N"])

    def buffer(needed: bool, *shape: int, dtype: torch.dtype = acc_dtype) -> Tensor:
        return qkv.new_empty(shape if needed else 0, dtype=dtype)

    dqkv = buffer(need_qkv, *qkv.shape, dtype=qkv.dtype)
    dkey = buffer(need_key, sequences, prefix_length, heads, width)
    dvalue = buffer(need_value, sequences, prefix_length, heads, width)
    dscale = qkv.new_zeros((sequences, heads, column_blocks) if need_scale else 0, dtype=acc_dtype)
    if out.numel() == 0:
        dkey.zero_()
        dvalue.zero_()
    elif any(needs):
        grad, qkv = addressable(grad, packed), addressable(qkv, packed)
        with torch.cuda.device_of(qkv):
            backward_kernel[(sequences * heads * (query_blocks + column_blocks),)](
                qkv, prefix_key.contiguous(), prefix_value.contiguous(), prefix_scale, cu_seqlens, out, lse, grad,
                dqkv, dkey, dvalue, dscale, *strides(qkv, packed), *strides(grad, packed),
                length, prefix_length, heads, tokens,
                D=width, CAUSAL=causal, PACKED=packed, SCALE_LOGITS=scale_target == "logits",
                NEED_QKV=need_qkv, NEED_KEY=need_key, NEED_VALUE=need_value, NEED_SCALE=need_scale,
                PRECISION=float32_precision(), ACC=TRITON_DTYPES[acc_dtype], **chosen, **last,
            )
    if need_key:
        dkey = dkey.sum(0).to(prefix_key.dtype)
    if need_value:
        dvalue = dvalue.sum(0).to(prefix_value.dtype)
    if need_scale:
        dscale = dscale.sum().to(prefix_scale.dtype)
    return dqkv, dkey, dvalue, dscale
