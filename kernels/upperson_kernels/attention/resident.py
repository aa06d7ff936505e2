"""Triton kernels of prefix attention for short sequences: one program a head, which reads every operand once.

choose.py says for which lengths they run; the kernels of device.py take everything else. The columns are the N tokens
of a sequence, and behind them the P prefix columns. All columns of a head are held in shared memory, so that nothing is
loaded twice and no softmax is corrected more than once.

    forward    keys and values lie in up to three pieces. The queries walk past them in tiles.
    backward   five products an element. Tiles are [columns, queries]. The columns lie in one or two tiles, which own dK
               and dV in registers, one after the other, the tile with masked columns first. All queries and output
               gradients are resident, in pieces of 64 rows and a last one. P and dS feed dV and dK from registers. dS
               also waits in shared memory in the activations' dtype, until all columns have met all queries; then
               dQᵀ = Kᵀ dS.

A row of the scratch memory holds −σΔ and −lse of a head: they come in pairs and need neither sign nor scale. The
program writes that row, passes a barrier, and reads it.

Prefix keys and values come in the activations' dtype, so that a column is one load of a chosen address: the sum of two
masked loads would be an operand in registers. Their gradients leave as in device.py, one for each sequence and without
the factor λ; device.prefix_gradient_kernel finishes them.

Two details keep the compiled code nearly free of spills (choose.py). dQᵀ is written dot(trans(k), ds): the
other way round it would stay in registers. And sums of such products are hidden from Triton (`unchained`), which would
give the two products two layouts.

Names in device code: as in device.py.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# A kernel's constants are constexpr to Triton and plain values to its caller, which a type checker cannot see; nor that
# Triton's ranges are iterated.

import triton
import triton.language as tl

from upperson_kernels.attention.device import COUNTS, LOG2_E, first_query

# ---------------------------------------------------------------------------------------- shared pieces


@triton.jit
def load_rows(
    p_base,                     # a (rows, D) matrix
    start: tl.constexpr,        # first row of the tile
    stride_row,                 # from row to row
    rows,                       # rows of the matrix
    D: tl.constexpr,            # columns of the matrix
    BLOCK: tl.constexpr,        # rows of the tile
    INSIDE: tl.constexpr,       # whether all rows of the tile are inside of the matrix
):
    """A block of rows of a matrix, zero outside of it.  [BLOCK, D]"""
    o_row = start + tl.arange(0, BLOCK)
    p_tile = p_base + o_row[:, None] * stride_row + tl.arange(0, D)[None, :]
    return tl.load(p_tile) if INSIDE else tl.load(p_tile, mask=(o_row < rows)[:, None], other=0.0)


@triton.jit
def store_rows(
    p_base,                     # a (rows, D) matrix
    b_rows,                     # the values, [BLOCK, D]
    start: tl.constexpr,        # first row of the tile
    stride_row,                 # from row to row
    rows,                       # rows of the matrix
    D: tl.constexpr,            # columns of the matrix
    BLOCK: tl.constexpr,        # rows of the tile
    INSIDE: tl.constexpr,       # whether all rows of the tile are inside of the matrix
):
    """Writes a block of rows of a matrix, in the matrix's dtype; nothing outside of it."""
    o_row = start + tl.arange(0, BLOCK)
    p_tile = p_base + o_row[:, None] * stride_row + tl.arange(0, D)[None, :]
    if INSIDE:
        tl.store(p_tile, b_rows.to(p_base.dtype.element_ty))
    else:
        tl.store(p_tile, b_rows.to(p_base.dtype.element_ty), mask=(o_row < rows)[:, None])


@triton.jit
def load_columns(
    p_token,                    # keys or values of the head, (N, D)
    p_prefix,                   # keys or values of the prefix, (P, D)
    start: tl.constexpr,        # first column of the tile
    stride_token,               # from token to token
    stride_prefix,              # from prefix column to prefix column
    N,                          # tokens of the sequence
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    BLOCK: tl.constexpr,        # columns of the tile
    PLAIN: tl.constexpr,        # whether the tile is full of tokens
):
    """A block of columns, each from the tensor where it lies; zero behind the last one.  [BLOCK, D]"""
    o_n, o_d = start + tl.arange(0, BLOCK), tl.arange(0, D)
    p_tile = p_token + o_n[:, None] * stride_token + o_d[None, :]
    if PLAIN:
        return tl.load(p_tile)
    else:
        p_tile = tl.where((o_n < N)[:, None], p_tile, p_prefix + (o_n - N)[:, None] * stride_prefix + o_d[None, :])
        return tl.load(p_tile, mask=(o_n < N + P)[:, None], other=0.0)


