"""Both engines of the store do the same: exact search, filters, changes, and one line for what is damaged."""

import errno
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from unicodedata import normalize

import numpy as np
import pytest

from upperson.errors import IndexMissing, SearchError
from upperson.search.entry import Entry
from upperson.search.store import FORMAT, Filter, Row, open_store
from upperson.search.store import sqlite as sqlite_engine

WIDTH = 8
SETTINGS = {
    "format": FORMAT,
    "dimensions": WIDTH,
    "dtype": "float32",
    "checkpoint": "/runs/best.safetensors",
    "identity": {"checkpoint": "0123"},
}
ONES = np.full((1, WIDTH), WIDTH**-0.5, np.float32)
START = datetime(2026, 1, 1, 12)
# A camera and a path that end a text in an expression, if they are not guarded.
ODD = '3" or id >= 0 or camera == "'


@pytest.fixture
def store(index):
    opened = open_store(index, SETTINGS)
    yield opened
    opened.close()


def rows_and_vectors(count, seed=0):
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((count, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [
        Row(
            f"/photos/{'entrance' if number % 2 else 'hall'}/{number}.jpg",
            [None, "1", "3", ODD][number % 4],
            None if number % 5 == 0 else START + timedelta(hours=number),
            seconds=number / 8 if number % 3 else None,
            box=(1, 2, 3, number + 1) if number % 7 == 0 else None,
            size=number,
            mtime=10**18 + number,
            digest=f"{number:032x}",
            parts=1,
        )
        for number in range(count)
    ]
    return rows, vectors


def expected(ids, rows, vectors, queries, top, where):
    """The definition, one entry after the other."""
    found = []
    for id, row, vector in zip(ids, rows, vectors, strict=True):
        fits = not where.cameras or row.camera in where.cameras
        fits &= where.since is None or (row.time is not None and row.time >= where.since)
        fits &= where.until is None or (row.time is not None and row.time <= where.until)
        if fits and where.fits_path(row.path):
            found.append((-min(float(vector @ query) for query in queries), id))
    return [(id, -negative) for negative, id in sorted(found)[:top]]


FILTERS = [
    Filter(),
    Filter(cameras=("3",)),
    Filter(cameras=("1", ODD)),
    Filter(cameras=('"', "4")),
    Filter(since=START + timedelta(hours=9)),
    Filter(until=START + timedelta(hours=9)),
    Filter(("3",), START + timedelta(hours=2), START + timedelta(hours=30), "hall/*.jpg"),
    Filter(path="*/entrance/1?.jpg"),
    Filter(path='%" or 1 == 1'),
    *(
        Filter(path=pattern)
        for pattern in ("*", "", "hall/1[0-4]*", "*[!a]ll/*", "[]h]all/[[]*", "[h-all/*", "*é*", "%a_l%")
    ),
    Filter(("1",), path="*ance/*1.jpg"),
    Filter(since=datetime(2030, 1, 1)),
]


def test_search_is_exact(store):
    rows, vectors = rows_and_vectors(60)
    ids = store.add(rows[:35], vectors[:35]) + store.add(rows[35:], vectors[35:])
    queries = rows_and_vectors(3, seed=1)[1]
    assert ids == sorted(ids) and len(store) == 60
    for where in FILTERS:
        for some in (queries[:1], queries):
            for top in (1, 7, 100):
                found = store.search(some, top, where)
                wanted = expected(ids, rows, vectors, some, top, where)
                assert [id for id, _ in found] == [id for id, _ in wanted], (where, len(some), top)
                np.testing.assert_allclose([s for _, s in found], [s for _, s in wanted], atol=1e-6)


def test_entries_are_read_in_several_windows(store, monkeypatch):
    monkeypatch.setattr("upperson.search.store.milvus.LONG_WINDOW", 7)
    rows, vectors = rows_and_vectors(40)
    ids = store.add(rows, vectors)
    assert list(store.all_rows()) == list(zip(ids, rows, strict=True))
    assert store.cameras() == sorted({row.camera for row in rows if row.camera})
    for where in FILTERS:
        found = [id for id, _ in store.search(vectors[:1], 50, where)]
        assert found == [id for id, _ in expected(ids, rows, vectors, vectors[:1], 50, where)], where


def test_a_server_that_finds_no_text_within_a_path(tmp_path, monkeypatch):
    """As one before Milvus 2.4, which knows the beginning of a text only."""
    pymilvus = pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
    pytest.importorskip("milvus_lite", reason="the extra milvus is not installed")
    store = open_store(str(tmp_path / "people.milvus.db"), SETTINGS)
    rows, vectors = rows_and_vectors(40)
    ids = store.add(rows, vectors)
    query, refused = store.client.query, []

    def older(collection, filter, **options):
        if "like" in filter:
            refused.append(filter)
            raise pymilvus.MilvusException(65535, "unsupported pattern, only prefix pattern match is supported")
        return query(collection, filter=filter, **options)

    monkeypatch.setattr(store.client, "query", older)
    for where in (Filter(("3",), path="hall/*.jpg"), Filter(path="*/entrance/1?.jpg"), Filter(path="*1*")):
        found = [id for id, _ in store.search(vectors[:1], 50, where)]
        assert found == [id for id, _ in expected(ids, rows, vectors, vectors[:1], 50, where)] and found
    assert len(refused) == 3
    store.close()


def test_equal_images_come_in_the_order_of_their_ids(store):
    rows, vectors = rows_and_vectors(40)
    vectors[5:] = vectors[5]
    ids = store.add(rows, vectors)
    for top in (1, 3, 35):
        for queries in (vectors[5:6], vectors[5:7]):
            assert [id for id, _ in store.search(queries, top, Filter())] == ids[5 : 5 + top]


def test_changes_last(index, store):
    rows, vectors = rows_and_vectors(20)
    ids = store.add(rows, vectors)
    store.remove([ids[3], ids[4], 10**6])
    new = store.add(rows[3:4], vectors[4:5], replaced=[ids[0]])
    moved = replace(rows[1], path="/photos/elsewhere/é'\".jpg", camera="9", time=None)
    store.update({ids[1]: moved})
    assert min(new) > max(ids)
    store.close()
    again = open_store(index)
    kept = {ids[1]: moved, **dict(zip(ids[5:], rows[5:], strict=True)), ids[2]: rows[2], new[0]: rows[3]}
    assert dict(again.all_rows()) == kept and len(again) == len(kept) == 18
    assert [id for id, _ in again.all_rows()] == sorted(kept)
    assert again.settings == SETTINGS
    assert again.rows([ids[2], ids[3]]) == {ids[2]: rows[2]}
    np.testing.assert_array_equal(again.vectors([new[0], ids[1], ids[2]]), vectors[[4, 1, 2]])
    assert again.search(vectors[1:2], 1, Filter())[0][0] == ids[1]
    assert again.search(vectors[1:2], 5, Filter(cameras=("9",)))[0][0] == ids[1]
    again.remove(again.add(rows[:1], vectors[:1]))
    assert min(again.add(rows[:1], vectors[:1])) > new[0] + 1  # no id is given twice
    with pytest.raises(SearchError, match=f"no image has the id {ids[3]}"):
        again.vectors([ids[1], ids[3]])
    again.close()


def test_cameras_and_times(store):
    assert store.cameras() == [] and store.times() is None and store.search(ONES, 3, Filter()) == []
    rows, vectors = rows_and_vectors(12)
    ids = store.add(rows, vectors)
    assert store.cameras() == sorted(["1", "3", ODD])
    assert store.times() == (START + timedelta(hours=1), START + timedelta(hours=11))
    assert rows[7].entry(ids[7]) == Entry(ids[7], "/photos/entrance/7.jpg", ODD, rows[7].time, 0.875, (1, 2, 3, 8))


def test_some_are_spread_over_the_index(store):
    assert store.some(5) == []
    ids = store.add(*rows_and_vectors(10))
    assert store.some(2) == [ids[0], ids[5]] and store.some(50) == ids
    store.remove(ids[:5])
    assert store.some(50) == ids[5:] and set(store.some(2)) <= set(ids[5:])


def test_an_index_that_is_missing(index):
    with pytest.raises(IndexMissing, match="no index; make one with upperson search index"):
        open_store(index)
    assert not os.path.exists(index)


# ---------------------------------------------------------------------------------------- SQLite


@pytest.fixture
def filled(tmp_path):
    """An index of 50 images in SQLite, its path."""
    store = open_store(str(tmp_path / "people.db"), SETTINGS)
    store.add(*rows_and_vectors(50))
    store.close()
    return tmp_path / "people.db"


def vectors_of(path):
    return path.with_name("people.db.1.vectors")


def garbage(path):
    path.write_bytes(b"not a database, but long enough for a header of SQLite" * 30)


def cut(path):
    path.write_bytes(path.read_bytes()[:-4096])


def empty(path):
    path.write_bytes(b"")


def other_format(path):
    with sqlite3.connect(path) as connection:
        text = connection.execute("SELECT value FROM settings WHERE name = 'settings'").fetchone()[0]
        connection.execute(
            "UPDATE settings SET value = ? WHERE name = 'settings'", (text.replace('"format": 1', '"format": 7'),)
        )


def other_database(path):
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE photos (name TEXT)")


def statement(text):
    def damage(path):
        with sqlite3.connect(path) as connection:
            connection.execute(text)

    return damage


def folder(path):
    path.unlink()
    path.mkdir()


def fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (garbage, "not an index: it is not a SQLite file"),
        (cut, "the index is damaged"),
        (empty, "no index"),
        (other_format, "an index of format 7; this version reads format 1"),
        (other_database, "not an index of upperson search"),
        (statement("DELETE FROM settings WHERE name = 'used'"), "the setting used is missing"),
        (statement("UPDATE settings SET value = -1 WHERE name = 'used'"), "the setting used is -1"),
        (statement("UPDATE settings SET value = 10000 WHERE name = 'used'"), "vectors: 1,632 bytes, but .* needs"),
        (statement("UPDATE settings SET value = '{}' WHERE name = 'settings'"), "its settings cannot be read"),
        (statement("DROP TABLE settings"), "the index is damaged"),
        (folder, "expected a regular file, found a folder"),
        (fifo, "expected a regular file, found a FIFO"),
        (lambda path: vectors_of(path).unlink(), "the vectors of .* are missing"),
        (lambda path: cut_to(vectors_of(path), 1000), "vectors: 1,000 bytes, but .* needs 1,632"),
        (lambda path: cut_to(vectors_of(path), 5), "not the vectors of"),
        (lambda path: vectors_of(path).write_bytes(b"x" * 1632), "not the vectors of"),
    ],
)
def test_an_index_that_cannot_be_read(filled, damage, message):
    damage(filled)
    with pytest.raises((SearchError, OSError), match=message) as raised:
        open_store(str(filled))
    assert "\n" not in str(raised.value)


