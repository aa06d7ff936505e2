"""upperson import: what it writes; and broken files, each refused in one line that names the file and the key."""

import json
import os
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from foreign import expert_by_expert, hugging_face_state, released_state, save_released
from safetensors.torch import save_file
from tiny import build, inputs, stirred

from upperson.__main__ import main
from upperson.config import Config
from upperson.deploy.formats import FORMATS
from upperson.deploy.importing import read_foreign
from upperson.model.checkpoint import load_checkpoint, load_model, save_checkpoint
from upperson.model.tensor_files import RESUME_STATE, write_tensors

METHODS = {
    "up-person": {},
    "cskt": dict(method="cskt", prompt_length=2, adapter_reduction=4),
    "dm-adapter": dict(method="dm-adapter", experts=3, adapter_reduction=4),
    "irra": dict(method="irra"),
}
SIZE = ("--image-size", "48", "16")


def frozen(model):
    """CLIP's tensors by open_clip's names."""
    trained = {id(parameter) for module in model.trained_modules().values() for parameter in module.parameters()}
    return {name: tensor.detach() for name, tensor in model.clip.named_parameters() if id(tensor) not in trained}


def state_of(form, model):
    if form == "clip":
        return frozen(model)
    if form == "huggingface-clip":
        return hugging_face_state(frozen(model))
    own = {} if form == "irra" else {name: tensor.detach() for name, tensor in model.trained_parameters().items()}
    if form == "dm-adapter":
        own = expert_by_expert(own)
    heads = {"classifier.weight": torch.zeros(7, 16), "classifier.bias": torch.zeros(7)}
    return released_state(form, frozen(model), own, heads)


@pytest.fixture
def case(tmp_path, tiny):
    """case(form) is a model, its foreign state dict, and the command line for a file."""

    def make(form, **changes):
        config = tiny.replace(**METHODS.get(form, dict(method="zero-shot")) | changes)
        model = stirred(build(config))
        command = ["import", str(tmp_path / "best.pth"), "--as", form, "-o", str(tmp_path / "out.safetensors")]
        return model, state_of(form, model), [*command, "--model", config.model, *SIZE]

    return make


def refused(command, capsys, *words):
    """The error of a command that writes nothing is one line with these words."""
    folder = os.path.dirname(command[1])
    before = sorted(os.listdir(folder))
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in (os.path.basename(command[1]), *words)), line
    assert sorted(os.listdir(folder)) == before
    return line


@torch.no_grad()
def assert_same_features(model, other, exactly=True):
    images, tokens = inputs()
    for ours, theirs in (
        (model.encode_image(images), other.encode_image(images)),
        (model.encode_text(tokens), other.encode_text(tokens)),
    ):
        assert torch.equal(ours, theirs) if exactly else torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_the_checkpoint_has_the_features(form, case, tmp_path, capsys):
    model, state, command = case(form)
    save_released(tmp_path / "best.pth", state)
    assert main(command) == 0
    shown = capsys.readouterr().out
    output, beside = tmp_path / "out.safetensors", tmp_path / "out-clip.safetensors"
    assert beside.exists() == (form != "irra") and all(f"{word}, " in shown for word in ("epoch", "optimizer"))
    assert ("classifier.bias, classifier.weight" in shown) == (form in METHODS)
    assert_same_features(load_model(output, backend="torch"), model)
    checkpoint = load_checkpoint(output)
    assert checkpoint.config.model.method.name == FORMATS[form].method
    assert checkpoint.config.data.dataset == "cuhk-pedes" and checkpoint.config.model.image_size == (48, 16)


@pytest.mark.parametrize("changes", [dict(depth_prefix=1, depth_lora=2), dict(depth_adapter=2, prefix_length=5)])
def test_depths_are_read_off_the_keys(changes, case, tmp_path):
    model, state, command = case("up-person", **changes)
    save_released(tmp_path / "best.pth", state)
    assert main([*command, "--preset", "rstpreid"]) == 0
    checkpoint = load_checkpoint(tmp_path / "out.safetensors")
    assert checkpoint.config.data.dataset == "rstpreid" and checkpoint.config.train.learning_rate == 1e-4
    found, expected = checkpoint.config.model.method, model.config.method
    assert all(getattr(found, name) == getattr(expected, name) for name in (*changes, "lora_rank", "adapter_reduction"))
    assert_same_features(load_model(tmp_path / "out.safetensors", backend="torch"), model)


