"""Ctrl-C and SIGTERM stop a run at a point from which it can continue, the same one in all its processes."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from upperson.machine import SINGLE_PROCESS, Group

Batch = TypeVar("Batch")


class Interruption:
    """A context in which the first Ctrl-C or SIGTERM is a request to stop at a step's end; a second one acts as usual.

    A request may reach the processes of `group` at different steps, or a single process. They stop when all of them
    know of the request; see `asked`.
    """

    def __init__(self, group: Group = SINGLE_PROCESS) -> None:
        self.group = group
        self.requested = False  # of this process
        self.agreed = False  # by all
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # handlers can be set there alone
            self.previous = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number: int, _: Any) -> None:
        if os.getpid() != self.process:  # a loader's process inherits the handler; the run stops it
            return
        self.requested = True
        signal.signal(number, self.previous[number])
        if self.group.is_main:
            os.write(2, b"\nstopping as soon as this step or evaluation is done; once more: stop at once\n")

    def asked(self, device: torch.device) -> Tensor:
        """1 if any process was asked to stop, else 0: a scalar on `device`, the same on all processes.

        The caller sets `agreed` from it where all processes are at the same point.
        """
        return self.group.largest(torch.full((), float(self.requested), device=device))

    def pass_on(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches until a stop is agreed."""
        iterator = iter(batches)
        while not self.agreed:
            try:
                yield next(iterator)
            except StopIteration:
                return
            except RuntimeError:  # Ctrl-C also reaches the loader's processes, and may end them
                if not self.requested or self.group.world_size > 1:
                    raise
                self.agreed = True
