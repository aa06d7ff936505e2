"""The index of a folder: what is new, changed, moved, copied, gone, broken, cut into boxes or into frames."""

import errno
import io
import multiprocessing
import os
import random
import shutil
import socket
import sqlite3
import struct
import sys
import time
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_run, write_image

from upperson.data import images
from upperson.data.images import load_pixels
from upperson.errors import CheckpointError, DataError, SearchError
from upperson.search import Gallery, Query, indexing, thumbnails
from upperson.search.boxes import read_boxes
from upperson.search.gallery import forget
from upperson.search.indexing import Indexing
from upperson.search.media import frames
from upperson.search.store import open_store
from upperson.search.thumbnails import Thumbnails


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path):
    """Six images in two folders."""
    for number in range(6):
        write_image(tmp_path / "photos" / f"cam{number % 2}" / f"{number}.png", number)
    return tmp_path / "photos"


@pytest.fixture
def gallery(tmp_path, checkpoint):
    with Gallery.open(tmp_path / "people.db", checkpoint) as opened:
        yield opened


@pytest.fixture
def embedded(monkeypatch):
    """The numbers of images that were embedded, a number for each batch."""
    counts, real = [], Indexing.flush

    def flush(indexing):
        counts.append(len(indexing.pending))
        real(indexing)

    monkeypatch.setattr(Indexing, "flush", flush)
    return counts


def counts_of(report):
    return {name: value for name, value in vars(report).items() if value and name != "problems"}


def rows(gallery):
    return {row.path: (id, row) for id, row in gallery.store.all_rows()}


def features(gallery, image):
    return gallery.searcher.encode_images([image])[0]


def test_a_folder(gallery, photos):
    (photos / "notes.txt").write_text("no image")
    write_image(photos / ".hidden" / "0.png")
    report = gallery.add([photos])
    assert counts_of(report) == {"added": 6} and not report.problems and str(report) == "6 added"
    found = rows(gallery)
    assert sorted(found) == sorted(map(str, photos.glob("cam?/*.png"))) and len(gallery) == 6
    for path, (id, row) in found.items():
        assert row.camera == Path(path).parent.name[-1] and row.box is None and row.parts == 1
        np.testing.assert_allclose(gallery.store.vectors([id])[0], features(gallery, Image.open(path)), atol=1e-5)
    assert gallery.cameras() == ["0", "1"] and gallery.times() is None


def test_again_only_what_changed(gallery, photos, embedded):
    gallery.add([photos])
    before = rows(gallery)
    assert counts_of(gallery.add([photos])) == {"unchanged": 6}
    os.utime(photos / "cam0" / "0.png", ns=(1, 1))  # another time, the same content
    write_image(photos / "cam0" / "2.png", 99)
    write_image(photos / "cam0" / "new.png", 100)
    embedded.clear()
    assert counts_of(gallery.add([photos])) == {"unchanged": 5, "changed": 1, "added": 1}
    assert sum(embedded) == 2
    after = rows(gallery)
    assert len(gallery) == 7
    for path, (id, row) in before.items():
        name = Path(path).name
        assert (after[path][0] == id) == (name != "2.png")
        assert (after[path][1] == row) == (name not in ("0.png", "2.png"))
    np.testing.assert_allclose(
        gallery.store.vectors([after[str(photos / "cam0" / "2.png")][0]])[0],
        features(gallery, Image.open(photos / "cam0" / "2.png")), atol=1e-5,
    )  # fmt: skip
    with pytest.raises(SearchError, match="no image has the id"):
        gallery.thumbnail(before[str(photos / "cam0" / "2.png")][0])
    assert counts_of(gallery.add([photos])) == {"unchanged": 7}


def test_moved_and_copied(gallery, photos, embedded):
    gallery.add([photos])
    before = rows(gallery)
    (photos / "cam7").mkdir()
    (photos / "cam0" / "0.png").rename(photos / "cam7" / "zero.png")
    shutil.copy(photos / "cam1" / "1.png", photos / "cam7" / "one.png")
    shutil.copy(photos / "cam1" / "3.png", photos / "cam1" / "5.png")  # over another image
    embedded.clear()
    assert counts_of(gallery.add([photos])) == {"moved": 1, "added": 1, "changed": 1, "unchanged": 4}
    assert sum(embedded) == 0
    after = rows(gallery)
    moved, copy = after[str(photos / "cam7" / "zero.png")], after[str(photos / "cam7" / "one.png")]
    assert moved[0] == before[str(photos / "cam0" / "0.png")][0] and moved[1].camera == "7"
    assert copy[0] > max(id for id, _ in before.values())
    np.testing.assert_array_equal(*gallery.store.vectors([copy[0], before[str(photos / "cam1" / "1.png")][0]]))
    np.testing.assert_array_equal(
        *gallery.store.vectors([after[str(photos / "cam1" / name)][0] for name in ("3.png", "5.png")])
    )
    assert len(gallery) == 7 and str(photos / "cam0" / "0.png") not in after
    for id, _ in after.values():
        assert gallery.thumbnail(id).startswith(b"\xff\xd8")
    assert counts_of(gallery.add([photos])) == {"unchanged": 7}


