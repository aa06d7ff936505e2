"""quick_gelu as PyTorch operators: what runs, what it returns without running, how it differentiates."""

import torch
from torch import Tensor

from upperson_kernels.quick_gelu import device


@torch.library.custom_op("upperson::quick_gelu", mutates_args=())
def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    return device.launch_forward(x, bias)


@forward.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("upperson::quick_gelu_backward", mutates_args=())
def backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return device.launch_backward(dy, x, bias)


@backward.register_fake
def _(dy, x, bias):
    return x.new_empty(x.shape)


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate(ctx, dy):
    x, bias = ctx.saved_tensors
    dx = backward(dy, x, bias)
    need_x, need_bias = ctx.needs_input_grad
    return dx if need_x else None, dx.reshape(-1, dx.shape[-1]).sum(0, dtype=bias.dtype) if need_bias else None


forward.register_autograd(differentiate, setup_context=save_for_backward)
