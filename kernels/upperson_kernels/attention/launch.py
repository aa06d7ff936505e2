"""Launches the kernels of prefix attention (device.py): torch tensors in and out."""

# pyright: reportArgumentType=false, reportCallIssue=false
# A kernel's constants are constexpr to Triton and plain values to its caller, which a type checker cannot see.

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from upperson_kernels import tiles
from upperson_kernels.attention import choose, device, resident
from upperson_kernels.backend import accumulator, capability, float32_precision
from upperson_kernels.rows import TRITON_DTYPES

# Elements of a program, and sequences of a step.
PREFIX_BLOCKS = dict(BLOCK=128, STEP=8, num_warps=4, enable_fp_fusion=True)


class Prefix(NamedTuple):
    """The prefix that all sequences share."""

    key: Tensor  # (P, H, D)
    value: Tensor  # (P, H, D)
    scale: Tensor  # (), λ


class Packing(NamedTuple):
    """Where sequences of unequal length are in a packed tensor; cu_seqlens is None for a (B, N, …) tensor."""

    cu_seqlens: Tensor | None  # (S + 1,) int32, offsets
    max_seqlen: int  # tokens of the longest sequence, or more


class Needs(NamedTuple):
    """Which gradients are wanted."""

    qkv: bool
    key: bool
    value: bool
    scale: bool


class Sums(NamedTuple):
    """Of which gradients backward sums those of the sequences."""

    key: bool
    value: bool


class Sizes(NamedTuple):
    """How many sequences and tokens there are."""

    sequences: int
    longest: int  # tokens of the longest sequence
    tokens: int  # of all sequences


def forward(qkv: Tensor, prefix: Prefix, packing: Packing, causal: bool, scale_target: str) -> tuple[Tensor, Tensor]:
    """The output, (B, N, H, D) or packed (T, H, D), and the log-sum-exps of the logits in base 2, (H, T), T = B · N."""
    sizes = sizes_of(qkv, packing)
    heads, width = qkv.shape[-2:]
    packed = packing.cu_seqlens is not None
    acc_dtype = accumulator(qkv.dtype)
    out = qkv.new_empty(*qkv.shape[:-3], heads, width)
    lse = qkv.new_empty(heads, sizes.tokens, dtype=acc_dtype)
    if out.numel() == 0:
        return out, lse
    qkv = addressable(qkv, packed)
    prefix_length = prefix.key.shape[0]
    target = capability(qkv)
    call = (sizes.longest, prefix_length, heads, sizes.tokens)
    columns = (sizes.longest, prefix_length, width, qkv.element_size(), target)
    flags = dict(
        D=width,
        CAUSAL=causal,
        SCALE_LOGITS=scale_target == "logits",
        PRECISION=float32_precision(),
        ACC=TRITON_DTYPES[acc_dtype],
    )
    with torch.cuda.device_of(qkv):
        if choose.is_resident(*columns, causal=causal, packed=packed):
            resident.forward_kernel[(sizes.sequences * heads,)](
                qkv,
                *columns_as(qkv.dtype, prefix),
                prefix.scale,
                out,
                lse,
                *strides(qkv, packed),
                *call,
                **flags,
                **choose.forward_pieces(sizes.longest, prefix_length, causal, target),
            )
        else:
            chosen = tiles.choose("attention_forward", width, qkv.element_size(), target)
            device.forward_kernel[(sizes.sequences * heads * triton.cdiv(sizes.longest, chosen["BLOCK_M"]),)](
                qkv,
                prefix.key.contiguous(),
                prefix.value.contiguous(),
                prefix.scale,
                packing.cu_seqlens,
                out,
                lse,
                *strides(qkv, packed),
                *call,
                PACKED=packed,
                **flags,
                **chosen,
                **last_tiles(sizes.longest, prefix_length, packed, chosen["BLOCK_M"], chosen["BLOCK_N"]),
            )
    return out, lse


def columns_as(dtype: torch.dtype, prefix: Prefix) -> tuple[Tensor, Tensor]:
    """The prefix's keys and values, contiguous, in the dtype of the activations."""
    return prefix.key.to(dtype).contiguous(), prefix.value.to(dtype).contiguous()


