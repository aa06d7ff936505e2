"""Weights of a whole CLIP from a file: open_clip's and OpenAI's formats, and position embeddings of several sizes."""

import gc
import json
import os
import warnings

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_CLIP
from torch import nn

from upperson.config import ModelConfig
from upperson.data import Preprocess
from upperson.errors import BackboneError
from upperson.methods.zero_shot import ZeroShot
from upperson.model import AdaptedCLIP
from upperson.model.backbone import build_clip, resize_position_embedding
from upperson.model.weights import weights_as_bytes

OPENAI_NUMBERS = {"input_resolution": 32, "context_length": 12, "vocab_size": 49408}


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP))
    return ModelConfig(str(tmp_path / "tiny.json"), "none", (48, 16), ZeroShot(), backend="torch")


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
    ids=["hugging-face-mixed", "hugging-face", "shape", "missing", "scalar", "empty", "tensor"],
)
def test_files_of_others_are_told_what_was_expected(tiny, tmp_path, change, message):
    path = tmp_path / "other.pt"
    torch.save(change(published().state_dict()), path)
    with pytest.raises(BackboneError, match=f"other.pt does not contain weights of this model: .*{message}") as error:
        build_clip(tiny.replace(pretrained=str(path)))
    assert "expected a state dict in the format of open_clip (.pt, .safetensors) or OpenAI" in str(error.value)
    assert "\n" not in str(error.value)


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
    path.write_bytes(weights_as_bytes(clip.state_dict(), Preprocess((64, 16), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))))
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
