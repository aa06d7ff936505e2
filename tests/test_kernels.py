"""Both operators against their definitions: values, gradients, shapes, strides, dtypes, and what they refuse.

operators.py has the comparison itself.
"""

import itertools
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import upperson_kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import (
    DEVICE,
    DTYPES,
    EXACT,
    GPU,
    adapter_functions,
    adapter_inputs,
    assert_same,
    attention_functions,
    attention_inputs,
    check_adapter,
    check_attention,
    packed_inputs,
    randn,
    relative_error,
    require_grad,
    run,
    slow_case,
)
from upperson_kernels import layernorm_adapter, prefix_attention, tiles
from upperson_kernels.adapter import device as adapter_device
from upperson_kernels.adapter import op as adapter_op
from upperson_kernels.adapter import reference as adapter_reference
from upperson_kernels.attention import op as attention_op
from upperson_kernels.attention import reference as attention_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
drawn = settings(
    max_examples=15 if GPU else 20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
needs_float64 = pytest.mark.skipif(GPU, reason="compiled kernels take no float64; the error budgets stand in")


# ------------------------------------------------------------------------------------ prefix_attention


@needs_float64
@pytest.mark.parametrize(
    ("prefix", "causal", "target"),
    [
        case if case == (3, True, "weights") else slow_case(*case)
        for case in itertools.product((0, 1, 3), (False, True), ("weights", "logits"))
    ],
)
def test_attention_gradcheck(prefix, causal, target):
    """Finite differences against the kernels' backward, in all four inputs."""
    tensors = require_grad(attention_inputs(batch=2, length=3, prefix=prefix, heads=2, width=4))
    fused, _, _ = attention_functions(causal, target)
    assert torch.autograd.gradcheck(fused, tensors, fast_mode=True)


LENGTHS = [1, 2, 15, 16, 17, 50, 63, 64, 65, 77, 127, 128, 129, 192, 193, 197, 244, 257, 400]
PREFIXES = [0, 1, 2, 3, 10, 14, 16, 17, 64]
PAIRS = sorted(
    {(length, PREFIXES[i * k % len(PREFIXES)]) for i, length in enumerate(LENGTHS, 1) for k in (1, 5)}
    | {(length, prefix) for length in (77, 193, 244) for prefix in (2, 10, 14)}
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "prefix", "causal", "target"),
    [
        (*pair, causal, ("weights", "logits")[(number + causal) % 2])  # every length has both masks and both targets
        for number, pair in enumerate(PAIRS)
        for causal in (False, True)
    ],
)
def test_attention_lengths(length, prefix, causal, target, monkeypatch):
    if not GPU:  # cut as 16-bit inputs are, though computed in float64
        chosen = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
        for kernel in ("attention_forward", "attention_backward"):
            monkeypatch.setitem(tiles.SHIPPED, kernel, lambda *_: chosen)
    check_attention(attention_inputs(batch=1, heads=1, length=length, prefix=prefix), causal, target)


@pytest.mark.parametrize("target", ["weights", slow_case("logits")])
@pytest.mark.parametrize("dtype", [*map(slow_case, DTYPES[:-1]), DTYPES[-1]], ids=str)
def test_attention_dtypes(dtype, target):
    for causal, length, scale in ((False, 70, 10.0), (True, 35, 0.5)):
        check_attention(
            attention_inputs(batch=2, length=length, prefix=10, width=64, scale=scale, dtype=dtype), causal, target
        )


@pytest.mark.parametrize("target", ["weights", "logits"])
@pytest.mark.parametrize("scale", [0.0, *map(slow_case, (1.0, -0.5, 1e-4)), 10.0, slow_case(300.0)])
def test_attention_prefix_scales(scale, target):
    if GPU and (scale, target) == (300, "logits"):
        pytest.skip("the softmax saturates and its gradient cancels to nothing: for float64, in the interpreter")
    # A saturated softmax has a λ gradient some hundred times smaller than the terms that it is the sum of.
    cancellation = 100 if (scale, target) == (300, "logits") else 10
    check_attention(attention_inputs(scale=scale), False, target, cancellation=cancellation)


@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 20), slow_case(12, 64), (1, 80), (2, 128), (1, 1)])
def test_attention_heads(heads, width):
    check_attention(attention_inputs(length=9, heads=heads, width=width), True, "weights")


