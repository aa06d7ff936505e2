"""Checkpoints under the names of the released trainings give the features of the released code, in float64.

The weights are those of the recipes in tests/golden.
"""

import numpy as np
import pytest
import torch
from foreign import hugging_face_state, released_state, save_released
from released import FEATURE_BOUND, GOLDEN, assert_near, recipe_in

from upperson.deploy.importing import read_foreign

IRRA_HEADS = {
    "id.": "classifier.",
    "mlm.ln_text.": "ln_pre_t.",
    "mlm.ln_image.": "ln_pre_i.",
    "mlm.ln_post.": "ln_post.",
    "mlm.attention.": "cross_attn.",
    "mlm.blocks.": "cross_modal_transformer.resblocks.",
    "mlm.dense.": "mlm_head.dense.",
    "mlm.ln_dense.": "mlm_head.ln.",
    "mlm.vocabulary.": "mlm_head.fc.",
}


def golden_of(folder, name):
    return recipe_in(folder), np.load(folder / f"{name}.npz")


def drawn(recipe, name, shapes):
    return {key: torch.from_numpy(array) for key, array in recipe.weights(name, shapes).items()}


def petl_name(name):
    """The neutral name of the golden files → this project's."""
    for kind in ("prefix", "lora"):
        name = name.replace(f".{kind}_", f".{kind}.")
    return name.replace(".prompt_projection.", ".prompt.projection.") + (".tokens" if name.endswith(".prompt") else "")


@torch.no_grad()
def assert_features(model, recipe, numbers, name, count=2):
    images = torch.from_numpy(recipe.images(name)[:count])
    found = model.encode_image(images), model.encode_text(torch.from_numpy(numbers["caption_ids"][:count]))
    for side, features in zip(("image", "text"), found, strict=True):
        assert_near(f"{side} features", features, numbers[f"{side}_features"][:count], FEATURE_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "folder", "name"),
    [("up-person", ".", "cuhk"), ("cskt", "cskt", "cskt"), ("dm-adapter", "dm_adapter", "dm_adapter")],
)
def test_adapters(form, folder, name, tmp_path):
    recipe, numbers = golden_of(GOLDEN / folder, name)
    clip = drawn(recipe, name, recipe.clip_shapes())
    petl = {
        petl_name(key): tensor
        for key, tensor in drawn(recipe, name, recipe.petl_shapes(**recipe.CONFIGS[name])).items()
    }
    path = save_released(tmp_path / "best.pth", released_state(form, clip, petl))
    foreign = read_foreign(path, form, dtype=torch.float64)
    assert foreign.read == len(clip) + len(petl)
    assert set(foreign.unread) == {"optimizer", "scheduler", "epoch", "iteration", "num_epoch"}
    assert foreign.config.model.method.name == form and foreign.config.model.image_size == (384, 128)
    assert_features(foreign.model, recipe, numbers, name)


@pytest.mark.slow
def test_irra(tmp_path):
    recipe, numbers = golden_of(GOLDEN / "irra", "irra")
    clip = drawn(recipe, "irra", recipe.clip_shapes())
    heads = {}
    for key, shape in recipe.head_shapes().items():
        (start,) = [start for start in IRRA_HEADS if key.startswith(start)]
        heads[key.replace(start, IRRA_HEADS[start], 1)] = torch.empty(shape)  # no feature depends on them
    path = save_released(tmp_path / "best.pth", released_state("irra", clip, heads=heads))
    foreign = read_foreign(path, "irra", dtype=torch.float64)
    assert foreign.read == len(clip) == 301 and len(foreign.unread) == 66 + 5
    assert foreign.config.model.method.name == "irra"
    assert_features(foreign.model, recipe, numbers, "irra")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["clip", "huggingface-clip"])
def test_a_clip(form, tmp_path):
    """The weights of the fully trained CLIP, under the names of another program."""
    recipe, numbers = golden_of(GOLDEN / "irra", "irra")
    clip = drawn(recipe, "irra", recipe.clip_shapes())
    torch.save(clip if form == "clip" else hugging_face_state(clip), tmp_path / "clip.bin")
    foreign = read_foreign(tmp_path / "clip.bin", form, dtype=torch.float64)
    assert foreign.config.model.method.name == "zero-shot"
    assert_features(foreign.model, recipe, numbers, "irra")
