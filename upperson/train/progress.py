"""The progress of a run: finished epochs and time left."""

import time
from dataclasses import dataclass, field
from typing import Any


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


class Clock:
    """Measures the pace of this process from its start, when `epochs_done` epochs are finished."""

    def __init__(self, epochs_done: float):
        self.started, self.done_before = time.monotonic(), epochs_done

    def time_left(self, epochs_done: float, epochs: int) -> str:
        """The time until all epochs are finished, as text."""
        pace = (time.monotonic() - self.started) / (epochs_done - self.done_before)
        seconds = pace * (epochs - epochs_done)
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
