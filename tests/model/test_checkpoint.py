"""Checkpoints: exact, without pickle, atomic, and clear about what is wrong with a file."""

import errno
import os
import random
import resource
import shutil

import open_clip
import pytest
import torch
from mutators import signed
from safetensors import safe_open
from safetensors.torch import save, save_file
from tiny import TINY_CLIP, tiny_config

from upperson.config import Config
from upperson.deploy.switching import Adaptations
from upperson.errors import BackboneError, CheckpointError
from upperson.files import write_atomically
from upperson.model import AdaptedCLIP
from upperson.model.checkpoint import (
    load_checkpoint,
    load_model,
    parameters_to_start_from,
    read_checkpoint,
    save_checkpoint,
    with_files_beside,
)
from upperson.model.weights import fingerprint
from upperson.train.resume import load_state, save_state


@pytest.fixture
def config(tmp_path):
    return Config(tiny_config(tmp_path))


@pytest.fixture
def model(config):
    torch.manual_seed(config.train.seed)
    model = AdaptedCLIP(config.model)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(torch.randn(parameter.shape))
    return model


@pytest.fixture
def path(tmp_path, config, model):
    """A checkpoint of `model`."""
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, model.trained_parameters(), config, {"epoch": 3, "R@1": 1 / 3})
    return path


def folder_of(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def test_checkpoint_holds_trained_parameters_alone_and_comes_back_exactly(path, config, model):
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == config
    assert checkpoint.results == {"epoch": 3, "R@1": 1 / 3}
    assert list(checkpoint.parameters) == sorted(model.trained_parameters())
    for name, parameter in model.trained_parameters().items():
        assert (
            torch.equal(checkpoint.parameters[name], parameter) and checkpoint.parameters[name].dtype == torch.float32
        )
    bytes_of_parameters = sum(4 * parameter.numel() for parameter in model.trained_parameters().values())
    assert bytes_of_parameters < path.stat().st_size < bytes_of_parameters + 30_000


def test_model_comes_back_and_computes_the_same(path, model):
    random_state = torch.get_rng_state()
    again = load_model(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    images, tokens = torch.randn(2, 3, 48, 16), model.tokenizer(["a red coat", "a man in blue"])
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))


def test_tensors_that_do_not_fit_are_named(path, config, model):
    parameters = dict(model.trained_parameters())
    wanted = list(parameters)
    parameters["extra"] = parameters.pop(wanted[0])
    parameters[wanted[1]] = torch.zeros(5, 7)
    save_checkpoint(path, parameters, config, {})
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    for part in (str(path), f"1 missing: {wanted[0]}", "1 unexpected: extra", f"{wanted[1]} (5, 7), expected"):
        assert part in str(error.value)


def damaged(path, kind):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "cut off in its header":
        path.write_bytes(content[:20])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        torch.save({"a": torch.zeros(3)}, path)
    elif kind == "safetensors of others":
        save_file({"a": torch.zeros(3)}, path, {"format": "pt"})
    elif kind == "resume state":
        save_state(path.parent, {"a": torch.zeros(3)}, Config(), {})
        (path.parent / "resume.safetensors").rename(path)
    elif kind == "of the future":
        path.write_bytes(content.replace(b'"version":"2"', b'"version":"9"'))
    elif kind == "strange configuration":
        path.write_bytes(signed(content.replace(b"lora_rank", b"lore_rank")))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no such file"),
        ("cut off", "truncated, or not a safetensors file"),
        ("cut off in its header", "truncated, or not a safetensors file"),
        ("empty", "truncated, or not a safetensors file"),
        ("pickle", "truncated, or not a safetensors file"),
        ("safetensors of others", "expected an upperson checkpoint, found another safetensors file"),
        ("resume state", "expected an upperson checkpoint, found an upperson resume state"),
        ("of the future", "version 9, expected version 2"),
        ("strange configuration", "method up-person: missing keys: lora_rank; unknown keys: lore_rank"),
    ],
)
def test_unusable_files(path, kind, message):
    damaged(path, kind)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_changed_byte_is_noticed_or_changes_nothing(path):
    """Of 300 bytes, half of them in the header."""
    content, right = path.read_bytes(), load_checkpoint(path)
    end, generator, refused = 8 + int.from_bytes(content[:8], "little"), random.Random(0), 0
    for number in range(300):
        place = generator.randrange(*((0, end) if number % 2 else (end, len(content))))
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
        else:
            assert place < end and found.parameters.keys() == right.parameters.keys()
            assert all(torch.equal(found.parameters[name], value) for name, value in right.parameters.items())
            assert (found.config, found.results, found.fingerprint) == (right.config, right.results, right.fingerprint)
    assert refused > 290


