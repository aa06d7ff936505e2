"""The whole model against numbers of the released UP-Person code, in float64 (tests/golden/README.md).

Numbers of the "cuhk" configuration are here. The two others, of other depths and ranks, are compared with the formulas
of the golden README written out on the same recipe; that they are written out rightly is checked on "cuhk".
"""

import pytest
import torch
import torch.nn.functional as F
from released import (
    FEATURE_BOUND,
    GRADIENT_BOUND,
    adapted,
    assert_near,
    assert_probes,
    assert_three_steps,
    set_parameters,
    weights_of,
)

from upperson import ModelConfig, TrainConfig
from upperson.train.optimizer import build_optimizer


def neutral_name(name):
    """image.blocks.0.prefix.key_scale → image.blocks.0.prefix_key_scale, as the golden files spell it."""
    return name.replace(".prefix.", ".prefix_").replace(".lora.", ".lora_")


def build(recipe, configuration, weights, petl):
    settings = dict(recipe.CONFIGS[configuration])
    settings["lora_rank"] = settings.pop("rank")
    config = ModelConfig("ViT-B-16-quickgelu", "none", (384, 128), backend="torch").replace(**settings)
    model = adapted(config, weights)
    set_parameters({neutral_name(name): p for name, p in model.trained_parameters().items()}, petl)
    return model


@pytest.fixture(scope="module")
def model(recipe):
    return build(recipe, "cuhk", *weights_of(recipe, "cuhk"))


