"""Triton kernels of prefix attention. launch.py launches them.

The tokens of one head of one sequence attend to columns in one softmax: first the N tokens, then the P prefix columns.
Nothing of size N × N and no concatenation of tokens and prefix ever exists in memory. The tile of columns in which both
meet is loaded from two tensors.

    0                   64                  128                 192 193         203
    ├── tokens ─────────┼── tokens ─────────┼── tokens ─────────┼─ token, prefix ─┤         N = 193, P = 10
        plain tiles: neither masked (unless causal) nor scaled    tail: 16 columns

The rows, one for each query, are cut in the same way. The last tile on either axis is only as wide as necessary: a
power of two, at least 16. At these lengths that saves a third of the work.

    forward    one program per (sequence, head, block of queries): online softmax, one pass over the columns
    backward   one launch, in which a program owns the gradient of
                   a block of queries (walks over all columns), or
                   a block of columns (walks over all queries)
               The programs of one head are neighbours, so that they share its queries, keys, values and
               gradients in the L2 cache. No two programs write the same address: no atomics, and the same
               bits at every repetition. All sequences share the prefix; its gradient is written per sequence
               and summed in a second, ordered step, prefix_gradient.

λ's gradient is computed in prefix_gradient_kernel, together with the sums over the sequences.

Sequences are the samples of a (B, N, …) tensor, or consecutive parts of a packed (T, …) tensor with the offsets
cu_seqlens. The length of a packed sequence is only known inside the kernel, so that the last tiles are full ones. N is
then the longest length, and programs beyond the end of their sequence do nothing.

Names in device code: b_ value of a block, p_ pointer, o_ offsets, m_ mask, i_ index. Strides count elements. N is the
number of tokens of the current sequence; as an argument of the two kernels, of the longest one. Two tuples are passed
through the functions:

    rows       pointers to queries, output gradients, outputs and log-sum-exps; strides of the first two; N, H
    columns    pointers to keys, values, prefix keys, prefix values and λ; the stride of a token; N, H

Logits are kept in base 2 (multiplied by log2 e), because the hardware's instruction is exp2.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# A kernel's constants are constexpr to Triton and plain values to its caller, which a type checker cannot see.

import triton
import triton.language as tl

COUNTS = ["N", "P", "T"]        # they change from batch to batch, and specialised code would not be better
LOG2_E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------------------------------- shared pieces


@triton.jit
def locate_sequence(
    p_cu_seqlens,               # (S + 1,) int32, offsets of packed sequences; unused without packing
    i_s,                        # index of the sequence
    N,                          # tokens of the longest sequence
    T,                          # tokens of all sequences
    PACKED: tl.constexpr,       # whether sequences are packed
):
    """A sequence's first token among all T, and its number of tokens. Offsets outside of the tensor are clamped."""
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + i_s).to(tl.int64), 0), T)
        end = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + i_s + 1).to(tl.int64), begin), T)
        return begin, tl.minimum(end - begin, N).to(tl.int32)
    else:
        return i_s * N, N


@triton.jit
def locate_head(
    i_s,                        # index of the sequence
    i_h,                        # index of the head
    begin,                      # first token of the sequence among all
    stride_s,                   # from sequence to sequence; unused if packed
    stride_n,                   # from token to token
    stride_h,                   # from head to head
    PACKED: tl.constexpr,       # whether sequences are packed
):
    """Offset of a sequence's head in a (B, N, …, H, …) or (T, …, H, …) tensor."""
    if PACKED:
        return begin * stride_n + i_h * stride_h
    else:
        return i_s * stride_s + i_h * stride_h


@triton.jit
def tile_of_rows(
    p_base,                     # a (rows, D) matrix
    start,                      # first row of the tile; may be negative
    stride_row,                 # from row to row
    rows,                       # rows of the matrix
    D: tl.constexpr,            # columns of the matrix
    BLOCK: tl.constexpr,        # rows of the tile
    BLOCK_D: tl.constexpr,      # columns of the tile, D or more
):
    """Pointers to rows start … start + BLOCK of a matrix, and the mask of those inside of it.  [BLOCK, BLOCK_D]"""
    o_row, o_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    p_tile = p_base + tl.cast(start, tl.int64) * stride_row + (o_row[:, None] * stride_row + o_d[None, :])
    m_tile = (o_row[:, None] >= -start) & (o_row[:, None] < rows - start) & (o_d[None, :] < D)
    return p_tile, m_tile


