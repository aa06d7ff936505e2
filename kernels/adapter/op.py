"""layernorm_adapter as PyTorch operators: what runs, what it returns without running, how it differentiates."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.adapter import device
from kernels.backend import accumulator


@torch.library.custom_op("upperson::layernorm_adapter", mutates_args=())
def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, down_weight: Tensor,
            down_bias: Tensor, up_weight: Tensor, up_bias: Tensor, scale: Tensor,
            eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return device.launch_forward(x, residual, weight, bias, down_weight, down_bias, up_weight, up_bias, scale, eps)


@forward.register_fake
def _(x, residual, weight, bias, down_weight, down_bias, up_weight, up_bias, scale, eps):
    hidden_width, width = down_weight.shape
    rows = x.numel() // width
    statistics = accumulator(x.dtype)
    return (x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape),
            x.new_empty(rows, dtype=statistics), x.new_empty(rows, dtype=statistics),
            x.new_empty(rows, hidden_width))


@torch.library.custom_op("upperson::layernorm_adapter_backward", mutates_args=())
def backward(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, down_weight: Tensor, up_weight: Tensor,
             up_bias: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, hidden: Tensor, needs: list[bool],
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return device.launch_backward(dy, dtotal, x, weight, down_weight, up_weight, up_bias, scale, mean, rstd, hidden,
                                  needs)


@backward.register_fake
def _(dy, dtotal, x, weight, down_weight, up_weight, up_bias, scale, mean, rstd, hidden, needs):
    down_bias = down_weight.new_empty(down_weight.shape[0])
    inputs = (x, weight, weight, down_weight, down_bias, up_weight, up_bias, scale)
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip(inputs, needs, strict=True))


def save_for_backward(ctx, inputs, output):
    x, residual, weight, bias, down_weight, down_bias, up_weight, up_bias, scale, eps = inputs
    y, total, mean, rstd, hidden = output
    ctx.save_for_backward(x if residual is None else total, weight, down_weight, up_weight, up_bias, scale,
                          mean, rstd, hidden)
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, rstd, hidden)
    ctx.set_materialize_grads(False)                                    # no zeros for what has no gradient


def differentiate(ctx, dy, dtotal, *_):
    need_x, need_residual, *need_parameters = ctx.needs_input_grad[:-1]
    dtotal = dtotal if ctx.has_residual else None
    if dy is None and dtotal is None:                                   # neither output did matter
        return (None,) * 10
    if dy is None:
        dy = torch.zeros_like(ctx.saved_tensors[0])
    grads = backward(dy, dtotal, *ctx.saved_tensors, [need_x or need_residual, *need_parameters])
    dx, *dparameters = grads
    dparameters = (d if needed else None for d, needed in zip(dparameters, need_parameters, strict=True))
    return dx if need_x else None, dx if need_residual else None, *dparameters, None


forward.register_autograd(differentiate, setup_context=save_for_backward)


# ---------------------------------------------------------------------------------------- for torch's flop counter


@register_flop_formula(torch.ops.upperson.layernorm_adapter)
def forward_flops(x, residual, weight, bias, down_weight, *_, **__):
    """Down and up."""
    return 4 * math.prod(x) * down_weight[0]


@register_flop_formula(torch.ops.upperson.layernorm_adapter_backward)
def backward_flops(dy, dtotal, x, weight, down_weight, up_weight, up_bias, scale, mean, rstd, hidden, needs, **__):
    """Those of the gradients that are asked for; dh stands before three of them."""
    need_x, _, _, need_down, need_down_bias, need_up, _, need_scale = needs
    products = (need_x or need_down or need_down_bias, need_x, need_down, need_up or need_scale)
    return 2 * math.prod(x) * down_weight[0] * sum(products)