@pytest.mark.parametrize("target", ["weights", "logits"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "prefix"),
    [
        ([5], 3),
        ([0], 3),
        ([0, 0], 0),
        slow_case([3, 0, 40, 1], 0),
        ([3, 0, 20, 1], 2),
        slow_case([0, 7, 33], 1),
        slow_case([32, 64, 31, 0], 2),
        slow_case([77, 12, 26], 10),
        slow_case([9, 70, 0], 64),
    ],
)
def test_attention_of_packed_sequences(lengths, prefix, causal, target):
    tensors, cu_seqlens = packed_inputs(lengths, prefix)
    check_attention(tensors, causal, target, cu_seqlens)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_packed_sequences_in_every_dtype(dtype):
    tensors, cu_seqlens = packed_inputs([26, 0, 77, 66], prefix=10, width=64, dtype=dtype)
    check_attention(tensors, True, "weights", cu_seqlens)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_attention_of_packed_sequences_is_that_of_each_alone(backend):
    lengths = [4, 0, 19, 33]
    tensors, cu_seqlens = packed_inputs(lengths)
    options = dict(causal=True, backend=backend)
    outs = prefix_attention(*tensors, cu_seqlens=cu_seqlens, **options).split(lengths)
    longer = prefix_attention(*tensors, cu_seqlens=cu_seqlens, max_seqlen=50, **options).split(lengths)
    for qkv, out, same in zip(tensors[0].split(lengths), outs, longer, strict=True):
        torch.testing.assert_close(out, prefix_attention(qkv[None], *tensors[1:], **options)[0])
        torch.testing.assert_close(out, same)


@pytest.mark.slow
@drawn
@given(data=st.data())
def test_attention_of_anything(data, monkeypatch):
    """Shapes, strides, packing, tiles and options as they come."""

    def draw(*values):
        return data.draw(st.sampled_from(values))

    if not GPU:
        chosen = dict(BLOCK_M=draw(32, 64), BLOCK_N=draw(16, 32, 64), num_warps=4, num_stages=2)
        for kernel in ("attention_forward", "attention_backward"):
            monkeypatch.setitem(tiles.SHIPPED, kernel, lambda *_: chosen)
    heads, prefix = draw(1, 2), data.draw(st.integers(0, 40))
    width = 16 if GPU else draw(8, 16, 20, 32)  # every width would compile the kernels anew
    causal, target, scale = draw(False, True), draw("weights", "logits"), draw(0.0, 1.0, -0.5, 1e-4, 10.0)
    if draw(False, True):
        lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
        tensors, cu_seqlens = packed_inputs(lengths, prefix, heads, width, scale)
    else:
        tensors = attention_inputs(draw(1, 2), data.draw(st.integers(1, 100)), prefix, heads, width, scale)
        cu_seqlens = None
    tensors[:3] = (rearranged(t, data) for t in tensors[:3])
    check_attention(tensors, causal, target, cu_seqlens)


def rearranged(tensor, data):
    """The same values in memory of another order, with gaps, and misaligned."""
    order = data.draw(st.permutations(range(tensor.dim())))
    gap = data.draw(st.sampled_from([0, 1, 3]))
    if data.draw(st.booleans()):  # most often rows stay whole, as they do in what networks produce
        order = [*(d for d in order if d != tensor.dim() - 1), tensor.dim() - 1]
    moved = tensor.permute(order)
    memory = torch.full((*moved.shape[:-1], moved.shape[-1] + gap), float("nan"), device=DEVICE, dtype=tensor.dtype)
    memory[..., gap:] = moved
    return memory[..., gap:].permute(*sorted(range(tensor.dim()), key=lambda d: order[d]))


@pytest.mark.slow
def test_attention_many_samples_share_one_prefix():
    """The prefix gradient is the sum of the gradients of the samples, each on its own."""
    tensors = attention_inputs(batch=5, length=9)
    grad = randn(5, 9, 2, 16, seed=9)
    fused, _, _ = attention_functions(False, "weights")
    together = run(fused, tensors, [grad])
    alone = [run(fused, [tensors[0][i : i + 1], *tensors[1:]], [grad[i : i + 1]]) for i in range(5)]
    for k in (2, 3, 4):
        torch.testing.assert_close(together[k], sum(a[k] for a in alone))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_attention_invariants(backend):
    qkv, key, value, scale = attention_inputs(length=11, prefix=5)
    query, token_key, token_value = qkv.transpose(1, 3).unbind(2)

    def plain(keys, values):
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        return out.transpose(1, 2)

    none = prefix_attention(qkv, key[:0], value[:0], scale, backend=backend)
    torch.testing.assert_close(none, plain(token_key, token_value))

    one = torch.ones_like(scale)
    keys, values = (
        torch.cat([p.transpose(0, 1).expand(2, -1, -1, -1), t], dim=2)
        for p, t in ((key, token_key), (value, token_value))
    )
    for target in ("weights", "logits"):
        out = prefix_attention(qkv, key, value, one, scale_target=target, backend=backend)
        torch.testing.assert_close(out, plain(keys, values))

        order = torch.tensor([3, 0, 4, 1, 2], device=DEVICE)
        out = prefix_attention(qkv, key, value, scale, scale_target=target, backend=backend)
        shuffled = prefix_attention(qkv, key[order], value[order], scale, scale_target=target, backend=backend)
        torch.testing.assert_close(out, shuffled)


def test_attention_targets_differ_and_causal_matters():
    qkv, key, value, scale = attention_inputs()
    outs = [
        prefix_attention(qkv, key, value, scale, causal=causal, scale_target=target)
        for causal in (False, True)
        for target in ("weights", "logits")
    ]
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert (a - b).abs().max() > 1e-2


