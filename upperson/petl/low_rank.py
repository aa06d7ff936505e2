"""Low-rank updates of the key and the value projection of an attention: LoRA, DoRA, WoRA.

All take a frozen packed weight whose last rows are [key; value], (… + 2 C, C). They return this weight with keys and
values updated by up · down, with down (r, C), and up (C, r), which starts at zero. The query is never changed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upperson_kernels.backend import in_transform, once_differentiable

from upperson.petl.initial import scalar, uniform_fan_in

PARTS = ("key", "value")


class LoRA(nn.Module):
    """LoRA (arXiv 2106.09685): W + s · up · down.

    s is learnable and starts at 1; there is no factor α/r, as in the released UP-Person.

    Args:
        rank: r.
        weight: the frozen packed weight, (3 C, C).
    """

    def __init__(self, rank: int, weight: Tensor):
        super().__init__()
        self.add_factors(rank, weight.shape[1])
        self.key_scale = scalar(1)
        self.value_scale = scalar(1)

    def add_factors(self, rank: int, width: int) -> None:
        self.key_down = uniform_fan_in(rank, width)
        self.key_up = nn.Parameter(torch.zeros(width, rank))
        self.value_down = uniform_fan_in(rank, width)
        self.value_up = nn.Parameter(torch.zeros(width, rank))

    def tensors(self, part: str, *names: str) -> list[Tensor]:
        return [getattr(self, f"{part}_{name}") for name in names]

    def forward(self, weight: Tensor) -> Tensor:
        """The packed weight with updated keys and values, of the same shape and dtype, also under autocast."""
        with torch.autocast(weight.device.type, enabled=False):
            width = weight.shape[1]
            query, key, value = weight.split([len(weight) - 2 * width, width, width])
            return torch.cat([query, self.updated("key", key), self.updated("value", value)])

    def updated(self, part: str, weight: Tensor) -> Tensor:
        up, down, scale = self.tensors(part, "up", "down", "scale")
        return weight + scale * up @ down

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, low_rank_gradients: bool) -> Tensor:
        """F.linear of x (…, C) with the updated weight and `bias` (rows,): (…, rows of weight).

        The transforms of torch.func differentiate the plain formula, as they take no MergedLinear.
        """
        if not low_rank_gradients or weight.requires_grad or bias.requires_grad or in_transform():
            return F.linear(x, self(weight), bias)
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                merged = self(weight)
            down = torch.cat([self.key_down, self.value_down])
            up = torch.stack([self.key_scale * self.key_up, self.value_scale * self.value_up])
        return merged_linear(x, bias, Merged(merged, down, up))

    @staticmethod
    def merge(modules: Sequence["LoRA"], weights: Tensor) -> list["Merged"]:
        """LoRA of several blocks, merged into their packed weights (blocks, 3 C, C), in the dtype of `weights`.

        As in F.linear under autocast, the factors are cast, and so are their gradients.
        """
        width, blocks = weights.shape[2], len(modules)

        def stacked(name: str) -> Tensor:
            return torch.stack(
                [tensor for module in modules for tensor in (module.tensors(part, name)[0] for part in PARTS)]
            )

        down = stacked("down").to(weights.dtype)  # (2 blocks, r, C): key and value of each block in turn
        up = (stacked("scale")[:, None, None] * stacked("up")).to(weights.dtype)  # (2 blocks, C, r)
        with torch.no_grad():
            merged = weights.clone()
            for i, _ in enumerate(PARTS):
                merged[:, (1 + i) * width : (2 + i) * width].baddbmm_(up[i::2], down[i::2])
        down, up = down.view(blocks, -1, width).unbind(), up.unflatten(0, (blocks, 2)).unbind()
        return [Merged(*tensors) for tensors in zip(merged.unbind(), down, up, strict=True)]


class Merged(NamedTuple):
    """A packed weight with LoRA merged into it, and the factors of keys and values, which have its gradient."""

    weight: Tensor  # (… + 2 C, C), without gradient
    down: Tensor  # (2 r, C)
    up: Tensor  # (2, C, r), with the factor s

    def rows_from(self, first: int) -> "Merged":
        return self._replace(weight=self.weight[first:])


def merged_linear(x: Tensor, bias: Tensor, merged: Merged) -> Tensor:
    """F.linear of x (…, C) with a merged weight and `bias` (rows,), which get no gradient: (…, rows).

    Under autocast x and all tensors are cast, as in F.linear.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return MergedLinear.apply(x.to(dtype), bias.to(dtype), *(tensor.to(dtype) for tensor in merged))