@pytest.mark.parametrize("kind", ["a bit of a tensor", "a tensor is another", "a tensor is renamed", "results", "none"])
def test_what_is_damaged_is_named(path, kind):
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name, other = sorted(tensors)[:2]
    words = f"the file is damaged: its tensor {name} is not what was saved"
    if kind == "a bit of a tensor":
        tensors[name].view(-1).view(torch.uint8)[-1] ^= 1
    elif kind == "a tensor is another":
        tensors[name] = tensors[other].clone()
    elif kind == "a tensor is renamed":
        tensors[f"{name}.x"] = tensors.pop(name)
    elif kind == "results":
        metadata["results"] = metadata["results"].replace("3", "4")
        words = "the file is damaged: its metadata results is not what was saved"
    else:
        del metadata["checksums"]
        words = "the file is damaged: its checksums cannot be read"
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


def test_resume_state_comes_back_exactly(tmp_path):
    state = {
        "tensors": {"a": torch.randn(3, 4)[:, ::2], "scalar": torch.tensor(7.0), "bytes": torch.get_rng_state()},
        "numbers": [1, -0.1, 2**80, 1e-320, True, None, "λ"],
        "nested": ({"1": (), 1: []}, [(), {}]),
    }
    assert load_state(tmp_path) is None
    save_state(tmp_path, state, Config(), {})
    again = load_state(tmp_path)
    assert again["numbers"] == state["numbers"] and again["nested"] == state["nested"]
    assert [type(value) for value in again["numbers"]] == [type(value) for value in state["numbers"]]
    for name, tensor in state["tensors"].items():
        assert torch.equal(again["tensors"][name], tensor) and again["tensors"][name].dtype == tensor.dtype
    with pytest.raises(TypeError, match="cannot contain a set"):
        save_state(tmp_path, {"a": {1}}, Config(), {})
    assert load_state(tmp_path)["numbers"] == state["numbers"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_earlier_file(path, config, model, monkeypatch, call):
    before, names = path.read_bytes(), folder_of(path)

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OSError, match="best.safetensors could not be written .No space left on device") as error:
        save_checkpoint(path, model.trained_parameters(), config, {"epoch": 4})
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and folder_of(path) == names


