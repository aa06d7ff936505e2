"""The splits of the data set that a configuration names, synthetic or read from files."""

from collections.abc import Sequence

from upperson.config import DataConfig
from upperson.data.readers import read_dataset
from upperson.data.samples import Sample
from upperson.embedded.dataset import read_embedded, read_scenes
from upperson.errors import DataError


def read_splits(data: DataConfig, need: Sequence[str] = ("train", "test")) -> dict[str, list[Sample]]:
    """Samples by split: "train", "val" and "test", as far as the data set has them.

    Raises DataError, also where a split of `need` is missing.
    """
    if not data.is_drawn:
        if data.data_root is None:
            raise DataError(f"data_root: {data.dataset} is read from a folder; name it with --data-root")
        return read_dataset(data.dataset, data.data_root, need)
    sizes = dict(zip(("train", "val", "test"), data.embedded_identities, strict=True))
    night = data.dataset.endswith("-night")
    if data.dataset in ("embedded", "embedded-night"):
        drawn = read_embedded(data.embedded_seed, **sizes, views=data.embedded_views, night=night)
    else:
        drawn = read_scenes(data.embedded_seed, **sizes, night=night)
    return {split: [Sample(*drawing) for drawing in drawings] for split, drawings in drawn.items()}
