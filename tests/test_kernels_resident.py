"""The attention kernels that hold a whole head: against the definition in float64, and where they run."""

import itertools

import pytest
import torch
from operators import (
    DTYPES,
    GPU,
    assert_same,
    attention_functions,
    attention_inputs,
    check_attention,
    packed_inputs,
    randn,
    require_grad,
    run,
    slow_case,
)
from upperson_kernels.attention import choose, launch
from upperson_kernels.attention import op as attention_op

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LENGTHS = [  # tokens and prefix columns: real models, then every number of pieces, the last one full and almost empty
    *((193, 10), (244, 10), (77, 10), (50, 10), (197, 2), (240, 16)),
    *((1, 0), (1, 17), (16, 0), (17, 3), (64, 0), (64, 14), (65, 14), (80, 0), (112, 16), (127, 1)),
    *((128, 1), (129, 2), (145, 16), (160, 64), (176, 3), (192, 16), (209, 0), (225, 31), (255, 1), (256, 0)),
]


@pytest.fixture
def resident(monkeypatch):
    """The names of the kernels that are launched. Here they also take float64 and other head widths, if they compute
    the length at all."""
    if not GPU:
        monkeypatch.setattr(
            choose, "is_resident", lambda length, prefix, *_, **__: length + prefix <= choose.MOST_COLUMNS
        )
    launched = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(launch.resident, f"{name}_kernel", Recorded(name, launched))
    return launched


class Recorded:
    """A kernel that notes its launches."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched
        self.kernel = getattr(launch.resident, f"{name}_kernel")

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.mark.skipif(GPU, reason="compiled kernels take no float64")
@pytest.mark.parametrize(
    ("length", "prefix", "causal", "target"),
    [
        (3, 2, True, "weights"),
        (3, 2, False, "logits"),
        *(slow_case(*case) for case in ((66, 3, False, "weights"), (70, 2, True, "logits"), (130, 3, True, "weights"))),
    ],
)
def test_gradcheck(length, prefix, causal, target, resident):
    """Finite differences against the kernels' backward, in all four inputs."""
    tensors = require_grad(attention_inputs(batch=2, length=length, prefix=prefix, heads=1, width=16))
    fused, _, _ = attention_functions(causal, target)
    assert torch.autograd.gradcheck(fused, tensors, fast_mode=True)
    assert set(resident) == {"forward", "backward"}


@pytest.mark.parametrize(
    ("length", "prefix", "causal", "target"),
    [
        (slow_case(*pair, causal, target) if number else (*pair, causal, target))
        for number, pair in enumerate(LENGTHS)
        for causal, target in itertools.product((False, True), ("weights", "logits"))
    ],
)
def test_lengths(length, prefix, causal, target, resident):
    compiled = dict(width=64, dtype=torch.float16) if GPU else {}
    check_attention(attention_inputs(batch=1, heads=2, length=length, prefix=prefix, **compiled), causal, target)
    if not GPU:  # where choose.py decides, by the GPU too
        assert set(resident) == {"forward", "backward"}


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 2], ids=str)
@pytest.mark.parametrize(
    ("length", "prefix", "causal", "target"),
    [(193, 10, False, "weights"), slow_case(193, 10, False, "logits"), slow_case(77, 10, True, "weights")],
)
def test_sixteen_bits(length, prefix, causal, target, dtype):
    check_attention(attention_inputs(1, length, prefix, heads=2, width=64, scale=10.0, dtype=dtype), causal, target)


@pytest.mark.parametrize("scale", [slow_case(0.0), -0.5, slow_case(1e-4), slow_case(300.0)])
@pytest.mark.parametrize("target", ["weights", "logits"])
def test_prefix_scales(scale, target, resident):
    cancellation = 100 if (scale, target) == (300, "logits") else 10
    check_attention(attention_inputs(length=67, scale=scale), False, target, cancellation=cancellation)


