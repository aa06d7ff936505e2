"""CUHK-PEDES, ICFG-PEDES and RSTPReid, from the files as their authors distribute them.

One JSON list, an entry an image: {"split": "train", "id": 5, "file_path": "CUHK01/0363004.png", "captions":
["A pedestrian ...", ...]}, and all images under imgs/. RSTPReid calls the path img_path.
"""

from pathlib import Path

from upperson.data.annotations import Annotation, entries, find_folder, load_json
from upperson.errors import DataError

IMAGE_FOLDER = "imgs"


def read_pedestrian(title: str, root: Path, *, annotation: str, path_key: str) -> tuple[str, list[Annotation]]:
    """The annotation file's name, for errors, and what it says in its order. Raises DataError."""
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
            identity=entry.get("id", int),
        )
        for entry in entries(load_json(file), str(file))
    ]
