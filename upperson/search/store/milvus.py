"""Milvus, a database of vectors: a server at http://HOST:19530/NAME, or Milvus Lite in NAME.milvus.db.

A collection NAME holds the entries, NAME_settings the model and the next id. The index of the vectors is FLAT, which
compares each vector. Of a user's text, expressions contain hexadecimal digits, and only those characters of a path that
mean nothing in an expression.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import urlsplit

import numpy as np

from upperson.errors import SearchError
from upperson.search.store import EPOCH, Filter, Row, best, is_server, microseconds, missing, read_settings, row_of

TOKEN = "MILVUS_TOKEN"  # environment variable: user:password, or the key of a server
SECONDS = 10  # to reach a server
NO_TIME = -(2**62)  # stands for the missing time of an entry
LONGEST = 65_535  # bytes of a text in Milvus
WINDOW = 2**12  # ids read at once with their vectors
LONG_WINDOW = 2**15  # and without: Milvus looks through all entries for each window
MOST = 16_384  # entries that a server returns for one search
SPARE = 10  # entries asked for beyond the top, by which ties at the border are seen


class MilvusStore:
    """See `upperson.search.store.Store`."""

    def __init__(self, index: str, settings: dict[str, Any] | None):
        try:
            from pymilvus import MilvusClient, exceptions
        except ImportError as error:
            raise SearchError(
                f"{index}: an index in Milvus needs pymilvus; install it with pip install 'upperson[milvus]' ({error})"
            ) from error
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # its errors are raised too
        self.name, self.failure = index, exceptions.MilvusException
        address, self.entries, self.kept_at = located(index)
        self.texts = f"{self.entries}_settings"
        if settings is None and not is_server(index) and not Path(index).exists():
            raise missing(index)
        with self.reported():
            if is_server(index):
                options: dict[str, Any] = dict(token=os.environ.get(TOKEN, ""), timeout=SECONDS)
            else:  # the server of Milvus Lite ends connections that ask every ten seconds whether it lives
                options = dict(grpc_options={"grpc.keepalive_time_ms": 3_600_000})
            try:
                self.client = MilvusClient(address, **options)
            except self.failure as error:
                if is_server(index):
                    reason = f"no server of Milvus takes the connection; is it there, and its password in {TOKEN}?"
                else:
                    reason = (
                        "Milvus Lite cannot open the index; another process may have it open, as only one can at a time"
                    )
                raise SearchError(f"{index}: {reason} ({error.message})") from error
        try:
            with self.reported():
                if settings is not None and not self.client.has_collection(self.texts):
                    self.create(settings)
                if not self.client.has_collection(self.texts):
                    raise missing(index)
                for collection in (self.texts, self.entries):
                    self.client.load_collection(collection)
                self.settings = read_settings(index, self.text("settings"))
        except BaseException:
            self.client.close()
            raise

    def create(self, settings: dict[str, Any]) -> None:
        """Makes both collections; that of the settings last, since it tells that an index is there."""
        from pymilvus import DataType, MilvusClient

        if settings["dtype"] != "float32":
            raise SearchError(f"{self.name}: an index in Milvus stores float32; leave --half out")
        texts = dict(datatype=DataType.VARCHAR, max_length=LONGEST)
        fields: dict[str, dict[str, dict[str, Any]]] = {
            self.entries: {
                "id": dict(datatype=DataType.INT64, is_primary=True),
                "vector": dict(datatype=DataType.FLOAT_VECTOR, dim=settings["dimensions"]),
                "path": texts,
                "camera": texts,
                "time": dict(datatype=DataType.INT64),
                "rest": texts,
            },
            self.texts: {
                "name": dict(datatype=DataType.VARCHAR, max_length=100, is_primary=True),
                "vector": dict(datatype=DataType.FLOAT_VECTOR, dim=2),  # each collection must have one
                "value": texts,
            },
        }
        for collection, columns in fields.items():
            if self.client.has_collection(collection):  # of a process that was killed
                self.client.drop_collection(collection)
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
            for name, column in columns.items():
                schema.add_field(name, **column)
            index = MilvusClient.prepare_index_params()
            index.add_index("vector", index_type="FLAT", metric_type="IP")
            self.client.create_collection(collection, schema=schema, index_params=index, consistency_level="Strong")
        self.write_text("next id", "1")
        self.write_text("settings", json.dumps(settings))

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turns errors of Milvus into one line."""
        try:
            yield
        except (self.failure, ValueError, OSError) as error:  # Milvus Lite raises all of them
            text = str(getattr(error, "message", "") or error)
            raise SearchError(f"{self.name}: the index in Milvus cannot be used ({text})") from error

    # -------------------------------------------------------------------------------- settings

    def text(self, name: str) -> str:
        found = self.client.query(self.texts, filter=f'name == "{name}"', output_fields=["value"])
        if len(found) != 1:
            raise SearchError(f"{self.name}: the index is damaged: the setting {name} is missing")
        return found[0]["value"]

    def write_text(self, name: str, value: str) -> None:
        self.client.upsert(self.texts, [{"name": name, "vector": [0.0, 0.0], "value": value}])

    def next_id(self) -> int:
        text = self.text("next id")
        if not re.fullmatch("[0-9]{1,18}", text):
            raise SearchError(f"{self.name}: the index is damaged: the next id is {text!r}")
        return int(text)

    # -------------------------------------------------------------------------------- writing

    def add(self, rows: Sequence[Row], vectors: np.ndarray, replaced: Sequence[int] = ()) -> list[int]:
        """As in Store. A process that is killed between the steps leaves a file with too many entries, or too few."""
        with self.reported():
            first = self.next_id()
            self.write_text("next id", str(first + len(rows)))
            ids = list(range(first, first + len(rows)))
            if rows:
                self.client.insert(self.entries, self.entities(dict(zip(ids, rows, strict=True)), vectors))
        self.remove(replaced)
        return ids

    def update(self, rows: Mapping[int, Row]) -> None:
        ids = list(rows)
        for start in range(0, len(ids), WINDOW):
            some = {id: rows[id] for id in ids[start : start + WINDOW]}
            vectors = self.vectors(list(some))
            with self.reported():
                self.client.upsert(self.entries, self.entities(some, vectors))

    def entities(self, rows: Mapping[int, Row], vectors: np.ndarray) -> list[dict[str, Any]]:
        found = []
        for (id, row), vector in zip(rows.items(), vectors, strict=True):
            for name, text in (("path", row.path), ("camera", row.camera or "")):
                if len(text.encode()) * (1 + (name == "camera")) > LONGEST:
                    raise SearchError(f"{self.name}: the {name} {text[:60]!r}… is too long for Milvus")
            found.append({
                "id": id,
                "vector": vector,
                "path": row.path,
                "camera": (row.camera or "").encode().hex(),
                "time": NO_TIME if row.time is None else microseconds(row.time),
                "rest": row.rest(),
            })  # fmt: skip
        return found

    def remove(self, ids: Sequence[int]) -> None:
        with self.reported():
            for start in range(0, len(ids), WINDOW):
                self.client.delete(self.entries, ids=list(ids[start : start + WINDOW]))

    def tidy(self) -> None:
        """Milvus gives space back by itself; but it finds new entries forty times faster once they are in its files."""
        with self.reported():
            self.client.flush(self.entries)

    # -------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        with self.reported():
            return self.count("")

    def rows(self, ids: Sequence[int]) -> dict[int, Row]:
        fields = self.fields(ids, ["path", "camera", "time", "rest"])
        return {id: self.row(entity) for id, entity in fields.items()}

    def some(self, number: int) -> list[int]:
        with self.reported():
            end = self.next_id()  # the first id is 1
            spread = np.linspace(1, end, min(number, end - 1), endpoint=False).astype(np.int64).tolist()
        return sorted(self.fields(spread, []))

    def vectors(self, ids: Sequence[int]) -> np.ndarray:
        found = self.fields(ids, ["vector"])
        for id in ids:
            if id not in found:
                raise SearchError(f"{self.name}: no image has the id {id}")
        table = np.array([found[id]["vector"] for id in ids], np.float32)
        return table.reshape(-1, self.settings["dimensions"])

    def fields(self, ids: Sequence[int], names: list[str]) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        with self.reported():
            for start in range(0, len(ids), WINDOW):
                some = list(map(int, ids[start : start + WINDOW]))
                entities = self.client.query(self.entries, filter=f"id in {some}", output_fields=["id", *names])
                found |= {entity["id"]: entity for entity in entities}
        return found

    def row(self, entity: Mapping[str, Any]) -> Row:
        time = entity["time"]
        camera = bytes.fromhex(entity["camera"]).decode() or None
        return row_of(self.name, entity["path"], camera, None if time == NO_TIME else time, entity["rest"])

    def windows(self, condition: str, names: list[str]) -> Iterator[dict[str, Any]]:
        """The fields of all entries that fit, by id. An answer of a server is limited, so ids are asked for in turn."""
        if condition and self.count(condition) <= LONG_WINDOW:
            conditions = [condition]
        else:
            starts = range(0, self.next_id(), LONG_WINDOW)
            conditions = [joined(f"id >= {start}", f"id < {start + LONG_WINDOW}", condition) for start in starts]
        for each in conditions:
            found = self.client.query(self.entries, filter=each, output_fields=["id", *names])
            yield from sorted(found, key=lambda entity: entity["id"])

    def count(self, condition: str) -> int:
        return self.client.query(self.entries, filter=condition, output_fields=["count(*)"])[0]["count(*)"]

    def all_rows(self) -> Iterator[tuple[int, Row]]:
        with self.reported():
            for entity in self.windows("", ["path", "camera", "time", "rest"]):
                yield entity["id"], self.row(entity)

    def cameras(self) -> list[str]:
        with self.reported():
            found = {entity["camera"] for entity in self.windows("", ["camera"])}
        return sorted(bytes.fromhex(camera).decode() for camera in found if camera)

    def times(self) -> tuple[datetime, datetime] | None:
        with self.reported():
            found = [entity["time"] for entity in self.windows(f"time > {NO_TIME}", ["time"])]
        if not found:
            return None
        return EPOCH + timedelta(microseconds=min(found)), EPOCH + timedelta(microseconds=max(found))

    def search(self, queries: np.ndarray, top: int, where: Filter) -> list[tuple[int, float]]:
        condition = expression(where)
        found: list[tuple[int, float]] = []
        with self.reported():
            if where.path is None:
                found = self.lowest(queries, top, condition)
            else:  # patterns of paths are compared here, where Milvus has found a part of them
                try:
                    fitting = list(self.windows(joined(condition, part_of_path(where.path)), ["path"]))
                except self.failure:  # servers before Milvus 2.4 cannot find a text within a path
                    fitting = list(self.windows(condition, ["path"]))
                ids = [entity["id"] for entity in fitting if where.fits_path(entity["path"])]
                for start in range(0, len(ids), WINDOW):
                    found += self.lowest(queries, top, f"id in {ids[start : start + WINDOW]}")
        table = np.array(found, [("id", np.int64), ("similarity", np.float64)])
        return best(self.name, table["id"], table["similarity"], top)

    def lowest(self, queries: np.ndarray, top: int, condition: str) -> list[tuple[int, float]]:
        """As Store.search. More entries are asked for until no other can belong to the result.

        An entry that no query has found is at most as similar as the last one that a query has found.
        """
        limit = min(top + SPARE, MOST)
        while True:
            answers = self.client.search(
                self.entries, queries.astype(np.float32).tolist(), limit=limit, filter=condition, anns_field="vector"
            )
            scores = [{hit["id"]: hit["distance"] for hit in answer} for answer in answers]
            if len(scores) > 1:
                ids = sorted(set().union(*scores))
                similarities = (self.vectors(ids) @ queries.T).min(1).tolist() if ids else []
                found = dict(zip(ids, similarities, strict=True))
            else:
                found = scores[0]
            ranked = sorted(found.values(), reverse=True)
            complete = any(len(score) < limit for score in scores)
            floor = min((min(score.values(), default=0.0) for score in scores), default=0.0)
            if complete or (len(ranked) >= top and ranked[top - 1] > floor):
                return list(found.items())
            if limit == MOST:
                if len(scores) == 1:  # more equal images than Milvus returns
                    return list(found.items())
                raise SearchError(
                    f"{self.name}: Milvus returns at most {MOST:,} images for each sentence, too few to rank by the "
                    "lowest similarity; narrow the search with filters, or leave --all out"
                )
            limit = min(4 * limit, MOST)

    def close(self) -> None:
        self.client.close()