def test_two_files_that_swap_their_names(gallery, photos):
    gallery.add([photos])
    one, two, aside = photos / "cam0" / "0.png", photos / "cam0" / "2.png", photos / "aside"
    one.rename(aside), two.rename(one), aside.rename(two)
    gallery.add([photos])
    for path in (one, two):
        id = rows(gallery)[str(path)][0]
        np.testing.assert_allclose(gallery.store.vectors([id])[0], features(gallery, Image.open(path)), atol=1e-5)
    assert len(gallery) == 6 and counts_of(gallery.add([photos])) == {"unchanged": 6}


def test_copies_in_one_folder_are_embedded_once(gallery, photos, embedded):
    for number in range(5):
        shutil.copy(photos / "cam0" / "0.png", photos / f"copy{number}.png")
    assert counts_of(gallery.add([photos])) == {"added": 11}
    assert sum(embedded) == 6 and len(gallery) == 11


@pytest.mark.parametrize("touched", ["0.png", "copy.png", "other.png"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_copy_with_a_new_time_keeps_its_id(gallery, photos, embedded, touched, lost):
    for name in ("copy.png", "other.png"):
        shutil.copy2(photos / "cam0" / "0.png", photos / "cam0" / name)
    gallery.add([photos])
    before, _ = rows(gallery), embedded.clear()
    if lost:  # as before, what is gone stays in the index without prune
        (photos / "cam0" / ("other.png" if touched == "0.png" else "0.png")).unlink()
    os.utime(photos / "cam0" / touched, (1, 1))
    assert counts_of(gallery.add([photos])) == {"unchanged": 8 - lost} and sum(embedded) == 0
    found = rows(gallery)
    assert {path: id for path, (id, _) in found.items()} == {path: id for path, (id, _) in before.items()}
    assert found[str(photos / "cam0" / touched)][1].mtime == 10**9


def test_prune_removes_what_is_gone_below_the_given_folders(gallery, photos):
    gallery.add([photos])
    (photos / "cam0" / "0.png").unlink()
    (photos / "cam1" / "1.png").unlink()
    assert counts_of(gallery.add([photos])) == {"unchanged": 4} and len(gallery) == 6
    assert counts_of(gallery.add([photos / "cam0"], prune=True)) == {"unchanged": 2, "removed": 1}
    assert len(gallery) == 5
    shutil.rmtree(photos / "cam1")
    (photos / "cam1").mkdir()  # as a disk that is not mounted
    with pytest.raises(SearchError, match="no image or video is in this folder"):
        gallery.add([photos / "cam1"], prune=True)
    assert len(gallery) == 5


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENOTCONN])
def test_files_that_cannot_be_reached_are_not_gone(gallery, photos, monkeypatch, code):
    gallery.add([photos])
    (photos / "cam0").rename(photos / ".elsewhere")
    shutil.copytree(photos / ".elsewhere", photos / "copies")  # the contents of before are not moved, but copied
    real = os.lstat

    def lstat(path, **options):
        if f"{os.sep}cam0{os.sep}" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "lstat", lstat)
    assert counts_of(gallery.add([photos], prune=True)) == {"unchanged": 3, "added": 3} and len(gallery) == 9
    monkeypatch.undo()
    assert counts_of(gallery.add([photos], prune=True)) == {"unchanged": 6, "removed": 3} and len(gallery) == 6


def test_a_file_in_the_place_of_a_folder_hides_what_is_gone(gallery, photos):
    gallery.add([photos])
    shutil.rmtree(photos / "cam0")
    (photos / "cam0").write_text("no folder any more")
    assert counts_of(gallery.add([photos], prune=True)) == {"unchanged": 3, "removed": 3}


def test_broken_files_are_named_and_counted(gallery, photos):
    broken = {
        "text.jpg": b"no image",
        "cut.png": (photos / "cam0" / "0.png").read_bytes()[:500],
        "empty.webp": b"",
    }
    for name, content in broken.items():
        (photos / name).write_bytes(content)
    os.mkfifo(photos / "pipe.jpg")
    report = gallery.add([photos])
    assert counts_of(report) == {"added": 6} and len(report.problems) == 4 and not report.all_failed
    assert all(any(name in problem for problem in report.problems) for name in [*broken, "pipe.jpg"])
    assert "4 could not be indexed: " in str(report)
    assert gallery.add([photos / "text.jpg"]).all_failed
    gallery.forget([photos])
    only = photos / "only"
    only.mkdir()
    (only / "bad.jpg").write_bytes(b"x")
    assert gallery.add([only]).all_failed