def test_prompts_of_some_layers(case, tmp_path):
    model, state, command = case("cskt", depth_prompt=2)
    save_released(tmp_path / "best.pth", state)
    assert main(command) == 0
    assert load_checkpoint(tmp_path / "out.safetensors").config.model.method.depth_prompt == 2
    assert_same_features(load_model(tmp_path / "out.safetensors", backend="torch"), model)


def test_adapters_alone_if_the_backbone_is_known(case, tmp_path, capsys):
    model, state, command = case("up-person")
    clip = frozen(model)
    save_file(clip, tmp_path / "clip.safetensors")
    save_released(tmp_path / "best.pth", state)
    assert main([*command, "--pretrained", str(tmp_path / "clip.safetensors")]) == 0
    assert not (tmp_path / "out-clip.safetensors").exists() and "other weights" not in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "out.safetensors")
    assert checkpoint.config.model.pretrained == str(tmp_path / "clip.safetensors")
    assert checkpoint.fingerprint == load_model(tmp_path / "out.safetensors").fingerprint
    assert_same_features(load_model(tmp_path / "out.safetensors", backend="torch"), model)
    # One other weight makes it another backbone.
    clip["ln_final.bias"] = clip["ln_final.bias"] + 1
    save_file(clip, tmp_path / "clip.safetensors")
    assert main([*command, "--pretrained", str(tmp_path / "clip.safetensors")]) == 0
    assert "other weights than" in capsys.readouterr().out and (tmp_path / "out-clip.safetensors").exists()
    assert_same_features(load_model(tmp_path / "out.safetensors", backend="torch"), model)


def test_half_precision_a_prefix_and_one_element(case, tmp_path):
    """As DistributedDataParallel saves on a GPU, and with a λ of shape (1,)."""
    model, state, command = case("up-person")
    state = {f"module.{name}": tensor.half() for name, tensor in state.items()}
    key = "module.vit_prefix_learner.vit_prefix.1.scale_to_grad"
    state[key] = state[key].reshape(1)
    save_released(tmp_path / "best.pth", state)
    assert main(command) == 0
    model.half().float()
    assert_same_features(load_model(tmp_path / "out.safetensors", backend="torch"), model, exactly=False)


def test_a_clip_of_square_images_is_resized_when_it_is_loaded(tiny, tmp_path):
    model = build(tiny.replace(method="zero-shot", image_size=(32, 32)))
    torch.save(hugging_face_state(frozen(model)), tmp_path / "model.bin")
    foreign = read_foreign(tmp_path / "model.bin", "huggingface-clip", model=tiny.model)
    assert foreign.image_size == foreign.config.model.image_size == (32, 32)
    command = ["import", str(tmp_path / "model.bin"), "--as", "huggingface-clip", "--model", tiny.model, *SIZE]
    assert main([*command, "-o", str(tmp_path / "out.safetensors")]) == 0
    written = load_model(tmp_path / "out.safetensors", backend="torch")
    assert written.config.image_size == (48, 16)
    clip = str(tmp_path / "out-clip.safetensors")
    assert_same_features(written, build(tiny.replace(method="zero-shot", pretrained=clip)))


GELU = {"hidden_act": "gelu"}


class TestHuggingFace:
    @pytest.fixture
    def command(self, case, tmp_path):
        _, state, command = case("huggingface-clip")
        save_file(state, tmp_path / "model.safetensors")
        command[1] = str(tmp_path / "model.safetensors")
        return command

    def write(self, folder, name, content):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def test_its_preprocessing_is_kept(self, command, tmp_path):
        self.write(tmp_path, "config.json", {"vision_config": {"hidden_act": "quick_gelu"}, "text_config": {}})
        self.write(tmp_path, "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 0.5]})
        assert main(command) == 0
        preprocess = load_model(tmp_path / "out.safetensors").preprocess
        assert preprocess.mean == (0.1, 0.2, 0.3) and preprocess.std == (1, 1, 0.5)

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            (
                "config.json",
                {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}},
                "QuickGELU",
            ),
            (
                "config.json",
                {"vision_config": {"hidden_act": "gelu"}, "text_config": {}},
                "hidden_act is gelu, quick_gelu",
            ),
            ("config.json", {"vision_config": {"hidden_act": "relu"}}, "hidden_act is relu"),
            ("config.json", {}, "hidden_act is none"),
            ("config.json", [], "expected an object"),
            ("config.json", "{", "invalid or truncated JSON"),
            ("preprocessor_config.json", {"image_mean": [0, 0]}, "image_mean"),
            ("preprocessor_config.json", {"image_mean": [0, 0, 0], "image_std": [1, 1, 0]}, "image_std"),
        ],
    )
    def test_what_is_beside_the_file(self, command, tmp_path, capsys, name, content, words):
        self.write(tmp_path, name, content)
        refused(command, capsys, words)


