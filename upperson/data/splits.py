"""The splits of the data set that a configuration names, drawn or read."""

from collections.abc import Sequence

from upperson.errors import DataError
from upperson.config import DataConfig
from upperson.data import Sample, read_dataset
from upperson.embedded import read_embedded, read_scenes


def read_splits(data: DataConfig, need: Sequence[str] = ("train", "test")) -> dict[str, list[Sample]]:
    """Samples by split: "train", "val" and "test", as far as the data set has them.

    Raises DataError, also where a split of `need` is missing.
    """
    sizes = dict(zip(("train", "val", "test"), data.embedded_identities, strict=True))
    night = data.dataset.endswith("-night")
    if data.dataset in ("embedded", "embedded-night"):
        return read_embedded(data.embedded_seed, **sizes, views=data.embedded_views, night=night)
    if data.dataset in ("embedded-scenes", "embedded-scenes-night"):
        return read_scenes(data.embedded_seed, **sizes, night=night)
    if data.data_root is None:
        raise DataError(f"data_root: {data.dataset} is read from a folder; name it with --data-root")
    return read_dataset(data.dataset, data.data_root, need)
