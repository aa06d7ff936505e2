"""Prompts: learned tokens of a layer, beside the tokens of the image or the caption, and the same for all samples.

upperson/model/prompts.py inserts the prompts into the towers.
"""

import torch
from torch import Tensor, nn

from upperson.petl.initial import normal


class Prompt(nn.Module):
    """n tokens of a layer (visual prompt tuning, arXiv 2203.12119, and the same in the text tower).

    Args:
        length, width: n and the width C of the tower.
    """

    def __init__(self, length: int, width: int):
        super().__init__()
        self.tokens = normal(length, width)

    def rows(self, partner: "Prompt | None") -> Tensor:
        """The tokens (m, C) of the layer. `partner`: the prompt of the same layer in the other tower."""
        return self.tokens


class CoupledPrompt(Prompt):
    """Bidirectional prompts (arXiv 2309.09496): a layer has n own tokens, and n linear projections of the tokens of the
    other tower. In both towers the text's tokens come first.

    Args:
        length, width: n and the width C of the tower.
        other_width: width of the other tower.
        first: whether the own tokens come first, as in the text tower.
    """

    def __init__(self, length: int, width: int, other_width: int, first: bool):
        super().__init__(length, width)
        self.first = first
        self.projection = nn.Linear(width, other_width)
        self.projection.weight = normal(other_width, width)
        nn.init.zeros_(self.projection.bias)

    def rows(self, partner: "CoupledPrompt") -> Tensor:
        carried = partner.projection(partner.tokens)
        return torch.cat([self.tokens, carried] if self.first else [carried, self.tokens])
