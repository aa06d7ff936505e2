"""Triton kernels of prefix attention, and the functions that launch them.

The N tokens of one head of one sample attend to P prefix columns and N token columns in one softmax. Every
kernel walks over the prefix columns first and over the token columns after them; nothing of size N × N and
no concatenation of prefix and tokens ever exists in memory.

    forward    one program per (sample, head, block of queries): online softmax, one pass over the columns
    backward   one launch, in which a program owns the gradient of
                   a block of queries (walks over all columns),
                   a block of token keys and values (walks over all queries), or
                   a block of prefix columns of one sample (walks over all queries)
               The programs of one head are neighbours, so that they share its queries, keys, values and
               gradients in the L2 cache. No two programs write the same address: no atomics, and the same
               bits at every repetition. The prefix is shared by the batch; its gradient is written per
               sample and summed in a second, ordered step.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask. Logits are kept in base 2
(multiplied by log2 e), because exp2 is the instruction that the hardware has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import accumulator, capability, float32_precision

LOG2_E = tl.constexpr(1.4426950408889634)
TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def forward_tiles(head_width: int, element_size: int) -> dict:
    """Block sizes and launch options. Wider types than 16 bit take smaller tiles, or they would not fit registers."""
    block_d = max(16, triton.next_power_of_2(head_width))
    block, warps = (64, 4 if block_d <= 64 else 8) if element_size == 2 else (32, 8)
    return dict(BLOCK_M=block, BLOCK_N=block, BLOCK_P=16, BLOCK_D=block_d, num_warps=warps, num_stages=2)


def backward_tiles(head_width: int, element_size: int, capability: int) -> dict:
    """The same for backward, by compute capability (80 to 100): chosen so that nothing spills at head width 64.

    From Hopper on (90), matrix units take 64 rows at once and read operands from shared memory. Before it operands
    live in registers, and a tile of 64 × 64 spills.
    """
    tiles = forward_tiles(head_width, element_size)
    if element_size == 2 and capability < 90:
        tiles |= dict(BLOCK_M=64 if tiles["BLOCK_D"] <= 64 else 32, BLOCK_N=32, num_warps=4)
    elif capability >= 100:
        tiles |= dict(num_warps=8)
    return tiles


# ---------------------------------------------------------------------------------------- shared pieces


@triton.jit
def load_rows(p_base, o_row, stride_row, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a (rows, D) matrix, zero outside of it.  [BLOCK, BLOCK_D]"""
    o_d = tl.arange(0, BLOCK_D)
    m_rows = (o_row[:, None] < rows) & (o_d[None, :] < D)
    return tl.load(p_base + o_row[:, None] * stride_row + o_d[None, :], mask=m_rows, other=0.0)


@triton.jit
def store_rows(p_base, b_rows, o_row, stride_row, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    m_rows = (o_row[:, None] < rows) & (o_d[None, :] < D)
    tl.store(p_base + o_row[:, None] * stride_row + o_d[None, :], b_rows.to(p_base.dtype.element_ty), mask=m_rows)


@triton.jit
def prefix_factors(p_prefix_scale, SCALE_LOGITS: tl.constexpr, ACC: tl.constexpr):
    """λ where it acts and 1 where it does not: the factors of the prefix columns' logits and of their weights."""
    b_scale = tl.load(p_prefix_scale).to(ACC)
    b_one = tl.full([], 1.0, ACC)
    if SCALE_LOGITS:
        return b_scale, b_one
    else:
        return b_one, b_scale


@triton.jit
def online_softmax_step(b_q, b_k, b_v, b_max, b_sum, b_acc, m_visible, logit_scale, PRECISION: tl.constexpr):
    """Adds a block of columns to the running maximum, sum of exponentials and weighted sum of values."""
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=b_acc.dtype) * logit_scale
    b_logits = tl.where(m_visible, b_logits, float("-inf"))                             # [M, N]
    b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
    b_correction = tl.exp2(b_max - b_new_max)
    b_weights = tl.exp2(b_logits - b_new_max[:, None])
    b_sum = b_sum * b_correction + tl.sum(b_weights, 1)
    b_acc = b_acc * b_correction[:, None]
    b_acc += tl.dot(b_weights.to(b_v.dtype), b_v, input_precision=PRECISION, out_dtype=b_acc.dtype)
    return b_new_max, b_sum, b_acc