# ------------------------------------------------------------------------------------ broken files


def change(state, key, value):
    """`state` with another value, or without the key if the value is None."""
    assert key in state
    return {
        name: value if name == key else tensor for name, tensor in state.items() if name != key or value is not None
    }


LAMBDA = "text_prefix_learner.text_prefix.2.scale_to_grad"
ADAPTER = "base_model.transformer.resblocks.0.adapter_ln_msa.down.weight"
LORA = "LORA_learner.lora_image.1.lora_B.0"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (LAMBDA, None, f"1 missing key: {LAMBDA}"),
        (LORA, None, f"1 missing key: {LORA}"),
        ("base_model.ln_final.bias", None, "1 missing key: base_model.ln_final.bias"),
        ("base_model.visual.positional_embedding", None, "positional_embedding is missing"),
        ("base_model.visual.positional_embedding", torch.zeros(5), "positional_embedding has the shape (5,)"),
        (
            "base_model.visual.positional_embedding",
            torch.zeros(9, 32),
            "positional_embedding: the position embedding has",
        ),
        ("vit_prefix_learner.vit_prefix.0.key.tokens", None, "vit_prefix.0.key.tokens is missing"),
        ("vit_prefix_learner.vit_prefix.0.key.tokens", torch.zeros(3), "vit_prefix.0.key.tokens has the shape (3,)"),
        ("vit_prefix_learner.vit_prefix.1.key.tokens", torch.zeros(4, 32), "(4, 32), expected (3, 32)"),
        ("LORA_learner.lora_image.0.lora_A.0", torch.zeros(0, 32), "lora_image.0.lora_A.0 has the shape (0, 32)"),
        (LORA, torch.zeros(32, 3), f"1 misshapen key: {LORA} (32, 3), expected (32, 2)"),
        (LORA, torch.full((32, 2), float("nan")), f"the tensor '{LORA}' has 64 of 64 elements that are NaN"),
        (LORA, torch.zeros(32, 2, dtype=torch.int64), f"the tensor '{LORA}' is int64; expected float32"),
        (LORA, torch.zeros(32, 2).to_sparse(), f"the tensor '{LORA}' is sparse"),
        (LORA, "text", f"the entry '{LORA}' is not a tensor"),
        (
            "base_model.transformer.resblocks.0.adapter_ln_msa.down.weight",
            None,
            "resblocks.0.adapter_ln_msa.down.weight",
        ),
        ("base_model.ln_final.bias", torch.zeros(17), "base_model.ln_final.bias (17,), expected (16,)"),
    ],
)
def test_a_key_that_misfits(key, value, words, case, tmp_path, capsys):
    _, state, command = case("up-person")
    if key == "base_model.ln_final.bias" and value is not None:
        words = words.replace("(16,)", f"{tuple(state[key].shape)}")
    save_released(tmp_path / "best.pth", change(state, key, value))
    refused(command, capsys, words)


@pytest.mark.parametrize(
    ("form", "key"),
    [
        ("up-person", "vit_prefix_learner.vit_prefix.3.scale_to_grad"),
        ("up-person", "prompt_learner.ctx"),
        ("cskt", "prompt_learner.compound_prompts_text.2"),
        ("irra", "classifier.scale"),
        ("irra", "visual.conv1.weight"),
        ("clip", "base_model.token_embedding.weight"),
        ("huggingface-clip", "vision_model.encoder.layers.3.self_attn.q_proj.weight"),
    ],
)
def test_an_unknown_key(form, key, case, tmp_path, capsys):
    _, state, command = case(form)
    save_released(tmp_path / "best.pth", state | {key: torch.zeros(2)})
    refused(command, capsys, f"1 unknown key: {key}; expected a checkpoint of {FORMATS[form].title}")


@pytest.mark.parametrize("found", FORMATS)
def test_a_file_of_another_program(found, case, tmp_path, capsys):
    _, state, command = case(found)
    save_released(tmp_path / "best.pth", state)
    for form in FORMATS:
        if form != found:
            command[3] = form
            refused(command, capsys, f"the file has keys of --as {found}")


def test_another_architecture(case, tmp_path, capsys):
    _, state, command = case("up-person")
    save_released(tmp_path / "best.pth", state)
    refused(command[:-5], capsys, "positional_embedding", "--image-size")
    refused([*command[:-4], "ViT-B-32-quickgelu", *SIZE], capsys, "base_model.visual")


