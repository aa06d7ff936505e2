"""TorchScript archives, such as those that OpenAI published: their tensors are read as data, and no code runs.

An archive is a zip file with a pickle of the modules' attributes, the bytes of the tensors, and code. torch.jit.load
runs that code (`__setstate__`), which can write files. Here the pickle may build only modules, lists and tensors.
"""

import pickle
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_ENTRIES = 100_000  # modules and tensors of an archive; OpenAI's have fewer than 2,000
MOST_BYTES = 1 << 26  # of the pickle, and of a file of code
PICKLED = "torch.jit._pickle"
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def require_whole(path: Path) -> None:
    """Raises ValueError for an archive of PyTorch whose tensors are larger than the file.

    PyTorch does not compress them. Compressed or shared by several names, a small file could fill any memory.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            unpacked = sum(entry.file_size for entry in file.infolist() if entry.filename.split("/")[1:2] == ["data"])
        size = path.stat().st_size
        if unpacked > size:
            raise ValueError(
                f"its tensors of {unpacked:,} bytes are compressed, in a file of {size:,}; expected a file as "
                "torch.save writes it"
            )


def read_archive(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive by name, on the CPU. No code runs.

    Raises ValueError or pickle.UnpicklingError for an archive that would need its code, and zipfile.BadZipFile for a
    damaged one.
    """
    with zipfile.ZipFile(path) as file:
        root = ArchiveReader(file).load()
        if not isinstance(root, Module):
            raise ValueError(f"the archive holds not a module but a {type(root).__name__}")
        return tensors_of(file, root)


class Module:
    """A module of the archive: the name of its class, and its attributes."""

    class_name: str
    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(
                f"the TorchScript class {self.class_name} restores itself by code (__setstate__), which is never run; "
                "expected a file of its state_dict()"
            )
        self.attributes = state


class ArchiveReader(pickle.Unpickler):
    """Reads the attributes of the modules. Every class that the pickle may name stands in `find_class`."""

    def __init__(self, file: zipfile.ZipFile):
        self.file, self.folder = file, f"{root_of(file)}/data"
        super().__init__(BytesIO(contents(file, f"{self.folder}.pkl", MOST_BYTES)))
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return type("Module", (Module,), {"class_name": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset)
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == PICKLED and name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"):
            return list
        if (module, name) == (PICKLED, "restore_type_tag"):
            return lambda value, _: value
        raise pickle.UnpicklingError(f"the archive holds a {module}.{name}; expected modules and tensors alone")

    def persistent_load(self, pid: Any) -> Tensor:
        """The elements of a storage, (elements,)."""
        _, dtype, key, _, elements = pid
        if key not in self.storages:
            found = bytearray(contents(self.file, f"{self.folder}/{key}", elements * dtype.itemsize))
            if len(found) != elements * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"{self.folder}/{key} has {len(found)} bytes, expected {elements} of {dtype}"
                )
            self.storages[key] = torch.frombuffer(found, dtype=dtype) if found else torch.empty(0, dtype=dtype)
        return self.storages[key]


def root_of(file: zipfile.ZipFile) -> str:
    """The folder that holds all files of an archive."""
    return file.namelist()[0].split("/")[0]


def contents(file: zipfile.ZipFile, name: str, most: int) -> bytes:
    """The bytes of a file in the archive. Raises ValueError if there are more than `most`."""
    size = file.getinfo(name).file_size
    if size > most:
        raise ValueError(f"{name} has {size} bytes, expected at most {most}")
    return file.read(name)


def tensors_of(file: zipfile.ZipFile, root: Module) -> dict[str, Tensor]:
    """The tensors that the code of the archive declares as parameters or buffers, as in state_dict()."""
    tensors: dict[str, Tensor] = {}
    declared: dict[str, list[str]] = {}
    left, entries = [("", root)], 0
    while left:
        prefix, module = left.pop()
        if module.class_name not in declared:
            declared[module.class_name] = declared_names(file, module.class_name)
        for name, value in module.attributes.items():
            entries += 1
            if isinstance(value, Module):
                left.append((f"{prefix}{name}.", value))
            elif isinstance(value, Tensor) and name in declared[module.class_name]:
                tensors[prefix + name] = value
        if entries > MOST_ENTRIES:
            raise ValueError(f"the archive has more than {MOST_ENTRIES} modules and tensors")
    return tensors


def declared_names(file: zipfile.ZipFile, class_name: str) -> list[str]:
    """The parameters and buffers of a class, from the text of its code."""
    module, _, name = class_name.rpartition(".")
    code = contents(file, f"{root_of(file)}/code/{module.replace('.', '/')}.py", MOST_BYTES).decode()
    _, _, body = code.partition(f"class {name}(Module):")
    lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", body.partition("\nclass ")[0], re.MULTILINE)
    return re.findall(r'"(\w+)"', " ".join(lists))
