"""Checks of a data set without its images: its size, and suspicious entries."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from upperson.data.samples import Sample


@dataclass(frozen=True)
class Counts:
    """The size of one split."""

    identities: int
    images: int
    captions: int

    def __str__(self) -> str:
        return f"{self.identities} identities, {self.images} images, {self.captions} captions"


def counts(samples: Sequence[Sample]) -> Counts:
    identities = {sample.person_id for sample in samples}
    images = {sample.image_id for sample in samples}
    return Counts(len(identities), len(images), len(samples))


def identities_in_train(splits: dict[str, list[Sample]]) -> dict[str, list[int]]:
    """For each split but "train", the identities that are also in "train", in rising order."""
    train = {sample.person_id for sample in splits.get("train", [])}
    return {
        split: sorted(train & {sample.person_id for sample in samples})
        for split, samples in splits.items()
        if split != "train"
    }


def images_of_several(samples: Iterable[Sample]) -> list[tuple[Sample, list[int]]]:
    """The images with several identities: the first sample of each, and its identities in order of appearance."""
    first: dict[int, Sample] = {}
    identities: dict[int, dict[int, None]] = {}
    for sample in samples:
        first.setdefault(sample.image_id, sample)
        identities.setdefault(sample.image_id, {})[sample.person_id] = None
    return [(first[image_id], list(found)) for image_id, found in identities.items() if len(found) > 1]


def all_samples(splits: dict[str, list[Sample]]) -> Iterable[Sample]:
    return chain.from_iterable(splits.values())
