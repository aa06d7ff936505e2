"""Weights of a whole CLIP from a file: open_clip's and OpenAI's formats, and position embeddings of several sizes."""

import functools
import gc
import importlib
import json
import os
import shutil
import warnings
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_CLIP
from torch import nn

from upperson.__main__ import main
from upperson.config import ModelConfig
from upperson.data import Preprocess
from upperson.errors import BackboneError, CheckpointError
from upperson.methods.zero_shot import ZeroShot
from upperson.model import AdaptedCLIP, load_model
from upperson.model.archive import read_archive
from upperson.model.backbone import build_clip, resize_position_embedding, with_other_activation
from upperson.model.weights import PREPROCESSING, read_weights, weights_as_bytes

OPENAI_NUMBERS = {"input_resolution": 32, "context_length": 12, "vocab_size": 49408}


@pytest.fixture
def known(tmp_path):
    """The name of a tiny model that open_clip knows, as its own ones."""
    (tmp_path / "tiny-of-tests.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-of-tests.json")
    return "tiny-of-tests"


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP))
    return ModelConfig(str(tmp_path / "tiny.json"), "none", (48, 16), ZeroShot(), backend="torch")


@functools.cache
def published(image_size=32):
    """A tiny CLIP whose weights half precision holds exactly."""
    torch.manual_seed(3)
    towers = TINY_CLIP | dict(vision_cfg=TINY_CLIP["vision_cfg"] | dict(image_size=image_size))
    return open_clip.CLIP(**towers).half().float()


class AsPublished(nn.Module):
    """As OpenAI's archives: parameters under their names, in half precision, and three numbers."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        for name, tensor in clip.state_dict().items():
            *path, leaf = name.split(".")
            place = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(leaf, nn.Parameter(tensor.half()))
        for name, number in OPENAI_NUMBERS.items():
            self.register_buffer(name, torch.tensor(number))


def write(kind, clip, folder):
    path, state = folder / f"{kind}.pt", clip.state_dict()
    if kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecation
            torch.jit.save(torch.jit.script(AsPublished(clip)), path)
    elif kind == "half precision and numbers":
        numbers = {name: torch.tensor(number) for name, number in OPENAI_NUMBERS.items()}
        torch.save({name: tensor.half() for name, tensor in state.items()} | numbers, path)
    elif kind == "plain numbers":
        torch.save(state | OPENAI_NUMBERS, path)
    elif kind == "training state":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif kind == "one-dimensional temperature":
        torch.save(state | {"logit_scale": state["logit_scale"].reshape(1)}, path)
    else:
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "torchscript",
        "half precision and numbers",
        "plain numbers",
        "training state",
        "one-dimensional temperature",
        "safetensors",
    ],
)
def test_formats(tiny, tmp_path, recwarn, kind):
    clip = published()
    path = write(kind, clip, tmp_path)
    gc.collect()  # warns of files that earlier tests left open
    recwarn.clear()
    loaded = build_clip(tiny.replace(pretrained=str(path)))
    assert not [str(w.message) for w in recwarn.list]
    assert list(loaded.state_dict()) == list(clip.state_dict())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, clip.state_dict()[name]) and tensor.dtype == torch.float32, name


def test_openais_archive_fits_a_model_with_a_text_tower_of_its_own(tiny, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP | dict(custom_text=True)))
    loaded = build_clip(tiny.replace(pretrained=str(write("torchscript", published(), tmp_path))))
    assert isinstance(loaded, open_clip.CustomTextCLIP)
    assert torch.equal(loaded.text.token_embedding.weight, published().token_embedding.weight)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_no_pickled_code_is_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": published().state_dict(), "args": Attack()}, "attack.pt")
    with pytest.raises(
        BackboneError, match="attack.pt does not contain weights of this model: Weights only load failed"
    ):
        build_clip(tiny.replace(pretrained="attack.pt"))
    assert not (tmp_path / "attacked").exists()
    torch.load("attack.pt", weights_only=False)  # which would have
    assert (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {
                "text_model.embeddings.weight": torch.zeros(2),
                "vision_model.encoder.layers.0.mlp.fc1.weight": 0,
            },
            "'vision_model.encoder.layers.0.mlp.fc1.weight' is not a tensor",
        ),
        (
            lambda state: {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2)},
            r"\d+ missing: positional_embedding, .*; 1 unexpected: vision_model.encoder.layers.0.mlp.fc1.weight",
        ),
        (
            lambda state: state | {"visual.proj": torch.zeros(3, 5)},
            r"1 of another shape: visual.proj \(3, 5\), expected \(32, 16\)",
        ),
        (
            lambda state: state | {"logit_scale": torch.zeros(3, 5)},
            r"1 of another shape: logit_scale \(3, 5\), expected \(\)",
        ),
        (
            lambda state: {name: tensor for name, tensor in state.items() if name != "visual.proj"},
            "1 missing: visual.proj",
        ),
        (
            lambda state: state | {"visual.positional_embedding": torch.zeros(())},
            "1 of another shape: visual.positional_",
        ),
        (lambda state: {}, ""),
        (lambda state: torch.zeros(3), ""),
    ],
    ids=["hugging-face-mixed", "hugging-face", "shape", "temperature", "missing", "scalar", "empty", "tensor"],
)
def test_files_of_others_are_told_what_was_expected(tiny, tmp_path, change, message):
    path = tmp_path / "other.pt"
    torch.save(change(published().state_dict()), path)
    with pytest.raises(BackboneError, match=f"other.pt does not contain weights of this model: .*{message}") as error:
        build_clip(tiny.replace(pretrained=str(path)))
    assert "expected a state dict in the format of open_clip (.pt, .safetensors) or OpenAI" in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ TorchScript


HOSTILE = """
from typing import Tuple
import torch
from torch import nn