@triton.jit
def softmax_gradient(b_x, b_y, b_x_side, b_y_side, b_lse, b_delta, m_visible, logit_scale, weight,
                     PRECISION: tl.constexpr, ACC: tl.constexpr):
    """One tile of the softmax's backward: p, ds = p (w a − Δ), and its ingredients q·k and a = g·v.

    With x = q, y = k, x_side = g, y_side = v the tile is [queries, keys]; swapped, it is [keys, queries].
    """
    b_qk = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION, out_dtype=ACC)
    b_p = tl.where(m_visible, tl.exp2(b_qk * logit_scale - b_lse), 0.0)
    b_a = tl.dot(b_x_side, tl.trans(b_y_side), input_precision=PRECISION, out_dtype=ACC)
    b_ds = b_p * (b_a * weight - b_delta)
    return b_p, b_ds, b_qk, b_a


@triton.jit
def load_query_side(p_q, p_g, p_o, p_lse, o_m, stride_q_n, stride_g_n, stride_o_n, N,
                    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """A block of queries, its output gradients, log-sum-exps and Δ = g·o."""
    b_q = load_rows(p_q, o_m, stride_q_n, N, D, BLOCK_D)
    b_g = load_rows(p_g, o_m, stride_g_n, N, D, BLOCK_D)
    b_o = load_rows(p_o, o_m, stride_o_n, N, D, BLOCK_D)
    b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=0.0)
    b_delta = tl.sum(b_g.to(ACC) * b_o.to(ACC), 1)
    return b_q, b_g, b_lse, b_delta


# ---------------------------------------------------------------------------------------- forward