@triton.jit
def prefix_factor(
    b_scale,                    # λ
    o_n,                        # offsets of columns
    N,                          # tokens of the sequence
):
    """λ on prefix columns, 1 on tokens.  [N]"""
    return tl.where(o_n >= N, b_scale, tl.full([], 1.0, b_scale.dtype))


# ---------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_qkv,                      # (B, N, 3, H, D)
    p_prefix_key,               # (P, H, D), contiguous, in the dtype of qkv
    p_prefix_value,             # (P, H, D), contiguous, in the dtype of qkv
    p_prefix_scale,             # (), λ
    p_out,                      # written: (B, N, H, D), contiguous
    p_lse,                      # written: (H, T), log-sum-exps of logits in base 2
    stride_qkv_s,               # of qkv, from sequence to sequence
    stride_qkv_n,               # of qkv, from token to token
    stride_qkv_part,            # of qkv, from queries to keys to values
    stride_qkv_h,               # of qkv, from head to head
    N,                          # tokens of a sequence
    P,                          # prefix columns
    H,                          # heads
    T,                          # tokens of all sequences
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_M: tl.constexpr,      # queries of a tile
    FIRST: tl.constexpr,        # columns of the first piece,
    SECOND: tl.constexpr,       # of the second one, or 0,
    THIRD: tl.constexpr,        # and of the third one, or 0
    PLAIN: tl.constexpr,        # how many pieces need neither a mask nor λ
    CORRECTED: tl.constexpr,    # whether the first piece is weighed before the others are known: fewer registers
):
    """Attends from all queries of one head."""
    i_head = tl.program_id(0).to(tl.int64)                                              # sequence and head
    i_s, i_h = i_head // H, i_head % H
    p_q = p_qkv + i_s * stride_qkv_s + i_h * stride_qkv_h
    p_k, p_v = p_q + stride_qkv_part, p_q + 2 * stride_qkv_part
    p_pk, p_pv = p_prefix_key + i_h * D, p_prefix_value + i_h * D
    p_o = p_out + (i_s * N * H + i_h) * D
    p_l = p_lse + i_h * T + i_s * N
    b_scale = tl.load(p_prefix_scale).to(ACC)
    b_base = tl.full([], LOG2_E * D**-0.5, ACC)  # logits in base 2

    b_k1 = load_columns(p_k, p_pk, 0, stride_qkv_n, H * D, N, P, D=D, BLOCK=FIRST, PLAIN=PLAIN > 0)
    b_v1 = load_columns(p_v, p_pv, 0, stride_qkv_n, H * D, N, P, D=D, BLOCK=FIRST, PLAIN=PLAIN > 0)
    if SECOND > 0:
        b_k2 = load_columns(p_k, p_pk, FIRST, stride_qkv_n, H * D, N, P, D=D, BLOCK=SECOND, PLAIN=PLAIN > 1)
        b_v2 = load_columns(p_v, p_pv, FIRST, stride_qkv_n, H * D, N, P, D=D, BLOCK=SECOND, PLAIN=PLAIN > 1)
    if THIRD > 0:
        b_k3 = load_columns(p_k, p_pk, FIRST + SECOND, stride_qkv_n, H * D, N, P, D=D, BLOCK=THIRD, PLAIN=PLAIN > 2)
        b_v3 = load_columns(p_v, p_pv, FIRST + SECOND, stride_qkv_n, H * D, N, P, D=D, BLOCK=THIRD, PLAIN=PLAIN > 2)

    for start in tl.range(0, N, BLOCK_M, num_stages=1):
        o_m = start + tl.arange(0, BLOCK_M)
        p_tile = p_q + o_m[:, None] * stride_qkv_n + tl.arange(0, D)[None, :]
        b_q = tl.load(p_tile, mask=(o_m < N)[:, None], other=0.0)  # [M, D]
        b_acc = tl.zeros([BLOCK_M, D], ACC)

        b_s1 = logits(b_q, b_k1, o_m, b_scale, 0, N, P, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS, PRECISION=PRECISION,
                      ACC=ACC, PLAIN=PLAIN > 0)
        b_max = tl.max(b_s1, 1)
        if CORRECTED:
            b_first = b_max * b_base
            if CAUSAL:
                b_first = tl.where(b_first == float("-inf"), 0.0, b_first)
            b_sum, b_acc = weigh(b_acc, b_s1, b_v1, b_first, b_base, b_scale, 0, N, SCALE_LOGITS=SCALE_LOGITS,
                                 PRECISION=PRECISION, ACC=ACC, PLAIN=PLAIN > 0)
        if SECOND > 0:
            b_s2 = logits(b_q, b_k2, o_m, b_scale, FIRST, N, P, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                          PRECISION=PRECISION, ACC=ACC, PLAIN=PLAIN > 1)
            b_max = tl.maximum(b_max, tl.max(b_s2, 1))
        if THIRD > 0:
            b_s3 = logits(b_q, b_k3, o_m, b_scale, FIRST + SECOND, N, P, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                          PRECISION=PRECISION, ACC=ACC, PLAIN=PLAIN > 2)
            b_max = tl.maximum(b_max, tl.max(b_s3, 1))

        b_max = b_max * b_base
        if CORRECTED:
            b_correction = tl.exp2(b_first - b_max)
            b_sum *= b_correction
            b_acc = b_acc * b_correction[:, None]
        else:
            b_sum, b_acc = weigh(b_acc, b_s1, b_v1, b_max, b_base, b_scale, 0, N, SCALE_LOGITS=SCALE_LOGITS,
                                 PRECISION=PRECISION, ACC=ACC, PLAIN=PLAIN > 0)
        if SECOND > 0:
            b_more, b_acc = weigh(b_acc, b_s2, b_v2, b_max, b_base, b_scale, FIRST, N, SCALE_LOGITS=SCALE_LOGITS,
                                  PRECISION=PRECISION, ACC=ACC, PLAIN=PLAIN > 1)
            b_sum += b_more
        if THIRD > 0:
            b_more, b_acc = weigh(b_acc, b_s3, b_v3, b_max, b_base, b_scale, FIRST + SECOND, N,
                                  SCALE_LOGITS=SCALE_LOGITS, PRECISION=PRECISION, ACC=ACC, PLAIN=PLAIN > 2)
            b_sum += b_more

        b_acc = b_acc * (1.0 / b_sum)[:, None]
        p_tile = p_o + o_m[:, None] * (H * D) + tl.arange(0, D)[None, :]
        tl.store(p_tile, b_acc.to(p_o.dtype.element_ty), mask=(o_m < N)[:, None])
        tl.store(p_l + o_m, b_max + tl.log2(b_sum), mask=o_m < N)