@pytest.mark.slow
def test_attention_strides():
    """Sliced, permuted, misaligned and expanded inputs and gradients give what their copies give."""
    big = randn(2, 9, 4, 3, 2, 17, seed=3)
    views = [
        big[:, 1:, 1, ..., 1:],  # sliced and misaligned
        randn(3, 2, 8, 2, 16).permute(1, 2, 0, 3, 4),  # q, k, v apart
        randn(2, 8, 2, 16, 3).permute(0, 1, 4, 2, 3),  # last stride is not 1
        randn(1, 8, 3, 2, 16).expand(2, -1, -1, -1, -1),
    ]
    _, key, value, scale = attention_inputs()
    grads = [
        randn(2, 8, 2, 16, seed=5),
        randn(2, 2, 8, 16, seed=5).transpose(1, 2),
        torch.ones((), device=DEVICE, dtype=EXACT).expand(2, 8, 2, 16),
        randn(2, 8, 2, 17, seed=5)[..., 1:],
    ]
    fused, _, _ = attention_functions(True, "weights")
    for qkv, grad in zip(views, grads, strict=True):
        assert qkv.shape == (2, 8, 3, 2, 16)
        ours = run(fused, [qkv, key, value, scale], [grad])
        copied = run(fused, [qkv.contiguous(), key, value, scale], [grad.contiguous()])
        assert_same(ours, copied)
    key_view, value_view = randn(2, 3, 16, seed=7).transpose(0, 1), randn(3, 2, 32, seed=8)[..., ::2]
    a = run(fused, [views[0], key_view, value_view, scale], [grads[0]])
    b = run(fused, [views[0], key_view.contiguous(), value_view.contiguous(), scale], [grads[0]])
    assert_same(a, b)


def test_attention_float32_parameters_beside_half():
    qkv, key, value, scale = attention_inputs(width=64, dtype=torch.float16)
    parameters = require_grad([key.float(), value.float(), scale.float()])
    out = prefix_attention(qkv, *parameters, backend="triton")
    assert out.dtype == torch.float16
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters)
    assert torch.equal(out, prefix_attention(qkv, key, value, scale, backend="triton"))


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16)])
def test_attention_empty(shape):
    _, key, value, scale = attention_inputs()
    fused, _, _ = attention_functions(False, "weights")
    out, *grads = run(
        fused,
        [torch.empty(shape, device=DEVICE, dtype=EXACT), key, value, scale],
        [torch.empty(shape[0], shape[1], 2, 16, device=DEVICE, dtype=EXACT)],
    )
    assert out.shape == (shape[0], shape[1], 2, 16)
    assert all(g.abs().sum() == 0 for g in grads)


@pytest.mark.parametrize("wanted", [slow_case((0,)), slow_case((1,)), slow_case((2,)), slow_case((3,)), (1, 3), (0, 2)])
def test_attention_computes_only_gradients_asked_for(wanted):
    tensors = attention_inputs()
    full = run(attention_functions(False, "weights")[0], tensors, [randn(2, 7, 2, 16, seed=9)])[1:]
    out, lse = attention_op.prefix_attention_forward(*tensors, None, 0, False, "weights")
    needs = [i in wanted for i in range(4)]
    grads = attention_op.prefix_attention_backward(
        randn(2, 7, 2, 16, seed=9), *tensors, None, 0, out, lse, False, "weights", needs
    )
    for i, (grad, need) in enumerate(zip(grads, needs, strict=True)):
        if need:
            assert_same([grad], [full[i]])
        else:
            assert grad.numel() == 0

    asked = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    prefix_attention(*asked, backend="triton").sum().backward()
    assert [t.grad is not None for t in asked] == needs


# ------------------------------------------------------------------------------------ layernorm_adapter


ADAPTER_MODES = pytest.mark.parametrize(
    ("residual", "own_norm"), [(False, False), (True, False), (False, True), (True, True)]
)


@needs_float64
@ADAPTER_MODES
def test_adapter_gradcheck(residual, own_norm):
    """Finite differences against the kernels' backward, in all inputs."""
    tensors = require_grad(adapter_inputs(rows=(3,), width=6, hidden=2, residual=residual, own_norm=own_norm))
    assert torch.autograd.gradcheck(adapter_functions(residual, own_norm)[0], tensors, fast_mode=True)


ADAPTER_SHAPES = [
    ((1,), 64, 8),
    ((31,), 65, 5),
    ((2, 33), 64, 16),
    ((4,), 512, 64),
    *([] if GPU else [((5,), 1, 1)]),
    ((193,), 96, 12),
    ((3,), 768, 96),
    ((2,), 1024, 128),
    ((1100,), 16, 2),
]


@pytest.mark.parametrize(
    ("rows", "width", "hidden", "residual", "own_norm"),
    [
        (slow_case if number > 4 or number % 4 != 2 * residual + own_norm else pytest.param)(*shape, residual, own_norm)
        for number, shape in enumerate(ADAPTER_SHAPES)
        for residual, own_norm in itertools.product((False, True), repeat=2)
    ],
)
def test_adapter_shapes(rows, width, hidden, residual, own_norm):
    check_adapter(adapter_inputs(rows, width, hidden, residual=residual, own_norm=own_norm), residual, own_norm)


