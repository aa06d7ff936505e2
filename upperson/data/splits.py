"""The splits of the data set of a configuration, synthetic or read from files."""

from collections.abc import Sequence

from upperson.config import DataConfig
from upperson.data.readers import read_dataset
from upperson.data.samples import Sample
from upperson.embedded.dataset import read_embedded, read_scenes
from upperson.errors import DataError


def read_splits(data: DataConfig, need: Sequence[str] = ("train", "test")) -> dict[str, list[Sample]]:
    """The samples of each existing split of "train", "val" and "test".

    Raises DataError for invalid data and for a missing split of `need`.
    """
    if not data.is_synthetic:
        if data.data_root is None:
            raise DataError(f"data_root: {data.dataset} is read from a folder; set it with --data-root")
        return read_dataset(data.dataset, data.data_root, need)
    sizes = dict(zip(("train", "val", "test"), data.embedded_identities, strict=True))
    night = data.dataset.endswith("-night")
    if data.dataset in ("embedded", "embedded-night"):
        splits = read_embedded(data.embedded_seed, **sizes, views=data.embedded_views, night=night)
    else:
        splits = read_scenes(data.embedded_seed, **sizes, night=night)
    return {split: [Sample(*sample) for sample in samples] for split, samples in splits.items()}
