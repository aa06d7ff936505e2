"""The saved state of a run, from which the run is resumed, in one file.

The file also holds the configuration and the fingerprint of the data with which the run was started. A run is resumed
with the same ones only.
"""

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from upperson.config import Config
from upperson.data.fingerprint import Fingerprint, data_differences
from upperson.errors import CheckpointError, RunError
from upperson.files import parse_json
from upperson.model.tensor_files import RESUME_STATE, plain, read_metadata, read_tensors, write_tensors

RESUME = "resume.safetensors"


def save_state(run_dir: Path, state: dict[str, Any], config: Config, data: Fingerprint) -> None:
    """Writes a state of nested dicts, lists, tuples, tensors, numbers, strings, bools and None."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_take_apart(state, tensors), allow_nan=False)
    metadata = {"structure": structure, "data": json.dumps(data)}
    write_tensors(run_dir / RESUME, RESUME_STATE, tensors, config, metadata)


def load_state(run_dir: Path) -> dict[str, Any] | None:
    """The saved state with tensors on the CPU, or None if the run saved none. Raises CheckpointError."""
    if not (run_dir / RESUME).exists():
        return None
    tensors, _, metadata = read_tensors(run_dir / RESUME, RESUME_STATE)
    try:
        return _put_together(parse_json(metadata["structure"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run_dir / RESUME}: the structure of the state is damaged ({error})") from error


def require_same_configuration(run_dir: Path, config: Config) -> None:
    """Raises RunError if the saved state, where there is one, is of a configuration with other results."""
    if (run_dir / RESUME).exists():
        saved, _ = read_metadata(run_dir / RESUME, RESUME_STATE)
        if differences := config.differences(saved):
            raise RunError(
                f"{run_dir / RESUME}: the run was saved with another configuration: {'; '.join(differences)} as before"
            )


def changes_of_data(run_dir: Path, data: Fingerprint) -> list[str] | None:
    """What has changed in the data since the state was saved, in words; None for a state without a fingerprint.

    The states of version 1 have none. Raises CheckpointError.
    """
    path = run_dir / RESUME
    if not path.exists():
        return []
    _, metadata = read_metadata(path, RESUME_STATE)
    if metadata["version"] == "1":
        return None
    try:
        return data_differences(dict(parse_json(metadata["data"]).items()), data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the fingerprint of the data is damaged ({error})") from error


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process."""
    name, keys, position, has_gauss, gauss = cast(tuple, np.random.get_state())
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of random_states."""
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])


def _take_apart(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Replaces the tensors of a nested state by numbers, for JSON, and moves them to `tensors`."""
    if isinstance(tree, Tensor):
        key = str(len(tensors))
        tensors[key] = plain(tree)
        return {"tensor": key}
    if isinstance(tree, dict):
        return {"dict": [[key, _take_apart(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [_take_apart(value, tensors) for value in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a resume state cannot contain a {type(tree).__name__}")


def _put_together(structure: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(value, tensors) for key, value in content}
    return {"list": list, "tuple": tuple}[kind](_put_together(value, tensors) for value in content)