def cut_to(path, length):
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    "text",
    [
        "UPDATE entries SET rest = '{}' WHERE id = 7",
        "UPDATE entries SET rest = 'x' WHERE id = 7",
        'UPDATE entries SET rest = replace(rest, \'"parts": 1\', \'"parts": "1"\') WHERE id = 7',
        "UPDATE entries SET time = 'noon' WHERE id = 7",
        "UPDATE entries SET time = 9223372036854775807 WHERE id = 7",
    ],
)
def test_a_damaged_row(filled, text):
    statement(text)(filled)
    store = open_store(str(filled))
    with pytest.raises(SearchError, match="the index is damaged: the entry of '/photos/hall/6.jpg'"):
        store.rows([7])
    store.close()


@pytest.mark.parametrize("position", ["1000", "-1", "'x'"])
def test_a_damaged_position(filled, position):
    statement(f"UPDATE entries SET position = {position} WHERE id = 7")(filled)
    store = open_store(str(filled))
    with pytest.raises(SearchError, match="the index is damaged: a"):
        store.search(ONES, 1, Filter())
    store.close()


def test_half_precision(tmp_path):
    store = open_store(str(tmp_path / "people.db"), SETTINGS | {"dtype": "float16"})
    rows, vectors = rows_and_vectors(30)
    ids = store.add(rows, vectors)
    assert vectors_of(tmp_path / "people.db").stat().st_size == 32 + 30 * WIDTH * 2
    assert store.vectors(ids).dtype == np.float32
    np.testing.assert_array_equal(store.vectors(ids), vectors.astype(np.float16))
    assert store.search(vectors[4:5], 1, Filter())[0][0] == ids[4]
    store.close()