@pytest.mark.parametrize("installed", [True, False])
def test_images_of_telephones(gallery, photos, monkeypatch, installed):
    """HEIF is indexed with pillow-heif; without it, each image is named, and nothing is left out in silence."""
    pytest.importorskip("pillow_heif", reason="the extra heif is not installed")
    assert "HEIF" in images.readable_formats()
    taken = Image.Exif()
    taken.get_ifd(0x8769)[0x9003] = "2026:03:04 05:06:07"  # DateTimeOriginal
    for name in ("IMG_1.HEIC", "IMG_2.heif"):
        Image.open(photos / "cam0" / "0.png").convert("RGB").save(photos / name, "HEIF", exif=taken, quality=len(name))
    if not installed:
        monkeypatch.setattr(images, "readable_formats", lambda: ["PNG"])
    report = gallery.add([photos])
    assert counts_of(report) == {"added": 8 if installed else 6}
    assert len(report.problems) == (0 if installed else 2)
    for name, problem in zip(("IMG_1.HEIC", "IMG_2.heif"), report.problems, strict=False):
        assert f"{name}: HEIF images need pillow-heif; pip install 'upperson[heif]'" in problem
    times = [row.time for _, row in gallery.store.all_rows() if "IMG_1" in row.path]
    assert times == [datetime(2026, 3, 4, 5, 6, 7)] * installed


def test_an_image_that_breaks_keeps_its_entry(gallery, photos):
    gallery.add([photos])
    (photos / "cam0" / "0.png").write_bytes(b"half a copy")
    report = gallery.add([photos])
    assert len(report.problems) == 1 and len(gallery) == 6


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="the file system keeps names in Unicode")
def test_a_name_that_is_not_unicode(gallery, photos):
    shutil.copy(photos / "cam0" / "0.png", os.fsencode(photos) + b"/\xff.png")
    report = gallery.add([photos])
    assert counts_of(report) == {"added": 6} and "the name is not UTF-8" in report.problems[0]


def test_paths(gallery, photos, monkeypatch):
    monkeypatch.chdir(photos / "cam0")
    assert counts_of(gallery.add(["../cam1", "0.png"])) == {"added": 4}
    assert sorted(rows(gallery)) == sorted(map(str, [*photos.glob("cam1/*.png"), photos / "cam0" / "0.png"]))
    os.symlink(photos / "cam1", photos / "cam0" / "link")
    assert counts_of(gallery.add(["link/../cam1/1.png"])) == {"unchanged": 1}  # the folder above the link's target
    for wrong in ("no-such-folder", "../no/../such", "0.png/x"):
        with pytest.raises(SearchError, match="does not exist"):
            gallery.add([wrong])
    for wrong in ("", " ", "\t"):
        with pytest.raises(SearchError, match="expected a path, found the text"):
            gallery.add([wrong])
    for wrong in ("x" * 5000, "a\0b", "~no-such-user/x"):
        with pytest.raises(SearchError, match="cannot be a path|does not exist") as raised:
            gallery.add([wrong])
        assert "\n" not in str(raised.value)
    (photos / "nothing").mkdir()
    with pytest.raises(SearchError, match="nothing: no image or video is in this folder"):
        gallery.add([photos / "cam1", photos / "nothing"])


def test_an_index_among_the_images(checkpoint, photos):
    """The thumbnails are not indexed."""
    with Gallery.open(photos / "people.db", checkpoint) as gallery:
        gallery.add([photos])
        assert len(list(photos.rglob("*.jpg"))) == 6
        assert counts_of(gallery.add([photos])) == {"unchanged": 6}


def test_options_out_of_range(gallery, photos):
    for options, message in [
        (dict(every=0), "every: 0; expected seconds above 0"),
        (dict(every=float("nan")), "every: nan"),
        (dict(batch_size=0), "batch size: 0; expected 1 to"),
        (dict(workers=-1), "workers: -1; expected 0 to 256"),
        (dict(pattern="("), "pattern: not a regular expression"),
        (dict(pattern="c([0-9])"), r"pattern: expected the groups \(\?P<camera>…\)"),
        (dict(pattern="(?P<lens>.)"), "found lens"),
    ]:
        with pytest.raises(SearchError, match=message):
            gallery.add([photos], **options)
    assert len(gallery) == 0


def test_loader_processes_find_the_same(gallery, photos, tmp_path, checkpoint):
    (photos / "bad.jpg").write_bytes(b"x")
    assert str(gallery.add([photos], workers=0)).startswith("6 added; 1 could")
    with Gallery.open(tmp_path / "other.db", checkpoint) as other:
        assert str(other.add([photos], workers=2)).startswith("6 added; 1 could")
        assert [row for _, row in other.store.all_rows()] == [row for _, row in gallery.store.all_rows()]
        ids = list(range(1, 7))
        np.testing.assert_array_equal(other.store.vectors(ids), gallery.store.vectors(ids))


def test_a_pattern_names_camera_and_time(gallery, photos):
    gallery.add([photos])
    pattern = r"(?P<camera>cam\d)/(?P<time>\d)"
    report = gallery.add([photos], pattern=pattern)
    assert len(report.problems) == 6 and "the pattern found the time '" in report.problems[0]
    assert gallery.cameras() == ["0", "1"]
    gallery.add([photos], pattern=r"(?P<camera>cam\d)/")
    assert gallery.cameras() == ["cam0", "cam1"]


# ---------------------------------------------------------------------------------------- thumbnails, forgetting


