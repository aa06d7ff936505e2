"""What the address of the page asks for. The whole state is in the address, which can be kept and passed on."""

from collections.abc import Sequence
from datetime import datetime
from urllib.parse import urlencode

from PIL import Image
from starlette.datastructures import QueryParams

from upperson.search.entry import Query, read_time

CHARACTERS = 500  # of a text; a CLIP reads at most 77 tokens
TEXTS = 20  # sentences, images or words to avoid
PARAMETERS = 500  # of an address
MOST = 200  # results on one page
TOP = 24
LARGEST_ID = 2**63 - 1

WHAT = ("q", "like", "image")  # what is searched for
FILTERS = ("camera", "since", "until", "path")
CHOSEN = {
    "not": "without {}",
    "every": "every sentence",
    "camera": "camera {}",
    "since": "since {}",
    "until": "until {}",
    "path": "path {}",
    "rerank": "re-ranked",
}
KEPT = (*FILTERS, "top", "rerank")  # parameters that a click on an image keeps


def lines(params: QueryParams, name: str) -> tuple[str, ...]:
    """The texts of a parameter, which may be repeated, and have several lines."""
    texts = (line.strip() for value in params.getlist(name) for line in value.splitlines())
    return tuple(text for text in texts if text)


def is_asked(params: QueryParams) -> bool:
    """Whether an address asks for anything, also if it is not a whole query."""
    return any(lines(params, name) for name in (*WHAT, *FILTERS, "not"))


def read_query(params: QueryParams, images: Sequence[Image.Image]) -> Query:
    """The query of an address and of uploaded images. Raises ValueError with a sentence for the user."""
    for name in (*WHAT, "not", "path"):
        found = lines(params, name)
        if len(found) > TEXTS:
            raise ValueError(f"Ask for at most {TEXTS} things at once; {len(found)} were given.")
        for text in found:
            if len(text) > CHARACTERS:
                raise ValueError(f"Write at most {CHARACTERS} characters; a text has {len(text):,}.")
    if not any(lines(params, name) for name in WHAT):
        raise ValueError("Write a sentence or choose an image to search for.")
    return Query(
        sentences=lines(params, "q"),
        images=tuple(images),
        like=tuple(_whole(text, "an image's number", 0, LARGEST_ID) for text in lines(params, "like")),
        avoid=lines(params, "not"),
        avoid_weight=_share(params.get("weight") or str(Query.avoid_weight)),
        every=bool(params.get("every")),
        top=_whole(params.get("top") or str(TOP), "the number of results", 1, MOST),
        cameras=tuple(name for name in params.getlist("camera") if name.strip()),
        since=_time(params.get("since"), until=False),
        until=_time(params.get("until"), until=True),
        path=(params.get("path") or "").strip() or None,
        rerank=bool(params.get("rerank")),
    )


def _whole(text: str, what: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise ValueError(f"Expected {what} from {least:,} to {most:,}, found “{text[:40]}”.")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"Expected a share of words to avoid from 0 to 1, found “{text[:40]}”.")
    return share


def _time(text: str | None, *, until: bool) -> datetime | None:
    if not text:
        return None
    try:
        return read_time(text, until=until)
    except ValueError as error:
        raise ValueError(f"{'Until' if until else 'Since'}: {error}.") from None


def address(params: QueryParams, *, only: Sequence[str] | None = None, without: tuple[str, str] | None = None) -> str:
    """The address of a search: that of `params`, of `only` some names, or `without` one name and value."""
    pairs = [
        (name, value)
        for name, value in params.multi_items()
        if value and (only is None or name in only) and (name, value) != without
    ]
    return f"/?{urlencode(pairs)}" if pairs else "/"


def chosen(params: QueryParams) -> list[dict[str, str]]:
    """The filters and options that are set, each with the address without it."""
    found = []
    for name, value in params.multi_items():
        if name in CHOSEN and value.strip():
            text = ", ".join(value.splitlines())
            text = text.replace("T", " ") if name in ("since", "until") else text
            found.append({"name": CHOSEN[name].format(text), "without": address(params, without=(name, value))})
    return found
