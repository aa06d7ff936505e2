"""Rows in a SQLite file, vectors in a file beside it, and an exact product.

    people.db              rows, settings, and the number of vectors in use
    people.db.1.vectors    32 bytes that name the index, then one vector after the other; a row knows its position

Vectors are written and synced first; then one transaction adds their rows. A process that is killed leaves vectors that
no row knows, and the next process overwrites them. Positions of removed rows are erased and not used again, since a
reader may still hold them; `tidy` copies the others to the next file.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from upperson.errors import SearchError
from upperson.files import require_regular
from upperson.search.store import EPOCH, Filter, Row, best, microseconds, missing, read_settings, row_of

APPLICATION = 0x55505365  # "UPSe", in the header of the SQLite file
MAGIC = b"upperson vectors"
HEADER = len(MAGIC) + 16  # bytes; the second half is the index's own key
BLOCK = 2**14  # vectors multiplied at once
AT_ONCE = 500  # ids in one statement
WAIT = 30.0  # seconds for another process's transaction

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value NOT NULL);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, position INTEGER NOT NULL, path TEXT NOT NULL, camera TEXT, time INTEGER,
    rest TEXT NOT NULL
);
CREATE INDEX entries_by_camera ON entries (camera);
CREATE INDEX entries_by_time ON entries (time);
CREATE TABLE to_erase (position INTEGER PRIMARY KEY);
"""


class Snapshot(NamedTuple):
    """What one transaction saw."""

    ids: np.ndarray  # (N,) int64, rising
    positions: np.ndarray  # (N,) int64
    vectors: np.ndarray  # (used, E), mapped into memory