class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.zeros(2)
    def forward(self, x):
        return x
    @torch.jit.export
    def __getstate__(self) -> Tuple[torch.Tensor, bool]:
        return (self.a, self.training)
    @torch.jit.export
    def __setstate__(self, state: Tuple[torch.Tensor, bool]):
        self.a = state[0]
        self.training = state[1]
        torch.save(state[0], "victim")

class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Hostile()
    def forward(self, x):
        return x
"""


@pytest.mark.filterwarnings("ignore")  # of deprecation
@pytest.mark.parametrize("name", ["Hostile", "Holder"])
def test_no_code_of_an_archive_is_run(tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}_source.py").write_text(HOSTILE)  # TorchScript reads the source of what it compiles
    torch.jit.script(getattr(importlib.import_module(f"{name}_source"), name)()).save("hostile.pt")
    with pytest.raises(BackboneError, match="Hostile restores itself by code .__setstate__., which is never run"):
        build_clip(tiny.replace(pretrained="hostile.pt"))
    assert not (tmp_path / "victim").exists()
    torch.jit.load("hostile.pt")  # which would have
    assert (tmp_path / "victim").exists()


@pytest.mark.filterwarnings("ignore")
def test_an_archive_has_what_its_state_dict_has(tmp_path):
    """Parameters and buffers of several dtypes, views and empty tensors, and no other attribute."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.arange(12.0)
            self.weight = nn.Parameter(base[1:9].view(2, 4).t())
            self.bias = nn.Parameter(base.to(torch.bfloat16)[::3])
            self.register_buffer("count", torch.tensor(7))
            self.register_buffer("seen", torch.tensor([True, False]))
            self.register_buffer("empty", torch.empty(0, 3))
            self.other = torch.ones(5)
            self.sizes = [1, 2]

        def forward(self, x):
            return x @ self.weight + self.other.sum() + self.sizes[0]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()
            self.norm = nn.LayerNorm(2)

        def forward(self, x):
            return self.norm(self.part(x))

    x = torch.randn(3, 4)
    for number, module in enumerate((torch.jit.script(Whole()), torch.jit.trace(Whole(), x))):
        path = tmp_path / f"{number}.pt"
        torch.jit.save(module, path)
        found, expected = read_archive(path), torch.jit.load(path).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def rewritten(source, target, change):
    """A zip file, each of its files changed by `change` of name and content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, content: b"cos\nmkdir\n(S'attacked'\ntR." if name.endswith("data.pkl") else content,
            "the archive holds a os.mkdir; expected modules and tensors alone",
        ),
        (
            lambda name, content: b"cbuiltins\ngetattr\n." if name.endswith("data.pkl") else content,
            "the archive holds a builtins.getattr",
        ),
        (lambda name, content: b"I7\n." if name.endswith("data.pkl") else content, "not a module but a int"),
        (lambda name, content: content[:100] if name.endswith("data.pkl") else content, ""),
        (lambda name, content: content[:-2] if name.endswith("data/3") else content, "bytes, expected"),
        (lambda name, content: content + b"12" if name.endswith("data/3") else content, "bytes, expected at most"),
    ],
    ids=["call", "builtin", "number", "cut off", "short", "long"],
)
def test_a_forged_archive_is_refused(tiny, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    rewritten(write("torchscript", published(), tmp_path), "forged.pt", change)
    with pytest.raises(BackboneError, match=f"forged.pt does not contain weights of this model: .*{message}") as error:
        build_clip(tiny.replace(pretrained="forged.pt"))
    assert "\n" not in str(error.value) and not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("kind", ["torchscript", "pickled"])
def test_a_small_file_does_not_unpack_to_a_large_one(tmp_path, kind):
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1 << 20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight

    path, packed = tmp_path / "zeros.pt", tmp_path / "packed.pt"
    if kind == "torchscript":
        torch.jit.script(Zeros()).save(path)
    else:
        torch.save(Zeros().state_dict(), path)
    assert read_weights(path).state.keys() == {"weight"}
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert packed.stat().st_size < path.stat().st_size / 100
    with pytest.raises(ValueError, match="its tensors of .* bytes are compressed, in a file of"):
        read_weights(packed)


# ------------------------------------------------------------------------------------ wrappers


def put(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "module": lambda state: put(state, "module."),
    "compiled": lambda state: put(state, "_orig_mod."),
    "both": lambda state: put(state, "module._orig_mod."),
    "lightning": lambda state: {"state_dict": put(state, "model."), "epoch": 3, "optimizer_states": [{"state": {}}]},
    "model key": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "model_state_dict": lambda state: {"model_state_dict": state, "rng": torch.get_rng_state()},
    "irra": lambda state: {"model": put(state, "base_model."), "iteration": 1},
    "any key": lambda state: {"weights": put(state, "net.clip.")},
    "twice": lambda state: {"model": {"state_dict": state}},
    "averaged": lambda state: {
        "state_dict": state,
        "state_dict_ema": {name: -tensor for name, tensor in state.items()},
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_state_dicts_load(tiny, tmp_path, recwarn, kind):
    state, path = published().state_dict(), tmp_path / "wrapped.pt"
    torch.save(WRAPPED[kind](state), path)
    recwarn.clear()
    loaded = build_clip(tiny.replace(pretrained=str(path))).state_dict()
    assert not recwarn.list and all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("text", ["junk\n", "hello", "a text\n", "2026\n"])
def test_a_file_of_text(text, tiny, tmp_path):
    (tmp_path / "text.pt").write_text(text)
    with pytest.raises(BackboneError, match="text.pt does not contain weights of this model: Weights only load failed"):
        build_clip(tiny.replace(pretrained=str(tmp_path / "text.pt")))


def test_open_clip_does_not_call_a_model_random_before_its_weights_are_read(known, tmp_path, caplog):
    options = ["--as", "clip", "--model", known, "--image-size", "48", "16", "-o", str(tmp_path / "out.safetensors")]
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"visual.conv1.weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt", "none.pt"):
        with pytest.raises(BackboneError):
            build_clip(ModelConfig(known, str(tmp_path / name), (48, 16)))
        assert main(["import", str(tmp_path / name), *options]) == 1
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(open_clip.CLIP(**TINY_CLIP).state_dict(), tmp_path / f"{seed}.pt")
    assert main(["import", str(tmp_path / "0.pt"), *options, "--pretrained", str(tmp_path / "none.pt")]) == 1
    assert main(["import", str(tmp_path / "0.pt"), *options]) == 0
    with pytest.raises(CheckpointError, match="has other weights than the backbone of the training"):
        load_model(tmp_path / "out.safetensors", pretrained=str(tmp_path / "1.pt"))
    build_clip(ModelConfig(known, "none", (48, 16)))
    assert not caplog.records
    open_clip.create_model(known)
    assert "initialized randomly" in caplog.text  # what open_clip itself says


def test_tensors_of_other_modules_are_left_out_with_a_warning(tiny, tmp_path):
    state, path = published().state_dict(), tmp_path / "irra.pt"
    torch.save({"model": put(state, "base_model.") | {"classifier.weight": torch.ones(3)}}, path)
    with pytest.warns(
        UserWarning, match="1 tensors beside 'base_model.' are not part of the CLIP.*: classifier.weight"
    ):
        loaded = build_clip(tiny.replace(pretrained=str(path))).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: put(state, "student.") | put(state, "teacher."), "several CLIPs, .* 'student.', 'teacher.'"),
        (lambda state: state | put(state, "teacher."), "several CLIPs, with the prefixes '', 'teacher.'"),
        (lambda state: {"state_dict": state, "model": state}, "several state dicts, state_dict, model; expected one"),
        (lambda state: {"a": state, "b": state}, "several state dicts, a, b; expected one"),
        (lambda state: {"epoch": 3, "args": {"lr": 1}}, "no state dict of tensors by name; found keys epoch, args"),
        (lambda state: {1: torch.zeros(2)}, "no state dict of tensors by name; found keys 1"),
        (lambda state: [state], "no state dict of tensors by name; found none"),
    ],
)
def test_files_of_several_or_no_clips_are_refused(tiny, tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content(published().state_dict()), path)
    with pytest.raises(BackboneError, match=f"other.pt does not contain weights of this model: .*{message}"):
        build_clip(tiny.replace(pretrained=str(path)))


# ------------------------------------------------------------------------------------ dtypes and values


def with_value(value):
    return lambda tensor: tensor.clone().index_fill_(0, torch.tensor([1]), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.complex64), "is complex64; expected float32, float16, bfloat16 or float64"),
        (lambda tensor: tensor.to(torch.float8_e5m2), "is float8_e5m2; expected float32"),
        (lambda tensor: tensor.int(), "is int32; expected float32"),
        (lambda tensor: tensor.to(torch.uint8), "is uint8; expected float32"),
        (lambda tensor: tensor.view(torch.int32), "is int32; expected float32"),
        (with_value(torch.nan), "has 32 of 3072 elements that are NaN or infinite in float32"),
        (with_value(torch.inf), "has 32 of 3072 elements that are NaN or infinite in float32"),
        (lambda tensor: with_value(torch.nan)(tensor.half()), "has 32 of 3072 elements that are NaN"),
        (lambda tensor: with_value(1e60)(tensor.double()), "has 32 of 3072 elements that are NaN"),
        (lambda tensor: tensor.to_sparse(), "is sparse, nested or without values; expected a dense tensor"),
        (lambda tensor: tensor.to("meta"), "is sparse, nested or without values; expected a dense tensor"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "is qint8; expected float32"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # quantisation is deprecated
def test_weights_of_another_dtype_or_without_meaning_are_named(tiny, tmp_path, change, message):
    name, state, paths = "visual.transformer.resblocks.1.attn.in_proj_weight", published().state_dict(), []
    state[name] = change(state[name])
    paths.append(tmp_path / "bad.pt")
    torch.save(state, paths[-1])
    if state[name].layout == torch.strided and state[name].device.type == "cpu" and not state[name].is_quantized:
        paths.append(tmp_path / "bad.safetensors")
        save_file(state, paths[-1])
    for path in paths:
        with pytest.raises(BackboneError) as error:
            build_clip(tiny.replace(pretrained=str(path)))
        assert str(path) in str(error.value) and f"the tensor {name!r} {message}" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_other_floating_point_dtypes_load(tiny, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in published().state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors")
    loaded = build_clip(tiny.replace(pretrained=str(tmp_path / "clip.safetensors"))).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "invalid or truncated JSON"),
        ("[3]", "lack the field 'size'"),
        ('{"size": [32, 32], "mean": [0, 0, 0]}', "lack the field 'std'"),
        ('{"size": [32], "mean": [0, 0, 0], "std": [1, 1, 1]}', r"the field 'size' of .* is \[32\]"),
        ('{"size": [32, 0], "mean": [0, 0, 0], "std": [1, 1, 1]}', r"the field 'size' of .* is \[32, 0\]"),
        ('{"size": [32, 32], "mean": [0, 0, NaN], "std": [1, 1, 1]}', "NaN is not a number"),
        ('{"size": [32, 32], "mean": [0, 0, 0], "std": [1, 0, 1]}', "the field 'std'"),
        ('{"size": [32, 32], "mean": "000", "std": [1, 1, 1]}', "the field 'mean'"),
        ('{"size": [32, 32], "mean": [0, 0, 0], "std": [1, 1, 1], "quick_gelu": 1}', "the field 'quick_gelu'"),
    ],
)
def test_metadata_that_no_merge_wrote_are_refused(tmp_path, stored, message):
    path = tmp_path / "clip.safetensors"
    save_file({"visual.conv1.weight": torch.zeros(2)}, path, {"format": "pt", PREPROCESSING: stored})
    with pytest.raises(ValueError, match=message):
        read_weights(path)


# ------------------------------------------------------------------------------------ the activation


def gelu(tmp_path, quick):
    """A model configuration and the weights in OpenAI's format and in open_clip's."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP | dict(quick_gelu=quick)))
    return write("half precision and numbers", published(), tmp_path), write("safetensors", published(), tmp_path)


