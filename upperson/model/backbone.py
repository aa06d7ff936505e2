"""The frozen backbone: any open_clip CLIP with a ViT, from a pretrained tag or a local file, for upright images."""

import difflib
import functools
import json
import math
import warnings
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from upperson.config import ModelConfig
from upperson.embedded.weights import CLIP_CONFIG, EmbeddedWeightsError, load_embedded_clip
from upperson.errors import BackboneError
from upperson.files import NOTHING, REGULAR, found_at, parse_json, read_text
from upperson.model.download import load_published, without_messages
from upperson.model.weights import ACCEPTED, mismatch, not_finite, read_weights

CLIP_VOCABULARY = 49408
LARGEST, MOST_LAYERS = 1_000_000, 1_000  # of the numbers in a model configuration
MOST_WEIGHTS = 20_000_000_000  # 80 GB; the largest CLIPs have 18 billion
REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
MODEL_FIELDS = dict(
    embed_dim=int, vision_cfg=dict, text_cfg=dict, quick_gelu=bool, custom_text=bool, init_logit_scale=float,
    init_logit_bias=float | None, nonscalar_logit_scale=bool,
)  # fmt: skip
# Towers of other libraries would be downloaded, and could not be adapted.
VISION_FIELDS, TEXT_FIELDS = (
    {field: kind for field, kind in get_type_hints(cfg).items() if not field.startswith(("timm_", "hf_model", "hf_p"))}
    for cfg in (open_clip.CLIPVisionCfg, open_clip.CLIPTextCfg)
)
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
    if (found := found_at(Path(pretrained))) != REGULAR:
        nor_tag = "" if configuration_file(model) else f" nor one of its tags ({', '.join(tags) or 'none'})"
        there = "" if found == NOTHING else f"; there is {found}"
        raise BackboneError(f"pretrained {pretrained!r} of {model} is neither a file{nor_tag} nor 'none'{there}")
    load_weights(clip, model, Path(pretrained), config.image_size)
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
        with without_messages():
            return open_clip.create_model(model, force_image_size=image_size)
    description = read_configuration(path)
    if image_size is not None:
        description["vision_cfg"]["image_size"] = image_size
    try:
        check_sizes(json.dumps(description))
        return clip_of(description)
    except Exception as error:  # sizes that do not go together raise many types
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise BackboneError(f"{path} is not a model configuration that open_clip can build: {reason}") from error


def clip_of(description: dict[str, Any]) -> nn.Module:
    """The CLIP of a model configuration, with random weights."""
    kind = open_clip.CustomTextCLIP if description.pop("custom_text", False) else open_clip.CLIP
    return kind(**description)


@functools.lru_cache
def check_sizes(description: str) -> None:
    """Builds the CLIP of a model configuration without memory.

    Raises ValueError for an empty tensor and for more weights than MOST_WEIGHTS, and what open_clip raises for sizes
    that do not go together.
    """
    with torch.device("meta"):
        clip: Clip = clip_of(json.loads(description))
    tensors = dict([*clip.named_parameters(), *clip.named_buffers()])
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(f"its {empty[0]} would be {tuple(tensors[empty[0]].shape)}, without elements")
    weights = sum(tensor.numel() for tensor in tensors.values())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"it describes {weights:,} weights, expected at most {MOST_WEIGHTS:,}")
    if 0 in getattr(clip.visual, "grid_size", ()):
        raise ValueError(f"its images of {clip.visual.image_size} are smaller than a patch, {clip.visual.patch_size}")


