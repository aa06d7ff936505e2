"""CUHK-PEDES, ICFG-PEDES and RSTPReid, in the file formats of their authors.

The annotations are a JSON list with one entry per image: {"split": "train", "id": 5, "file_path": "CUHK01/0363004.png",
"captions": ["A pedestrian ...", ...]}. All images are under imgs/. RSTPReid names the path img_path.
"""

from pathlib import Path

from upperson.data.annotations import Annotation, entries, find_folder, load_json
from upperson.errors import DataError

IMAGE_FOLDER = "imgs"


def read_pedestrian(title: str, root: Path, *, annotation: str, path_key: str) -> tuple[str, list[Annotation]]:
    """The name of the annotation file, for errors, and its annotations in order. Raises DataError."""
    folder = find_folder(title, root, [annotation])
    images = folder / IMAGE_FOLDER
    if not images.is_dir():
        raise DataError(f"{title}: image folder {images} does not exist")
    file = folder / annotation
    return str(file), [
        Annotation(
            split=entry.split(),
            image=images / entry.path(path_key),
            captions=entry.captions("captions"),
            identity=entry.person_id("id"),
        )
        for entry in entries(load_json(file), str(file))
    ]