@triton.jit
def load_rows(
    p_base,                     # a (rows, D) matrix
    start,                      # first row of the tile; may be negative
    stride_row,                 # from row to row
    rows,                       # rows of the matrix
    D: tl.constexpr,            # columns of the matrix
    BLOCK: tl.constexpr,        # rows of the tile
    BLOCK_D: tl.constexpr,      # columns of the tile, D or more
):
    """A block of rows of a matrix, zero outside of it.  [BLOCK, BLOCK_D]"""
    p_tile, m_tile = tile_of_rows(p_base, start, stride_row, rows, D=D, BLOCK=BLOCK, BLOCK_D=BLOCK_D)
    return tl.load(p_tile, mask=m_tile, other=0.0)


@triton.jit
def store_rows(
    p_base,                     # a (rows, D) matrix
    b_rows,                     # the values, [BLOCK, BLOCK_D]
    start,                      # first row of the tile; may be negative
    stride_row,                 # from row to row
    rows,                       # rows of the matrix
    D: tl.constexpr,            # columns of the matrix
    BLOCK: tl.constexpr,        # rows of the tile
    BLOCK_D: tl.constexpr,      # columns of the tile, D or more
):
    """Writes a block of rows of a matrix, in the matrix's dtype; nothing outside of it."""
    p_tile, m_tile = tile_of_rows(p_base, start, stride_row, rows, D=D, BLOCK=BLOCK, BLOCK_D=BLOCK_D)
    tl.store(p_tile, b_rows.to(p_base.dtype.element_ty), mask=m_tile)


@triton.jit
def plain_columns(
    N,                          # tokens of the sequence
    P,                          # prefix columns
    BLOCK_N: tl.constexpr,      # columns of a tile
):
    """Number of columns in plain tiles: tiles full of tokens, without the last tile."""
    return tl.minimum(N // BLOCK_N, (N + P - 1) // BLOCK_N) * BLOCK_N


@triton.jit
def load_columns(
    columns,                    # tuple, see the top of this file
    start,                      # first column of the tile
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    ACC: tl.constexpr,          # dtype of sums
    PLAIN: tl.constexpr,        # whether the tile is plain
    BLOCK_N: tl.constexpr,      # columns of the tile
    BLOCK_D: tl.constexpr,      # D, rounded up
):
    """A tile of columns: its offsets, keys and values, and the factors of its logits and of its weights.

    Keys and values are [BLOCK_N, BLOCK_D], the rest is [BLOCK_N]. On prefix columns one factor is λ; all others are 1.
    """
    p_k, p_v, p_prefix_key, p_prefix_value, p_prefix_scale, stride_n, N, H = columns
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, start, stride_n, N, D=D, BLOCK=BLOCK_N, BLOCK_D=BLOCK_D)
    b_v = load_rows(p_v, start, stride_n, N, D=D, BLOCK=BLOCK_N, BLOCK_D=BLOCK_D)
    b_one = tl.full([BLOCK_N], 1.0, ACC)
    b_factor = b_one
    if not PLAIN:
        b_k += load_rows(p_prefix_key, start - N, H * D, P, D=D, BLOCK=BLOCK_N, BLOCK_D=BLOCK_D).to(b_k.dtype)
        b_v += load_rows(p_prefix_value, start - N, H * D, P, D=D, BLOCK=BLOCK_N, BLOCK_D=BLOCK_D).to(b_v.dtype)
        b_factor = tl.where(o_n >= N, tl.load(p_prefix_scale).to(ACC), b_one)
    if SCALE_LOGITS:
        return o_n, b_k, b_v, b_factor, b_one
    else:
        return o_n, b_k, b_v, b_one, b_factor


@triton.jit
def first_query(
    o_n,                        # offsets of columns
    N,                          # tokens of the sequence
    P,                          # prefix columns
    CAUSAL: tl.constexpr,       # a token sees no later tokens
):
    """The first query that sees each column: a token's own if causal, otherwise 0; none beyond the last column."""
    b_first = tl.where(o_n < N, o_n, 0) if CAUSAL else tl.zeros_like(o_n)
    return tl.where(o_n < N + P, b_first, 2**30)


