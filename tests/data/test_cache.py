"""The cache of decoded images: equal to decoding, checked against the files, safe against kills."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_image

from upperson.data import ImageCache, Preprocess, Sample, image_loader, train_loader
from upperson.data.images import load_pixels
from upperson.errors import DataError

SIZE = (48, 16)
ROW = 3 * 48 * 16
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return [write_image(tmp_path / "images" / f"{number}.jpg", number, (30, 70 + number)) for number in range(7)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "caches" / "here"


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """The images that the cache decodes from now on."""
    paths = []

    def counting(image, image_size):
        paths.append(image)
        return load_pixels(image, image_size)

    monkeypatch.setattr("upperson.data.cache.load_pixels", counting)
    return paths


def opened(images, folder, size=SIZE) -> ImageCache:
    return ImageCache.open(images, size, folder, progress=False)


def is_right(cache: ImageCache, images: list[Path], size=SIZE) -> bool:
    return all(torch.equal(cache[image], load_pixels(image, size)) for image in images)


def names(folder: Path, pattern: str = "*") -> set[str]:
    return {path.suffix for path in folder.glob(pattern) if path.name != ".lock"}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != ".lock")


class TestContent:
    def test_equal_to_decoding(self, images, folder):
        cache = opened(images, folder)
        assert is_right(cache, images)
        assert cache[images[0]].dtype == torch.uint8 and cache[images[0]].shape == (3, *SIZE)
        pixels, index = np.load(cache.file), json.loads(cache.file.with_suffix(".json").read_text())
        assert pixels.shape == (7, 3, *SIZE) and pixels.dtype == np.uint8
        assert index["format"] == 2 and index["image_size"] == list(SIZE)
        status = images[3].stat()
        assert list(index["images"].items())[3] == (str(images[3]), [status.st_size, status.st_mtime_ns])

    def test_more_images_than_are_decoded_at_once(self, images, folder, monkeypatch):
        monkeypatch.setattr("upperson.data.cache.CHUNK", 3)
        assert is_right(opened(images, folder), images)

    def test_what_it_gives_can_be_written_to(self, images, folder):
        cache = opened(images, folder)
        cache[images[0]].zero_()
        assert is_right(cache, images)

    def test_in_another_process(self, images, folder):
        cache = opened(images, folder)
        sent = pickle.dumps(cache)
        assert len(sent) < 7 * ROW and is_right(pickle.loads(sent), images)

    def test_an_image_it_was_not_opened_with(self, images, folder):
        with pytest.raises(KeyError, match="6.jpg: expected one of the 6 images"):
            opened(images[:6], folder)[images[6]]

    def test_relative_and_absolute_paths(self, images, folder, decoded, monkeypatch):
        monkeypatch.chdir(images[0].parent)
        both = [Path("0.jpg"), images[0], Path("../images/0.jpg")]
        cache = opened(both, folder)
        assert is_right(cache, both) and np.load(cache.file).shape[0] == len(decoded) == 1

    def test_drawings_are_left_out(self, images, folder):
        class Grey:
            def draw(self):
                return Image.new("RGB", (16, 48), (7, 7, 7))

        drawing = Grey()
        cache = opened([drawing, *images], folder)
        assert (cache.load(drawing) == 7).all() and torch.equal(cache.load(images[0]), cache[images[0]])
        assert len(np.load(cache.file)) == 7
        nothing = folder / "nothing"
        assert (opened([drawing], nothing).load(drawing) == 7).all() and not nothing.exists()


class TestReuse:
    def test_made_once(self, images, folder, decoded):
        opened(images, folder)
        assert sorted(decoded) == images
        before = [(path, path.stat().st_mtime_ns) for path in files(folder)]
        assert is_right(opened(images, folder), images)
        assert is_right(opened(images[2:4][::-1], folder), images[2:4])
        assert len(decoded) == 7 and [(path, path.stat().st_mtime_ns) for path in files(folder)] == before

    def test_a_folder_that_cannot_be_written_is_read(self, images, folder, monkeypatch):
        opened(images, folder)
        monkeypatch.setattr("upperson.data.cache.FileLock", None)
        assert is_right(opened(images, folder), images)

    def test_changed_images_alone_are_decoded_again(self, images, folder, decoded):
        opened(images, folder)
        decoded.clear()
        write_image(images[2], 20, (30, 90))
        status = images[5].stat()
        os.utime(images[5], ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # same size, another time
        cache = opened(images, folder)
        assert sorted(decoded) == [images[2], images[5]] and is_right(cache, images)
        assert len(files(folder)) == 4  # the older cache stays, for who reads it

    def test_new_images_alone_are_decoded(self, images, folder, decoded):
        opened(images[:4], folder)
        cache = opened(images, folder)
        assert len(decoded) == 7 and is_right(cache, images) and len(files(folder)) == 4

    def test_an_open_cache_outlives_its_successor(self, images, folder):
        cache = opened(images[:4], folder)
        before = [cache[image].clone() for image in images[:4]]
        write_image(images[0], 30, (30, 100))
        opened(images, folder)
        for each in (cache, pickle.loads(pickle.dumps(cache))):  # as a loader's new process gets it
            assert all(torch.equal(each[image], old) for image, old in zip(images[:4], before, strict=True))

    def test_data_sets_and_sizes_share_a_folder(self, images, folder, decoded):
        sets = [(images[:3], SIZE), (images[3:], SIZE), (images[:3], (24, 8))]
        for _ in range(2):
            for own, size in sets:
                assert is_right(opened(own, folder, size), own, size)
        assert len(decoded) == 3 + 4 + 3 and len(files(folder)) == 6

    @pytest.mark.parametrize("damage", ["cut", "empty", "gone", "index cut", "index empty", "index odd", "index gone"])
    def test_damage_is_noticed(self, images, folder, decoded, damage):
        file = opened(images, folder).file
        index = file.with_suffix(".json")
        damaged = index if "index" in damage else file
        content = {"cut": damaged.read_bytes()[:-1], "empty": b"", "odd": b"[]", "gone": None}[damage.split()[-1]]
        damaged.unlink()
        if content is not None:
            damaged.write_bytes(content)
        decoded.clear()
        assert is_right(opened(images, folder), images) and len(decoded) == 7
        assert is_right(opened(images, folder), images) and len(decoded) == 7

    def test_a_changed_index_does_not_fit_its_name(self, images, folder, decoded):
        """Such as stamps that were edited, with which old pixels would be taken for new ones."""
        index = opened(images, folder).file.with_suffix(".json")
        write_image(images[0], 50, (30, 100))
        content, status = json.loads(index.read_text()), images[0].stat()
        content["images"][str(images[0])] = [status.st_size, status.st_mtime_ns]
        index.write_text(json.dumps(content))
        assert is_right(opened(images, folder), images)

    @pytest.mark.parametrize("header", [b"{(\x9e", b"[" * 90, b"\0" * 90, b"{'descr': ("])
    def test_a_damaged_header_is_made_again(self, images, folder, header):
        """NumPy reads the header as Python."""
        file = opened(images, folder).file
        content = file.read_bytes()
        file.write_bytes(content[:10] + header + content[10 + len(header) :])
        assert is_right(opened(images, folder), images)

    @pytest.mark.parametrize("stamps", [[], 7, True, None, "x", [["x", [1, 2]]]])
    def test_an_index_of_another_type_is_made_again(self, images, folder, stamps):
        index = opened(images, folder).file.with_suffix(".json")
        index.write_text(json.dumps(json.loads(index.read_text()) | {"images": stamps}))
        assert is_right(opened(images, folder), images)

    def test_a_damaged_row_is_found_when_it_is_read(self, images, folder, decoded):
        """It is not copied into a new cache either."""
        cache = opened(images, folder)
        content = bytearray(cache.file.read_bytes())
        content[-2 * ROW] ^= 1  # in the last but one row
        cache.file.write_bytes(content)
        for each in (cache, opened(images, folder), pickle.loads(pickle.dumps(cache))):
            assert torch.equal(each[images[6]], load_pixels(images[6], SIZE))
            with pytest.raises(DataError, match=re.escape(f"{cache.file}: the pixels of row 5 are damaged; delete")):
                each[images[5]]
        decoded.clear()
        more = [*images, write_image(images[0].with_name("more.jpg"), 9)]
        assert is_right(opened(more, folder), more) and decoded == [images[5], more[-1]]
        cache.file.unlink()  # as the message says
        assert is_right(opened(images, folder), images)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_file_that_is_cut_while_it_is_read_is_an_error(self, images, folder, workers):
        """A process that reads it through memory would be ended by SIGBUS."""
        cache = opened(images, folder)
        cache[images[0]]
        os.truncate(cache.file, 3 * ROW)
        batches = image_loader(
            images, preprocess=Preprocess(SIZE, MEAN, STD), batch_size=1, workers=workers, cache=cache
        )
        with pytest.raises(DataError, match=re.escape(f"{cache.file}: the pixels of row 2 are cut off; delete")):
            list(batches)

    @pytest.mark.parametrize("other", [1, 3])  # 1: before load_image turned images upright, and without checksums
    def test_another_format_is_not_read(self, images, folder, decoded, monkeypatch, other):
        with monkeypatch.context() as patch:
            patch.setattr("upperson.data.cache.FORMAT", other)
            opened(images, folder)
        assert is_right(opened(images, folder), images) and len(decoded) == 14

    def test_progress_bar(self, images, folder, capsys):
        ImageCache.open(images, SIZE, folder)
        assert "caching images" in capsys.readouterr().err
        opened(images, folder, (24, 8))
        assert capsys.readouterr().err == ""


class TestErrors:
    def test_missing_images(self, images, folder):
        opened(images, folder)
        images[4].unlink()
        with pytest.raises(DataError, match=re.escape(f"{images[4]}: image is missing")):
            opened(images, folder)

    def test_broken_images(self, images, folder):
        images[4].write_bytes(b"no image")
        with pytest.raises(DataError, match=re.escape(f"{images[4]}: image is broken")):
            opened(images, folder)
        assert files(folder) == []

    def test_too_little_space(self, images, folder, monkeypatch):
        usage = type("Usage", (), {"free": 7 * ROW})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
        with pytest.raises(OSError, match=r"48x16-.*npy needs 0.0 MB, and 0.0 MB are free;"):
            opened(images, folder)
        assert files(folder) == []

    def test_a_folder_that_is_none(self, images, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="image_cache: .*file is a regular file; expected a folder that can"):
            opened(images, tmp_path / "file")

    @pytest.mark.slow
    def test_writing_fails(self, images, folder):
        """As on a full disk: the system lets no file grow beyond a limit."""
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))"
        found = run(f"{limit}\n{OPEN}", images, folder, check=False)
        assert re.search(r"OSError: \[Errno 27\] .*48x16-.*npy could not be written \(File too large\)", found.stderr)
        assert files(folder) == [] and is_right(opened(images, folder), images)

    def test_another_size_than_the_loaders(self, images, folder):
        cache = opened(images, folder)
        message = r"cache: expected images of \(96, 32\) pixels, found those of \(48, 16\)"
        options = {"batch_size": 2, "workers": 0, "cache": cache}
        with pytest.raises(ValueError, match=message):
            image_loader(images, preprocess=Preprocess((96, 32), MEAN, STD), **options)
        with pytest.raises(ValueError, match=message):
            train_loader(
                samples_of(images), tokenizer=None, image_size=(96, 32), seed=0, mask_captions=False, epoch=0, **options
            )


# What another process does: its arguments are the folder and the images.
OPEN = f"""
import sys
from pathlib import Path
from upperson.data import ImageCache
cache = ImageCache.open(list(map(Path, sys.argv[2:])), {SIZE}, Path(sys.argv[1]), progress=False)
print(int(sum(cache[image].sum() for image in cache.rows)))
"""

SLOWLY = """
import time
import upperson.data.cache as module
def slow(image, image_size, decode=module.load_pixels):
    time.sleep(0.3)
    print("decoded")
    return decode(image, image_size)
