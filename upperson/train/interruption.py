"""Stops a run after Ctrl-C, SIGTERM or SIGHUP where the run can be resumed, at the same point in all processes."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from upperson.machine import SINGLE_PROCESS, Group

Batch = TypeVar("Batch")

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None)


class Interruption:
    """A context in which the first signal of SIGNALS requests a stop at the end of a step; a second one acts as usual.

    Under nohup, SIGHUP remains without effect.

    A signal may reach the processes of `group` at different steps, or only one of them. The processes stop when all of
    them know the request; see `any_requested`.
    """

    def __init__(self, group: Group = SINGLE_PROCESS) -> None:
        self.group = group
        self.requested = 0  # the signal that this process received
        self.agreed = 0  # the signal after which all processes stop
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # only this thread may set handlers
            self.previous = {
                number: signal.signal(number, self.request)
                for number in SIGNALS
                if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number: int, _: Any) -> None:
        if os.getpid() != self.process:  # loader processes inherit the handler; the run stops them
            return
        self.requested = number
        signal.signal(number, self.previous[number])
        if self.group.is_main:
            with suppress(OSError):  # the terminal may have been closed
                os.write(2, b"\nstopping after this step or evaluation; press Ctrl-C again to stop at once\n")

    def any_requested(self, device: torch.device) -> Tensor:
        """The largest number of a signal that a process received, else 0: a scalar on `device`, the same everywhere.

        The caller sets `agreed` from this value when all processes are at the same point.
        """
        return self.group.largest(torch.full((), float(self.requested), device=device))

    def pass_on(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches until `agreed` is set."""
        iterator = iter(batches)
        while not self.agreed:
            try:
                yield next(iterator)
            except StopIteration:
                return
            except RuntimeError:  # Ctrl-C also reaches the loader's processes, and may end them
                if not self.requested or self.group.world_size > 1:
                    raise
                self.agreed = self.requested
