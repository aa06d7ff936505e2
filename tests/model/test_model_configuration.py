"""A user's model configuration: what open_clip can build is built, and all else is refused in one line."""

import json
import os

import open_clip
import pytest
import torch
from tiny import TINY_CLIP, inputs

from upperson.config import ModelConfig
from upperson.errors import BackboneError
from upperson.methods.zero_shot import ZeroShot
from upperson.model import AdaptedCLIP
from upperson.model.backbone import random_clip


def changed(place, value):
    """TINY_CLIP with one field changed, as JSON. `place`: names joined by a dot."""
    description = json.loads(json.dumps(TINY_CLIP))
    *path, name = place.split(".")
    inner = description
    for part in path:
        inner = inner[part]
    inner[name] = value
    return json.dumps(description)


def assert_refused(path, message):
    with pytest.raises(BackboneError) as error:
        random_clip(str(path))
    assert str(error.value).startswith(f"{path} is not an open_clip model configuration: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "invalid or truncated JSON"),
        (b"{", "invalid or truncated JSON"),
        (b"\xff\xfe{", "expected UTF-8 text"),
        (b"[" * 100_000, "the JSON is nested too deeply"),
        (b"[]", "the file is []; expected an object"),
        (b"null", "the file is None; expected an object"),
        (b'{"embed_dim": NaN}', "field 'embed_dim': NaN is not a number"),
        (b'{"embed_dim": 1, "embed_dim": 2}', "the key 'embed_dim' stands twice"),
        (b'{"embed_dim": ' + b"9" * 5000 + b"}", "field 'embed_dim': a number of 5000 digits"),
        (b'{"embed_dim": 16, "vision_cfg": {}}', "missing field text_cfg"),
    ],
)
def test_broken_json(tmp_path, content, message):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("embed_dim", "16", "embed_dim is '16'; expected a whole number from 1 to 1,000,000"),
        ("embed_dim", 0, "embed_dim is 0; expected a whole number"),
        ("embed_dim", 2.5, "embed_dim is 2.5; expected a whole number"),
        ("embed_dim", True, "embed_dim is True; expected a whole number"),
        ("embed_dim", 10**30, "embed_dim is 1000000000000000000000000000000; expected a whole number"),
        ("quick_gelu", "yes", "quick_gelu is 'yes'; expected true or false"),
        ("vision_cfg", [], "vision_cfg is []; expected an object"),
        ("vision_cfg", None, "vision_cfg is None; expected an object"),
        ("text_cfg", "large", "text_cfg is 'large'; expected an object"),
        ("vision_cfg.widht", 32, "unknown field vision_cfg.widht; expected fields of layers, width"),
        ("vision_cfg.width", -32, "vision_cfg.width is -32; expected a whole number"),
        ("vision_cfg.layers", 10**6, "vision_cfg.layers is 1000000; expected a list of 4 whole numbers or a whole"),
        ("vision_cfg.image_size", [32], "vision_cfg.image_size is [32]; expected a list of 2 whole numbers or a whole"),
        ("vision_cfg.image_size", [32, "8"], "vision_cfg.image_size is [32, '8']; expected a list of 2 whole numbers"),
        ("vision_cfg.mlp_ratio", "4", "vision_cfg.mlp_ratio is '4'; expected a number"),
        ("vision_cfg.timm_model_name", "vit", "unknown field vision_cfg.timm_model_name"),
        ("text_cfg.hf_model_name", "bert", "unknown field text_cfg.hf_model_name"),
        ("text_cfg.layers", None, "text_cfg.layers is None; expected a whole number from 1 to 1,000"),
        ("text_cfg.pool_type", 3, "text_cfg.pool_type is 3; expected a string"),
    ],
)
def test_fields_that_do_not_fit(tmp_path, place, value, message):
    path = tmp_path / "model.json"
    path.write_text(changed(place, value))
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("text_cfg.heads", 3, "embed_dim must be divisible by num_heads"),
        ("vision_cfg.head_width", 64, ""),
        ("vision_cfg.patch_size", 64, ""),
        ("vision_cfg.image_size", [4, 32], ""),
        ("vision_cfg.mlp_ratio", -1, ""),
        ("vision_cfg.mlp_ratio", 0.001, "without elements"),
        ("vision_cfg.pool_type", "middle", ""),
        ("vision_cfg.act_kwargs", {"a": 1}, ""),
        ("text_cfg.width", 10**6, "weights, expected at most 20,000,000,000"),
    ],
)
def test_sizes_that_do_not_go_together(tmp_path, place, value, message):
    path = tmp_path / "model.json"
    path.write_text(changed(place, value))
    with pytest.raises(BackboneError) as error:
        random_clip(str(path))
    assert str(error.value).startswith(f"{path} is not a model configuration that open_clip can build: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_and_a_missing_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(BackboneError, match="folder.json cannot be read: expected a regular file, found a folder"):
        random_clip(str(tmp_path / "folder.json"))
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(BackboneError, match="fifo.json cannot be read: expected a regular file, found a FIFO"):
        random_clip(str(tmp_path / "fifo.json"))
    with pytest.raises(BackboneError, match="missing.json does not exist"):
        random_clip(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("custom_text", True),
        ("init_logit_bias", -10),
        ("vision_cfg.image_size", [32, 24]),
        ("vision_cfg.ls_init_value", 0.1),
        ("vision_cfg.act_kwargs", None),
        ("text_cfg.no_causal_mask", True),
    ],
)
def test_what_open_clip_builds_is_built(tmp_path, place, value):
    path = tmp_path / "model.json"
    path.write_text(changed(place, value))
    model = AdaptedCLIP(ModelConfig(str(path), "none", (48, 16), ZeroShot(), backend="torch"))
    images, tokens = inputs()
    with torch.no_grad():
        assert model.encode_image(images).shape == model.encode_text(tokens).shape == (4, 16)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32-quickgelu", "ViT-L-14-336", "ViT-SO400M-14-SigLIP"])
def test_open_clips_own_configurations_fit(tmp_path, name):
    """Those with a tower of another library are refused, by the field that names it."""
    path = tmp_path / "model.json"
    description = open_clip.get_model_config(name)
    path.write_text(json.dumps(description))
    with torch.device("meta"):
        if "timm_model_name" in description["vision_cfg"]:
            with pytest.raises(BackboneError, match="unknown field vision_cfg.timm_model_name"):
                random_clip(str(path))
        else:
            random_clip(str(path))
