"""The methods: each trains, saves, loads and evaluates alike; a method is a file; prompts against their definition."""

import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from operators import DEVICE, EXACT, slow_case
from safetensors.torch import save_file
from tiny import TINY_CLIP, build, inputs, stirred, tiny_training, training_of, write_clip

from upperson import AdaptedCLIP, Config, ModelConfig, fit, preset
from upperson.data.splits import read_splits
from upperson.deploy.merge import main as merge_command
from upperson.deploy.switching import Adaptations
from upperson.errors import CheckpointError, MethodError
from upperson.evaluate.evaluation import evaluate_checkpoint
from upperson.fields import option
from upperson.methods import METHODS, Method, Place
from upperson.model.block import Stream
from upperson.model.captions import words_of
from upperson.model.checkpoint import load_checkpoint, load_model, save_checkpoint
from upperson.petl import PREFIXES

PROJECT = Path(__file__).parents[2]
PROMPTED = [
    dict(method="cskt", prompt_length=1),
    dict(method="cskt", prompt_length=2, depth_prompt=2, adapter_reduction=4),
    dict(method="cskt", prompt_length=3, depth_prompt=1, prompt_positions=False, adapters=False),
    dict(method="prompt-decoupling", prompt_length=3, stage="prompts"),
    dict(method="prompt-decoupling", prompt_length=5, depth_prompt=2, prompt_positions=False),
]


def words(changes):
    return "-".join(map(str, changes.values()))


@pytest.fixture
def tiny(tmp_path):
    """Three blocks a tower of another width each, captions of twelve tokens."""
    text = TINY_CLIP["text_cfg"] | dict(width=48, heads=3)
    return ModelConfig(write_clip(tmp_path, TINY_CLIP | dict(text_cfg=text)), "none", (48, 16), backend="torch")


# ---------------------------------------------------------------------------------------- a method is a file


def test_no_other_file_names_a_method():
    """Neither as a value nor as a class, nor the younger ones in prose; UP-Person is the project's own name as well.

    The formats of foreign checkpoints are named after the programs that write them.
    """
    own = [PROJECT / "upperson" / name for name in ("methods", "config/presets.py", "deploy/formats.py")]
    files = [path for folder in ("upperson", "kernels", "bench") for path in (PROJECT / folder).rglob("*.py")]
    files = [path for path in [*files, PROJECT / "train.py"] if not any(path.is_relative_to(each) for each in own)]
    assert len(files) > 60
    classes = {method.__name__ for method in METHODS.values()}
    for path in files:
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"cskt|prompt[-_ ]?decoupling|dm[-_ ]?adapter", source, re.IGNORECASE), path
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.STRING:
                assert token.string.strip("\"'") not in METHODS, f"{path}:{token.start[0]}"
            assert token.type != tokenize.NAME or token.string not in classes, f"{path}:{token.start[0]}"


