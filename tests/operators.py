"""Inputs, oracles and error budgets that the tests of the two operators share.

On a GPU the compiled kernels are tested in float32, float16 and bfloat16; without one, Triton's interpreter
runs the same kernels in float64, float32 and float16. The oracle is the definition in float64 everywhere, and
the budget of a low-precision kernel is twice the error of PyTorch's own computation in that dtype. PyTorch's own
computation is held to the oracle in float64.
"""

import itertools

import pytest
import torch
from upperson_kernels import layernorm_adapter, prefix_attention
from upperson_kernels.attention import reference as attention_reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EXACT = torch.float32 if GPU else torch.float64  # the most precise dtype that the kernels take here
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float64, torch.float32, torch.float16]

# The unit roundoff bounds what any order of summation may differ by where PyTorch's own error happens to be zero.
SLACK = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def slow_case(*values):
    """A case of a parametrised test that `pytest -m "not slow"` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def randn(*shape, seed=0, dtype=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype or EXACT)


def require_grad(tensors):
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


def relative_error(value, exact):
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_same(values, expected):
    """The same bits; on a GPU, where strides and options are compiled in and change the order of sums, nearly."""
    for a, b in zip(values, expected, strict=True):
        if GPU:
            torch.testing.assert_close(a, b, rtol=10 * SLACK[a.dtype], atol=10 * SLACK[a.dtype] * float(b.abs().max()))
        else:
            assert torch.equal(a, b)


def run(function, tensors, grads, dtype=None):
    """Outputs of function(*tensors) and its gradients for the given output gradients."""
    tensors = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, tensors, [g.to(outputs[0].dtype) for g in grads], allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True)]
    return [*outputs, *gradients]


def assert_within_budget(fused, plain, oracle, tensors, grads, cancellation=10):
    """`fused` errs at most twice as much as `plain` in the tensors' dtype, against `oracle` in float64.

    In float64 `plain` is the oracle up to rounding.

    A scalar result is a sum over everything, whose terms may nearly cancel: its slack is `cancellation` times larger.
    """
    exact = run(oracle, tensors, grads, torch.float64)
    for i, (value, expected) in enumerate(zip(run(plain, tensors, grads, torch.float64), exact, strict=True)):
        assert_near_exact(f"result {i} of PyTorch in float64", value, expected)
    theirs = run(plain, tensors, grads)
    ours = run(fused, tensors, grads)
    dtype = tensors[0].dtype
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == dtype and a.shape == c.shape
        if c.numel() == 0:
            continue
        slack = SLACK[dtype] if c.dim() else cancellation * SLACK[dtype]
        error, allowed = relative_error(a, c), 2 * relative_error(b, c) + slack
        if c.norm() < 1e-10:  # exactly zero up to rounding, as dλ may be
            error, allowed = float(a.detach().double().norm()), 1e-6
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"


def assert_near_exact(name, value, expected):
    """Equal in float64 up to rounding, relative to the largest element, or to 1 where the terms of a sum cancel."""
    assert value.dtype == torch.float64 and value.shape == expected.shape
    if value.numel():
        off = float((value - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1))
        assert off <= 1e-9, f"{name}: off by {off:.1e}"


def attention_inputs(batch=2, length=7, prefix=3, heads=2, width=16, scale=1.5, dtype=None, seed=0):
    qkv = randn(batch, length, 3, heads, width, seed=seed, dtype=dtype)
    key = randn(prefix, heads, width, seed=seed + 1, dtype=dtype)
    value = randn(prefix, heads, width, seed=seed + 2, dtype=dtype)
    return [qkv, key, value, torch.tensor(float(scale), device=DEVICE, dtype=dtype or EXACT)]


def packed_inputs(lengths, prefix=3, heads=2, width=16, scale=1.5, dtype=None, seed=0):
    """Inputs with qkv (T, 3, H, D), and cu_seqlens for sequences of these lengths."""
    tensors = attention_inputs(1, sum(lengths), prefix, heads, width, scale, dtype, seed)
    marks = torch.tensor([0, *lengths]).cumsum(0)
    return [tensors[0][0], *tensors[1:]], marks.to(DEVICE, torch.int32)


def attention_functions(causal, target, cu_seqlens=None):
    """The fused kernels, the PyTorch backend, and the definition, of each packed sequence on its own."""
    options = dict(causal=causal, scale_target=target, cu_seqlens=cu_seqlens)

    def fused(*tensors):
        return prefix_attention(*tensors, **options, backend="triton")

    def plain(*tensors):
        return prefix_attention(*tensors, **options, backend="torch")

    def oracle(qkv, *prefix):
        if cu_seqlens is None:
            return attention_reference.explicit(qkv, *prefix, causal, target)
        return torch.cat(
            [
                attention_reference.explicit(qkv[None, begin:end], *prefix, causal, target)[0]
                for begin, end in itertools.pairwise(cu_seqlens.tolist())
            ]
        )

    return fused, plain, oracle


def check_attention(tensors, causal, target, cu_seqlens=None, cancellation=10):
    grads = [randn(*tensors[0].shape[:-3], *tensors[0].shape[-2:], seed=9, dtype=tensors[0].dtype)]
    assert_within_budget(*attention_functions(causal, target, cu_seqlens), tensors, grads, cancellation)


def adapter_inputs(rows=(2, 5), width=24, hidden=3, scale=0.7, dtype=None, residual=False, own_norm=False, seed=0):
    """Tensors of layernorm_adapter in its order; then norm_weight and norm_bias, and the residual, if asked for."""
    tensors = [
        randn(*rows, width, seed=seed, dtype=dtype),
        1 + randn(width, seed=seed + 1, dtype=dtype, scale=0.1),
        randn(width, seed=seed + 2, dtype=dtype, scale=0.1),
        randn(hidden, width, seed=seed + 3, dtype=dtype, scale=width**-0.5),
        randn(hidden, seed=seed + 4, dtype=dtype, scale=0.1),
        randn(width, hidden, seed=seed + 5, dtype=dtype, scale=hidden**-0.5),
        randn(width, seed=seed + 6, dtype=dtype, scale=0.1),
        torch.tensor(float(scale), device=DEVICE, dtype=dtype or EXACT),
    ]
    if own_norm:
        tensors += [
            1 + randn(width, seed=seed + 8, dtype=dtype, scale=0.3),
            randn(width, seed=seed + 9, dtype=dtype, scale=0.3),
        ]
    return [*tensors, randn(*rows, width, seed=seed + 7, dtype=dtype)] if residual else tensors


def adapter_functions(residual=False, own_norm=False):
    def split(tensors):
        norm = dict(norm_weight=tensors[8], norm_bias=tensors[9]) if own_norm else {}
        return tensors[:8], norm | (dict(residual=tensors[-1]) if residual else {})

    def fused(*tensors):
        tensors, options = split(tensors)
        return layernorm_adapter(*tensors, **options, backend="triton")

    def plain(*tensors):
        tensors, options = split(tensors)
        return layernorm_adapter(*tensors, **options, backend="torch")

    def oracle(*tensors):
        (x, weight, bias, down_weight, down_bias, up_weight, up_bias, scale), options = split(tensors)
        x = x + options["residual"] if residual else x
        centred = x - x.mean(-1, keepdim=True)
        normalised = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        read = normalised * options["norm_weight"] + options["norm_bias"] if own_norm else x
        hidden = (read @ down_weight.t() + down_bias).clamp_min(0)
        adapter = scale * (hidden @ up_weight.t() + up_bias)
        if own_norm:
            return normalised * weight + bias, x + adapter
        y = normalised * weight + bias + adapter
        return (y, x) if residual else y

    return fused, plain, oracle


def check_adapter(tensors, residual=False, own_norm=False):
    outputs = 2 if residual or own_norm else 1
    grads = [randn(*tensors[0].shape, seed=20 + i, dtype=tensors[0].dtype) for i in range(outputs)]
    assert_within_budget(*adapter_functions(residual, own_norm), tensors, grads)
