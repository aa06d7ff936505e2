"""Low-rank updates of the key and the value projection of an attention: LoRA, DoRA, WoRA.

All take the frozen packed weight [query; key; value], (3 C, C), and give it back with the last two thirds updated by
up · down, with down (r, C) and up (C, r), which starts at zero. The query is never changed.
"""

import torch
from torch import Tensor, nn

from upperson.model.petl.initial import scalar, uniform_fan_in


class LoRA(nn.Module):
    """LoRA (arXiv 2106.09685): W + s · up · down.

    s is learnable and starts at 1, without a factor α/r, as in the released UP-Person.

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

    def forward(self, weight: Tensor) -> Tensor:
        """The packed weight with its key and value thirds updated, (3 C, C), in its dtype also under autocast."""
        with torch.autocast(weight.device.type, enabled=False):
            query, key, value = weight.chunk(3)
            return torch.cat([query, self.updated_key(key), self.updated_value(value)])

    def updated_key(self, weight: Tensor) -> Tensor:
        return weight + self.key_scale * self.key_up @ self.key_down

    def updated_value(self, weight: Tensor) -> Tensor:
        return weight + self.value_scale * self.value_up @ self.value_down


class DoRA(LoRA):
    """DoRA (arXiv 2402.09353, Eq. 5): magnitude and direction apart, m · (W + up · down) / |W + up · down|.

    The norm is that of each output's weights, a row; m (C,) starts as the norms of W. The gradient flows through the
    norm as well; the paper's Sec. 4.3 treats it as a constant to save memory, which merging the weight once a step
    does not need.
    """

    def __init__(self, rank: int, weight: Tensor):
        nn.Module.__init__(self)                                        # without LoRA's scalars
        self.add_factors(rank, weight.shape[1])
        self.add_magnitudes(weight)

    def add_magnitudes(self, weight: Tensor) -> None:
        _, key, value = weight.detach().chunk(3)
        self.key_magnitude = nn.Parameter(row_norms(key).squeeze(1))
        self.value_magnitude = nn.Parameter(row_norms(value).squeeze(1))

    def updated_key(self, weight: Tensor) -> Tensor:
        return with_magnitude(weight + self.key_up @ self.key_down, self.key_magnitude)

    def updated_value(self, weight: Tensor) -> Tensor:
        return with_magnitude(weight + self.value_up @ self.value_down, self.value_magnitude)


class WoRA(DoRA):
    """WoRA (arXiv 2404.10292): DoRA with both parts weighted, m · (β W + α up · down) / |β W + α up · down|.

    α and β are learnable scalars of key and of value, which start at 1.
    """

    def __init__(self, rank: int, weight: Tensor):
        super().__init__(rank, weight)
        self.key_alpha, self.key_beta = scalar(1), scalar(1)
        self.value_alpha, self.value_beta = scalar(1), scalar(1)

    def updated_key(self, weight: Tensor) -> Tensor:
        direction = self.key_beta * weight + self.key_alpha * self.key_up @ self.key_down
        return with_magnitude(direction, self.key_magnitude)

    def updated_value(self, weight: Tensor) -> Tensor:
        direction = self.value_beta * weight + self.value_alpha * self.value_up @ self.value_down
        return with_magnitude(direction, self.value_magnitude)


def row_norms(weight: Tensor) -> Tensor:
    """(rows, 1)."""
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True)


def with_magnitude(direction: Tensor, magnitude: Tensor) -> Tensor:
    """Rows of `direction` (rows, columns) scaled to the lengths `magnitude` (rows,)."""
    return magnitude.unsqueeze(1) / row_norms(direction) * direction


LOW_RANK = {"lora": LoRA, "dora": DoRA, "wora": WoRA}