def test_the_example_of_the_documentation(tmp_path):
    """A method in ten lines: the example on the page trains, and its checkpoint loads."""
    page = (PROJECT / "upperson" / "methods" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = [line for line in example.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(code) <= 10
    before = dict(METHODS)
    try:
        exec(example, {"__name__": "example"})
        (name,) = METHODS.keys() - before.keys()
        config = small(preset("embedded", name), tmp_path / "run")
        results, best = fit(config).results, tmp_path / "run" / "best.safetensors"
        trained = load_model(best).trained_parameters().values()
        assert results.trained_parameters == sum(p.numel() for p in trained) > 0
        assert load_model(best).config.method == config.model.method
    finally:
        METHODS.clear()
        METHODS.update(before)
    with pytest.raises(CheckpointError) as unknown:  # as in a command that does not import the example
        load_checkpoint(best)
    assert str(unknown.value) == (
        f"{best}: the configuration in the file does not fit this installation of upperson: method: '{name}' is not "
        f"allowed; expected one of {', '.join(before)}, or a method of your own, whose module must be imported first "
        "(upperson/methods/README.md shows the command)"
    )


@pytest.mark.slow
def test_commands_with_a_method_of_ones_own(tmp_path):
    """The commands on the page, on less data."""
    page = (PROJECT / "upperson" / "methods" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_method.py").write_text(example)
    train, evaluate = re.findall(r"^python -c .*my_method.*$", page, re.MULTILINE)
    less = "--embedded-identities 10 3 4 --epochs 1 --warmup-epochs 0 --batch-size 8 --workers 0 --backend torch"
    for line in (f"{train} {less}", evaluate):
        ended = subprocess.run(
            [sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0 and "lora-with-norms" in ended.stdout, ended.stderr


# ---------------------------------------------------------------------------------------- from data to results


def small(config, run_dir):
    changes = dict(
        embedded_identities=(10, 3, 4),
        embedded_views=2,
        epochs=1,
        warmup_epochs=0,
        batch_size=8,
        image_size=(64, 32),
        backend="torch",
        device="cpu",
        workers=0,
        run_dir=run_dir,
    )
    return config.replace(**changes)


@pytest.mark.parametrize("method", [name if name in ("up-person", "cskt") else slow_case(name) for name in METHODS])
def test_every_method_trains_saves_loads_and_evaluates(method, tmp_path, capsys):
    config = tiny_training(tmp_path, method, epochs=1, warmup_epochs=0, run_dir=tmp_path / "run")
    if config.model.method.stages():
        config = config.replace(encoder_epochs=1, encoder_warmup_epochs=0)
    results = fit(config).results
    assert results.method == config.model.method.title and results.text_to_image["R@10"] > 0
    best = tmp_path / "run" / "best.safetensors"
    checkpoint, model = load_checkpoint(best), load_model(best)
    for name, parameter in model.adaptation().items():
        assert torch.equal(parameter, checkpoint.parameters[name]), name
    assert bool(checkpoint.parameters) == config.model.method.trains
    again = evaluate_checkpoint(checkpoint, checkpoint.config.replace(run_dir=None), "test", tmp_path / "again")
    assert again.text_to_image == pytest.approx(results.text_to_image)
    assert again.method == results.method
    assert config.model.method.title in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        (dict(prompts=False), ("adapter_mlp",)),
        (dict(adapters=False), ("prompt",)),
        (dict(), ("prompt", "adapter_mlp")),
    ],
)
def test_parts_of_cskt(tiny, changes, trained):
    model = build(tiny.replace(method="cskt", prompt_length=2, **changes))
    assert {name.split(".")[3] for name in model.trained_parameters()} == set(trained)
    images, tokens = inputs()
    (model.encode_image(images) * model.encode_text(tokens)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trained_parameters().values())


def test_initial_values(tiny):
    """N(0, 0.02²), biases 0, LayerNorms of the adapters 1 and 0; two models of one seed are the same."""
    for method in ("cskt", "prompt-decoupling"):
        config = tiny.replace(method=method, prompt_positions=False, prompt_length=40)
        models = [build(config, seed=1).adaptation() for _ in range(2)]
        for name, parameter in models[0].items():
            assert torch.equal(parameter, models[1][name])
            if ".blocks." not in name:
                continue
            if name.endswith("norm_weight"):
                assert torch.all(parameter == 1)
            elif name.endswith("bias"):
                assert torch.all(parameter == 0)
            else:
                assert 0.016 < parameter.detach().std() < 0.024 and parameter.detach().mean().abs() < 0.005, name


# ---------------------------------------------------------------------------------------- prompts


def token_by_token(model, images, tokens):
    """Features as prompts define them: tokens of every image and caption, replaced before every block."""

    def replaced(x, rows, first):
        return torch.cat([x[:, :first], rows.expand(len(x), -1, -1), x[:, first + len(rows) :]], 1)

    clip, taken = model.clip, model.config.method.positions_taken
    rows = model.prompts("image")
    x = clip.visual._embeds(images)
    length = x.shape[1]
    x = torch.cat([x, clip.visual.ln_pre(rows[0]).expand(len(x), -1, -1)], 1)
    for i, block in enumerate(model.image_blocks):
        x = replaced(x, rows[i], length) if 0 < i < len(rows) else x
        x = block(Stream(x)).total()
    image_features = clip.visual.ln_post(x[:, 0]) @ clip.visual.proj

    rows, positions = model.prompts("text"), clip.positional_embedding
    seen = words_of(tokens, model.context_length - 1 - taken)
    start = (clip.token_embedding(tokens[:1, 0]) + positions[0]).expand(len(tokens), 1, -1)
    first = rows[0] + positions[1 : 1 + taken] if taken else rows[0]
    x = clip.token_embedding(seen) + positions[1 + taken : 1 + taken + seen.shape[1]]
    x = torch.cat([start, first.expand(len(x), -1, -1), x], 1)
    for i, block in enumerate(model.text_blocks):
        x = replaced(x, rows[i], 1) if 0 < i < len(rows) else x
        x = block(Stream(x)).total()
    ends = 1 + len(rows[0]) + seen.argmax(1)
    return image_features, model.project_text(x[torch.arange(len(x)), ends])


@pytest.mark.slow
@pytest.mark.parametrize("changes", PROMPTED, ids=words)
def test_prompts_that_the_batch_shares_are_tokens_of_each_sample(tiny, changes):
    """Features and all gradients, on both backends, and without the switches that spare operations."""
    bound = 1e-9 if torch.float64 == EXACT else 1e-3
    images, tokens = (t.to(DEVICE) for t in inputs(EXACT))

    def computed(encode, **switches):
        model = stirred(build(tiny.replace(**changes, **switches)), scale=0.05).to(DEVICE, EXACT)
        features, parameters = encode(model), model.trained_parameters()
        gradients = torch.autograd.grad((features[0] * features[1]).sum(), parameters.values(), materialize_grads=True)
        return dict(zip(["image features", "text features", *parameters], [*features, *gradients], strict=True))

    defined = computed(lambda model: token_by_token(model, images, tokens), backend="torch")
    for switches in (
        dict(backend="torch"),
        dict(backend="torch", skip_unread=False),
        dict(backend="torch", pack_captions=False),
        dict(backend="triton"),
    ):
        found = computed(lambda model: (model.encode_image(images), model.encode_text(tokens)), **switches)
        for name, value in found.items():
            where = f"{name} with {switches}: "
            torch.testing.assert_close(value, defined[name], rtol=bound, atol=bound, msg=where.__add__)


@torch.no_grad()
@pytest.mark.parametrize("changes", PROMPTED, ids=words)
@pytest.mark.parametrize("pack_captions", [True, False])
def test_all_tokens_of_a_caption(tiny, changes, pack_captions):
    """The input of mlm: the start token is first, the end token is the caption's embedding."""
    model = stirred(build(tiny.replace(pack_captions=pack_captions, **changes))).double()
    captions = ["a man", "a woman in a red coat with a small white handbag and a dog", "girl"]
    tokens = model.tokenizer(captions, context_length=model.caption_length)
    embedding, x, ends = model.encode_text_tokens(tokens)
    assert torch.equal(ends, tokens.argmax(1))
    torch.testing.assert_close(embedding, model.encode_text(tokens), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x[torch.arange(3), tokens.argmax(1)], embedding, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x[0, 0], x[1, 0], rtol=1e-12, atol=1e-12)
    with model.zero_shot():
        assert model.encode_text(tokens).shape == embedding.shape


@pytest.mark.parametrize("method", ["cskt", "prompt-decoupling"])
def test_masked_language_modelling_beside_prompts(method, tmp_path):
    """A caption is cut to the room beside prompts before its words are masked, so mlm asks for none that is gone."""
    options = dict(prompt_length=30) | ({"stage": "prompts"} if method != "cskt" else {})
    config = small(preset("embedded", method), tmp_path / "run")
    config = config.replace(losses="sdm+mlm", mask_captions=True, **options)
    model = AdaptedCLIP(config.model)
    splits = read_splits(config.data)
    training = training_of(config, model, splits)
    batch = next(iter(training.batches))
    assert batch["mask_labels"].shape[1] == model.caption_length
    assert batch["masked_captions"].longest < model.caption_length
    measured = training.step(batch)
    assert set(measured) >= {"loss_sdm", "loss_mlm"} and measured["gradient_norm"] > 0
    training.log.close()


@pytest.mark.parametrize("method", METHODS)
def test_zero_shot_is_the_backbone_alone_whatever_the_method(tiny, method):
    """Also for a caption that the method's prompts leave no room for."""
    caption = "a man in a blue coat and white shoes with a bag and an umbrella"
    options = dict(prompt_length=4) if method in ("cskt", "prompt-decoupling") else {}
    found = []
    for config in (tiny.replace(method="zero-shot"), tiny.replace(method=method, **options)):
        model = build(config)
        with torch.no_grad(), model.zero_shot():
            found.append(model.encode_text(model.tokenizer([caption, "girl"])))
    assert torch.equal(*found)


def test_captions_that_were_packed_for_others(tiny):
    prompted, plain = (build(tiny.replace(**changes)) for changes in (PROMPTED[0], {}))
    captions = plain.tokenizer(["a man in a coat", "girl"])
    with pytest.raises(ValueError, match="packed for a first token at position 0; expected position 3 with"):
        prompted.encode_text(plain.pack_captions(captions))
    packed = prompted.pack_captions(captions)
    with (
        prompted.zero_shot(),
        pytest.raises(ValueError, match="packed for a first token at position 3; expected position 0"),
    ):
        prompted.encode_text_tokens(packed)


def test_switching_between_methods(tiny, tmp_path):
    """Each computes what its checkpoint does alone, long captions included."""
    torch.manual_seed(5)
    save_file(open_clip.CLIP(**json.loads(Path(tiny.model).read_text())).state_dict(), tmp_path / "clip.safetensors")
    tiny = tiny.replace(pretrained=str(tmp_path / "clip.safetensors"))
    adaptations = Adaptations(AdaptedCLIP(tiny))
    captions = adaptations.model.tokenizer(["a man in a blue coat and white shoes with a bag", "girl"])
    models = {}
    for name, changes in {"up": {}, "coupled": dict(PROMPTED[1], prompt_length=4), "deep": PROMPTED[3]}.items():
        models[name] = stirred(build(tiny.replace(**changes)))
        path = tmp_path / f"{name}.safetensors"
        save_checkpoint(path, models[name].adaptation(), Config(models[name].config), {})
        adaptations.add(name, path)
    with torch.no_grad():
        for name in ("up", "coupled", "deep", "coupled", "up"):
            adaptations.use(name)
            assert torch.equal(adaptations.model.encode_text(captions), models[name].encode_text(captions))


class Misplaced(METHODS["up-person"]):
    """With one more module, whose place a test chooses."""

    name = "misplaced"
    place = Place("image", 3, "lora")

    def modules(self, towers):
        return super().modules(towers) | {self.place: torch.nn.Identity()}


class Gap(METHODS["prompt-decoupling"]):
    name = "gap"

    def modules(self, towers):
        modules = super().modules(towers)
        del modules[Place("image", 1, "prompt")]
        return modules


class Both(METHODS["prompt-decoupling"]):
    name = "both"

    def modules(self, towers):
        return super().modules(towers) | {Place("text", 2, "prefix"): PREFIXES["vanilla"](2, 48, 1.0, "weights")}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            Gap,
            r"gap: expected prompts in layers 0, 1, … of the image tower.* found prompts in \[0, 2\], a prefix in \[\]",
        ),
        (Both, r"both: .* without a prefix; found prompts in \[0, 1\], a prefix in \[2\]"),
    ],
)
def test_places_that_a_method_cannot_use(tiny, method, message):
    with pytest.raises(MethodError, match=message):
        options = {Gap: dict(stage="prompts"), Both: dict(stage="prompts", depth_prompt=2)}.get(method, {})
        AdaptedCLIP(dataclasses.replace(tiny, method=method(**options)))


