"""Low-rank updates of the key and the value projection of an attention: LoRA, DoRA, WoRA.

All take a frozen packed weight whose last rows are [key; value], (… + 2 C, C). They return this weight with keys and
values updated by up · down, with down (r, C), and up (C, r), which starts at zero. The query is never changed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from upperson.petl.initial import scalar, uniform_fan_in


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
        """F.linear of x (…, C) with the updated weight and `bias` (rows,): (…, rows of weight)."""
        if not low_rank_gradients or weight.requires_grad or bias.requires_grad:
            return F.linear(x, self(weight), bias)
        with torch.no_grad():
            merged = self(weight)
        return LowRankLinear.apply(
            x, merged, bias, *self.tensors("key", "down", "up", "scale"), *self.tensors("value", "down", "up", "scale")
        )


class LowRankLinear(torch.autograd.Function):
    """x W'ᵀ + b with LoRA merged into W'. The gradients of the factors are computed without the gradient of W'.

    G is the gradient of the keys (or values), (T, C). The gradient of W' is Gᵀ x, which needs 2 T C² operations, but

        d up = s Gᵀ (x downᵀ)        d down = s (G up)ᵀ x        d s = Σ up ∘ Gᵀ (x downᵀ)

    are products with r columns, which need 8 T C r operations in total. Under autocast x and W' are cast, as in
    F.linear. W' and b get no gradient.
    """

    @staticmethod
    def forward(ctx, x, merged, bias, key_down, key_up, key_scale, value_down, value_up, value_scale):
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            x, merged = x.to(dtype), merged.to(dtype)
            ctx.save_for_backward(x, merged, key_down, key_up, key_scale, value_down, value_up, value_scale)
            return F.linear(x, merged, bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, merged, *factors = ctx.saved_tensors
        width = merged.shape[1]
        gradient, rows = gradient.reshape(-1, len(merged)), x.reshape(-1, width)
        dx = (gradient @ merged).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[3:]):
            return dx, *[None] * 8
        lowered = rows @ torch.cat([factors[0], factors[3]]).to(x.dtype).t()  # (T, 2 r)
        found = []
        for part, (down, up, scale) in enumerate((factors[:3], factors[3:])):
            g = gradient.narrow(1, len(merged) - (2 - part) * width, width)
            rank = len(down)
            d_up = (g.t() @ lowered[:, part * rank : (part + 1) * rank]).to(up.dtype)  # without s
            d_down = ((g @ up.to(g.dtype)).t() @ rows).to(down.dtype)
            found += [scale * d_down, scale * d_up, (up * d_up).sum()]
        return dx, None, None, *found


class DoRA(LoRA):
    """DoRA (arXiv 2402.09353, Eq. 5): separate magnitude and direction, m · (W + up · down) / |W + up · down|.

    The norm is taken over each row, the weights of one output; m (C,) starts as the row norms of W. The gradient also
    flows through the norm, and therefore needs the gradient of the whole weight; the paper's Sec. 4.3 treats the norm
    as a constant instead.
    """

    def __init__(self, rank: int, weight: Tensor):
        nn.Module.__init__(self)  # without LoRA's scalars
        self.add_factors(rank, weight.shape[1])
        self.add_magnitudes(weight)

    def add_magnitudes(self, weight: Tensor) -> None:
        _, key, value = weight.detach().chunk(3)
        self.key_magnitude = nn.Parameter(row_norms(key).squeeze(1))
        self.value_magnitude = nn.Parameter(row_norms(value).squeeze(1))

    def updated(self, part: str, weight: Tensor) -> Tensor:
        up, down, magnitude = self.tensors(part, "up", "down", "magnitude")
        return with_magnitude(weight + up @ down, magnitude)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, low_rank_gradients: bool) -> Tensor:
        """As in LoRA, but always with the gradient of the whole updated weight."""
        return F.linear(x, self(weight), bias)


class WoRA(DoRA):
    """WoRA (arXiv 2404.10292): DoRA with two weighted terms, m · (β W + α up · down) / |β W + α up · down|.

    α and β are learnable scalars, one pair for the keys and one for the values, which start at 1.
    """

    def __init__(self, rank: int, weight: Tensor):
        super().__init__(rank, weight)
        self.key_alpha, self.key_beta = scalar(1), scalar(1)
        self.value_alpha, self.value_beta = scalar(1), scalar(1)

    def updated(self, part: str, weight: Tensor) -> Tensor:
        up, down, magnitude, alpha, beta = self.tensors(part, "up", "down", "magnitude", "alpha", "beta")
        return with_magnitude(beta * weight + alpha * up @ down, magnitude)


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each row, (rows, 1)."""
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True)


def with_magnitude(direction: Tensor, magnitude: Tensor) -> Tensor:
    """The rows of `direction` (rows, columns), scaled to the norms `magnitude` (rows,)."""
    return magnitude.unsqueeze(1) / row_norms(direction) * direction


LOW_RANK = {"lora": LoRA, "dora": DoRA, "wora": WoRA}
