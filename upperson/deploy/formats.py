"""The checkpoints of other programs: under which key each parameter of this project is found.

A format is an entry of FORMATS. The names of the released trainings are those of their code: IRRA (arXiv 2303.12501),
UP-Person (2504.10084), CSKT (2309.09496), DM-Adapter (AAAI 2025). All have OpenAI's CLIP under `base_model.`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from upperson.files import REGULAR, found_at, parse_json, read_text
from upperson.model.weights import OPENAI_NUMBERS, activation_of, numbers

RELEASED_CLIP = "base_model."
TRANSFORMERS = {"image": f"{RELEASED_CLIP}visual.transformer", "text": f"{RELEASED_CLIP}transformer"}
# The heads of the id and mlm losses, which the released trainings share. No feature depends on them.
HEADS = (
    r"classifier\.(weight|bias)",
    r"cross_attn\.(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)",
    r"cross_modal_transformer\.resblocks\.\d+\.(ln_1|attn|ln_2|mlp\.c_fc|mlp\.c_proj)\..+",
    r"(ln_pre_t|ln_pre_i|ln_post)\.(weight|bias)",
    r"mlm_head\.(dense|ln|fc)\.(weight|bias)",
)


Shapes = Mapping[str, tuple[int, ...]]  # of a file, by key


class Source(NamedTuple):
    """Where a tensor is found: under one key, or under several, whose tensors are joined along the first dimension, or
    along a new one."""

    keys: tuple[str, ...]
    transposed: bool = False
    stacked: bool = False


class Told(NamedTuple):
    """What the files of a format tell of a CLIP beside its tensors. None: not told."""

    quick_gelu: bool | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    by: str = ""  # the file that tells


class Format(NamedTuple):
    """A format of checkpoints."""

    title: str
    method: str  # of this project
    mark: str  # a key that every file of this format has, and no file of the formats before it in FORMATS
    clip: Callable[[str], Source]  # open_clip's name of a CLIP's tensor → its place
    adaptation: Callable[[str, int, str, Shapes], Source]  # tower, block, name within the block, shapes → its place
    options: Callable[[Shapes], dict[str, Any]]  # of the method, from the keys' shapes
    unread: tuple[str, ...]  # patterns of further keys, which no feature depends on
    told: Callable[[Path, bool], Told]  # from the path, and whether OpenAI's numbers are in the file


# ------------------------------------------------------------------------------------ the released trainings


def in_base_model(name: str) -> Source:
    return Source((f"{RELEASED_CLIP}{name}",))


def openai_clip(_path: Path, _numbers: bool) -> Told:
    """The released trainings have CLIP's code, which has no other activation, and CLIP's preprocessing."""
    return Told(quick_gelu=True, by="the released code")


def up_person_key(tower: str, block: int, name: str) -> str:
    learner = "vit" if tower == "image" else "text"
    prefix = f"{learner}_prefix_learner.{learner}_prefix.{block}"
    lora = f"LORA_learner.lora_{tower}.{block}"
    layer = f"{TRANSFORMERS[tower]}.resblocks.{block}"
    keys = {
        "prefix.key": f"{prefix}.key.tokens",
        "prefix.value": f"{prefix}.val.tokens",
        "prefix.key_scale": f"{prefix}.key.scaler.scale",
        "prefix.value_scale": f"{prefix}.val.scaler.scale",
        "prefix.scale": f"{prefix}.scale_to_grad",
    }
    for number, part in enumerate(("key", "value")):
        keys[f"lora.{part}_down"] = f"{lora}.lora_A.{number}"
        keys[f"lora.{part}_up"] = f"{lora}.lora_B.{number}"
        keys[f"lora.{part}_scale"] = f"{lora}.scale.{number}.scale"
    for kind, theirs, scale in (("adapter_attn", "adapter_ln_msa", "1"), ("adapter_mlp", "adapter_ln_mlp", "2")):
        keys |= linear_keys(kind, f"{layer}.{theirs}")
        keys[f"{kind}.scale"] = f"{layer}.scale_{scale}"
    return keys[name]


def up_person_options(shapes: Shapes) -> dict[str, Any]:
    def key(name: str) -> Callable[[int], str]:
        return lambda block: up_person_key("image", block, name)

    layers = layers_of(shapes)
    bare = [block for block in range(layers) if key("adapter_attn.down_weight")(block) not in shapes]
    first = len(bare) if len(bare) < layers else 0  # none at all: the keys of the first block are missing
    width = shapes[f"{TRANSFORMERS['image']}.resblocks.0.ln_1.weight"][0]
    return {
        "prefix_length": size(shapes, key("prefix.key")(0), 2),
        "lora_rank": size(shapes, key("lora.key_down")(0), 2),
        "adapter_reduction": reduction(shapes, key("adapter_attn.down_weight")(first), width),
        "depth_prefix": depth(shapes, key("prefix.key"), layers),
        "depth_lora": depth(shapes, key("lora.key_down"), layers),
        "depth_adapter": first,
    }


def cskt_key(tower: str, block: int, name: str) -> str:
    layer = f"{TRANSFORMERS[tower]}.resblocks.{block}"
    later = f"{block - 1}"  # the released lists begin with the second layer
    own, carry, ending = ("ctx", "tmap", "text") if tower == "text" else ("vision", "vmap", "vision")
    projections = "compound_prompt_projections" + ("" if tower == "text" else "_vision")
    tokens = f"prompt_learner.{f'compound_prompts_{ending}.{later}' if block else own}"
    projection = f"prompt_learner.{f'{projections}.{later}' if block else carry}"
    keys = {
        "prompt.tokens": tokens,
        "prompt.projection.weight": f"{projection}.weight",
        "prompt.projection.bias": f"{projection}.bias",
        "adapter_mlp.norm_weight": f"{layer}.ln_3.weight",
        "adapter_mlp.norm_bias": f"{layer}.ln_3.bias",
    } | linear_keys("adapter_mlp", f"{layer}.adapter_mlp")
    return keys[name]


def cskt_options(shapes: Shapes) -> dict[str, Any]:
    layers = layers_of(shapes)
    width = shapes[f"{TRANSFORMERS['image']}.resblocks.0.ln_1.weight"][0]
    return {
        "prompt_length": size(shapes, cskt_key("text", 0, "prompt.tokens"), 2),
        "depth_prompt": depth(shapes, lambda block: cskt_key("text", block, "prompt.tokens"), layers),
        "adapter_reduction": reduction(shapes, cskt_key("image", 0, "adapter_mlp.down_weight"), width),
    }


def dm_adapter_source(tower: str, block: int, name: str, shapes: Shapes) -> Source:
    """The experts of a block have keys of their own."""
    layer = f"{TRANSFORMERS[tower]}.resblocks.{block}"
    name = name.removeprefix("adapter_mlp.")
    own = {
        "norm_weight": "ln_3.weight",
        "norm_bias": "ln_3.bias",
        "task": "task_param",
        "input_gate": "feed_forward.input_gate.weight",
        "task_gate": "feed_forward.task_gate.weight",
        "alpha": "feed_forward.alpha",
    }
    if name in own:
        return Source((f"{layer}.{own[name]}",))
    part, _, what = name.rpartition("_")
    experts = range(experts_of(shapes))
    return Source(tuple(f"{layer}.feed_forward.experts.{expert}.{part}.{what}" for expert in experts), stacked=True)


def experts_of(shapes: Shapes) -> int:
    """The number of experts of the first block, as its gate has it."""
    return size(shapes, f"{TRANSFORMERS['image']}.resblocks.0.feed_forward.input_gate.weight", 2)


def dm_adapter_options(shapes: Shapes) -> dict[str, Any]:
    width = shapes[f"{TRANSFORMERS['image']}.resblocks.0.ln_1.weight"][0]
    down = f"{TRANSFORMERS['image']}.resblocks.0.feed_forward.experts.0.down.weight"
    return {"experts": experts_of(shapes), "adapter_reduction": reduction(shapes, down, width)}


def one_key(key_of: Callable[[str, int, str], str]) -> Callable[[str, int, str, Shapes], Source]:
    """The places of parameters that have one key each."""
    return lambda tower, block, name, _: Source((key_of(tower, block, name),))


def linear_keys(kind: str, place: str) -> dict[str, str]:
    """The keys of a bottleneck's two layers."""
    return {f"{kind}.{part}_{what}": f"{place}.{part}.{what}" for part in ("down", "up") for what in ("weight", "bias")}


