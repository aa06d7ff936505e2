"""Output files: they are checked before the work, and moved to their places when all are written and compared."""

import argparse
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from upperson.files import A_FOLDER, NOTHING, REGULAR, found_at, is_unicode, make_folder, require_folder

PREFIX = ".upperson-"  # of the temporary folders
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of writing alone


@contextmanager
def _named(paths: Sequence[Path]) -> Iterator[None]:
    """Names the outputs when the disk is full: the error names a temporary file, a copied input, or nothing."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        names = ", ".join(map(str, paths))
        raise OSError(
            error.errno, f"{names} could not be written ({os.strerror(error.errno)}); nothing was changed"
        ) from error


@contextmanager
def staged(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary paths, whose files are moved to `paths` if the body succeeds, and are deleted if the body fails."""
    with _named(paths), ExitStack() as stack:
        # The temporary folders are beside the final paths, so that moving a file is only a rename.
        folders = [stack.enter_context(TemporaryDirectory(prefix=PREFIX, dir=path.parent)) for path in paths]
        files = [Path(folder) / path.name for folder, path in zip(folders, paths, strict=True)]
        yield files
        for file, path in zip(files, paths, strict=True):
            os.replace(file, path)


def require_empty(folder: Path, option: str) -> None:
    """Raises OSError, which names the path, unless the path is an empty folder or can become one."""
    require_folder(folder, option)
    _require_nothing_in(folder)


def _require_nothing_in(folder: Path, but: str = "") -> None:
    """Raises OSError if a folder has an entry with another name than `but`."""
    if found_at(folder) != NOTHING and (names := sorted({*os.listdir(folder)} - {but})):
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise OSError(errno.ENOTEMPTY, f"{folder}: expected a new or an empty folder, found {names[0]}{others} in it")


@contextmanager
def new_folder(folder: Path, option: str) -> Iterator[Path]:
    """A temporary folder, which becomes `folder` if the body succeeds, and is deleted if the body fails.

    An empty folder that is there stays, and gets the content: it may be the working folder of a shell, a mounted disk,
    or the target of a symbolic link, and its parent may be read-only. Raises OSError as require_empty.
    """
    require_empty(folder, option)
    folder = folder.absolute()
    is_there = found_at(folder) == A_FOLDER
    if not is_there:
        make_folder(folder.parent, option)
    with _named([folder]), TemporaryDirectory(prefix=PREFIX, dir=folder if is_there else folder.parent) as place:
        written = Path(place) / "new"
        written.mkdir()
        yield written
        if is_there:
            _require_nothing_in(folder, but=Path(place).name)
            _move_content(written, folder)
        else:
            os.replace(written, folder)


def _move_content(source: Path, folder: Path) -> None:
    """Moves all entries of a folder to another one, or none."""
    with ExitStack() as stack:
        for entry in sorted(source.iterdir()):
            os.replace(entry, folder / entry.name)
            stack.callback(os.replace, folder / entry.name, entry)
        stack.pop_all()


def check_outputs(parser: argparse.ArgumentParser, outputs: list[Path], inputs: list[Path]) -> None:
    """Ends the command with an error unless all outputs are safetensors files that can be written, and no inputs."""
    for path in outputs:
        if path.suffix != ".safetensors":
            parser.error(f"{path}: expected a name that ends in .safetensors")
        if not is_unicode(str(path)):  # a checkpoint may have to name the file
            parser.error(f"{ascii(str(path))}: expected a path in UTF-8")
        if os.path.realpath(path) in [os.path.realpath(other) for other in inputs]:
            parser.error(f"{path} is an input; expected another file to write")
        if found_at(path.parent) != A_FOLDER:
            parser.error(f"{path}: expected a file in an existing folder; {path.parent} is {found_at(path.parent)}")
        if (found := found_at(path)) not in (REGULAR, NOTHING):
            parser.error(f"{path}: expected a file in an existing folder; found {found}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            parser.error(f"{path}: expected a file in a folder that can be written to")
