"""prefix_attention as PyTorch operators: what runs, what is returned without running, and the derivative.

Tensors are flat arguments here, as torch.library wants them; launch.py takes them as NamedTuples.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from upperson_kernels.attention import launch
from upperson_kernels.attention.launch import Needs, Packing, Prefix
from upperson_kernels.backend import accumulator, batched, cheapest, for_transforms, once_differentiable


def run_forward(
    qkv: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_scale: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale_target: str,
) -> tuple[Tensor, Tensor]:
    prefix = Prefix(prefix_key, prefix_value, prefix_scale)
    return launch.forward(qkv, prefix, Packing(cu_seqlens, max_seqlen), causal, scale_target)


prefix_attention_forward = torch.library.custom_op("upperson::prefix_attention", run_forward, mutates_args=())


@prefix_attention_forward.register_fake
def _(qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, causal, scale_target):
    *tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(*tokens, heads, width)
    return out, qkv.new_empty(heads, out[..., 0, 0].numel(), dtype=accumulator(qkv.dtype))


def run_backward(grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """The gradients for the arguments of prefix_attention_backward; None for those that are not needed."""
    qkv, *prefix, cu_seqlens, max_seqlen, out, lse, causal, scale_target, needs = inputs
    packing = Packing(cu_seqlens, max_seqlen)
    return launch.backward(grad, qkv, Prefix(*prefix), packing, out, lse, causal, scale_target, Needs(*needs))


@torch.library.custom_op("upperson::prefix_attention_backward", mutates_args=())
def prefix_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_scale: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale_target: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty in the place of gradients that are not needed, as an operator returns tensors."""
    inputs = (qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, out, lse, causal, scale_target)
    found = run_backward(grad, *inputs, needs)
    dqkv, dkey, dvalue, dscale = (qkv.new_empty(0) if gradient is None else gradient for gradient in found)
    return dqkv, dkey, dvalue, dscale


@prefix_attention_backward.register_fake
def _(grad, qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, out, lse, causal, scale_target, needs):
    inputs = (qkv, prefix_key, prefix_value, prefix_scale)
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip(inputs, needs, strict=True))


def prefix_attention_save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_seqlen, ctx.causal, ctx.scale_target = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for lse, which has no gradient


def prefix_attention_differentiate(
    ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None, backward: Callable[..., Any] = prefix_attention_backward
) -> tuple[Tensor | None, ...]:
    if grad is None:  # nothing depends on the output
        return (None,) * 8
    needs = ctx.needs_input_grad[:4]
    *tensors, out, lse = ctx.saved_tensors
    grads = backward(grad, *tensors, ctx.max_seqlen, out, lse, ctx.causal, ctx.scale_target, list(needs))
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None, None


prefix_attention_forward.register_autograd(prefix_attention_differentiate, setup_context=prefix_attention_save)


class PlainPrefixAttention(torch.autograd.Function):
    """The same without PyTorch's registry; see backend.runs_plainly."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = run_forward(*inputs)
        prefix_attention_save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        backward = prefix_attention_backward if batched(grads) else run_backward
        return prefix_attention_differentiate(ctx, *grads, backward=backward)


prefix_attention_in_transforms = for_transforms(
    "prefix_attention",
    prefix_attention_forward,
    prefix_attention_save,
    functools.partial(
        prefix_attention_differentiate, backward=for_transforms("prefix_attention", prefix_attention_backward)
    ),
)


def prefix_attention(*inputs: Any) -> Tensor:
    """The output."""
    ways = (PlainPrefixAttention, prefix_attention_in_transforms, prefix_attention_forward)
    return cheapest(*ways, inputs[:5])(*inputs)[0]


# ---------------------------------------------------------------------------------------- for torch's flop counter


@register_flop_formula(torch.ops.upperson.prefix_attention, get_raw=True)
def prefix_attention_flops(qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, *_, **__) -> int:
    """Two products of queries and columns; the same for causal attention, as PyTorch counts its own."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._mode_utils import no_dispatch

    *_, heads, width = qkv.shape
    if cu_seqlens is None:
        lengths = [qkv.shape[1]] * qkv.shape[0]
    elif isinstance(cu_seqlens, FakeTensor):  # without values: an upper bound
        lengths = [max_seqlen] * (cu_seqlens.shape[0] - 1)
    else:
        with no_dispatch():  # real offsets among tensors without memory
            offsets = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    return 4 * heads * width * sum(length * (length + prefix_key.shape[0]) for length in lengths)


@register_flop_formula(torch.ops.upperson.prefix_attention_backward, get_raw=True)
def prefix_attention_backward_flops(
    grad, qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, *_, **__
) -> int:
    """Five products: the weights again, and the gradients of values, weights, queries and keys."""
    forward = prefix_attention_flops(qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen)
    return 5 * forward // 2