def read_configuration(path: Path) -> dict[str, Any]:
    """The content of an open_clip model configuration, a JSON file.

    Raises BackboneError for a file that cannot be read, and for a field that is unknown, missing, of another type or
    out of range.
    """
    try:
        description = parse_json(read_text(path))
        check_fields("", description, MODEL_FIELDS)
        check_fields("vision_cfg.", description["vision_cfg"], VISION_FIELDS)
        check_fields("text_cfg.", description["text_cfg"], TEXT_FIELDS)
    except FileNotFoundError:
        raise BackboneError(f"model configuration {path} does not exist") from None
    except OSError as error:
        raise BackboneError(f"model configuration {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BackboneError(f"{path} is not an open_clip model configuration: {error}") from None
    return description


def check_fields(place: str, found: Any, fields: dict[str, Any]) -> None:
    """Raises ValueError unless `found` is an object of JSON with these fields. `place`: what stands before a name."""
    if not isinstance(found, dict):
        raise ValueError(f"{place.rstrip('.') or 'the file'} is {shown(found)}; expected an object")
    for name, value in found.items():
        if name not in fields:
            raise ValueError(f"unknown field {place}{name}; expected fields of {', '.join(fields)}")
        lowest, largest = (0 if name.endswith("_id") else 1, MOST_LAYERS if name == "layers" else LARGEST)
        if problem := misfit(value, fields[name], range(lowest, largest + 1)):
            raise ValueError(f"{place}{name} is {shown(value)}; expected {problem}")
    missing = [name for name in REQUIRED if not place and name not in found]
    if missing:
        raise ValueError(f"missing field {missing[0]}")


def misfit(value: Any, kind: Any, sizes: range) -> str:
    """What is expected of a value of JSON instead; "" for a fit.

    kind: its type, as open_clip annotates its fields. sizes: the whole numbers that fit.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    fits, expected = zip(*(judged(value, each, sizes) for each in kinds), strict=True)
    return "" if any(fits) else " or ".join(expected)


def judged(value: Any, kind: Any, sizes: range) -> tuple[bool, str]:
    """Whether a value of JSON fits a type, and what is expected."""
    if get_origin(kind) is tuple:
        length = len(get_args(kind))
        fits = isinstance(value, list) and len(value) == length and all(judged(v, int, sizes)[0] for v in value)
        return fits, f"a list of {length} whole numbers"
    if kind is int:
        return type(value) is int and value in sizes, f"a whole number from {sizes[0]} to {sizes[-1]:,}"
    if kind is float:
        return type(value) in (int, float) and abs(value) <= LARGEST, f"a number up to {LARGEST:,}"
    if kind is dict:
        return value is None or isinstance(value, dict), "an object"
    return type(value) is kind, {bool: "true or false", str: "a string"}.get(kind, "null")


def shown(value: Any) -> str:
    return text if len(text := repr(value)) <= 40 else f"{text[:40]}…"


def configuration_file(model: str) -> Path | None:
    """The JSON model configuration of a model's name; None for a model of open_clip."""
    if model == "embedded":
        return CLIP_CONFIG
    return Path(model) if model.endswith(".json") else None


def load_weights(clip: Clip, model: str, path: Path, image_size: tuple[int, int]) -> None:
    """Loads weights of the model `model` from a file of open_clip or OpenAI. No code in the file runs.

    Warns of weights that were trained with another activation than the model computes.

    The image size of the image tower becomes that of the file's position embedding: the published size, `image_size`,
    or another square.
    """
    try:
        weights = read_weights(path)
        state, preprocessing = weights.state, weights.preprocessing
        if isinstance(clip, open_clip.CustomTextCLIP):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        if "logit_scale" in state and state["logit_scale"].numel() == 1:  # () or (1,)
            state["logit_scale"] = state["logit_scale"].reshape(clip.logit_scale.shape)
    except Exception as error:  # damaged and foreign files raise many types
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise BackboneError(f"{path} does not contain weights of this model: {reason}; {ACCEPTED}") from error
    embedding = state.get("visual.positional_embedding")
    if isinstance(clip.visual, VisionTransformer) and embedding is not None and embedding.dim() == 2:
        fit_image_size(clip.visual, image_size_of(path, embedding, preprocessing, clip.visual, image_size))
    problems = mismatch(state, clip.state_dict()) or not_finite(state)
    if problems:
        raise BackboneError(f"{path} does not contain weights of this model: {problems}; {ACCEPTED}")
    clip.load_state_dict(state)
    own = uses_quick_gelu(clip)
    if weights.quick_gelu is not None and own is not None and weights.quick_gelu != own:
        activations = ("GELU", "QuickGELU")
        warnings.warn(
            f"{path}: the weights were trained with {activations[not own]}, as {weights.told_by} tells, but {model} "
            f"computes {activations[own]}, which gives other features; expected {with_other_activation(model)}",
            stacklevel=4,
        )
    if preprocessing:
        known = open_clip.get_model_preprocess_cfg(clip)
        open_clip.set_model_preprocess_cfg(clip, known | {name: tuple(preprocessing[name]) for name in ("mean", "std")})


def uses_quick_gelu(clip: Clip) -> bool | None:
    """Whether a CLIP computes QuickGELU; None for towers of other libraries."""
    blocks = getattr(getattr(clip.visual, "transformer", None), "resblocks", None)
    return isinstance(blocks[0].mlp.gelu, QuickGELU) if blocks else None


def with_other_activation(model: str) -> str:
    """The model that differs from `model` in its activation, QuickGELU or GELU, as advice for a user."""
    if configuration_file(model):
        return 'the other value of "quick_gelu" in the model configuration'
    suffix = "-quickgelu"
    other = model.removesuffix(suffix) if model.endswith(suffix) else model + suffix
    return f"--model {other}" if other in open_clip.list_models() else 'a model configuration with "quick_gelu"'


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
