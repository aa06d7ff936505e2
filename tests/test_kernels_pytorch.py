"""Both operators as PyTorch sees them: registration, compilation, autocast, checkpointing, graphs, modules, devices."""

import copy

import pytest
import torch
from operators import (
    DEVICE,
    EXACT,
    GPU,
    adapter_functions,
    adapter_inputs,
    assert_same,
    attention_functions,
    attention_inputs,
    packed_inputs,
    randn,
    require_grad,
    run,
    slow_case,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from upperson_kernels import LayerNormAdapter, PrefixAttention, layernorm_adapter, prefix_attention
from upperson_kernels.adapter import op as adapter_op
from upperson_kernels.attention import op as attention_op

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

OPERATORS = {
    "attention": (lambda: attention_inputs(length=40), lambda: attention_functions(True, "logits"), 1),
    "adapter": (lambda: adapter_inputs((90,)), lambda: adapter_functions(), 1),
    "adapter with residual": (lambda: adapter_inputs((90,), residual=True), lambda: adapter_functions(True), 2),
    "adapter with its own norm": (
        lambda: adapter_inputs((90,), residual=True, own_norm=True),
        lambda: adapter_functions(True, True),
        2,
    ),
}


@pytest.mark.parametrize("operator", [*map(slow_case, list(OPERATORS)[:-1]), list(OPERATORS)[-1]])
def test_repetition_gives_the_same_bits_and_leaves_inputs_alone(operator):
    make, functions, outputs = OPERATORS[operator]
    tensors, fused = make(), functions()[0]
    before = [t.clone() for t in tensors]
    out = fused(*tensors)
    shape = out[0].shape if outputs == 2 else out.shape
    grads = [randn(*shape, seed=30 + i) for i in range(outputs)]
    first, second = run(fused, tensors, grads), run(fused, tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("operator", ["attention", *map(slow_case, list(OPERATORS)[1:])])
def test_an_output_used_twice(operator):
    make, functions, outputs = OPERATORS[operator]
    fused, plain, _ = functions()

    def twice(function):
        def call(*tensors):
            out = function(*tensors)
            out = out[0] if outputs == 2 else out
            return out.sin() + out * out

        return call

    tensors = make()
    shape = twice(plain)(*tensors).shape
    for a, b in zip(
        run(twice(fused), tensors, [randn(*shape)]), run(twice(plain), tensors, [randn(*shape)]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4 if GPU else 1e-9, atol=1e-4 if GPU else 1e-9)


@pytest.mark.slow
def test_opcheck():
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch, as PyTorch itself checks them."""
    tensors = require_grad(attention_inputs(length=5))
    torch.library.opcheck(attention_op.prefix_attention_forward, (*tensors, None, 0, True, "weights"))
    tensors = [t.detach() for t in tensors]
    out, lse = attention_op.prefix_attention_forward(*tensors, None, 0, True, "weights")
    torch.library.opcheck(
        attention_op.prefix_attention_backward,
        (randn(2, 5, 2, 16), *tensors, None, 0, out, lse, True, "weights", [True, False, True, True]),
    )
    needs = [True, False, False, True, True, True, True, True]
    for own_norm in (False, True):
        x, *parameters = [*require_grad(adapter_inputs(own_norm=own_norm)), None, None][:10]
        for residual in (None, randn(2, 5, 24, seed=1).requires_grad_()):
            torch.library.opcheck(adapter_op.layernorm_adapter_forward, (x, residual, *parameters, 1e-5))
        x, weight, bias, *parameters = (None if t is None else t.detach() for t in (x, *parameters))
        *_, mean, rstd, hidden = adapter_op.layernorm_adapter_forward(x, None, weight, bias, *parameters, 1e-5)
        torch.library.opcheck(
            adapter_op.layernorm_adapter_backward,
            (x, x if own_norm else None, x, weight, *parameters, mean, rstd, hidden, [*needs, own_norm, own_norm]),
        )


@pytest.mark.parametrize("own_norm", [False, True])
def test_the_adapter_is_counted_as_pytorchs_own(own_norm):
    counts = []
    for function in adapter_functions(True, own_norm)[:2]:
        tensors = require_grad(adapter_inputs(residual=True, own_norm=own_norm))
        with FlopCounterMode(display=False) as counter:
            sum(out.sum() for out in function(*tensors)).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 12 * tensors[0].numel() * 3


@pytest.mark.slow
def test_opcheck_of_packed_sequences():
    tensors, cu_seqlens = packed_inputs([3, 0, 4])
    torch.library.opcheck(
        attention_op.prefix_attention_forward, (*require_grad(tensors), cu_seqlens, 4, True, "weights")
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_mode_is_refused_rather_than_zero(operator):
    make, functions, _ = OPERATORS[operator]
    tensors = make()
    tangents = [torch.ones_like(t) for t in tensors]
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(functions()[0], tuple(tensors), tuple(tangents))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_shapes_can_be_worked_out_without_data(backend):
    x, *parameters = (t.to("meta") for t in adapter_inputs())
    if backend == "triton":
        y, *_ = adapter_op.layernorm_adapter_forward(x, None, *parameters, None, None, 1e-5)
    else:
        y = layernorm_adapter(x, *parameters, backend=backend)
    assert y.device.type == "meta" and y.shape == x.shape


# ------------------------------------------------------------------------------------ modules


class SmallBlock(nn.Module):
    """A transformer block of the two operators, the last adapter with a LayerNorm of its own; two heads of width 16."""

    def __init__(self, backend="triton"):
        super().__init__()
        self.attention = PrefixAttention(2, 16, 3, scale=1.5, backend=backend)
        self.norm_1, self.norm_2, self.norm_3 = (LayerNormAdapter(32, 4, backend=backend) for _ in range(3))
        self.own_norm = nn.LayerNorm(32)
        self.in_proj, self.out_proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, cu_seqlens=None, max_seqlen=None):
        qkv = self.in_proj(self.norm_1(x)).unflatten(-1, (3, 2, 16))
        attended = self.out_proj(self.attention(qkv, cu_seqlens, max_seqlen).flatten(-2))
        y, x = self.norm_2(attended, x)
        y, x = self.with_own_norm(y, x)
        return x + y

    def with_own_norm(self, x, residual):
        return layernorm_adapter(
            x,
            *self.norm_3.parameters(),
            residual=residual,
            norm_weight=self.own_norm.weight,
            norm_bias=self.own_norm.bias,
            backend=self.norm_3.backend,
        )


def small_block(dtype=EXACT):
    torch.manual_seed(0)
    block = SmallBlock()
    for norm in (block.norm_1, block.norm_2, block.norm_3):
        nn.init.normal_(norm.up_weight)
    return block.to(DEVICE, dtype)


def gradients(block, out):
    block.zero_grad()
    out.sin().sum().backward()
    return [p.grad.clone() for p in block.parameters()]


def test_modules_are_the_functions():
    attention = PrefixAttention(2, 16, 3, scale=4.0, scale_target="logits", causal=True).to(DEVICE, EXACT)
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "prefix_key": (3, 2, 16),
        "prefix_value": (3, 2, 16),
        "prefix_scale": (),
    }
    assert attention.prefix_scale == 4 and attention.prefix_key.min() >= 0 and attention.prefix_key.max() < 0.01
    qkv = randn(2, 7, 3, 2, 16)
    assert torch.equal(
        attention(qkv), prefix_attention(qkv, *attention.parameters(), causal=True, scale_target="logits")
    )
    packed, cu_seqlens = packed_inputs([3, 4])
    assert torch.equal(
        attention(packed[0], cu_seqlens),
        prefix_attention(packed[0], *attention.parameters(), causal=True, scale_target="logits", cu_seqlens=cu_seqlens),
    )
    assert repr(attention) == "PrefixAttention(heads=2, head_width=16, length=3, scale_target='logits', causal=True)"

    norm = LayerNormAdapter(24, 3, eps=1e-3).to(DEVICE, EXACT)
    x, residual = randn(2, 5, 24), randn(2, 5, 24, seed=1)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (24,), eps=1e-3))  # as the adapter starts at 0
    nn.init.normal_(norm.up_weight)
    options = dict(eps=1e-3)
    assert torch.equal(norm(x), layernorm_adapter(x, *norm.parameters(), **options))
    for a, b in zip(
        norm(x, residual), layernorm_adapter(x, *norm.parameters(), residual=residual, **options), strict=True
    ):
        assert torch.equal(a, b)
    assert repr(norm) == "LayerNormAdapter(width=24, hidden=3, eps=0.001)"
    assert set(norm.state_dict()) == {"weight", "bias", "down_weight", "down_bias", "up_weight", "up_bias", "scale"}


@pytest.mark.parametrize(
    ("module", "sizes", "options", "error", "message"),
    [
        (PrefixAttention, (0, 16, 3), {}, ValueError, "heads must be at least 1, not 0"),
        (PrefixAttention, (2, -16, 3), {}, ValueError, "head_width must be at least 1, not -16"),
        (PrefixAttention, (2, 16, -1), {}, ValueError, "length must be at least 0, not -1"),
        (PrefixAttention, (2, 16.0, 3), {}, TypeError, "head_width must be an integer, not 16.0"),
        (PrefixAttention, ("2", 16, 3), {}, TypeError, "heads must be an integer, not '2'"),
        (PrefixAttention, (2, 16, 3), {"causal": "no"}, TypeError, "causal must be True or False, not 'no'"),
        (PrefixAttention, (2, 16, 3), {"scale_target": "keys"}, ValueError, "'weights' or 'logits', not 'keys'"),
        (PrefixAttention, (2, 16, 3), {"backend": "cuda"}, ValueError, "backend must be .* not 'cuda'"),
        (LayerNormAdapter, (0, 4), {}, ValueError, "width must be at least 1, not 0"),
        (LayerNormAdapter, (8, 0), {}, ValueError, "hidden must be at least 1, not 0"),
        (LayerNormAdapter, (True, 4), {}, TypeError, "width must be an integer, not True"),
        (LayerNormAdapter, (8, 4), {"eps": -1}, ValueError, "eps must be finite and at least 0, not -1"),
        (LayerNormAdapter, (8, 4), {"backend": "cuda"}, ValueError, "backend must be .* not 'cuda'"),
    ],
)
def test_modules_refuse_wrong_arguments_when_they_are_built(module, sizes, options, error, message):
    with pytest.raises(error, match=message):
        module(*sizes, **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_meta_tensors_have_shapes_and_no_values(operator):
    inputs, functions, _ = OPERATORS[operator]
    tensors = [tensor.to("meta").requires_grad_() for tensor in inputs()]
    fused, plain, *_ = functions()
    outputs, expected = fused(*tensors), plain(*tensors)
    pairs = zip(outputs, expected, strict=True) if isinstance(outputs, tuple) else [(outputs, expected)]
    for out, other in pairs:
        assert out.is_meta and out.shape == other.shape
        out.sum().backward(retain_graph=True)
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in tensors)


# ------------------------------------------------------------------------------------ torch.compile and its kin


@pytest.mark.slow
def test_compiles_whole_and_once_for_every_batch():
    block = small_block()
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 8):
        x = randn(batch, 9, 32)
        torch._dynamo.mark_dynamic(x, 0)
        out = compiled(x)
        assert torch.equal(out, block(x))
        for a, b in zip(gradients(block, out), gradients(block, block(x)), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiles_packed_sequences():
    block = small_block()
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for lengths in ([2, 7, 1], [5, 0, 9, 6]):
        x = randn(sum(lengths), 32)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        torch.testing.assert_close(compiled(x, cu_seqlens, 9), block(x, cu_seqlens, 9))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_computes_in_half_precision(backend):
    block = SmallBlock(backend).to(DEVICE)
    nn.init.normal_(block.norm_2.up_weight)
    x = randn(2, 9, 32, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.float16):
        qkv = block.in_proj(x).unflatten(-1, (3, 2, 16))
        assert qkv.dtype == torch.float16
        assert block.attention(qkv).dtype == torch.float16
        assert block.attention(qkv.float()).dtype == torch.float16  # as scaled_dot_product_attention does
        assert block.norm_1(x).dtype == torch.float32  # as layer_norm does
        for fused in (block.norm_2, block.with_own_norm):
            assert [t.dtype for t in fused(x.half(), x)] == [torch.float32] * 2
        out = block(x)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(block, out))
    torch.testing.assert_close(out.float(), block(x), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    block, x = small_block(), randn(2, 9, 32).requires_grad_()
    expected = [*gradients(block, block(x)), x.grad.clone()]
    x.grad = None
    found = [*gradients(block, checkpoint(block, x, use_reentrant=use_reentrant)), x.grad]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_copied_module_is_independent():
    block = small_block()
    other = copy.deepcopy(block)
    x = randn(2, 9, 32)
    gradients(block, block(x))
    assert all(p.grad is None for p in other.parameters())
    assert torch.equal(other(x), block(x))


@needs_gpu
def test_cuda_graph_replays_forward_and_backward():
    block, x = small_block(), randn(4, 77, 32)
    expected = gradients(block, block(x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(block, block(x))
    torch.cuda.current_stream().wait_stream(stream)
    block.zero_grad(set_to_none=True)
    graph, other = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        out = block(other)
        out.sin().sum().backward()
    other.copy_(x)
    block.zero_grad(set_to_none=False)
    graph.replay()
    for p, b in zip(block.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, b)


# ------------------------------------------------------------------------------------ large and elsewhere


@pytest.fixture
def untouched_memory(poisoned_memory):
    """Memory that nobody writes to costs nothing, however much of it there is."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.slow
@pytest.mark.usefixtures("untouched_memory")
@pytest.mark.parametrize("dimension", ["batch", "row", "part", "head"])
def test_attention_beyond_32_bit_offsets(dimension):
    """Elements of one input lie more than 2³¹ elements apart."""
    far = 2**31 + 64
    shape, strides = (2, 17, 3, 2, 16), [17 * 96, 96, 32, 16, 1]
    apart = {"batch": (0, far), "row": (1, far // 16), "part": (2, far // 2), "head": (3, far)}[dimension]
    strides[apart[0]] = apart[1]
    memory = torch.empty(far + 10**4, device=DEVICE, dtype=torch.float16)
    qkv = memory.as_strided(shape, strides)
    qkv.copy_(randn(*shape, dtype=torch.float16))
    _, *prefix = attention_inputs(dtype=torch.float16)
    fused = attention_functions(True, "weights")[0]
    assert_same(*(run(fused, [t, *prefix], [randn(2, 17, 2, 16)]) for t in (qkv, qkv.contiguous())))


@pytest.mark.usefixtures("untouched_memory")
def test_adapter_beyond_32_bit_offsets():
    rows, stride = 5, 2**29 + 64
    x = torch.empty(rows * stride, device=DEVICE, dtype=torch.float16).as_strided((rows, 24), (stride, 1))
    x.copy_(randn(rows, 24, dtype=torch.float16))
    _, *parameters = adapter_inputs(dtype=torch.float16)
    fused = adapter_functions()[0]
    assert_same(*(run(fused, [t, *parameters], [randn(rows, 24, seed=2)]) for t in (x, x.contiguous())))


@needs_gpu
@pytest.mark.usefixtures("untouched_memory")
def test_more_than_2_to_31_elements_and_65535_programs():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    qkv = torch.zeros(90_000, 17, 3, 8, 64, device=DEVICE, dtype=torch.float16)  # 2.3 · 10⁹
    qkv[-1] = randn(17, 3, 8, 64, dtype=torch.float16)
    _, *prefix = attention_inputs(heads=8, width=64, dtype=torch.float16)
    grad = [torch.ones((), device=DEVICE, dtype=torch.float16).expand(90_000, 17, 8, 64)]
    fused = attention_functions(True, "weights")[0]
    out, dqkv, *_ = run(fused, [qkv, *prefix], grad)
    last, dlast, *_ = run(fused, [qkv[-1:], *prefix], [grad[0][-1:]])
    assert torch.equal(out[-1:], last) and torch.equal(dqkv[-1:], dlast)

    x = torch.zeros(2**21 + 70, 1100, device=DEVICE, dtype=torch.float16)  # 2.3 · 10⁹
    x[-1] = randn(1100, dtype=torch.float16)
    _, *parameters = adapter_inputs((), 1100, 8, dtype=torch.float16)
    y = layernorm_adapter(x, *parameters)
    torch.testing.assert_close(y[-1:], layernorm_adapter(x[-1:], *parameters))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs():
    for inputs, functions in (
        (attention_inputs(), attention_functions(False, "weights")),
        (adapter_inputs(), adapter_functions()),
    ):
        there = [t.to("cuda:1") for t in inputs]
        shape = functions[1](*inputs).shape
        for a, b in zip(
            run(functions[0], there, [randn(*shape).to("cuda:1")]),
            run(functions[0], inputs, [randn(*shape)]),
            strict=True,
        ):
            assert a.device == torch.device("cuda:1") and torch.equal(a.cpu(), b.cpu())
