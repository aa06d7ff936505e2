"""What layernorm_adapter computes, in plain PyTorch: the oracle of the tests and the PyTorch backend."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from upperson_kernels.backend import in_autocast


def plain(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """With t = x, or x + residual, and A(z) = up(relu(down(z))): returns (LN(t) + scale · A(t), t), or, if the adapter
    has a LayerNorm of its own, (LN(t), t + scale · A(LN_own(t)))."""
    with torch.autocast(x.device.type, enabled=False) if in_autocast(x) else nullcontext():  # x's dtype holds
        total = x if residual is None else x + residual
        weight, bias, down_weight, down_bias, up_weight, up_bias, scale = (
            t.to(x.dtype) for t in (weight, bias, down_weight, down_bias, up_weight, up_bias, scale)
        )
        normalised = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
        read = total
        if norm_weight is not None and norm_bias is not None:
            read = F.layer_norm(total, total.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
        hidden = F.relu(F.linear(read, down_weight, down_bias))
        adapter = scale * F.linear(hidden, up_weight, up_bias)
        return (normalised + adapter, total) if norm_weight is None else (normalised, total + adapter)
