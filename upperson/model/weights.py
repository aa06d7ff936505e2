"""Files with the weights of a whole CLIP: those of open_clip and OpenAI, and this project's merged weights."""

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from upperson.data import Preprocess

PREPROCESSING = "upperson preprocessing"  # key in the metadata of a file of weights
ACCEPTED = (
    "expected a state dict in the format of open_clip (.pt, .safetensors) or OpenAI (also its published TorchScript "
    "archives), not of another library"
)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's state dict, and the preprocessing that weights_as_bytes stored in the file (otherwise empty).

    Raises the errors of the libraries that read the file, and ValueError for entries that are not tensors.
    """
    preprocessing: dict[str, Any] = {}
    state: dict[str, Any]
    if is_torchscript(path):
        # OpenAI's own files, which torch.load refuses with weights_only. torch.jit.load runs TorchScript, an
        # interpreter without access to Python, and no pickle.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecation warning
            archive: Any = torch.jit.load(path, map_location="cpu")
            state = dict(archive.state_dict())
    else:
        loaded: Any = open_clip.factory.load_state_dict(str(path), weights_only=True)
        state = dict(loaded)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            preprocessing = json.loads((file.metadata() or {}).get(PREPROCESSING, "{}"))
    for name in ("input_resolution", "context_length", "vocab_size"):  # settings in OpenAI's files, not weights
        state.pop(name, None)
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"the entry {strange[0]!r} is not a tensor")
    return state, preprocessing


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def weights_as_bytes(state: Mapping[str, Tensor], preprocess: Preprocess) -> bytes:
    """The content of a safetensors file for open_clip, with the image preprocessing for read_weights."""
    preprocessing = json.dumps({"size": preprocess.image_size, "mean": preprocess.mean, "std": preprocess.std})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return save(tensors, {"format": "pt", PREPROCESSING: preprocessing})


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
