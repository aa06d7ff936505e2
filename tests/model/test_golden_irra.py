"""The method of upperson/methods/irra.py against numbers of the released IRRA code, in float64
(tests/golden/irra/README.md).
"""

import numpy as np
import open_clip
import pytest
import torch
from released import FEATURE_BOUND, GOLDEN, GRADIENT_BOUND, assert_near, recipe_in, set_parameters

from upperson import AdaptedCLIP, preset
from upperson.losses.names import NOT_MASKED
from upperson.losses.objective import Objective
from upperson.model.backbone import fit_image_size
from upperson.train.optimizer import build_optimizer, build_schedule, require_names

# The heads' modules as they are called here, by the names of the golden files.
MODULES = {
    "mlm.head.0": "mlm.dense",
    "mlm.head.2": "mlm.ln_dense",
    "mlm.head.3": "mlm.vocabulary",
    "mlm.transformer.layers": "mlm.blocks",
    "self_attn": "attn",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "linear1": "mlp.c_fc",
    "linear2": "mlp.c_proj",
}


@pytest.fixture(scope="module")
def recipe():
    return recipe_in(GOLDEN / "irra")


@pytest.fixture(scope="module")
def numbers():
    return np.load(GOLDEN / "irra" / "irra.npz")


def neutral_name(name):
    """objective.mlm.transformer.layers.0.norm1.bias → mlm.blocks.0.ln_1.bias, as the golden files spell it."""
    name, head = name.removeprefix("objective."), name.startswith("objective.")
    for own, golden in MODULES.items() if head else ():
        name = name.replace(own, golden)
    return name


@pytest.fixture(scope="module")
def config():
    return preset("cuhk-pedes", "irra").replace(pretrained="none", backend="torch")


def goal(config, people, **changes):
    """The objective of the recipe, whose sdm and id read masked captions unless `changes` say otherwise."""
    options = dict(mask_captions=config.data.mask_captions, mlm_reads_padding=config.model.method.mlm_reads_padding)
    losses = config.train.losses
    return Objective(losses, config.train.temperature, 512, 49408, range(people), **options | changes)


def parameters_of(model, objective):
    return model.trained_parameters() | objective.trained_parameters()


@pytest.fixture(scope="module")
def built(recipe, config):
    """The model and the objective with the golden weights."""
    clip = open_clip.create_model("ViT-B-16-quickgelu")
    fit_image_size(clip.visual, (384, 128))
    model, objective = AdaptedCLIP(config.model, clip).double(), goal(config, recipe.PEOPLE).double()
    golden = recipe.weights("irra", recipe.clip_shapes() | recipe.head_shapes())
    parameters = {neutral_name(name): p for name, p in parameters_of(model, objective).items()}
    set_parameters(parameters, {name: torch.from_numpy(array) for name, array in golden.items()})
    return model, objective


@pytest.fixture(scope="module")
def batch(recipe, numbers):
    labels = torch.from_numpy(numbers["mlm_labels"])
    labels = labels.where(labels != 0, NOT_MASKED)
    return {
        "images": torch.from_numpy(recipe.images("irra")),
        "captions": torch.from_numpy(numbers["caption_ids"]),
        "person_ids": torch.from_numpy(recipe.PIDS),
        "masked_captions": torch.from_numpy(numbers["mlm_ids"]),
        "mask_labels": labels,
        "mask_positions": (labels != NOT_MASKED).nonzero(),
    }


def test_the_number_of_trained_parameters(recipe, config):
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-16-quickgelu", device="meta")
        model, objective = AdaptedCLIP(config.model, clip), goal(config, recipe.PEOPLE)
    parameters = parameters_of(model, objective)
    assert len(parameters) == 367 and sum(p.numel() for p in parameters.values()) == 194_535_419


