"""A cache of decoded and resized images in one file, which later runs read instead of the image files.

A cache consists of two files in a folder. `384x128-0123456789abcdef.npy` holds the pixels, [images, 3, H, W] uint8, and
is read row by row. The `.json` file beside it is the index: for each row the path of the image, its file size, its time
stamp, and a checksum of its pixels. The file name contains a hash of paths, sizes and stamps, so that the content of a
name never changes, and data sets and image sizes can share a folder. The index is written last; pixels without an index
are ignored, as is an index that its name does not fit.

Each row is verified when it is read, which takes 0.07 ms at 384x128; decoding takes some ms. Rows are read by position
instead of through memory: a file that is cut while a training reads it is an error, not the end of the process.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from upperson.data.images import load_pixels
from upperson.embedded.drawing import Drawing
from upperson.errors import DataError
from upperson.files import expanded, make_folder, parse_json, read_text, require_folder, require_regular

FORMAT = 2  # version of the index and of load_image; caches of other versions are ignored
CHUNK = 256  # images decoded at once, which bounds the memory of unwritten images
OWN_FILE = re.compile(r"\.?(?P<name>\d+x\d+-[0-9a-f]{16})\.(npy|json)(?P<temporary>\.[0-9a-f]{8}\.tmp)?")

Stamp = tuple[int, int]  # size of an image file in bytes, and modification time in ns


class ImageCache:
    """The pixels of a data set's image files at one size. Can be pickled; each process opens the file itself."""

    def __init__(self, image_size: tuple[int, int], rows: dict[Path, int], pixels: "Pixels | None"):
        self.image_size, self.rows, self.pixels = image_size, rows, pixels

    @property
    def file(self) -> Path | None:
        return None if self.pixels is None else self.pixels.file

    @classmethod
    def open(
        cls, images: Iterable[Path | Drawing], image_size: tuple[int, int], folder: Path, *, progress: bool = True
    ) -> "ImageCache":
        """Opens the cache in `folder` that holds the current version of all `images`, or builds this cache.

        Images are decoded in threads, at `image_size` (height, width). Unchanged images of another cache in the folder
        are copied. The other cache is kept, since a training may be reading it; it can be deleted afterwards. A lock
        lets only one process write to a folder at a time. A killed process leaves no file that is read as a cache.
        Synthetic images are not cached here, since every process keeps their pixels, see `load_image`.

        Raises DataError with the path of a missing or broken image, and OSError with the name of a file that cannot be
        written. If the disk is too small, the error states the required space.
        """
        paths = {image: os.path.abspath(image) for image in images if isinstance(image, Path)}
        if not paths:
            return cls(image_size, {}, None)
        files = {path: image for image, path in paths.items()}
        stamps = _stamps(files)
        folder = expanded(Path(folder))
        require_folder(folder, "image_cache", writable=False)
        stored = _find(_stored(folder, image_size), stamps)
        if stored is None:
            with _locked(folder):
                known = _stored(folder, image_size)
                stored = _find(known, stamps) or _build(folder, image_size, files, stamps, known, progress)
        row_of = {path: row for row, path in enumerate(stored.stamps)}
        return cls(image_size, {image: row_of[path] for image, path in paths.items()}, stored.pixels)

    def __getitem__(self, image: Path) -> torch.Tensor:
        """[3, H, W] uint8, as from `load_pixels`.

        Raises KeyError for an image that `open` was not given, and DataError for pixels that have been damaged.
        """
        if image not in self.rows:
            raise KeyError(f"{image}: expected one of the {len(self.rows)} images that the cache was opened with")
        assert self.pixels is not None  # a cache with rows has a file
        return torch.from_numpy(self.pixels[self.rows[image]])

    def load(self, image: Path | Drawing) -> torch.Tensor:
        """[3, H, W] uint8: from the cache for a file, drawn for a synthetic image."""
        return self[image] if isinstance(image, Path) else load_pixels(image, self.image_size)


class Pixels:
    """The rows of a file of pixels, [3, H, W] uint8 each.

    Raises OSError for a file that cannot be read, and ValueError for one of another shape or size than expected.
    """

    def __init__(self, file: Path, image_size: tuple[int, int], checksums: list[int]):
        self.file, self.shape, self.checksums = file, (3, *image_size), checksums
        self.descriptor: int | None = None
        require_regular(file)
        with open(file, "rb") as opened:
            try:
                np.lib.format.read_magic(opened)
                shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
            except Exception as error:  # a damaged header is read as Python, and raises many types
                raise ValueError(f"{file}: expected the header of a NumPy file ({error!r})") from error
            self.start = opened.tell()
            size = os.fstat(opened.fileno()).st_size - self.start
        if shape != (len(checksums), *self.shape) or dtype != np.uint8 or size != np.prod(shape):
            raise ValueError(f"{file}: expected {len(checksums)} images of {self.shape}, found {shape}, {size} bytes")

    def __getitem__(self, row: int) -> np.ndarray:
        """A row, which may be written to. Raises DataError if the row is not what was written to the file."""
        pixels = np.empty(self.shape, np.uint8)
        try:
            found = self._read(pixels.data.cast("B"), self.start + row * pixels.nbytes)
        except OSError as error:
            raise OSError(error.errno, f"{self.file} could not be read ({error.strerror})") from error
        if found != pixels.nbytes or zlib.crc32(pixels.data) != self.checksums[row]:
            problem = "damaged" if found == pixels.nbytes else "cut off"
            raise DataError(
                f"{self.file}: the pixels of row {row} are {problem}; delete this file, and the next run makes it again"
            )
        return pixels

    def _read(self, pixels: memoryview, start: int) -> int:
        if not hasattr(os, "preadv"):  # Windows
            with open(self.file, "rb", buffering=0) as opened:
                opened.seek(start)
                return opened.readinto(pixels) or 0
        if self.descriptor is None:
            self.descriptor = os.open(self.file, os.O_RDONLY)
            weakref.finalize(self, os.close, self.descriptor)
        return os.preadv(self.descriptor, [pixels], start)  # forked processes share no position

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"descriptor": None}


