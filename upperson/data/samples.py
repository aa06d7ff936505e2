"""The common format of all data sets: one `Sample` per caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from upperson.embedded.drawing import Drawing


@dataclass(frozen=True)
class Sample:
    """One caption and the image it describes."""

    image: Path | Drawing
    caption: str
    person_id: int  # the same for all samples of a person in a split; ids need not be contiguous
    image_id: int  # unique for each image in all splits of a data set
    person_name: str | None = None  # the person's name in the user's own file; None: the id is the name

    @property
    def person(self) -> str | int:
        """The name of the person in the data set."""
        return self.person_id if self.person_name is None else self.person_name


def gallery(samples: Sequence[Sample]) -> tuple[list[Path | Drawing], torch.Tensor]:
    """The distinct images, in order of first appearance, and their person ids, (images,) int64."""
    first: dict[int, Sample] = {}
    for sample in samples:
        first.setdefault(sample.image_id, sample)
    person_ids = [sample.person_id for sample in first.values()]
    return [sample.image for sample in first.values()], torch.tensor(person_ids, dtype=torch.int64)


def queries(samples: Sequence[Sample]) -> tuple[list[str], torch.Tensor]:
    """The captions, in order, and their person ids, (captions,) int64."""
    person_ids = [sample.person_id for sample in samples]
    return [sample.caption for sample in samples], torch.tensor(person_ids, dtype=torch.int64)


def names_of(samples: Sequence[Sample]) -> dict[int, str | int]:
    """The name of each person by id."""
    return {sample.person_id: sample.person for sample in samples}
