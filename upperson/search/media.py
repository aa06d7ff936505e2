"""Which files are images and videos, and the frames of a video."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from upperson.data.images import HEIF_SUFFIXES, MAX_PIXELS, readable_formats
from upperson.errors import DataError, SearchError
from upperson.files import require_regular

VIDEOS = frozenset(
    (".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
)
TAG = "CACHEDIR.TAG"  # marks a folder of derived files (bford.info/cachedir), such as thumbnails


@cache
def image_suffixes() -> frozenset[str]:
    """Of the formats that can be read, and those of HEIF in any case: without pillow-heif they are named as unread."""
    formats = readable_formats()
    return frozenset(HEIF_SUFFIXES).union(
        suffix for suffix, name in Image.registered_extensions().items() if name in formats
    )


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def absolute(path: str | Path) -> Path:
    """The absolute path; with `..` resolved by the file system, as a link may lead elsewhere.

    Raises SearchError for a text that cannot be a path, such as an unknown user after ~.
    """
    try:
        found = Path(path).expanduser()
        return found.resolve() if ".." in found.parts else found.absolute()
    except (OSError, ValueError, RuntimeError) as error:
        raise no_path(path, error) from error


def no_path(path: str | Path, error: Exception) -> SearchError:
    reason = isinstance(error, OSError) and error.strerror or error
    return SearchError(f"{str(path)[:200]!r} cannot be a path ({reason})")


def find_media(given: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """The images and videos among these files and below these folders, sorted, and the folders that cannot be read.

    Hidden files and folders, links to folders, and folders with a CACHEDIR.TAG are left out. Raises SearchError for an
    empty path, a path that does not exist, and a folder without images and videos.
    """
    found: dict[Path, None] = {}
    problems: list[str] = []
    for name in given:
        if not str(name).strip():
            raise SearchError(f"expected a path, found the text {str(name)!r}")
        path = absolute(name)
        try:
            exists = path.exists()
        except (OSError, ValueError) as error:  # a name that is too long, NUL
            raise no_path(name, error) from error
        if not exists:
            raise SearchError(f"{name}: the file or folder does not exist")
        files = [path] if not path.is_dir() else list(below(path, problems))
        if not files:
            reason = f"; {problems[0]}" if problems else ""
            raise SearchError(f"{name}: no image or video is in this folder{reason}")
        found.update(dict.fromkeys(files))
    return list(found), problems


def below(folder: Path, problems: list[str]) -> Iterator[Path]:
    def report(error: OSError) -> None:
        problems.append(f"{error.filename}: the folder cannot be read ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=report):
        if TAG in names:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and (suffix in image_suffixes() or suffix in VIDEOS):
                yield Path(place, name)


def frames(path: Path, every: float | None, wanted: Iterable[int] = ()) -> Iterator[tuple[int, float, Image.Image]]:
    """Number, seconds and upright RGB image of a video's frames: one in `every` seconds, or those in `wanted`.

    Raises SearchError without PyAV, and DataError for a video that is missing or broken, larger than MAX_PIXELS, or
    shorter than a wanted frame.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise SearchError(
            f"{path}: videos need PyAV; install it with pip install 'upperson[video]' ({error})"
        ) from error
    try:
        require_regular(path)
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:  # a playlist may name addresses
            yield from _picked(path, container, every, set(wanted))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: video is missing") from error
    except (FFmpegError, ValueError, IndexError) as error:
        raise DataError(f"{path}: video is broken ({error})") from error


def _picked(path: Path, container: Any, every: float | None, wanted: set[int]) -> Iterator[tuple[int, float, Any]]:
    if not container.streams.video:
        raise DataError(f"{path}: the file has no video")
    stream = container.streams.video[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: expected frames of at most {MAX_PIXELS:,} pixels, found {width} x {height}")
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate or 25)
    start, due, number = None, 0.0, -1
    for number, frame in enumerate(container.decode(stream)):
        time = frame.time if frame.time is not None else number / rate
        start = time if start is None else start
        seconds = time - start
        if number in wanted if every is None else seconds >= due - 1e-6:
            image = frame.to_image()
            yield number, seconds, image.rotate(frame.rotation, expand=True) if frame.rotation else image
            wanted.discard(number)
            if every is None and not wanted:
                return
            due = every * (math.floor(seconds / every + 1e-6) + 1) if every else due
    if number < 0:
        raise DataError(f"{path}: the video has no frames")
    if wanted:
        raise DataError(f"{path}: frame {min(wanted)} is wanted, but the video has {number + 1} frames")


def gone(path: str) -> bool:
    """Whether a file is no longer there. One that cannot be reached, as in a folder without rights, is not gone."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a text that names no file
        return True
    except OSError:
        return False
    return False
