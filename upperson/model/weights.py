"""Files with the weights of a whole CLIP: those of open_clip and OpenAI, and this project's merged weights."""

import hashlib
import json
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from upperson.data import Preprocess
from upperson.files import parse_json, read_text
from upperson.model.archive import is_archive, read_archive, require_whole
from upperson.model.tensor_files import CHECKSUMS, damage, with_checksums

PREPROCESSING = "upperson preprocessing"  # key in the metadata of a file of weights
ACCEPTED = (
    "expected a state dict in the format of open_clip (.pt, .safetensors) or OpenAI (also its published TorchScript "
    "archives), not of another library"
)
# Other dtypes hold quantised, complex or integer values, which are no weights of a CLIP.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The keys under which training code saves a state dict, beside an optimizer, an epoch and others.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # settings in OpenAI's files, not weights
ANCHOR = "visual.conv1.weight"  # the first weight of an image tower
HUB_CONFIG = "open_clip_config.json"  # beside the weights in a folder of the Hugging Face hub
TEMPERATURE = ("logit_scale", "logit_bias")  # of CLIP's loss; no feature depends on them


class Weights(NamedTuple):
    """The content of a file of weights."""

    state: dict[str, Tensor]
    preprocessing: dict[str, Any]  # size, mean and std, which weights_as_bytes stored; otherwise empty
    quick_gelu: bool | None  # whether the weights were trained with QuickGELU; None if the file does not tell
    told_by: str  # what tells quick_gelu


def read_weights(path: Path) -> Weights:
    """Reads a file of weights. No code in the file runs.

    Raises the errors of the libraries that read the file, and ValueError for entries that are not dense tensors of
    DTYPES, and for metadata that weights_as_bytes would not write.
    """
    stored: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if CHECKSUMS in metadata and (problem := damage(state, metadata)):  # a file of weights_as_bytes
            raise ValueError(f"the file is damaged: {problem}")
        stored = stored_settings(metadata.get(PREPROCESSING, "{}"))
    else:
        require_whole(path)
        state = read_archive(path) if is_archive(path) else load_pickled(path)
    state = unwrapped(state)
    numbers = [state.pop(name, None) for name in OPENAI_NUMBERS]
    problem = unusable(state, DTYPES)
    if problem:
        raise ValueError(problem)
    quick_gelu, told_by = stored.pop("quick_gelu", None), "its metadata"
    if quick_gelu is None:
        quick_gelu, told_by = activation_of(path, openai=None not in numbers)
    return Weights(state, stored, quick_gelu, told_by)


