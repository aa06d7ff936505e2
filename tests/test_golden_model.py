"""The whole model against numbers of the released UP-Person code, in float64 (tests/golden/README.md)."""

import numpy as np
import open_clip
import pytest
import torch

from upperson import ModelConfig, TrainConfig, UPPerson
from upperson.losses import sdm_loss
from upperson.model.backbone import fit_image_size
from upperson.optimization import build_optimizer

FEATURE_BOUND = 1e-9
GRADIENT_BOUND = 1e-7


def neutral_name(name):
    """image.blocks.0.prefix.key_scale → image.blocks.0.prefix_key_scale, as the golden files spell it."""
    return name.replace(".prefix.", ".prefix_").replace(".lora.", ".lora_")


@pytest.fixture(scope="module")
def model(recipe):
    clip = open_clip.create_model("ViT-B-16-quickgelu")
    fit_image_size(clip.visual, (384, 128))
    weights = {name: torch.from_numpy(w) for name, w in recipe.weights("cuhk", recipe.clip_shapes()).items()}
    clip.double().load_state_dict({"logit_scale": clip.logit_scale, **weights})
    config = ModelConfig(model="ViT-B-16-quickgelu", pretrained="none", image_size=(384, 128), backend="torch")
    model = UPPerson(config, clip).double()

    parameters = model.trained_parameters()
    settings = dict(recipe.CONFIGS["cuhk"])
    petl = recipe.weights("cuhk", recipe.petl_shapes(**settings))
    assert sorted(map(neutral_name, parameters)) == sorted(petl)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(petl[neutral_name(name)]))
    return model


@pytest.fixture(scope="module")
def batch(recipe, golden):
    images = torch.from_numpy(recipe.images("cuhk"))
    tokens = torch.from_numpy(golden("cuhk")["caption_ids"])
    return images, tokens, torch.from_numpy(recipe.PIDS)


def assert_near(name, value, expected, bound):
    value, expected = np.asarray(value), np.asarray(expected)
    error = np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert value.shape == expected.shape and error < bound, f"{name}: relative error {error:.1e}"


def test_recipe_stream_is_the_golden_one(recipe, golden):
    numbers = golden("cuhk")
    weights = {**recipe.clip_shapes(), **recipe.petl_shapes(**recipe.CONFIGS["cuhk"]), **recipe.other_shapes(),
               "input/images": (8, 3, 384, 128)}
    probes = [key for key in numbers.files if key.startswith("probe/")]
    assert probes
    for key in probes:
        name = key.removeprefix("probe/")
        drawn = recipe.images("cuhk") if name == "input/images" else recipe.weights("cuhk", {name: weights[name]})[name]
        assert np.array_equal(drawn.reshape(-1)[:8], numbers[key].reshape(-1))


def test_tokens(model, recipe, batch):
    assert torch.equal(model.tokenizer(recipe.CAPTIONS), batch[1])


def test_number_of_trained_parameters(model):
    assert sum(p.numel() for p in model.trained_parameters().values()) == 7_419_816
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in
                                                                      model.trained_parameters().values()}


def test_features_gradients_and_three_steps(model, batch, golden, recipe):
    numbers = golden("cuhk")
    images, tokens, person_ids = batch
    parameters = model.trained_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = build_optimizer(parameters, TrainConfig(learning_rate=1e-3))

    losses = []
    for step in range(4):
        with torch.set_grad_enabled(step < 3):
            image_features, text_features = model.encode_image(images), model.encode_text(tokens)
            loss = sdm_loss(image_features, text_features, person_ids)
        losses.append(loss.item())
        if step == 3:
            break
        optimizer.zero_grad()
        image_features.retain_grad()
        text_features.retain_grad()
        loss.backward()
        if step == 0:
            assert_near("image features", image_features.detach(), numbers["image_features"], FEATURE_BOUND)
            assert_near("text features", text_features.detach(), numbers["text_features"], FEATURE_BOUND)
            assert_near("image feature gradient", image_features.grad, numbers["grad_image_features"], GRADIENT_BOUND)
            assert_near("text feature gradient", text_features.grad, numbers["grad_text_features"], GRADIENT_BOUND)
            for name, parameter in parameters.items():
                assert_near(f"gradient of {name}", recipe.summary(parameter.grad),
                            numbers[f"grad/{neutral_name(name)}"], GRADIENT_BOUND)
        optimizer.step()

    assert_near("loss", losses[0], numbers["sdm_loss"], GRADIENT_BOUND)
    assert_near("losses of three steps", losses, numbers["traj/sdm_loss"], GRADIENT_BOUND)
    for name, parameter in parameters.items():
        change = recipe.short_summary((parameter - start[name]).detach())
        assert_near(f"change of {name}", change, numbers[f"traj/delta/{neutral_name(name)}"], GRADIENT_BOUND)
