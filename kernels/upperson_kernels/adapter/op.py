"""layernorm_adapter as PyTorch operators: what runs, what it returns without running, how it differentiates."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from upperson_kernels.adapter import launch
from upperson_kernels.backend import accumulator


@torch.library.custom_op("upperson::layernorm_adapter", mutates_args=())
def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch.forward(
        x, residual, weight, bias, down_weight, down_bias, up_weight, up_bias, scale, norm_weight, norm_bias, eps
    )


@forward.register_fake
def _(x, residual, weight, bias, down_weight, down_bias, up_weight, up_bias, scale, norm_weight, norm_bias, eps):
    hidden_width, width = down_weight.shape
    rows = x.numel() // width
    statistics = accumulator(x.dtype)
    has_residual, own_norm = residual is not None, norm_weight is not None
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if has_residual or own_norm else 0),
        x.new_empty(x.shape if has_residual and own_norm else 0),
        x.new_empty(rows, dtype=statistics),
        x.new_empty(rows, dtype=statistics),
        x.new_empty(rows, hidden_width),
    )


@torch.library.custom_op("upperson::layernorm_adapter_backward", mutates_args=())
def backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch.backward(
        dy,
        dstream,
        x,
        weight,
        down_weight,
        down_bias,
        up_weight,
        up_bias,
        scale,
        norm_weight,
        norm_bias,
        mean,
        rstd,
        hidden,
        needs,
    )


@backward.register_fake
def _(
    dy,
    dstream,
    x,
    weight,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    scale,
    norm_weight,
    norm_bias,
    mean,
    rstd,
    hidden,
    needs,
):
    inputs = (x, weight, weight, down_weight, down_bias, up_weight, up_bias, scale, norm_weight, norm_bias)
    return tuple(t.new_empty(t.shape) if needed else x.new_empty(0) for t, needed in zip(inputs, needs, strict=True))


def save_for_backward(ctx, inputs, output):
    x, residual, weight, _, *parameters, eps = inputs
    y, stream, total, mean, rstd, hidden = output
    ctx.has_residual, ctx.own_norm = residual is not None, parameters[-1] is not None
    if ctx.has_residual:
        x = total if ctx.own_norm else stream
    ctx.save_for_backward(x, weight, *parameters, mean, rstd, hidden)
    ctx.mark_non_differentiable(total, mean, rstd, hidden)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def differentiate(ctx, dy, dstream, *_):
    need_x, need_residual, *need_parameters = ctx.needs_input_grad[:-1]
    if dy is None and dstream is None:  # neither output did matter
        return (None,) * 12
    saved = ctx.saved_tensors  # which checkpointing hands out only once
    x = saved[0]
    if dy is None:
        dy = torch.zeros_like(x)
    if ctx.own_norm:
        dstream = torch.zeros_like(x) if dstream is None else dstream
    elif not ctx.has_residual:
        dstream = None
    grads = backward(dy, dstream, *saved, [need_x or need_residual, *need_parameters])
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
def backward_flops(dy, dstream, x, weight, down_weight, *others, **__):
    """Those of the gradients that are asked for; dh stands before most of them."""
    need_x, _, _, need_down, need_down_bias, need_up, _, need_scale, need_norm_weight, need_norm_bias = others[-1]
    products = (
        need_x or need_down or need_down_bias or need_norm_weight or need_norm_bias,
        need_x,
        need_down or need_norm_weight,
        need_up or need_scale,
    )
    return 2 * math.prod(x) * down_weight[0] * sum(products)