def test_a_real_limit_on_file_size_leaves_the_earlier_file(path, config, model):
    before, names = path.read_bytes(), folder_of(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="could not be written .File too large"):
            save_checkpoint(path, model.trained_parameters(), config, {"epoch": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and folder_of(path) == names


def test_a_leftover_of_a_killed_write_is_no_obstacle(path, config, model):
    (path.parent / f".{path.name}.tmp").write_bytes(b"half a fi")
    names = folder_of(path)
    save_checkpoint(path, model.trained_parameters(), config, {"epoch": 4})
    assert load_checkpoint(path).results == {"epoch": 4}
    assert len(folder_of(path)) == len(names) - 1


def test_an_interrupted_write_leaves_nothing_behind(path, monkeypatch):
    before, names = path.read_bytes(), folder_of(path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == before and folder_of(path) == names


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere/a.json could not be written .No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "a.json", b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.half(), "is float16; expected float32"),
        (lambda tensor: tensor.bfloat16(), "is bfloat16; expected float32"),
        (lambda tensor: tensor.double(), "is float64; expected float32"),
        (lambda tensor: tensor.to(torch.complex64), "is complex64; expected float32"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "is float8_e4m3fn; expected float32"),
        (lambda tensor: tensor.int(), "is int32; expected float32"),
        (lambda tensor: tensor.view(torch.int32), "is int32; expected float32"),  # a header that lies
        (lambda tensor: tensor > 0, "is bool; expected float32"),
        (lambda tensor: tensor.clone().index_fill_(0, torch.tensor([1]), torch.nan), "elements that are NaN or infin"),
        (lambda tensor: tensor.clone().index_fill_(0, torch.tensor([0]), -torch.inf), "elements that are NaN or infin"),
    ],
)
def test_parameters_of_another_dtype_or_without_meaning_are_named(path, config, model, change, message):
    """By whatever reads the file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = "text.blocks.1.lora.key_down"
    parameters = {key: tensor.detach() for key, tensor in model.trained_parameters().items()}
    path.write_bytes(signed(save(parameters | {name: change(parameters[name])}, metadata)))
    for read in (load_model, lambda path: parameters_to_start_from(path, config, model)):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: the tensor {name!r} ") and message in str(error.value)


def test_another_backbone_of_the_same_shape_is_noticed(tmp_path, config, model):
    """By load_model, by a training that starts from the checkpoint, and by Adaptations."""
    backbones = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        backbones.append(tmp_path / f"{seed}.safetensors")
        save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), backbones[-1])
    own, other = (config.replace(pretrained=str(path)) for path in backbones)
    path, trained = tmp_path / "best.safetensors", AdaptedCLIP(own.model)
    save_checkpoint(path, trained.trained_parameters(), own, {}, trained.fingerprint)
    assert load_model(path).fingerprint == trained.fingerprint and len(trained.fingerprint) == 64
    message = f"{path}: the backbone, .*{backbones[1].name}, has other weights than the backbone of the training"
    with pytest.raises(CheckpointError, match=message):
        load_model(path, pretrained=str(backbones[1]))
    backbones[1].replace(backbones[0])  # the same name with other weights
    with pytest.raises(CheckpointError, match="has other weights"):
        load_model(path)
    with pytest.raises(CheckpointError, match="has other weights"):
        parameters_to_start_from(path, own, AdaptedCLIP(own.model))
    with pytest.raises(CheckpointError, match="has other weights"):
        Adaptations(AdaptedCLIP(own.model)).add("best", path)
    save_checkpoint(path, trained.trained_parameters(), own, {})  # without a fingerprint there is nothing to compare
    load_model(path)


@pytest.mark.parametrize("recorded", ["{}", "sub/{}", "{here}/gone/{}"], ids=["beside", "below", "absolute"])
def test_the_files_of_a_backbone_are_found_beside_the_checkpoint(tmp_path, monkeypatch, config, recorded):
    """From any working folder, and after all three were moved; a file at the recorded path is preferred."""
    names = [recorded.format(name, here=tmp_path) for name in ("clip.safetensors", "tiny.json")]
    torch.manual_seed(1)
    state = open_clip.CLIP(**TINY_CLIP).state_dict()
    folder, elsewhere = tmp_path / "mövëd", tmp_path / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    folder.mkdir()
    save_file(state, folder / "clip.safetensors")
    shutil.copy(config.model.model, folder / "tiny.json")
    own = config.replace(pretrained=str(folder / "clip.safetensors"), model=str(folder / "tiny.json"))
    trained, path = AdaptedCLIP(own.model), folder / "best.safetensors"
    written = config.replace(pretrained=names[0], model=names[1])
    save_checkpoint(path, trained.trained_parameters(), written, {}, trained.fingerprint)
    monkeypatch.chdir(elsewhere)
    assert load_model(path).fingerprint == trained.fingerprint
    assert read_checkpoint(path).config == written and load_checkpoint(path).config == own
    if recorded != "{here}/gone/{}":
        shutil.copy(folder / "clip.safetensors", names[0])
        assert load_checkpoint(path).config.model.pretrained == names[0]
        os.unlink(names[0])
    torch.manual_seed(2)
    save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "clip.safetensors")
    with pytest.raises(CheckpointError, match="clip.safetensors, has other weights"):
        load_model(path)
    (folder / "clip.safetensors").unlink()
    with pytest.raises(BackboneError, match=f"best.safetensors: pretrained '{names[0]}' of .* is neither a file"):
        load_model(path)


@pytest.mark.parametrize("pretrained", ["none", "openai", "laion2b_s34b_b79k", "", "..", "/", "x."])
def test_a_tag_is_no_file_beside_the_checkpoint(tmp_path, config, pretrained):
    for name in ("none", "openai", "laion2b_s34b_b79k"):
        (tmp_path / name).write_bytes(b"a file with the name of a tag")
    config = config.replace(pretrained=pretrained)
    assert with_files_beside(config, tmp_path / "best.safetensors") == config


def test_the_fingerprint_is_of_the_published_weights(tmp_path, tiny):
    """It does not depend on the image size, the method, the precision, or the temperature of CLIP's loss."""
    torch.manual_seed(3)
    state = open_clip.CLIP(**TINY_CLIP).half().float().state_dict()
    half = {name: tensor.half() for name, tensor in state.items()}
    warm = state | {"logit_scale": torch.tensor(3.0)}
    found = []
    for kind, tensors in enumerate((state, half, warm)):
        save_file(tensors, tmp_path / f"{kind}.safetensors")
        for changes in (dict(), dict(image_size=(64, 16), method="zero-shot")):
            model = AdaptedCLIP(tiny.replace(pretrained=str(tmp_path / f"{kind}.safetensors")).replace(**changes))
            model.keep_frozen_weights(torch.bfloat16)
            found.append(model.fingerprint)
    assert len(set(found)) == 1
    for name in ("visual.positional_embedding", "ln_final.bias"):
        changed = state | {name: state[name].clone()}
        changed[name].view(-1)[0] += 1e-3
        assert fingerprint(changed) != found[0]