@pytest.mark.slow
@drawn
@given(data=st.data())
def test_adapter_of_anything(data):
    rows = data.draw(st.lists(st.integers(0, 7), min_size=0, max_size=3))
    least = 2 if GPU else 1  # rows of one element are constant: all rounding, times 316
    width, hidden = data.draw(st.integers(least, 130)), data.draw(st.integers(1, 40))
    residual, own_norm = data.draw(st.booleans()), data.draw(st.booleans())
    scale = data.draw(st.sampled_from([0.0, 1.0, -2.0]))
    tensors = adapter_inputs(tuple(rows), width, hidden, scale, residual=residual, own_norm=own_norm)
    check_adapter([rearranged(t, data) if t.dim() else t for t in tensors], residual, own_norm)


@ADAPTER_MODES
@pytest.mark.parametrize("dtype", [*map(slow_case, DTYPES[:-1]), DTYPES[-1]], ids=str)
def test_adapter_dtypes(dtype, residual, own_norm):
    check_adapter(adapter_inputs((70,), 96, 24, dtype=dtype, residual=residual, own_norm=own_norm), residual, own_norm)


@pytest.mark.slow
def test_adapter_of_a_batch_of_images():
    check_adapter(adapter_inputs((64, 193), 8, 2, dtype=torch.float16))


@pytest.mark.parametrize("own_norm", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, -2.0])
def test_adapter_scales(scale, own_norm):
    check_adapter(adapter_inputs(scale=scale, own_norm=own_norm), own_norm=own_norm)


@pytest.mark.parametrize("own_norm", [False, True])
def test_adapter_passes_nan_on(own_norm):
    tensors = adapter_inputs(own_norm=own_norm)
    tensors[0][0, 2, 5] = float("nan")
    grads = [randn(2, 5, 24, seed=20 + i) for i in range(1 + own_norm)]
    fused, plain, _ = adapter_functions(own_norm=own_norm)
    for a, b in zip(run(fused, tensors, grads), run(plain, tensors, grads), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("own_norm", [False, True])
def test_adapter_dead_relu(own_norm):
    tensors = adapter_inputs(own_norm=own_norm)
    tensors[4] = torch.full_like(tensors[4], -100.0)
    check_adapter(tensors, own_norm=own_norm)
    fused, grads = adapter_functions(own_norm=own_norm)[0], [randn(2, 5, 24, seed=20 + i) for i in range(1 + own_norm)]
    dx, _, _, d_down, d_down_bias, d_up, _, _, *d_norm = run(fused, tensors, grads)[1 + own_norm :]
    assert all(d.abs().max() == 0 for d in (d_down, d_down_bias, d_up, *d_norm)) and dx.abs().max() > 0


@pytest.mark.parametrize("own_norm", [False, True])
def test_adapter_constant_rows(own_norm):
    tensors = adapter_inputs(own_norm=own_norm)
    tensors[0] = torch.full_like(tensors[0], 3.0)
    grads = [tensors[0]] * (1 + own_norm)
    fused, plain, _ = adapter_functions(own_norm=own_norm)
    for a, b in zip(run(fused, tensors, grads), run(plain, tensors, grads), strict=True):
        # 1/std is 316 here, and multiplies the rounding of what would be zero.
        torch.testing.assert_close(a, b, **(dict(rtol=1e-3, atol=1e-3) if GPU else {}))


def test_adapter_variance_survives_a_large_mean():
    """E[x²] − E[x]² in float32 would lose every digit of the variance here."""
    tensors = adapter_inputs(rows=(40,), width=96, hidden=8, dtype=torch.float32)
    tensors[0] = tensors[0] + 3000.0
    tensors[7] = torch.zeros_like(tensors[7])
    exact = adapter_functions()[2](*[t.double() for t in tensors])
    assert relative_error(layernorm_adapter(*tensors, backend="triton"), exact) < 1e-3


def test_adapter_reads_rows_of_a_large_mean_normalised():
    """Wd (γ' ∘ x) − mean · Wd γ' in float32 would lose half of the digits that x̂ has here."""
    tensors = adapter_inputs(rows=(40,), width=96, hidden=8, dtype=torch.float32, own_norm=True)
    tensors[0] = tensors[0] + 3000.0
    fused, _, oracle = adapter_functions(own_norm=True)
    added, exact = (
        function(*inputs)[1] - inputs[0]
        for function, inputs in ((fused, tensors), (oracle, [t.double() for t in tensors]))
    )
    assert relative_error(added, exact) < 1e-3


@pytest.mark.parametrize("own_norm", [False, slow_case(True)])
def test_adapter_strides(own_norm):
    fused, _, _ = adapter_functions(True, own_norm)
    x, *parameters, residual = adapter_inputs((2, 6), 24, residual=True, own_norm=own_norm)
    views = [
        randn(2, 7, 26)[:, 1:, 1:25],
        randn(6, 2, 24).transpose(0, 1),
        randn(2, 6, 48)[..., ::2],
        randn(1, 6, 24).expand(2, -1, -1),
    ]
    grads = [
        randn(2, 6, 24, seed=5),
        torch.ones((), device=DEVICE, dtype=EXACT).expand(2, 6, 24),
        randn(24, 6, 2).permute(2, 1, 0),
        randn(2, 7, 25)[:, 1:, 1:],
    ]
    rows, steps = randn(12, 26)[:, 1:25], randn(24, 48)[::2, :24]  # launched without a copy
    copies = rows.contiguous(), steps.contiguous()
    assert_same(
        run(fused, [rows, *parameters, steps], [rows, steps]), run(fused, [copies[0], *parameters, copies[1]], copies)
    )
    for view, grad in zip(views, grads, strict=True):
        for added in (residual, view.flip(0)):
            ours = run(fused, [view, *parameters, added], [grad, grad])
            copied = run(fused, [view.contiguous(), *parameters, added.contiguous()], [grad.contiguous()] * 2)
            assert_same(ours, copied)
    scattered = [
        randn(*reversed(p.shape), seed=i).t() if p.dim() == 2 else randn(p.numel(), 2, seed=i)[:, 0].view_as(p)
        for i, p in enumerate(parameters)
    ]
    assert_same(
        run(fused, [x, *scattered, residual], [grads[0]] * 2),
        run(fused, [x, *(p.contiguous() for p in scattered), residual], [grads[0]] * 2),
    )


@pytest.mark.parametrize("own_norm", [False, True])
def test_adapter_float32_parameters_beside_half(own_norm):
    x, *parameters = adapter_inputs(dtype=torch.float16, own_norm=own_norm)
    wide = require_grad([p.float() for p in parameters])
    fused = adapter_functions(own_norm=own_norm)[0]
    out = fused(x, *wide)[1] if own_norm else fused(x, *wide)
    assert out.dtype == torch.float16
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in wide)
    narrow = fused(x, *parameters)[1] if own_norm else fused(x, *parameters)
    torch.testing.assert_close(out, narrow, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("own_norm", [False, True])
def test_adapter_of_no_rows(own_norm):
    fused, _, _ = adapter_functions(True, own_norm)
    tensors = adapter_inputs((0, 4), residual=True, own_norm=own_norm)
    y, stream, *grads = run(fused, tensors, [tensors[0], tensors[0]])
    assert y.shape == stream.shape == (0, 4, 24)
    assert all(g.abs().sum() == 0 for g in grads)


WANTED = [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,), (3, 4, 5, 6, 7), (0, 7)]
WANTED_OF_OWN_NORM = [*WANTED, (8,), (9,), (0, 3, 4, 5, 6, 8, 9)]