@triton.jit
def logits(
    b_q,                        # queries, [M, D]
    b_k,                        # keys of a piece, [N, D]
    o_m,                        # offsets of the queries, [M]
    b_scale,                    # λ
    start: tl.constexpr,        # first column of the piece
    N,                          # tokens of the sequence
    P,                          # prefix columns
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    PLAIN: tl.constexpr,        # whether the piece needs neither a mask nor λ
):
    """q·k without σ, −∞ where a query does not see a column.  [M, N]"""
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
    if not PLAIN:
        o_n = start + tl.arange(0, b_k.shape[0])
        if SCALE_LOGITS:
            b_logits = b_logits * prefix_factor(b_scale, o_n, N)[None, :]
        m_visible = (o_n < N + P)[None, :]
        if CAUSAL:
            m_visible = first_query(o_n, N, P, CAUSAL=True)[None, :] <= o_m[:, None]
        b_logits = tl.where(m_visible, b_logits, float("-inf"))
    return b_logits


@triton.jit
def weigh(
    b_acc,                      # running weighted sum of values, [M, D]
    b_logits,                   # q·k of a piece, [M, N]
    b_v,                        # values of the piece, [N, D]
    b_max,                      # maximum of the logits in base 2, [M]
    b_base,                     # σ log2 e
    b_scale,                    # λ
    start: tl.constexpr,        # first column of the piece
    N,                          # tokens of the sequence
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    PLAIN: tl.constexpr,        # whether the piece needs neither a mask nor λ
):
    """The sum of a piece's exponentials, [M], and the weighted sum of values with the piece's.  [M, D]"""
    b_weights = tl.exp2(b_logits * b_base - b_max[:, None])
    b_sum = tl.sum(b_weights, 1)
    if not PLAIN and not SCALE_LOGITS:  # λ after the softmax
        b_weights = b_weights * prefix_factor(b_scale, start + tl.arange(0, b_v.shape[0]), N)[None, :]
    return b_sum, tl.dot(b_weights.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION, out_dtype=ACC)


