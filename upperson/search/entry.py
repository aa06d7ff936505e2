"""What is searched, what is asked, and what is found."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from upperson.files import is_unicode

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_HITS = 10_000  # limit of `top`


@dataclass(frozen=True)
class Entry:
    """An image of the gallery: a file, a frame of a video, or a crop of either."""

    id: int  # stable while the image is in the index
    path: str  # absolute path of the file; "synthetic/test/0012" for an image of the embedded people
    camera: str | None
    time: datetime | None  # local time without a time zone; of a frame: the start of the video + seconds
    seconds: float | None  # position in a video
    box: tuple[int, int, int, int] | None  # x, y, width and height of a crop, in pixels


@dataclass(frozen=True)
class Hit:
    """A found image."""

    rank: int  # from 1
    similarity: float  # cosine of the combined query and the image, from -1 to 1
    entry: Entry


def read_time(text: str, *, until: bool = False) -> datetime:
    """The local time in a text as 2026-01-31, 2026-01-31T23:59 or 2026-01-31T23:59:59. `until` a day is its end.

    Raises ValueError for another text, such as a week, and for a time with a time zone.
    """
    text = text.strip()
    try:
        if not re.match("[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]|$)", text):  # Python has other forms, some since 3.11
            raise ValueError
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a time; expected 2026-01-31 or 2026-01-31T23:59:59") from None
    if found.tzinfo is not None:
        raise ValueError(f"{text!r} has a time zone; expected local time, as of the images")
    if until and len(text) == 10:
        return found.replace(hour=23, minute=59, second=59, microsecond=999_999)
    return found


@dataclass(frozen=True)
class Query:
    """What is asked. Raises ValueError, in one sentence, for a query that asks nothing or contradicts itself.

    The query's direction is the mean of the normalised features of all sentences and images. With `every`, an image is
    ranked by its lowest similarity to one of them instead. `avoid` is a heuristic: avoid_weight times the mean of the
    normalised features of its words is subtracted.
    """

    sentences: tuple[str, ...] = ()
    images: tuple[Image, ...] = ()
    like: tuple[int, ...] = ()  # ids of entries, whose images are searched for
    avoid: tuple[str, ...] = ()
    avoid_weight: float = 0.5  # from 0 to 1
    every: bool = False
    top: int = 20
    cameras: tuple[str, ...] = ()  # any of these; () for all images
    since: datetime | None = None
    until: datetime | None = None  # inclusive
    path: str | None = None  # glob; a relative one fits behind any folder
    rerank: bool = False

    def __post_init__(self) -> None:
        if not (self.sentences or self.images or self.like):
            raise ValueError("the query is empty; expected a sentence or an image")
        for name, texts in (("sentence", self.sentences), ("text to avoid", self.avoid), ("camera", self.cameras)):
            for text in texts:
                if not text.strip():
                    expected = "a name" if name == "camera" else "words"
                    raise ValueError(f"a {name} is empty; expected {expected}")
                if not is_unicode(text):
                    raise ValueError(f"a {name} is not valid Unicode, {ascii(text)[:60]}; expected UTF-8 text")
        if not (math.isfinite(self.avoid_weight) and 0 <= self.avoid_weight <= 1):
            raise ValueError(f"the weight of words to avoid is {self.avoid_weight}; expected a number from 0 to 1")
        if not 1 <= self.top <= MOST_HITS:
            raise ValueError(f"{self.top} images were asked for; expected 1 to {MOST_HITS:,}")
        for name, time in (("since", self.since), ("until", self.until)):
            if time is not None and time.tzinfo is not None:
                raise ValueError(f"{name}: expected a local time without a time zone, found {time.isoformat()}")
        if self.since is not None and self.until is not None and self.since > self.until:
            raise ValueError(
                f"no time lies between since {self.since.isoformat()} and until {self.until.isoformat()}; expected "
                "since before until"
            )
        if self.path is not None and not self.path.strip():
            raise ValueError("the path is empty; expected a pattern such as entrance/*.jpg")
