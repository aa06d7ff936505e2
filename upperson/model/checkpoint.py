"""A checkpoint: the trained parameters by name, their configuration, and their results.

The parameters are a few MB in float32, named as in AdaptedCLIP.adaptation. The file does not contain the frozen CLIP,
which the configuration names, or the heads of the id and mlm losses. A fingerprint of the frozen CLIP tells a backbone
of the same shape from that of the training. Checksums tell a damaged file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from upperson.config import SELECTIONS, Config, ModelConfig
from upperson.errors import BackboneError, CheckpointError, MethodError
from upperson.fields import MOST_EPOCHS
from upperson.files import NOTHING, REGULAR, found_at, is_unicode, parse_json
from upperson.model.adapted_clip import AdaptedCLIP
from upperson.model.tensor_files import CHECKPOINT, plain, read_tensors, write_tensors
from upperson.model.weights import mismatch, not_finite, unusable

BACKBONE = ("model", "pretrained", "image_size")  # the fields of a ModelConfig that define the backbone


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    path: Path
    config: Config
    parameters: dict[str, Tensor]  # float32, on the CPU
    results: dict[str, Any]  # results of the saved epoch, with the fields of upperson.evaluate.results.Results
    fingerprint: str | None  # of the backbone, as AdaptedCLIP.fingerprint; None: unknown

    @property
    def epoch(self) -> int | None:
        return self.results.get("epoch")

    @property
    def selection(self) -> str | None:
        """The selection of the epoch, a key of SELECTIONS."""
        return self.results.get("selection")


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, Tensor],
    config: Config,
    results: dict[str, Any],
    fingerprint: str | None = None,
) -> None:
    """Writes a checkpoint file. Raises OSError (full disk).

    `fingerprint`: that of the backbone, AdaptedCLIP.fingerprint; None: the backbone is not compared when it is loaded.
    """
    tensors = {name: plain(tensor).float() for name, tensor in parameters.items()}
    metadata = {"results": json.dumps(results)} | ({} if fingerprint is None else {"backbone": fingerprint})
    write_tensors(path, CHECKPOINT, tensors, config, metadata)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Reads a checkpoint file. Its configuration names the backbone's files where they are, see `with_files_beside`.

    Raises CheckpointError as read_checkpoint.
    """
    checkpoint = read_checkpoint(path)
    return replace(checkpoint, config=with_files_beside(checkpoint.config, checkpoint.path))


def with_files_beside(config: Config, path: Path) -> Config:
    """The configuration of a checkpoint at `path`, with the backbone's files that lie beside it.

    A recorded path may be relative to another working folder, or the files may have been moved together. So a file that
    is not at its path is looked for in the folder of the checkpoint. The fingerprint tells other weights.
    """
    changes = {}
    for field in ("model", "pretrained"):
        recorded = Path(getattr(config.model, field))
        if recorded.suffix and found_at(recorded) == NOTHING:  # the name of a file, not of a model or a tag
            beside = path.with_name(recorded.name)
            if found_at(beside) == REGULAR and is_unicode(str(beside)):
                changes[field] = str(beside)
    return config.replace(**changes)


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Reads a checkpoint file, with the configuration as it was written.

    Raises CheckpointError for a file that save_checkpoint did not write, or that has been damaged since, and for a
    parameter that is not in float32 or not finite.
    """
    path = Path(path)
    tensors, config, metadata = read_tensors(path, CHECKPOINT)
    problem = unusable(tensors, [torch.float32]) or not_finite(tensors)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    try:
        results = parse_json(metadata["results"]) if "results" in metadata else None
    except ValueError as error:
        raise CheckpointError(f"{path}: the metadata 'results': {error}") from None
    if not isinstance(results, dict):
        found = "none" if results is None else f"a {type(results).__name__}"
        raise CheckpointError(f"{path}: expected an object in the metadata 'results', found {found}")
    epoch, selection = results.get("epoch"), results.get("selection")
    if epoch is not None and not (type(epoch) is int and 0 <= epoch <= MOST_EPOCHS):
        raise CheckpointError(
            f"{path}: the field 'epoch' of the metadata 'results' is {short(epoch)}; expected a whole number from 0 to "
            f"{MOST_EPOCHS}"
        )
    if selection is not None and not (isinstance(selection, str) and selection in SELECTIONS):
        raise CheckpointError(
            f"{path}: the field 'selection' of the metadata 'results' is {short(selection)}; expected one of "
            f"{', '.join(SELECTIONS)}"
        )
    return Checkpoint(path, config, tensors, results, metadata.get("backbone"))


def load_model(path: Path | str, **changes: Any) -> AdaptedCLIP:
    """The adapted model of a checkpoint file, on the CPU; `changes` as in build_model.

    Raises CheckpointError for a file that is not a checkpoint, and for parameters that do not fit the model.
    """
    return build_model(load_checkpoint(path), **changes)


def build_model(checkpoint: Checkpoint, **changes: Any) -> AdaptedCLIP:
    """The adapted model of a checkpoint, on the CPU.

    `changes` replace fields of the configuration, such as `pretrained="…"` if the backbone's file has moved, or
    `backend="torch"`. Raises CheckpointError if the parameters do not fit the model, or if the backbone's weights are
    not those of the training; and BackboneError or MethodError, with the path of the checkpoint, for a model that
    cannot be built.
    """
    config = checkpoint.config.replace(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)  # a random backbone has the same weights as in training
        try:
            model = AdaptedCLIP(config.model)
        except (BackboneError, MethodError) as error:
            raise type(error)(f"{checkpoint.path}: {error}") from error
    require_backbone(checkpoint, config.model, model.fingerprint)
    copy_parameters(checkpoint.parameters, model.adaptation(), str(checkpoint.path))
    return model


def require_backbone(checkpoint: Checkpoint, config: ModelConfig, fingerprint: str | None) -> None:
    """Raises CheckpointError if a model of `config` with this fingerprint has other weights than in the training.

    A method that trains CLIP keeps all weights in the checkpoint. Fingerprints that are unknown are not compared.
    """
    if checkpoint.config.model.method.trains_clip or None in (checkpoint.fingerprint, fingerprint):
        return
    if checkpoint.fingerprint != fingerprint:
        raise CheckpointError(
            f"{checkpoint.path}: the backbone, {config.model} with pretrained {config.pretrained}, has other weights "
            "than the backbone of the training, although their shapes agree; expected the file with which this "
            "checkpoint was trained (--pretrained)"
        )


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
    require_backbone(checkpoint, config.model, model.fingerprint)
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