class SQLiteStore:
    """See `upperson.search.store.Store`."""

    def __init__(self, path: Path, settings: dict[str, Any] | None):
        self.path, self.name, self.kept_at = path, str(path), path
        self.lock, self.seen, self.version = RLock(), None, None
        if path.exists():
            require_regular(path)
        elif settings is None:
            raise missing(self.name)
        elif not path.parent.is_dir():
            raise SearchError(f"{path}: the folder {path.parent} does not exist; expected a file in one that does")
        with self.reported():
            uri = f"{path.absolute().as_uri()}?mode={'rw' if settings is None else 'rwc'}"
            self.connection = sqlite3.connect(uri, WAIT, isolation_level=None, check_same_thread=False, uri=True)
        try:
            with self.reported():
                self.connection.execute("PRAGMA secure_delete = ON")  # forgotten paths are overwritten
                if settings is not None:
                    self.create(settings)
                self.settings = self.checked_settings()
                self.dtype = np.dtype(self.settings["dtype"])
        except BaseException:
            self.connection.close()
            raise

    # -------------------------------------------------------------------------------- opening

    def create(self, settings: dict[str, Any]) -> None:
        """Makes an index in an empty file, which a killed process may have left; others are not changed."""
        with self.transaction():
            if self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return
            for statement in SCHEMA.split(";"):
                self.connection.execute(statement)
            key = secrets.token_bytes(16)
            self.write_whole(self.vectors_file(1), key)
            values = {"settings": json.dumps(settings), "key": key, "generation": 1, "used": 0}
            self.connection.executemany("INSERT INTO settings VALUES (?, ?)", values.items())
            self.connection.execute(f"PRAGMA application_id = {APPLICATION}")

    def checked_settings(self) -> dict[str, Any]:
        """Raises SearchError for a file that is not an index, and for one whose vectors are missing or of another."""
        with self.reading():
            tables = self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not tables:
                raise missing(self.name)
            if self.connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
                raise SearchError(f"{self.path}: a SQLite file, but not an index of upperson search")
            settings = read_settings(self.name, str(self.value("settings")))
            self.settings, self.dtype = settings, np.dtype(settings["dtype"])
            self.mapped()
        return settings

    def value(self, name: str) -> Any:
        found = self.connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise SearchError(f"{self.path}: the index is damaged: the setting {name} is missing")
        return found[0]

    def number(self, name: str) -> int:
        value = self.value(name)
        if type(value) is not int or value < 0:
            raise SearchError(f"{self.path}: the index is damaged: the setting {name} is {value!r}")
        return value

    def key(self) -> bytes:
        key = self.value("key")
        if not isinstance(key, bytes):
            raise SearchError(f"{self.path}: the index is damaged: the setting key is {key!r}")
        return key

    def vectors_file(self, generation: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{generation}.vectors")

    def mapped(self) -> np.ndarray:
        """The vectors in use, (used, E), of the file that this transaction sees."""
        used, width = self.number("used"), self.settings["dimensions"]
        path = self.vectors_file(self.number("generation"))
        if not path.exists():
            raise SearchError(f"{path}: the vectors of {self.path} are missing; restore both, or index again")
        require_regular(path)
        with open(path, "rb") as file:
            if file.read(HEADER) != MAGIC + self.key():
                raise SearchError(f"{path}: not the vectors of {self.path}; restore both, or index again")
        length = HEADER + used * width * self.dtype.itemsize
        if path.stat().st_size < length:
            raise SearchError(
                f"{path}: {path.stat().st_size:,} bytes, but {self.path} needs {length:,}; restore both, or index again"
            )
        if not used:
            return np.empty((0, width), self.dtype)
        return np.memmap(path, self.dtype, "r", HEADER, (used, width))

    # -------------------------------------------------------------------------------- transactions

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turns SQLite's errors into one line."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if "not a database" in text:
                text = "not an index: it is not a SQLite file"
            elif "malformed" in text or "no such" in text:
                text = f"the index is damaged ({text})"
            elif "disk is full" in text or "I/O" in text:
                text = f"the disk is full or fails ({text}); what was indexed before is kept"
            elif "locked" in text:
                text = f"another process has kept the index for {WAIT:.0f} seconds"
            else:
                text = f"the index cannot be used ({text})"
            raise SearchError(f"{self.path}: {text}") from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context whose reads all see one state."""
        with self.lock, self.reported():
            self.connection.execute("BEGIN")
            try:
                yield
            finally:
                self.connection.execute("ROLLBACK")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A context whose changes are all made, and durable, or none."""
        with self.lock, self.reported():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has rolled back after some errors
                    self.connection.execute("ROLLBACK")
                raise
            finally:
                self.seen = None

    def snapshot(self) -> Snapshot:
        """The current state; only within `reading`. It is read again when another process has changed it."""
        version = self.connection.execute("PRAGMA data_version").fetchone()[0]
        if self.seen is None or version != self.version:
            rows = self.connection.execute("SELECT id, position FROM entries ORDER BY id")
            try:
                table = np.fromiter(rows, [("id", np.int64), ("position", np.int64)])
            except (TypeError, ValueError, OverflowError) as error:
                raise SearchError(f"{self.path}: the index is damaged: a position is not a number") from error
            seen = Snapshot(table["id"].copy(), table["position"].copy(), self.mapped())
            if len(table) and not (seen.positions.min() >= 0 and seen.positions.max() < len(seen.vectors)):
                raise SearchError(f"{self.path}: the index is damaged: a row has no vector")
            self.seen, self.version = seen, version
        return self.seen

    # -------------------------------------------------------------------------------- writing

    def add(self, rows: Sequence[Row], vectors: np.ndarray, replaced: Sequence[int] = ()) -> list[int]:
        with self.transaction():
            used = self.number("used")
            self.write_vectors(used, vectors)
            ids = []
            for position, row in enumerate(rows, used):
                fields = (position, row.path, row.camera, row.time and microseconds(row.time), row.rest())
                inserted = self.connection.execute(
                    "INSERT INTO entries (position, path, camera, time, rest) VALUES (?, ?, ?, ?, ?)", fields
                )
                ids.append(inserted.lastrowid)
            self.connection.execute("UPDATE settings SET value = ? WHERE name = 'used'", (used + len(rows),))
            self.drop(replaced)
        self.erase()
        return ids

    def update(self, rows: Mapping[int, Row]) -> None:
        with self.transaction():
            self.connection.executemany(
                "UPDATE entries SET path = ?, camera = ?, time = ?, rest = ? WHERE id = ?",
                [
                    (row.path, row.camera, row.time and microseconds(row.time), row.rest(), id)
                    for id, row in rows.items()
                ],
            )

    def remove(self, ids: Sequence[int]) -> None:
        with self.transaction():
            self.drop(ids)
        self.erase()

    def drop(self, ids: Sequence[int]) -> None:
        every = [(id,) for id in ids]
        self.connection.executemany("INSERT INTO to_erase SELECT position FROM entries WHERE id = ?", every)
        self.connection.executemany("DELETE FROM entries WHERE id = ?", every)

    def erase(self) -> None:
        """Overwrites the vectors of removed rows, also those that a killed process has left."""
        with self.reading():
            positions = self.connection.execute("SELECT position FROM to_erase").fetchall()
        if not positions:
            return
        zero = np.zeros((1, self.settings["dimensions"]), self.dtype)
        with self.transaction():
            for (position,) in positions:
                self.write_vectors(position, zero, sync=False)
            self.write_vectors(0, zero[:0])
            self.connection.execute("DELETE FROM to_erase")

    def write_vectors(self, position: int, vectors: np.ndarray, sync: bool = True) -> None:
        path = self.vectors_file(self.number("generation"))
        values = np.ascontiguousarray(vectors, self.dtype)
        with storing(path), open(path, "r+b") as file:
            file.seek(HEADER + position * self.settings["dimensions"] * self.dtype.itemsize)
            if values.size:
                file.write(values.data)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def write_whole(self, path: Path, key: bytes, blocks: Sequence[np.ndarray] = ()) -> None:
        with storing(path), open(path, "wb") as file:
            file.write(MAGIC + key)
            for block in blocks:
                file.write(np.ascontiguousarray(block).data)
            file.flush()
            os.fsync(file.fileno())

    def tidy(self) -> None:
        with self.reading():
            seen, generation = self.snapshot(), self.number("generation")
        # people.db.old.1.vectors belongs to another index, such as a copy.
        own = re.compile(rf"{re.escape(self.path.name)}\.[0-9]+\.vectors")
        for leftover in self.path.parent.glob("*.vectors"):
            if own.fullmatch(leftover.name) and leftover.name != self.vectors_file(generation).name:
                with suppress(OSError):  # Windows removes no file that is mapped
                    leftover.unlink()
        if len(seen.vectors) <= 2 * len(seen.ids) + BLOCK:
            return
        with self.transaction():
            blocks = [
                seen.vectors[seen.positions[start : start + BLOCK]] for start in range(0, len(seen.positions), BLOCK)
            ]
            self.write_whole(self.vectors_file(generation + 1), self.key(), blocks)
            self.connection.executemany(
                "UPDATE entries SET position = ? WHERE id = ?", list(enumerate(seen.ids.tolist()))
            )
            self.connection.execute("DELETE FROM to_erase")
            for name, value in (("generation", generation + 1), ("used", len(seen.ids))):
                self.connection.execute("UPDATE settings SET value = ? WHERE name = ?", (value, name))
        with suppress(OSError):
            self.vectors_file(generation).unlink()

    # -------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        with self.reading():
            return len(self.snapshot().ids)

    def rows(self, ids: Sequence[int]) -> dict[int, Row]:
        found: dict[int, Row] = {}
        with self.reading():
            for start in range(0, len(ids), AT_ONCE):
                some = list(ids[start : start + AT_ONCE])
                marks = ",".join("?" * len(some))
                query = f"SELECT id, path, camera, time, rest FROM entries WHERE id IN ({marks})"
                found |= {id: row_of(self.name, *fields) for id, *fields in self.connection.execute(query, some)}
        return found

    def all_rows(self) -> Iterator[tuple[int, Row]]:
        with self.reading():
            query = "SELECT id, path, camera, time, rest FROM entries ORDER BY id"
            found = [(id, row_of(self.name, *fields)) for id, *fields in self.connection.execute(query)]
        yield from found

    def some(self, number: int) -> list[int]:
        with self.reading():
            ids = self.snapshot().ids
        return ids[np.linspace(0, len(ids), min(number, len(ids)), endpoint=False).astype(np.int64)].tolist()

    def vectors(self, ids: Sequence[int]) -> np.ndarray:
        with self.reading():
            seen = self.snapshot()
        wanted = np.asarray(ids, np.int64)
        places = np.searchsorted(seen.ids, wanted)
        known = places < len(seen.ids)
        known[known] = seen.ids[places[known]] == wanted[known]
        if not known.all():
            raise SearchError(f"{self.path}: no image has the id {wanted[~known][0]}")
        return np.asarray(seen.vectors[seen.positions[places]], np.float32)

    def search(self, queries: np.ndarray, top: int, where: Filter) -> list[tuple[int, float]]:
        with self.reading():
            seen = self.snapshot()
            ids = self.fitting(where)
        positions = seen.positions if ids is None else seen.positions[np.searchsorted(seen.ids, ids)]
        ids = seen.ids if ids is None else ids
        if len(positions) == 0:
            return []
        if 2 * len(positions) > len(seen.vectors):  # rows in order are read faster than picked ones
            similarities = lowest(seen.vectors, queries)[positions]
        else:
            picked = np.array_split(positions, -(-len(positions) // BLOCK))
            similarities = np.concatenate([lowest(seen.vectors[some], queries) for some in picked])
        return best(self.name, ids, similarities, top)

    def fitting(self, where: Filter) -> np.ndarray | None:
        """(N,) int64: the ids that fit, rising; None: all."""
        conditions, values = [], []
        if where.cameras:
            conditions.append(f"camera IN ({','.join('?' * len(where.cameras))})")
            values += where.cameras
        if where.since is not None:
            conditions.append("time >= ?")
            values.append(microseconds(where.since))
        if where.until is not None:
            conditions.append("time <= ?")
            values.append(microseconds(where.until))
        if not conditions and where.path is None:
            return None
        query = f"SELECT id, path FROM entries WHERE {' AND '.join(conditions or ['1'])} ORDER BY id"
        return np.fromiter(
            (id for id, path in self.connection.execute(query, values) if where.fits_path(path)), np.int64
        )

    def cameras(self) -> list[str]:
        with self.reading():
            query = "SELECT DISTINCT camera FROM entries WHERE camera IS NOT NULL"
            return sorted(camera for (camera,) in self.connection.execute(query))

    def times(self) -> tuple[datetime, datetime] | None:
        with self.reading():
            first, last = self.connection.execute("SELECT min(time), max(time) FROM entries").fetchone()
        if first is None:
            return None
        return EPOCH + timedelta(microseconds=first), EPOCH + timedelta(microseconds=last)

    def close(self) -> None:
        self.connection.close()


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Names the file of vectors that cannot be written."""
    try:
        yield
    except OSError as error:
        raise SearchError(
            f"{path}: could not be written ({error.strerror}); what was indexed before is kept"
        ) from error


def lowest(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(N,) float32: for each of `vectors` (N, E) its lowest product with one of `queries` (Q, E)."""
    found = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), BLOCK):
        block = np.asarray(vectors[start : start + BLOCK], np.float32)
        found[start : start + BLOCK] = (block @ queries.T).min(1)
    return found