@pytest.mark.parametrize(
    ("wanted", "own_norm"),
    [
        *(slow_case(wanted, False) for wanted in WANTED[:-2]),
        *((wanted, False) for wanted in WANTED[-2:]),
        *(slow_case(wanted, True) for wanted in WANTED_OF_OWN_NORM[:-2]),
        *((wanted, True) for wanted in WANTED_OF_OWN_NORM[-2:]),
    ],
)
def test_adapter_computes_only_gradients_asked_for(wanted, own_norm):
    tensors = adapter_inputs(own_norm=own_norm)
    fused, grads = adapter_functions(own_norm=own_norm)[0], [randn(2, 5, 24, seed=9 + i) for i in range(1 + own_norm)]
    full = run(fused, tensors, grads)[1 + own_norm :]
    x, weight, bias, *parameters = [*tensors, None, None][:10]
    *_, mean, rstd, hidden = adapter_op.layernorm_adapter_forward(x, None, weight, bias, *parameters, 1e-5)
    needs = [i in wanted for i in range(10)]
    found = adapter_op.layernorm_adapter_backward(
        *[*grads, None][:2], x, weight, *parameters, mean, rstd, hidden, needs
    )
    for i, (grad, need) in enumerate(zip(found, needs, strict=True)):
        if need:
            assert_same([grad], [full[i]])
        else:
            assert grad.numel() == 0

    asked = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    outputs = fused(*asked)
    torch.autograd.backward(outputs if own_norm else [outputs], grads)
    assert [t.grad is not None for t in asked] == needs[: len(tensors)]


@pytest.mark.parametrize(
    ("own_norm", "wanted", "expected"),
    [
        (False, range(8), ["input", "parameter"]),
        (False, (5, 6, 7), ["parameter"]),
        (False, (0,), ["input"]),
        (True, (0, 3, 4, 5, 6, 7, 8, 9), ["input", "parameter"]),  # γ and β are frozen
        (True, range(10), ["input", "parameter", "parameter"]),
        (True, (1,), ["parameter"]),
        (True, (9,), ["input", "parameter"]),
    ],
)
def test_adapter_launches_no_more_than_the_gradients_take(own_norm, wanted, expected, monkeypatch):
    launched = []

    class Recorded:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(adapter_device, f"{name}_gradient_kernel")

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("input", "parameter"):
        monkeypatch.setattr(adapter_device, f"{name}_gradient_kernel", Recorded(name))
    tensors = [t.requires_grad_(i in wanted) for i, t in enumerate(adapter_inputs(own_norm=own_norm))]
    outputs = adapter_functions(own_norm=own_norm)[0](*tensors)
    sum(out.sum() for out in (outputs if own_norm else [outputs])).backward()
    assert launched == expected