# ---------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    p_qkv,                      # (B, N, 3, H, D), or packed (T, 3, H, D)
    p_prefix_key,               # (P, H, D), contiguous
    p_prefix_value,             # (P, H, D), contiguous
    p_prefix_scale,             # (), λ
    p_cu_seqlens,               # (S + 1,) int32, offsets of packed sequences
    p_out,                      # written: (B, N, H, D) or (T, H, D), contiguous
    p_lse,                      # written: (H, T), log-sum-exps of logits in base 2
    stride_qkv_s,               # of qkv, from sequence to sequence; 0 if packed
    stride_qkv_n,               # of qkv, from token to token
    stride_qkv_part,            # of qkv, from queries to keys to values
    stride_qkv_h,               # of qkv, from head to head
    N,                          # tokens of the longest sequence
    P,                          # prefix columns
    H,                          # heads
    T,                          # tokens of all sequences
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    PACKED: tl.constexpr,       # whether sequences are packed
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_M: tl.constexpr,      # queries of a tile
    BLOCK_N: tl.constexpr,      # columns of a tile
    BLOCK_D: tl.constexpr,      # D, rounded up
    LAST_M: tl.constexpr,       # queries of the last tile
    LAST_N: tl.constexpr,       # columns of the last tile
    MIXED_TILES: tl.constexpr,  # whether full tiles of columns may hold prefix columns
):
    """Attends from one block of queries of one head."""
    blocks = tl.cdiv(N, BLOCK_M)
    i_block = tl.program_id(0) % blocks
    i_head = (tl.program_id(0) // blocks).to(tl.int64)                                  # sequence and head
    i_s, i_h = i_head // H, i_head % H
    begin, length = locate_sequence(p_cu_seqlens, i_s, N, T, PACKED=PACKED)

    p_q = p_qkv + locate_head(i_s, i_h, begin, stride_qkv_s, stride_qkv_n, stride_qkv_h, PACKED=PACKED)
    p_k = p_q + stride_qkv_part
    columns = (p_k, p_k + stride_qkv_part, p_prefix_key + i_h * D, p_prefix_value + i_h * D, p_prefix_scale,
               stride_qkv_n, length, H)
    p_o = p_out + (begin * H + i_h) * D
    p_l = p_lse + i_h * T + begin
    if LAST_M < BLOCK_M and i_block == blocks - 1:
        attend(p_q, p_o, p_l, columns, i_block * BLOCK_M, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
               PRECISION=PRECISION, ACC=ACC, BLOCK_M=LAST_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, LAST_N=LAST_N,
               MIXED_TILES=MIXED_TILES)
    elif i_block * BLOCK_M < length:
        attend(p_q, p_o, p_l, columns, i_block * BLOCK_M, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
               PRECISION=PRECISION, ACC=ACC, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, LAST_N=LAST_N,
               MIXED_TILES=MIXED_TILES)


@triton.jit
def attend(
    p_q,                        # queries of the head, (N, D)
    p_o,                        # written: outputs of the head, (N, D)
    p_lse,                      # written: log-sum-exps of the head, (N,)
    columns,                    # tuple, see the top of this file
    start_m,                    # first query of the block
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_M: tl.constexpr,      # queries of the block
    BLOCK_N: tl.constexpr,      # columns of a tile
    BLOCK_D: tl.constexpr,      # D, rounded up
    LAST_N: tl.constexpr,       # columns of the last tile
    MIXED_TILES: tl.constexpr,  # whether full tiles of columns may hold prefix columns
):
    """Output and log-sum-exp of a block of queries."""
    _, _, _, _, _, stride_n, N, H = columns
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_q = load_rows(p_q, start_m, stride_n, N, D=D, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D)                  # [M, D]
    b_max = tl.full([BLOCK_M], float("-inf"), ACC)
    b_sum = tl.zeros([BLOCK_M], ACC)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    plain = plain_columns(N, P, BLOCK_N=BLOCK_N)
    last = N + P if LAST_N == BLOCK_N else (N + P - 1) // BLOCK_N * BLOCK_N
    for start in range(0, tl.minimum(plain, start_m + BLOCK_M) if CAUSAL else plain, BLOCK_N):
        b_max, b_sum, b_acc = attend_tile(
            b_max, b_sum, b_acc, b_q, o_m, columns, start, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
            PRECISION=PRECISION, ACC=ACC, PLAIN=True, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)
    if MIXED_TILES:
        for start in range(plain, last, BLOCK_N):
            b_max, b_sum, b_acc = attend_tile(
                b_max, b_sum, b_acc, b_q, o_m, columns, start, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                PRECISION=PRECISION, ACC=ACC, PLAIN=False, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)
    if LAST_N < BLOCK_N:
        b_max, b_sum, b_acc = attend_tile(
            b_max, b_sum, b_acc, b_q, o_m, columns, last, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
            PRECISION=PRECISION, ACC=ACC, PLAIN=False, BLOCK_N=LAST_N, BLOCK_D=BLOCK_D)

    store_rows(p_o, b_acc / b_sum[:, None], start_m, H * D, N, D=D, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D)
    tl.store(p_lse + o_m, b_max + tl.log2(b_sum), mask=o_m < N)


@triton.jit
def attend_tile(
    b_max,                      # running maximum of the logits, [M]
    b_sum,                      # running sum of exponentials, [M]
    b_acc,                      # running weighted sum of values, [M, D]
    b_q,                        # queries, [M, D]
    o_m,                        # offsets of the queries, [M]
    columns,                    # tuple, see the top of this file
    start,                      # first column of the tile
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    PLAIN: tl.constexpr,        # whether the tile is plain
    BLOCK_N: tl.constexpr,      # columns of the tile
    BLOCK_D: tl.constexpr,      # D, rounded up
):
    """Adds a tile of columns to the running maximum, sum of exponentials and weighted sum of values."""
    _, _, _, _, _, _, N, _ = columns
    o_n, b_k, b_v, b_logit_factor, b_weight_factor = load_columns(
        columns, start, P, D=D, SCALE_LOGITS=SCALE_LOGITS, ACC=ACC, PLAIN=PLAIN, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)
    b_logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)     # [M, N]
    b_logits *= b_logit_factor[None, :] * (LOG2_E * D ** -0.5)
    if CAUSAL or not PLAIN:
        m_visible = first_query(o_n, N, P, CAUSAL=CAUSAL)[None, :] <= o_m[:, None]
        b_logits = tl.where(m_visible, b_logits, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_logits, 1))
    b_correction = tl.exp2(b_max - b_new_max)
    b_weights = tl.exp2(b_logits - b_new_max[:, None])
    b_sum = b_sum * b_correction + tl.sum(b_weights, 1)
    b_weights = (b_weights * b_weight_factor[None, :]).to(b_v.dtype)                    # λ after the softmax
    b_acc = b_acc * b_correction[:, None]
    b_acc += tl.dot(b_weights, b_v, input_precision=PRECISION, out_dtype=ACC)
    return b_new_max, b_sum, b_acc