@pytest.mark.parametrize(
    "place",
    [Place("image", 3, "lora"), Place("text", -1, "lora"), Place("audio", 0, "lora"), Place("text", 0, "bias")],
    ids=str,
)
def test_modules_without_a_place_in_the_model(tiny, monkeypatch, place):
    """Block, tower and kind: nothing that a method makes is dropped without a word."""
    monkeypatch.setattr(Misplaced, "place", place)
    message = re.escape(
        f"misplaced: no block takes a module at {place}; expected a block of the image or text tower, and a kind of "
        "prefix, lora, adapter_attn, adapter_mlp, prompt"
    )
    with pytest.raises(MethodError, match=message):
        AdaptedCLIP(dataclasses.replace(tiny, method=Misplaced()))


def test_an_option_with_the_name_of_another_field(tiny):
    @dataclasses.dataclass(frozen=True)
    class Epochs(Method):
        name = "epochs"
        epochs: int = option(3, "epochs of its own")

    @dataclasses.dataclass(frozen=True)
    class Plain(Method):
        name = "plain"
        rank: int = 4

    with pytest.raises(TypeError, match="Plain.rank: expected a default made by upperson.fields.option"):
        Plain()
    with pytest.raises(ValueError, match="method epochs: the option epochs has the name of another field"):
        Config(dataclasses.replace(tiny, method=Epochs()))