def test_what_is_removed_is_erased(filled):
    store = open_store(str(filled))
    ids = [id for id, _ in store.all_rows()]
    secret = store.vectors(ids[9:10]).tobytes()
    path = store.rows(ids[9:10])[ids[9]].path.encode()
    assert secret in vectors_of(filled).read_bytes() and path in filled.read_bytes()
    store.remove(ids[9:10])
    store.close()
    assert secret not in vectors_of(filled).read_bytes() and path not in filled.read_bytes()


def test_erasing_goes_on_after_a_kill(filled, monkeypatch):
    store = open_store(str(filled))
    ids = [id for id, _ in store.all_rows()]
    secrets = [store.vectors([id]).tobytes() for id in ids[:2]]
    monkeypatch.setattr(store, "erase", lambda: None)  # as if the process ended here
    store.remove(ids[:1])
    store.close()
    assert secrets[0] in vectors_of(filled).read_bytes()
    again = open_store(str(filled))
    again.remove(ids[1:2])
    again.close()
    assert not any(secret in vectors_of(filled).read_bytes() for secret in secrets)


def test_tidying_keeps_what_there_is(filled, monkeypatch):
    monkeypatch.setattr(sqlite_engine, "BLOCK", 4)
    store, reader = open_store(str(filled)), open_store(str(filled))
    before = reader.search(ONES, 50, Filter())
    ids = [id for id, _ in store.all_rows()]
    kept = ids[::4]
    vectors = store.vectors(kept)
    store.remove([id for id in ids if id not in kept])
    store.tidy()
    assert not vectors_of(filled).exists()
    assert filled.with_name("people.db.2.vectors").stat().st_size == 32 + len(kept) * WIDTH * 4
    for opened in (store, reader, open_store(str(filled))):
        np.testing.assert_array_equal(opened.vectors(kept), vectors)
        found = opened.search(ONES, 50, Filter())
        assert [id for id, _ in found] == [id for id, _ in before if id in kept]
        opened.close()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("people.db", "people.db.old"),
        ("people.db", "people.db.2"),
        ("people.db", "people.db.2026-01-31"),
        ("people[1].db", "people1.db"),
        ("people*.db", "people-2.db"),
        ("p?.db", "p1.db"),
        ("people.db", "peopleXdb"),
    ],
)
def test_tidying_leaves_the_vectors_of_other_indexes(tmp_path, name, other):
    rows, vectors = rows_and_vectors(3)
    for each in (other, name):
        store = open_store(str(tmp_path / each), SETTINGS)
        ids = store.add(rows, vectors)
        store.tidy()
        store.close()
    leftover = tmp_path / f"{name}.7.vectors"
    leftover.write_bytes(b"of a process that was killed")
    store = open_store(str(tmp_path / name))
    store.tidy()
    store.close()
    assert not leftover.exists()
    for each in (other, name):
        store = open_store(str(tmp_path / each))
        np.testing.assert_array_equal(store.vectors(ids), vectors)
        store.close()


