"""How far a run is, and how long it will still take."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run stands, and what it has found so far."""

    epoch: int = 1  # the one that is being trained, or next
    batch: int = 0  # batches of it that are done
    step: int = 0  # optimizer steps in all
    loss_sum: float = 0.0  # over the batches of this epoch
    zero_shot: dict[str, float] = field(default_factory=dict)  # on the test split
    start: dict[str, float] | None = None  # on the test split, of the checkpoint that the training started from
    zero_shot_top: list[list[int]] = field(default_factory=list)  # images that the queries of the picture find
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one evaluation an epoch, 0: before the first
    log_bytes: int = 0  # length of metrics.jsonl


class Clock:
    """The pace of this process, which begins, or goes on, when so many epochs are done."""

    def __init__(self, epochs_done: float):
        self.started, self.done_before = time.monotonic(), epochs_done

    def time_left(self, epochs_done: float, epochs: int) -> str:
        """Until all epochs are done, in words."""
        pace = (time.monotonic() - self.started) / (epochs_done - self.done_before)
        seconds = pace * (epochs - epochs_done)
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
