"""A fingerprint of a data set, by which a resumed run notices that its data has changed.

For each split the fingerprint holds the number of captions, and hashes of captions, identities, image paths, file sizes
of images and the order. Paths are relative to the common folder of all images, since a data set may be moved. The
content of images is not read: an image of the same size in bytes is taken for the same one. Synthetic images follow
from the configuration alone.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from upperson.data.samples import Sample

Fingerprint = dict[str, dict[str, str | int]]  # by split, then by part

PARTS = ("images", "image sizes", "captions", "identities")


def fingerprint(splits: Mapping[str, Sequence[Sample]]) -> Fingerprint:
    """The fingerprint of all splits. A file that is missing has no size; no error is raised."""
    files = dict.fromkeys(
        sample.image for samples in splits.values() for sample in samples if isinstance(sample.image, Path)
    )
    absolute = {file: os.path.abspath(file) for file in files}
    start = os.path.commonprefix(list(absolute.values())).rfind(os.sep) + 1
    names = {file: path[start:] for file, path in absolute.items()}
    with ThreadPoolExecutor() as threads:  # each request to a network file system takes long
        sizes = dict(zip(files, threads.map(_size, files), strict=True))
    found: Fingerprint = {}
    for split, samples in splits.items():
        images = [(sample.image, sample.image_id) for sample in samples]
        parts = {
            "images": [names[image] if isinstance(image, Path) else number for image, number in images],
            "image sizes": [sizes[image] if isinstance(image, Path) else None for image, _ in images],
            "captions": [sample.caption for sample in samples],
            "identities": [(sample.person_id, sample.person) for sample in samples],
        }
        # An id may count from 0 in the order of the file; the name of a person does not depend on the order.
        rows = zip(*(parts[name] for name in PARTS[:3]), (sample.person for sample in samples), strict=True)
        found[split] = {
            "count": len(samples),
            "in any order": _digest(sorted(map(repr, rows))),
            **{part: _digest(map(repr, values)) for part, values in parts.items()},
        }
    return found


def data_differences(saved: Fingerprint, found: Fingerprint) -> list[str]:
    """What differs between two fingerprints, in words; empty for the same data."""
    differences = [f"split {split} is missing" for split in saved if split not in found]
    differences += [f"split {split} is new" for split in found if split not in saved]
    for split in (split for split in saved if split in found):
        before, now = saved[split], found[split]
        changed = [part for part in PARTS if before.get(part) != now[part]]
        if before.get("count") != now["count"]:
            differences.append(f"{split} has {now['count']} captions, not {before.get('count')}")
        elif changed and before.get("in any order") == now["in any order"]:
            differences.append(f"{split} has another order")
        elif changed:
            differences.append(f"{split} has other {', '.join(changed)}")
    return differences


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _digest(values: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(values).encode()).hexdigest()[:16]