class Misfit(ValueError):
    """A key that is missing, or whose shape does not fit."""


def size(shapes: Shapes, key: str, dimensions: int) -> int:
    """The first size of a tensor. Raises Misfit with the key."""
    if key not in shapes:
        raise Misfit(f"the key {key} is missing")
    if len(shapes[key]) != dimensions or 0 in shapes[key]:
        raise Misfit(f"the tensor {key} has the shape {shapes[key]}; expected {dimensions} dimensions with elements")
    return shapes[key][0]


def reduction(shapes: Shapes, key: str, width: int) -> int:
    return max(width // size(shapes, key, 2), 1)


def depth(shapes: Shapes, key: Callable[[int], str], layers: int) -> int | None:
    """The number of first blocks with a key; None: all blocks."""
    found = next((block for block in range(layers) if key(block) not in shapes), layers)
    return None if found == layers else found


def layers_of(shapes: Shapes) -> int:
    """The number of blocks of the image tower, whose keys have been checked."""
    pattern = re.compile(re.escape(f"{TRANSFORMERS['image']}.resblocks.") + r"\d+\.ln_1\.weight")
    return sum(1 for key in shapes if pattern.fullmatch(key))


# ------------------------------------------------------------------------------------ CLIPs without an adaptation


def own_name(name: str) -> Source:
    return Source((name,))


def clip_told(path: Path, openai: bool) -> Told:
    quick_gelu, by = activation_of(path, openai)
    return Told(quick_gelu, by=by)


HUGGING_FACE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
HUGGING_FACE_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelt so in the library
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
HUGGING_FACE_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def hugging_face_key(name: str) -> Source:
    """The place of a tensor in the state dict of transformers' CLIPModel."""
    if name in HUGGING_FACE:
        return Source((HUGGING_FACE[name],))
    if name in ("visual.proj", "text_projection"):
        return Source(("visual_projection.weight" if name == "visual.proj" else "text_projection.weight",), True)
    module, _, leaf = name.rpartition(".")
    if module in HUGGING_FACE_NORMS:
        return Source((f"{HUGGING_FACE_NORMS[module]}.{leaf}",))
    found = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
    if found is None:  # a tensor that CLIPModel lacks: its own name is reported as missing
        return Source((name,))
    layer = f"{'vision' if found[1] else 'text'}_model.encoder.layers.{found[2]}"
    if found[3].startswith("attn.in_proj_"):
        leaf = found[3].removeprefix("attn.in_proj_")
        return Source(tuple(f"{layer}.self_attn.{part}_proj.{leaf}" for part in "qkv"))
    module, _, leaf = found[3].rpartition(".")
    return Source((f"{layer}.{HUGGING_FACE_LAYERS.get(module, module)}.{leaf}",))


def hugging_face_told(path: Path, _numbers: bool) -> Told:
    """From config.json and preprocessor_config.json beside the file, if they are there.

    Raises ValueError, which names the file, for an activation that open_clip's CLIP does not compute, and for values of
    another type.
    """
    config, preprocessor = path.with_name("config.json"), path.with_name("preprocessor_config.json")
    quick_gelu, mean, std = None, None, None
    if found_at(config) == REGULAR:
        towers = [read_object(config).get(f"{tower}_config") for tower in ("vision", "text")]
        activations = {tower.get("hidden_act", "quick_gelu") for tower in towers if isinstance(tower, dict)}
        if len(activations) != 1 or not activations <= {"quick_gelu", "gelu"}:
            shown = ", ".join(sorted(map(str, activations))) or "none"
            raise ValueError(f"{config}: hidden_act is {shown}; expected quick_gelu or gelu in both towers")
        quick_gelu = activations == {"quick_gelu"}
    if found_at(preprocessor) == REGULAR:
        content = read_object(preprocessor)
        found: list[Any] = [content.get(field) for field in ("image_mean", "image_std")]
        if not all(numbers(each, 3) for each in found) or min(found[1]) <= 0:
            raise ValueError(f"{preprocessor}: image_mean and image_std are {found}; expected 3 numbers each, above 0")
        mean, std = map(tuple, found)
    return Told(quick_gelu, mean, std, str(config) if quick_gelu is not None else "")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, which names the file."""
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content


def no_key(tower: str, block: int, name: str, _: Shapes) -> Source:
    raise KeyError(f"{tower}.blocks.{block}.{name}")  # a method without modules has none


def no_options(_shapes: Shapes) -> dict[str, Any]:
    return {}


LOGIT_SCALE = (r"base_model\.logit_scale",)
# Parameters of DM-Adapter's release that nothing reads.
UNREAD_TASKS = r"(base_model\.)?(vision_param|text_param|co_vision_param|v2i_proj\.(weight|bias))"
FORMATS = {
    "up-person": Format(
        "UP-Person", "up-person", "vit_prefix_learner.vit_prefix.0.key.tokens", in_base_model, one_key(up_person_key),
        up_person_options, (*HEADS, *LOGIT_SCALE), openai_clip,
    ),
    "cskt": Format(
        "CSKT", "cskt", "prompt_learner.ctx", in_base_model, one_key(cskt_key), cskt_options, (*HEADS, *LOGIT_SCALE),
        openai_clip,
    ),
    "dm-adapter": Format(
        "DM-Adapter", "dm-adapter", "base_model.visual.transformer.resblocks.0.feed_forward.alpha", in_base_model,
        dm_adapter_source, dm_adapter_options, (*HEADS, *LOGIT_SCALE, UNREAD_TASKS), openai_clip,
    ),
    "irra": Format(
        "IRRA", "irra", "base_model.visual.conv1.weight", in_base_model, no_key, no_options, (*HEADS, *LOGIT_SCALE),
        openai_clip,
    ),
    "huggingface-clip": Format(
        "Hugging Face CLIPModel", "zero-shot", "vision_model.embeddings.class_embedding", hugging_face_key, no_key,
        no_options, (r"(vision|text)_model\.embeddings\.position_ids", "logit_scale"), hugging_face_told,
    ),
    "clip": Format(
        "CLIP in the format of OpenAI or open_clip", "zero-shot", "visual.conv1.weight", own_name, no_key, no_options,
        (*OPENAI_NUMBERS, "logit_scale", "logit_bias"), clip_told,
    ),
}  # fmt: skip
