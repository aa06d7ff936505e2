"""What every data set is turned into: one `Sample` a caption."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image


class Drawing(Hashable, Protocol):
    """An image that is drawn instead of read, such as a frozen dataclass. Equal ones have equal pixels."""

    def draw(self) -> Image.Image:
        """The RGB image, always the same one."""


@dataclass(frozen=True)
class Sample:
    """One caption and the image it describes."""

    image: Path | Drawing
    caption: str
    person_id: int  # same person, same id, within one split; ids need not be contiguous
    image_id: int  # one an image, over all splits of a data set


def gallery(samples: Sequence[Sample]) -> tuple[list[Path | Drawing], torch.Tensor]:
    """The distinct images, in order of first appearance, and their person ids, [images] int64."""
    first: dict[int, Sample] = {}
    for sample in samples:
        first.setdefault(sample.image_id, sample)
    person_ids = [sample.person_id for sample in first.values()]
    return [sample.image for sample in first.values()], torch.tensor(person_ids, dtype=torch.int64)


def queries(samples: Sequence[Sample]) -> tuple[list[str], torch.Tensor]:
    """The captions, in order, and their person ids, [captions] int64."""
    person_ids = [sample.person_id for sample in samples]
    return [sample.caption for sample in samples], torch.tensor(person_ids, dtype=torch.int64)
