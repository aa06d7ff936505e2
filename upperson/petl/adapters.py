"""Adapters around one sublayer of a block, the attention or the MLP, and its LayerNorm (arXiv 2504.10084, Table VIII).

With the frozen sublayer F, the residual stream x, the bottleneck A(u) = s · up(relu(down(u))):

    none          x + F(LN(x))
    l-parallel    x + F(LN(x) + A(x))                   L-Adapter, beside LayerNorm
    l-sequential  x + F(y + A(y)),  y = LN(x)           after LayerNorm
    parallel      x + F(y) + A(y),  y = LN(x)           beside the sublayer (arXiv 2110.04366, 2205.13535)
    sequential    x + u + A(u),     u = F(LN(x))        after the sublayer (arXiv 1902.00751)
    ln-tuning     x + F(LN(x)), with LN's gain and bias trained
    normed        x + F(LN(x)) + A(LN'(x)), LN' trained     beside the sublayer (arXiv 2309.09496), s a constant
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upperson_kernels import layernorm_adapter
from upperson_kernels.adapter import MAX_HIDDEN_WIDTH

from upperson.petl.initial import normal, scalar, uniform_fan_in


class Adapter(nn.Module):
    """An adapter around a sublayer. The base class, FROZEN below, adds nothing; each subclass overrides one step."""

    def normalise(
        self, norm: nn.LayerNorm, x: Tensor, residual: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """The sublayer's input, and the sum x + residual (x where residual is None); all (B, N, C)."""
        if residual is not None:
            x = x + residual
        return self.layer_norm(norm, x), x

    def layer_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """The sublayer's input, from the residual stream alone."""
        return norm(x)

    def finish(self, y: Tensor, out: Tensor) -> Tensor:
        """The update of the residual stream, given the input and the output of the sublayer; all (B, N, C)."""
        return out


def backend_for(hidden: int, backend: str | None) -> str | None:
    """The kernels hold the whole bottleneck in a tile; PyTorch computes those that are too wide for that."""
    return "torch" if hidden > MAX_HIDDEN_WIDTH else backend


class Bottleneck(Adapter):
    """The bottleneck A, for the subclasses to put in its place.

    Args:
        norm: the frozen LayerNorm of the sublayer.
        hidden: width of the bottleneck.
    """

    def __init__(self, norm: nn.LayerNorm, hidden: int):
        super().__init__()
        width = norm.normalized_shape[0]
        self.down_weight = uniform_fan_in(hidden, width)
        self.down_bias = nn.Parameter(torch.zeros(hidden))
        self.up_weight = nn.Parameter(torch.zeros(width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.scale = scalar(1)

    def bottleneck(self, u: Tensor) -> Tensor:
        hidden = F.relu(F.linear(u, self.down_weight, self.down_bias))
        return self.scale * F.linear(hidden, self.up_weight, self.up_bias)


class LAdapter(Bottleneck):
    """Beside LayerNorm, on the fused operator."""

    def normalise(
        self, norm: nn.LayerNorm, x: Tensor, residual: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        backend = backend_for(len(self.down_weight), backend)
        result: Any = layernorm_adapter(  # a pair with a residual
            x,
            norm.weight,
            norm.bias,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            self.scale,
            eps=norm.eps,
            residual=residual,
            backend=backend,
        )
        return (result, x) if residual is None else result


class SequentialLAdapter(Bottleneck):
    """After LayerNorm."""

    def layer_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        y = norm(x)
        return y + self.bottleneck(y)


class ParallelAdapter(Bottleneck):
    """Beside the sublayer, whose input it reads."""

    def finish(self, y: Tensor, out: Tensor) -> Tensor:
        return out + self.bottleneck(y)


class SequentialAdapter(Bottleneck):
    """After the sublayer."""

    def finish(self, y: Tensor, out: Tensor) -> Tensor:
        return out + self.bottleneck(out)


class NormedAdapter(Adapter):
    """Beside the sublayer, reading the residual stream through a LayerNorm of its own, on the fused operator.

    Args:
        norm: the frozen LayerNorm of the sublayer.
        hidden: width of the bottleneck.
        scale: s, a constant.
    """

    def __init__(self, norm: nn.LayerNorm, hidden: int, scale: float):
        super().__init__()
        width = norm.normalized_shape[0]
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.down_weight, self.down_bias = normal(hidden, width), nn.Parameter(torch.zeros(hidden))
        self.up_weight, self.up_bias = normal(width, hidden), nn.Parameter(torch.zeros(width))
        self.scale = scale

    def normalise(
        self, norm: nn.LayerNorm, x: Tensor, residual: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """The adapter's output is added to the stream here, before the output of the sublayer is."""
        backend = backend_for(len(self.down_weight), backend)
        scale = torch.full_like(self.up_bias[0], self.scale, requires_grad=False)  # exact in every dtype
        pair: Any = layernorm_adapter(
            x,
            norm.weight,
            norm.bias,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            scale,
            eps=norm.eps,
            residual=residual,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            backend=backend,
        )
        return pair


class LayerNormTuning(Adapter):
    """LayerNorm with a gain and a bias of its own, which start as the frozen ones. `hidden` is unused."""

    def __init__(self, norm: nn.LayerNorm, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().clone())
        self.bias = nn.Parameter(norm.bias.detach().clone())

    def layer_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, self.weight, self.bias, norm.eps).to(x.dtype)


FROZEN = Adapter()
ADAPTERS = {
    "l-parallel": LAdapter,
    "l-sequential": SequentialLAdapter,
    "parallel": ParallelAdapter,
    "sequential": SequentialAdapter,
    "ln-tuning": LayerNormTuning,
}