@pytest.mark.parametrize("quick", [True, False])
def test_weights_for_another_activation_are_named(tiny, tmp_path, recwarn, quick):
    """By OpenAI's format, by the configuration of the hub beside the file, by a published name, by merged metadata."""
    openai, plain = gelu(tmp_path, quick)
    names = ("GELU", "QuickGELU") if quick else ("QuickGELU", "GELU")
    message = f"the weights were trained with {names[0]}, as .* tells, but .*tiny.json computes {names[1]}, which gives"
    folders = {}
    for beside in (True, False):
        folders[beside] = tmp_path / str(beside)
        folders[beside].mkdir()
        shutil.copy(plain, folders[beside] / "model.safetensors")
        config = {"model_cfg": TINY_CLIP | dict(quick_gelu=beside)}
        (folders[beside] / "open_clip_config.json").write_text(json.dumps(config))
    merged = {}
    for trained in (True, False):
        merged[trained] = tmp_path / f"merged-{trained}.safetensors"
        preprocess = Preprocess((32, 32), (0.5,) * 3, (0.2,) * 3)
        merged[trained].write_bytes(weights_as_bytes(published().state_dict(), preprocess, trained))
    named = {True: tmp_path / "ViT-B-16.pt", False: tmp_path / "vit_b_16-laion400m_e32-55e67d44.pt"}
    for path in named.values():
        torch.save(published().state_dict(), path)
    fitting = [plain, folders[quick] / "model.safetensors", merged[quick], named[quick]] + [openai] * quick
    others = [folders[not quick] / "model.safetensors", merged[not quick], named[not quick]] + [openai] * (not quick)
    recwarn.clear()
    for path in fitting:
        build_clip(tiny.replace(pretrained=str(path)))
    assert not recwarn.list
    for path in others:
        with pytest.warns(UserWarning, match=message):
            build_clip(tiny.replace(pretrained=str(path)))