def test_learning_rates_and_schedule(recipe, config, numbers):
    """Of each of the 367 arrays, by the released code's rules on names."""
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-16-quickgelu", device="meta")
        parameters = parameters_of(AdaptedCLIP(config.model, clip), goal(config, recipe.PEOPLE))
    settings = config.train
    require_names(parameters, settings)
    optimizer = build_optimizer(parameters, settings)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = zip(numbers["optim/lr"], numbers["optim/weight_decay"], strict=True)
    expected = dict(zip(map(str, numbers["optim/names"]), expected, strict=True))
    for name, parameter in parameters.items():
        assert rates[id(parameter)] == pytest.approx(expected.pop(neutral_name(name)), rel=1e-12), name
    assert not expected and optimizer.defaults["eps"] == numbers["optim/eps"]
    assert (settings.batch_size, settings.epochs, config.data.mask_captions) == (64, 60, True)

    groups = {"lr": 1e-5, "lr_bias": 2e-5, "lr_heads": 5e-5}
    optimizer = torch.optim.Adam([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": r} for r in groups.values()])
    schedule = build_schedule(optimizer, settings)
    for epoch in range(61):
        for group, key in zip(optimizer.param_groups, groups, strict=True):
            assert group["lr"] == pytest.approx(numbers[f"schedule/{key}"][epoch], rel=1e-9, abs=1e-15)
        optimizer.step()
        schedule.step()


@pytest.mark.slow
def test_features_losses_gradients_and_three_steps(built, batch, numbers, recipe, config, monkeypatch):
    model, objective = built
    features = {}

    def keep(name):
        """What the objective asks of the model, since a pass of ViT-B/16 takes seconds."""
        encode = getattr(model, name)

        def encode_and_keep(inputs):
            found = encode(inputs)
            features[name] = (found[0] if isinstance(found, tuple) else found).detach()
            return found

        monkeypatch.setattr(model, name, encode_and_keep)

    for name in ("encode_image_tokens", "encode_text", "encode_text_tokens"):
        keep(name)
    parameters = parameters_of(model, objective)
    start = {name: p.detach().clone() for name, p in parameters.items()}

    # As the released code trains: its data set masks the captions that sdm and id read, too.
    with torch.no_grad():
        _, losses = objective(model, batch | {"captions": batch["masked_captions"]})
    masked = features["encode_text_tokens"]
    assert_near("masked text features", masked, numbers["in_place/text_features"], FEATURE_BOUND)
    for name, loss in losses.items():
        assert_near(f"{name} of masked captions", loss, numbers[f"in_place/{name}_loss"], FEATURE_BOUND)

    # With unmasked captions for sdm and id, so that both passes through the text tower show.
    objective.mask_captions = False
    optimizer, found = build_optimizer(parameters, config.train), {"sdm": [], "id": [], "mlm": [], "total": []}
    for step in range(4):
        total, losses = objective(model, batch)
        for name, loss in (losses | {"total": total}).items():
            found[name].append(loss.item())
        if step == 3:
            break
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            image, text = features["encode_image_tokens"], features["encode_text"]
            assert_near("image features", image, numbers["image_features"], FEATURE_BOUND)
            assert_near("text features", text, numbers["text_features"], FEATURE_BOUND)
            for name, parameter in parameters.items():
                golden = numbers[f"grad/{neutral_name(name)}"]
                assert_near(f"gradient of {name}", recipe.summary(parameter.grad), golden, GRADIENT_BOUND)
            for name in ("token_embedding.weight", "mlm.vocabulary.weight", "id.weight"):
                key = f"grad_rows/{name}"
                (gradient,) = (p.grad for own, p in parameters.items() if neutral_name(own) == name)
                assert_near(key, gradient.norm(dim=1)[numbers[f"{key}/rows"]], numbers[f"{key}/norms"], GRADIENT_BOUND)
        optimizer.step()
    for name, values in found.items():
        assert_near(f"{name} losses of three steps", values, numbers[f"traj/{name}_loss"], GRADIENT_BOUND)
    for name, parameter in parameters.items():
        change = recipe.short_summary((parameter - start[name]).detach())
        assert_near(f"change of {name}", change, numbers[f"traj/delta/{neutral_name(name)}"], GRADIENT_BOUND)