def located(index: str) -> tuple[str, str, Path]:
    """The address of the server or file, the name of the collection, and where files beside the index are kept."""
    if not is_server(index):
        return str(Path(index).absolute()), "people", Path(index)
    parts = urlsplit(index)
    name = parts.path.strip("/") or "people"
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,200}", name):
        raise SearchError(f"{index}: {name!r} is not a name of a collection; expected letters, digits and _")
    if parts.username or parts.query or parts.fragment or not parts.hostname:
        raise SearchError(f"{index}: expected http://HOST:PORT/NAME; a password belongs into the environment, {TOKEN}")
    try:
        port = parts.port or 19530
    except ValueError:
        raise SearchError(f"{index}: the port is not a number from 0 to 65535") from None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    kept = re.sub(r"[^\w.-]", "_", f"{parts.hostname}-{port}-{name}")
    return f"{parts.scheme}://{host}:{port}", name, Path(kept)


def joined(*conditions: str) -> str:
    """The condition that all of these hold; those that are empty do."""
    return " and ".join(filter(None, conditions))


def part_of_path(pattern: str) -> str:
    """A condition that all paths fulfil that the pattern fits: they contain its longest text of harmless characters."""
    without_sets = re.sub(r"\[.*\]", "*", normalize("NFC", pattern), flags=re.DOTALL)
    text = max(re.findall("[A-Za-z0-9/. -]+", without_sets), key=len, default="")
    return f'path like "%{text}%"' if text else ""


def expression(where: Filter) -> str:
    """A condition of Milvus on camera and time."""
    conditions = []
    if where.cameras:
        conditions.append("camera in [" + ", ".join(f'"{camera.encode().hex()}"' for camera in where.cameras) + "]")
    if where.since is not None or where.until is not None:
        since = NO_TIME + 1 if where.since is None else microseconds(where.since)
        conditions.append(f"time >= {since}")
    if where.until is not None:
        conditions.append(f"time <= {microseconds(where.until)}")
    return joined(*conditions)