def test_the_model_with_the_other_activation_is_named():
    assert with_other_activation("ViT-B-16") == "--model ViT-B-16-quickgelu"
    assert with_other_activation("ViT-B-16-quickgelu") == "--model ViT-B-16"
    assert with_other_activation("folder/a.json") == 'the other value of "quick_gelu" in the model configuration'
    assert with_other_activation("ViT-S-16") == 'a model configuration with "quick_gelu"'


# ------------------------------------------------------------------------------------ the image size


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("image_size", "grid"),
    [((32, 32), (4, 4)), ((48, 16), (6, 2)), ((40, 40), (5, 5))],
    ids=["published", "configured", "square"],
)
def test_position_embeddings_are_resampled_once_or_not_at_all(tiny, tmp_path, image_size, grid, named):
    """Those of the configured size stay as they are; the others are resized by this project's rule alone."""
    if named:
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "tiny-for-weights.json").write_text(json.dumps(TINY_CLIP))
        open_clip.add_model_config(tmp_path / "configs")
        tiny = tiny.replace(model="tiny-for-weights")
    clip = published(image_size)
    path = write("safetensors", clip, tmp_path)
    loaded = AdaptedCLIP(tiny.replace(pretrained=str(path))).clip.visual
    expected = resize_position_embedding(clip.visual.positional_embedding, grid, (6, 2))
    assert torch.equal(loaded.positional_embedding, expected)
    assert torch.equal(expected, clip.visual.positional_embedding) == (image_size == (48, 16))
    assert (loaded.grid_size, loaded.image_size) == ((6, 2), (48, 16))


def test_a_file_holds_its_image_size_and_normalisation(tiny, tmp_path):
    """64×16 has as many patches as the published 32×32: the file must say which it is for."""
    clip, path = published((64, 16)), tmp_path / "clip.safetensors"
    path.write_bytes(weights_as_bytes(clip.state_dict(), Preprocess((64, 16), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)), True))
    model = AdaptedCLIP(tiny.replace(pretrained=str(path), image_size=(64, 16)))
    assert torch.equal(model.clip.visual.positional_embedding, clip.visual.positional_embedding)
    assert (model.preprocess.mean, model.preprocess.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    other = AdaptedCLIP(tiny.replace(pretrained=str(path))).clip.visual
    expected = resize_position_embedding(clip.visual.positional_embedding, (8, 2), (6, 2))
    assert torch.equal(other.positional_embedding, expected)


def test_a_position_embedding_of_no_known_size_is_refused(tiny, tmp_path):
    path = write("safetensors", published((24, 40)), tmp_path)
    with pytest.raises(
        BackboneError,
        match="safetensors: the position embedding has 16 rows; expected those of images of 32×32 or 48×16, or of",
    ):
        build_clip(tiny.replace(pretrained=str(path)))
