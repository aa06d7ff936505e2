"""Search results as HTML: the cards that the server's page and a saved page share, and the saved page itself."""

import base64
import io
import statistics
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from upperson.errors import SearchError
from upperson.search.entry import Entry, Hit, Query

if TYPE_CHECKING:
    from upperson.search.gallery import Gallery

PAGE = Path(__file__).parent / "page"
SHAPES = ((0.37, "slim"), (0.45, "tall"), (0.7, "half"), (1.2, "square"))  # largest width / height; others are "wide"


def results_page(query: Query, hits: list[Hit], gallery: "Gallery") -> str:
    """One HTML page of the results that needs no other file: the images are inside it, and it has no script."""
    pictures = thumbnails(gallery, [hit.entry.id for hit in hits])
    return render(
        "saved.html",
        asked=in_words(query, gallery),
        hits=hits,
        rerank=query.rerank,
        total=len(gallery),
        name=gallery.name,
        model=gallery.model,
        style=(PAGE / "static" / "style.css").read_text(encoding="utf-8"),
        sources={id: data_uri(jpeg) for id, jpeg in pictures.items()},
        shape=shape(pictures.values()),
    )


def in_words(query: Query, gallery: "Gallery") -> list[tuple[str, str]]:
    """What a query asks for, as pairs of a label and a text."""
    several = "every sentence" if query.every else "mean of the sentences"
    images = [f"{len(query.images)} of one's own"] if query.images else []
    asked = [
        ("Sentence" if len(query.sentences) == 1 else f"Sentences ({several})", "; ".join(query.sentences)),
        ("Similar to", ", ".join([*images, *(f"image {id} of the index" for id in query.like)])),
        (f"Words to avoid (share {query.avoid_weight:.0%})", "; ".join(query.avoid)),
        ("Camera", ", ".join(query.cameras)),
        ("Since", str(query.since or "")),
        ("Until", str(query.until or "")),
        ("Path", query.path or ""),
        ("Order", "re-ranked by common neighbours" if query.rerank else ""),
    ]
    return [(label, text) for label, text in asked if text]


def render(template: str, **values: Any) -> str:
    """The HTML of a template of the page. Every value is escaped."""
    return environment().get_template(template).render(version=version("upperson"), **values)


@cache
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(PAGE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"count": count, "details": details, "folder": folder, "file_name": file_name}
    return made


def thumbnails(gallery: "Gallery", ids: Iterable[int]) -> dict[int, bytes]:
    """The JPEG files of some images by id; without those whose files have gone or changed since they were indexed."""
    found = {}
    for id in ids:
        with suppress(SearchError):
            found[id] = gallery.thumbnail(id)
    return found


def data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def count(number: int, noun: str) -> str:
    """ "1 image", "1,600 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def file_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def folder(path: str) -> str:
    """The path of the folder of a file, or its end if it is long."""
    names = path.replace("\\", "/").split("/")[:-1]
    return "/".join(names) if len([name for name in names if name]) <= 2 else "…/" + "/".join(names[-2:])


def details(entry: Entry) -> Iterable[str]:
    """What else is known of an image."""
    if entry.camera is not None:
        yield f"camera {entry.camera}"
    if entry.time is not None:
        yield entry.time.isoformat(" ", "seconds")
    if entry.seconds is not None:
        yield f"video at {position(entry.seconds)}"
    if entry.box is not None:
        x, y, width, height = entry.box
        yield f"box {x}, {y}, {width} × {height}"


def position(seconds: float) -> str:
    """A position in a video: 754.5 seconds are 12:34.5."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    tail = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def shape(thumbnails: Iterable[bytes]) -> str:
    """The name of the shape that suits most of some images, for the style of their cards."""
    ratios = []
    for thumbnail in thumbnails:
        with Image.open(io.BytesIO(thumbnail)) as opened:
            ratios.append(opened.width / opened.height)
    middle = statistics.median(ratios) if ratios else 1.0
    return next((name for widest, name in SHAPES if middle <= widest), "wide")
