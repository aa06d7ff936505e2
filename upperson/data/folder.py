"""A user's own data: a CSV file with a header, or a file of JSON lines.

Columns or keys: image (a path, absolute or relative to the file's folder), caption (one per line), identity (a string
or a number, the same for all images of a person) and, for training, split (train, val or test).
"""

import csv
import difflib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from reprlib import repr as short

from upperson.data.annotations import Annotation, Entry, as_entry, json_of, listed, load_text, missing_in
from upperson.errors import DataError

NAMES = ("captions.csv", "captions.jsonl")
COLUMNS = ("image", "caption", "identity")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # of other programs' CSV
MISSING = ("nan", "NaN", "NAN", "<NA>", "NaT", "None", "null", "NULL", "N/A", "#N/A")  # as pandas and others write it
EXACT = 2**53  # from this size on, different whole numbers may be the same float64


def read_folder(title: str, root: Path) -> tuple[str, list[Annotation]]:
    """The name of the annotation file, for errors, and its annotations in order. Raises DataError.

    `root` is the file, or a folder that contains one of NAMES. If no line has a split, all lines belong to "test".
    Identities keep their names; their ids count from 0 in the order of appearance.
    """
    file = _find(title, root)
    lines = list(_csv_lines(file) if file.suffix == ".csv" else _json_lines(file))
    with_split = any("split" in entry.values for entry in lines)
    if not with_split:  # of a CSV file, the header has been checked
        names = {name: entry for entry in lines for name in entry.values}
        for name, entry in names.items():
            _refuse_misspelt_split([name], entry.where, entry.noun)
    ids: dict[str, int] = {}
    annotations = []
    for entry in lines:
        name = _identity(entry)
        annotations.append(
            Annotation(
                split=entry.split() if with_split else "test",
                image=file.parent / entry.path("image"),
                captions=[_caption(entry)],
                identity=ids.setdefault(name, len(ids)),
                name=name,
            )
        )
    return str(file), annotations


def _find(title: str, root: Path) -> Path:
    if root.exists() and not root.is_dir():
        if root.suffix not in (".csv", ".jsonl"):
            raise DataError(f"{title}: expected a file whose name ends in .csv or .jsonl, found {root}")
        return root
    found = [root / name for name in NAMES if (root / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{title}: expected one annotation file, found both {found[0]} and {found[1]}; give the path of one"
        )
    raise DataError(f"{title}: {missing_in(root)}; looked for {root / NAMES[0]} and {root / NAMES[1]}")


def _csv_lines(file: Path) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(load_text(file)), skipinitialspace=True, strict=True)
    header: list[str] | None = None
    line = 1  # the first line of a row; a quoted caption may span several lines
    try:
        for row in rows:
            where = f"{file}, line {line}"
            if header is None:
                header = _checked_header(row, where)
            elif row:  # an empty line is an empty row
                if len(row) != len(header):
                    raise DataError(
                        f"{where}: expected {len(header)} columns as in the header, found {len(row)}; a value with a "
                        "comma needs double quotes"
                    )
                yield Entry(dict(zip(header, row, strict=True)), where, "column")
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {line}: invalid CSV: {error}") from error


def _checked_header(row: list[str], where: str) -> list[str]:
    header = [name.strip() for name in row]
    found = listed(header)
    for name in COLUMNS:
        if name not in header:
            other = next((words for mark, words in SEPARATORS.items() if mark in "".join(header)), None)
            advice = f"; the columns seem to be separated by {other}, and commas are expected" if other else ""
            raise DataError(f"{where}: expected a column {name!r} in the header, found the columns {found}{advice}")
    if len(set(header)) < len(header):
        raise DataError(f"{where}: expected different names in the header, found the columns {found}")
    if "split" not in header:
        _refuse_misspelt_split(header, where, "column")
    return header


def _json_lines(file: Path) -> Iterator[Entry]:
    for number, line in enumerate(load_text(file).split("\n"), start=1):
        where = f"{file}, line {number}"
        if line.strip():
            yield as_entry(json_of(line, where), where)


def _refuse_misspelt_split(names: Iterable[str], where: str, noun: str) -> None:
    """Raises DataError for a name such as Split or splits, by which all lines would silently be of the test split."""
    for name in names:
        if "split" in name.casefold() or difflib.get_close_matches(name.casefold(), ["split"], cutoff=0.8):
            raise DataError(f"{where}: expected the {noun} 'split', found the {noun} {short(name)}")


def _caption(entry: Entry) -> str:
    caption = entry.caption("caption")
    if caption.strip() in MISSING:
        raise entry.error("caption", f"expected text, found {caption!r}, which stands for a missing value")
    return caption


def _identity(entry: Entry) -> str:
    """The name. 7 and 7.0 are one name: programs write whole numbers as 7.0 where a value of the column is missing."""
    identity = entry.get("identity", str, int, float)
    if isinstance(identity, float) and identity.is_integer():
        if abs(identity) >= EXACT:
            raise entry.error("identity", f"expected a name or an exact number, found the rounded number {identity}")
        identity = int(identity)
    name = str(identity).strip()
    if not name:
        raise entry.error("identity", "expected a name or a number, found an empty string")
    if name in MISSING:
        raise entry.error("identity", f"expected a name or a number, found {name!r}, which stands for a missing value")
    if "\0" in name:
        raise entry.error("identity", f"expected a name or a number, found a NUL character in {short(name)}")
    return name
