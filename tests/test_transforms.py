"""The operators under the transforms of torch.func: the values of plain PyTorch, or an error that says what to do."""

from contextlib import nullcontext

import pytest
import torch
from operators import (
    EXACT,
    SLACK,
    adapter_functions,
    adapter_inputs,
    attention_functions,
    attention_inputs,
    packed_inputs,
    randn,
    slow_case,
)
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode
from upperson_kernels import quick_gelu

PACKED, MARKS = packed_inputs([3, 0, 4])
OPERATORS = {
    "attention": (attention_functions(False, "weights"), attention_inputs(length=4)),
    "packed attention": (attention_functions(True, "logits", MARKS), PACKED),
    "adapter": (adapter_functions(), adapter_inputs((2, 3))),
    "adapter with its own norm": (adapter_functions(True, True), adapter_inputs((3,), residual=True, own_norm=True)),
    "quick_gelu": (
        [lambda x, bias, name=name: quick_gelu(x, bias, backend=name) for name in ("triton", "torch")],
        [randn(3, 5), randn(5)],
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs sample after sample


def loss_of(function):
    def loss(*tensors):
        outputs = function(*tensors)
        return sum(out.square().sum() for out in (outputs if isinstance(outputs, tuple) else [outputs]))

    return loss


def twice(tensors):
    return [torch.stack([tensor, 0.5 * tensor]) for tensor in tensors]


def all_of(tensors):
    return tuple(range(len(tensors)))


TRANSFORMS = {
    "grad": lambda loss, tensors: grad(loss, all_of(tensors))(*tensors),
    "grad of one": lambda loss, tensors: [grad(loss, len(tensors) - 1)(*tensors)],
    "vmap": lambda loss, tensors: [vmap(loss)(*twice(tensors))],
    "vmap of grad": lambda loss, tensors: vmap(grad(loss, all_of(tensors)))(*twice(tensors)),
    "vmap of grad, one batched": lambda loss, tensors: vmap(
        lambda first: grad(loss, all_of(tensors))(first, *tensors[1:])
    )(*twice(tensors[:1])),
    "grad of vmap": lambda loss, tensors: grad(lambda *t: vmap(loss)(*twice(t)).sum(), all_of(tensors))(*tensors),
    "jacrev": lambda loss, tensors: jacrev(loss, all_of(tensors))(*tensors),
}
RARER = ("packed attention", "adapter with its own norm")
OTHERS = ("grad of one", "vmap", "vmap of grad", "vmap of grad, one batched", "grad of vmap", "jacrev")


@pytest.mark.parametrize("transform", ["grad", *map(slow_case, OTHERS)])
@pytest.mark.parametrize("operator", ["attention", "adapter", "quick_gelu", *map(slow_case, RARER)])
def test_values_are_those_of_plain_pytorch(operator, transform):
    (fused, plain, *_), tensors = OPERATORS[operator]
    found, expected = (TRANSFORMS[transform](loss_of(function), tensors) for function in (fused, plain))
    for one, other in zip(found, expected, strict=True):
        slack = 100 * SLACK[EXACT] * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=slack + 1e-12)


@pytest.mark.parametrize("operator", ["adapter", "quick_gelu", *map(slow_case, ("attention", *RARER))])
def test_other_derivatives_are_refused_with_what_to_do(operator):
    (fused, plain, *_), tensors = OPERATORS[operator]
    loss, works = loss_of(fused), loss_of(plain)
    for transform in (
        lambda loss: grad(lambda *t: grad(loss)(*t).sum())(*tensors),
        lambda loss: hessian(loss)(*tensors),
        lambda loss: jacfwd(loss)(*tensors),
        lambda loss: jvp(loss, tuple(tensors), tuple(tensors)),
    ):
        with pytest.raises(NotImplementedError, match="backend='torch'"):
            transform(loss)
        transform(works)


@pytest.mark.parametrize("operator", OPERATORS)
def test_several_gradients_at_once(operator):
    """torch.autograd.grad(is_grads_batched=True), as torch.autograd.functional.jacobian(vectorize=True) calls it."""
    (fused, *_), tensors = OPERATORS[operator]
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = fused(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.stack([randn(*out.shape, seed=seed) for seed in (1, 2, 3)]) for out in outputs]
    found = torch.autograd.grad(outputs, tensors, grads, is_grads_batched=True, retain_graph=True)
    for number in range(3):
        expected = torch.autograd.grad(outputs, tensors, [each[number] for each in grads], retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[number], other)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_second_derivative_by_autograd_is_refused(operator, registered):
    """Also that of a plain sum, whose gradient is a constant, and that by torch.autograd.grad, which walks the way to
    the input only.

    registered: as an operator of PyTorch's registry, as under a mode of the dispatcher.
    """
    (fused, *_), tensors = OPERATORS[operator]
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    for loss in (lambda outputs: sum(out.sum() for out in outputs), lambda outputs: outputs[0].square().sum()):
        with FlopCounterMode(display=False) if registered else nullcontext():
            outputs = fused(*tensors)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            firsts = torch.autograd.grad(loss(outputs), tensors, create_graph=True, allow_unused=True)
            penalty = sum(first.square().sum() for first in firsts if first is not None) + outputs[0].sum()
            for derive in (
                lambda penalty: torch.autograd.grad(penalty, tensors[:1], retain_graph=True),
                lambda penalty: penalty.backward(),
            ):
                with pytest.raises(
                    (NotImplementedError, RuntimeError), match="twice|no autograd formula was registered"
                ):
                    derive(penalty)


def test_second_derivatives_of_the_pytorch_backend():
    tensors = attention_inputs(length=3, batch=1, heads=1, width=2, prefix=2)
    loss = loss_of(attention_functions(True, "weights")[1])
    (_, tangent, *_), step = [randn(*tensor.shape, seed=7) if tensor.dim() else tensor for tensor in tensors], 1e-5
    key = tensors[1]
    product = torch.tensordot(hessian(loss, 1)(*tensors), tangent, 3)
    gradients = [grad(loss, 1)(tensors[0], key + sign * step * tangent, *tensors[2:]) for sign in (1, -1)]
    torch.testing.assert_close(product, (gradients[0] - gradients[1]) / (2 * step), rtol=1e-5, atol=1e-7)
