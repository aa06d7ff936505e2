"""Adapters around one sublayer of a block, the attention or the MLP, and its LayerNorm (arXiv 2504.10084, Table VIII).

F is the frozen sublayer, x the residual stream, and A(u) = s · up(relu(down(u))) the bottleneck:

    none          x + F(LN(x))
    l-parallel    x + F(LN(x) + A(x))                   L-Adapter, beside LayerNorm
    l-sequential  x + F(y + A(y)),  y = LN(x)           after LayerNorm
    parallel      x + F(y) + A(y),  y = LN(x)           beside the sublayer (arXiv 2110.04366, 2205.13535)
    sequential    x + u + A(u),     u = F(LN(x))        after the sublayer (arXiv 1902.00751)
    ln-tuning     x + F(LN(x)), with LN's gain and bias trained
    normed        x + F(LN(x)) + A(LN'(x)), LN' trained     beside the sublayer (arXiv 2309.09496), with constant s
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upperson_kernels import layernorm_adapter
from upperson_kernels.adapter import MAX_HIDDEN_WIDTH

from upperson.petl.initial import normal, scalar, uniform_fan_in


class Adapter(nn.Module):
    """An adapter around a sublayer. The base class, FROZEN below, changes nothing; each subclass overrides one step."""

    def normalise(
        self,
        norm: nn.LayerNorm,
        x: Tensor,
        residual: Tensor | None,
        backend: str | None,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sublayer's input, and the sum x + residual (x if residual is None); all (B, N, C).

        `weights`: the weights of the down and the up projection in another dtype; None: the adapter's own.
        """
        if residual is not None:
            x = x + residual
        return self.layer_norm(norm, x), x

    def layer_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """The sublayer's input, computed from the residual stream."""
        return norm(x)

    def finish(self, y: Tensor, out: Tensor) -> Tensor:
        """The update of the residual stream from the sublayer's input `y` and output `out`; all (B, N, C)."""
        return out


def backend_for(hidden: int, backend: str | None) -> str | None:
    """The backend of a bottleneck. A kernel's tile holds the whole bottleneck, so PyTorch computes wider ones."""
    return "torch" if hidden > MAX_HIDDEN_WIDTH else backend


class Bottleneck(Adapter):
    """The bottleneck A. The subclasses define its position.

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
    """The adapter beside LayerNorm, on the fused operator."""

    def normalise(
        self,
        norm: nn.LayerNorm,
        x: Tensor,
        residual: Tensor | None,
        backend: str | None,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        backend = backend_for(len(self.down_weight), backend)
        down_weight, up_weight = weights or (self.down_weight, self.up_weight)
        result: Any = layernorm_adapter(  # a pair if there is a residual
            x,
            norm.weight,
            norm.bias,
            down_weight,
            self.down_bias,
            up_weight,
            self.up_bias,
            self.scale,
            eps=norm.eps,
            residual=residual,
            backend=backend,
        )
        return (result, x) if residual is None else result


class SequentialLAdapter(Bottleneck):
    """The adapter after LayerNorm."""

    def layer_norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        y = norm(x)
        return y + self.bottleneck(y)


class ParallelAdapter(Bottleneck):
    """The adapter beside the sublayer, with the same input."""

    def finish(self, y: Tensor, out: Tensor) -> Tensor:
        return out + self.bottleneck(y)


class SequentialAdapter(Bottleneck):
    """The adapter after the sublayer."""

    def finish(self, y: Tensor, out: Tensor) -> Tensor:
        return out + self.bottleneck(out)


class NormedAdapter(Adapter):
    """The adapter beside the sublayer, with its own LayerNorm of the residual stream, on the fused operator.

    Args:
        norm: the frozen LayerNorm of the sublayer.
        hidden: width of the bottleneck.
        scale: the constant s.
    """

    def __init__(self, norm: nn.LayerNorm, hidden: int, scale: float):
        super().__init__()
        width = norm.normalized_shape[0]
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.down_weight, self.down_bias = normal(hidden, width), nn.Parameter(torch.zeros(hidden))
        self.up_weight, self.up_bias = normal(width, hidden), nn.Parameter(torch.zeros(width))
        self.scale = scale

    def normalise(
        self,
        norm: nn.LayerNorm,
        x: Tensor,
        residual: Tensor | None,
        backend: str | None,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Also adds the adapter's output to the stream, before the sublayer's output is added."""
        backend = backend_for(len(self.down_weight), backend)
        down_weight, up_weight = weights or (self.down_weight, self.up_weight)
        scale = torch.full_like(self.up_bias[0], self.scale, requires_grad=False)  # exact in every dtype
        pair: Any = layernorm_adapter(
            x,
            norm.weight,
            norm.bias,
            down_weight,
            self.down_bias,
            up_weight,
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
    """LayerNorm with a trained gain and bias, which start from the frozen values. `hidden` is unused."""

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
