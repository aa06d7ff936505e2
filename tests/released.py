"""What comparisons with released codes share: golden files, ViT-B/16 in float64 with their weights, and the bounds.

tests/golden/README.md describes the files. A recipe draws the weights and inputs, numpy alone.
"""

import importlib.util
from pathlib import Path

import numpy as np
import open_clip
import torch

from upperson import AdaptedCLIP
from upperson.losses.pairs import sdm_loss
from upperson.model.backbone import fit_image_size

GOLDEN = Path(__file__).parent / "golden"
FEATURE_BOUND = 1e-9
GRADIENT_BOUND = 1e-7


def recipe_in(folder):
    """The module recipe.py of a folder."""
    spec = importlib.util.spec_from_file_location(f"recipe_of_{folder.name}", folder / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def weights_of(recipe, configuration):
    """CLIP's weights by open_clip's names and the trained ones by neutral names, float64."""
    shapes = recipe.clip_shapes(), recipe.petl_shapes(**recipe.CONFIGS[configuration])
    return [{name: torch.from_numpy(w) for name, w in recipe.weights(configuration, part).items()} for part in shapes]


def adapted(config, weights):
    """The model of a configuration on ViT-B/16 with these weights of CLIP, float64."""
    clip = open_clip.create_model("ViT-B-16-quickgelu")
    fit_image_size(clip.visual, (384, 128))
    clip.double().load_state_dict({"logit_scale": clip.logit_scale, **weights})
    return AdaptedCLIP(config, clip).double()


def set_parameters(parameters, values):
    """Copies the values, which have the same names, into the parameters."""
    assert sorted(parameters) == sorted(values)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def assert_probes(recipe, numbers, configuration, shapes):
    """The first eight numbers of every probed array, as drawn here, are the golden ones."""
    probes = [key.removeprefix("probe/") for key in numbers.files if key.startswith("probe/")]
    assert probes
    for name in probes:
        drawn = (
            recipe.images(configuration)
            if name == "input/images"
            else recipe.draw(configuration, name, shapes[name], *recipe.std_mean(name, shapes[name]))
        )
        assert np.array_equal(drawn.reshape(-1)[:8], numbers[f"probe/{name}"].reshape(-1))


def assert_near(name, value, expected, bound):
    value, expected = np.asarray(value), np.asarray(expected)
    error = np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert value.shape == expected.shape and error < bound, f"{name}: relative error {error:.1e}"


def assert_three_steps(model, batch, numbers, recipe, optimizer, neutral_name):
    """Features, gradients, the losses of three optimizer steps and what these change are those of a golden file."""
    images, tokens, person_ids = batch
    parameters = model.trained_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
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
                assert_near(
                    f"gradient of {name}",
                    recipe.summary(parameter.grad),
                    numbers[f"grad/{neutral_name(name)}"],
                    GRADIENT_BOUND,
                )
        optimizer.step()

    assert_near("loss", losses[0], numbers["sdm_loss"], GRADIENT_BOUND)
    assert_near("losses of three steps", losses, numbers["traj/sdm_loss"], GRADIENT_BOUND)
    for name, parameter in parameters.items():
        change = recipe.short_summary((parameter - start[name]).detach())
        assert_near(f"change of {name}", change, numbers[f"traj/delta/{neutral_name(name)}"], GRADIENT_BOUND)