@ADAPTER_MODES
def test_adapter_keeps_one_activation_of_full_width_for_backward(residual, own_norm):
    tensors = require_grad(adapter_inputs(residual=residual, own_norm=own_norm))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        adapter_functions(residual, own_norm)[0](*tensors)
    assert kept.count(tensors[0].shape) == 1


@pytest.mark.parametrize("own_norm", [False, True])
@pytest.mark.parametrize("used", [0, 1])
def test_adapter_with_one_output_unused(used, own_norm):
    tensors = require_grad(adapter_inputs(residual=True, own_norm=own_norm))
    others = require_grad(tensors)
    fused, plain, _ = adapter_functions(True, own_norm)
    ours = torch.autograd.grad(fused(*tensors)[used].sin().sum(), tensors, allow_unused=True)
    theirs = torch.autograd.grad(plain(*others)[used].sin().sum(), others, allow_unused=True)
    for a, b, t in zip(ours, theirs, tensors, strict=True):
        zero = torch.zeros_like(t)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


# ------------------------------------------------------------------------------------ references


def test_references_agree():
    """The PyTorch backends compute what the definitions say, in float64."""
    for causal in (False, True):
        for target in ("weights", "logits"):
            tensors = [t.double() for t in attention_inputs()]
            torch.testing.assert_close(
                attention_reference.folded(*tensors, causal, target),
                attention_reference.explicit(*tensors, causal, target),
            )
    x, *parameters = (t.double() for t in adapter_inputs())
    y, total = adapter_reference.plain(x, None, *parameters, None, None, 1e-5)
    torch.testing.assert_close(y, adapter_functions()[2](x, *parameters))
    assert total is x
    tensors = [t.double() for t in adapter_inputs(own_norm=True)]
    outputs = adapter_reference.plain(tensors[0], None, *tensors[1:], 1e-5)
    torch.testing.assert_close(outputs, adapter_functions(own_norm=True)[2](*tensors))


# ------------------------------------------------------------------------------------ backends and bad input


def test_backend_rule(monkeypatch):
    cpu = torch.zeros(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert upperson_kernels.backend.resolve(None, cpu) == "torch"
    with pytest.raises(RuntimeError, match="needs a CUDA device, but the tensors are on cpu.*TRITON_INTERPRET=1"):
        upperson_kernels.backend.resolve("triton", cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert upperson_kernels.backend.resolve(None, cpu) == "triton"
    assert upperson_kernels.backend.resolve("torch", cpu) == "torch"
    with pytest.raises(TypeError, match="float64, float32, float16 in Triton's interpreter, not bfloat16"):
        upperson_kernels.backend.resolve(None, cpu.bfloat16())
    with pytest.raises(ValueError, match="backend must be None, 'triton' or 'torch', not 'cuda'"):
        upperson_kernels.backend.resolve("cuda", cpu)


@pytest.mark.parametrize(
    ("capability", "hip", "has_triton", "problem"),
    [
        ((8, 0), None, True, None),
        ((12, 0), None, True, None),
        ((7, 5), None, True, "compute capability 8.0 or newer, and a T4 is none"),
        ((9, 4), "6.2", True, "an NVIDIA GPU .* and a T4 is none"),
        ((9, 0), None, False, "triton is not installed"),
    ],
)
def test_gpus_that_the_kernels_do_not_take_run_pytorch_and_say_so_once(
    monkeypatch, capability, hip, has_triton, problem
):
    backend = upperson_kernels.backend
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a T4")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backend, "HAS_TRITON", has_triton)
    monkeypatch.setattr(backend, "warned", set())
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float16)
    if problem is None:
        assert backend.resolve(None, tensor) == backend.resolve("triton", tensor) == "triton"
        return
    with pytest.warns(
        UserWarning, match=f"the fused kernels do not run here: .*{problem}.* Plain PyTorch runs instead"
    ):
        assert backend.resolve(None, tensor) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.resolve(None, tensor) == "torch"
    with pytest.raises(RuntimeError, match="use backend='torch'|runs without it"):
        backend.resolve("triton", tensor)
        backend.capability(tensor)


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0+git1", "2.4rc1", False),
        ("3.6.0", "2.10.1", False),
        ("3.6.0", "3.0.0", False),
        ("3.7.0", "2.4.6", True),
        ("3.10.0", "2.4.6", True),
    ],
)
def test_interpreter_that_numpy_breaks_is_refused(monkeypatch, triton, numpy, works):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    problem = upperson_kernels.backend.interpreter_problem(triton, numpy)
    monkeypatch.setattr(upperson_kernels.backend, "INTERPRETER_PROBLEM", problem)
    if works:
        assert upperson_kernels.backend.resolve(None, torch.zeros(1)) == "triton"
        return
    with pytest.raises(
        RuntimeError, match=re.escape(f"the interpreter of Triton {triton} does not work with NumPy {numpy}:")
    ):
        upperson_kernels.backend.resolve(None, torch.zeros(1))
    assert upperson_kernels.backend.resolve("torch", torch.zeros(1)) == "torch"