def test_thumbnails(gallery, photos):
    write_image(photos / "large.jpg", size=(500, 900))
    gallery.add([photos])
    id, _ = rows(gallery)[str(photos / "large.jpg")]
    content = gallery.thumbnail(id)
    assert image_of(content).size == (213, 384) and image_of(content).format == "JPEG"
    shutil.rmtree(gallery.thumbnails.folder)
    assert gallery.thumbnail(id) == content  # made again
    gallery.thumbnails.path(id).write_bytes(b"")  # as after a power failure
    assert gallery.thumbnail(id) == content
    shutil.rmtree(gallery.thumbnails.folder)
    write_image(photos / "large.jpg", 5)
    with pytest.raises(SearchError, match="large.jpg: the file has gone or changed since it was indexed"):
        gallery.thumbnail(id)
    for unknown in (0, -1, 10**6, 2**70):
        with pytest.raises(SearchError, match="no image has the id"):
            gallery.thumbnail(unknown)


@pytest.mark.parametrize("kept", ["nothing", "an index that was empty", "an earlier copy of the index"])
def test_thumbnails_of_an_earlier_index_are_not_shown(tmp_path, photos, checkpoint, kept):
    """A copy of a file is given an id that the earlier index gave too."""
    index = tmp_path / "people.db"
    parts = [index, tmp_path / "people.db.1.vectors"]
    write_image(tmp_path / "new" / "0.png", 40)
    with Gallery.open(index, checkpoint) as gallery:
        if kept == "an earlier copy of the index":
            gallery.add([tmp_path / "new"])
        before = [part.read_bytes() for part in parts]
        gallery.add([photos])
        shown = {path.stem for path in gallery.thumbnails.folder.rglob("*.jpg")}
    for part, content in zip(parts, before, strict=True):
        part.unlink()
        if kept != "nothing":
            part.write_bytes(content)
    for name in ("1.png", "2.png"):
        shutil.copy(tmp_path / "new" / "0.png", tmp_path / "new" / name)
    with Gallery.open(index, checkpoint) as gallery:
        gallery.add([tmp_path / "new"])
        ids = [id for id, _ in rows(gallery).values()]
        assert len(ids) == 3 and {str(id) for id in ids} <= shown
        assert len({gallery.thumbnail(id) for id in ids}) == 1


