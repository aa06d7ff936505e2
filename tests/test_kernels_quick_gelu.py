"""quick_gelu against its definition in float64: values, gradients, dtypes, strides, what is saved, wrong arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DEVICE, DTYPES, EXACT, GPU, SLACK, assert_within_budget, randn, require_grad
from upperson_kernels import quick_gelu
from upperson_kernels.quick_gelu import reference

SHAPES = [(1, 1), (7,), (5, 7), (3, 4, 24), (0, 8), (2, 0, 8), (6, 1023), (6, 1024), (5, 1025), (1, 3072)]


def fused(x, bias=None):
    return quick_gelu(x, bias, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.skipif(GPU, reason="float64 kernels run in the interpreter alone")
def test_gradcheck(backend):
    x, bias = require_grad([randn(3, 5, seed=1), randn(5, seed=2)])
    assert torch.autograd.gradcheck(lambda x, bias: quick_gelu(x, bias, backend=backend), (x, bias))
    assert torch.autograd.gradcheck(lambda x: quick_gelu(x, backend=backend), (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(shape, dtype, poisoned_memory):
    tensors = [randn(*shape, seed=1, dtype=dtype, scale=3.0), randn(shape[-1], seed=2, dtype=dtype)]
    assert_within_budget(fused, reference.explicit, reference.explicit, tensors, [randn(*shape, seed=3, dtype=dtype)])
    assert_within_budget(
        fused,
        lambda x: reference.explicit(x, None),
        lambda x: reference.explicit(x, None),
        tensors[:1],
        [randn(*shape, seed=3, dtype=dtype)],
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, 40), st.sampled_from(DTYPES))
def test_of_anything(rows, width, dtype):
    tensors = [randn(rows, width, seed=1, dtype=dtype, scale=3.0), randn(width, seed=2, dtype=dtype)]
    grads = [randn(rows, width, seed=3, dtype=dtype)]
    assert_within_budget(fused, reference.explicit, reference.explicit, tensors, grads)


def test_it_is_open_clips():
    QuickGELU = pytest.importorskip("open_clip").transformer.QuickGELU
    x = randn(4, 9, dtype=torch.float32)
    for backend in ("triton", "torch"):
        torch.testing.assert_close(quick_gelu(x, backend=backend), QuickGELU()(x))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("bias", [None, 0.0, 300.0])
def test_far_out_it_neither_overflows_nor_loses_its_gradient(backend, bias):
    """Beyond 38,000, 1.702 u leaves the range of float16; with the bias, u does so too."""
    limit = torch.finfo(torch.float16).max
    values = torch.tensor([[-limit, -45000, -38500, -200, 0, 200, 38500, 45000, 60000]], dtype=torch.float16)
    (x,) = require_grad([values.to(DEVICE)])
    shift = None if bias is None else torch.full((9,), bias * -1.0, dtype=torch.float16, device=DEVICE)
    y = quick_gelu(x, shift, backend=backend)
    u = x.detach().double() + (0 if bias is None else -bias)
    torch.testing.assert_close(y.detach(), (u * (1.702 * u).sigmoid()).half(), rtol=2e-3, atol=0)
    for factor in (1, 3):  # of the gradient
        (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, factor), retain_graph=True)
        exact = u.clone().requires_grad_()
        (expected,) = torch.autograd.grad((exact * (1.702 * exact).sigmoid()).sum() * factor, exact)
        torch.testing.assert_close(gradient, expected.half(), rtol=2e-3, atol=0)


def test_other_dtypes_of_the_pytorch_backend_keep_their_bits():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, bias = randn(5, 9, scale=9.0).to(dtype), randn(9, seed=2).to(dtype)
        u = x + bias
        assert torch.equal(quick_gelu(x, bias, backend="torch"), torch.nn.functional.silu(1.702 * u) / 1.702)


def test_strides_and_misalignment():
    whole, bias = randn(7, 40, seed=1), randn(19, seed=2)
    views = [whole[:, 1:20], whole[::2, 3:22], whole.t()[:19].t(), whole[:1, :19].expand(6, 19)]
    for view in views:
        (x,) = require_grad([view])
        x = view.detach().requires_grad_()
        for grad in (torch.ones((), device=DEVICE, dtype=EXACT).expand(x.shape), randn(*x.shape[::-1], seed=4).t()):
            y = fused(x, bias)
            (dx,) = torch.autograd.grad(y, x, grad)
            exact = view.detach().clone().requires_grad_()
            expected = reference.explicit(exact, bias)
            slack = 100 * SLACK[EXACT]
            torch.testing.assert_close(y, expected, rtol=slack, atol=slack)
            torch.testing.assert_close(dx, torch.autograd.grad(expected, exact, grad)[0], rtol=slack, atol=slack)


def test_float32_bias_beside_half():
    half = torch.bfloat16 if GPU else torch.float16
    x, bias = randn(5, 12, seed=1, dtype=half).requires_grad_(), randn(12, seed=2, dtype=torch.float32).requires_grad_()
    for backend in ("triton", "torch"):
        y = quick_gelu(x, bias, backend=backend)
        y.float().sum().backward()
        assert y.dtype == x.grad.dtype == half and bias.grad.dtype == torch.float32
        torch.testing.assert_close(y.float(), reference.explicit(x.float(), bias), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_as_large_is_saved_beside_one_tensor(backend):
    """The point of it: autograd of the definition keeps two tensors of this size and more."""

    def kept(function):
        found = {}
        x, bias = randn(64, 32, seed=1).requires_grad_(), randn(32, seed=2)
        inner = x * 1  # as behind a product
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            y = function(inner, bias)
        return sum(t.numel() for t in found.values() if t.numel() >= x.numel()), y

    assert kept(lambda x, bias: quick_gelu(x, bias, backend=backend))[0] == 64 * 32
    assert kept(reference.explicit)[0] >= 2 * 64 * 32


@pytest.mark.slow
def test_torchs_own_checks_and_compile():
    from upperson_kernels.quick_gelu import op

    x, bias = require_grad([randn(3, 8, seed=1), randn(8, seed=2)])
    torch.library.opcheck(op.quick_gelu_forward, (x, bias))
    torch.library.opcheck(op.quick_gelu_forward, (x, None))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias), fused(x, bias))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "quick_gelu: x must be a tensor, not list"),
        ((torch.ones(()),), ValueError, r"quick_gelu: x must be \(..., C\) with C ≥ 1, not \(\)"),
        ((torch.ones(2, 0),), ValueError, r"quick_gelu: x must be \(..., C\) with C ≥ 1, not \(2, 0\)"),
        ((torch.ones(2, 3).int(),), TypeError, "quick_gelu: x must be a floating-point tensor, not torch.int32"),
        ((torch.ones(2, 3), torch.ones(4)), ValueError, r"quick_gelu: bias must be \(3,\), not \(4,\)"),
        ((torch.ones(2, 3), torch.ones(3).half()), TypeError, "quick_gelu: bias must be float32 beside x, not float16"),
        ((torch.ones(2, 3), torch.ones(3, device="meta")), ValueError, "quick_gelu: bias is on meta, but x is on cpu"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        quick_gelu(*arguments)


def test_refuses_forward_mode():
    x = randn(2, 3)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(fused, (x,), (x,))
