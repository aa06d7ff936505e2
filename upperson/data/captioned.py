"""Flickr30k and MSCOCO in Karpathy's splits, from either of the two common formats.

Karpathy's own, one file:    {"images": [{"split": "restval", "filepath": "val2014", "filename": "COCO_....jpg",
                              "sentences": [{"raw": "A man ..."}, ...]}, ...]}; Flickr30k has no filepath
Flat lists, one a split:     [{"image": "val2014/COCO_....jpg", "caption": "A man ..." or ["A man ...", ...]}, ...]

These data sets have no identities: every image has its own identity.
"""

from collections.abc import Sequence
from pathlib import Path, PurePath

from upperson.data.annotations import SPLITS, Annotation, Entry, as_entry, entries, find_folder, load_json
from upperson.errors import DataError

# MSCOCO's "restval" holds the remaining images of its validation set; they are commonly used for training.
KARPATHY_SPLITS = (*SPLITS, "restval")


def read_captioned(
    title: str, root: Path, *, karpathy: str, flat: str, image_folders: Sequence[str], filepath: bool
) -> tuple[str, list[Annotation]]:
    """The name of the annotation file, for errors, and its annotations in order. Raises DataError.

    Args:
        title: name of the data set.
        root: the data set's folder, or the folder above it.
        karpathy: name of Karpathy's file, which is preferred to the flat lists.
        flat: name of the flat lists, with {split} in it.
        image_folders: folders that may lie between the root and the images.
        filepath: whether Karpathy's entries have the field "filepath".
    """
    lists = {split: flat.format(split=split) for split in SPLITS}
    folder = find_folder(title, root, [karpathy, *lists.values()])
    file = folder / karpathy
    if file.is_file():
        source = str(file)
        annotations = _read_karpathy(file, filepath)
    else:
        source = str(folder / flat.format(split="{train,val,test}"))
        files = {split: folder / name for split, name in lists.items() if (folder / name).is_file()}
        annotations = [annotation for split, file in files.items() for annotation in _read_flat(file, split)]
    if not annotations:
        return source, []
    images = _image_root(title, folder, annotations[0][1], image_folders)
    return source, [Annotation(split, images / path, captions, None) for split, path, captions in annotations]


def _read_karpathy(file: Path, filepath: bool) -> list[tuple[str, str, list[str]]]:
    annotations = []
    listed = as_entry(load_json(file), str(file)).get("images", list)
    for entry in entries(listed, str(file)):
        split = entry.split(KARPATHY_SPLITS)
        path = entry.path("filename")
        if filepath:
            path = f"{entry.path('filepath')}/{path}"
        annotations.append(("train" if split == "restval" else split, path, _sentences(entry)))
    return annotations


def _sentences(entry: Entry) -> list[str]:
    sentences = entry.get("sentences", list)
    if not sentences:
        raise entry.error("sentences", "expected at least one sentence, found an empty list")
    where = f"{entry.where}, field 'sentences', sentence"
    return [as_entry(sentence, f"{where} {index}").caption("raw") for index, sentence in enumerate(sentences)]


def _read_flat(file: Path, split: str) -> list[tuple[str, str, list[str]]]:
    annotations = []
    for entry in entries(load_json(file), str(file)):
        single = isinstance(entry.get("caption", str, list), str)
        annotations.append(
            (split, entry.path("image"), [entry.caption("caption")] if single else entry.captions("caption"))
        )
    return annotations


def _image_root(title: str, folder: Path, path: str, image_folders: Sequence[str]) -> Path:
    """The folder that the paths are relative to, found from the first path only, without a look at every image."""
    top = PurePath(path).parts[0] if len(PurePath(path).parts) > 1 else ""
    roots = [folder / name for name in (["", *image_folders] if top else image_folders)]
    for root in roots:
        if (root / top).is_dir():
            return root
    raise DataError(f"{title}: image folder not found; looked for {', '.join(str(root / top) for root in roots)}")
