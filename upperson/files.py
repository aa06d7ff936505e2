"""Atomic writing of files: a file is either complete or absent. Strict reading of JSON."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_DIGITS = 400  # of a number in JSON; Python's own limit of 4,300 digits is an error without a position


def write_atomically(path: Path, *content: bytes | memoryview) -> None:
    """Writes a file, from its parts, completely or not at all: to `temporary_of(path)`, which is synced and renamed.

    Raises OSError, which names the path. An earlier version of the file is then unchanged.
    """
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            for part in content:
                file.write(part)
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


def temporary_of(path: Path) -> Path:
    """The file in which `write_atomically` collects the content of `path`. A killed process leaves it behind."""
    return path.with_name(f".{path.name}.tmp")


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable by syncing the folder, which only POSIX allows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text (RFC 8259, bytes in UTF-8), in which nothing is guessed, dropped or rounded away.

    Raises ValueError, which says what is wrong and where: JSON that is invalid, truncated or nested too deeply; NaN,
    Infinity or a number beyond float64; a key that an object has twice; a string that is not valid Unicode.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        content = json.loads(
            text,
            object_pairs_hook=_without_repeated_keys,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
        _check_strings(content, "")
        return content
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text; byte {error.start} is invalid") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno} (character {error.pos} of {len(error.doc)})"
        raise ValueError(f"invalid or truncated JSON at {place}: {error.msg}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON allows")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; expected at most {MAX_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} exceeds the range of float64")
    return number


def _check_strings(content: Any, place: str) -> None:
    """Raises ValueError for a string without a UTF-8 encoding. `place` is the path of keys and indices to `content`."""
    if isinstance(content, str):
        if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
            raise ValueError(
                f"the string at {place or 'the top'} holds half of a surrogate pair: {ascii(content)[:60]}"
            )
    elif isinstance(content, dict):
        for key, value in content.items():
            _check_strings(key, f"a key of {place or 'the top'}")
            _check_strings(value, f"{place}.{key}" if place else f"field {key!r}")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            _check_strings(value, f"{place}[{number}]" if place else f"entry {number}")
