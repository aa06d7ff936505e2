"""The frozen backbone: any open_clip CLIP with a ViT, from a pretrained tag or a local file, for upright images."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from upperson.config import ModelConfig
from upperson.embedded.weights import CLIP_CONFIG, EmbeddedWeightsError, load_embedded_clip
from upperson.errors import BackboneError
from upperson.model.download import load_published
from upperson.model.weights import ACCEPTED, mismatch, read_weights

CLIP_VOCABULARY = 49408
Clip = Any  # an open_clip.CLIP or CustomTextCLIP, whose towers open_clip does not annotate


def build_clip(config: ModelConfig) -> nn.Module:
    """The open_clip model of `config` with its published weights.

    The image size is that of the published model or of the weights file, not that of `config`. Raises BackboneError for
    an unknown model or tag, and for a file that is missing or does not fit.
    """
    model, pretrained = config.model, config.pretrained
    if model == "embedded" and pretrained == "embedded":
        try:
            return load_embedded_clip()
        except EmbeddedWeightsError as error:
            raise BackboneError(str(error)) from error
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        return load_published(model, pretrained)
    clip = random_clip(model)
    if pretrained == "none":
        return clip
    if not Path(pretrained).is_file():
        nor_tag = "" if configuration_file(model) else f" nor one of its tags ({', '.join(tags) or 'none'})"
        raise BackboneError(f"pretrained {pretrained!r} of {model} is neither a file{nor_tag} nor 'none'")
    load_weights(clip, Path(pretrained), config.image_size)
    return clip


def random_clip(model: str, image_size: tuple[int, int] | None = None) -> nn.Module:
    """The open_clip model `model` with random weights. `image_size`: (height, width); None: the published size."""
    path = configuration_file(model)
    if path is None:
        if model not in open_clip.list_models():
            close = difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.4)
            raise BackboneError(
                f"unknown model {model!r}; expected 'embedded', the path of a .json file, or one of open_clip's models "
                f"(open_clip.list_models()); similar names: {', '.join(close) or 'none'}"
            )
        return open_clip.create_model(model, force_image_size=image_size)
    try:
        description = json.loads(path.read_text())
        if image_size is not None:
            description["vision_cfg"]["image_size"] = image_size
        custom_text = description.pop("custom_text", False)
        return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**description)
    except FileNotFoundError:
        raise BackboneError(f"model configuration {path} does not exist") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BackboneError(f"{path} is not an open_clip model configuration: {error}") from error


def configuration_file(model: str) -> Path | None:
    """The JSON model configuration of a model's name; None for a model of open_clip."""
    if model == "embedded":
        return CLIP_CONFIG
    return Path(model) if model.endswith(".json") else None


def load_weights(clip: Clip, path: Path, image_size: tuple[int, int]) -> None:
    """Loads weights from a file of open_clip or OpenAI. No pickled code is executed.

    The image size of the image tower becomes that of the file's position embedding: the published size, `image_size`,
    or another square.
    """
    try:
        state, preprocessing = read_weights(path)
        open_clip.model.resize_text_pos_embed(state, clip)
        if isinstance(clip, open_clip.CustomTextCLIP):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        if "logit_scale" in state:  # () or (1,)
            state["logit_scale"] = state["logit_scale"].reshape(clip.logit_scale.shape)
    except Exception as error:  # damaged and foreign files raise many types
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise BackboneError(f"{path} does not contain weights of this model: {reason}; {ACCEPTED}") from error
    embedding = state.get("visual.positional_embedding")
    if isinstance(clip.visual, VisionTransformer) and embedding is not None and embedding.dim() == 2:
        fit_image_size(clip.visual, image_size_of(path, embedding, preprocessing, clip.visual, image_size))
    problems = mismatch(state, clip.state_dict())
    if problems:
        raise BackboneError(f"{path} does not contain weights of this model: {problems}; {ACCEPTED}")
    clip.load_state_dict(state)
    if preprocessing:
        known = open_clip.get_model_preprocess_cfg(clip)
        open_clip.set_model_preprocess_cfg(clip, known | {name: tuple(preprocessing[name]) for name in ("mean", "std")})