# ---------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    p_qkv,                      # (B, N, 3, H, D)
    p_prefix_key,               # (P, H, D), contiguous, in the dtype of qkv
    p_prefix_value,             # (P, H, D), contiguous, in the dtype of qkv
    p_prefix_scale,             # (), λ
    p_out,                      # (B, N, H, D), contiguous, from forward
    p_lse,                      # (H, T), from forward
    p_grad,                     # gradient of out, in its shape
    p_dqkv,                     # written if NEED_QKV: (B, N, 3, H, D), contiguous
    p_dprefix_key,              # written if NEED_KEY: (B, P, H, D), one for each sequence
    p_dprefix_value,            # written if NEED_VALUE: (B, P, H, D), one for each sequence
    p_scratch,                  # written and read: (B, H, 2, queries of all pieces)
    stride_qkv_s,               # of qkv, from sequence to sequence
    stride_qkv_n,               # of qkv, from token to token
    stride_qkv_part,            # of qkv, from queries to keys to values
    stride_qkv_h,               # of qkv, from head to head
    stride_grad_s,              # of grad, from sequence to sequence
    stride_grad_n,              # of grad, from token to token
    stride_grad_h,              # of grad, from head to head
    N,                          # tokens of a sequence
    P,                          # prefix columns
    H,                          # heads
    T,                          # tokens of all sequences
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    NEED_QKV: tl.constexpr,     # which gradients are wanted: of qkv,
    NEED_KEY: tl.constexpr,     # of the prefix keys,
    NEED_VALUE: tl.constexpr,   # of the prefix values
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_N: tl.constexpr,      # columns of a tile
    TILES: tl.constexpr,        # tiles of columns; all but the last one are full of tokens
    PIECE: tl.constexpr,        # queries of a full piece
    FULL: tl.constexpr,         # full pieces of queries before the last one
    LAST: tl.constexpr,         # queries of the last piece
):
    """Computes all gradients of one head."""
    i_head = tl.program_id(0).to(tl.int64)  # sequence and head
    i_s, i_h = i_head // H, i_head % H
    p_q = p_qkv + i_s * stride_qkv_s + i_h * stride_qkv_h
    p_k, p_v = p_q + stride_qkv_part, p_q + 2 * stride_qkv_part
    p_pk, p_pv = p_prefix_key + i_h * D, p_prefix_value + i_h * D
    p_g = p_grad + i_s * stride_grad_s + i_h * stride_grad_h
    p_o = p_out + (i_s * N * H + i_h) * D
    p_l = p_lse + i_h * T + i_s * N
    p_dq = p_dqkv + (i_s * N * 3 * H + i_h) * D  # contiguous (…, 3, H, D)
    p_dk, p_dv = p_dq + H * D, p_dq + 2 * H * D
    p_dpk, p_dpv = p_dprefix_key + (i_s * P * H + i_h) * D, p_dprefix_value + (i_s * P * H + i_h) * D
    PIECES: tl.constexpr = FULL + 1
    ROWS: tl.constexpr = PIECE * FULL + LAST
    p_delta = p_scratch + i_head * (2 * ROWS)
    b_scale = tl.load(p_prefix_scale).to(ACC)

    b_g, b_q = (), ()
    for r in tl.static_range(PIECES):
        b_g = b_g + (load_rows(p_g, PIECE * r, stride_grad_n, N, D=D, BLOCK=PIECE if r < FULL else LAST,
                               INSIDE=r < FULL),)
        write_scratch(p_delta, p_delta + ROWS, b_g[r], p_o, p_l, PIECE * r, H, N, D=D, ACC=ACC, INSIDE=r < FULL)
    for r in tl.static_range(PIECES):
        b_q = b_q + (load_rows(p_q, PIECE * r, stride_qkv_n, N, D=D, BLOCK=PIECE if r < FULL else LAST,
                               INSIDE=r < FULL),)
    tl.debug_barrier()                                                                  # the scratch memory is written

    waiting, b_k = (), ()
    for c in tl.static_range(TILES - 1, -1, -1):                                        # the masked tile first
        o_n = BLOCK_N * c + tl.arange(0, BLOCK_N)
        b_k = b_k + (load_columns(p_k, p_pk, BLOCK_N * c, stride_qkv_n, H * D, N, P, D=D, BLOCK=BLOCK_N,
                                  PLAIN=c < TILES - 1),)
        b_v = load_columns(p_v, p_pv, BLOCK_N * c, stride_qkv_n, H * D, N, P, D=D, BLOCK=BLOCK_N, PLAIN=c < TILES - 1)
        b_dk, b_dv = tl.zeros([BLOCK_N, D], ACC), tl.zeros([BLOCK_N, D], ACC)
        for r in tl.static_range(PIECES):
            b_dk, b_dv, b_ds = gradient_tile(b_dk, b_dv, b_k[TILES - 1 - c], b_v, b_q[r], b_g[r], p_delta,
                                             p_delta + ROWS, o_n, b_scale, PIECE * r, N, P, D=D, CAUSAL=CAUSAL,
                                             SCALE_LOGITS=SCALE_LOGITS, PRECISION=PRECISION, ACC=ACC,
                                             PLAIN=c < TILES - 1)
            waiting = waiting + (b_ds,)
        if NEED_QKV:
            store_rows(p_dk, b_dk, BLOCK_N * c, 3 * H * D, N, D=D, BLOCK=BLOCK_N, INSIDE=c < TILES - 1)
            store_rows(p_dv, b_dv, BLOCK_N * c, 3 * H * D, N, D=D, BLOCK=BLOCK_N, INSIDE=c < TILES - 1)
        if c == TILES - 1:
            if NEED_KEY:
                store_prefix(p_dpk, b_dk, BLOCK_N * c, H * D, N, P, D=D)
            if NEED_VALUE:
                store_prefix(p_dpv, b_dv, BLOCK_N * c, H * D, N, P, D=D)
    if NEED_QKV:
        for r in tl.static_range(PIECES):
            store_queries(p_dq, b_k, waiting, r, N, H, D=D, PRECISION=PRECISION, ACC=ACC, PIECE=PIECE, PIECES=PIECES,
                          INSIDE=r < FULL)


