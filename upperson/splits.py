"""The splits of the data set that a configuration names, drawn or read."""

from upperson.config import DataConfig
from upperson.data import DataError, Sample, read_dataset
from upperson.embedded import read_embedded


def read_splits(data: DataConfig) -> dict[str, list[Sample]]:
    """Samples by split: "train", "test" and, where the data set has one, "val". Raises DataError."""
    if data.dataset == "embedded":
        train, val, test = data.embedded_identities
        return read_embedded(data.embedded_seed, train=train, val=val, test=test, views=data.embedded_views)
    if data.data_root is None:
        raise DataError(f"data_root: {data.dataset} is read from a folder; name it with --data-root")
    return read_dataset(data.dataset, data.data_root)