def test_a_reader_sees_what_another_process_adds(filled):
    reader, writer = open_store(str(filled)), open_store(str(filled))
    rows, vectors = rows_and_vectors(3, seed=5)
    assert len(reader.search(vectors[:1], 100, Filter())) == 50
    ids = writer.add(rows, vectors)
    assert reader.search(vectors[:1], 1, Filter())[0][0] == ids[0] and len(reader) == 53
    reader.close(), writer.close()


def test_a_full_disk_keeps_what_was_there(filled):
    """SQLite's own limit of pages, and the system's limit of the size of a file."""
    store = open_store(str(filled))
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(SearchError, match="the disk is full or fails .* what was indexed before is kept"):
        for _ in range(20):
            store.add(*rows_and_vectors(50))
    count = len(store)
    store.close()
    program = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from test_stores import *
store = open_store({str(filled)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({vectors_of(filled).stat().st_size},) * 2)
try:
    for _ in range(200): store.add(*rows_and_vectors(50))
except SearchError as error:
    print(error, end="")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "what was indexed before is kept" in run.stdout and run.stdout.count("\n") == 0, run.stdout
    again = open_store(str(filled))
    assert len(again) >= count
    assert len(again.search(ONES, 10**4, Filter())) == len(again)
    again.close()


def test_a_full_disk_of_vectors(filled, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = open_store(str(filled))
    with monkeypatch.context() as patch, pytest.raises(SearchError, match="No space left.*indexed before is kept"):
        patch.setattr(os, "fsync", full)
        store.add(*rows_and_vectors(50))
    assert len(store) == 50
    store.add(*rows_and_vectors(1))
    assert len(store.search(ONES, 100, Filter())) == len(store) == 51
    store.close()


# ---------------------------------------------------------------------------------------- Milvus


def test_a_server_out_of_reach():
    pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
    began = time.monotonic()
    with pytest.raises(SearchError, match="is it there, and its password in MILVUS_TOKEN") as raised:
        open_store("http://127.0.0.1:9")
    assert time.monotonic() - began < 60 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("http://host:19530/a-b", "'a-b' is not a name of a collection"),
        ("http://me:secret@host", "a password belongs into the environment"),
        ("http://host:99999999/x", "the port is not a number"),
        ("http:///x", "expected http://HOST:PORT/NAME"),
    ],
)
def test_an_address_that_is_wrong(index, message):
    pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
    with pytest.raises(SearchError, match=message):
        open_store(index)