# ---------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    p_qkv,                      # (B, N, 3, H, D), or packed (T, 3, H, D)
    p_prefix_key,               # (P, H, D), contiguous
    p_prefix_value,             # (P, H, D), contiguous
    p_prefix_scale,             # (), λ
    p_cu_seqlens,               # (S + 1,) int32, offsets of packed sequences
    p_out,                      # (B, N, H, D) or (T, H, D), contiguous, from forward
    p_lse,                      # (H, T), from forward
    p_grad,                     # gradient of out, in its shape
    p_dqkv,                     # written if NEED_QKV: contiguous (…, 3, H, D)
    p_dprefix_key,              # written if NEED_KEY: (S, P, H, D), one for each sequence
    p_dprefix_value,            # written if NEED_VALUE: (S, P, H, D), one for each sequence
    stride_qkv_s,               # of qkv, from sequence to sequence; 0 if packed
    stride_qkv_n,               # of qkv, from token to token
    stride_qkv_part,            # of qkv, from queries to keys to values
    stride_qkv_h,               # of qkv, from head to head
    stride_grad_s,              # of grad, from sequence to sequence; 0 if packed
    stride_grad_n,              # of grad, from token to token
    stride_grad_h,              # of grad, from head to head
    N,                          # tokens of the longest sequence
    P,                          # prefix columns
    H,                          # heads
    T,                          # tokens of all sequences
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    PACKED: tl.constexpr,       # whether sequences are packed
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    NEED_QKV: tl.constexpr,     # which gradients are wanted: of qkv,
    NEED_KEY: tl.constexpr,     # of the prefix keys,
    NEED_VALUE: tl.constexpr,   # of the prefix values
    PRECISION: tl.constexpr,    # of float32 products, "ieee" or "tf32"
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_M: tl.constexpr,      # queries of a tile
    BLOCK_N: tl.constexpr,      # columns of a tile
    BLOCK_D: tl.constexpr,      # D, rounded up
    LAST_M: tl.constexpr,       # queries of the last tile
    LAST_N: tl.constexpr,       # columns of the last tile
    MIXED_TILES: tl.constexpr,  # whether full tiles of columns may hold prefix columns
):
    """Computes the gradient of one block of queries, or of one block of columns, of one head."""
    query_blocks = tl.cdiv(N, BLOCK_M) if NEED_QKV else 0
    column_blocks = tl.cdiv(N + P, BLOCK_N)
    i_block = tl.program_id(0) % (query_blocks + column_blocks)
    i_head = (tl.program_id(0) // (query_blocks + column_blocks)).to(tl.int64)          # sequence and head
    i_s, i_h = i_head // H, i_head % H
    begin, length = locate_sequence(p_cu_seqlens, i_s, N, T, PACKED=PACKED)

    p_q = p_qkv + locate_head(i_s, i_h, begin, stride_qkv_s, stride_qkv_n, stride_qkv_h, PACKED=PACKED)
    p_k = p_q + stride_qkv_part
    columns = (p_k, p_k + stride_qkv_part, p_prefix_key + i_h * D, p_prefix_value + i_h * D, p_prefix_scale,
               stride_qkv_n, length, H)
    rows = (p_q, p_grad + locate_head(i_s, i_h, begin, stride_grad_s, stride_grad_n, stride_grad_h, PACKED=PACKED),
            p_out + (begin * H + i_h) * D, p_lse + i_h * T + begin, stride_qkv_n, stride_grad_n, length, H)
    p_dq = p_dqkv + (begin * 3 * H + i_h) * D                                           # contiguous (…, 3, H, D)

    if NEED_QKV and i_block < query_blocks:
        start_m = i_block * BLOCK_M
        if LAST_M < BLOCK_M and i_block == query_blocks - 1:
            query_gradient(p_dq, rows, columns, start_m, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                           PRECISION=PRECISION, ACC=ACC, BLOCK_M=LAST_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
                           LAST_N=LAST_N, MIXED_TILES=MIXED_TILES)
        elif start_m < length:
            query_gradient(p_dq, rows, columns, start_m, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                           PRECISION=PRECISION, ACC=ACC, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
                           LAST_N=LAST_N, MIXED_TILES=MIXED_TILES)
    else:
        i_column = i_block - query_blocks
        start_n = i_column * BLOCK_N
        HALF_M: tl.constexpr = BLOCK_M // 2                     # masks and dλ take registers: fewer queries at a time
        LAST_HALF_M: tl.constexpr = LAST_M if LAST_M < HALF_M else HALF_M
        PLAIN_M: tl.constexpr = HALF_M if CAUSAL else BLOCK_M
        LAST_PLAIN_M: tl.constexpr = LAST_HALF_M if CAUSAL else LAST_M
        gradients = (p_dq + H * D, p_dq + 2 * H * D,
                     p_dprefix_key + (i_s * P * H + i_h) * D, p_dprefix_value + (i_s * P * H + i_h) * D)
        if start_n < plain_columns(length, P, BLOCK_N=BLOCK_N):
            if NEED_QKV:
                column_gradient(gradients, rows, columns, start_n, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                                NEED_QKV=True, NEED_KEY=False, NEED_VALUE=False, PRECISION=PRECISION,
                                ACC=ACC, PLAIN=True, BLOCK_M=PLAIN_M, BLOCK_N=BLOCK_N,
                                BLOCK_D=BLOCK_D, LAST_M=LAST_PLAIN_M)
        elif LAST_N < BLOCK_N and i_column == column_blocks - 1:
            column_gradient(gradients, rows, columns, start_n, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                            NEED_QKV=NEED_QKV, NEED_KEY=NEED_KEY, NEED_VALUE=NEED_VALUE, PRECISION=PRECISION,
                            ACC=ACC, PLAIN=False, BLOCK_M=HALF_M, BLOCK_N=LAST_N,
                            BLOCK_D=BLOCK_D, LAST_M=LAST_HALF_M)
        elif MIXED_TILES and start_n < length + P:
            column_gradient(gradients, rows, columns, start_n, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                            NEED_QKV=NEED_QKV, NEED_KEY=NEED_KEY, NEED_VALUE=NEED_VALUE, PRECISION=PRECISION,
                            ACC=ACC, PLAIN=False, BLOCK_M=HALF_M, BLOCK_N=BLOCK_N,
                            BLOCK_D=BLOCK_D, LAST_M=LAST_HALF_M)


@triton.jit
def load_query_side(
    rows,                       # tuple, see the top of this file
    start,                      # first query of the block
    D: tl.constexpr,            # head width
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_M: tl.constexpr,      # queries of the block
    BLOCK_D: tl.constexpr,      # D, rounded up
):
    """A block of queries and its output gradients, [M, D]; its log-sum-exps and Δ = g·o, [M]."""
    p_q, p_g, p_o, p_lse, stride_q_n, stride_g_n, N, H = rows
    b_q = load_rows(p_q, start, stride_q_n, N, D=D, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D)
    b_g = load_rows(p_g, start, stride_g_n, N, D=D, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D)
    b_o = load_rows(p_o, start, H * D, N, D=D, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D)
    o_m = start + tl.arange(0, BLOCK_M)
    b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=0.0)
    b_delta = tl.sum(b_g.to(ACC) * b_o.to(ACC), 1)
    return b_q, b_g, b_lse, b_delta


