"""The method of upperson/methods/dm_adapter.py against numbers of the released DM-Adapter code, in float64
(tests/golden/dm_adapter/README.md).
"""

import numpy as np
import open_clip
import pytest
import torch
from released import (
    FEATURE_BOUND,
    GOLDEN,
    GRADIENT_BOUND,
    adapted,
    assert_near,
    assert_probes,
    recipe_in,
    set_parameters,
    weights_of,
)

from upperson import AdaptedCLIP, preset
from upperson.losses import objective
from upperson.losses.balance import balance_loss
from upperson.losses.objective import Objective
from upperson.train.optimizer import build_optimizer, build_schedule

OF_EXPERTS = ("down_weight", "down_bias", "up_weight", "up_bias")
UNREAD = 768 + 512 + 768 + 512 * 768 + 512  # parameters that the released code counts as trained and nothing reads


@pytest.fixture(scope="module")
def recipe():
    return recipe_in(GOLDEN / "dm_adapter")


@pytest.fixture(scope="module")
def numbers():
    return np.load(GOLDEN / "dm_adapter" / "dm_adapter.npz")


def neutral(name, tensor):
    """The parts of a parameter as the golden file spells them: ….mixture.task, and one array for each expert."""
    name = name.replace(".adapter_mlp.", ".mixture.")
    place, leaf = name.rsplit(".", 1)
    if leaf not in OF_EXPERTS:
        return {name: tensor}
    return {f"{place}.experts.{j}.{leaf}": part for j, part in enumerate(tensor)}


def all_neutral(tensors):
    return {name: part for key, tensor in tensors.items() for name, part in neutral(key, tensor).items()}


@pytest.fixture(scope="module")
def model(recipe):
    weights, petl = weights_of(recipe, "dm_adapter")
    config = preset("cuhk-pedes", "dm-adapter").model.replace(pretrained="none", backend="torch")
    model = adapted(config, weights)
    set_parameters(all_neutral(model.trained_parameters()), petl)
    return model


@pytest.fixture(scope="module")
def batch(recipe, numbers):
    return {
        "images": torch.from_numpy(recipe.images("dm_adapter")),
        "captions": torch.from_numpy(numbers["caption_ids"]),
        "person_ids": torch.from_numpy(recipe.PIDS),
    }


def test_recipe_stream_is_the_golden_one(recipe, numbers):
    shapes = recipe.clip_shapes() | recipe.petl_shapes(**recipe.CONFIGS["dm_adapter"])
    assert_probes(recipe, numbers, "dm_adapter", shapes)


def test_the_number_of_trained_parameters():
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-16-quickgelu", device="meta")
        model = AdaptedCLIP(preset("cuhk-pedes", "dm-adapter").model, clip)
    trained = sum(p.numel() for p in model.trained_parameters().values())
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad) == 15_669_528
    assert (UNREAD, trained + UNREAD) == (395_776, 16_065_304)


@pytest.mark.slow
def test_features_routes_gradients_and_three_steps(model, batch, numbers, recipe, monkeypatch):
    parameters = model.trained_parameters()
    settings = preset("cuhk-pedes", "dm-adapter").train
    optimizer = build_optimizer(parameters, settings)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = zip(numbers["optim/lr"], numbers["optim/weight_decay"], strict=True)
    own = {part: rates[id(p)] for name, p in parameters.items() for part in neutral(name, p)}
    assert own == dict(zip(map(str, numbers["optim/names"]), expected, strict=True))
    assert optimizer.defaults["eps"] == numbers["optim/eps"]

    goal = Objective(settings.losses, settings.temperature, 512, 49408, ())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    features, tallies = {}, []
    for side in ("image", "text"):
        encode = getattr(model, f"encode_{side}")
        monkeypatch.setattr(model, f"encode_{side}", lambda x, e=encode, s=side: features.setdefault(s, e(x)))
    monkeypatch.setattr(objective, "balance_loss", lambda t, k: tallies.append(t.detach()) or balance_loss(t, k))
    found = {"sdm": [], "aux": [], "total": []}
    for step in range(4):
        features.clear()
        total, losses = goal(model, batch)
        for name, loss in (("sdm", losses["sdm"]), ("aux", 0.5 * losses["balance"]), ("total", total)):
            found[name].append(loss.item())
        if step == 3:
            break
        optimizer.zero_grad()
        for side in features:
            features[side].retain_grad()
        total.backward()
        if step == 0:
            for side in ("image", "text"):
                assert_near(f"{side} features", features[side].detach(), numbers[f"{side}_features"], FEATURE_BOUND)
                assert_near(side, features[side].grad, numbers[f"grad_{side}_features"], GRADIENT_BOUND)
            for name, gradient in all_neutral({name: p.grad for name, p in parameters.items()}).items():
                golden = numbers[f"grad/{name}"]
                if golden.any():
                    assert_near(f"gradient of {name}", recipe.summary(gradient), golden, GRADIENT_BOUND)
                else:  # of an expert that no token chose
                    assert not gradient.any(), name
        optimizer.step()

    for name, values in found.items():
        assert_near(f"{name} losses of three steps", values, numbers[f"traj/{name}_loss"], GRADIENT_BOUND)
    for name, change in all_neutral({name: (p - start[name]).detach() for name, p in parameters.items()}).items():
        golden = numbers[f"traj/delta/{name}"]
        assert_near(f"change of {name}", recipe.short_summary(change), golden, GRADIENT_BOUND)
    # All tokens of all blocks chose the experts of the released code, padding included.
    choices = torch.stack(tallies)[:, :, 1].unflatten(1, (2, 12)).numpy()
    for i, (tower, tokens) in enumerate((("image", 193), ("text", 77))):
        assert np.array_equal(choices[:, i], numbers[f"traj/{tower}_counts"])
        probabilities = tallies[0][12 * i : 12 * i + 12, 0] / (8 * tokens)
        assert_near("probabilities", probabilities, numbers[f"routing/{tower}_mean_probability"], FEATURE_BOUND)
        assert balance_loss(tallies[0][12 * i : 12 * i + 12], 2).item() == pytest.approx(
            numbers[f"routing/{tower}_aux"].sum(), rel=1e-12
        )


def test_the_schedule(numbers):
    settings = preset("cuhk-pedes", "dm-adapter").train
    parameters = {"weight": torch.nn.Parameter(torch.zeros(2)), "bias": torch.nn.Parameter(torch.zeros(2))}
    optimizer = build_optimizer(parameters, settings)
    schedule = build_schedule(optimizer, settings)
    for epoch in range(61):
        for group, key in zip(optimizer.param_groups, ("lr", "lr_bias"), strict=True):
            assert group["lr"] == pytest.approx(numbers[f"schedule/{key}"][epoch], rel=1e-9, abs=1e-15)
        optimizer.step()
        schedule.step()
