"""Attention where one token of each sequence asks: what the last block of a tower needs."""

import torch
from torch import Tensor


def attend_once(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor,
                prefix_scale: Tensor, *, scale_target: str, visible: Tensor | None) -> Tensor:
    """prefix_attention of a single query in each of S sequences.

    A product of a matrix and a vector, which reads keys and values once whatever computes it: plain PyTorch.

    Args:
        query: (S, H, D).
        key, value: (S, N, H, D).
        prefix_key, prefix_value, prefix_scale, scale_target: see kernels.prefix_attention.
        visible: (S, N) bool, the tokens that the query sees; None: all of them. It always sees the prefix.

    Returns: (S, H, D).
    """
    prefix_key, prefix_value, prefix_scale = (
        tensor.to(query.dtype) for tensor in (prefix_key, prefix_value, prefix_scale))
    query = query * query.shape[-1] ** -0.5
    prefix_logits = torch.einsum("shd,phd->shp", query, prefix_key)
    if scale_target == "logits":
        prefix_logits = prefix_logits * prefix_scale
    token_logits = torch.einsum("shd,snhd->shn", query, key)
    if visible is not None:
        token_logits = token_logits.masked_fill(~visible[:, None], float("-inf"))
    logits = torch.cat([prefix_logits, token_logits], dim=-1)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    prefix_weights, token_weights = weights.split([len(prefix_key), key.shape[1]], dim=-1)
    if scale_target == "weights":
        prefix_weights = prefix_weights * prefix_scale
    return (torch.einsum("shp,phd->shd", prefix_weights, prefix_value)
            + torch.einsum("shn,snhd->shd", token_weights, value))


def pad(packed: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed rows (T, …) as (S, longest, …), zeros behind shorter sequences; and where rows are, (S, longest) bool."""
    row = torch.arange(len(packed), device=packed.device)
    sequence = torch.bucketize(row, cu_seqlens[1:], right=True)
    padded = packed.new_zeros(len(cu_seqlens) - 1, longest, *packed.shape[1:])
    padded = padded.index_put((sequence, row - cu_seqlens[sequence]), packed)
    return padded, torch.arange(longest, device=packed.device) < cu_seqlens.diff()[:, None]
