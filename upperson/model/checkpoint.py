"""A checkpoint: the trained parameters by name, their configuration, and their results.

The parameters are a few MB in float32, named as in AdaptedCLIP.adaptation. The file does not contain the frozen CLIP,
which the configuration names, or the heads of the id and mlm losses.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upperson.config import Config, ModelConfig
from upperson.errors import CheckpointError
from upperson.model.adapted_clip import AdaptedCLIP
from upperson.model.tensor_files import CHECKPOINT, plain, read_tensors, write_tensors
from upperson.model.weights import mismatch

BACKBONE = ("model", "pretrained", "image_size")  # the fields of a ModelConfig that define the backbone


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    path: Path
    config: Config
    parameters: dict[str, Tensor]  # float32, on the CPU
    results: dict[str, Any]  # results of the saved epoch, with the fields of upperson.evaluate.results.Results

    @property
    def epoch(self) -> int | None:
        return self.results.get("epoch")

    @property
    def selection(self) -> str | None:
        """The selection of the epoch, a key of SELECTIONS."""
        return self.results.get("selection")


def save_checkpoint(path: Path, parameters: Mapping[str, Tensor], config: Config, results: dict[str, Any]) -> None:
    """Writes a checkpoint file. Raises OSError (full disk)."""
    tensors = {name: plain(tensor).float() for name, tensor in parameters.items()}
    write_tensors(path, CHECKPOINT, tensors, config, {"results": json.dumps(results)})


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Reads a checkpoint file. Raises CheckpointError for a file that save_checkpoint did not write."""
    path = Path(path)
    tensors, config, metadata = read_tensors(path, CHECKPOINT)
    try:
        results = json.loads(metadata.get("results", ""))
    except json.JSONDecodeError:
        results = None
    if not isinstance(results, dict):
        raise CheckpointError(f"{path}: expected an object in the metadata 'results', found none")
    return Checkpoint(path, config, tensors, results)


def load_model(path: Path | str, **changes: Any) -> AdaptedCLIP:
    """The adapted model of a checkpoint file, on the CPU; `changes` as in build_model.

    Raises CheckpointError for a file that is not a checkpoint, and for parameters that do not fit the model.
    """
    return build_model(load_checkpoint(path), **changes)


def build_model(checkpoint: Checkpoint, **changes: Any) -> AdaptedCLIP:
    """The adapted model of a checkpoint, on the CPU.

    `changes` replace fields of the configuration, such as `pretrained="…"` if the backbone's file has moved, or
    `backend="torch"`. Raises CheckpointError if the parameters do not fit the model.
    """
    config = checkpoint.config.replace(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)  # a random backbone has the same weights as in training
        model = AdaptedCLIP(config.model)
    copy_parameters(checkpoint.parameters, model.adaptation(), str(checkpoint.path))
    return model


def other_backbone(found: ModelConfig, wanted: ModelConfig) -> str:
    """The differing fields of the backbone, each as "field: found, not wanted"; "" for the same backbone."""
    return "; ".join(
        f"{field}: {getattr(found, field)}, not {getattr(wanted, field)}"
        for field in BACKBONE
        if getattr(found, field) != getattr(wanted, field)
    )


def parameters_to_start_from(path: Path | str, config: Config, model: AdaptedCLIP) -> dict[str, Tensor]:
    """The parameters of a checkpoint by name, after a check that a training of `model` by `config` can start from them.

    The model is not changed, and may have further parameters. Raises CheckpointError for a checkpoint of another
    backbone, and for parameters that are not in model.adaptation() or have another shape.
    """
    checkpoint = load_checkpoint(path)
    differences = other_backbone(checkpoint.config.model, config.model)
    seed = checkpoint.config.train.seed
    if not differences and config.model.pretrained == "none" and seed != config.train.seed:  # random weights
        differences = f"seed: {seed}, not {config.train.seed}"
    if differences:
        raise CheckpointError(
            f"{path}: start_from is a checkpoint of another backbone, {differences} as in this training"
        )
    found, adaptation = checkpoint.parameters, model.adaptation()
    if not found:
        raise CheckpointError(f"{path}: start_from is a checkpoint without parameters")
    problems = mismatch(found, {name: adaptation[name] for name in found if name in adaptation})
    if problems:
        theirs, ours = (each.model.method.title for each in (checkpoint.config, config))
        raise CheckpointError(f"{path}: start_from is a checkpoint of {theirs}, which does not fit {ours}: {problems}")
    return found


@torch.no_grad()
def copy_parameters(source: Mapping[str, Tensor], target: Mapping[str, Tensor], name: str) -> None:
    """Copies all tensors by name, or none. Raises CheckpointError with the missing, unexpected or mismatched names."""
    problems = mismatch(source, target)
    if problems:
        raise CheckpointError(f"{name}: parameters do not fit the model: {problems}")
    for key, tensor in target.items():
        tensor.copy_(source[key])
