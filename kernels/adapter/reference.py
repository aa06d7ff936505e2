"""What layernorm_adapter computes, in plain PyTorch: the oracle of the tests and the PyTorch backend."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import in_autocast


def plain(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, down_weight: Tensor, down_bias: Tensor,
          up_weight: Tensor, up_bias: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (LN(t) + scale · up(relu(down(t))), t) with t = x, or x + residual."""
    with torch.autocast(x.device.type, enabled=False) if in_autocast(x) else nullcontext():     # x's dtype holds
        total = x if residual is None else x + residual
        weight, bias, down_weight, down_bias, up_weight, up_bias, scale = (
            t.to(x.dtype) for t in (weight, bias, down_weight, down_bias, up_weight, up_bias, scale))
        normalised = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
        hidden = F.relu(F.linear(total, down_weight, down_bias))
        return normalised + scale * F.linear(hidden, up_weight, up_bias), total
