"""layernorm_adapter as PyTorch operators: what runs, what is returned without running, and the derivative.

Tensors are flat arguments here, as torch.library wants them; launch.py takes them as NamedTuples.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from upperson_kernels.adapter import launch
from upperson_kernels.adapter.launch import Layers, Needs, Norm, Saved
from upperson_kernels.backend import accumulator, batched, cheapest, for_transforms, once_differentiable


def run_forward(
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
    layers = Layers(down_weight, down_bias, up_weight, up_bias, scale)
    y, stream, total, saved = launch.forward(
        x, residual, Norm(weight, bias), layers, own_norm_of(norm_weight, norm_bias), eps
    )
    return y, stream, total, saved.mean, saved.rstd, saved.hidden


layernorm_adapter_forward = torch.library.custom_op("upperson::layernorm_adapter", run_forward, mutates_args=())


def own_norm_of(weight: Tensor | None, bias: Tensor | None) -> Norm | None:
    return None if weight is None or bias is None else Norm(weight, bias)


@layernorm_adapter_forward.register_fake
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


def run_backward(dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, *inputs: Any) -> list[Tensor | None]:
    """The gradients for the arguments of layernorm_adapter_backward; None for those that are not needed."""
    *layers, norm_weight, norm_bias, mean, rstd, hidden, needs = inputs
    own_norm, saved = own_norm_of(norm_weight, norm_bias), Saved(mean, rstd, hidden)
    return launch.backward(dy, dstream, x, weight, Layers(*layers), own_norm, saved, Needs(*needs))


@torch.library.custom_op("upperson::layernorm_adapter_backward", mutates_args=())
def layernorm_adapter_backward(
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
    """Empty in the place of gradients that are not needed, as an operator returns tensors."""
    adapter = (down_weight, down_bias, up_weight, up_bias, scale, norm_weight, norm_bias)
    gradients = run_backward(dy, dstream, x, weight, *adapter, mean, rstd, hidden, needs)
    found = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    dx, dweight, dbias, ddown_weight, ddown_bias, dup_weight, dup_bias, dscale, dnorm_weight, dnorm_bias = found
    return dx, dweight, dbias, ddown_weight, ddown_bias, dup_weight, dup_bias, dscale, dnorm_weight, dnorm_bias


@layernorm_adapter_backward.register_fake
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


def layernorm_adapter_save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, *parameters, _eps = inputs
    _, stream, total, mean, rstd, hidden = output
    ctx.has_residual, ctx.own_norm = residual is not None, parameters[-1] is not None
    if ctx.has_residual:
        x = total if ctx.own_norm else stream
    ctx.save_for_backward(x, weight, *parameters, mean, rstd, hidden)
    # The sum counts as differentiable, though nobody gets it: through it backward finds x and the residual, so that a
    # second derivative is refused.
    ctx.mark_non_differentiable(mean, rstd, hidden)
    ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient


def layernorm_adapter_differentiate(
    ctx: Any,
    dy: Tensor | None,
    dstream: Tensor | None,
    *_: Tensor | None,
    backward: Callable[..., Any] = layernorm_adapter_backward,
) -> tuple[Tensor | None, ...]:
    need_x, need_residual, *need_parameters = ctx.needs_input_grad[:-1]
    if dy is None and dstream is None:  # nothing depends on either output
        return (None,) * 12
    saved = ctx.saved_tensors  # once: checkpointing hands them out a single time
    x = saved[0]
    if dy is None:
        dy = torch.zeros_like(x)
    if ctx.own_norm:
        dstream = torch.zeros_like(x) if dstream is None else dstream
    elif not ctx.has_residual:
        dstream = None
    dx, *dparameters = backward(dy, dstream, *saved, [need_x or need_residual, *need_parameters])
    dparameters = (d if needed else None for d, needed in zip(dparameters, need_parameters, strict=True))
    return dx if need_x else None, dx if need_residual else None, *dparameters, None


layernorm_adapter_forward.register_autograd(layernorm_adapter_differentiate, setup_context=layernorm_adapter_save)


class PlainLayerNormAdapter(torch.autograd.Function):
    """The same without PyTorch's registry; see backend.runs_plainly."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = run_forward(*inputs)
        layernorm_adapter_save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        backward = layernorm_adapter_backward if batched(grads) else run_backward
        return layernorm_adapter_differentiate(ctx, *grads, backward=backward)


layernorm_adapter_in_transforms = for_transforms(
    "layernorm_adapter",
    layernorm_adapter_forward,
    layernorm_adapter_save,
    functools.partial(
        layernorm_adapter_differentiate, backward=for_transforms("layernorm_adapter", layernorm_adapter_backward)
    ),
)


def layernorm_adapter(*inputs: Any) -> tuple[Tensor, Tensor]:
    """y and the stream."""
    ways = (PlainLayerNormAdapter, layernorm_adapter_in_transforms, layernorm_adapter_forward)
    y, stream, *_ = cheapest(*ways, inputs[:-1])(*inputs)
    return y, stream


# ---------------------------------------------------------------------------------------- for torch's flop counter


@register_flop_formula(torch.ops.upperson.layernorm_adapter)
def layernorm_adapter_flops(x, residual, weight, bias, down_weight, *_, **__) -> int:
    """The down and the up projection."""
    return 4 * math.prod(x) * down_weight[0]


@register_flop_formula(torch.ops.upperson.layernorm_adapter_backward)
def layernorm_adapter_backward_flops(dy, dstream, x, weight, down_weight, *others, **__) -> int:
    """The products of the gradients that are wanted: dh, dx, dWd, dWu."""
    needs = Needs(*others[-1])
    products = (
        needs.x or needs.down,
        needs.x,
        needs.down_weight or needs.norm_weight,
        needs.up_weight or needs.scale,
    )
    return 2 * math.prod(x) * down_weight[0] * sum(products)
