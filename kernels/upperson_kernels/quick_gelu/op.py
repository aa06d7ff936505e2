"""quick_gelu as PyTorch operators: what runs, what is returned without running, and the derivative."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upperson_kernels.backend import batched, cheapest, for_transforms, once_differentiable
from upperson_kernels.quick_gelu import launch


def run_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    return launch.forward(x, bias)


quick_gelu_forward = torch.library.custom_op("upperson::quick_gelu", run_forward, mutates_args=())


@quick_gelu_forward.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


def run_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return launch.backward(dy, x, bias)


quick_gelu_backward = torch.library.custom_op("upperson::quick_gelu_backward", run_backward, mutates_args=())


@quick_gelu_backward.register_fake
def _(dy, x, bias):
    return x.new_empty(x.shape)


def quick_gelu_save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def quick_gelu_differentiate(
    ctx: Any, dy: Tensor, backward: Callable[..., Tensor] = quick_gelu_backward
) -> tuple[Tensor | None, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx = backward(dy, x, bias)
    need_x, need_bias = ctx.needs_input_grad
    return dx if need_x else None, dx.reshape(-1, dx.shape[-1]).sum(0, dtype=bias.dtype) if need_bias else None


quick_gelu_forward.register_autograd(quick_gelu_differentiate, setup_context=quick_gelu_save)


class PlainQuickGELU(torch.autograd.Function):
    """The same without PyTorch's registry; see backend.runs_plainly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        output = run_forward(x, bias)
        quick_gelu_save(ctx, (x, bias), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return quick_gelu_differentiate(ctx, dy, backward=quick_gelu_backward if batched((dy,)) else run_backward)


quick_gelu_in_transforms = for_transforms(
    "quick_gelu",
    quick_gelu_forward,
    quick_gelu_save,
    functools.partial(quick_gelu_differentiate, backward=for_transforms("quick_gelu", quick_gelu_backward)),
)


def quick_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """The output."""
    return cheapest(PlainQuickGELU, quick_gelu_in_transforms, quick_gelu_forward, (x, bias))(x, bias)
