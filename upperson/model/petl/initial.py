"""Initial values that several modules share."""

import math

import torch
from torch import nn


def scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(float(value)))


def uniform_fan_in(rows: int, columns: int) -> nn.Parameter:
    """nn.Linear's own start: uniform within ± 1/√columns."""
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5)))