@triton.jit
def softmax_gradient(
    b_x,                        # queries [M, D], or keys [N, D]
    b_y,                        # keys, or queries
    b_x_side,                   # output gradients g, or values v: of the same kind as b_x
    b_y_side,                   # values, or output gradients
    b_lse,                      # log-sum-exps of the queries, to be broadcast over the tile
    b_delta,                    # Δ of the queries, to be broadcast
    m_visible,                  # mask of the tile, or None
    b_logit_factor,             # factor of the logits of the columns, to be broadcast
    b_weight_factor,            # factor of the weights of the columns, to be broadcast
    D: tl.constexpr,            # head width
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
):
    """One tile of the softmax's backward: p, and ds = p (w a − Δ) with a = g·v.

    With x = q, y = k, x_side = g, y_side = v the tile is [queries, columns]; swapped, the tile is [columns, queries].
    """
    b_qk = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION, out_dtype=ACC)
    b_p = tl.exp2(b_qk * (b_logit_factor * (LOG2_E * D ** -0.5)) - b_lse)
    if m_visible is not None:
        b_p = tl.where(m_visible, b_p, 0.0)
    b_a = tl.dot(b_x_side, tl.trans(b_y_side), input_precision=PRECISION, out_dtype=ACC)
    b_ds = b_p * (b_a * b_weight_factor - b_delta)
    return b_p, b_ds


