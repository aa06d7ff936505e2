"""The modules that UP-Person trains (arXiv 2504.10084, Sec. III). Each holds the parameters of one block.

Initial values: the modules start as close to doing nothing as training allows. LoRA and adapter end in zeros;
the prefix starts small.
"""

import math

import torch
from torch import Tensor, nn

from kernels import layernorm_adapter


def scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(float(value)))


def uniform_fan_in(rows: int, columns: int) -> nn.Parameter:
    """nn.Linear's own start: uniform within ± 1/√columns."""
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5)))


class SalablePrefix(nn.Module):
    """S-Prefix: P learned key and value columns, whose part in the attention is scaled by a learnable λ (Eq. 15)."""

    def __init__(self, length: int, width: int, scale: float):
        super().__init__()
        self.key = nn.Parameter(torch.empty(length, width).uniform_(0, 0.01))
        self.value = nn.Parameter(torch.empty(length, width).uniform_(0, 0.01))
        self.key_scale = scalar(1)
        self.value_scale = scalar(1)
        self.scale = scalar(scale)                                      # λ

    def forward(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key and value columns, (P, heads, head width), and λ, ()."""
        key = (self.key_scale * self.key).unflatten(-1, (heads, -1))
        value = (self.value_scale * self.value).unflatten(-1, (heads, -1))
        return key, value, self.scale


class LoRA(nn.Module):
    """Low-rank updates of the key and the value projection: W + s · up · down, without a factor α/r."""

    def __init__(self, rank: int, width: int):
        super().__init__()
        self.key_down = uniform_fan_in(rank, width)
        self.key_up = nn.Parameter(torch.zeros(width, rank))
        self.key_scale = scalar(1)
        self.value_down = uniform_fan_in(rank, width)
        self.value_up = nn.Parameter(torch.zeros(width, rank))
        self.value_scale = scalar(1)

    def forward(self, weight: Tensor) -> Tensor:
        """The packed projection weight [query; key; value], (3 C, C), with its key and value thirds updated."""
        query, key, value = weight.chunk(3)
        key = key + self.key_scale * self.key_up @ self.key_down
        value = value + self.value_scale * self.value_up @ self.value_down
        return torch.cat([query, key, value])


class LAdapter(nn.Module):
    """L-Adapter: a bottleneck adapter beside LayerNorm, LN(x) + s · up(relu(down(x)))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.down_weight = uniform_fan_in(hidden, width)
        self.down_bias = nn.Parameter(torch.zeros(hidden))
        self.up_weight = nn.Parameter(torch.zeros(width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.scale = scalar(1)

    def forward(self, norm: nn.LayerNorm, x: Tensor, residual: Tensor | None,
                backend: str | None) -> Tensor | tuple[Tensor, Tensor]:
        """See kernels.layernorm_adapter; `norm` is the frozen LayerNorm that it stands beside."""
        return layernorm_adapter(x, norm.weight, norm.bias, self.down_weight, self.down_bias, self.up_weight,
                                 self.up_bias, self.scale, eps=norm.eps, residual=residual, backend=backend)
