"""The folder of a run: its files, its creation, its lock, and its checks."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from upperson.config import Config
from upperson.config.files import CONFIG, read_configuration
from upperson.errors import CheckpointError, RunError
from upperson.evaluate.results import RESULTS, TABLE
from upperson.files import REGULAR, found_at, make_folder, temporary_of, write_atomically
from upperson.train.log import METRICS_FILE
from upperson.train.resume import RESUME, require_same_configuration

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
BEST, LAST = "best.safetensors", "last.safetensors"
CURVE, TOP_TEN = "curve.png", "top10.png"
SHOWN = (TABLE, CURVE, TOP_TEN, BEST, METRICS_FILE)  # the files that a finished run lists
FILES = (CONFIG, METRICS_FILE, RESUME, BEST, LAST, RESULTS, TABLE, CURVE, TOP_TEN)


def claim_folder(config: Config) -> Path:
    """Creates the run folder if necessary: run_dir, or the next free runs/DATASET-NUMBER."""
    named = config.train.run_dir
    if named is not None:
        make_folder(named, "run_dir")
        return named
    make_folder(Path("runs"), "run_dir")
    number = 1
    while True:
        run_dir = Path("runs", f"{config.data.dataset}-{number}")
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            number += 1


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps other processes out of `run_dir` until the context or this process ends, even by SIGKILL.

    Raises RunError if another process holds the lock.
    """
    path = run_dir / LOCK
    if fcntl is None:
        with _refused(run_dir, Timeout), FileLock(path, timeout=0):
            yield
        return
    with open(path, "ab") as file:
        _lock(file, run_dir)
        # The process that held the lock may have removed the file since it was opened here.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise RunError(f"{run_dir} was in use by another training process until now; start again")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _lock(file: IO[bytes], run_dir: Path) -> None:
    """Locks an open file by lockf. Child processes, such as loaders, do not keep this lock, unlike filelock's."""
    assert fcntl is not None
    try:
        with _refused(run_dir, BlockingIOError, PermissionError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise


@contextmanager
def _refused(run_dir: Path, *errors: type[OSError]) -> Iterator[None]:
    """A context in which these errors of a lock become a RunError."""
    try:
        yield
    except errors:
        raise RunError(
            f"{run_dir} is in use by another training process; wait for that process, stop it, or choose another "
            "--run-dir"
        ) from None


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of a killed run. Only the process that holds the lock may call this function."""
    for name in FILES:
        temporary_of(folder / name).unlink(missing_ok=True)


def refuse_used(folders: Iterable[Path]) -> None:
    """Raises RunError for a folder that contains a file of a run."""
    for folder in folders:
        for name in FILES:
            if os.path.exists(folder / name):
                raise RunError(
                    f"{folder} already contains a run ({name}); resume this run with --resume {folder}, or choose "
                    "another --run-dir"
                )


def write_configuration(run_dir: Path, config: Config) -> None:
    make_folder(run_dir, "run_dir")
    write_atomically(run_dir / CONFIG, config.to_json())


def require_same_run(config: Config, run_dir: Path) -> None:
    """Raises RunError if `run_dir` contains no run, or a run of another configuration."""
    if found_at(run_dir / CONFIG) != REGULAR:
        raise RunError(f"{run_dir}: no run to resume ({CONFIG} is missing)")
    differences = config.differences(_saved(run_dir))
    if differences:
        raise RunError(f"{run_dir}: the run was started with another configuration: {'; '.join(differences)} as before")
    require_same_configuration(run_dir, config)


def require_same_stage(config: Config, folder: Path, first: bool) -> None:
    """Raises RunError if the folder of a stage contains a run of another configuration.

    The starting checkpoint of a later stage is not compared, since the run folder may have been moved.
    """
    if found_at(folder / CONFIG) == REGULAR:
        saved = _saved(folder)
        require_same_run(config if first else config.replace(start_from=saved.train.start_from), folder)


def _saved(run_dir: Path) -> Config:
    try:
        return read_configuration(run_dir / CONFIG)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
