"""Readers of CUHK-PEDES, ICFG-PEDES and RSTPReid, from the files as their authors distribute them."""

import html
import json
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from upperson.data.samples import DataError, Sample

SPLITS = ("train", "val", "test")
REQUIRED_SPLITS = ("train", "test")
IMAGE_FOLDER = "imgs"

# More than this is a mistake in the file, not a description of a person. What is shorter, but exceeds the 77
# tokens of CLIP, is accepted: the tokenizer cuts it there, as CLIP does.
MAX_CAPTION_CHARACTERS = 5000

# These would become real control tokens, in OpenAI's or in open_clip's spelling, and end the caption early.
CONTROL_TOKEN = re.compile(r"<\|(startoftext|endoftext|mask)\|>|<(start|end)_of_text>", re.IGNORECASE)


@dataclass(frozen=True)
class Counts:
    """The size of one split."""

    identities: int
    images: int
    captions: int

    def __str__(self) -> str:
        return f"{self.identities} identities, {self.images} images, {self.captions} captions"


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps what. All entries have id, captions and split; all images are under imgs/."""

    title: str  # also the name of its own folder
    annotation: str
    path_key: str
    published: dict[str, Counts]


DATASETS = {
    "cuhk-pedes": Layout(
        "CUHK-PEDES",
        "reid_raw.json",
        "file_path",
        {
            "train": Counts(11003, 34054, 68126),
            "val": Counts(1000, 3078, 6158),
            "test": Counts(1000, 3074, 6156),
        },
    ),
    "icfg-pedes": Layout(
        "ICFG-PEDES",
        "ICFG-PEDES.json",
        "file_path",
        {"train": Counts(3102, 34674, 34674), "test": Counts(1000, 19848, 19848)},
    ),
    "rstpreid": Layout(
        "RSTPReid",
        "data_captions.json",
        "img_path",
        {
            "train": Counts(3701, 18505, 37010),
            "val": Counts(200, 1000, 2000),
            "test": Counts(200, 1000, 2000),
        },
    ),
}


def read_dataset(name: str, root: str | Path) -> dict[str, list[Sample]]:
    """Reads "cuhk-pedes", "icfg-pedes" or "rstpreid".

    `root` is the data set's own folder or the one above it (root/CUHK-PEDES, root/ICFG-PEDES, root/RSTPReid).
    Returns the samples of "train", "test" and, where the file has entries of it, "val": one sample a caption,
    in the order of the file. Image files are not opened; `check_images` does that.

    Raises DataError naming the file, the entry (counted from 0) and the field that is wrong. Warns when a
    split differs in size from the published one, when an identity of val or test is in train as well, and
    when one image is listed under two identities.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: expected one of {', '.join(DATASETS)}")
    layout = DATASETS[name]
    folder = _find(layout, Path(root).expanduser())
    file = folder / layout.annotation
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    image_ids: dict[Path, int] = {}
    for number, entry in enumerate(_load(file)):
        where = f"{file}, entry {number}"
        split, path, person_id, captions = _parse(entry, layout, where)
        image = folder / IMAGE_FOLDER / path
        image_id = image_ids.setdefault(image, len(image_ids))
        splits[split] += [Sample(image, caption, person_id, image_id) for caption in captions]
    for split in REQUIRED_SPLITS:
        if not splits[split]:
            raise DataError(f"{file}: no entry of split {split!r}, expected at least one")
    splits = {split: samples for split, samples in splits.items() if samples}
    _warn_of_oddities(layout, splits)
    return splits


def _find(layout: Layout, root: Path) -> Path:
    """The folder that holds the annotation file and the images."""
    candidates = (root, root / layout.title)
    for folder in candidates:
        if (folder / layout.annotation).is_file():
            if not (folder / IMAGE_FOLDER).is_dir():
                raise DataError(f"{layout.title}: image folder {folder / IMAGE_FOLDER} does not exist")
            return folder
    looked_for = " and ".join(str(folder / layout.annotation) for folder in candidates)
    missing = "annotation file not found" if root.is_dir() else f"folder {root} does not exist"
    raise DataError(f"{layout.title}: {missing}; looked for {looked_for}")