def test_adapters_too_wide_for_the_kernels_are_computed_by_pytorch(tmp_path):
    path = tmp_path / "wide.json"
    wide = {name: TINY_CLIP[name] | dict(width=512, layers=1) for name in ("vision_cfg", "text_cfg")}
    wide["text_cfg"]["heads"] = 8
    path.write_text(json.dumps(TINY_CLIP | wide))
    config = ModelConfig(str(path), "none", (16, 16))
    images, tokens = inputs()
    for changes in (dict(method="cskt", prompts=False, adapter_reduction=1), dict(adapter_reduction=1)):
        with torch.no_grad():
            fused, plain = (
                build(config.replace(backend=backend, **changes)).to(DEVICE).encode_image(images[:1, :, :16].to(DEVICE))
                for backend in ("triton", "torch")
            )
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", PROMPTED[:1] + PROMPTED[3:4], ids=words)
def test_autocast_keeps_parameters_and_gradients_in_float32(tiny, changes):
    images, tokens = inputs()
    model = stirred(build(tiny.replace(**changes)), scale=0.05)
    exact = F.cosine_similarity(model.encode_image(images), model.encode_text(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cosine_similarity(model.encode_image(images), model.encode_text(tokens))
    torch.testing.assert_close(loss.float(), exact, rtol=0, atol=0.02)
    loss = loss.sum()
    loss.backward()
    for name, parameter in model.trained_parameters().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(tiny):
    images, tokens = inputs()
    model = stirred(build(tiny.replace(method="cskt", prompt_length=2)), scale=0.05)
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_blocks(backend="aot_eager")
        loss = F.cosine_similarity(model.encode_image(images), model.encode_text(tokens)).sum()
        found.append([loss, *torch.autograd.grad(loss, list(model.trained_parameters().values()))])
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(method="cskt", prompt_length=5),
            "cskt: prompts would take 10 of the 12 positions of a caption; expected at most 9, or prompts "
            "without positions",
        ),
        (
            dict(method="cskt", depth_prompt=4),
            "depth_prompt: 4 is more than the number of blocks of the image tower, 3",
        ),
        (
            dict(method="cskt", adapter_reduction=40),
            "adapter_reduction: 40 is more than the width of the image tower, 32",
        ),
        (
            dict(method="prompt-decoupling", depth_prompt=4),
            "depth_prompt: 4 is more than the number of blocks of the im",
        ),
    ],
)
def test_refused(tiny, changes, message):
    with pytest.raises(MethodError, match=message):
        AdaptedCLIP(tiny.replace(**changes))


