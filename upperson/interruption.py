"""Stopping a run at a point from which it can go on."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Batch = TypeVar("Batch")


class Interruption:
    """Within it, the first Ctrl-C or SIGTERM is a request to stop at a step's end; a second one acts as ever."""

    def __init__(self) -> None:
        self.requested = False
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self.previous = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number: int, _: Any) -> None:
        if os.getpid() != self.process:  # a data loader's process, which inherits the handler: the run stops it
            return
        self.requested = True
        signal.signal(number, self.previous[number])
        os.write(2, b"\nstopping as soon as this step or evaluation is done; once more: stop at once\n")

    def pass_on(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches until a stop is requested."""
        iterator = iter(batches)
        while not self.requested:
            try:
                yield next(iterator)
            except StopIteration:
                return
            except RuntimeError:  # Ctrl-C reaches the loader's processes as well, and may end them
                if not self.requested:
                    raise