class MergedLinear(torch.autograd.Function):
    """F.linear with a merged weight, where the gradients of LoRA's factors do not need the gradient of the weight.

    G is the gradient of the keys (or values), (T, C), and u = s up. The gradient of W' is Gᵀ x, which needs 2 T C²
    operations, but

        d u = Gᵀ (x downᵀ)        d down = (G u)ᵀ x

    are products with r columns, which need 8 T C r operations in total. Keys and values are computed together.
    """

    @staticmethod
    def forward(ctx, x, bias, weight, down, up):
        ctx.save_for_backward(x, weight, down, up)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, down, up = ctx.saved_tensors
        width, rank = up.shape[1:]
        gradient, rows = gradient.reshape(-1, len(weight)), x.reshape(-1, width)
        need_x, _, _, need_down, need_up = ctx.needs_input_grad
        dx = (gradient @ weight).view(x.shape) if need_x else None
        of_parts = gradient[:, -2 * width :].unflatten(1, (2, width)).transpose(0, 1)  # (2, T, C)
        d_up = d_down = None
        if need_up:
            lowered = (rows @ down.t()).unflatten(1, (2, rank)).transpose(0, 1)  # (2, T, r)
            d_up = of_parts.transpose(1, 2) @ lowered
        if need_down:
            raised = of_parts @ up  # (2, T, r)
            d_down = torch.bmm(raised.transpose(1, 2), rows.expand(2, *rows.shape)).flatten(0, 1)
        return dx, None, None, d_down, d_up


class DoRA(LoRA):
    """DoRA (arXiv 2402.09353, Eq. 5): separate magnitude and direction, m · V / |V| with V = W + up · down.

    |V| (C,) has the norm of each row, the weights of one output; m (C,) starts as the row norms of W. |V| is a constant
    in backward (Sec. 4.3), as in the released code. The output is then a factor m / |V| of that of V, and the gradients
    of V's factors are low-rank.
    """

    def __init__(self, rank: int, weight: Tensor):
        nn.Module.__init__(self)  # without LoRA's scalars
        self.add_factors(rank, weight.shape[1])
        _, key, value = weight.detach().chunk(3)
        self.key_magnitude, self.value_magnitude = (nn.Parameter(norms(part, 1)) for part in (key, value))

    def updated(self, part: str, weight: Tensor) -> Tensor:
        direction = self.direction(part, weight)
        return self.factor(part, direction).unsqueeze(1) * direction

    def direction(self, part: str, weight: Tensor) -> Tensor:
        """V."""
        up, down = self.tensors(part, "up", "down")
        return weight + up @ down

    def factor(self, part: str, direction: Tensor) -> Tensor:
        """m / |V|, (C,)."""
        return self.tensors(part, "magnitude")[0] / norms(direction.detach(), 1)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, low_rank_gradients: bool) -> Tensor:
        """As in LoRA."""
        if not low_rank_gradients or weight.requires_grad or bias.requires_grad or in_transform():
            return F.linear(x, self(weight), bias)
        with torch.autocast(x.device.type, enabled=False):
            width = weight.shape[1]
            with torch.no_grad():
                query, *parts = weight.split([len(weight) - 2 * width, width, width])
                directions = [self.direction(part, own) for part, own in zip(PARTS, parts, strict=True)]
                merged = torch.cat([query, *directions])
            factors = [self.factor(part, direction) for part, direction in zip(PARTS, directions, strict=True)]
            factor = torch.cat([factors[0].new_ones(len(query)), *factors])
            down, up = torch.cat([self.key_down, self.value_down]), torch.stack([self.key_up, self.value_up])
        y = merged_linear(x, torch.zeros_like(bias), Merged(merged, down, up))
        with torch.autocast(x.device.type, enabled=False):
            # In the factor's dtype: a factor near 1 that is rounded to 16 bits would scale a whole output.
            return torch.addcmul(bias.to(factor.dtype), y, factor).to(y.dtype)


class WoRA(LoRA):
    """WoRA (arXiv 2404.10292): two weighted terms with a magnitude, m · V / |V| with V = β W + α up · down.

    |V| (C,) has the norm of each column, the weights of one input; m (C,) starts as the column norms of W. α and β are
    learnable scalars, one pair for the keys and one for the values. α starts at 8 as in the released code, whose rank
    is 8, and β at 1. The gradient also flows through the norm, and therefore needs that of the whole weight.
    """

    def __init__(self, rank: int, weight: Tensor):
        nn.Module.__init__(self)  # without LoRA's scalars
        self.add_factors(rank, weight.shape[1])
        _, key, value = weight.detach().chunk(3)
        # An earlier version had magnitudes of outputs; their names differ, so that its checkpoints are refused.
        self.key_input_magnitude, self.value_input_magnitude = (nn.Parameter(norms(part, 0)) for part in (key, value))
        self.key_alpha, self.key_beta = scalar(8), scalar(1)
        self.value_alpha, self.value_beta = scalar(8), scalar(1)

    def updated(self, part: str, weight: Tensor) -> Tensor:
        up, down, magnitude, alpha, beta = self.tensors(part, "up", "down", "input_magnitude", "alpha", "beta")
        direction = beta * weight + alpha * up @ down
        return magnitude / norms(direction, 0) * direction

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, low_rank_gradients: bool) -> Tensor:
        """As in LoRA, but always with the gradient of the whole updated weight."""
        return F.linear(x, self(weight), bias)


def norms(weight: Tensor, dim: int) -> Tensor:
    """The norms of the rows (`dim` 1) or of the columns (`dim` 0) of a matrix."""
    return torch.linalg.vector_norm(weight, dim=dim)


LOW_RANK = {"lora": LoRA, "dora": DoRA, "wora": WoRA}
