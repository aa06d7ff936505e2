"""prefix_attention as PyTorch operators: what runs, what it returns without running, how it differentiates."""

import itertools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from upperson_kernels.attention import device
from upperson_kernels.backend import accumulator


@torch.library.custom_op("upperson::prefix_attention", mutates_args=())
def forward(
    qkv: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_scale: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    causal: bool,
    scale_target: str,
) -> tuple[Tensor, Tensor]:
    return device.launch_forward(
        qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, causal, scale_target
    )


@forward.register_fake
def _(qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, causal, scale_target):
    *tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(*tokens, heads, width)
    return out, qkv.new_empty(heads, out[..., 0, 0].numel(), dtype=accumulator(qkv.dtype))


@torch.library.custom_op("upperson::prefix_attention_backward", mutates_args=())
def backward(
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
    return device.launch_backward(
        grad, qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, out, lse, causal, scale_target, needs
    )


@backward.register_fake
def _(grad, qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, out, lse, causal, scale_target, needs):
    inputs = (qkv, prefix_key, prefix_value, prefix_scale)
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip(inputs, needs, strict=True))


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.causal, ctx.scale_target = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for lse, which has no gradient


def differentiate(ctx, grad, _grad_lse):
    if grad is None:  # the output did not matter
        return (None,) * 8
    needs = ctx.needs_input_grad[:4]
    *tensors, out, lse = ctx.saved_tensors
    grads = backward(grad, *tensors, ctx.max_seqlen, out, lse, ctx.causal, ctx.scale_target, list(needs))
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None, None


forward.register_autograd(differentiate, setup_context=save_for_backward)


# ---------------------------------------------------------------------------------------- for torch's flop counter


@register_flop_formula(torch.ops.upperson.prefix_attention, get_raw=True)
def forward_flops(qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, *_, **__):
    """Two products of queries and columns; causal or not, as PyTorch counts its own attention."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._mode_utils import no_dispatch

    *_, heads, width = qkv.shape
    if cu_seqlens is None:
        lengths = [qkv.shape[1]] * qkv.shape[0]
    elif isinstance(cu_seqlens, FakeTensor):  # no values to read: at most so many
        lengths = [max_seqlen] * (cu_seqlens.shape[0] - 1)
    else:
        with no_dispatch():  # real marks among tensors without memory
            marks = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(marks)]
    return 4 * heads * width * sum(length * (length + prefix_key.shape[0]) for length in lengths)


@register_flop_formula(torch.ops.upperson.prefix_attention_backward, get_raw=True)
def backward_flops(grad, qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, *_, **__):
    """Five products: the weights once more, and the gradients of values, weights, queries and keys."""
    return 5 * forward_flops(qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen) // 2
