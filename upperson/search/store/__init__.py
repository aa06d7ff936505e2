"""Where entries and their vectors are kept: one small interface, two engines.

SQLite is the standard library's, with the vectors in a file beside it. Milvus is a server, or a folder of Milvus Lite.
Both rank exactly: each vector is compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol
from unicodedata import normalize

import numpy as np

from upperson.errors import IndexMissing, SearchError
from upperson.files import parse_json
from upperson.search.entry import Entry

EPOCH = datetime(1970, 1, 1)
FORMAT = 1  # of an index; another number is refused
MILVUS = ".milvus.db"
LARGEST = 1.01  # cosine, with the rounding of float16


@dataclass(frozen=True)
class Row:
    """An entry without its id, and the state of its file when it was read."""

    path: str
    camera: str | None
    time: datetime | None
    seconds: float | None = None
    frame: int | None = None
    box: tuple[int, int, int, int] | None = None
    size: int = 0  # bytes
    mtime: int = 0  # nanoseconds
    digest: str = ""  # BLAKE2b of the content; "" for a synthetic image
    cut: str = "whole"  # how the file was cut into images
    parts: int = 0  # of the last image of a file: the number of its images; of the others 0

    def entry(self, id: int) -> Entry:
        return Entry(id, self.path, self.camera, self.time, self.seconds, self.box)

    def rest(self) -> str:
        """JSON of the fields that no filter reads."""
        fields = asdict(self)
        for name in ("path", "camera", "time"):
            del fields[name]
        return json.dumps(fields)


def row_of(index: str, path: str, camera: str | None, time: int | None, rest: str) -> Row:
    """The inverse of Row.rest and microseconds. Raises SearchError for values that they do not write."""
    try:
        fields = parse_json(rest)
        box = fields.pop("box")
        found = Row(path, camera, None if time is None else EPOCH + timedelta(microseconds=time), **fields)
        numbers = (found.size, found.mtime, found.parts, *(() if found.frame is None else (found.frame,)))
        whole = all(type(number) is int for number in (*numbers, *(box or ())))
        texts = all(isinstance(text, str) for text in (path, camera or "", found.digest, found.cut))
        if not whole or not texts or len(box or (0,) * 4) != 4 or not isinstance(found.seconds, float | int | None):
            raise ValueError("a field has another type")
        return found if box is None else Row(**{**vars(found), "box": tuple(box)})
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise SearchError(f"{index}: the index is damaged: the entry of {path!r} cannot be read ({error})") from error


def microseconds(time: datetime) -> int:
    """Since 1970, of a local time; negative before."""
    return (time - EPOCH) // timedelta(microseconds=1)


@dataclass(frozen=True)
class Filter:
    """Which entries are searched; the fields are those of Query."""

    cameras: tuple[str, ...] = ()
    since: datetime | None = None
    until: datetime | None = None
    path: str | None = None

    def fits_path(self, path: str) -> bool:
        """Whether the pattern fits the whole path, or, if relative, its end behind any folder.

        An accent is the same as a part of its letter and as a character of its own, as some file systems write it.
        """
        if self.path is None:
            return True
        pattern, path = normalize("NFC", self.path), normalize("NFC", path)
        return fnmatchcase(path, pattern) or fnmatchcase(path, f"*/{pattern}")


class Store(Protocol):
    """An engine. Vectors are (N, E) float32, of length 1. Threads may read at once; one process writes.

    All methods raise SearchError for an index that is damaged, full or out of reach.
    """

    name: str
    settings: dict[str, Any]  # the model, its dimensions and the format, as JSON
    kept_at: Path  # files beside the index begin with this path

    def __len__(self) -> int: ...

    def add(self, rows: Sequence[Row], vectors: np.ndarray, replaced: Sequence[int] = ()) -> list[int]:
        """Adds all rows, removes the ids in `replaced`, and returns the new ids, which rise and are never reused."""
        ...

    def update(self, rows: Mapping[int, Row]) -> None:
        """Replaces rows by id; their vectors stay."""
        ...

    def remove(self, ids: Sequence[int]) -> None:
        """Removes rows and erases their vectors. Unknown ids are left out."""
        ...

    def rows(self, ids: Sequence[int]) -> dict[int, Row]:
        """The rows of these ids that exist."""
        ...

    def all_rows(self) -> Iterator[tuple[int, Row]]:
        """All ids and rows, by id."""
        ...

    def some(self, number: int) -> list[int]:
        """At most `number` ids, spread over the index."""
        ...

    def vectors(self, ids: Sequence[int]) -> np.ndarray:
        """(len(ids), E) float32, in this order. Raises SearchError for an unknown id."""
        ...

    def search(self, queries: np.ndarray, top: int, where: Filter) -> list[tuple[int, float]]:
        """The ids that fit `where` best, with their lowest similarity to one of `queries` (Q, E); ties by id."""
        ...

    def cameras(self) -> list[str]: ...

    def times(self) -> tuple[datetime, datetime] | None:
        """The earliest and the latest."""
        ...

    def tidy(self) -> None:
        """The end of a change: space of removed entries is given back, where that is worth the work."""
        ...

    def close(self) -> None: ...


def is_server(index: str) -> bool:
    return index.startswith(("http://", "https://"))


def open_store(index: str, settings: dict[str, Any] | None = None) -> Store:
    """Opens an index, or makes one with these settings if it does not exist.

    Raises SearchError for an index that cannot be read; without `settings`, IndexMissing for one that does not exist.
    """
    if is_server(index) or index.endswith(MILVUS):
        from upperson.search.store.milvus import MilvusStore

        return MilvusStore(index, settings)
    from upperson.search.store.sqlite import SQLiteStore

    return SQLiteStore(Path(index), settings)


def missing(index: str) -> IndexMissing:
    return IndexMissing(f"{index}: no index; make one with upperson search index PHOTOS --index {index}")


def read_settings(index: str, text: str) -> dict[str, Any]:
    """The settings of an index. Raises SearchError for those of another format and for damaged ones."""
    try:
        settings = parse_json(text)
        found = settings["format"]
        if found == FORMAT:
            fits = isinstance(settings["identity"], dict) and isinstance(settings["checkpoint"], str)
            if not fits or type(settings["dimensions"]) is not int or settings["dimensions"] < 1:
                raise ValueError("a field has another type")
            if settings["dtype"] not in ("float32", "float16"):
                raise ValueError(f"dtype {settings['dtype']!r}")
            return settings
    except (ValueError, TypeError, KeyError) as error:
        raise SearchError(f"{index}: the index is damaged: its settings cannot be read ({error})") from error
    raise SearchError(
        f"{index}: an index of format {found}; this version reads format {FORMAT}; index the images again"
    )


def best(index: str, ids: np.ndarray, similarities: np.ndarray, top: int) -> list[tuple[int, float]]:
    """The `top` ids of the highest similarities, best first, ties by id. Both are (N,).

    Raises SearchError for a similarity that two vectors of length 1 cannot have.
    """
    if not (np.abs(similarities) <= LARGEST).all():  # also not for NaN
        raise SearchError(f"{index}: the index is damaged: a vector is not of length 1")
    if top < len(ids):
        bound = np.partition(similarities, len(ids) - top)[len(ids) - top]
        kept = similarities >= bound
        ids, similarities = ids[kept], similarities[kept]
    order = np.lexsort((ids, -similarities))[:top]
    return list(zip(ids[order].tolist(), similarities[order].tolist(), strict=True))