def written_out(weights, petl, images, tokens):
    """Image and text features from the formulas of the golden README, sections 1 and 2."""

    def layer_norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def blocks(x, tower, transformer, heads, mask):
        for i in range(12):

            def w(name, i=i):
                return weights[f"{transformer}.resblocks.{i}.{name}"]

            def p(name, i=i):
                return petl[f"{tower}.blocks.{i}.{name}"]

            def adapter(which, x, i=i, p=p):
                if f"{tower}.blocks.{i}.{which}.scale" not in petl:
                    return 0
                hidden = torch.relu(x @ p(f"{which}.down_weight").t() + p(f"{which}.down_bias"))
                return p(f"{which}.scale") * (hidden @ p(f"{which}.up_weight").t() + p(f"{which}.up_bias"))

            name = f"{transformer}.resblocks.{i}"
            y = layer_norm(x, f"{name}.ln_1") + adapter("adapter_attn", x)
            w_q, w_k, w_v = w("attn.in_proj_weight").chunk(3)
            b_q, b_k, b_v = w("attn.in_proj_bias").chunk(3)
            if f"{tower}.blocks.{i}.lora_key_up" in petl:
                w_k = w_k + p("lora_key_scale") * p("lora_key_up") @ p("lora_key_down")
                w_v = w_v + p("lora_value_scale") * p("lora_value_up") @ p("lora_value_down")
            q, k, v = (y @ matrix.t() + bias for matrix, bias in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
            prefix = f"{tower}.blocks.{i}.prefix_key" in petl
            if prefix:
                key, value = p("prefix_key_scale") * p("prefix_key"), p("prefix_value_scale") * p("prefix_value")
                k, v = (torch.cat([new.expand(len(x), -1, -1), old], 1) for new, old in ((key, k), (value, v)))
            q, k, v = (t.unflatten(2, (heads, 64)).transpose(1, 2) for t in (q, k, v))
            columns = k.shape[2] - q.shape[2]
            seen = F.pad(mask(x.shape[1]), (columns, 0), value=True)
            attention = (q @ k.transpose(2, 3) / 8).masked_fill(~seen, -torch.inf).softmax(3)
            if prefix:
                attention[..., :columns] *= p("prefix_scale")
            mixed = (attention @ v).transpose(1, 2).flatten(2)
            x = x + mixed @ w("attn.out_proj.weight").t() + w("attn.out_proj.bias")
            y = layer_norm(x, f"{name}.ln_2") + adapter("adapter_mlp", x)
            hidden = y @ w("mlp.c_fc.weight").t() + w("mlp.c_fc.bias")
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            x = x + hidden @ w("mlp.c_proj.weight").t() + w("mlp.c_proj.bias")
        return x

    patches = F.conv2d(images, weights["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(images), 1, -1), patches], 1)
    x = layer_norm(x + weights["visual.positional_embedding"], "visual.ln_pre")
    x = blocks(x, "image", "visual.transformer", 12, lambda n: torch.ones(n, n, dtype=torch.bool))
    image_features = layer_norm(x[:, 0], "visual.ln_post") @ weights["visual.proj"]
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    x = blocks(x, "text", "transformer", 8, lambda n: torch.ones(n, n, dtype=torch.bool).tril())
    ends = layer_norm(x[torch.arange(len(x)), tokens.argmax(1)], "ln_final")
    return image_features, ends @ weights["text_projection"]


@pytest.fixture(scope="module")
def batch(recipe, golden):
    images = torch.from_numpy(recipe.images("cuhk"))
    tokens = torch.from_numpy(golden("cuhk")["caption_ids"])
    return images, tokens, torch.from_numpy(recipe.PIDS)


def test_recipe_stream_is_the_golden_one(recipe, golden):
    shapes = recipe.clip_shapes() | recipe.petl_shapes(**recipe.CONFIGS["cuhk"]) | recipe.other_shapes()
    assert_probes(recipe, golden("cuhk"), "cuhk", shapes)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("configuration", "count"), [("cuhk", 7_419_816), ("rstp", 6_191_016), ("mixed", 4_428_210)])
def test_features_by_depth_and_rank(recipe, golden, batch, configuration, count):
    images = torch.from_numpy(recipe.images(configuration)[:2])
    weights, petl = weights_of(recipe, configuration)
    assert sum(w.numel() for w in petl.values()) == count
    written = written_out(weights, petl, images, batch[1][:2])
    if configuration == "cuhk":
        found = (torch.from_numpy(golden("cuhk")[f"{side}_features"][:2]) for side in ("image", "text"))
    else:
        model = build(recipe, configuration, weights, petl)
        found = model.encode_image(images), model.encode_text(batch[1][:2])
    for side, features, expected in zip(("image", "text"), found, written, strict=True):
        assert_near(f"{configuration}, {side} features", features, expected, FEATURE_BOUND)


def test_tokens(model, recipe, batch):
    assert torch.equal(model.tokenizer(recipe.CAPTIONS), batch[1])


def test_number_of_trained_parameters(model):
    assert sum(p.numel() for p in model.trained_parameters().values()) == 7_419_816
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in model.trained_parameters().values()
    }


def test_features_of_both_towers_and_gradients_of_the_text_tower(model, batch, golden, recipe):
    """The part of a golden step that takes a second: its loss gives the gradients of the features."""
    images, tokens, _ = batch
    numbers = golden("cuhk")
    with torch.no_grad():
        assert_near("image features", model.encode_image(images[:2]), numbers["image_features"][:2], FEATURE_BOUND)
    parameters = {name: p for name, p in model.trained_parameters().items() if name.startswith("text.")}
    features = model.encode_text(tokens)
    assert_near("text features", features.detach(), numbers["text_features"], FEATURE_BOUND)
    outer = torch.from_numpy(numbers["grad_text_features"])
    gradients = torch.autograd.grad(features, list(parameters.values()), outer)
    assert len(gradients) == 252
    for name, gradient in zip(parameters, gradients, strict=True):
        expected = numbers[f"grad/{neutral_name(name)}"]
        assert_near(f"gradient of {name}", recipe.summary(gradient), expected, GRADIENT_BOUND)


@pytest.mark.slow
def test_features_gradients_and_three_steps(model, batch, golden, recipe):
    optimizer = build_optimizer(model.trained_parameters(), TrainConfig(learning_rate=1e-3))
    assert_three_steps(model, batch, golden("cuhk"), recipe, optimizer, neutral_name)
