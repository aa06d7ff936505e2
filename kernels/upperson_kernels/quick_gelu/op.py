"""quick_gelu as PyTorch operators: what runs, what is returned without running, and the derivative."""

from typing import Any

import torch
from torch import Tensor

from upperson_kernels.quick_gelu import launch


@torch.library.custom_op("upperson::quick_gelu", mutates_args=())
def quick_gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    return launch.forward(x, bias)


@quick_gelu_forward.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("upperson::quick_gelu_backward", mutates_args=())
def quick_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return launch.backward(dy, x, bias)


@quick_gelu_backward.register_fake
def _(dy, x, bias):
    return x.new_empty(x.shape)


def quick_gelu_save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def quick_gelu_differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx = quick_gelu_backward(dy, x, bias)
    need_x, need_bias = ctx.needs_input_grad
    return dx if need_x else None, dx.reshape(-1, dx.shape[-1]).sum(0, dtype=bias.dtype) if need_bias else None


quick_gelu_forward.register_autograd(quick_gelu_differentiate, setup_context=quick_gelu_save)