module.load_pixels, module.CHUNK = slow, 1
"""

DIES_AT_RENAME = """
import os, signal
replace, left = os.replace, [{number}]
def deadly(*paths):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    replace(*paths)
os.replace = deadly
"""


def start(script: str, images: list[Path], folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder), *map(str, images)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str, images: list[Path], folder: Path, check: bool = True) -> subprocess.CompletedProcess:
    process = start(script, images, folder)
    out, err = process.communicate(timeout=120)
    assert not check or process.returncode == 0, err
    return subprocess.CompletedProcess([], process.returncode, out, err)


class TestProcesses:
    @pytest.mark.slow
    def test_killed_while_decoding(self, images, folder, decoded):
        process = start(SLOWLY + OPEN, images, folder)
        deadline = time.monotonic() + 60
        while not list(folder.glob(".*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # two or three images of seven
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.communicate()
        (left,) = files(folder)
        assert left.name.endswith(".tmp")
        assert is_right(opened(images, folder), images) and len(decoded) == 7
        assert names(folder) == {".npy", ".json"}

    @pytest.mark.slow
    @pytest.mark.parametrize(("number", "left"), [(0, {".tmp"}), (1, {".tmp", ".npy"})])
    def test_killed_before_it_is_renamed(self, images, folder, decoded, number, left):
        """Before the pixels are renamed, then before the index is: pixels without an index are not a cache."""
        found = run(DIES_AT_RENAME.format(number=number) + OPEN, images, folder, check=False)
        assert found.returncode == -signal.SIGKILL and names(folder) == left
        assert is_right(opened(images, folder), images) and len(decoded) == 7
        assert names(folder) == {".npy", ".json"}

    def test_foreign_files_stay(self, images, folder):
        folder.mkdir(parents=True)
        foreign = [folder / name for name in ("notes.txt", "features.npy", "48x16.npy", ".other.tmp")]
        for file in foreign:
            file.write_text("mine")
        opened(images, folder)
        assert all(file.read_text() == "mine" for file in foreign)

    @pytest.mark.slow
    def test_two_at_once(self, images, folder):
        """One waits for the other, and takes what that has made."""
        total = str(sum(int(load_pixels(image, SIZE).sum()) for image in images))
        processes = [start(SLOWLY + OPEN, images, folder) for _ in range(2)]
        outputs = [process.communicate(timeout=120)[0].split() for process in processes]
        assert [output[-1] for output in outputs] == [total, total]
        assert sorted(output.count("decoded") for output in outputs) == [0, 7]
        assert names(folder) == {".npy", ".json"} and len(files(folder)) == 2


def samples_of(images: list[Path]) -> list[Sample]:
    return [Sample(image, f"a man in coat {number}", number, number) for number, image in enumerate(images)]


class TestLoaders:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_training_batches_are_the_same(self, images, folder, tokenizer, workers):
        options = {"tokenizer": tokenizer, "image_size": SIZE, "batch_size": 3, "seed": 1, "mask_captions": True}
        plain, cached = (
            list(train_loader(samples_of(images), **options, workers=workers, epoch=0, cache=cache))
            for cache in (None, opened(images, folder))
        )
        assert len(plain) == len(cached) == 2
        for first, second in zip(plain, cached, strict=True):
            assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_evaluation_batches_are_the_same(self, images, folder, workers):
        options = {"preprocess": Preprocess(SIZE, MEAN, STD), "batch_size": 4, "workers": workers}
        plain, cached = (
            torch.cat(list(image_loader(images, **options, cache=cache))) for cache in (None, opened(images, folder))
        )
        assert torch.equal(plain, cached)

    def test_image_files_are_not_opened(self, images, folder, monkeypatch):
        cache = opened(images, folder)
        monkeypatch.setattr("upperson.data.images.load_image", None)
        options = {"preprocess": Preprocess(SIZE, MEAN, STD), "batch_size": 4, "workers": 0}
        assert len(torch.cat(list(image_loader(images, **options, cache=cache)))) == 7
