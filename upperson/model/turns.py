"""Several threads and one model: all may compute at once, and none changes what the others compute."""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from upperson.errors import RunError


class Turns:
    """Which threads compute with a model, and which of them has changed it.

    A copy of a model, also by pickle, has turns of its own.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.computing: Counter[int] = Counter()  # depth of calls, by thread
        self.owner: int | None = None  # the thread for which alone the model is changed
        self.version = 0  # of the adaptation
        self.chosen = threading.local()  # the version that a thread has chosen

    def __reduce__(self) -> Any:
        return Turns, ()

    def require_alone(self, what: str) -> None:
        own = threading.get_ident()
        if self.owner not in (None, own) or any(thread != own for thread, depth in self.computing.items() if depth):
            raise RunError(
                f"{what}, while another thread computes with the model, would mix features; expected a lock around "
                "both, or a model for each thread"
            )

    @contextmanager
    def compute(self) -> Iterator[None]:
        """A context in which the model computes. Raises RunError if this thread has chosen something else."""
        own = threading.get_ident()
        with self.lock:
            if self.owner not in (None, own):
                raise RunError(
                    "zero_shot() is active in another thread, and applies to all threads; expected a lock around both, "
                    "or a model for each thread"
                )
            if getattr(self.chosen, "version", self.version) != self.version:
                raise RunError(
                    "another thread has switched the adaptation since this thread chose one; expected a lock around "
                    "the choice and what is computed with it, or a model for each thread"
                )
            self.computing[own] += 1
        try:
            yield
        finally:
            with self.lock:
                self.computing[own] -= 1
                self.computing += Counter()  # forgets threads that have ended

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """A context in which only this thread computes. Raises RunError if another thread is computing."""
        with self.lock:
            self.require_alone(what)
            before, self.owner = self.owner, threading.get_ident()
        try:
            yield
        finally:
            self.owner = before

    @contextmanager
    def switch(self) -> Iterator[None]:
        """A context in which this thread chooses an adaptation; others wait. Raises RunError if one is computing."""
        with self.lock:
            self.require_alone("switching the adaptation")
            yield
            self.version += 1
            self.chosen.version = self.version

    def agree(self) -> None:
        """This thread chooses the present adaptation."""
        with self.lock:
            self.chosen.version = self.version


def takes_turns(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of AdaptedCLIP that computes features. A compiled graph has no threads to ask."""

    @functools.wraps(method)
    def in_turn(self: Any, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *arguments, **options)
        with self.turns.compute():
            return method(self, *arguments, **options)

    return in_turn
