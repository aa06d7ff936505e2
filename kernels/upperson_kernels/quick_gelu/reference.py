"""The definition of quick_gelu in plain PyTorch: the oracle of the tests, and the PyTorch backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 1.702  # of the sigmoid that approximates the normal distribution function (arXiv 1606.08415, Sec. 2)


def explicit(x: Tensor, bias: Tensor | None) -> Tensor:
    """The definition. Autograd keeps u and its sigmoid."""
    u = x if bias is None else x + bias.to(x.dtype)
    return u * (SLOPE * u).sigmoid()


def plain(x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through SiLU, v · sigmoid(v), whose backward starts from v alone.

    float16 is computed in float32, since v leaves the range of float16 beyond |u| = 38,000.
    """
    wide = x.float() if x.dtype == torch.float16 else x
    u = wide if bias is None else wide + bias.to(wide.dtype)
    return (F.silu(SLOPE * u) / SLOPE).to(x.dtype)