@triton.jit
def write_scratch(
    p_delta,                    # written: −σΔ of the head's queries
    p_minus_lse,                # written: −lse of the head's queries
    b_g,                        # output gradients of a piece of queries, [M, D]
    p_o,                        # outputs of the head, (N, D)
    p_l,                        # log-sum-exps of the head, (N,)
    start: tl.constexpr,        # first query of the piece
    H,                          # heads
    N,                          # tokens of the sequence
    D: tl.constexpr,            # head width
    ACC: tl.constexpr,          # dtype of sums
    INSIDE: tl.constexpr,       # whether all queries of the piece are inside of the sequence
):
    """−σΔ = −σ g·o and −lse of a piece of queries; 0 behind the last query."""
    o_m = start + tl.arange(0, b_g.shape[0])
    b_o = load_rows(p_o, start, H * D, N, D=D, BLOCK=b_g.shape[0], INSIDE=INSIDE)
    b_delta = tl.sum(b_g.to(ACC) * b_o.to(ACC), 1)
    tl.store(p_delta + o_m, b_delta * -(D**-0.5))
    tl.store(p_minus_lse + o_m, -(tl.load(p_l + o_m) if INSIDE else tl.load(p_l + o_m, mask=o_m < N, other=0.0)))


@triton.jit
def gradient_tile(
    b_dk,                       # running dk, [N, D]
    b_dv,                       # running dv, [N, D]
    b_k,                        # keys, [N, D]
    b_v,                        # values, [N, D]
    b_q,                        # queries, [M, D]
    b_g,                        # output gradients, [M, D]
    p_delta,                    # −σΔ of the head's queries
    p_minus_lse,                # −lse of the head's queries
    o_n,                        # offsets of the columns, [N]
    b_scale,                    # λ
    start: tl.constexpr,        # first query of the piece
    N,                          # tokens of the sequence
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    PLAIN: tl.constexpr,        # whether the columns are tokens alone
):
    """Adds a piece of queries to dk and dv, without λ on prefix columns; and σ ds, with λ, for dq.  [N, M]"""
    o_m = start + tl.arange(0, b_q.shape[0])
    b_base = tl.full([], LOG2_E * D**-0.5, ACC)
    b_logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC)  # [N, M]
    b_minus_lse = tl.load(p_minus_lse + o_m)
    if PLAIN or not SCALE_LOGITS:
        b_p = tl.exp2(b_logits * b_base + b_minus_lse[None, :])
    else:
        b_p = tl.exp2(b_logits * (prefix_factor(b_scale, o_n, N) * b_base)[:, None] + b_minus_lse[None, :])
    if CAUSAL:
        b_p = tl.where(first_query(o_n, N, P, CAUSAL=True)[:, None] <= o_m[None, :], b_p, 0.0)
    elif not PLAIN:
        b_p = tl.where((o_n < N + P)[:, None], b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION, out_dtype=ACC)
    b_a = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION, out_dtype=ACC)
    b_minus_delta = tl.load(p_delta + o_m)
    if PLAIN or SCALE_LOGITS:
        b_ds = b_p * (b_a * D**-0.5 + b_minus_delta[None, :])  # σ ds
    else:
        b_ds = b_p * (b_a * (prefix_factor(b_scale, o_n, N) * D**-0.5)[:, None] + b_minus_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=ACC)
    if SCALE_LOGITS and not PLAIN:  # dq sees λ k
        b_ds = b_ds * prefix_factor(b_scale, o_n, N)[:, None]
    return b_dk, b_dv, b_ds.to(b_q.dtype)