def backward(
    grad: Tensor,
    qkv: Tensor,
    prefix: Prefix,
    packing: Packing,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale_target: str,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of qkv, prefix key, prefix value and λ; None for every gradient that is not needed."""
    # λ's gradient follows from that of the values, or of the keys where λ acts on the logits.
    sums = Sums(
        key=needs.key or (needs.scale and scale_target == "logits"),
        value=needs.value or (needs.scale and scale_target == "weights"),
    )
    options = (causal, scale_target, needs, sums)
    dqkv, dkey, dvalue = sequence_gradients(grad, qkv, prefix, packing, out, lse, *options)
    sequences = sizes_of(qkv, packing).sequences if out.numel() else 0
    return [dqkv if needs.qkv else None, *prefix_gradients(sequences, dkey, dvalue, prefix, scale_target, needs, sums)]


def sequence_gradients(
    grad: Tensor,
    qkv: Tensor,
    prefix: Prefix,
    packing: Packing,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale_target: str,
    needs: Needs,
    sums: Sums,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of qkv, and those of prefix keys and values for each sequence, (S, P, H, D), without the factor λ.

    Empty for what is not needed; nothing is computed where there are no tokens.
    """
    sizes = sizes_of(qkv, packing)
    heads, width = qkv.shape[-2:]
    prefix_length = prefix.key.shape[0]
    packed = packing.cu_seqlens is not None
    acc_dtype = accumulator(qkv.dtype)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format) if needs.qkv else qkv.new_empty(0)
    dkey, dvalue = (
        qkv.new_empty((sizes.sequences, prefix_length, heads, width) if needed else 0, dtype=acc_dtype)
        for needed in sums
    )
    if not (out.numel() and any(needs)):
        return dqkv, dkey, dvalue
    grad, qkv = addressable(grad, packed), addressable(qkv, packed)
    target = capability(qkv)
    tensors = (out, lse, grad, dqkv, dkey, dvalue)
    shape = (*strides(qkv, packed), *strides(grad, packed), sizes.longest, prefix_length, heads, sizes.tokens)
    flags = dict(
        D=width,
        CAUSAL=causal,
        SCALE_LOGITS=scale_target == "logits",
        NEED_QKV=needs.qkv,
        NEED_KEY=sums.key,
        NEED_VALUE=sums.value,
        PRECISION=float32_precision(),
        ACC=TRITON_DTYPES[acc_dtype],
    )
    pieces = None
    columns = (sizes.longest, prefix_length, width, qkv.element_size(), target)
    if choose.is_resident(*columns, causal=causal, packed=packed):
        pieces = choose.backward_pieces(sizes.longest, prefix_length)
    with torch.cuda.device_of(qkv):
        if pieces is not None:
            rows = pieces["PIECE"] * pieces["FULL"] + pieces["LAST"]
            resident.backward_kernel[(sizes.sequences * heads,)](
                qkv,
                *columns_as(qkv.dtype, prefix),
                prefix.scale,
                *tensors,
                qkv.new_empty(sizes.sequences, heads, 2, rows, dtype=acc_dtype),
                *shape,
                **flags,
                **pieces,
            )
        else:
            chosen = tiles.choose("attention_backward", width, qkv.element_size(), target)
            query_blocks = triton.cdiv(sizes.longest, chosen["BLOCK_M"]) if needs.qkv else 0
            column_blocks = triton.cdiv(sizes.longest + prefix_length, chosen["BLOCK_N"])
            device.backward_kernel[(sizes.sequences * heads * (query_blocks + column_blocks),)](
                qkv,
                prefix.key.contiguous(),
                prefix.value.contiguous(),
                prefix.scale,
                packing.cu_seqlens,
                *tensors,
                *shape,
                PACKED=packed,
                **flags,
                **chosen,
                **last_tiles(sizes.longest, prefix_length, packed, chosen["BLOCK_M"], chosen["BLOCK_N"]),
            )
    return dqkv, dkey, dvalue


def prefix_gradients(
    sequences: int, dkey: Tensor, dvalue: Tensor, prefix: Prefix, scale_target: str, needs: Needs, sums: Sums
) -> list[Tensor | None]:
    """Gradients of prefix key, prefix value and λ from those of each sequence; None for what is not needed."""
    size = prefix.key.numel()
    programs = triton.cdiv(size, PREFIX_BLOCKS["BLOCK"])
    key, value = (
        torch.empty_like(columns, memory_format=torch.contiguous_format) if needed else dkey
        for columns, needed in zip((prefix.key, prefix.value), sums, strict=True)
    )
    shares = dkey.new_empty(programs if needs.scale else 0)
    if programs and any(sums):
        with torch.cuda.device_of(dkey):
            device.prefix_gradient_kernel[(programs,)](
                dkey,
                dvalue,
                prefix.key.contiguous(),
                prefix.value.contiguous(),
                prefix.scale,
                key,
                value,
                shares,
                sequences,
                size,
                SCALE_LOGITS=scale_target == "logits",
                NEED_KEY=sums.key,
                NEED_VALUE=sums.value,
                NEED_SCALE=needs.scale,
                ACC=TRITON_DTYPES[dkey.dtype],
                **PREFIX_BLOCKS,
            )
    return [
        key if needs.key else None,
        value if needs.value else None,
        shares.sum().to(prefix.scale.dtype) if needs.scale else None,
    ]


def last_tiles(length: int, prefix_length: int, packed: bool, block_m: int, block_n: int) -> dict[str, Any]:
    """Sizes of the last tile of rows and of columns, and whether full tiles of columns may hold prefix columns.

    The lengths of packed sequences are not known before the kernel runs; their last tiles are full ones.
    """

    def last(count: int, block: int) -> int:
        rest = count % block
        return block if packed or rest == 0 else min(block, max(16, triton.next_power_of_2(rest)))

    columns = length + prefix_length
    last_n = last(columns, block_n)
    mixed = last_n == block_n or (columns - 1) // block_n > length // block_n
    return dict(LAST_M=last(length, block_m), LAST_N=last_n, MIXED_TILES=mixed)


def addressable(tensor: Tensor, packed: bool) -> Tensor:
    """The tensor itself, or a contiguous copy where the kernels cannot address it.

    The elements of a row must be adjacent (the gradient of a sum has stride 0), and offsets within a tile must fit 32
    bits.
    """
    between_rows = tensor.stride(0 if packed else 1)
    return tensor if tensor.stride(-1) == 1 and between_rows < 2**23 else tensor.contiguous()


def sizes_of(qkv: Tensor, packing: Packing) -> Sizes:
    if packing.cu_seqlens is None:
        return Sizes(qkv.shape[0], qkv.shape[1], qkv.shape[0] * qkv.shape[1])
    return Sizes(packing.cu_seqlens.shape[0] - 1, min(packing.max_seqlen, qkv.shape[0]), qkv.shape[0])


def strides(tensor: Tensor, packed: bool) -> tuple[int, ...]:
    """The strides of (B, N, …) without the innermost one; of (T, …) with a 0 in the place of the batch's."""
    return (0, *tensor.stride()[:-1]) if packed else tensor.stride()[:-1]
