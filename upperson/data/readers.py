"""Reads a data set by its name, checks that it is complete, and warns of suspicious entries."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from upperson.data.annotations import SPLITS, Annotation
from upperson.data.captioned import read_captioned
from upperson.data.folder import read_folder
from upperson.data.oddities import Counts, all_samples, counts, identities_in_train, images_of_several
from upperson.data.pedestrian import read_pedestrian
from upperson.data.samples import Sample, names_of
from upperson.errors import DataError
from upperson.files import expanded


@dataclass(frozen=True)
class DataSet:
    """The reader of a data set, and its published size."""

    title: str  # also the name of the data set's folder
    read: Callable[[str, Path], tuple[str, list[Annotation]]]  # title, root -> name of the file, annotations
    published: dict[str, Counts] = field(default_factory=dict)
    split_advice: str = ""  # end of the error about a missing split


DATASETS = {
    "cuhk-pedes": DataSet(
        "CUHK-PEDES",
        partial(read_pedestrian, annotation="reid_raw.json", path_key="file_path"),
        {
            "train": Counts(11003, 34054, 68126),
            "val": Counts(1000, 3078, 6158),
            "test": Counts(1000, 3074, 6156),
        },
    ),
    "icfg-pedes": DataSet(
        "ICFG-PEDES",
        partial(read_pedestrian, annotation="ICFG-PEDES.json", path_key="file_path"),
        {"train": Counts(3102, 34674, 34674), "test": Counts(1000, 19848, 19848)},
    ),
    "rstpreid": DataSet(
        "RSTPReid",
        partial(read_pedestrian, annotation="data_captions.json", path_key="img_path"),
        {
            "train": Counts(3701, 18505, 37010),
            "val": Counts(200, 1000, 2000),
            "test": Counts(200, 1000, 2000),
        },
    ),
    "flickr30k": DataSet(
        "Flickr30k",
        partial(
            read_captioned,
            karpathy="dataset_flickr30k.json",
            flat="flickr30k_{split}.json",
            image_folders=("flickr30k-images", "flickr30k_images", "imgs", "images"),
            filepath=False,
        ),
        {
            "train": Counts(29000, 29000, 145000),
            "val": Counts(1014, 1014, 5070),
            "test": Counts(1000, 1000, 5000),
        },
    ),
    "mscoco": DataSet(
        "MSCOCO",
        partial(
            read_captioned,
            karpathy="dataset_coco.json",
            flat="coco_karpathy_{split}.json",
            image_folders=("images", "imgs"),
            filepath=True,
        ),
        {
            "train": Counts(113287, 113287, 566747),
            "val": Counts(5000, 5000, 25010),
            "test": Counts(5000, 5000, 25010),
        },
    ),
    "folder": DataSet(
        "Own data",
        read_folder,
        split_advice="; add 'split' with train, val or test to every line (without it all lines are test)",
    ),
}


def read_dataset(name: str, root: str | Path, need: Sequence[str] = ("train", "test")) -> dict[str, list[Sample]]:
    """Reads one of DATASETS. `upperson.data.pedestrian`, `captioned` and `folder` describe the file formats.

    `root` is the data set's own folder or the folder above it (root/CUHK-PEDES, root/Flickr30k, ...). For "folder",
    `root` is the folder or the file. Returns the samples of each existing split of "train", "val" and "test": one
    sample per caption, in the order of the file. Image files are not opened; see `check_images`.

    Raises DataError with the file, the entry (counted from 0; for "folder" the line, counted from 1) and the invalid
    field, and DataError for a missing split of `need`. Warns if the size of a split differs from the published one, if
    an identity of val or test is also in train, and if one image is listed under two identities.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: expected one of {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    try:
        source, annotations = dataset.read(dataset.title, expanded(Path(root)))
    except OSError as error:  # of a path that is too long or not permitted
        raise DataError(f"{dataset.title}: {error.filename} cannot be read ({error.strerror})") from error
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    image_ids: dict[Path, int] = {}
    for annotation in annotations:
        image_id = image_ids.setdefault(annotation.image, len(image_ids))
        person_id = image_id if annotation.identity is None else annotation.identity
        splits[annotation.split] += [
            Sample(annotation.image, caption, person_id, image_id, annotation.name) for caption in annotation.captions
        ]
    for split in need:
        if not splits[split]:
            raise DataError(f"{source}: no entry of split {split!r}, expected at least one{dataset.split_advice}")
    splits = {split: samples for split, samples in splits.items() if samples}
    if not splits:
        raise DataError(f"{source}: no entry, expected at least one")
    _warn_of_oddities(dataset, splits)
    return splits


def _warn_of_oddities(dataset: DataSet, splits: dict[str, list[Sample]]) -> None:
    names = names_of(list(all_samples(splits)))
    for split, published in dataset.published.items():
        found = counts(splits.get(split, []))
        if found != published:
            _warn(f"{dataset.title}, split {split!r}: found {found}; published are {published}")
    for split, shared in identities_in_train(splits).items():
        if shared:
            _warn(
                f"{dataset.title}, split {split!r}: {len(shared)} identities are also in split 'train', the first is "
                f"{names[shared[0]]}. Unless ids restart in every split, the results are not on unseen people"
            )
    several = images_of_several(all_samples(splits))
    if several:
        sample, identities = several[0]
        _warn(
            f"{dataset.title}: image {sample.image} is listed under the identities {names[identities[0]]} and "
            f"{names[identities[1]]}; {len(several)} images have several identities"
        )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # the caller of read_dataset
