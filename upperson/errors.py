"""All errors that a user can correct. Each message names the file, field or shape, and the expected value."""

import argparse
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

LONGEST = 2000  # characters of a message; names in a damaged file may have millions
WRITING = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(text: str) -> str:
    """A message on one line: control characters are escaped, and the middle of a very long text is left out."""
    text = CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 400]} … {text[-300:]}"


class OneLine(Exception):
    """An error whose message is one line, whatever the names and values that it quotes from a file."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class DataError(OneLine, ValueError):
    """A data set, an annotation or an image that cannot be used."""

    def __str__(self) -> str:
        """The message, without the traceback of a loader process that PyTorch puts in front of it."""
        return one_line(ValueError.__str__(self).rpartition(f"{__name__}.DataError: ")[2].strip())


class BackboneError(OneLine, ValueError):
    """A backbone that cannot be built, loaded or adapted."""


class MethodError(OneLine, ValueError):
    """Options of a method that are incompatible with the backbone or with each other."""


class CheckpointError(OneLine, ValueError):
    """A file that is not the expected checkpoint."""


class RetrievalError(OneLine, ValueError):
    """Features or person ids that leave the metrics undefined."""


class MergeError(OneLine, ValueError):
    """An adaptation that cannot be merged into weights, or a merged model whose features differ."""


class ExportError(OneLine, ValueError):
    """A model that cannot be exported, or an export whose features differ."""


class RunError(OneLine, RuntimeError):
    """A run that cannot start or continue."""


class SearchError(OneLine, RuntimeError):
    """An index, a gallery or a query that cannot be used."""


class IndexMissing(SearchError):
    """An index that does not exist yet."""


class Diverged(RunError):
    """A non-finite loss or gradient."""


class RunInterrupted(KeyboardInterrupt):
    """A run that Ctrl-C, SIGTERM or SIGHUP interrupted. Its state has been saved. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int = signal.SIGINT):
        super().__init__(message)
        self.signal = signal


USER_ERRORS = (
    BackboneError,
    CheckpointError,
    DataError,
    ExportError,
    MergeError,
    MethodError,
    RetrievalError,
    RunError,
    SearchError,
    OSError,
)


# PyTorch's and Python's errors of resources that are missing, and what helps. The first match counts.
RESOURCES = (
    (
        r"shared memory|bus error",
        "out of shared memory, which loader processes need",
        "a smaller --workers or a larger /dev/shm (docker run --shm-size) may help",
    ),
    (
        r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|Unable to allocate",
        "out of memory",
        "a smaller batch, smaller images or fewer --workers may help",
    ),
    (
        r"DataLoader worker .*(killed by signal|exited unexpectedly)",
        "a loader process has ended, perhaps by the system for lack of memory",
        "a smaller --workers or --batch-size may help",
    ),
    (
        r"Too many open files|ancdata|can't start new thread|Resource temporarily unavailable",
        "the system allows no more processes, threads or open files",
        "a smaller --workers or a larger limit (ulimit -n, ulimit -u) may help",
    ),
)


def missing_resource(error: BaseException) -> tuple[str, str, str] | None:
    """What is missing, PyTorch's own words, and what helps, for an error of memory or processes; None for others.

    Such an error is a MemoryError or a RuntimeError, which are not errors of this project.
    """
    if isinstance(error, MemoryError):
        message = "out of memory"
    elif isinstance(error, RuntimeError):
        message = str(error)
    else:
        return None
    for pattern, what, advice in RESOURCES:
        if re.search(pattern, message, re.IGNORECASE):
            own = (str(error).strip() or "no memory is left").split("\n")[0].split(". ")[0]
            return what, own, advice
    return None


class Parser(argparse.ArgumentParser):
    """A parser of a command line whose error is one line after the usage, whatever the arguments that it quotes."""

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def path_argument(text: str) -> Path:
    """The type of an argument that is a path. The empty text of an unset variable would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return Path(text)


def exit_status(command: Callable[[], int], stopped: str = "stopped") -> int:
    """Runs a command and returns its exit status. A user error is printed as one line, and the status is 1.

    After Ctrl-C the status is 130, after another signal 128 + its number. `stopped` is printed if the interruption has
    no message. With several processes of torchrun, an error message names the process, and only the first process
    prints the interruption. Characters that the encoding of the standard output lacks are printed as "?", since a
    console or a pipe may have another encoding than UTF-8, and a command must not end because of its output.
    """
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    rank, world_size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    several = rank.isdecimal() and world_size.isdecimal() and int(world_size) > 1
    prefix = f"error: process {rank} of {world_size}:" if several else "error:"
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # an error of the last lines would be printed by the interpreter, after this function
    except USER_ERRORS as error:
        if isinstance(error, OSError) and error.filename is None:
            discard_output()
        _print(f"{prefix} {one_line(_in_words(error))}")
        return 1
    except (MemoryError, RuntimeError) as error:
        missing = missing_resource(error)
        if missing is None:
            raise
        what, own, advice = missing
        _print(f"{prefix} {what} ({own}); {advice}")
        return 1
    except KeyboardInterrupt as interruption:
        if not several or rank == "0":
            _print(str(interruption) or stopped)
        return 128 + getattr(interruption, "signal", signal.SIGINT)


def _in_words(error: BaseException) -> str:
    """The message of an error. That of the system is "PATH: problem", without the number of the error."""
    if isinstance(error, OSError) and error.strerror:
        paths = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if not paths and error.errno in WRITING and error.strerror == os.strerror(error.errno):
            return f"the standard output, or a file that has no name, could not be written ({error.strerror})"
        return ": ".join([" -> ".join(paths), error.strerror] if paths else [error.strerror])
    return str(error)


def _open_missing_streams() -> None:
    """Opens standard streams that are closed. A file that is opened later would else take the place of the output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115 (open as long as the process)


def discard_output() -> None:
    """Sends what is still to be printed nowhere if the standard output cannot be written to any longer."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(text: str) -> None:
    with suppress(OSError):  # the terminal may have been closed
        print(text, file=sys.stderr, flush=True)
