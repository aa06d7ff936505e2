"""Safetensors files with a kind and a version, without pickle: checkpoints, and the states of interrupted runs.

Files are written atomically, and are therefore always complete. The same content gives the same bytes.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upperson.config import Config
from upperson.errors import CheckpointError
from upperson.files import write_atomically

CHECKPOINT = "upperson checkpoint"
RESUME_STATE = "upperson resume state"
VERSIONS = {CHECKPOINT: ("1",), RESUME_STATE: ("2", "1")}  # of each kind, the current version first


def write_tensors(path: Path, kind: str, tensors: dict[str, Tensor], config: Config, metadata: dict[str, str]) -> None:
    """Writes tensors (on the CPU, contiguous) with a configuration and other metadata. Raises OSError (full disk)."""
    metadata = {"format": kind, "version": VERSIONS[kind][0], "config": config.to_json(), **metadata}
    content = save(tensors, metadata)
    write_atomically(path, *_with_sorted_header(content))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], Config, dict[str, str]]:
    """Tensors, configuration and metadata. Raises CheckpointError for a file of another kind or version."""
    return _read(path, kind, tensors=True)


def read_metadata(path: Path, kind: str) -> tuple[Config, dict[str, str]]:
    """Configuration and metadata, without reading the tensors. Raises the errors of `read_tensors`."""
    _, config, metadata = _read(path, kind, tensors=False)
    return config, metadata


def _read(path: Path, kind: str, *, tensors: bool) -> tuple[dict[str, Tensor], Config, dict[str, str]]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: there is {found}; expected an {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found_tensors = {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error}); expected an {kind}") from error
    if metadata.get("format") != kind:
        found = metadata.get("format")
        raise CheckpointError(
            f"{path}: expected an {kind}, found "
            + (f"an {found}" if found in (CHECKPOINT, RESUME_STATE) else "another safetensors file")
        )
    if metadata.get("version") not in VERSIONS[kind]:
        expected = " or ".join(VERSIONS[kind])
        raise CheckpointError(f"{path}: {kind} of version {metadata.get('version')}, expected version {expected}")
    try:
        config = Config.from_json(metadata.get("config", ""))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the configuration in the file does not fit this version of upperson: {error}"
        ) from error
    return found_tensors, config, metadata


def _with_sorted_header(content: bytes) -> tuple[bytes, memoryview]:
    """The header of a safetensors file with sorted keys, and the rest; safetensors itself orders metadata at random."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header, memoryview(content)[end:]


def plain(tensor: Tensor) -> Tensor:
    """The tensor in a form that safetensors can write."""
    return tensor.detach().cpu().contiguous()