@pytest.mark.parametrize("content", [b"", b"not a folder of Milvus"])
def test_a_file_that_is_not_milvus(tmp_path, content):
    pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
    pytest.importorskip("milvus_lite", reason="the extra milvus is not installed")
    path = tmp_path / "people.milvus.db"
    path.write_bytes(content)
    with pytest.raises(SearchError) as raised:
        open_store(str(path))
    assert "\n" not in str(raised.value)


def test_an_index_that_a_killed_process_has_begun(tmp_path):
    pymilvus = pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
    pytest.importorskip("milvus_lite", reason="the extra milvus is not installed")
    index = str(tmp_path / "people.milvus.db")
    client = pymilvus.MilvusClient(index)
    client.create_collection("people", dimension=2 * WIDTH)
    client.close()
    with pytest.raises(IndexMissing, match="no index; make one"):
        open_store(index)
    store = open_store(index, SETTINGS)
    rows, vectors = rows_and_vectors(5)
    ids = store.add(rows, vectors)
    assert store.search(vectors[2:3], 1, Filter())[0][0] == ids[2]
    store.close()


@pytest.mark.slow
def test_a_second_process_is_told_that_milvus_lite_takes_one(tmp_path):
    pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
    pytest.importorskip("milvus_lite", reason="the extra milvus is not installed")
    index = str(tmp_path / "people.milvus.db")
    opened = open_store(index, SETTINGS)
    try:
        command = f"from upperson.search.store import open_store; open_store({index!r})"
        second = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    finally:
        opened.close()
    assert "people.milvus.db: Milvus Lite cannot open the index; another process may have it open" in second.stderr


def test_without_pymilvus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(SearchError, match=r"needs pymilvus; install it with pip install 'upperson\[milvus\]'"):
        open_store("people.milvus.db", SETTINGS)


def test_an_accent_fits_in_both_forms(store):
    """Some file systems write a letter and its accent as two characters."""
    names = ["café/Grüße 1.jpg", "café/Åé.jpg", "Café/Gruße.jpg", "cafe/1.jpg"]
    rows, vectors = rows_and_vectors(2 * len(names))
    paths = [f"/photos/{normalize(form, name)}" for name in names for form in ("NFC", "NFD")]
    ids = store.add([replace(row, path=path) for row, path in zip(rows, paths, strict=True)], vectors)
    for pattern, fitting in (("café/*", ids[:4]), ("*Grüße*.jpg", ids[:2]), ("Å?.jpg", ids[2:4]), ("cafe/*", ids[6:])):
        for form in ("NFC", "NFD"):
            found = store.search(vectors[:1], 10, Filter(path=normalize(form, pattern)))
            assert sorted(id for id, _ in found) == fitting
