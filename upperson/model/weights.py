"""Files with the weights of a whole CLIP: those that open_clip and OpenAI write, and this project's merged ones."""

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
    "expected a state dict in open_clip's format (.pt, .safetensors) or in OpenAI's (also the TorchScript "
    "archives it published), not in that of another library"
)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's state dict, and the preprocessing that weights_as_bytes wrote with it (else empty).

    The errors are those of the libraries that read it.
    """
    preprocessing: dict[str, Any] = {}
    state: dict[str, Any]
    if is_torchscript(path):
        # OpenAI's own files. Restoring an archive runs TorchScript, an interpreter without access to Python, and no
        # pickle; torch.load refuses it with weights_only.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecation
            archive: Any = torch.jit.load(path, map_location="cpu")
            state = dict(archive.state_dict())
    else:
        loaded: Any = open_clip.factory.load_state_dict(str(path), weights_only=True)
        state = dict(loaded)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            preprocessing = json.loads((file.metadata() or {}).get(PREPROCESSING, "{}"))
    for name in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's, no weights
        state.pop(name, None)
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{strange[0]!r} in it is no tensor")
    return state, preprocessing


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def weights_as_bytes(state: Mapping[str, Tensor], preprocess: Preprocess) -> bytes:
    """A safetensors file that open_clip loads; read_weights also finds the preprocessing of the images in it."""
    preprocessing = json.dumps({"size": preprocess.image_size, "mean": preprocess.mean, "std": preprocess.std})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return save(tensors, {"format": "pt", PREPROCESSING: preprocessing})


def mismatch(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The names of missing and unexpected tensors and of those with another shape, on one line; "" if all fit."""
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