@triton.jit
def query_gradient(
    p_dq,                       # written: gradient of the head's queries, (N, D)
    rows,                       # tuple, see the top of this file
    columns,                    # tuple, see the top of this file
    start_m,                    # first query of the block
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_M: tl.constexpr,      # queries of the block
    BLOCK_N: tl.constexpr,      # columns of a tile
    BLOCK_D: tl.constexpr,      # D, rounded up
    LAST_N: tl.constexpr,       # columns of the last tile
    MIXED_TILES: tl.constexpr,  # whether full tiles of columns may hold prefix columns
):
    """dq_i = σ Σ_j ds_ij k_j for a block of queries; λ k_j in the place of k_j where λ acts on the logits."""
    _, _, _, _, _, _, N, H = rows
    o_m = start_m + tl.arange(0, BLOCK_M)
    query_side = load_query_side(rows, start_m, D=D, ACC=ACC, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    plain = plain_columns(N, P, BLOCK_N=BLOCK_N)
    last = N + P if LAST_N == BLOCK_N else (N + P - 1) // BLOCK_N * BLOCK_N
    for start in range(0, tl.minimum(plain, start_m + BLOCK_M) if CAUSAL else plain, BLOCK_N):
        b_dq += query_gradient_tile(query_side, o_m, columns, start, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                                    PRECISION=PRECISION, ACC=ACC, PLAIN=True, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)
    if MIXED_TILES:
        for start in range(plain, last, BLOCK_N):
            b_dq += query_gradient_tile(query_side, o_m, columns, start, P, D=D, CAUSAL=CAUSAL,
                                        SCALE_LOGITS=SCALE_LOGITS, PRECISION=PRECISION, ACC=ACC, PLAIN=False,
                                        BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)
    if LAST_N < BLOCK_N:
        b_dq += query_gradient_tile(query_side, o_m, columns, last, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
                                    PRECISION=PRECISION, ACC=ACC, PLAIN=False, BLOCK_N=LAST_N, BLOCK_D=BLOCK_D)
    store_rows(p_dq, b_dq * D ** -0.5, start_m, 3 * H * D, N, D=D, BLOCK=BLOCK_M, BLOCK_D=BLOCK_D)


@triton.jit
def query_gradient_tile(
    query_side,                 # tuple that load_query_side returned
    o_m,                        # offsets of the queries, [M]
    columns,                    # tuple, see the top of this file
    start,                      # first column of the tile
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    PLAIN: tl.constexpr,        # whether the tile is plain
    BLOCK_N: tl.constexpr,      # columns of the tile
    BLOCK_D: tl.constexpr,      # D, rounded up
):
    """The part of dq / σ that comes from a tile of columns.  [M, D]"""
    _, _, _, _, _, _, N, _ = columns
    b_q, b_g, b_lse, b_delta = query_side
    o_n, b_k, b_v, b_logit_factor, b_weight_factor = load_columns(
        columns, start, P, D=D, SCALE_LOGITS=SCALE_LOGITS, ACC=ACC, PLAIN=PLAIN, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)
    m_visible = None
    if CAUSAL or not PLAIN:
        m_visible = first_query(o_n, N, P, CAUSAL=CAUSAL)[None, :] <= o_m[:, None]
    _, b_ds = softmax_gradient(b_q, b_k, b_g, b_v, b_lse[:, None], b_delta[:, None], m_visible,
                               b_logit_factor[None, :], b_weight_factor[None, :], D=D, PRECISION=PRECISION, ACC=ACC)
    b_ds = (b_ds * b_logit_factor[None, :]).to(b_k.dtype)                               # [M, N]
    return tl.dot(b_ds, b_k, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def column_gradient(
    gradients,                  # tuple of pointers to the gradients of keys, values, prefix keys and prefix values
    rows,                       # tuple, see the top of this file
    columns,                    # tuple, see the top of this file
    start_n,                    # first column of the block
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    NEED_QKV: tl.constexpr,     # which gradients are wanted: of keys and values,
    NEED_KEY: tl.constexpr,     # of the prefix keys,
    NEED_VALUE: tl.constexpr,   # of the prefix values
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    PLAIN: tl.constexpr,        # whether the block is a plain tile
    BLOCK_M: tl.constexpr,      # queries of a tile
    BLOCK_N: tl.constexpr,      # columns of the block
    BLOCK_D: tl.constexpr,      # D, rounded up
    LAST_M: tl.constexpr,       # queries of the last tile
):
    """dk_j = σ Σ_i ds_ij q_i and dv_j = Σ_i p_ij g_i for a block of columns; on prefix columns without λ."""
    _, _, _, _, _, _, N, H = rows
    p_dk, p_dv, p_dprefix_key, p_dprefix_value = gradients
    column_side = load_columns(columns, start_n, P, D=D, SCALE_LOGITS=SCALE_LOGITS, ACC=ACC, PLAIN=PLAIN,
                               BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)

    last = N if LAST_M == BLOCK_M else (N - 1) // BLOCK_M * BLOCK_M
    begin = start_n // BLOCK_M * BLOCK_M if CAUSAL and PLAIN else 0                     # earlier queries see none of it
    for start in range(begin, last, BLOCK_M):
        b_dk, b_dv = column_gradient_tile(
            b_dk, b_dv, column_side, rows, start, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
            NEED_QKV=NEED_QKV, NEED_KEY=NEED_KEY, NEED_VALUE=NEED_VALUE, PRECISION=PRECISION, ACC=ACC,
            BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D)
    if LAST_M < BLOCK_M:
        b_dk, b_dv = column_gradient_tile(
            b_dk, b_dv, column_side, rows, last, P, D=D, CAUSAL=CAUSAL, SCALE_LOGITS=SCALE_LOGITS,
            NEED_QKV=NEED_QKV, NEED_KEY=NEED_KEY, NEED_VALUE=NEED_VALUE, PRECISION=PRECISION, ACC=ACC,
            BLOCK_M=LAST_M, BLOCK_D=BLOCK_D)

    b_dk *= D ** -0.5
    if NEED_QKV:
        store_rows(p_dk, b_dk, start_n, 3 * H * D, N, D=D, BLOCK=BLOCK_N, BLOCK_D=BLOCK_D)
        store_rows(p_dv, b_dv, start_n, 3 * H * D, N, D=D, BLOCK=BLOCK_N, BLOCK_D=BLOCK_D)
    if NEED_KEY:
        store_rows(p_dprefix_key, b_dk, start_n - N, H * D, P, D=D, BLOCK=BLOCK_N, BLOCK_D=BLOCK_D)
    if NEED_VALUE:
        store_rows(p_dprefix_value, b_dv, start_n - N, H * D, P, D=D, BLOCK=BLOCK_N, BLOCK_D=BLOCK_D)


@triton.jit
def column_gradient_tile(
    b_dk,                       # running dk / σ, [N, D]
    b_dv,                       # running dv, [N, D]
    column_side,                # tuple that load_columns returned
    rows,                       # tuple, see the top of this file
    start,                      # first query of the tile
    P,                          # prefix columns
    D: tl.constexpr,            # head width
    CAUSAL: tl.constexpr,       # a token sees no later tokens
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    NEED_QKV: tl.constexpr,     # which gradients are wanted: of keys and values,
    NEED_KEY: tl.constexpr,     # of the prefix keys,
    NEED_VALUE: tl.constexpr,   # of the prefix values
    PRECISION: tl.constexpr,    # of float32 products
    ACC: tl.constexpr,          # dtype of sums
    BLOCK_M: tl.constexpr,      # queries of the tile
    BLOCK_D: tl.constexpr,      # D, rounded up
):
    """Adds a block of queries to dk / σ and dv, on prefix columns without the factor λ."""
    _, _, _, _, _, _, N, _ = rows
    o_n, b_k, b_v, b_logit_factor, b_weight_factor = column_side
    o_m = start + tl.arange(0, BLOCK_M)
    b_q, b_g, b_lse, b_delta = load_query_side(rows, start, D=D, ACC=ACC, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D)
    m_visible = None            # rows of zeros beyond the last query add nothing; columns there are not stored
    if CAUSAL:
        m_visible = first_query(o_n, N, P, CAUSAL=CAUSAL)[:, None] <= o_m[None, :]
    b_p, b_ds = softmax_gradient(b_k, b_q, b_v, b_g, b_lse[None, :], b_delta[None, :], m_visible,
                                 b_logit_factor[:, None], b_weight_factor[:, None], D=D, PRECISION=PRECISION, ACC=ACC)
    if NEED_QKV or NEED_VALUE:
        b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision=PRECISION, out_dtype=ACC)
    if NEED_QKV or NEED_KEY:
        b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION, out_dtype=ACC)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["S"])