def _load(file: Path) -> list[Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno} (character {error.pos} of {len(error.doc)})"
        raise DataError(f"{file}: not valid JSON, or cut off, at {position}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8 text, found byte {error.start} to be otherwise") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    if not isinstance(entries, list):
        raise DataError(f"{file}: expected a list of entries, found {_describe(entries)}")
    return entries


def _parse(entry: Any, layout: Layout, where: str) -> tuple[str, str, int, list[str]]:
    """split, image path, person id and captions of an entry, or a DataError that starts with `where`."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, found {_describe(entry)}")
    split = _field(entry, "split", str, where)
    if split not in SPLITS:
        raise DataError(f"{where}, field 'split': expected one of {', '.join(SPLITS)}, found {short(split)}")
    path = _field(entry, layout.path_key, str, where)
    if not path.strip():
        raise DataError(f"{where}, field {layout.path_key!r}: expected a path, found an empty string")
    captions = _field(entry, "captions", list, where)
    if not captions:
        raise DataError(f"{where}, field 'captions': expected at least one caption, found an empty list")
    for index, caption in enumerate(captions):
        problem = _caption_problem(caption)
        if problem:
            raise DataError(f"{where}, field 'captions', caption {index}: {problem}")
    return split, path, _field(entry, "id", int, where), captions


TYPE_NAMES = {str: "a string", int: "an integer", list: "a list", dict: "an object", float: "a number"}


def _field(entry: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in entry:
        found = ", ".join(map(repr, entry)) or "none"
        raise DataError(f"{where}: expected a field {key!r}, found the fields {found}")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):  # a bool is an int to isinstance
        raise DataError(f"{where}, field {key!r}: expected {TYPE_NAMES[kind]}, found {_describe(value)}")
    return value


def _describe(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{TYPE_NAMES[type(value)]}, {short(value)}"


def _caption_problem(caption: Any) -> str | None:
    if not isinstance(caption, str):
        return f"expected a string, found {_describe(caption)}"
    if not caption.strip():
        return f"expected text, found {'only white space' if caption else 'an empty string'}"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return f"expected at most {MAX_CAPTION_CHARACTERS} characters, found {len(caption)}"
    # The tokenizer undoes HTML escapes, twice, and full-width letters before it looks for control tokens.
    cleaned = unicodedata.normalize("NFKC", html.unescape(html.unescape(caption)))
    token = CONTROL_TOKEN.search(cleaned)
    return f"expected plain text, found the control token {token.group()}" if token else None


def _warn_of_oddities(layout: Layout, splits: dict[str, list[Sample]]) -> None:
    for split, published in layout.published.items():
        samples = splits.get(split, [])
        found = Counts(_distinct(samples, "person_id"), _distinct(samples, "image_id"), len(samples))
        if found != published:
            _warn(f"{layout.title}, split {split!r}: found {found}; published are {published}")

    train_ids = {sample.person_id for sample in splits["train"]}
    for split in [split for split in splits if split != "train"]:
        shared = sorted(train_ids & {sample.person_id for sample in splits[split]})
        if shared:
            _warn(
                f"{layout.title}, split {split!r}: {len(shared)} identities are in split 'train' too, first "
                f"{shared[0]}. Unless ids restart in every split, the results are not on unseen people"
            )

    first: dict[int, Sample] = {}
    for sample in (sample for samples in splits.values() for sample in samples):
        other = first.setdefault(sample.image_id, sample)
        if other.person_id != sample.person_id:
            _warn(
                f"{layout.title}: image {sample.image} is listed under the identities {other.person_id} and "
                f"{sample.person_id}; there may be more such images"
            )
            break


def _distinct(samples: Sequence[Sample], field: str) -> int:
    return len({getattr(sample, field) for sample in samples})


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # points at the caller of read_dataset
