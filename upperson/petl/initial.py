"""Initial values that several modules share."""

import math

import torch
from torch import nn


def scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(float(value)))


def uniform_fan_in(rows: int, columns: int) -> nn.Parameter:
    """The initial values of nn.Linear: uniform within ± 1/√columns."""
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5)))


def normal(*shape: int) -> nn.Parameter:
    """Initial values N(0, 0.02²)."""
    return nn.Parameter(torch.empty(shape).normal_(std=0.02))
