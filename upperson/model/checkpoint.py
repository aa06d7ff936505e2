"""What a run leaves on disk: checkpoints for use, and states to resume from. Safetensors alone, never pickle.

A file under its own name is always complete: it is written beside its place, synced and moved there.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upperson.errors import CheckpointError
from upperson.files import write_atomically
from upperson.config import Config, ModelConfig
from upperson.model import AdaptedCLIP
from upperson.model.weights import mismatch

CHECKPOINT = "upperson checkpoint"
RESUME_STATE = "upperson resume state"
VERSION = "1"
BACKBONE = ("model", "pretrained", "image_size")  # the fields of a ModelConfig that say what is adapted


@dataclass(frozen=True)
class Checkpoint:
    """Trained parameters by name (float32, on the CPU), the configuration that made them, and its results."""

    config: Config
    parameters: dict[str, Tensor]
    results: dict[str, Any]


def save_checkpoint(path: Path, parameters: Mapping[str, Tensor], config: Config, results: dict[str, Any]) -> None:
    """Writes trained parameters alone, with configuration and results. OSError where that fails (full disk)."""
    metadata = {"config": config.to_json(), "results": json.dumps(results)}
    _write(path, CHECKPOINT, {name: _plain(tensor).float() for name, tensor in parameters.items()}, metadata)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Reads what save_checkpoint wrote; CheckpointError for anything else."""
    tensors, metadata = _read(Path(path), CHECKPOINT)
    return Checkpoint(_configuration(path, metadata), tensors, _results(path, metadata))


def load_model(path: Path | str, **changes: Any) -> AdaptedCLIP:
    """The adapted model of a checkpoint, on the CPU.

    `changes` replace fields of its configuration: `pretrained="…"` where the backbone's file has moved,
    `backend="torch"`. CheckpointError if the parameters do not fit the model.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint.config.replace(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)  # as in training: a random backbone is the same one
        model = AdaptedCLIP(config.model)
    copy_parameters(checkpoint.parameters, model.adaptation(), str(path))
    return model


def other_backbone(found: ModelConfig, wanted: ModelConfig) -> str:
    """The fields of the backbone that differ, each as "field: found, not wanted"; "" for the same backbone."""
    return "; ".join(
        f"{field}: {getattr(found, field)}, not {getattr(wanted, field)}"
        for field in BACKBONE
        if getattr(found, field) != getattr(wanted, field)
    )


def parameters_to_start_from(path: Path | str, config: Config, model: AdaptedCLIP) -> dict[str, Tensor]:
    """The parameters of a checkpoint, all of which a training of `model` by `config` can start from, by name.

    The model stays as it is; it may have more than they are. CheckpointError for a checkpoint of another backbone, or
    one with parameters that are none of model.adaptation() or have another shape.
    """
    checkpoint = load_checkpoint(path)
    differences = other_backbone(checkpoint.config.model, config.model)
    seed = checkpoint.config.train.seed
    if not differences and config.model.pretrained == "none" and seed != config.train.seed:  # random weights
        differences = f"seed: {seed}, not {config.train.seed}"
    if differences:
        raise CheckpointError(f"{path}: start_from a checkpoint of another backbone, {differences} as in this training")
    found, adaptation = checkpoint.parameters, model.adaptation()
    if not found:
        raise CheckpointError(f"{path}: start_from a checkpoint that holds no parameters")
    problems = mismatch(found, {name: adaptation[name] for name in found if name in adaptation})
    if problems:
        theirs, ours = (each.model.method.title for each in (checkpoint.config, config))
        raise CheckpointError(f"{path}: start_from a checkpoint of {theirs}, which does not fit {ours}: {problems}")
    return found


@torch.no_grad()
def copy_parameters(source: Mapping[str, Tensor], target: Mapping[str, Tensor], name: str) -> None:
    """Copies tensors by name, all or none; CheckpointError names the missing, unexpected and wrong-shaped ones."""
    problems = mismatch(source, target)
    if problems:
        raise CheckpointError(f"{name}: parameters do not fit the model: {problems}")
    for key, tensor in target.items():
        tensor.copy_(source[key])


def save_resume_state(path: Path, state: dict[str, Any], config: Config) -> None:
    """Writes any nest of dict, list, tuple, tensor, number, string, bool and None."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_take_apart(state, tensors))
    _write(path, RESUME_STATE, tensors, {"config": config.to_json(), "structure": structure})


def load_resume_state(path: Path) -> tuple[dict[str, Any], Config]:
    """The state, tensors on the CPU, and the configuration it belongs to; CheckpointError for anything else."""
    tensors, metadata = _read(path, RESUME_STATE)
    return _put_together(json.loads(metadata["structure"]), tensors), _configuration(path, metadata)


def _write(path: Path, kind: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    write_atomically(path, save(tensors, {"format": kind, "version": VERSION, **metadata}))


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: there is {found}; expected an {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cut off, or not a safetensors file ({error}); expected an {kind}") from error
    if metadata.get("format") != kind:
        found = metadata.get("format")
        raise CheckpointError(
            f"{path}: expected an {kind}, found "
            + (f"an {found}" if found in (CHECKPOINT, RESUME_STATE) else "some other safetensors file")
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path}: {kind} of version {metadata.get('version')}, expected version {VERSION}")
    return tensors, metadata


def _results(path: Path | str, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        results = json.loads(metadata.get("results", ""))
    except json.JSONDecodeError:
        results = None
    if not isinstance(results, dict):
        raise CheckpointError(f"{path}: expected an object in the metadata 'results', found none")
    return results


def _configuration(path: Path | str, metadata: dict[str, str]) -> Config:
    try:
        return Config.from_json(metadata.get("config", ""))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the configuration inside does not fit this version of upperson: {error}"
        ) from error


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _take_apart(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The structure of a nest as JSON can hold it; its tensors go to `tensors`, by number."""
    if isinstance(tree, Tensor):
        key = str(len(tensors))
        tensors[key] = _plain(tree)
        return {"tensor": key}
    if isinstance(tree, dict):
        return {"dict": [[key, _take_apart(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_take_apart(value, tensors) for value in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a resume state cannot hold a {type(tree).__name__}")


def _put_together(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(value, tensors) for key, value in content}
    return {"list": list, "tuple": tuple}[kind](_put_together(value, tensors) for value in content)
