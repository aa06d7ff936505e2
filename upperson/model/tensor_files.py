"""Safetensors files with a kind and a version, without pickle: checkpoints, and the states of interrupted runs.

Files are written atomically, and are therefore always complete.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upperson.config import Config
from upperson.errors import CheckpointError
from upperson.files import write_atomically

CHECKPOINT = "upperson checkpoint"
RESUME_STATE = "upperson resume state"
VERSION = "1"


def write_tensors(path: Path, kind: str, tensors: dict[str, Tensor], config: Config, metadata: dict[str, str]) -> None:
    """Writes tensors (on the CPU, contiguous) with a configuration and other metadata. Raises OSError (full disk)."""
    metadata = {"format": kind, "version": VERSION, "config": config.to_json(), **metadata}
    write_atomically(path, save(tensors, metadata))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], Config, dict[str, str]]:
    """Tensors, configuration and metadata. Raises CheckpointError for a file of another kind or version."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: there is {found}; expected an {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error}); expected an {kind}") from error
    if metadata.get("format") != kind:
        found = metadata.get("format")
        raise CheckpointError(
            f"{path}: expected an {kind}, found "
            + (f"an {found}" if found in (CHECKPOINT, RESUME_STATE) else "another safetensors file")
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path}: {kind} of version {metadata.get('version')}, expected version {VERSION}")
    try:
        config = Config.from_json(metadata.get("config", ""))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the configuration in the file does not fit this version of upperson: {error}"
        ) from error
    return tensors, config, metadata


def plain(tensor: Tensor) -> Tensor:
    """The tensor in a form that safetensors can write."""
    return tensor.detach().cpu().contiguous()
