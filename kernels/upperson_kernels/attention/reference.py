"""The definition of prefix_attention in plain PyTorch.

`explicit` writes the definition down and is the oracle of every test. `folded` is the PyTorch backend: the same
function as plain attention over one longer list of keys, which scaled_dot_product_attention computes without the
weights in memory. `packed` is the PyTorch backend for sequences of unequal length. Autograd differentiates all three.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from upperson_kernels.backend import in_transform
from upperson_kernels.packing import unpack_sequences


def explicit(
    qkv: Tensor, prefix_key: Tensor, prefix_value: Tensor, prefix_scale: Tensor, causal: bool, scale_target: str
) -> Tensor:
    """Salable-prefix attention by its definition (arXiv 2504.10084, Eq. 15). Shapes as in prefix_attention."""
    query, key, value = qkv.transpose(1, 3).unbind(2)  # (B, H, N, D) each
    prefix_key, prefix_value, prefix_scale = (t.to(qkv.dtype) for t in (prefix_key, prefix_value, prefix_scale))
    length, width = query.shape[-2:]

    prefix_logits = torch.einsum("bhnd,phd->bhnp", query, prefix_key) * width**-0.5
    if scale_target == "logits":
        prefix_logits = prefix_logits * prefix_scale
    token_logits = torch.einsum("bhnd,bhmd->bhnm", query, key) * width**-0.5
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=qkv.device).triu(1)
        token_logits = token_logits.masked_fill(future, float("-inf"))

    weights = torch.cat([prefix_logits, token_logits], dim=-1).softmax(-1)
    prefix_weights, token_weights = weights.split([prefix_key.shape[0], length], dim=-1)
    if scale_target == "weights":
        prefix_weights = prefix_weights * prefix_scale  # not renormalised
    out = torch.einsum("bhnp,phd->bnhd", prefix_weights, prefix_value) + torch.einsum(
        "bhnm,bhmd->bnhd", token_weights, value
    )
    return out


def folded(
    qkv: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_scale: Tensor,
    causal: bool,
    scale_target: str,
    lengths: Tensor | None = None,
) -> Tensor:
    """The same, folded into plain attention: λ on the weights is λ on the prefix values, λ on the logits is
    λ on the prefix keys. Of sample b only the first lengths[b] tokens are seen, if lengths (B,) is given."""
    query, key, value = qkv.transpose(1, 3).unbind(2)  # (B, H, N, D) each
    batch, _, length, _ = query.shape
    if scale_target == "weights":
        prefix_value = prefix_scale * prefix_value
    else:
        prefix_key = prefix_scale * prefix_key
    prefix_key, prefix_value = (
        t.to(qkv.dtype).transpose(0, 1).expand(batch, -1, -1, -1) for t in (prefix_key, prefix_value)
    )  # (B, H, P, D) each
    mask = None
    if causal or lengths is not None:
        mask = torch.ones(length, length, dtype=torch.bool, device=qkv.device)
        if causal:
            mask = mask.tril()
        if lengths is not None:
            present = torch.arange(length, device=qkv.device) < lengths[:, None].clamp_min(1)  # no row sees nothing
            mask = (mask & present[:, None, :])[:, None]  # (B, 1, N, N)
        mask = F.pad(mask, (prefix_key.shape[2], 0), value=True)  # every query sees the prefix
    out = plain_attention(query, torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2), mask)
    return out.transpose(1, 2)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """F.scaled_dot_product_attention, by its formula under torch.func.

    PyTorch's fused kernels have neither second nor forward-mode derivatives, and run one sample at a time under vmap.
    """
    with sdpa_kernel(SDPBackend.MATH) if in_transform() else nullcontext():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def packed(
    qkv: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_scale: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale_target: str,
) -> Tensor:
    """`folded` of each sequence of a packed (T, 3, H, D): padded to the longest one, and packed again."""
    padded, sequence, position = unpack_sequences(qkv, cu_seqlens, max_seqlen)
    out = folded(padded, prefix_key, prefix_value, prefix_scale, causal, scale_target, cu_seqlens.diff())
    return out[sequence, position]
