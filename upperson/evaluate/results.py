"""The results of a model on a split, used by training, evaluation, checkpoints and tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upperson.config import SELECTIONS
from upperson.errors import RunError
from upperson.files import parse_json, read_text, write_atomically

RESULTS, TABLE = "results.json", "results.md"
METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")

Metrics = dict[str, float]  # percent, by METRICS


@dataclass(frozen=True)
class Results:
    """The results of a model on a split. Fields that do not apply are None or empty."""

    method: str  # title of the method
    model: str  # the backbone, as in --model
    trained_on: str  # data set, or "folder PATH"
    evaluated_on: str
    split: str
    captions: int
    images: int
    text_to_image: Metrics
    image_to_text: Metrics | None = None
    selection: str | None = None  # selection of the epoch, a key of SELECTIONS
    epoch: int | None = None
    epochs: int | None = None
    loss: float | None = None  # training loss, mean over the epoch
    losses: str | None = None
    seed: int | None = None
    trained: Mapping[str, int] = dataclasses.field(default_factory=dict)  # number of trained parameters by kind
    all_parameters: int | None = None
    zero_shot: Metrics | None = None  # text → image, of zero-shot CLIP
    start: Metrics | None = None  # text → image, of the starting checkpoint
    checkpoint: str | None = None
    precision: str | None = None
    stage: str | None = None  # name of the stage, if a training has several
    title: str | None = None  # title of the stage
    stages: tuple[Results, ...] = ()

    @property
    def trained_parameters(self) -> int:
        return sum(self.trained.values())

    @property
    def domain(self) -> str:
        return "in-domain" if self.trained_on == self.evaluated_on else "cross-domain"

    @property
    def selection_meaning(self) -> str | None:
        return None if self.selection is None else SELECTIONS[self.selection]

    def replace(self, **changes: Any) -> Results:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields that apply, and the properties, for readers of the file."""
        derived = {
            "trained_parameters": self.trained_parameters,
            "domain": self.domain,
            "selection_meaning": self.selection_meaning,
        }
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["stages"] = [stage.to_dict() for stage in self.stages] or None
        return {name: value for name, value in (fields | derived).items() if value is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Results:
        """The inverse of to_dict. Raises ValueError for missing and unknown fields."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = [name for name, field in known.items() if field.default is field.default_factory]
        missing = [name for name in required if name not in content]
        unknown = content.keys() - known.keys() - {"trained_parameters", "domain", "selection_meaning"}
        if missing or unknown:
            raise ValueError(
                f"expected the fields {', '.join(required)}; missing: {', '.join(missing) or 'none'}; unknown: "
                f"{', '.join(sorted(unknown)) or 'none'}"
            )
        values = {name: value for name, value in content.items() if name in known}
        values["stages"] = tuple(cls.from_dict(stage) for stage in content.get("stages", ()))
        return cls(**values)

    def write(self, path: Path) -> None:
        """Writes the results as JSON. Raises OSError."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads results. Raises RunError with the path for a file that `write` did not write."""
        try:
            return cls.from_dict(parse_json(read_text(path)))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{path}: expected results of this version ({error}); delete the file and run the command again"
            ) from error