def test_an_empty_index_has_no_thumbnails(tmp_path, photos, checkpoint, monkeypatch):
    """Of an index that was deleted, before the first image is stored; other files in their folder stay."""
    with Gallery.open(tmp_path / "people.db", checkpoint) as gallery:
        gallery.add([photos])
        folder = gallery.thumbnails.folder
    (folder / "notes.jpg").write_text("of the user")
    for name in ("people.db", "people.db.1.vectors"):
        (tmp_path / name).unlink()
    with Gallery.open(tmp_path / "people.db", checkpoint) as gallery:
        monkeypatch.setattr(Thumbnails, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            gallery.add([photos])
        assert len(gallery) == 6 and sorted(path.name for path in folder.rglob("*.jpg")) == ["notes.jpg"]


def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_thumbnails_that_cannot_be_kept_are_shown(gallery, photos, monkeypatch, code):
    gallery.add([photos])
    expected = {id: gallery.thumbnail(id) for id, _ in rows(gallery).values()}
    shutil.rmtree(gallery.thumbnails.folder)

    def full(path, *content, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(thumbnails, "write_atomically", full)
    assert {id: gallery.thumbnail(id) for id in expected} == expected
    shutil.rmtree(gallery.thumbnails.folder)
    gallery.thumbnails.folder.write_text("a file")
    assert {id: gallery.thumbnail(id) for id in expected} == expected


def image_of(content):
    return Image.open(io.BytesIO(content))


def test_forgetting(gallery, photos, tmp_path, capsys):
    gallery.add([photos])
    kept = {path: value for path, value in rows(gallery).items() if path.endswith(("1.png", "3.png"))}
    with pytest.raises(SearchError, match="no image of this path is in .*; nothing was removed"):
        gallery.forget([photos / "cam1", photos / "cam"])
    for wrong in ("~no-such-user/x", "a/../" + "x" * 5000, "../a\0b"):
        with pytest.raises(SearchError, match="cannot be a path|no image of this path"):
            gallery.forget([wrong])
    assert gallery.forget([photos / "cam0"]) == 3
    (photos / "cam1" / "5.png").unlink()
    assert forget(str(tmp_path / "people.db"), [photos / "cam0" / ".." / "cam1" / "5.png"]) == 1
    assert rows(gallery) == kept
    left = {int(path.stem) for path in gallery.thumbnails.folder.rglob("*.jpg")}
    assert left == {id for id, _ in kept.values()}


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_an_empty_path_forgets_nothing(gallery, photos, text):
    gallery.add([photos])
    for given in (text, [text], [photos / "cam0", text]):
        with pytest.raises(SearchError, match="expected a path, found the text '.*'; nothing was removed"):
            gallery.forget(given)
    assert len(gallery) == 6


@pytest.mark.parametrize("boxed", [False, True])
def test_a_search_during_the_forgetting_leaves_no_thumbnail(gallery, photos, tmp_path, checkpoint, monkeypatch, boxed):
    boxes = boxes_file(photos, "cam0/0.png,0,0,10,30,", "cam0/0.png,5,20,15,40,") if boxed else None
    gallery.add([photos], boxes=boxes)

    def left():
        return list(gallery.thumbnails.folder.rglob("*.jpg"))

    with Gallery.open(tmp_path / "people.db", checkpoint) as page:
        ids, real = [id for id, _ in gallery.store.all_rows()], gallery.store.remove

        def seen_before(removed):
            for id in removed:
                page.thumbnail(id)  # made again
            real(removed)

        monkeypatch.setattr(gallery.store, "remove", seen_before)
        gallery.forget([photos / "cam0"])
        assert len(left()) == len(gallery)
        monkeypatch.undo()
        gallery.add([photos], boxes=boxes)
        for id in (ids := [id for id, _ in gallery.store.all_rows()]):
            gallery.thumbnails.remove(id)
        image = page.image

        def seen_after(row):
            found = image(row)
            gallery.forget([row.path])
            return found

        monkeypatch.setattr(page, "image", seen_after)
        page.thumbnail(ids[0])
        assert not left() and len(gallery) < len(ids)


def test_one_process_changes_an_index_at_a_time(gallery, photos):
    gallery.add([photos])
    with gallery.locked():
        for change in (lambda: gallery.add([photos]), lambda: forget(gallery.name, [photos])):
            with pytest.raises(SearchError, match="another process is changing this index; wait until it has ended"):
                change()
        assert len(gallery.search(Query(("a man",)))) == 6  # queries go on


# ---------------------------------------------------------------------------------------- boxes


def boxes_file(folder, *lines, header="path,x,y,width,height,frame"):
    path = folder / "boxes.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_boxes(gallery, photos):
    boxes = boxes_file(photos, "cam0/0.png,0,0,10,30,", "cam0/0.png,5,20,15,40,", "cam1/1.png,1,2,3,4,")
    assert counts_of(gallery.add([photos], boxes=boxes)) == {"added": 2}
    found = sorted((row.path, row.box, id) for id, row in gallery.store.all_rows())
    assert [box for _, box, _ in found] == [(0, 0, 10, 30), (5, 20, 15, 40), (1, 2, 3, 4)]
    for path, (x, y, width, height), id in found:
        crop = Image.open(path).crop((x, y, x + width, y + height))
        np.testing.assert_allclose(gallery.store.vectors([id])[0], features(gallery, crop), atol=1e-5)
        shutil.rmtree(gallery.thumbnails.folder)
        assert image_of(gallery.thumbnail(id)).size == (width, height)
    assert counts_of(gallery.add([], boxes=boxes)) == {"unchanged": 2}
    boxes_file(photos, "cam0/0.png,0,0,10,30,", "cam1/1.png,1,2,3,4,")
    assert counts_of(gallery.add([], boxes=boxes)) == {"changed": 1, "unchanged": 1} and len(gallery) == 2
    report = gallery.add([], boxes=boxes_file(photos, "cam0/0.png,15,0,10,30,"))
    assert "boxes.csv line 2: the box ends at (25, 30), outside of the image of 20 × 60 pixels" in report.problems[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["cam0/9.png,0,0,1,1,"], "line 2, field path: .*cam0/9.png does not exist"),
        (["x" * 5000 + ",0,0,1,1,"], "line 2, field path: 'x{60}' cannot be a path"),
        (["~no-such-user/x.png,0,0,1,1,"], "line 2, field path: .*~no-such-user/x.png does not exist"),
        (["cam0,0,0,1,1,"], "line 2, field path: .* or is not a file"),
        ([",0,0,1,1,"], "line 2, field path: empty"),
        (["cam0/0.png,0,0,1,1,", "cam0/0.png,-1,0,1,1,"], "line 3, field x: '-1'; expected a whole number from 0"),
        (["cam0/0.png,0,1.5,1,1,"], "line 2, field y: '1.5'"),
        (["cam0/0.png,0,0,0,1,"], "line 2, field width: '0'; expected a whole number from 1"),
        (["cam0/0.png,0,0,1,,"], "line 2, field height: ''"),
        (["cam0/0.png,0,0,1,99999999999999999999,"], "line 2, field height"),
        (["cam0/0.png,0,0,1,٣,"], "line 2, field height"),
        (["cam0/0.png,0,0,1,1,4"], "line 2, field frame: 4 for the image .*; expected no frame"),
        (["cam0/0.png,0,0,1,1"], "line 2: expected 6 fields, found 5"),
        (["cam0/0.png,0,0,1,1,", "cam0/0.png,0,0,1,1,"], "line 3: the box of .* stands twice"),
        (['"cam0/0.png,0,0,1,1,'], "line 2: not CSV"),
        ([], "no boxes; expected a line for each person"),
    ],
)
def test_boxes_that_are_wrong(gallery, photos, lines, message):
    with pytest.raises(DataError, match=f"boxes.csv:? ?{message}") as raised:
        gallery.add([photos], boxes=boxes_file(photos, *lines))
    assert "\n" not in str(raised.value) and len(gallery) == 0