@pytest.mark.parametrize("target", ["weights", "logits"])
@pytest.mark.parametrize(
    "wanted", [(0, 3), *map(slow_case, [(0,), (3,), (1,), (2,), (0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 1, 2)])]
)
def test_only_the_gradients_asked_for(wanted, target, resident):
    tensors, grad = attention_inputs(length=66), randn(2, 66, 2, 16, seed=9)
    full = run(attention_functions(False, target)[0], tensors, [grad])[1:]
    out, lse = attention_op.prefix_attention_forward(*tensors, None, 0, False, target)
    needs = [i in wanted for i in range(4)]
    found = attention_op.prefix_attention_backward(grad, *tensors, None, 0, out, lse, False, target, needs)
    assert [gradient.numel() > 0 for gradient in found] == needs
    assert_same([gradient for gradient in found if gradient.numel()], [full[i] for i in wanted])


@pytest.mark.slow
def test_strides(resident):
    """Views that the kernels address directly, and such that they copy, give what contiguous copies give."""
    _, key, value, scale = attention_inputs()
    views = [
        randn(2, 67, 4, 3, 2, 17, seed=3)[:, 1:, 1, ..., 1:],
        randn(3, 2, 66, 2, 16).permute(1, 2, 0, 3, 4),
        randn(2, 66, 2, 16, 3).permute(0, 1, 4, 2, 3),
        randn(1, 66, 3, 2, 16).expand(2, -1, -1, -1, -1),
    ]
    grads = [
        randn(2, 2, 66, 16, seed=5).transpose(1, 2),
        randn(2, 66, 2, 17, seed=5)[..., 1:],
        randn(2, 66, 2, 16, seed=5).sum().expand(2, 66, 2, 16),
        randn(2, 66, 2, 16, seed=5),
    ]
    fused, _, _ = attention_functions(True, "weights")
    for qkv, grad in zip(views, grads, strict=True):
        ours = run(fused, [qkv, key, value, scale], [grad])
        assert_same(ours, run(fused, [qkv.contiguous(), key, value, scale], [grad.contiguous()]))


def test_repetition_gives_the_same_bits(resident):
    tensors = attention_inputs(length=130, prefix=3, dtype=torch.float32)
    fused, _, _ = attention_functions(False, "weights")
    first, second = (run(fused, tensors, [randn(2, 130, 2, 16, dtype=torch.float32)]) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ---------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("length", "prefix", "width", "element_size", "capability", "causal", "packed", "runs"),
    [
        (193, 10, 64, 2, 90, False, False, True),
        (244, 12, 64, 2, 100, False, False, True),
        (245, 12, 64, 2, 90, False, False, False),
        (193, 32, 64, 2, 90, False, False, True),
        (193, 33, 64, 2, 90, False, False, False),
        (77, 10, 64, 2, 90, True, False, True),
        (118, 10, 64, 2, 90, True, False, True),
        (119, 10, 64, 2, 90, True, False, False),
        (193, 10, 80, 2, 90, False, False, False),
        (193, 10, 64, 4, 90, False, False, False),
        (193, 10, 64, 2, 89, False, False, False),
        (193, 10, 64, 2, 120, False, False, False),
        (77, 10, 64, 2, 90, True, True, False),
    ],
)
def test_where_it_runs(length, prefix, width, element_size, capability, causal, packed, runs):
    found = choose.is_resident(length, prefix, width, element_size, capability, causal=causal, packed=packed)
    assert found == runs


def test_every_choice_covers_its_call():
    """All columns and all queries lie in a piece, and only pieces full of tokens are called plain."""
    for length, prefix in itertools.product(range(1, 257), range(0, 65)):
        if length + prefix > choose.MOST_COLUMNS:
            continue
        pieces = choose.forward_pieces(length, prefix, False, 90)
        widths = [pieces[name] for name in ("FIRST", "SECOND", "THIRD")]
        assert sum(widths) >= length + prefix
        assert sum(widths[: pieces["PLAIN"]]) <= length
        backward = choose.backward_pieces(length, prefix)
        if backward is None:
            continue
        assert backward["BLOCK_N"] * backward["TILES"] >= length + prefix
        assert backward["BLOCK_N"] * (backward["TILES"] - 1) <= length
        assert choose.PIECE * backward["FULL"] < length <= choose.PIECE * backward["FULL"] + backward["LAST"]


def test_packed_sequences_take_the_other_kernels():
    tensors, cu_seqlens = packed_inputs([26, 0, 31], prefix=10, width=64, dtype=torch.float16)
    check_attention(tensors, True, "weights", cu_seqlens)