def test_prompts_need_a_causal_text_tower(tiny, tmp_path):
    path = tmp_path / "not-causal.json"
    path.write_text(json.dumps(TINY_CLIP | dict(text_cfg=TINY_CLIP["text_cfg"] | dict(no_causal_mask=True))))
    with pytest.raises(MethodError, match=r"cskt: prompts need a causal text tower .*not-causal.json differs"):
        AdaptedCLIP(tiny.replace(model=str(path), method="cskt", prompt_length=2))


def test_towers_of_other_depths(tiny, tmp_path):
    """As ViT-L/14's: coupled prompts go as deep as the shallower tower, others as deep as each."""
    path = tmp_path / "deep.json"
    path.write_text(json.dumps(TINY_CLIP | dict(vision_cfg=TINY_CLIP["vision_cfg"] | dict(layers=4))))
    images, tokens = inputs(torch.float64)
    for changes, layers in (
        (dict(method="cskt", prompt_length=2), (3, 3)),
        (dict(method="prompt-decoupling", stage="prompts"), (4, 3)),
    ):
        model = stirred(build(tiny.replace(model=str(path), **changes))).double()
        found = tuple(len(model.prompts(tower)) for tower in ("image", "text"))
        assert found == layers
        defined = token_by_token(model, images, tokens)
        torch.testing.assert_close((model.encode_image(images), model.encode_text(tokens)), defined)