def test_many_boxes_are_read_in_a_time_that_grows_with_their_number(photos):
    def lines(count):
        return [f"cam{number % 2}/{number % 2}.png,{number // 2},0,1,1," for number in range(count)]

    def seconds(count):
        boxes = boxes_file(photos, *lines(count))
        start = time.process_time()
        assert sum(map(len, read_boxes(boxes).values())) == count
        return time.process_time() - start

    assert min(seconds(8_000), seconds(8_000)) < 4 * 8 * max(seconds(1_000), seconds(1_000), 0.01)
    with pytest.raises(DataError, match="line 8002: the box of .*cam1/1.png stands twice"):
        read_boxes(boxes_file(photos, *lines(8_000), "cam1/1.png,7,0,1,1,"))


def test_the_files_of_boxes_are_compared_with_the_given_ones_once(gallery, photos, monkeypatch):
    class Counted(list):
        read = 0

        def __iter__(self):
            Counted.read += 1
            return super().__iter__()

    monkeypatch.setattr(indexing, "find_media", lambda given: (Counted(sorted(photos.glob("cam?/*.png"))), []))
    read = []
    for count in (1, 3, 6):
        Counted.read = 0
        lines = [f"cam{number % 2}/{number}.png,{count},0,1,1," for number in range(count)]
        gallery.add([photos], boxes=boxes_file(photos, *lines))
        read.append(Counted.read)
    assert len(set(read)) == 1


def test_a_file_of_boxes_that_is_wrong(gallery, photos, tmp_path):
    for header in ("path,x,y,width", "path,x,y,width,height,label", "path,x,x,y,width,height", ""):
        with pytest.raises(DataError, match="line 1: expected the columns path,x,y,width,height,frame"):
            gallery.add([photos], boxes=boxes_file(photos, header=header))
    (photos / "boxes.csv").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match="expected UTF-8 text"):
        gallery.add([photos], boxes=photos / "boxes.csv")
    with pytest.raises(OSError, match="No such file"):
        gallery.add([photos], boxes=photos / "none.csv")
    with pytest.raises(DataError, match="line 2, field path: the file is not among those that are to be indexed"):
        gallery.add([photos / "cam1"], boxes=boxes_file(photos, "cam0/0.png,0,0,1,1,"))


# ---------------------------------------------------------------------------------------- videos


