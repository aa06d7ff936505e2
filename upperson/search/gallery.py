"""The gallery: an index of images, and the model that searches it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from upperson.search.entry import Hit, Query


class Gallery:
    """An index and the model with which it was made. Threads may search at once."""

    name: str  # the index
    model: str  # the checkpoint

    @classmethod
    def open(cls, index: str | Path, checkpoint: str | Path | None = None, *, device: str = "auto") -> Gallery:
        raise NotImplementedError

    @classmethod
    def find(
        cls, index: str | Path | None = None, checkpoint: str | Path | None = None, *, device: str = "auto"
    ) -> Gallery:
        """The index of that name; without a name the default."""
        raise NotImplementedError

    @classmethod
    def default(cls, checkpoint: str | Path | None = None, *, device: str = "auto") -> Gallery:
        """people.db in the current folder, or else the synthetic test images of the newest run of embedded data."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def search(self, query: Query) -> list[Hit]:
        raise NotImplementedError

    def thumbnail(self, id: int) -> bytes:
        raise NotImplementedError

    def cameras(self) -> list[str]:
        raise NotImplementedError

    def times(self) -> tuple[datetime, datetime] | None:
        raise NotImplementedError

    def examples(self) -> list[str]:
        raise NotImplementedError

    def forget(self, paths: Any) -> int:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
