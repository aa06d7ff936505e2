"""The model as other parts of PyTorch take it: torch.export, torch.jit.trace, quantisation, torch.func."""

import copy

import pytest
import torch
from operators import slow_case
from tiny import build, inputs, stirred, tiny_clip, tiny_config
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

VARIANTS = {
    "whole": dict(),
    "kernels": dict(backend="auto"),
    "whole tokens": dict(skip_unread=False, lora="dora", adapter_attn="sequential"),
    "prompts": dict(method="cskt"),
    "mixtures": dict(method="dm-adapter", experts=3),
    "decoupled prompts": dict(method="prompt-decoupling"),
}
BATCHES = (2, 5, 1)


class Tower(nn.Module):
    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model, self.name)(x)


@pytest.fixture(params=["whole", *map(slow_case, list(VARIANTS)[1:])])
def variant(request):
    return request.param


@pytest.fixture
def model(tmp_path, variant):
    config = tiny_config(tmp_path, tiny_clip(layers=2, context_length=24)).replace(**VARIANTS[variant])
    return stirred(build(config)).eval()


def batches(model, name):
    """Inputs of a tower in several batch sizes, with captions of several lengths."""
    words = ["a", "woman", "in", "a", "long", "red", "coat", "with", "a", "bag"]
    if name == "encode_image":
        return [torch.randn(size, 3, 48, 16) for size in BATCHES]
    return [model.tokenizer([" ".join(words[: 2 + 2 * i]) for i in range(size)]) for size in BATCHES]


@pytest.mark.parametrize("name", [slow_case("encode_image"), "encode_text"])
@torch.no_grad()
def test_export_with_any_batch_size(model, name):
    tower, (example, *others) = Tower(model, name), batches(model, name)
    sizes = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(tower, (example,), dynamic_shapes=(sizes,)).module()
    for x in (example, *others):
        torch.testing.assert_close(exported(x), tower(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["encode_image", "encode_text"])
@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns of every check of a shape
@torch.no_grad()
def test_a_trace_takes_other_batches_and_captions(model, name):
    tower, (example, *others) = Tower(model, name), batches(model, name)
    traced = torch.jit.trace(tower, example, check_trace=False)
    for x in (example, *others):
        torch.testing.assert_close(traced(x), tower(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # deprecated
@torch.no_grad()
def test_quantised_linear_layers(model):
    images, tokens = inputs()
    tokens = nn.functional.pad(tokens, (0, 12))
    for dtype, least in ((torch.qint8, 0.99), (torch.float16, 0.9999)):
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=dtype)
        first = quantised.image_blocks[0].mlp.c_fc
        assert type(first) is not nn.Linear
        for name, x in (("encode_image", images), ("encode_text", tokens)):
            cosine = torch.cosine_similarity(getattr(quantised, name)(x), getattr(model, name)(x))
            assert cosine.min() > least and not torch.equal(getattr(quantised, name)(x), getattr(model, name)(x))


class Twice(nn.Module):
    """A layer that another library has put in the place of nn.Linear."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize("variant", ["whole"], indirect=True)
@torch.no_grad()
def test_a_replaced_layer_is_called(model):
    images, _ = inputs()
    other = copy.deepcopy(model)
    for block in other.blocks():
        block.mlp.c_fc.weight.mul_(2)
        block.mlp.c_fc.bias.mul_(2)
    for block in model.blocks():
        block.mlp.c_fc = Twice(block.mlp.c_fc)
    torch.testing.assert_close(model.encode_image(images), other.encode_image(images))


@pytest.mark.parametrize("name", ["encode_image", slow_case("encode_text")])
@pytest.mark.parametrize("variant", ["whole", slow_case("kernels"), slow_case("prompts")], indirect=True)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs kernels sample after sample
def test_gradients_of_each_sample(model, name, variant):
    model.double()
    tower, x = Tower(model, name), batches(model, name)[0]
    x = x.double() if x.is_floating_point() else x
    trained = {key: parameter for key, parameter in tower.named_parameters() if parameter.requires_grad}

    def loss(parameters, x):
        return functional_call(tower, parameters, (x[None],)).square().sum()

    of_each = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(
            tower(x[i : i + 1]).square().sum(), list(trained.values()), allow_unused=True, materialize_grads=True
        )
        one = grad(loss)(trained, x[i])
        for key, gradient in zip(trained, expected, strict=True):
            torch.testing.assert_close(of_each[key][i], gradient, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(one[key], gradient, rtol=1e-9, atol=1e-11)

    if variant == "kernels":
        return
    key = next(key for key, gradient in zip(trained, expected, strict=True) if gradient.any() and gradient.dim() < 2)
    own, tangent = trained[key].detach(), torch.randn_like(trained[key])

    def part(value):
        return loss(trained | {key: value}, x[-1])

    torch.testing.assert_close(jvp(part, (own,), (tangent,))[1], (grad(part)(own) * tangent).sum())
    step = 1e-5 * tangent
    product = (grad(part)(own + step) - grad(part)(own - step)) / 2e-5
    found = hessian(part)(own)
    torch.testing.assert_close(found @ tangent if own.dim() else found * tangent, product, rtol=1e-5, atol=1e-7)
