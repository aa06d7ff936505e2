"""Boxes of people that a detector found: a CSV file with a header and the columns path, x, y, width, height, frame.

A path is relative to the folder of the CSV file, as in the data sets. Numbers are whole pixels of the upright image; x
and y are the left upper corner. The frame is the number of a video's frame, from 0, and empty or missing for an image.
"""

import csv
import io
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from upperson.errors import DataError
from upperson.files import read_text
from upperson.search.media import absolute, is_video

COLUMNS = ("path", "x", "y", "width", "height", "frame")
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Box:
    """A person in an image."""

    x: int
    y: int
    width: int
    height: int
    frame: int | None  # of a video, from 0
    place: str  # the file and line, for errors

    @property
    def corners(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.x + self.width, self.y + self.height

    def require_within(self, size: tuple[int, int]) -> None:
        """Raises DataError for a box that is not within an image of this width and height."""
        width, height = size
        if self.x + self.width > width or self.y + self.height > height:
            raise DataError(
                f"{self.place}: the box ends at ({self.x + self.width}, {self.y + self.height}), outside of the "
                f"image of {width} × {height} pixels"
            )


def read_boxes(file: Path) -> dict[Path, list[Box]]:
    """The boxes of each path, in the order of the file.

    Raises DataError with line and field for missing and unknown columns, numbers that are not whole or not in range,
    paths that do not exist, a missing or needless frame, and a box that stands twice; and OSError.
    """
    try:
        rows = csv.reader(io.StringIO(read_text(file)), strict=True)
        header = [name.strip() for name in next(rows, [])]
        check_header(file, header)
        boxes: dict[Path, list[Box]] = {}
        seen: set[tuple[Path, Box]] = set()
        for row in rows:
            if row:
                path, box = parsed(file, rows.line_num, header, row)
                same = path, replace(box, place="")
                if same in seen:
                    raise DataError(f"{box.place}: the box of {path} stands twice")
                seen.add(same)
                boxes.setdefault(path, []).append(box)
    except csv.Error as error:
        raise DataError(f"{file} line {rows.line_num}: not CSV ({error})") from error
    except DataError:
        raise
    except ValueError as error:  # the encoding
        raise DataError(f"{file}: {error}") from error
    if not boxes:
        raise DataError(f"{file}: no boxes; expected a line for each person")
    return boxes


def check_header(file: Path, header: Collection[str]) -> None:
    lacking = [name for name in COLUMNS[:-1] if name not in header]
    unknown = [name for name in header if name not in COLUMNS]
    if lacking or unknown or len(set(header)) < len(header):
        found = ",".join(header)[:200] or "none"
        raise DataError(
            f"{file} line 1: expected the columns {','.join(COLUMNS)} (frame may be missing), found {found}"
        )


def parsed(file: Path, line: int, header: list[str], row: list[str]) -> tuple[Path, Box]:
    place = f"{file} line {line}"
    if len(row) != len(header):
        raise DataError(f"{place}: expected {len(header)} fields, found {len(row)}")
    fields = {name: text.strip() for name, text in zip(header, row, strict=True)}
    x, y = (number(place, name, fields[name], 0) for name in ("x", "y"))
    width, height = (number(place, name, fields[name], 1) for name in ("width", "height"))
    if not fields["path"]:
        raise DataError(f"{place}, field path: empty; expected the path of an image or video")
    try:
        path = absolute(file.absolute().parent / fields["path"])
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, NUL, an unknown user after ~
        raise DataError(f"{place}, field path: {fields['path'][:60]!r} cannot be a path") from error
    if not exists:
        raise DataError(f"{place}, field path: {path} does not exist, or is not a file")
    text = fields.get("frame", "")
    if bool(text) != is_video(path):
        kind, expected = ("image", "no frame") if text else ("video", "the number of a frame")
        raise DataError(f"{place}, field frame: {text or 'empty'} for the {kind} {path}; expected {expected}")
    frame = number(place, "frame", text, 0) if text else None
    return path, Box(x, y, width, height, frame, place)


def number(place: str, name: str, text: str, least: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= LARGEST:
        raise DataError(f"{place}, field {name}: {text[:60]!r}; expected a whole number from {least} to {LARGEST:,}")
    return int(text)
