"""Atomic writing of files: a file is either complete or absent."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all: to a temporary file beside `path`, which is synced and renamed.

    Raises OSError, which names the path. An earlier version of the file is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"{path} could not be written ({error.strerror}); an earlier version of the file is unchanged",
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable by syncing the folder, which only POSIX allows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
