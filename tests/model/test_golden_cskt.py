"""The method of upperson/methods/cskt.py against numbers of the released CSKT code, in float64
(tests/golden/cskt/README.md).

Those are of the released configuration. Other depths and numbers of prompts are compared with the formulas of that page
written out, token by token as the released code computes them; that they are written out rightly is checked against the
same numbers. There prompts are tokens of every image and every caption; here they are shared by the batch.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from released import (
    FEATURE_BOUND,
    GOLDEN,
    GRADIENT_BOUND,
    adapted,
    assert_near,
    assert_probes,
    assert_three_steps,
    recipe_in,
    set_parameters,
    weights_of,
)

from upperson import ModelConfig, preset
from upperson.model.captions import words_of
from upperson.train.optimizer import build_optimizer, build_schedule


@pytest.fixture(scope="module")
def recipe():
    return recipe_in(GOLDEN / "cskt")


@pytest.fixture(scope="module")
def numbers():
    return np.load(GOLDEN / "cskt" / "cskt.npz")


def neutral_name(name):
    """….prompt.projection.weight → ….prompt_projection.weight, as the golden files spell it."""
    return name.replace(".prompt.tokens", ".prompt").replace(".prompt.projection", ".prompt_projection")


def build(recipe, configuration, weights, petl, **changes):
    settings = recipe.CONFIGS[configuration]
    config = ModelConfig("ViT-B-16-quickgelu", "none", (384, 128), backend="torch").replace(
        method="cskt", prompt_length=settings["n"], depth_prompt=settings["depth"], **changes
    )
    model = adapted(config, weights)
    set_parameters({neutral_name(name): p for name, p in model.trained_parameters().items()}, petl)
    return model


@pytest.fixture(scope="module")
def model(recipe):
    return build(recipe, "cskt", *weights_of(recipe, "cskt"))


@pytest.fixture(scope="module")
def batch(recipe, numbers):
    return (
        torch.from_numpy(recipe.images("cskt")),
        torch.from_numpy(numbers["caption_ids"]),
        torch.from_numpy(recipe.PIDS),
    )


def edited(tokens, m):
    """The caption edit and the positions that are pooled, from section 2, one caption at a time."""
    ids, ends = torch.zeros_like(tokens), []
    for row, caption in zip(ids, tokens, strict=True):
        end = caption.argmax().item()
        words = caption[1:end][: 75 - m]
        row[0], row[1 + m : 1 + m + len(words)] = caption[0], words
        ends.append(1 + m + len(words))
        row[ends[-1]] = caption[end]
    return ids, torch.tensor(ends)


def written_out(recipe, weights, petl, images, tokens, n, depth):
    """Image and text features from the formulas of section 2, and the outputs of blocks by "{tower}_block{i}"."""
    m, outputs = 2 * n, {}

    def layer_norm(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def rows(tower, i):
        def carried(other):
            name = f"{other}.blocks.{i}.prompt"
            return petl[name] @ petl[f"{name}_projection.weight"].t() + petl[f"{name}_projection.bias"]

        text = petl[f"text.blocks.{i}.prompt"] if tower == "text" else carried("text")
        image = petl[f"image.blocks.{i}.prompt"] if tower == "image" else carried("image")
        return torch.cat([text, image])

    def blocks(x, tower, transformer, heads, first, causal):
        for i in range(12):

            def w(name, i=i):
                return weights[f"{transformer}.resblocks.{i}.{name}"]

            def p(name, i=i):
                return petl[f"{tower}.blocks.{i}.adapter_mlp.{name}"]

            if 1 <= i < depth:
                x = torch.cat([x[:, :first], rows(tower, i).expand(len(x), -1, -1), x[:, first + m :]], 1)
            y = layer_norm(x, w("ln_1.weight"), w("ln_1.bias"))
            q, k, v = (
                (y @ matrix.t() + bias).unflatten(2, (heads, 64)).transpose(1, 2)
                for matrix, bias in zip(w("attn.in_proj_weight").chunk(3), w("attn.in_proj_bias").chunk(3), strict=True)
            )
            scores = q @ k.transpose(2, 3) / 8
            if causal:
                scores = scores + torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype).triu(1)
            mixed = (scores.softmax(3) @ v).transpose(1, 2).flatten(2)
            x = x + mixed @ w("attn.out_proj.weight").t() + w("attn.out_proj.bias")
            hidden = layer_norm(x, w("ln_2.weight"), w("ln_2.bias")) @ w("mlp.c_fc.weight").t() + w("mlp.c_fc.bias")
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            z = layer_norm(x, p("norm_weight"), p("norm_bias"))
            adapter = torch.relu(z @ p("down_weight").t() + p("down_bias")) @ p("up_weight").t() + p("up_bias")
            x = x + hidden @ w("mlp.c_proj.weight").t() + w("mlp.c_proj.bias") + recipe.ADAPTER_SCALE[tower] * adapter
            outputs[f"{tower}_block{i}"] = x
        return x

    patches = F.conv2d(images, weights["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(images), 1, -1), patches], 1)
    x = torch.cat([x + weights["visual.positional_embedding"], rows("image", 0).expand(len(images), -1, -1)], 1)
    x = layer_norm(x, weights["visual.ln_pre.weight"], weights["visual.ln_pre.bias"])
    x = blocks(x, "image", "visual.transformer", 12, 193, causal=False)
    image = layer_norm(x[:, 0], weights["visual.ln_post.weight"], weights["visual.ln_post.bias"])
    ids, ends = edited(tokens, m)
    x = weights["token_embedding.weight"][ids]
    x = torch.cat([x[:, :1], rows("text", 0).expand(len(x), -1, -1), x[:, 1 + m :]], 1)
    x = blocks(x + weights["positional_embedding"], "text", "transformer", 8, 1, causal=True)
    text = layer_norm(x[torch.arange(len(x)), ends], weights["ln_final.weight"], weights["ln_final.bias"])
    return image @ weights["visual.proj"], text @ weights["text_projection"], outputs


def test_recipe_stream_is_the_golden_one(recipe, numbers):
    assert_probes(recipe, numbers, "cskt", recipe.clip_shapes() | recipe.petl_shapes(**recipe.CONFIGS["cskt"]))


@pytest.mark.slow
def test_the_number_of_trained_parameters(model):
    assert len(model.trained_parameters()) == 216
    assert sum(p.numel() for p in model.trained_parameters().values()) == 12_117_888
    trained = {id(p) for p in model.trained_parameters().values()}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("n", [2, 4])
def test_the_caption_edit(n):
    """Words and end tokens are where the released code puts them, for every length of a caption."""
    shift = np.load(GOLDEN / "cskt" / "shift.npz")
    tokens, expected = torch.from_numpy(shift["ids"]), torch.from_numpy(shift[f"n{n}/ids"])
    words = words_of(tokens, 76 - 2 * n)
    assert torch.equal(words, expected[:, 1 + 2 * n :])  # before them: start token, placeholders
    assert torch.equal(words.argmax(1) + 1 + 2 * n, torch.from_numpy(shift[f"n{n}/pool_position"]))
    ids, ends = edited(tokens, 2 * n)
    assert torch.equal(ids[:, 1 + 2 * n :], expected[:, 1 + 2 * n :]) and torch.equal(ends, words.argmax(1) + 1 + 2 * n)


@pytest.mark.slow
def test_captions_are_cut_alike_by_the_tokenizer(model, recipe, batch, numbers):
    """What the training loader gives has room for the prompts already."""
    tokens = model.tokenizer(recipe.CAPTIONS, context_length=model.caption_length)
    assert tokens.shape == (8, 69)
    assert torch.equal(words_of(tokens, 68), words_of(batch[1], 68))
    assert torch.equal(words_of(batch[1], 68), torch.from_numpy(numbers["model_caption_ids"])[:, 9:])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), model.encode_text(batch[1]), rtol=0, atol=0)


@pytest.mark.slow
def test_features_gradients_and_three_steps(model, batch, numbers, recipe):
    parameters = model.trained_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    settings = preset("cuhk-pedes", "cskt").train
    optimizer = build_optimizer(parameters, settings)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    names = dict(
        zip(
            map(str, numbers["optim/names"]),
            zip(numbers["optim/lr"], numbers["optim/weight_decay"], strict=True),
            strict=True,
        )
    )
    assert {neutral_name(name): rates[id(p)] for name, p in parameters.items()} == names
    assert optimizer.defaults["eps"] == numbers["optim/eps"]

    assert_three_steps(model, batch, numbers, recipe, optimizer, neutral_name)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])


def test_the_schedule(numbers):
    settings = preset("cuhk-pedes", "cskt").train
    parameters = {"weight": torch.nn.Parameter(torch.zeros(2)), "bias": torch.nn.Parameter(torch.zeros(2))}
    optimizer = build_optimizer(parameters, settings)
    schedule = build_schedule(optimizer, settings)
    for epoch in range(61):
        for group, key in zip(optimizer.param_groups, ("lr", "lr_bias"), strict=True):
            assert group["lr"] == pytest.approx(numbers[f"schedule/{key}"][epoch], rel=1e-9, abs=1e-15)
        optimizer.step()
        schedule.step()


@pytest.mark.slow
@torch.no_grad()
def test_written_out_token_by_token_it_is_the_released_code(recipe, batch, numbers):
    """Block outputs too, of prompts as well: so the formulas below may stand for the released code."""
    images, tokens, _ = batch
    image, text, outputs = written_out(recipe, *weights_of(recipe, "cskt"), images[:2], tokens[:2], 4, 12)
    assert_near("image features", image, numbers["image_features"][:2], FEATURE_BOUND)
    assert_near("text features", text, numbers["text_features"][:2], FEATURE_BOUND)
    for tower, part, where in (
        ("image", "", slice(0, 4)),
        ("image", "_last8", slice(-8, None)),
        ("text", "", slice(0, 4)),
        ("text", "_1to9", slice(1, 10)),
    ):
        for i in (0, 5, 11):
            assert_near(
                f"{tower} block {i}{part}",
                outputs[f"{tower}_block{i}"][0, where],
                numbers[f"debug/{tower}_block{i}{part}"],
                FEATURE_BOUND,
            )


@pytest.fixture(scope="module")
def fewer(recipe, batch):
    """n = 2 to depth 9, written out: weights, inputs, features, and gradients of everything."""
    inputs = torch.from_numpy(recipe.images("cskt_b")[:2]), batch[1][5:7]  # one caption is cut
    weights, petl = weights_of(recipe, "cskt_b")
    for parameter in petl.values():
        parameter.requires_grad_()
    *features, _ = written_out(recipe, weights, petl, *inputs, 2, 9)
    gradients = torch.autograd.grad((features[0] * features[1]).sum(), petl.values())
    return weights, petl, inputs, [side.detach() for side in features], gradients


@pytest.mark.slow
@pytest.mark.parametrize("switches", [dict(), dict(skip_unread=False, pack_captions=False)], ids=["shared", "plain"])
def test_fewer_prompts_in_fewer_layers(recipe, fewer, switches):
    """Above depth 9 prompts run on as tokens."""
    weights, petl, (images, tokens), features, expected = fewer
    model = build(recipe, "cskt_b", weights, petl, **switches)
    parameters = {neutral_name(name): p for name, p in model.trained_parameters().items()}
    assert sum(p.numel() for p in parameters.values()) == 9_716_352
    found = model.encode_image(images), model.encode_text(tokens)
    for side, ours, wanted in zip(("image", "text"), found, features, strict=True):
        assert_near(f"{side} features", ours.detach(), wanted, FEATURE_BOUND)
    gradients = torch.autograd.grad((found[0] * found[1]).sum(), [parameters[name] for name in petl])
    for name, ours, wanted in zip(petl, gradients, expected, strict=True):
        assert_near(f"gradient of {name}", ours, wanted, GRADIENT_BOUND)
