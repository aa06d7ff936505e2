"""Files: atomic writing (a file is either complete or absent), and strict reading of text and JSON."""

import errno
import json
import math
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from reprlib import repr as short
from typing import Any

MAX_DIGITS = 400  # of a number in JSON; Python's own limit of 4,300 digits is an error without a position

# A string, or a literal that JSON's grammar or Python's reader takes for a number.
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?(?:NaN|Infinity|\d[\d.eE+-]*)', re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_OR_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
REGULAR, A_FOLDER, NOTHING = "a regular file", "a folder", "no such file"
FOLDER = "expected a folder that can be written to"
KINDS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: A_FOLDER,
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def write_atomically(path: Path, *content: bytes | memoryview | str, durable: bool = True) -> None:
    """Writes a file, from its parts, completely or not at all: to `temporary_of(path)`, which is synced and renamed.

    A file that can be made again need not be `durable`: it is not synced, and may be damaged after a power failure.

    Text is written in UTF-8. Half of a surrogate pair, as in the path of a file whose name is not UTF-8, becomes a
    backslash escape. Raises OSError, which names the path. An earlier version of the file is then unchanged.
    """
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            for part in content:
                file.write(part.encode("utf-8", "backslashreplace") if isinstance(part, str) else part)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
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


def found_at(path: Path) -> str:
    """What is at a path, in words: REGULAR, A_FOLDER, …, NOTHING, or the system's reason why this is unknown.

    Unlike Path.is_file and Path.exists, this function raises no error, for example for a name that is too long.
    """
    try:
        return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "another kind of file")
    except (FileNotFoundError, NotADirectoryError):
        return NOTHING
    except OSError as error:
        return f"a path that cannot be read ({error.strerror})"


def require_regular(path: Path) -> None:
    """Raises OSError for a path that is not a regular file. Opening a FIFO could wait forever; a device has no end."""
    os.stat(path)
    if (found := found_at(path)) != REGULAR:
        code = errno.EISDIR if found == A_FOLDER else errno.EINVAL
        raise OSError(code, f"expected a regular file, found {found}", str(path))


def make_folder(path: Path, option: str) -> None:
    """Makes a folder with its parents, if necessary. Raises OSError, which names the option and the path.

    A folder that cannot be written to is refused, so that a command does not compute results that it cannot write.
    """
    require_folder(path, option)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{option}: {path} cannot be created ({error.strerror}); {FOLDER}") from error


def require_folder(path: Path, option: str, *, writable: bool = True) -> None:
    """Raises OSError, which names the option and the path, unless the path is a folder or can become one.

    Nothing is created.
    """
    found = found_at(path)
    if found not in (A_FOLDER, NOTHING):
        raise OSError(errno.ENOTDIR, f"{option}: {path} is {found}; {FOLDER}")
    existing = next((parent for parent in (path, *path.absolute().parents) if found_at(parent) != NOTHING), path)
    if found_at(existing) != A_FOLDER:
        found = f"{existing}, which is part of {path}, is {found_at(existing)}"
        raise OSError(errno.ENOTDIR, f"{option}: {found}; {FOLDER}")
    if writable and not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, f"{option}: {existing} cannot be written to; {FOLDER}")


def expanded(path: Path) -> Path:
    """The path, in which ~ and ~NAME are home folders. Raises OSError for a home folder that is unknown."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, f"expected an absolute path ({error})", str(path)) from error


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file, with or without a byte order mark; every line ends with a line feed.

    Raises OSError, and ValueError with the problem but without the path for another encoding.
    """
    require_regular(path)
    content = path.read_bytes()
    utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        advice = "the file seems to be UTF-16" if utf_16 else "a file in cp1252 (Windows) or Latin-1 must be converted"
        raise ValueError(f"expected UTF-8 text; byte {error.start} is invalid; {advice}") from None
    if "\0" in text:
        advice = "; the file seems to be UTF-16" if utf_16 else ""
        raise ValueError(f"expected UTF-8 text; character {text.index(chr(0))} is NUL{advice}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_unicode(text: str) -> bool:
    """Whether the text can be written in UTF-8: it has no half of a surrogate pair."""
    return text.isascii() or not SURROGATE.search(text)


class _BadLiteral(ValueError):
    """A literal that is refused: the literal and the problem."""


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
        if SURROGATE_OR_ESCAPE.search(text):  # without them the long walk is not needed
            _check_strings(content, "")
        return content
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text; byte {error.start} is invalid") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid or truncated JSON at {_place(error.doc, error.pos)}: {error.msg}") from None
    except _BadLiteral as error:
        raise ValueError(_found_at(str(text), *error.args)) from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {short(repeated)} stands twice in one object, {short(content)}")
    return content


def _refuse_constant(name: str) -> None:
    raise _BadLiteral(name, f"{name} is not a number that JSON allows")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _BadLiteral(digits, f"a number of {len(digits)} digits; expected at most {MAX_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _BadLiteral(digits, f"the number {digits[:40]} exceeds the range of float64")
    return number


def _found_at(text: str, literal: str, problem: str) -> str:
    """The problem of a literal, with the place of its first occurrence outside of strings, and the key before it."""
    key = ""
    for token in TOKEN.finditer(text):
        if token.group() == literal:
            return f"{f'field {key}: ' if key else ''}{problem}; found at {_place(text, token.start())}"
        if token.group().startswith('"') and text[token.end() : token.end() + 9].lstrip().startswith(":"):
            key = short(token.group()[1:-1])
    return problem


def _place(text: str, position: int) -> str:
    """The line, if there are several, the column and the position, all but the last counted from 1."""
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    return f"{f'line {line}, ' if chr(10) in text else ''}column {column} (character {position} of {len(text)})"


def _check_strings(content: Any, place: str) -> None:
    """Raises ValueError for a string without a UTF-8 encoding. `place` is the path of keys and indices to `content`."""
    if isinstance(content, str):
        if not is_unicode(content):
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