@pytest.fixture
def video(tmp_path):
    """Four seconds at 10 frames a second, each of one grey value, which rises by 5."""
    av = pytest.importorskip("av", reason="the extra video is not installed")
    path = tmp_path / "film" / "camera_4" / "2026-02-03_10-00-00.mkv"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 48, "bgr0"
        for number in range(40):
            pixels = np.full((48, 32, 3), 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_of_a_video(video):
    for every, numbers in ((1.0, [0, 10, 20, 30]), (0.25, [0, 3, 5, 8, 10]), (9.0, [0])):
        found = list(frames(video, every))
        assert [number for number, _, _ in found][: len(numbers)] == numbers
        assert all(image.getpixel((3, 3)) == (5 * number,) * 3 for number, _, image in found)
        assert all(seconds == pytest.approx(number / 10) for number, seconds, _ in found)
    assert [number for number, _, _ in frames(video, None, [7, 33])] == [7, 33]
    with pytest.raises(DataError, match="frame 40 is wanted, but the video has 40 frames"):
        list(frames(video, None, [3, 40]))


def test_a_video_of_a_turned_camera_is_upright(tmp_path):
    """A phone stores its frames as the sensor lies, and in the track's matrix how to turn them."""
    av = pytest.importorskip("av", reason="the extra video is not installed")
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = Image.new("RGB", (64, 32), (0, 0, 255))
        picture.paste((255, 0, 0), (0, 0, 32, 16))  # red at the upper left
        container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    content = path.read_bytes()
    matrix = content.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2: behind version, flags and 40 bytes
    one = 1 << 16
    corners = {
        (one, 0, 0, one): (0, 0),
        (0, one, -one, 0): (1, 0),
        (-one, 0, 0, -one): (1, 1),
        (0, -one, one, 0): (0, 1),
    }
    for (a, b, c, d), (right, below) in corners.items():
        turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(content[:matrix] + turned + content[matrix + 36 :])
        ((_, _, image),) = frames(path, 1.0)
        assert image.size == ((64, 32) if a else (32, 64))
        width, height = image.size
        red = [image.getpixel((4 + x * (width - 9), 4 + y * (height - 9)))[0] > 200 for x in (0, 1) for y in (0, 1)]
        assert red == [(x, y) == (right, below) for x in (0, 1) for y in (0, 1)]


def test_a_video_in_the_index(gallery, video, embedded):
    assert counts_of(gallery.add([video.parent], batch_size=3)) == {"added": 1}
    found = [row for _, row in gallery.store.all_rows()]
    assert [row.frame for row in found] == [0, 10, 20, 30] and [row.parts for row in found] == [0, 0, 0, 4]
    assert [row.time for row in found] == [datetime(2026, 2, 3, 10, 0, second) for second in range(4)]
    assert {row.camera for row in found} == {"4"} and [row.seconds for row in found] == [0, 1, 2, 3]
    assert counts_of(gallery.add([video])) == {"unchanged": 1}
    shutil.rmtree(gallery.thumbnails.folder)
    assert image_of(gallery.thumbnail(3)).getpixel((3, 3)) == pytest.approx((100,) * 3, abs=2)
    embedded.clear()
    moved = video.rename(video.with_name("2026-02-03_11-00-00.mkv"))
    assert counts_of(gallery.add([moved])) == {"moved": 1} and sum(embedded) == 0
    assert [row.time.hour for _, row in gallery.store.all_rows()] == [11] * 4
    assert counts_of(gallery.add([moved], every=2)) == {"changed": 1} and len(gallery) == 2


def test_boxes_of_a_video(gallery, video):
    boxes = boxes_file(
        video.parent, f"{video.name},1,2,10,20,7", f"{video.name},2,2,10,20,7", f"{video.name},0,0,9,9,30"
    )
    assert counts_of(gallery.add([], boxes=boxes)) == {"added": 1}
    found = [(row.frame, row.box) for _, row in gallery.store.all_rows()]
    assert found == [(7, (1, 2, 10, 20)), (7, (2, 2, 10, 20)), (30, (0, 0, 9, 9))]
    with pytest.raises(DataError, match="field frame: empty for the video .*; expected the number of a frame"):
        gallery.add([], boxes=boxes_file(video.parent, f"{video.name},1,2,10,20,"))


def test_videos_that_are_broken(gallery, video, photos):
    content = video.read_bytes()
    for name, damaged in (("text.mp4", b"no video"), ("empty.avi", b""), ("cut.mkv", content[:200])):
        (video.parent / name).write_bytes(damaged)
    report = gallery.add([video.parent])
    assert counts_of(report) == {"added": 1} and len(report.problems) == 3 and len(gallery) == 4
    report = gallery.add([], boxes=boxes_file(video.parent, f"{video.name},1,2,10,20,3", f"{video.name},1,2,10,20,99"))
    assert "frame 99 is wanted" in report.problems[0] and len(gallery) == 4  # the earlier entries stay


@pytest.mark.parametrize("name", ["list.mp4", "list.ts"])
def test_a_playlist_named_as_a_video_opens_no_address(tmp_path, name):
    pytest.importorskip("av", reason="the extra video is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/secret.ts"
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{address}\n#EXT-X-ENDLIST\n"
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="video is broken"):
            list(frames(tmp_path / name, 1.0))
        with pytest.raises(TimeoutError):
            server.accept()


def test_without_pyav(gallery, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.mp4").write_bytes(b"x")
    with pytest.raises(SearchError, match=r"videos need PyAV; install it with pip install 'upperson\[video\]'"):
        gallery.add([tmp_path / "x.mp4"])


# ---------------------------------------------------------------------------------------- the model


def test_another_model_is_refused(gallery, photos, tmp_path, checkpoint):
    gallery.add([photos])
    other = tiny_run(tmp_path / "other" if (tmp_path / "other").mkdir() is None else None, seed=3)
    with pytest.raises(SearchError, match="another model than .*; checkpoint: .*, not .*; backbone: .*--checkpoint"):
        Gallery.open(gallery.name, other)
    larger = tiny_run(tmp_path / "larger" if (tmp_path / "larger").mkdir() is None else None, image_size=(96, 32))
    with pytest.raises(SearchError, match=r"image size: 96 × 32, not 48 × 16"):
        Gallery.open(gallery.name, larger)
    with pytest.raises(CheckpointError, match="people.db"):
        Gallery.open(gallery.name, gallery.name)
    with Gallery.open(gallery.name) as again:  # the checkpoint that the index remembers
        assert again.model == str(checkpoint) and len(again) == 6


def test_a_checkpoint_that_has_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    checkpoint = tiny_run(tmp_path / "model")
    Gallery.open("people.db", checkpoint).close()
    gone = checkpoint.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(
        SearchError, match=f"people.db: the checkpoint of this index, {checkpoint}, has gone; .*--checkpoint"
    ):
        Gallery.open("people.db")
    Gallery.open("people.db", gone).close()
    newest = tmp_path / "runs" / "a-1" / "best.safetensors"  # of the newest run
    newest.parent.mkdir(parents=True)
    shutil.copy(gone, newest)
    with Gallery.open("people.db") as gallery:
        assert gallery.model == "runs/a-1/best.safetensors"


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
@pytest.mark.parametrize("name", [b"\xff", b"a\xe9b"])
def test_an_index_in_a_folder_that_is_not_utf_8_is_refused_before_it_is_made(tmp_path, monkeypatch, checkpoint, name):
    """It could not name its checkpoint, and would be called damaged."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    folder.mkdir()
    shutil.copy(checkpoint, folder)
    monkeypatch.chdir(folder)
    with pytest.raises(SearchError, match=r"'.*\\udc.*safetensors': an index names its checkpoint; .* in UTF-8"):
        Gallery.open("people.db", checkpoint.name)
    assert [path.name for path in folder.iterdir()] == [checkpoint.name]
    Gallery.open("people.db", checkpoint).close()  # a checkpoint elsewhere
    Gallery.open("people.db").close()


def test_half_of_an_index_in_float32_is_refused(gallery, tmp_path, checkpoint):
    with pytest.raises(SearchError, match="people.db: this index stores float32; --half is for a new --index"):
        Gallery.open(gallery.name, checkpoint, half=True)
    for _ in range(2):  # a new index, and the same command again
        Gallery.open(tmp_path / "half.db", checkpoint, half=True).close()
    Gallery.open(tmp_path / "half.db", checkpoint).close()


def test_an_index_is_not_made_by_a_query(tmp_path, checkpoint):
    with pytest.raises(SearchError, match="typo.db: no index; make one"):
        Gallery.find(tmp_path / "typo.db", checkpoint)
    assert not (tmp_path / "typo.db").exists()


# ---------------------------------------------------------------------------------------- kill -9

SETTINGS = {"format": 1, "dimensions": 54, "dtype": "float32", "checkpoint": "none", "identity": {}}


def encode(pixels):
    """A stand-in for a model: the pixels."""
    flat = pixels.flatten(1).float() + 1
    return (flat / flat.norm(dim=1, keepdim=True)).numpy()


def index_whole(index, folder, settings=SETTINGS):
    """Indexes a folder to its end."""
    torch.set_num_threads(1)  # a forked process must not use the threads of its parent
    store = open_store(str(index), settings)
    indexing = Indexing(store, Thumbnails(store.kept_at), encode, (6, 3), 50)
    options = dict(boxes=None, every=1.0, prune=False, pattern=None, workers=0, progress=False)
    indexing.add([folder], **options)
    store.close()


def killed_index(tmp_path, images, kills):
    """Indexes a folder, killed at random moments, and then once to its end; returns the killed and a whole index."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(images):
        Image.fromarray(generator.integers(0, 256, (6, 3, 3), dtype=np.uint8)).save(folder / f"{number}.bmp")
    index = tmp_path / "people.db"
    chance, stopped, fork = random.Random(7), [], multiprocessing.get_context("fork")
    for _ in range(kills):
        target = stored(index) + chance.randrange(1, 2 * images // kills)
        child = fork.Process(target=index_whole, args=(index, folder))
        child.start()
        while stored(index) < target and child.is_alive():
            time.sleep(chance.random() * 0.02)
        child.kill()
        child.join()
        stopped.append(stored(index))
    for path in (index, tmp_path / "whole.db"):
        last = fork.Process(target=index_whole, args=(path, folder))
        last.start()
        last.join()
        assert last.exitcode == 0
    return open_store(str(index)), open_store(str(tmp_path / "whole.db")), stopped


def stored(index):
    """The number of images in an index that another process writes."""
    try:
        with closing(sqlite3.connect(f"file:{index}?mode=ro", timeout=30, uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM entries").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet
        return 0


def assert_same_index(killed, whole):
    one, other = (list(store.all_rows()) for store in (killed, whole))
    assert one == other
    ids = [id for id, _ in one]
    np.testing.assert_array_equal(killed.vectors(ids), whole.vectors(ids))
    killed.close(), whole.close()


forks = pytest.mark.skipif(sys.platform != "linux", reason="the test forks")


@forks
def test_an_index_that_is_killed_ends_as_one_that_is_not(tmp_path):
    killed, whole, stopped = killed_index(tmp_path, 300, 2)
    assert len(whole) == 300 and 0 < stopped[0] < 300
    assert_same_index(killed, whole)


@forks
@pytest.mark.slow
def test_an_index_of_ten_thousand_images_killed_twenty_times(tmp_path):
    killed, whole, stopped = killed_index(tmp_path, 10_000, 20)
    assert len(whole) == 10_000 and sum(0 < count < 10_000 for count in stopped) >= 10
    assert_same_index(killed, whole)


def test_half_a_file_is_indexed_again(gallery, photos):
    """A process may be killed between the images of one file."""
    boxes = boxes_file(photos, *(f"cam0/0.png,0,0,{number},9," for number in range(1, 8)))
    gallery.add([], boxes=boxes)
    ids = [id for id, _ in gallery.store.all_rows()]
    whole = [replace(row, parts=0) for _, row in gallery.store.all_rows()], gallery.store.vectors(ids)
    gallery.store.remove(ids[3:])
    assert counts_of(gallery.add([], boxes=boxes)) == {"changed": 1}
    after = list(gallery.store.all_rows())
    assert [replace(row, parts=0) for _, row in after] == whole[0]
    np.testing.assert_allclose(gallery.store.vectors([id for id, _ in after]), whole[1], atol=1e-6)


def test_the_pixels_of_the_index_are_those_of_evaluation(photos):
    """Cropping and resizing go through the one reader."""
    path = photos / "cam0" / "0.png"
    assert torch.equal(load_pixels(Image.open(path), (48, 16)), load_pixels(path, (48, 16)))
