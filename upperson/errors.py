"""All errors that a user can correct. Each message names the file, field or shape, and the expected value."""

import io
import os
import sys
from collections.abc import Callable


class DataError(ValueError):
    """A data set, an annotation or an image that cannot be used."""

    def __str__(self) -> str:
        """The message, without the traceback of a loader process that PyTorch puts in front of it."""
        return super().__str__().rpartition(f"{__name__}.DataError: ")[2].strip()


class BackboneError(ValueError):
    """A backbone that cannot be built, loaded or adapted."""


class MethodError(ValueError):
    """Options of a method that are incompatible with the backbone or with each other."""


class CheckpointError(ValueError):
    """A file that is not the expected checkpoint."""


class RetrievalError(ValueError):
    """Features or person ids that leave the metrics undefined."""


class MergeError(ValueError):
    """An adaptation that cannot be merged into weights, or a merged model whose features differ."""


class RunError(RuntimeError):
    """A run that cannot start or continue."""


class Diverged(RunError):
    """A non-finite loss or gradient."""


class RunInterrupted(KeyboardInterrupt):
    """A run that Ctrl-C or SIGTERM interrupted. Its state has been saved."""


USER_ERRORS = (
    BackboneError,
    CheckpointError,
    DataError,
    MergeError,
    MethodError,
    RetrievalError,
    RunError,
    OSError,
)


def exit_status(command: Callable[[], int], stopped: str = "stopped") -> int:
    """Runs a command and returns its exit status. A user error is printed as one line, and the status is 1.

    Characters that the encoding of the standard output lacks are printed as "?", since a console or a pipe may have
    another encoding than UTF-8, and a command must not end because of its output.
    After Ctrl-C the status is 130. `stopped` is printed if the interruption has no message. With several processes of
    torchrun, an error message names the process, and only the first process prints the interruption.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    rank, world_size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    several = rank.isdecimal() and world_size.isdecimal() and int(world_size) > 1
    try:
        return command()
    except USER_ERRORS as error:
        print(f"error: {f'process {rank} of {world_size}: ' if several else ''}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        if not several or rank == "0":
            print(str(interruption) or stopped, file=sys.stderr)
        return 130
