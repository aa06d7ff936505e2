"""The server of the page: what each address answers. Searches run in threads, so that the others need not wait."""

import re
from typing import TYPE_CHECKING, Any

import anyio
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from upperson.errors import USER_ERRORS, DataError, one_line
from upperson.search.entry import Hit
from upperson.search.html import PAGE, render, shape, thumbnails
from upperson.search.page import asked
from upperson.search.page.guard import LOCAL, Guard
from upperson.search.page.uploads import MAX_BYTES, Uploads

if TYPE_CHECKING:
    from upperson.search.gallery import Gallery

SAMPLE = 24  # images of the first page
DECODED_AT_ONCE = 2  # uploads; a decoded image takes up to 256 MiB


def make_app(
    gallery: "Gallery", hosts: frozenset[str] = LOCAL, any_address: bool = False, token: str | None = None
) -> Guard:
    """The ASGI application. `hosts`, `any_address` and `token` are those of Guard; names of this computer are added."""
    page = Page(gallery)
    app = Starlette(
        routes=[
            Route("/", page.search),
            Route("/image/{id}", page.image),
            Route("/upload", page.upload, methods=["POST"]),
            Route("/upload/{name}", page.uploaded),
            Mount("/static", StaticFiles(directory=PAGE / "static")),
        ],
        exception_handlers={HTTPException: plain, 500: failed},
    )
    return Guard(app, hosts | LOCAL, any_address, token)


class Page:
    """The endpoints of a gallery."""

    def __init__(self, gallery: "Gallery"):
        self.gallery = gallery
        self.known: tuple[int, dict[str, Any]] | None = None
        self.uploads = Uploads()
        self.decoding = anyio.CapacityLimiter(DECODED_AT_ONCE)

    async def search(self, request: Request) -> Response:
        """The page, with the results of the query in the address if there is one."""
        params = request.query_params
        if len(params.multi_items()) > asked.PARAMETERS:
            raise HTTPException(414, f"The address asks for too much; expected at most {asked.PARAMETERS} parameters.")
        found: dict[str, Any] = {"hits": [], "sample": [], "error": None}
        status = 200
        try:
            if asked.is_asked(params):
                found["hits"] = await run_sync(self.find, params)
            else:
                found["sample"] = await run_sync(self.gallery.sample, SAMPLE)
        except ValueError as error:  # of the query; most user errors are ValueErrors too
            found["error"] = {"title": "This cannot be searched", "text": sentence(error), "link": None}
            status = 400
        except USER_ERRORS as error:
            found["error"] = {"title": "The search failed", "text": sentence(error), "link": "/", "way": "Start again"}
            status = 500 if isinstance(error, OSError) else 400
        try:
            return HTMLResponse(await run_sync(lambda: self.html(params, **found)), status)
        except USER_ERRORS as error:
            raise HTTPException(500, sentence(error)) from error

    def find(self, params: QueryParams) -> list[Hit]:
        images = [self.uploads.get(name) for name in asked.lines(params, "image")]
        if None in images:
            raise ValueError("Your image is no longer kept. Choose it again.")
        return self.gallery.search(asked.read_query(params, [image for image in images if image is not None]))

    def html(self, params: QueryParams, hits: list[Hit], **found: Any) -> str:
        sample = found["sample"]
        first = [hit.entry for hit in hits] or sample
        names = {hit.entry.id: hit.entry.path for hit in hits}
        return render(
            "page.html",
            **found,
            hits=hits,
            title=", ".join(asked.lines(params, "q")),
            **self.about(),
            asked_for=asked.is_asked(params),
            shape=shape(thumbnails(self.gallery, [entry.id for entry in first[:7]]).values()),
            sentences=asked.lines(params, "q"),
            avoid=asked.lines(params, "not"),
            weight=params.get("weight") or "0.5",
            chosen_cameras=params.getlist("camera"),
            top=params.get("top") or asked.TOP,
            **{name: params.get(name) or "" for name in ("every", "since", "until", "path", "rerank")},
            limits={"characters": asked.CHARACTERS, "top": asked.MOST, "usual": asked.TOP},
            chosen=asked.chosen(params),
            clear=asked.address(params, only=asked.WHAT),
            links=link_to_similar(params),
            like=[
                {
                    "id": id,
                    "name": names.get(int(id), f"image {id}"),
                    "without": asked.address(params, without=("like", id)),
                }
                for id in asked.lines(params, "like")
                if id.isdecimal() and len(id) < 20
            ],
            uploads=[
                {"id": id, "without": asked.address(params, without=("image", id))}
                for id in asked.lines(params, "image")
            ],
        )

    def about(self) -> dict[str, Any]:
        """What the page shows of the gallery. It is asked again when the number of images has changed.

        Some stores go through all entries for the cameras and times.
        """
        total = len(self.gallery)
        if self.known is None or self.known[0] != total:
            examples = [
                {"name": text, "link": asked.address(QueryParams({"q": text}))} for text in self.gallery.examples()
            ]
            found = {"cameras": self.gallery.cameras(), "times": self.gallery.times(), "examples": examples}
            self.known = total, {"name": self.gallery.name, "model": self.gallery.model, "total": total, **found}
        return self.known[1]

    async def image(self, request: Request) -> Response:
        """The thumbnail of an image of the index by its number; a path is never accepted."""
        text = request.path_params["id"]
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= asked.LARGEST_ID):
            raise HTTPException(404, "No such image.")
        try:
            return Response(await run_sync(self.gallery.thumbnail, int(text)), media_type="image/jpeg")
        except USER_ERRORS as error:
            raise HTTPException(404, "No such image.") from error

    async def upload(self, request: Request) -> Response:
        """Takes the content of an image file, and answers the name by which a query refers to it."""
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BYTES:
                raise HTTPException(413, f"The file is too large; at most {MAX_BYTES // 2**20} MiB are accepted.")
        try:
            name = await run_sync(self.uploads.add, bytes(content), limiter=self.decoding)
        except DataError as error:
            raise HTTPException(415, f"This image cannot be read: {error}.") from error
        except MemoryError as error:
            raise HTTPException(507, "This image is too large for the memory of the server.") from error
        return JSONResponse({"image": name})

    async def uploaded(self, request: Request) -> Response:
        jpeg = await run_sync(self.uploads.jpeg, request.path_params["name"])
        if jpeg is None:
            raise HTTPException(404, "No such image.")
        return Response(jpeg, media_type="image/jpeg")


def link_to_similar(params: QueryParams) -> str:
    """The address of a search by an image, which keeps the filters; the image's number is to be appended."""
    kept = asked.address(params, only=asked.KEPT)
    return f"{kept}{'&' if '?' in kept else '?'}like="


def sentence(error: Exception) -> str:
    """An error's message as a sentence. A message that begins with a path keeps its first letter."""
    text = one_line(str(error))
    return (text[:1].upper() + text[1:] if re.match("[a-z]+ ", text) else text) + (
        "" if text.endswith((".", "?", "!")) else "."
    )


def plain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{one_line(error.detail)}\n", error.status_code, error.headers)


def failed(request: Request, error: Exception) -> Response:
    """The answer to an error of the program itself, whose traceback the terminal shows."""
    return PlainTextResponse("The server failed; its terminal says why.\n", 500)