@triton.jit
def store_queries(
    p_dq,                       # written: gradients of the head's queries, (N, D)
    b_k,                        # keys of all tiles of columns, [N, D] each
    b_ds,                       # σ ds of all tiles of columns, each with all pieces of queries, [N, M] each
    r: tl.constexpr,            # number of the piece
    N,                          # tokens of the sequence
    H,                          # heads
    D: tl.constexpr,            # head width
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    PIECE: tl.constexpr,        # queries of a full piece
    PIECES: tl.constexpr,       # pieces of queries
    INSIDE: tl.constexpr,       # whether all queries of the piece are inside of the sequence
):
    """dQᵀ = Σ Kᵀ dS over all tiles of columns, for a piece of queries."""
    b_dq = tl.dot(tl.trans(b_k[0]), b_ds[r], input_precision=PRECISION, out_dtype=ACC)                  # [D, M]
    for c in tl.static_range(1, len(b_k)):
        b_dq = unchained(b_dq, tl.dot(tl.trans(b_k[c]), b_ds[c * PIECES + r], input_precision=PRECISION,
                                      out_dtype=ACC))
    store_rows(p_dq, tl.trans(b_dq.to(p_dq.dtype.element_ty)), PIECE * r, 3 * H * D, N, D=D, BLOCK=b_ds[r].shape[1],
               INSIDE=INSIDE)


@triton.jit
def unchained(
    b_x,                        # a product
    b_y,                        # another product
):
    """x + y, hidden from Triton, which would otherwise chain the products."""
    return tl.fma(b_x, tl.full(b_x.shape, 1.0, b_x.dtype), b_y)


@triton.jit
def store_prefix(
    p_base,                     # written: the gradients of the prefix columns, (P, D)
    b_columns,                  # the gradients of a tile of columns, [N, D]
    start: tl.constexpr,        # first column of the tile
    stride_row,                 # from prefix column to prefix column
    N,                          # tokens of the sequence
    P,                          # prefix columns
    D: tl.constexpr,            # head width
):
    """Writes the rows of a tile that belong to prefix columns."""
    o_n = start + tl.arange(0, b_columns.shape[0])
    p_tile = p_base + (o_n - N)[:, None] * stride_row + tl.arange(0, D)[None, :]
    tl.store(p_tile, b_columns, mask=((o_n >= N) & (o_n < N + P))[:, None])
