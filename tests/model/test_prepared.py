"""Frozen weights that are kept in the dtype of the computation, and what is then computed for a whole tower at once."""

import pytest
import torch
from operators import slow_case
from tiny import NOTHING, VARIANTS, build, inputs, stirred
from torch.utils._python_dispatch import TorchDispatchMode

from upperson.losses.pairs import sdm_loss

PERSON_IDS = torch.tensor([0, 1, 1, 2])
WHOLE = dict(prefix="salable", lora="lora", adapter_attn="l-parallel", adapter_mlp="l-parallel")


def results(config, kept, dtype=torch.float64, autocast=None):
    """Features, loss and gradients, with weights that are kept in the dtype of the computation or not."""
    model = stirred(build(config).to(dtype))
    if kept:
        model.keep_frozen_weights(autocast or dtype)
    images, tokens = inputs(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        features = model.encode_image(images), model.encode_text(tokens)
        loss = sdm_loss(*features, PERSON_IDS)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.trained_parameters().items()}
    return {"images": features[0], "captions": features[1], "loss": loss} | gradients


@pytest.mark.parametrize(
    "variant",
    [
        WHOLE,
        dict(method="cskt", prompt_length=2),
        dict(method="dm-adapter", experts=3),
        dict(method="full"),
        *map(slow_case, VARIANTS),
    ],
    ids=lambda variant: "-".join(map(str, variant.values())),
)
def test_the_same_results(tiny, variant):
    config = tiny.replace(**({} if "method" in variant else NOTHING) | variant)
    if not build(config).trained_parameters():
        pytest.skip("nothing is trained")
    found, expected = results(config, True), results(config, False)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_under_autocast_no_frozen_tensor_is_cast_and_features_are_as_exact(tiny):
    """Both differ from float64 by bfloat16's rounding; frozen weights are rounded once more where LoRA is merged."""
    exact = results(tiny, False)
    cast, kept = (results(tiny, kept, torch.float32, torch.bfloat16) for kept in (False, True))
    for name in ("images", "captions"):
        errors = [float((found[name].double() - exact[name]).norm() / exact[name].norm()) for found in (cast, kept)]
        assert errors[1] < 1.5 * errors[0] and errors[1] < 0.05, errors
    for name, gradient in kept.items():
        if name not in ("images", "captions", "loss"):
            assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name


def test_trained_weights_and_layernorms_stay_in_float32(tiny):
    model = build(tiny)
    model.keep_frozen_weights(torch.bfloat16)
    block = model.image_blocks[0]
    assert (
        block.attn.in_proj_weight.dtype
        == block.mlp.c_fc.weight.dtype
        == block.attn.in_proj_bias.dtype
        == torch.bfloat16
    )
    assert block.ln_1.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in model.trained_parameters().values()} == {torch.float32}
    full = build(tiny.replace(method="full"))
    full.keep_frozen_weights(torch.bfloat16)
    assert {parameter.dtype for parameter in full.trained_parameters().values()} == {torch.float32}


def test_a_pass_takes_fewer_operators(tiny):
    class Casts(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.casts = self.all = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.casts += function is torch.ops.aten._to_copy.default
            self.all += 1
            return function(*args, **(kwargs or {}))

    images, _ = inputs()
    found = []
    for kept in (False, True):
        model = build(tiny)
        if kept:
            model.keep_frozen_weights(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16), Casts() as counted:
            model.encode_image(images)
        found.append(counted)
    cast, kept = found
    assert cast.casts - kept.casts >= 6 * 3  # weights and biases of three blocks
    assert kept.all < cast.all


def test_blocks_that_are_moved_apart_compute_the_same(tiny):
    """Only the modules of a row of blocks are stacked; others compute their own."""
    config = tiny.replace(**WHOLE)
    model, other = (stirred(build(config)) for _ in range(2))
    for changed in (model, other):
        changed.image_blocks[1].set_modules(
            None, None, changed.image_blocks[1].adapter_attn, changed.image_blocks[1].adapter_mlp
        )
    model.keep_frozen_weights(torch.float32)
    images, _ = inputs()
    torch.testing.assert_close(model.encode_image(images), other.encode_image(images), rtol=1e-5, atol=1e-5)