def load_pickled(path: Path) -> Any:
    """What torch.save wrote, if it is made of tensors and plain values. Raises ValueError otherwise."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LookupError) as error:  # a LookupError: text, which is no pickle
        # PyTorch's message goes on with ways to run the code in the file.
        raise ValueError(
            "Weights only load failed, because the file is damaged or holds Python objects, which are never restored "
            "since they can run code; expected a file of its state_dict()"
        ) from error


def unwrapped(state: Any) -> dict[str, Any]:
    """The state dict in what a file holds, without the prefix that wrappers put before the names of its tensors.

    A wrapper such as DistributedDataParallel, torch.compile or a LightningModule is told by the name of the image
    tower's first weight. Warns of tensors of other modules, which are left out. Raises ValueError for content that is
    not a state dict, and for several CLIPs.
    """
    for _ in range(2):
        if not isinstance(state, Mapping) or any(str(name).endswith(ANCHOR) for name in state):
            break
        held = [key for key, value in state.items() if isinstance(value, Mapping) and holds_tensors(value, 2)]
        held = [key for key in held if key in WRAPPERS] or held
        if len(held) > 1:
            raise ValueError(f"the file holds several state dicts, {', '.join(map(str, held))}; expected one")
        state = state[held[0]] if held else state
    if not isinstance(state, Mapping) or not holds_tensors(state) or not all(isinstance(name, str) for name in state):
        found = f"keys {', '.join(map(str, list(state)[:5]))}" if isinstance(state, Mapping) and state else "none"
        raise ValueError(f"the file holds no state dict of tensors by name; found {found}")
    prefixes = [name.removesuffix(ANCHOR) for name in state if name == ANCHOR or name.endswith(f".{ANCHOR}")]
    if len(prefixes) > 1:
        raise ValueError(
            f"the file holds several CLIPs, with the prefixes {', '.join(map(repr, prefixes))}; expected one"
        )
    prefix = prefixes[0] if prefixes else ""
    others = [name for name in state if not name.startswith(prefix)]
    if others:
        warnings.warn(
            f"{len(others)} tensors beside {prefix!r} are not part of the CLIP and are left out: "
            f"{', '.join(others[:3])}{', …' if len(others) > 3 else ''}",
            stacklevel=5,
        )
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def holds_tensors(state: Any, depth: int = 1) -> bool:
    """Whether a mapping has tensors as values, or within mappings down to a depth."""
    if depth == 0 or not isinstance(state, Mapping):
        return isinstance(state, Tensor)
    return any(holds_tensors(value, depth - 1) for value in state.values())


def unusable(tensors: Mapping[str, Any], dtypes: Sequence[torch.dtype]) -> str:
    """The first entry that is not a dense tensor of one of these dtypes with an element in memory; "" if all are."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            return f"the entry {name!r} is not a tensor"
        if tensor.dtype not in dtypes:
            wanted = " or ".join(", ".join(map(dtype_name, dtypes)).rsplit(", ", 1))
            return f"the tensor {name!r} is {dtype_name(tensor.dtype)}; expected {wanted}"
        if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
            return f"the tensor {name!r} is sparse, nested or without values; expected a dense tensor"
    return ""


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The first tensor with NaN or infinity in float32, and how many elements; "" if all are finite."""
    for name, tensor in tensors.items():
        finite = tensor.float().isfinite()
        if not finite.all():
            wrong = int((~finite).sum())
            return f"the tensor {name!r} has {wrong} of {tensor.numel()} elements that are NaN or infinite in float32"
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def activation_of(path: Path, openai: bool) -> tuple[bool | None, str]:
    """Whether the weights of a file were trained with QuickGELU (None: unknown), and what tells.

    The tensors alone do not tell: they have the same names and shapes. What tells is the format of OpenAI, whose code
    has no other activation; the configuration of a folder of the hub beside the file; and the name of a file that
    open_clip publishes.
    """
    if openai:
        return True, "OpenAI's format"
    config = path.with_name(HUB_CONFIG)
    if config.is_file():
        try:
            model = parse_json(read_text(config))["model_cfg"]
            return model.get("quick_gelu", False) is True, f"{HUB_CONFIG} beside the file"
        except (ValueError, TypeError, KeyError, AttributeError):
            return None, ""
    for model, tag in open_clip.list_pretrained():
        if open_clip.get_pretrained_url(model, tag).rpartition("/")[2] == path.name:
            trained = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)
            return trained, f"the file's name, that of {tag} of {model} in open_clip"
    return None, ""


def stored_settings(text: str) -> dict[str, Any]:
    """The metadata of weights_as_bytes. Raises ValueError for a field that it would not write."""
    stored = parse_json(text)
    if stored == {}:
        return {}
    expected = {
        "size": lambda value: whole_numbers(value, 2),
        "mean": lambda value: numbers(value, 3),
        "std": lambda value: numbers(value, 3) and min(value) > 0,
        "quick_gelu": lambda value: isinstance(value, bool),
    }
    for field, fits in expected.items():
        if not isinstance(stored, dict) or (field not in stored and field != "quick_gelu"):
            raise ValueError(f"the metadata {PREPROCESSING!r} lack the field {field!r}")
        if field in stored and not fits(stored[field]):
            raise ValueError(f"the field {field!r} of the metadata {PREPROCESSING!r} is {str(stored[field])[:60]}")
    return stored


def numbers(value: Any, length: int) -> bool:
    """Whether a value of JSON is a list of `length` numbers."""
    fits = isinstance(value, list) and len(value) == length
    return fits and all(type(each) in (int, float) and math.isfinite(each) for each in value)


def whole_numbers(value: Any, length: int) -> bool:
    """Whether a value of JSON is a list of `length` positive whole numbers."""
    return numbers(value, length) and all(type(each) is int and each > 0 for each in value)


def weights_as_bytes(state: Mapping[str, Tensor], preprocess: Preprocess, quick_gelu: bool) -> bytes:
    """The content of a safetensors file for open_clip. Its metadata, for read_weights, are the image preprocessing, the
    activation and checksums.
    """
    stored = {"size": preprocess.image_size, "mean": preprocess.mean, "std": preprocess.std, "quick_gelu": quick_gelu}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return save(tensors, with_checksums(tensors, {"format": "pt", PREPROCESSING: json.dumps(stored)}))


def fingerprint(state: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of a CLIP's weights in float32, without the temperature of its loss; None for tensors without memory.

    ViT-B/16, with 600 MB, takes half a second.
    """
    digest = hashlib.sha256()
    for name in sorted(set(state) - set(TEMPERATURE)):
        tensor = state[name].detach()
        if tensor.is_meta or type(tensor) is not Tensor:  # a fake tensor
            return None
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def mismatch(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The names of missing, unexpected and wrongly shaped tensors, on one line; "" if all tensors fit."""
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    return "; ".join(
        f"{len(names)} {problem}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for problem, names in problems.items()
        if names
    )
