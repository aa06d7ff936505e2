"""Attention with one query token per sequence, as the last block of a tower needs it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from upperson_kernels.attention.reference import plain_attention


def attend_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_scale: Tensor,
    *,
    scale_target: str,
    visible: Tensor | None,
) -> Tensor:
    """prefix_attention with a single query in each of S sequences.

    The time is bounded by reading keys and values once, so plain PyTorch suffices. λ is folded as in the PyTorch
    backend: λ on the weights is λ on the prefix values, λ on the logits is λ on the prefix keys.

    Args:
        query: (S, H, D).
        key, value: (S, N, H, D).
        prefix_key, prefix_value, prefix_scale, scale_target: see upperson_kernels.prefix_attention.
        visible: (S, N) bool, the tokens that the query attends to; None: all tokens. The prefix is always visible.

    Returns: (S, H, D).
    """
    if scale_target == "weights":
        prefix_value = prefix_scale * prefix_value
    else:
        prefix_key = prefix_scale * prefix_key
    key, value = (
        torch.cat([prefix.to(query.dtype).expand(query.shape[0], -1, -1, -1), tokens], dim=1).transpose(1, 2)
        for prefix, tokens in ((prefix_key, key), (prefix_value, value))
    )  # (S, H, P + N, D) each
    if visible is not None:
        visible = F.pad(visible, (prefix_key.shape[0], 0), value=True)[:, None, None]  # (S, 1, 1, P + N)
    return plain_attention(query.unsqueeze(2), key, value, visible).squeeze(2)
