"""The frozen backbone: any open_clip CLIP with a ViT, from a pretrained tag or a local file, for upright images."""

import difflib
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from upperson.config import ModelConfig
from upperson.embedded import CLIP_CONFIG, load_embedded_clip
from upperson.embedded.weights import EmbeddedWeightsError

CLIP_VOCABULARY = 49408


class BackboneError(ValueError):
    """A backbone that cannot be built, loaded or adapted."""


def build_clip(config: ModelConfig) -> nn.Module:
    """The open_clip model that `config` names, with its weights, as it was published.

    Raises BackboneError for an unknown model or tag, and for a file that is missing or does not fit.
    """
    if config.model == "embedded" and config.pretrained == "embedded":
        try:
            return load_embedded_clip()
        except EmbeddedWeightsError as error:
            raise BackboneError(str(error)) from error
    if config.model == "embedded" or config.model.endswith(".json"):
        return create_from_file(CLIP_CONFIG if config.model == "embedded" else Path(config.model), config.pretrained)
    return create_by_name(config.model, config.pretrained)


def create_by_name(model: str, pretrained: str) -> nn.Module:
    if model not in open_clip.list_models():
        close = difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.4)
        raise BackboneError(f"unknown model {model!r}: neither 'embedded', nor the path of a .json file, nor one of "
                            f"open_clip's models (open_clip.list_models()); close to it: {', '.join(close) or 'none'}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained == "none":
        return open_clip.create_model(model)
    if pretrained in tags:
        try:
            return open_clip.create_model(model, pretrained=pretrained)
        except Exception as error:
            raise BackboneError(f"could not download or load the weights {pretrained!r} of {model}: {error}; "
                                "without a network give --pretrained the path of a checkpoint file") from error
    if not Path(pretrained).is_file():
        raise BackboneError(f"pretrained {pretrained!r} of {model} is neither a file nor one of its tags "
                            f"({', '.join(tags) or 'it has none'}) nor 'none'")
    clip = open_clip.create_model(model)
    load_weights(clip, Path(pretrained))
    return clip


def create_from_file(path: Path, pretrained: str) -> nn.Module:
    """A model described by an open_clip JSON model configuration."""
    try:
        description = json.loads(path.read_text())
        custom_text = description.pop("custom_text", False)
        clip = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**description)
    except FileNotFoundError:
        raise BackboneError(f"model configuration {path} does not exist") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BackboneError(f"{path} is not an open_clip model configuration: {error}") from error
    if pretrained == "none":
        return clip
    if not Path(pretrained).is_file():
        raise BackboneError(f"pretrained {pretrained!r} of {path} is neither a file nor 'none'")
    load_weights(clip, Path(pretrained))
    return clip


def load_weights(clip: nn.Module, path: Path) -> None:
    """Loads a checkpoint in any of the formats that open_clip reads; no pickled code is run."""
    try:
        open_clip.load_checkpoint(clip, str(path), strict=True, weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")
        shown = "\n".join(reason[:6])
        raise BackboneError(f"{path} does not hold weights of this model: {shown}") from error


def text_tower(clip: nn.Module) -> nn.Module:
    """The module that holds the text transformer: a part of CustomTextCLIP, the model itself in CLIP."""
    return getattr(clip, "text", clip)


def pooling(clip: nn.Module) -> tuple[str, int | None]:
    """How the text tower picks the token that stands for the caption: open_clip's pool type and end token id."""
    if isinstance(clip, open_clip.CustomTextCLIP):
        return clip.text.pool_type, clip.text.eos_id
    return clip.text_pool_type, clip.text_eos_id


def require_transformers(name: str, clip: nn.Module) -> None:
    """Raises BackboneError unless both towers are open_clip's own transformers and read CLIP's vocabulary."""
    if not isinstance(clip.visual, VisionTransformer):
        raise BackboneError(f"{name}: the image tower is a {type(clip.visual).__name__}; UP-Person adapts open_clip's "
                            "VisionTransformer (its ViT CLIP models)")
    text = text_tower(clip)
    if not isinstance(clip, open_clip.CLIP) and (not isinstance(text, TextTransformer) or text.cls_emb is not None):
        raise BackboneError(f"{name}: the text tower is not open_clip's own text transformer with an end token, which "
                            "UP-Person adapts")
    for tower, transformer in (("image", clip.visual.transformer), ("text", text.transformer)):
        kind = type(transformer.resblocks[0])
        if kind is not ResidualAttentionBlock:
            raise BackboneError(f"{name}: the {tower} tower is made of {kind.__name__}, not of open_clip's "
                                "ResidualAttentionBlock, which UP-Person adapts")
    vocabulary = text.token_embedding.num_embeddings
    if vocabulary != CLIP_VOCABULARY:
        raise BackboneError(f"{name}: the vocabulary has {vocabulary} tokens; UP-Person reads captions with CLIP's "
                            f"own tokenizer, of {CLIP_VOCABULARY}")


def fit_image_size(visual: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Lets the image tower take images of another (height, width), by resizing its position embedding.

    Where patches do not tile the image (384×128 by 14×14), the pixels left over at its lower and right edge go
    unseen, as in every CLIP. Raises BackboneError for an image smaller than a patch.
    """
    patch_height, patch_width = visual.patch_size
    height, width = image_size
    if height < patch_height or width < patch_width:
        raise BackboneError(f"image_size {height}×{width} is smaller than one patch, {patch_height}×{patch_width}")
    grid = (height // patch_height, width // patch_width)
    visual.positional_embedding = nn.Parameter(
        resize_position_embedding(visual.positional_embedding, visual.grid_size, grid), requires_grad=False)
    visual.grid_size = grid
    visual.image_size = (height, width)


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embedding (1 + rows · columns, C) of a class token and a row-major grid, for another grid.

    Plain bilinear interpolation with half-pixel centres and no antialiasing, as the released UP-Person does it
    (open_clip's own is bicubic with antialiasing). The class token's row is kept.
    """
    if grid == new_grid:
        return embedding.detach().clone()
    first, rest = embedding.detach().split([1, embedding.shape[0] - 1])
    image = rest.unflatten(0, grid).permute(2, 0, 1).unsqueeze(0)                       # (1, C, rows, columns)
    image = F.interpolate(image, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat([first, image.squeeze(0).flatten(1).t()])
