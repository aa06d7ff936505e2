"""The progress of a run: finished epochs and time left."""

import math
import time
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

from upperson.evaluate.results import METRICS


@dataclass
class Progress:
    """The position of a run, and its results so far."""

    epoch: int = 1  # the current or next epoch
    batch: int = 0  # finished batches of this epoch
    step: int = 0  # all optimizer steps
    loss_sum: float = 0.0  # over the finished batches of this epoch
    zero_shot: dict[str, float] = field(default_factory=dict)  # on the test split
    start: dict[str, float] | None = None  # on the test split, of the starting checkpoint
    zero_shot_top: list[list[int]] = field(default_factory=list)  # images found by the queries of the picture
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one evaluation for each epoch, from epoch 0 on
    log_bytes: int = 0  # length of metrics.jsonl

    def check(self, epochs: int, batches: int) -> None:
        """Raises ValueError with the field for a position that a training of these epochs and batches never has."""
        tops = self.zero_shot_top
        fits = {
            "epoch": lambda: _whole(self.epoch, 1, epochs + 1),
            "batch": lambda: _whole(self.batch, 0, batches - 1 if self.epoch <= epochs else 0),
            "step": lambda: type(self.step) is int and self.step == (self.epoch - 1) * batches + self.batch,
            "loss_sum": lambda: _finite(self.loss_sum),
            "zero_shot": lambda: self.zero_shot == {} or _metrics(self.zero_shot),
            "start": lambda: self.start is None or _metrics(self.start),
            "zero_shot_top": lambda: isinstance(tops, list) and all(_whole(i, 0, 2**63) for top in tops for i in top),
            "best_epoch": lambda: _whole(self.best_epoch, min(1, self.epoch - 1), self.epoch - 1),
            "history": lambda: (
                [entry["epoch"] for entry in self.history] == list(range(self.epoch))
                and all(_metrics(entry) and (not entry["epoch"] or _finite(entry["loss"])) for entry in self.history)
            ),
            "log_bytes": lambda: _whole(self.log_bytes, 0, 2**63),
        }
        for name, fit in fits.items():
            try:
                fitting = fit()
            except (LookupError, TypeError):
                fitting = False
            if not fitting:
                raise ValueError(f"the field {name!r} of its progress is {short(getattr(self, name))}")


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _metrics(values: Any) -> bool:
    return all(_finite(values[name]) and 0 <= values[name] <= 100 for name in METRICS)


class Clock:
    """Measures the pace of this process from its start, when `epochs_done` epochs are finished."""

    def __init__(self, epochs_done: float):
        self.started, self.done_before = time.monotonic(), epochs_done

    def time_left(self, epochs_done: float, epochs: int) -> str:
        """The time until all epochs are finished, as text."""
        pace = (time.monotonic() - self.started) / (epochs_done - self.done_before)
        seconds = pace * (epochs - epochs_done)
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
