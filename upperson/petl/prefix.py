"""Prefixes: P learned key and value columns that every token of a block attends to (arXiv 2504.10084, Sec. III-C)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from upperson.petl.initial import scalar


class Prefix(nn.Module):
    """Plain prefix tuning (arXiv 2101.00190): the prefix shares the softmax with the tokens, and λ is fixed at 1.

    Args:
        length, width: P and the width C of the tower.
        scale: initial λ; unused in this class.
        target: the factor that λ multiplies, "weights" or "logits"; λ = 1 changes neither.
    """

    def __init__(self, length: int, width: int, scale: float, target: str):
        super().__init__()
        self.target = target
        self.key = nn.Parameter(torch.empty(length, width).uniform_(0, 0.01))
        self.value = nn.Parameter(torch.empty(length, width).uniform_(0, 0.01))

    def forward(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key and value columns, each (P, heads, head width), and λ, a scalar."""
        return *self.split(self.key, self.value, heads), self.scale_factor()

    def scale_factor(self) -> Tensor:
        """λ, a scalar."""
        return self.key.new_ones(())

    @classmethod
    def columns_of(cls, modules: Sequence["Prefix"], heads: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The key and value columns of several blocks in `dtype`, as `forward` gives those of one."""

        def columns(part: str) -> Tensor:
            return cls.scaled(modules, part, torch.stack([getattr(module, part) for module in modules])).to(dtype)

        return list(zip(*(pair.unbind() for pair in cls.split(columns("key"), columns("value"), heads)), strict=True))

    @staticmethod
    def scaled(modules: Sequence["Prefix"], part: str, columns: Tensor) -> Tensor:
        """The stacked columns (blocks, P, C) of a part, "key" or "value", with the factors of the blocks."""
        return columns

    @staticmethod
    def split(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        return key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1))


class SalablePrefix(Prefix):
    """S-Prefix: a learnable λ scales the prefix's part of the attention (Eq. 15).

    Keys and values each have a further learnable factor, as in the released code; the paper's parameter counts include
    these factors.
    """

    def __init__(self, length: int, width: int, scale: float, target: str):
        super().__init__(length, width, scale, target)
        self.key_scale = scalar(1)
        self.value_scale = scalar(1)
        self.scale = scalar(scale)  # λ

    def forward(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        return *self.split(self.key_scale * self.key, self.value_scale * self.value, heads), self.scale

    def scale_factor(self) -> Tensor:
        return self.scale

    @staticmethod
    def scaled(modules: Sequence["Prefix"], part: str, columns: Tensor) -> Tensor:
        return torch.stack([getattr(module, f"{part}_scale") for module in modules])[:, None, None] * columns


PREFIXES = {"salable": SalablePrefix, "vanilla": Prefix}