def test_full_fine_tuning_keeps_all_weights_in_the_checkpoint(tmp_path, config):
    config = config.replace(method="full")
    trained = AdaptedCLIP(config.model)
    path = tmp_path / "full.safetensors"
    save_checkpoint(path, trained.trained_parameters(), config, {}, trained.fingerprint)
    again = load_model(path, seed=config.train.seed + 1)
    assert again.fingerprint != trained.fingerprint
    images = torch.randn(2, 3, 48, 16)
    assert torch.equal(again.encode_image(images), trained.encode_image(images))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"results": "{}"}, "the configuration in the file does not fit"),
        ({"config": None}, "expected an object in the metadata 'results'"),
        ({"config": None, "results": "[]"}, "expected an object in the metadata 'results', found a list"),
        ({"config": None, "results": '{"R@1": NaN}'}, "the metadata 'results': field 'R@1': NaN is not"),
        ({"config": None, "results": "["}, "the metadata 'results': invalid or truncated JSON"),
        ({"config": None, "results": "[" * 100_000}, "the metadata 'results': the JSON is nested too deeply"),
    ],
)
def test_a_checkpoint_without_all_its_metadata_is_refused(path, config, metadata, message):
    metadata = {key: config.to_json() if value is None else value for key, value in metadata.items()}
    path.write_bytes(signed(save({}, {"format": "upperson checkpoint", "version": "2", **metadata})))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"epoch": -1}, "field 'epoch' of the metadata 'results' is -1; expected a whole number from 0"),
        ({"epoch": "3"}, "field 'epoch' of the metadata 'results' is '3'"),
        ({"epoch": True}, "field 'epoch' of the metadata 'results' is True"),
        ({"selection": "luck"}, "field 'selection' of the metadata 'results' is 'luck'; expected one of val, last"),
        ({"selection": []}, "field 'selection' of the metadata 'results' is \\[\\]"),
    ],
)
def test_results_that_no_training_has(path, config, model, results, message):
    save_checkpoint(path, model.trained_parameters(), config, results)
    with pytest.raises(CheckpointError, match=f"best.safetensors: the {message}"):
        load_checkpoint(path)


def test_a_name_with_a_line_feed_is_quoted_on_one_line(path, config, model):
    save_checkpoint(path, model.trained_parameters() | {"a\nb" * 5000: torch.zeros(1)}, config, {})
    with pytest.raises(CheckpointError, match=r"best.safetensors: .*1 unexpected: a\\nba\\nb") as error:
        load_model(path)
    assert len(str(error.value)) <= 2000 and "\n" not in str(error.value)


def test_a_model_that_cannot_be_built_names_the_checkpoint(path, config, model):
    save_checkpoint(path, model.trained_parameters(), config.replace(image_size=(48, 3)), {})
    with pytest.raises(BackboneError, match="best.safetensors: image_size 48×3 is smaller than one patch"):
        load_model(path)