@pytest.mark.parametrize("model", ["ViT-B-16", "none"])
def test_an_architecture_that_does_not_fit_the_format(model, case, tmp_path, capsys):
    _, state, command = case("irra")
    if model == "ViT-B-16":
        description = json.loads(Path(command[7]).read_text()) | {"quick_gelu": False}
        (tmp_path / "gelu.json").write_text(json.dumps(description))
        save_released(tmp_path / "best.pth", state)
        command[7] = str(tmp_path / "gelu.json")
        refused(command, capsys, "QuickGELU, as the released code tells", '"quick_gelu"')
    else:
        save_released(tmp_path / "best.pth", state)
        command[7] = model
        assert main(command) == 1 and "unknown model 'none'" in capsys.readouterr().err


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def contents(state):
    """Files that are no checkpoint of any program, as bytes by name, or as objects to save."""
    yield "nothing", b""
    yield "text", b"This is no checkpoint." * 40
    yield "pickle", pickle.dumps(state)
    yield "a list", [1, 2]
    yield "a number", 3
    yield "no tensors", {"model": {"epoch": 1}}
    yield "numbers as keys", {"model": {1: torch.zeros(2)}}
    yield "two state dicts", {"model": state, "state_dict": state}
    yield "an unknown wrapper", {"ema": state}
    yield "code", {"model": state, "optimizer": Harmful()}
    yield "a tensor", torch.zeros(3)


def test_files_that_are_no_checkpoints(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, state, command = case("irra")
    path = tmp_path / "best.pth"
    for what, content in contents(state):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        line = refused(command, capsys)
        assert any(word in line for word in ("cannot be read", "no state dict", "found state dicts")), (what, line)
    assert not (tmp_path / "harm").exists()
    torch.save({"model": state}, path)
    whole = path.read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        refused(command, capsys, "cannot be read as a checkpoint")
    path.rename(tmp_path / "best.safetensors")
    command[1] = str(tmp_path / "best.safetensors")
    refused(command, capsys, "cannot be read as a checkpoint")


@pytest.mark.parametrize("form", FORMATS)
def test_files_of_this_project(form, tiny, tmp_path, capsys):
    """They need no import, whatever --as."""
    path, model, config = tmp_path / "best.safetensors", build(tiny), Config(tiny)
    command = ["import", str(path), "--as", form, "-o", str(tmp_path / "out.safetensors")]
    save_checkpoint(path, model.adaptation(), config, {}, model.fingerprint)
    line = refused(command, capsys)
    assert line == f"error: {path} is an upperson checkpoint already; it needs no import, and can be used as it is"
    write_tensors(path, RESUME_STATE, {"0": torch.zeros(3, dtype=torch.uint8)}, config, {})
    refused(command, capsys, "is an upperson resume state already; use the checkpoint of the same run")


def test_features_are_compared_before_files_are_written(case, tmp_path, capsys, monkeypatch):
    _, state, command = case("cskt")
    save_released(tmp_path / "best.pth", state)
    monkeypatch.setattr("upperson.deploy.importing.largest_difference", lambda *_: float("nan"))
    refused(command, capsys, "relative difference of nan", "no file was written")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"-o": "out.pth"}, "expected a name that ends in .safetensors"),
        ({"-o": "best.safetensors", "FILE": "best.safetensors"}, "is an input"),
        ({"-o": "none/out.safetensors"}, "in an existing folder"),
        ({"--as": "tbps"}, "invalid choice: 'tbps'"),
        ({"--preset": "imagenet"}, "invalid choice"),
        ({"--pretrained": "openai"}, "--pretrained: --as irra trains all of CLIP"),
        ({"--pretrained": "none.safetensors"}, "expected no --pretrained"),
        ({"--pretrained": ""}, "expected no --pretrained"),
    ],
)
def test_wrong_arguments(changes, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"--as": "irra", "-o": "out.safetensors"} | changes
    file = options.pop("FILE", "best.pth")
    with pytest.raises(SystemExit) as stopped:
        main(["import", file, *(word for pair in options.items() for word in pair)])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_numbers_in_openai_files(tiny, tmp_path):
    """OpenAI's state dicts also hold three settings."""
    state = open_clip.CLIP(**json.loads(Path(tiny.model).read_text())).state_dict()
    settings = {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | settings, tmp_path / "clip.pt")
    foreign = read_foreign(tmp_path / "clip.pt", "clip", model=tiny.model)
    assert sorted(foreign.unread) == sorted(settings) and foreign.image_size == (32, 32)