# ---------------------------------------------------------------------------------------- merging, freezing


def test_fine_tuned_encoders_merge_and_the_prompts_remain(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny.replace(method="prompt-decoupling", prompt_length=3)
    model = stirred(build(config))
    save_checkpoint(tmp_path / "best.safetensors", model.adaptation(), Config(config), {"epoch": 3})
    assert merge_command(["best.safetensors", "merged.safetensors"]) == 1
    assert "cannot be merged into open_clip's weights: prompt Prompt; --rest FILE" in capsys.readouterr().err
    assert merge_command(["best.safetensors", "merged.safetensors", "--rest", "rest.safetensors"]) == 0
    rest = load_model("rest.safetensors")
    assert set(rest.adaptation()) == {name for name in model.adaptation() if ".prompt." in name}
    images, tokens = inputs()
    with torch.no_grad():
        assert torch.equal(rest.encode_image(images), model.encode_image(images))
        assert torch.equal(rest.encode_text(tokens), model.encode_text(tokens))


def test_cskt_remains_as_it_is_beside_merged_weights(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny.replace(method="cskt", prompt_length=2)
    save_checkpoint(tmp_path / "best.safetensors", stirred(build(config)).adaptation(), Config(config), {"epoch": 3})
    assert merge_command(["best.safetensors", "merged.safetensors"]) == 1
    assert "adapter_mlp NormedAdapter, prompt CoupledPrompt; --rest" in capsys.readouterr().err
    assert merge_command(["best.safetensors", "merged.safetensors", "--rest", "rest.safetensors"]) == 0
    rest, model = load_model("rest.safetensors"), load_model("best.safetensors")
    assert rest.config.method == config.method
    images, tokens = inputs()
    with torch.no_grad():
        assert torch.equal(rest.encode_image(images), model.encode_image(images))
        assert torch.equal(rest.encode_text(tokens), model.encode_text(tokens))


def test_what_is_left_of_a_method_that_does_not_say(tiny):
    with pytest.raises(MethodError, match="CSKT does not define the method that remains without lora"):
        METHODS["cskt"]().without(["lora"])


def test_freezing_kinds_of_parameters(tiny):
    model = build(tiny)
    everything = set(model.trained_parameters())
    model.freeze("prefix+lora")
    assert {name.split(".")[3] for name in model.trained_parameters()} == {"adapter_attn", "adapter_mlp"}
    assert set(model.adaptation()) == everything
    both = build(tiny.replace(method="prompt-decoupling", prompt_length=3))
    both.freeze("prompt")
    assert set(both.trained_parameters()) == set(both.clip_parameters())
    with pytest.raises(
        MethodError, match="freeze: method up-person with these options does not train 'clip'; expected"
    ):
        model.freeze("clip")