@dataclass(frozen=True)
class Stored:
    """A complete cache."""

    stamps: dict[str, Stamp]  # by absolute path, in the order of the rows
    pixels: Pixels


def _stamps(files: dict[str, Path]) -> dict[str, Stamp]:
    def stamp(image: Path) -> Stamp:
        try:
            status = image.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{image}: image is missing") from error
        return status.st_size, status.st_mtime_ns

    with ThreadPoolExecutor() as threads:  # each request to a network file system takes long
        return dict(zip(files, threads.map(stamp, files.values()), strict=True))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder for one process, and creates it if necessary."""
    make_folder(folder, "image_cache")
    lock = FileLock(folder / ".lock")
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _stored(folder: Path, image_size: tuple[int, int]) -> list[Stored]:
    """The complete caches of this image size. Truncated and otherwise damaged files are skipped."""
    height, width = image_size
    found = []
    for index in sorted(folder.glob(f"{height}x{width}-*.json")):
        with suppress(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
            content = parse_json(read_text(index))
            if content["format"] == FORMAT:
                stamps = {path: tuple(stamp) for path, stamp in content["images"].items()}
                file = folder / _name(image_size, stamps)
                if file == index.with_suffix(".npy") and len(content["checksums"]) == len(stamps):
                    found.append(Stored(stamps, Pixels(file, image_size, content["checksums"])))
    return found


def _name(image_size: tuple[int, int], stamps: dict[str, Stamp]) -> str:
    """The name of the file of pixels."""
    height, width = image_size
    content = json.dumps({"format": FORMAT, "image_size": image_size, "images": stamps}).encode()
    return f"{height}x{width}-{hashlib.sha256(content).hexdigest()[:16]}.npy"


def _find(caches: Sequence[Stored], stamps: dict[str, Stamp]) -> Stored | None:
    return next((cache for cache in caches if stamps.items() <= cache.stamps.items()), None)


def _build(
    folder: Path,
    image_size: tuple[int, int],
    files: dict[str, Path],
    stamps: dict[str, Stamp],
    known: Sequence[Stored],
    progress: bool,
) -> Stored:
    height, width = image_size
    file = folder / _name(image_size, stamps)
    _remove_leftovers(folder)
    _check_space(file, len(files) * 3 * height * width + sum(map(len, files)))
    unchanged = {
        path: (cache.pixels, row)
        for cache in known
        for row, (path, stamp) in enumerate(cache.stamps.items())
        if stamps.get(path) == stamp
    }

    def pixels(path: str) -> np.ndarray:
        if path in unchanged:
            earlier, row = unchanged[path]
            with suppress(DataError, OSError):  # a damaged row is decoded again
                return earlier[row]
        return load_pixels(files[path], image_size).numpy()

    paths, checksums = list(files), []
    with (
        _written_atomically(file) as opened,
        ThreadPoolExecutor() as threads,
        tqdm(total=len(paths), desc="caching images", unit="image", disable=not progress) as bar,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, height, width)}
        np.lib.format.write_array_header_1_0(opened, header)
        for start in range(0, len(paths), CHUNK):
            for image in threads.map(pixels, paths[start : start + CHUNK]):
                content = image.tobytes()
                opened.write(content)
                checksums.append(zlib.crc32(content))
                bar.update()
    index = {"format": FORMAT, "image_size": image_size, "images": stamps, "checksums": checksums}
    with _written_atomically(file.with_suffix(".json")) as opened:
        opened.write(json.dumps(index).encode())
    return Stored(stamps, Pixels(file, image_size, checksums))


def _remove_leftovers(folder: Path) -> None:
    """Deletes the files of killed processes. Only the process that holds the lock may call this function."""
    for path in folder.iterdir():
        own = OWN_FILE.fullmatch(path.name)
        if own and (own["temporary"] or not (folder / f"{own['name']}.json").exists()):
            path.unlink()


def _check_space(file: Path, needed: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{file} needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; choose another folder for the "
            "image cache, or omit it",
        )


@contextmanager
def _written_atomically(file: Path) -> Iterator[BinaryIO]:
    """A file to write, which is complete afterwards, or absent after a failure. Raises OSError with the path."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{file} could not be written ({error.strerror})") from error
        raise
