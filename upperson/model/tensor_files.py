"""Safetensors files with a kind and a version, without pickle: checkpoints, and the states of interrupted runs.

Files are written atomically, and are therefore always complete. The same content gives the same bytes. A checksum of
each tensor and of each entry of the metadata tells a damaged file.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upperson.config import Config
from upperson.errors import CheckpointError
from upperson.files import REGULAR, found_at, parse_json, write_atomically

CHECKPOINT = "upperson checkpoint"
RESUME_STATE = "upperson resume state"
CHECKSUMS = "checksums"  # key in the metadata: CRC-32 of each tensor and of each other entry of the metadata
VERSIONS = {CHECKPOINT: ("2",), RESUME_STATE: ("3", "2", "1")}  # of each kind, the current version first


def write_tensors(path: Path, kind: str, tensors: dict[str, Tensor], config: Config, metadata: dict[str, str]) -> None:
    """Writes tensors (on the CPU, contiguous) with a configuration and other metadata. Raises OSError (full disk)."""
    metadata = {"format": kind, "version": VERSIONS[kind][0], "config": config.to_json(), **metadata}
    content = save(tensors, with_checksums(tensors, metadata))
    write_atomically(path, *_with_sorted_header(content))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], Config, dict[str, str]]:
    """Tensors, configuration and metadata. Raises CheckpointError for a file of another kind or version."""
    return _read(path, kind, tensors=True)


def read_metadata(path: Path, kind: str) -> tuple[Config, dict[str, str]]:
    """Configuration and metadata, without reading the tensors. Raises the errors of `read_tensors`."""
    _, config, metadata = _read(path, kind, tensors=False)
    return config, metadata


def _read(path: Path, kind: str, *, tensors: bool) -> tuple[dict[str, Tensor], Config, dict[str, str]]:
    if (found := found_at(path)) != REGULAR:
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
    checked = CHECKSUMS in metadata or metadata["version"] == VERSIONS[kind][0]  # earlier states had no checksums
    if checked and (problem := damage(found_tensors, metadata, all_tensors=tensors)):
        raise CheckpointError(f"{path}: the file is damaged: {problem}")
    try:
        config = Config.from_json(metadata.get("config", ""))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the configuration in the file does not fit this installation of upperson: {error}"
        ) from error
    return found_tensors, config, metadata


def with_checksums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file with the checksums of its tensors (on the CPU, contiguous) and of the metadata."""
    others = {name: text for name, text in metadata.items() if name != CHECKSUMS}
    return others | {CHECKSUMS: json.dumps(_checksums(tensors) | _checksums(others))}


def damage(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, all_tensors: bool = True) -> str:
    """What in a file is not what was written, by the checksums in its metadata; "" for a file without damage.

    all_tensors: False if the tensors were not read.
    """
    try:
        saved = dict(parse_json(metadata[CHECKSUMS]))
    except (KeyError, TypeError, ValueError) as error:
        return f"its checksums cannot be read ({error!r})"
    found = _checksums(tensors) | _checksums({name: text for name, text in metadata.items() if name != CHECKSUMS})
    if not all_tensors:
        saved = {name: number for name, number in saved.items() if not name.startswith("tensor ")}
    names = sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))
    return f"its {names[0]} is not what was saved" if names else ""


def _checksums(content: Mapping[str, Tensor | str]) -> dict[str, int]:
    """The checksum of each tensor and of each entry of the metadata, by what it is and its name."""
    found = {}
    for name, value in content.items():
        if isinstance(value, str):
            found[f"metadata {name}"] = zlib.crc32(value.encode("utf-8", "backslashreplace"))
        else:
            kind = f"{value.dtype} {tuple(value.shape)}".encode()
            found[f"tensor {name}"] = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(kind))
    return found


def _with_sorted_header(content: bytes) -> tuple[bytes, memoryview]:
    """The header of a safetensors file with sorted keys, and the rest; safetensors itself orders metadata at random."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header, memoryview(content)[end:]


def plain(tensor: Tensor) -> Tensor:
    """The tensor in a form that safetensors can write."""
    return tensor.detach().cpu().contiguous()