def image_size_of(
    path: Path, embedding: Tensor, preprocessing: dict[str, Any], visual: VisionTransformer, image_size: tuple[int, int]
) -> tuple[int, int]:
    """The image size (height, width) in pixels of a file's position embedding (1 + patches, C)."""
    (patch_height, patch_width), rows = visual.patch_size, len(embedding)
    side = math.isqrt(max(rows - 1, 0))
    sizes = [visual.image_size, image_size, (side * patch_height, side * patch_width)]
    if preprocessing:
        sizes = [tuple(preprocessing["size"])]  # the number of patches alone would not determine the grid
    for height, width in sizes:
        if rows == 1 + (height // patch_height) * (width // patch_width):
            return height, width
    raise BackboneError(
        f"{path}: the position embedding has {rows} rows; expected those of images of "
        f"{' or '.join(f'{height}×{width}' for height, width in sizes[:2])}, or of square images"
    )


def text_tower(clip: Clip) -> Any:
    """The module with the text transformer: `text` in CustomTextCLIP, the model itself in CLIP."""
    return getattr(clip, "text", clip)


def pooling(clip: Clip) -> tuple[str, int | None]:
    """open_clip's pool type, which selects the token that represents a caption, and the id of the end token."""
    if hasattr(clip, "text"):  # CustomTextCLIP
        return clip.text.pool_type, clip.text.eos_id
    return clip.text_pool_type, clip.text_eos_id


def require_transformers(name: str, clip: Clip) -> None:
    """Raises BackboneError unless both towers are open_clip's own transformers with CLIP's vocabulary."""
    if not isinstance(clip.visual, VisionTransformer):
        raise BackboneError(
            f"{name}: the image tower is a {type(clip.visual).__name__}; expected open_clip's "
            "VisionTransformer (its ViT CLIP models)"
        )
    text = text_tower(clip)
    if not isinstance(clip, open_clip.CLIP) and (not isinstance(text, TextTransformer) or text.cls_emb is not None):
        raise BackboneError(
            f"{name}: the text tower is another model; expected open_clip's own text transformer with an end token"
        )
    pool_type, _ = pooling(clip)
    if pool_type not in ("argmax", "eos", "first", "last"):
        raise BackboneError(
            f"{name}: the text tower has pool type {pool_type!r}; expected argmax, eos, first or last, which select "
            "one token"
        )
    for tower, transformer in (("image", clip.visual.transformer), ("text", text.transformer)):
        kind = type(transformer.resblocks[0])
        if kind is not ResidualAttentionBlock:
            raise BackboneError(
                f"{name}: the {tower} tower has blocks of type {kind.__name__}; expected open_clip's "
                "ResidualAttentionBlock"
            )
    vocabulary = text.token_embedding.num_embeddings
    if vocabulary != CLIP_VOCABULARY:
        raise BackboneError(
            f"{name}: the vocabulary has {vocabulary} tokens; expected the {CLIP_VOCABULARY} tokens of CLIP's tokenizer"
        )


def fit_image_size(visual: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Changes the image size (height, width) of the image tower by resizing its position embedding.

    If patches do not tile the image (384×128 by 14×14), the remaining pixels at the lower and right edge are ignored,
    as in every CLIP. Raises BackboneError for an image smaller than a patch.
    """
    patch_height, patch_width = visual.patch_size
    height, width = image_size
    if height < patch_height or width < patch_width:
        raise BackboneError(f"image_size {height}×{width} is smaller than one patch, {patch_height}×{patch_width}")
    grid = (height // patch_height, width // patch_width)
    visual.positional_embedding = nn.Parameter(
        resize_position_embedding(visual.positional_embedding, visual.grid_size, grid), requires_grad=False
    )
    visual.grid_size = grid
    visual.image_size = (height, width)


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resizes a position embedding (1 + rows · columns, C) of a class token and a row-major grid to another grid.

    The interpolation is bilinear with half-pixel centres and without antialiasing, as in the released UP-Person.
    open_clip's own is bicubic with antialiasing. The class token's row is kept.
    """
    if grid == new_grid:
        return embedding.detach().clone()
    first, rest = embedding.detach().split([1, embedding.shape[0] - 1])
    image = rest.unflatten(0, grid).permute(2, 0, 1).unsqueeze(0)  # (1, C, rows, columns)
    image = F.interpolate(image, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat([first, image.squeeze(0).flatten(1).t()])