@triton.jit
def forward_kernel(
    p_qkv, p_prefix_key, p_prefix_value, p_prefix_scale, p_out, p_lse,
    stride_qkv_b, stride_qkv_n, stride_qkv_part, stride_qkv_h,
    N, H,
    P: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, SCALE_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_M)
    i_head = (tl.program_id(0) // blocks).to(tl.int64)                                  # sample and head
    i_b, i_h = i_head // H, i_head % H
    o_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)

    p_q = p_qkv + i_b * stride_qkv_b + i_h * stride_qkv_h
    b_q = load_rows(p_q, o_m, stride_qkv_n, N, D, BLOCK_D)                              # [M, D]
    b_logit_factor, b_weight_factor = prefix_factors(p_prefix_scale, SCALE_LOGITS, ACC)
    logit_scale: tl.constexpr = LOG2_E * D ** -0.5

    b_max = tl.full([BLOCK_M], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_M], ACC)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    for start in range(0, P, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        b_k = load_rows(p_prefix_key + i_h * D, o_p, H * D, P, D, BLOCK_D).to(b_q.dtype)        # [P, D]
        b_v = load_rows(p_prefix_value + i_h * D, o_p, H * D, P, D, BLOCK_D).to(b_q.dtype)
        b_max, b_sum, b_acc = online_softmax_step(b_q, b_k, b_v, b_max, b_sum, b_acc, o_p[None, :] < P,
                                                  b_logit_factor * logit_scale, PRECISION)
    b_acc *= b_weight_factor                                                            # so far prefix columns only

    p_k, p_v = p_q + stride_qkv_part, p_q + 2 * stride_qkv_part
    end = tl.minimum(N, (tl.program_id(0) % blocks + 1) * BLOCK_M) if CAUSAL else N
    for start in range(0, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, o_n, stride_qkv_n, N, D, BLOCK_D)                          # [N, D]
        b_v = load_rows(p_v, o_n, stride_qkv_n, N, D, BLOCK_D)
        m_visible = o_n[None, :] < N
        if CAUSAL:
            m_visible &= o_n[None, :] <= o_m[:, None]
        b_max, b_sum, b_acc = online_softmax_step(b_q, b_k, b_v, b_max, b_sum, b_acc, m_visible,
                                                  logit_scale, PRECISION)

    store_rows(p_out + (i_b * N * H + i_h) * D, b_acc / b_sum[:, None], o_m, H * D, N, D, BLOCK_D)
    tl.store(p_lse + i_head * N + o_m, b_max + tl.log2(b_sum), mask=o_m < N)


# ---------------------------------------------------------------------------------------- backward


@triton.jit
def backward_kernel(
    p_qkv, p_prefix_key, p_prefix_value, p_prefix_scale, p_out, p_lse, p_grad,
    p_dqkv, p_dprefix_key, p_dprefix_value, p_dscale,
    stride_qkv_b, stride_qkv_n, stride_qkv_part, stride_qkv_h,
    stride_grad_b, stride_grad_n, stride_grad_h,
    N, H,
    P: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, SCALE_LOGITS: tl.constexpr,
    NEED_QKV: tl.constexpr, NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """p_d…: where each gradient goes; those not needed are never touched. See launch_backward for shapes."""
    prefix_programs: tl.constexpr = tl.cdiv(P, BLOCK_P) if NEED_KEY or NEED_VALUE or NEED_SCALE else 0
    query_programs = tl.cdiv(N, BLOCK_M) if NEED_QKV else 0
    key_programs = tl.cdiv(N, BLOCK_N) if NEED_QKV else 0
    programs = prefix_programs + query_programs + key_programs
    i_head = (tl.program_id(0) // programs).to(tl.int64)                                # sample and head
    i_program = tl.program_id(0) % programs
    i_b, i_h = i_head // H, i_head % H

    p_q = p_qkv + i_b * stride_qkv_b + i_h * stride_qkv_h
    p_k, p_v = p_q + stride_qkv_part, p_q + 2 * stride_qkv_part
    p_g = p_grad + i_b * stride_grad_b + i_h * stride_grad_h
    p_o = p_out + (i_b * N * H + i_h) * D
    p_l = p_lse + i_head * N
    p_dq = p_dqkv + (i_b * N * 3 * H + i_h) * D                                         # packed (B, N, 3, H, D)
    b_logit_factor, b_weight_factor = prefix_factors(p_prefix_scale, SCALE_LOGITS, ACC)

    if i_program < prefix_programs:
        prefix_gradient(p_q, p_g, p_o, p_l, p_prefix_key + i_h * D, p_prefix_value + i_h * D,
                        p_dprefix_key + (i_b * P * H + i_h) * D, p_dprefix_value + (i_b * P * H + i_h) * D,
                        p_dscale + i_head * prefix_programs + i_program,
                        i_program * BLOCK_P, b_logit_factor, b_weight_factor, stride_qkv_n, stride_grad_n, N, H,
                        P, D, SCALE_LOGITS, NEED_KEY, NEED_VALUE, NEED_SCALE, PRECISION, ACC,
                        BLOCK_M, BLOCK_P, BLOCK_D)
    elif i_program < prefix_programs + query_programs:
        query_gradient(p_q, p_k, p_v, p_g, p_o, p_l, p_prefix_key + i_h * D, p_prefix_value + i_h * D, p_dq,
                       (i_program - prefix_programs) * BLOCK_M, b_logit_factor, b_weight_factor,
                       stride_qkv_n, stride_grad_n, N, H,
                       P, D, CAUSAL, PRECISION, ACC, BLOCK_M, BLOCK_N, BLOCK_P, BLOCK_D)
    else:
        key_gradient(p_q, p_k, p_v, p_g, p_o, p_l, p_dq + H * D, p_dq + 2 * H * D,
                     (i_program - prefix_programs - query_programs) * BLOCK_N, stride_qkv_n, stride_grad_n,
                     N, H, D, CAUSAL, PRECISION, ACC, BLOCK_M, BLOCK_N, BLOCK_D)


@triton.jit
def query_gradient(p_q, p_k, p_v, p_g, p_o, p_lse, p_prefix_key, p_prefix_value, p_dq, start_m,
                   b_logit_factor, b_weight_factor, stride_qkv_n, stride_grad_n, N, H,
                   P: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
                   PRECISION: tl.constexpr, ACC: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """dq_i = σ Σ_j ds_ij k_j for a block of queries."""
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_q, b_g, b_lse, b_delta = load_query_side(p_q, p_g, p_o, p_lse, o_m, stride_qkv_n, stride_grad_n, H * D, N,
                                               D, BLOCK_D, ACC)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    logit_scale: tl.constexpr = LOG2_E * D ** -0.5

    for start in range(0, P, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        b_k = load_rows(p_prefix_key, o_p, H * D, P, D, BLOCK_D).to(b_q.dtype)                  # [P, D]
        b_v = load_rows(p_prefix_value, o_p, H * D, P, D, BLOCK_D).to(b_q.dtype)
        _, b_ds, _, _ = softmax_gradient(b_q, b_k, b_g, b_v, b_lse[:, None], b_delta[:, None], o_p[None, :] < P,
                                         b_logit_factor * logit_scale, b_weight_factor, PRECISION, ACC)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION, out_dtype=ACC)
    b_dq *= b_logit_factor                                                              # so far prefix columns only

    end = tl.minimum(N, start_m + BLOCK_M) if CAUSAL else N
    for start in range(0, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = load_rows(p_k, o_n, stride_qkv_n, N, D, BLOCK_D)                          # [N, D]
        b_v = load_rows(p_v, o_n, stride_qkv_n, N, D, BLOCK_D)
        m_visible = o_n[None, :] < N
        if CAUSAL:
            m_visible &= o_n[None, :] <= o_m[:, None]
        _, b_ds, _, _ = softmax_gradient(b_q, b_k, b_g, b_v, b_lse[:, None], b_delta[:, None], m_visible,
                                         logit_scale, 1.0, PRECISION, ACC)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION, out_dtype=ACC)

    store_rows(p_dq, b_dq * D ** -0.5, o_m, 3 * H * D, N, D, BLOCK_D)


@triton.jit
def key_gradient(p_q, p_k, p_v, p_g, p_o, p_lse, p_dk, p_dv, start_n, stride_qkv_n, stride_grad_n, N, H,
                 D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """dk_j = σ Σ_i ds_ij q_i and dv_j = Σ_i p_ij g_i for a block of token columns."""
    o_n = start_n + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, o_n, stride_qkv_n, N, D, BLOCK_D)                              # [N, D]
    b_v = load_rows(p_v, o_n, stride_qkv_n, N, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    logit_scale: tl.constexpr = LOG2_E * D ** -0.5

    begin = start_n // BLOCK_M * BLOCK_M if CAUSAL else 0                               # earlier queries see none of it
    for start in range(begin, N, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_q, b_g, b_lse, b_delta = load_query_side(p_q, p_g, p_o, p_lse, o_m, stride_qkv_n, stride_grad_n, H * D,
                                                   N, D, BLOCK_D, ACC)
        m_visible = (o_n[:, None] < N) & (o_m[None, :] < N)
        if CAUSAL:
            m_visible &= o_n[:, None] <= o_m[None, :]
        b_p, b_ds, _, _ = softmax_gradient(b_k, b_q, b_v, b_g, b_lse[None, :], b_delta[None, :], m_visible,
                                           logit_scale, 1.0, PRECISION, ACC)            # [N, M]
        b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision=PRECISION, out_dtype=ACC)
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION, out_dtype=ACC)

    store_rows(p_dk, b_dk * D ** -0.5, o_n, 3 * H * D, N, D, BLOCK_D)
    store_rows(p_dv, b_dv, o_n, 3 * H * D, N, D, BLOCK_D)


@triton.jit
def prefix_gradient(p_q, p_g, p_o, p_lse, p_prefix_key, p_prefix_value, p_dk, p_dv, p_dscale, start_p,
                    b_logit_factor, b_weight_factor, stride_qkv_n, stride_grad_n, N, H,
                    P: tl.constexpr, D: tl.constexpr, SCALE_LOGITS: tl.constexpr,
                    NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_SCALE: tl.constexpr,
                    PRECISION: tl.constexpr, ACC: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One sample's share of the gradients of a block of prefix columns and of λ.

    λ on the weights: dλ = Σ p a, and dv gains the factor λ. On the logits: dλ = Σ ds σ q·k, and dk gains it.
    """
    o_p = start_p + tl.arange(0, BLOCK_P)
    b_k = load_rows(p_prefix_key, o_p, H * D, P, D, BLOCK_D).to(p_q.dtype.element_ty)           # [P, D]
    b_v = load_rows(p_prefix_value, o_p, H * D, P, D, BLOCK_D).to(p_q.dtype.element_ty)
    b_dk = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    b_dv = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    b_dscale = tl.zeros([BLOCK_P], ACC)
    logit_scale: tl.constexpr = LOG2_E * D ** -0.5

    for start in range(0, N, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_q, b_g, b_lse, b_delta = load_query_side(p_q, p_g, p_o, p_lse, o_m, stride_qkv_n, stride_grad_n, H * D,
                                                   N, D, BLOCK_D, ACC)
        m_visible = (o_p[:, None] < P) & (o_m[None, :] < N)
        b_p, b_ds, b_qk, b_a = softmax_gradient(b_k, b_q, b_v, b_g, b_lse[None, :], b_delta[None, :], m_visible,
                                                b_logit_factor * logit_scale, b_weight_factor, PRECISION, ACC)
        if NEED_VALUE:
            b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision=PRECISION, out_dtype=ACC)
        if NEED_KEY:
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION, out_dtype=ACC)
        if NEED_SCALE:
            b_dscale += tl.sum(b_ds * b_qk if SCALE_LOGITS else b_p * b_a, 1)

    if NEED_VALUE:
        store_rows(p_dv, b_dv * b_weight_factor, o_p, H * D, P, D, BLOCK_D)
    if NEED_KEY:
        store_rows(p_dk, b_dk * (b_logit_factor * D ** -0.5), o_p, H * D, P, D, BLOCK_D)
    if NEED_SCALE:
        b_total = tl.sum(b_dscale, 0)
        tl.store(p_dscale, b_total * D ** -0.5 if SCALE_LOGITS else b_total)


# ---------------------------------------------------------------------------------------- launchers


def innermost_contiguous(tensor: Tensor) -> Tensor:
    """The kernels take any stride but that of the last dimension, which must be 1 (a gradient of a sum has 0)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch_forward(qkv: Tensor, prefix_key: Tensor, prefix_value: Tensor, prefix_scale: Tensor,
                   causal: bool, scale_target: str) -> tuple[Tensor, Tensor]:
    """Returns the output (B, N, H, D) and the log-sum-exp of each row's logits in base 2, (B, H, N)."""
    batch, length, _, heads, width = qkv.shape
    acc_dtype = accumulator(qkv.dtype)
    out = qkv.new_empty(batch, length, heads, width)
    lse = qkv.new_empty(batch, heads, length, dtype=acc_dtype)
    if out.numel() == 0:
        return out, lse
    qkv = innermost_contiguous(qkv)
    tiles = forward_tiles(width, qkv.element_size())
    with torch.cuda.device_of(qkv):
        forward_kernel[(batch * heads * triton.cdiv(length, tiles["BLOCK_M"]),)](
            qkv, prefix_key.contiguous(), prefix_value.contiguous(), prefix_scale, out, lse,
            *qkv.stride()[:4], length, heads,
            P=prefix_key.shape[0], D=width, CAUSAL=causal, SCALE_LOGITS=scale_target == "logits",
            PRECISION=float32_precision(), ACC=TRITON_DTYPES[acc_dtype], **tiles,
        )
    return out, lse


def launch_backward(grad: Tensor, qkv: Tensor, prefix_key: Tensor, prefix_value: Tensor, prefix_scale: Tensor,
                    out: Tensor, lse: Tensor, causal: bool, scale_target: str,
                    needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, prefix_key, prefix_value and prefix_scale; an empty tensor for each that `needs` denies.

    The prefix gradients leave the kernel per sample, (B, P, H, D), and per program, and are summed here.
    """
    batch, length, _, heads, width = qkv.shape
    prefix_length = prefix_key.shape[0]
    need_qkv, need_key, need_value, need_scale = needs
    acc_dtype = accumulator(qkv.dtype)
    tiles = backward_tiles(width, qkv.element_size(), capability(qkv))
    prefix_programs = triton.cdiv(prefix_length, tiles["BLOCK_P"])

    def buffer(needed: bool, *shape: int, dtype: torch.dtype = acc_dtype) -> Tensor:
        return qkv.new_empty(shape if needed else 0, dtype=dtype)

    dqkv = buffer(need_qkv, *qkv.shape, dtype=qkv.dtype)
    dkey = buffer(need_key, batch, prefix_length, heads, width)
    dvalue = buffer(need_value, batch, prefix_length, heads, width)
    dscale = buffer(need_scale, batch * heads * prefix_programs)

    programs = prefix_programs if need_key or need_value or need_scale else 0
    if need_qkv:
        programs += triton.cdiv(length, tiles["BLOCK_M"]) + triton.cdiv(length, tiles["BLOCK_N"])
    if programs and out.numel():
        grad, qkv = innermost_contiguous(grad), innermost_contiguous(qkv)
        with torch.cuda.device_of(qkv):
            backward_kernel[(batch * heads * programs,)](
                qkv, prefix_key.contiguous(), prefix_value.contiguous(), prefix_scale, out, lse, grad,
                dqkv, dkey, dvalue, dscale, *qkv.stride()[:4], *grad.stride()[:3], length, heads,
                P=prefix_length, D=width, CAUSAL=causal, SCALE_LOGITS=scale_target == "logits",
                NEED_QKV=need_qkv, NEED_KEY=need_key, NEED_VALUE=need_value, NEED_SCALE=need_scale,
                PRECISION=float32_precision(), ACC=TRITON_DTYPES[acc_dtype], **tiles,
            )
    elif out.numel() == 0:
        for tensor in (dkey, dvalue, dscale):
            tensor.zero_()
    if need_key:
        dkey = dkey.sum(0).to(prefix_key.dtype)
    if need_value:
        dvalue = dvalue.sum(0).to(prefix_value.dtype)
    if need_scale:
        dscale = dscale.sum().to(prefix_scale.dtype)
    return dqkv, dkey, dvalue, dscale
