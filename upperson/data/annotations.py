"""Annotation files: finding, loading, and checked access to the values of their entries."""

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from upperson.errors import DataError
from upperson.files import A_FOLDER, NOTHING, found_at, parse_json, read_text

SPLITS = ("train", "val", "test")

# A longer caption is a mistake in the file. A shorter caption of more than CLIP's 77 tokens is accepted; the tokenizer
# truncates it, as in CLIP.
MAX_CAPTION_CHARACTERS = 5000

# The tokenizer would turn these texts, in OpenAI's or open_clip's spelling, into control tokens that end the caption.
CONTROL_TOKEN = re.compile(r"<\|(startoftext|endoftext|mask)\|>|<(start|end)_of_text>", re.IGNORECASE)

INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # categories of Unicode: control and format characters, separators

MAX_NAME = 255  # bytes; file systems have no longer names of files and folders
MOST_NAMES = 20  # limit of fields listed in an error

TYPE_NAMES = {str: "a string", int: "an integer", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Annotation:
    """An entry of an annotation file, or a part of an entry."""

    split: str
    image: Path
    captions: list[str]
    identity: int | None  # None: every image has its own identity
    name: str | None = None  # name of the identity in a user's own file


@dataclass(frozen=True)
class Entry:
    """An entry of an annotation file. All methods raise DataError for an invalid value."""

    values: dict[str, Any]
    where: str  # start of error messages: the file and the entry in it
    noun: str = "field"  # word for a key in error messages

    def get(self, key: str, *kinds: type) -> Any:
        """The value of `key`, which must have one of these types."""
        if key not in self.values:
            raise DataError(
                f"{self.where}: expected a {self.noun} {key!r}, found the {self.noun}s {listed(self.values)}"
            )
        value = self.values[key]
        if not isinstance(value, kinds) or isinstance(value, bool):  # a bool is an int to isinstance
            raise self.error(key, f"expected {' or '.join(TYPE_NAMES[kind] for kind in kinds)}, found {_named(value)}")
        return value

    def split(self, allowed: Sequence[str] = SPLITS) -> str:
        split = self.get("split", str)
        if split not in allowed:
            raise self.error("split", f"expected one of {', '.join(allowed)}, found {short(split)}")
        return split

    def path(self, key: str) -> str:
        path = self.get(key, str)
        if not path.strip():
            raise self.error(key, "expected a path, found an empty string")
        if "\0" in path:
            raise self.error(key, f"expected a path, found a NUL character in {short(path)}")
        if 4 * len(path) > MAX_NAME and any(len(name.encode()) > MAX_NAME for name in path.split("/")):
            raise self.error(key, f"expected names of at most {MAX_NAME} bytes in a path, found {short(path)}")
        return path

    def person_id(self, key: str) -> int:
        person_id = self.get(key, int)
        if not -(2**63) <= person_id < 2**63:
            raise self.error(key, f"expected an integer of at most 64 bits, found {short(person_id)}")
        return person_id

    def caption(self, key: str) -> str:
        caption = self.get(key, str)
        problem = _caption_problem(caption)
        if problem:
            raise self.error(key, problem)
        return caption

    def captions(self, key: str) -> list[str]:
        captions = self.get(key, list)
        if not captions:
            raise self.error(key, "expected at least one caption, found an empty list")
        for index, caption in enumerate(captions):
            problem = _caption_problem(caption)
            if problem:
                raise self.error(key, f"caption {index}: {problem}", joint=", ")
        return captions

    def error(self, key: str, problem: str, joint: str = ": ") -> DataError:
        return DataError(f"{self.where}, {self.noun} {key!r}{joint}{problem}")


def entries(values: Any, where: str) -> list[Entry]:
    """The entries of a list of objects. Errors count the entries from 0."""
    if not isinstance(values, list):
        raise DataError(f"{where}: expected a list of entries, found {_named(values)}")
    return [as_entry(value, f"{where}, entry {number}") for number, value in enumerate(values)]


def as_entry(value: Any, where: str) -> Entry:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {_named(value)}")
    return Entry(value, where)


def listed(names: Iterable[str]) -> str:
    """The names in an error."""
    shown = [short(name) for name in names]
    return ", ".join(shown[:MOST_NAMES] + ["…"] * (len(shown) > MOST_NAMES)) or "none"


def find_folder(title: str, root: Path, names: Sequence[str]) -> Path:
    """The first of `root` and `root`/`title` that contains a file of one of these names. Raises DataError."""
    candidates = (root, root / title)
    for folder in candidates:
        if any((folder / name).is_file() for name in names):
            return folder
    *others, last = [str(folder / name) for folder in candidates for name in names]
    raise DataError(f"{title}: {missing_in(root, 'folder ')}; looked for {', '.join(others)} and {last}")


def missing_in(root: Path, noun: str = "") -> str:
    """What is wrong with a `root` in which no annotation file was found."""
    if (found := found_at(root)) == A_FOLDER:
        return "annotation file not found"
    return f"{noun}{root} does not exist" if found == NOTHING else f"{root} is {found}; expected a folder"


def load_json(file: Path) -> Any:
    return json_of(load_text(file), str(file))


def json_of(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def load_text(file: Path) -> str:
    """The text of a regular UTF-8 file, with or without a byte order mark."""
    try:
        return read_text(file)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _named(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{TYPE_NAMES[type(value)]}, {short(value)}"


def _caption_problem(caption: Any) -> str | None:
    if not isinstance(caption, str):
        return f"expected a string, found {_named(caption)}"
    if not caption.strip():
        return f"expected text, found {'only white space' if caption else 'an empty string'}"
    if all(unicodedata.category(character) in INVISIBLE for character in caption):  # ends at the first visible one
        return f"expected text, found only invisible characters, {ascii(caption)[:40]}"
    if "\0" in caption:
        return f"expected plain text, found a NUL character in {short(caption)}"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return f"expected at most {MAX_CAPTION_CHARACTERS} characters, found {len(caption)}"
    # The tokenizer also unescapes HTML twice and normalises full-width letters before it looks for control tokens.
    cleaned = unicodedata.normalize("NFKC", html.unescape(html.unescape(caption)))
    token = CONTROL_TOKEN.search(cleaned)
    return f"expected plain text, found the control token {token.group()}" if token else None
