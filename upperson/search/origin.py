"""Camera and time of an image, by its path or its EXIF data.

The nearest name decides: that of the file, then that of its folder, and so on. A camera is c3, cam3, camera_3, cam_a
and the like, and its name is "3" or "a". A time is 2026-01-31_23-59-59, 20260131T235959 and the like, or a date alone,
which is midnight. EXIF's DateTimeOriginal comes before the path, and the user's own pattern before both.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path, PurePath

from PIL import Image

from upperson.errors import DataError, SearchError

CAMERA = re.compile(
    r"(?<![a-z0-9])(?:(?:camera|cam)[ _-]?0*(\d{1,4}|[a-z](?![a-z]))|c0*(\d{1,4}))(?=s\d|[^a-z0-9]|$)", re.IGNORECASE
)
DAY = r"(?<!\d)(\d{4})([-_.]?)(\d{2})\2(\d{2})"
TIME = re.compile(DAY + r"[-_ T.]{1,3}(\d{2})[-_:.h]?(\d{2})[-_:.m]?(\d{2})(?!\d{1,2}(?!\d))")
DATE = re.compile(r"(?<!\d)(\d{4})([-_.])(\d{2})\2(\d{2})(?!\d)")
ZONE = re.compile(r"\d *(?:[zZ]|\+\d{2}:?\d{2}|-\d{2}:\d{2})$")
YEARS = range(1970, 2101)
GROUPS = {"camera", "time"}

EXIF, ORIGINAL = 0x8769, 0x9003  # tags: the block of EXIF, and DateTimeOriginal in it


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The user's pattern of paths. Raises SearchError for one that is not valid, or names neither camera nor time."""
    if pattern is None:
        return None
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise SearchError(f"pattern: not a regular expression ({error}): {pattern!r}") from error
    if not found.groupindex or not set(found.groupindex) <= GROUPS:
        raise SearchError(
            f"pattern: expected the groups (?P<camera>…) or (?P<time>…), found {', '.join(found.groupindex) or 'none'}"
        )
    return found


def origin(path: Path, pattern: re.Pattern[str] | None, exif: bool = True) -> tuple[str | None, datetime | None]:
    """Camera and time of a file, as far as they are known; `exif`: whether the file is an image, whose EXIF is read.

    Raises DataError for a time of the user's pattern that is not one.
    """
    camera, time = by_pattern(path, pattern)
    if time is None and exif:
        time = exif_time(path)
    names = [path.stem, *(folder.name for folder in path.parents)]
    camera = camera or next(filter(None, map(camera_in, names)), None)
    time = time or next(filter(None, map(time_in, names)), None)
    return camera, time


def by_pattern(path: PurePath, pattern: re.Pattern[str] | None) -> tuple[str | None, datetime | None]:
    found = pattern.search(path.as_posix()) if pattern else None
    groups = found.groupdict() if found else {}
    text = groups.get("time")
    if not text:
        return groups.get("camera"), None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        # More digits than those of a date are a clock: midnight is wrong where it cannot be read, as in 23-59.
        patterns = (TIME, DATE) if len(re.findall(r"\d", text)) <= 8 else (TIME,)
        time = None if ZONE.search(text) else time_in(text, patterns)
    if time is None or time.tzinfo is not None or time.year > YEARS[-1]:
        expected = f"one such as 2026-01-31T23:59:59, until {YEARS[-1]}"
        raise DataError(f"{path}: the pattern found the time {text!r}; expected {expected}")
    return groups.get("camera"), time


def camera_in(name: str) -> str | None:
    found = CAMERA.search(name)
    return (found.group(1) or found.group(2)).lower() if found else None


def time_in(name: str, patterns: Sequence[re.Pattern[str]] = (TIME, DATE)) -> datetime | None:
    for pattern in patterns:
        for found in pattern.finditer(name):
            year, _, month, day, *clock = found.groups()
            hour, minute, second = map(int, clock or ("0", "0", "0"))
            try:
                time = datetime(int(year), int(month), int(day), hour, minute, second)
            except ValueError:  # digits that are no time
                continue
            if time.year in YEARS:
                return time
    return None


def exif_time(path: Path) -> datetime | None:
    """EXIF's DateTimeOriginal, in the camera's local time; None for one that is missing or damaged."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            text = image.getexif().get_ifd(EXIF).get(ORIGINAL)
        time = datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except Exception:  # damaged EXIF data raise many types
        return None
    return time if time.year in YEARS else None
