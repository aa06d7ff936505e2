"""Prefixes: P learned key and value columns that every token of a block attends to (arXiv 2504.10084, Sec. III-C)."""

import torch
from torch import Tensor, nn

from upperson.petl.initial import scalar


class Prefix(nn.Module):
    """Prefix tuning (arXiv 2101.00190) as it is: the prefix shares the softmax with the tokens, λ is fixed at 1.

    Args:
        length, width: P and the width C of the tower.
        scale: where λ starts; unused here.
        target: what λ multiplies, "weights" or "logits"; λ = 1 changes nothing on either.
    """

    def __init__(self, length: int, width: int, scale: float, target: str):
        super().__init__()
        self.target = target
        self.key = nn.Parameter(torch.empty(length, width).uniform_(0, 0.01))
        self.value = nn.Parameter(torch.empty(length, width).uniform_(0, 0.01))

    def forward(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key and value columns, (P, heads, head width), and λ, ()."""
        return *self.split(self.key, self.value, heads), self.key.new_ones(())

    @staticmethod
    def split(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        return key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1))


class SalablePrefix(Prefix):
    """S-Prefix: the prefix's part in the attention is scaled by a learnable λ (Eq. 15).

    Keys and values have a learnable factor of their own as well, as in the released code; the paper's parameter counts
    include them.
    """

    def __init__(self, length: int, width: int, scale: float, target: str):
        super().__init__(length, width, scale, target)
        self.key_scale = scalar(1)
        self.value_scale = scalar(1)
        self.scale = scalar(scale)  # λ

    def forward(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        return *self.split(self.key_scale * self.key, self.value_scale * self.value, heads), self.scale


PREFIXES = {"salable": SalablePrefix, "vanilla": Prefix}