@pytest.mark.skipif(GPU, reason="the rule for the interpreter")
def test_bfloat16_is_refused_in_the_interpreter_and_runs_in_torch():
    tensors = attention_inputs(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="not bfloat16; use backend='torch'"):
        prefix_attention(*tensors, backend="triton")
    assert prefix_attention(*tensors, backend="torch").dtype == torch.bfloat16


def test_float32_products_follow_pytorchs_setting():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert upperson_kernels.backend.float32_precision() == precision
        torch.set_float32_matmul_precision("highest")
        for setting in ("tf32", "ieee"):  # PyTorch's newer way to say it
            matmul.fp32_precision = setting
            assert upperson_kernels.backend.float32_precision() == setting
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(qkv=torch.zeros(2, 7, 2, 2, 16)), ValueError, r"qkv must be \(B, N, 3, H, D\), not \(2, 7, 2, 2, 16\)"),
        (dict(qkv=torch.zeros(2, 7, 96)), ValueError, r"qkv must be \(B, N, 3, H, D\), not \(2, 7, 96\)"),
        (dict(qkv=torch.zeros(2, 7, 3, 2, 16, dtype=torch.int64)), TypeError, "qkv must be a floating-point tensor"),
        (dict(prefix_key=torch.zeros(3, 32)), ValueError, r"prefix_key must be \(P, 2, 16\), not \(3, 32\)"),
        (dict(prefix_value=torch.zeros(4, 2, 16)), ValueError, r"prefix_value must be \(3, 2, 16\), not \(4, 2, 16\)"),
        (dict(prefix_scale=torch.zeros(1)), ValueError, r"prefix_scale must be \(\), not \(1,\)"),
        (
            dict(prefix_key=torch.zeros(3, 2, 16, dtype=torch.float16)),
            TypeError,
            "prefix_key must be float32 beside qkv, not float16",
        ),
        (
            dict(prefix_value=torch.zeros(3, 2, 16, device="meta")),
            ValueError,
            "prefix_value is on meta, but qkv is on cpu",
        ),
        (
            dict(cu_seqlens=torch.tensor([0, 7], dtype=torch.int32)),
            ValueError,
            r"qkv must be \(T, 3, H, D\) beside cu_seqlens, not \(2, 7, 3, 2, 16\)",
        ),
        (dict(max_seqlen=7), ValueError, "max_seqlen goes with cu_seqlens, which is missing"),
        (dict(prefix_scale=1.0), TypeError, "prefix_attention: prefix_scale must be a tensor, not float"),
        (dict(qkv=[1.0]), TypeError, "qkv must be a tensor, not list"),
        (dict(scale_target="values"), ValueError, "scale_target must be 'weights' or 'logits', not 'values'"),
        (dict(causal="no"), TypeError, "prefix_attention: causal must be True or False, not 'no'"),
        (
            dict(causal=torch.ones(4, 4).tril()),
            TypeError,
            r"causal must be True or False, not a tensor of shape \(4, 4\)",
        ),
        (dict(backend="fast"), ValueError, "backend must be None, 'triton' or 'torch', not 'fast'"),
    ],
)
def test_attention_refuses(change, error, message):
    arguments = dict(
        qkv=torch.zeros(2, 7, 3, 2, 16),
        prefix_key=torch.zeros(3, 2, 16),
        prefix_value=torch.zeros(3, 2, 16),
        prefix_scale=torch.tensor(1.0),
    )
    with pytest.raises(error, match=message):
        prefix_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "error", "message"),
    [
        ([0, 7], None, TypeError, "cu_seqlens must be a tensor, not list"),
        (torch.tensor([0, 7], dtype=torch.int32), 7.0, TypeError, "max_seqlen must be a whole number, not 7.0"),
        (torch.tensor([0, 7]), None, TypeError, "cu_seqlens must be int32, not int64"),
        (torch.tensor([[0, 7]], dtype=torch.int32), None, ValueError, r"cu_seqlens must be \(S \+ 1,\), not \(1, 2\)"),
        (torch.tensor([], dtype=torch.int32), None, ValueError, r"cu_seqlens must be \(S \+ 1,\), not \(0,\)"),
        (torch.tensor([0, 7], dtype=torch.int32, device="meta"), None, ValueError, "cu_seqlens is on meta, but qkv"),
        (torch.tensor([0, 6], dtype=torch.int32), None, ValueError, r"end with T = 7, but is \[0, 6\]"),
        (torch.tensor([1, 7], dtype=torch.int32), None, ValueError, r"must begin with 0.*but is \[1, 7\]"),
        (torch.tensor([0, 5, 3, 7], dtype=torch.int32), None, ValueError, "never fall"),
        (
            torch.tensor([0, 3, 7], dtype=torch.int32),
            3,
            ValueError,
            "max_seqlen is 3, but the longest sequence .* has 4",
        ),
        (torch.tensor([0, 3, 7], dtype=torch.int32), -1, ValueError, "max_seqlen must be at least 0, not -1"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_attention_refuses_marks(cu_seqlens, max_seqlen, error, message, backend):
    if GPU and backend == "triton":
        pytest.skip("values of cu_seqlens are checked on the CPU")
    with pytest.raises(error, match=message):
        prefix_attention(
            torch.zeros(7, 3, 2, 16),
            torch.zeros(3, 2, 16),
            torch.zeros(3, 2, 16),
            torch.tensor(1.0),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            backend=backend,
        )


def test_attention_refuses_wide_heads():
    with pytest.raises(ValueError, match="takes head widths up to 128, not 144; use backend='torch'"):
        prefix_attention(*attention_inputs(width=144), backend="triton")
    prefix_attention(*attention_inputs(width=144), backend="torch")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=None), TypeError, "layernorm_adapter: x must be a tensor, not NoneType"),
        (dict(residual=True), TypeError, "residual must be a tensor, not bool"),
        (dict(eps=-1e-5), ValueError, "layernorm_adapter: eps must be finite and at least 0, not -1e-05"),
        (dict(eps=float("nan")), ValueError, "eps must be finite and at least 0, not nan"),
        (dict(eps=None), TypeError, "eps must be a number, not None"),
        (dict(eps=torch.tensor(1e-5)), TypeError, r"eps must be a number, not a tensor of shape \(\)"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x must be \(..., C\) with C ≥ 1, not \(\)"),
        (dict(x=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "x must be a floating-point tensor"),
        (dict(weight=torch.zeros(9)), ValueError, r"weight must be \(8,\), not \(9,\)"),
        (dict(bias=torch.zeros(1)), ValueError, r"bias must be \(8,\), not \(1,\)"),
        (dict(down_weight=torch.zeros(8, 4)), ValueError, r"down_weight must be \(R, 8\), not \(8, 4\)"),
        (dict(down_weight=torch.zeros(0, 8)), ValueError, r"down_weight must be \(R, 8\) with R ≥ 1"),
        (dict(down_bias=torch.zeros(3)), ValueError, r"down_bias must be \(2,\), not \(3,\)"),
        (dict(up_weight=torch.zeros(2, 8)), ValueError, r"up_weight must be \(8, 2\), not \(2, 8\)"),
        (dict(up_bias=torch.zeros(2)), ValueError, r"up_bias must be \(8,\), not \(2,\)"),
        (dict(scale=torch.zeros(1)), ValueError, r"scale must be \(\), not \(1,\)"),
        (dict(up_bias=torch.zeros(8, dtype=torch.float64)), TypeError, "up_bias must be float32 beside x, not float64"),
        (
            dict(x=torch.zeros(2, 8).half(), bias=torch.zeros(8).half()),
            TypeError,
            "bias must have weight's dtype, torch.float32, not torch.float16",
        ),
        (dict(residual=torch.zeros(2, 1, 8)), ValueError, r"residual must be \(2, 8\), not \(2, 1, 8\)"),
        (dict(residual=torch.zeros(2, 8, dtype=torch.float16)), TypeError, "residual must have x's dtype"),
        (dict(scale=torch.zeros((), device="meta")), ValueError, "scale is on meta, but x is on cpu"),
        (
            dict(norm_weight=torch.ones(8)),
            ValueError,
            "norm_weight and norm_bias go together, and norm_bias is missing",
        ),
        (
            dict(norm_bias=torch.ones(8)),
            ValueError,
            "norm_weight and norm_bias go together, and norm_weight is missing",
        ),
        (
            dict(norm_weight=torch.ones(9), norm_bias=torch.ones(8)),
            ValueError,
            r"norm_weight must be \(8,\), not \(9,\)",
        ),
        (dict(norm_weight=torch.ones(8), norm_bias=True), TypeError, "norm_bias must be a tensor, not bool"),
        (
            dict(norm_weight=torch.ones(8), norm_bias=torch.ones(8).half()),
            TypeError,
            "norm_bias must be float32 beside x, not float16",
        ),
        (
            dict(norm_weight=torch.ones(8, device="meta"), norm_bias=torch.ones(8)),
            ValueError,
            "norm_weight is on meta, but x is on cpu",
        ),
    ],
)
def test_adapter_refuses(change, error, message):
    arguments = dict(
        x=torch.zeros(2, 8),
        weight=torch.ones(8),
        bias=torch.zeros(8),
        down_weight=torch.zeros(2, 8),
        down_bias=torch.zeros(2),
        up_weight=torch.zeros(8, 2),
        up_bias=torch.zeros(8),
        scale=torch.tensor(1.0),
    )
    with pytest.raises(error, match=message):
        layernorm_adapter(**(arguments | change))


def test_adapter_refuses_wide_bottlenecks():
    tensors = adapter_inputs(rows=(2,), width=8, hidden=300)
    with pytest.raises(ValueError, match="takes hidden widths up to 256, not 300; use backend='torch'"):
        layernorm_adapter(*tensors, backend="triton")
    assert math.isfinite(layernorm_adapter(*tensors, backend="torch").sum())