def prefix_gradient_kernel(
    p_dprefix_key,              # (S, P, H, D), from backward; unused without NEED_KEY
    p_dprefix_value,            # (S, P, H, D), from backward; unused without NEED_VALUE
    p_prefix_key,               # (P, H, D), contiguous
    p_prefix_value,             # (P, H, D), contiguous
    p_prefix_scale,             # (), λ
    p_dkey,                     # written if NEED_KEY: (P, H, D)
    p_dvalue,                   # written if NEED_VALUE: (P, H, D)
    p_dscale,                   # written if NEED_SCALE: a share of dλ for each program
    S,                          # sequences
    SIZE,                       # P · H · D
    SCALE_LOGITS: tl.constexpr, # λ acts on the logits; otherwise on the weights
    NEED_KEY: tl.constexpr,     # which sums are wanted: of the prefix keys,
    NEED_VALUE: tl.constexpr,   # of the prefix values,
    NEED_SCALE: tl.constexpr,   # and λ's gradient
    ACC: tl.constexpr,          # dtype of sums
    BLOCK: tl.constexpr,        # elements of the prefix in a program
    STEP: tl.constexpr,         # sequences of a step
):
    """Sums the gradients of the prefix over the sequences, always in the same order, and multiplies them by λ.

    λ's gradient needs no sums of its own, and is right at λ = 0 too. Over the prefix columns j, with dv and dk before
    they are multiplied by λ: on the weights it is Σ_ij p_ij g_i·v_j = Σ_j v_j·dv_j, on the logits
    Σ_ij ds_ij σ q_i·k_j = Σ_j k_j·dk_j.
    """
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < SIZE
    b_key, b_value = tl.zeros([STEP, BLOCK], ACC), tl.zeros([STEP, BLOCK], ACC)
    for start in range(0, S, STEP):
        o_s = (start + tl.arange(0, STEP)).to(tl.int64)[:, None]
        m_tile = (o_s < S) & m_x[None, :]
        if NEED_KEY:
            b_key += tl.load(p_dprefix_key + o_s * SIZE + o_x[None, :], mask=m_tile, other=0.0)
        if NEED_VALUE:
            b_value += tl.load(p_dprefix_value + o_s * SIZE + o_x[None, :], mask=m_tile, other=0.0)
    b_dkey, b_dvalue = tl.sum(b_key, 0), tl.sum(b_value, 0)
    if NEED_SCALE:
        b_columns = tl.load((p_prefix_key if SCALE_LOGITS else p_prefix_value) + o_x, mask=m_x, other=0.0).to(ACC)
        tl.store(p_dscale + tl.program_id(0), tl.sum(b_columns * (b_dkey if SCALE_LOGITS else b_dvalue), 0))
    b_scale = tl.load(p_prefix_scale).to(ACC)
    if NEED_KEY:
        b_dkey = b_dkey * b_scale if SCALE_LOGITS else b_dkey
        tl.store(p_dkey + o_x, b_dkey.to(p_dkey.dtype.element_ty), mask=m_x)
    if NEED_VALUE:
        b_dvalue = b_dvalue if SCALE_LOGITS else b_dvalue * b_scale
        tl.store(p_dvalue + o_x, b_dvalue.to(p_dvalue.dtype.element_ty), mask=m_x)
