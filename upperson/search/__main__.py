"""Searches one's own images by a sentence.

upperson search index PHOTOS...                             folders, images and videos; again: only what changed
upperson search query "a woman in a red coat" --top 5       the images that fit best
upperson search serve                                       a page on this computer
upperson search forget PATH...                              removes images from the index
upperson search query --help                                every option of a command
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from upperson.errors import Parser, exit_status, one_line, path_argument
from upperson.files import write_atomically
from upperson.search.entry import Hit, Query, read_time

INDEX = "people.db"
PORT = 8765
NAMED = 20  # limit of cameras in a message


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    indexing = list(sys.argv[1:] if argv is None else argv)[:1] == ["index"]
    kept = "; what has been indexed is kept, and the same command continues" if indexing else ""
    return exit_status(lambda: _search(argv), f"stopped{kept}")


def _search(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    return {"index": _index, "query": _query, "serve": _serve, "forget": _forget}[options.command](parser, options)


# ---------------------------------------------------------------------------------------- commands


def _index(parser: Parser, options: argparse.Namespace) -> int:
    if not options.photos and options.boxes is None:
        parser.error("nothing to index; expected folders, images or videos, or --boxes")
    from upperson.search.gallery import Gallery  # a late import: --help does not need torch

    with Gallery.open(options.index or INDEX, options.checkpoint, device=options.device, half=options.half) as gallery:
        report = gallery.add(
            options.photos,
            boxes=options.boxes,
            every=options.every,
            prune=options.prune,
            pattern=options.pattern,
            batch_size=options.batch_size,
            workers=options.workers,
        )
        print(f"{report}; {gallery.name} holds {len(gallery):,} images", flush=True)
    return 1 if report.all_failed else 0


def _query(parser: Parser, options: argparse.Namespace) -> int:
    from upperson.data.images import load_image
    from upperson.search.gallery import Gallery

    images = tuple(load_image(path) for path in options.image)
    try:
        query = Query(
            tuple(options.sentence), images, avoid=tuple(options.avoid), avoid_weight=options.weight,
            every=options.every, top=options.top, cameras=tuple(options.camera), since=options.since,
            until=options.until, path=options.path, rerank=options.rerank,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    with Gallery.find(options.index, options.checkpoint, device=options.device) as gallery:
        hits = gallery.search(query)
        if options.html is not None:
            from upperson.search.html import results_page

            write_atomically(options.html, results_page(query, hits, gallery))
            print(f"{options.html}: {len(hits)} images")
        elif options.json:
            print(json.dumps([_as_json(hit) for hit in hits], indent=1, allow_nan=False))
        else:
            print(_table(hits) if hits else _nothing(options.camera, gallery.cameras() if options.camera else []))
    return 0


def _serve(parser: Parser, options: argparse.Namespace) -> int:
    from upperson.search.page import listen, serve

    opened = listen(options.host, options.port, options.token)  # first, since a gallery takes seconds to open
    from upperson.search.gallery import Gallery

    with Gallery.find(options.index, options.checkpoint, device=options.device) as gallery:
        serve(gallery, options.host, options.port, options.token, opened=opened)
    return 0


def _forget(parser: Parser, options: argparse.Namespace) -> int:
    from upperson.search.gallery import forget

    index = options.index or INDEX
    print(f"{forget(index, options.paths):,} images were removed from {index}")
    return 0


def _as_json(hit: Hit) -> dict:
    entry = hit.entry
    return {
        "rank": hit.rank,
        "similarity": hit.similarity,
        "id": entry.id,
        "path": entry.path,
        "camera": entry.camera,
        "time": entry.time and entry.time.isoformat(),
        "seconds": entry.seconds,
        "box": entry.box,
    }


def _nothing(cameras: Sequence[str], known: Sequence[str]) -> str:
    """Why no image was found. A camera's name may be another than the user thinks: that of cam03 is 3."""
    unknown = ", ".join(repr(name) for name in cameras if name not in known)
    if not unknown:
        return "no image passes the filters"
    names = ", ".join([*map(repr, known[:NAMED]), *(["…"] if len(known) > NAMED else [])]) or "none"
    return f"no image passes the filters: no image is of camera {unknown}; the cameras are {names}"


def _table(hits: Sequence[Hit]) -> str:
    """One line for each image; a column that would be empty is left out."""
    from tabulate import tabulate

    rows = []
    for hit in hits:
        entry = hit.entry
        rows.append({
            "rank": hit.rank,
            "similarity": f"{hit.similarity:.4f}",
            "camera": entry.camera or "",
            "time": entry.time.isoformat(" ", "seconds") if entry.time else "",
            "seconds": "" if entry.seconds is None else f"{entry.seconds:.1f}",
            "box": " ".join(map(str, entry.box)) if entry.box else "",
            "path": one_line(entry.path),
        })  # fmt: skip
    kept = [name for name in rows[0] if any(row[name] != "" for row in rows)]
    return tabulate([[row[name] for name in kept] for row in rows], kept, disable_numparse=True)


# ---------------------------------------------------------------------------------------- command line


def _parser() -> Parser:
    parser = Parser(
        prog="upperson search", description="Find a person in your own images by a sentence.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        found.add_argument(
            "--index", type=_index_name, metavar="INDEX",
            help=f"a file, a file of Milvus NAME.milvus.db, or a server http://HOST:19530 (default: {INDEX})",
        )  # fmt: skip
        return found

    index = command("index", "index folders, images and videos; done again, only what changed")
    option = index.add_argument
    option("photos", nargs="*", type=path_argument, metavar="PHOTOS", help="folders, image files, video files")
    option(
        "--boxes", type=path_argument, metavar="FILE", help="CSV of path,x,y,width,height,frame: crops to index instead"
    )
    option("--every", type=float, default=1.0, metavar="SECONDS", help="time between frames of a video (default: 1)")
    option("--prune", action="store_true", help="remove images that have vanished from the given folders")
    option("--pattern", metavar="REGEX", help="groups named camera and time (ISO 8601), searched for in each path")
    option("--half", action="store_true", help="store the vectors of a new index in float16, half the size")
    option("--batch-size", type=int, default=64, metavar="N", help="images embedded at once (default: 64)")
    option("--workers", type=int, metavar="N", help="processes that load images (default: by the number of images)")

    query = command("query", "the images that fit a sentence or an image best")
    option = query.add_argument
    option("sentence", nargs="*", metavar="SENTENCE", help="what is searched; several: their mean")
    option(
        "--image",
        type=path_argument,
        action="append",
        default=[],
        metavar="FILE",
        help="an image to search by; repeatable",
    )
    option("--all", dest="every", action="store_true", help="rank by the lowest similarity to a sentence or image")
    option("--not", dest="avoid", action="append", default=[], metavar="WORDS", help="what to avoid; repeatable")
    option("--weight", type=float, default=0.5, help="of the words to avoid, from 0 to 1; a heuristic (default: 0.5)")
    option("--top", type=int, default=20, metavar="N", help="number of images (default: 20)")
    option("--camera", action="append", default=[], metavar="NAME", help="only of this camera; repeatable")
    option("--since", type=_since, metavar="TIME", help="only from this date or time on (ISO 8601)")
    option("--until", type=_until, metavar="TIME", help="only to this time; a date includes its whole day")
    option("--path", metavar="GLOB", help="only paths that fit, such as entrance/*.jpg; * also fits /")
    option("--rerank", action="store_true", help="re-rank the best 200 by their k-reciprocal neighbours")
    output = query.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--html", type=_page_name, metavar="FILE", help="write a page, .html, that needs no other file")

    serve = command("serve", "a page on this computer that searches the index")
    option = serve.add_argument
    option("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this computer alone)")
    option("--port", type=int, default=PORT, help=f"(default: {PORT})")
    option(
        "--token",
        help=(
            "a secret of at least 16 characters that every request must know (default: none on this computer alone, "
            "else one is made and printed)"
        ),
    )

    forget = command("forget", "remove images from the index, with their vectors and thumbnails")
    forget.add_argument(
        "paths", nargs="+", type=path_argument, metavar="PATH", help="files, or folders with all that is below them"
    )

    for each in (index, query, serve):
        each.add_argument(
            "--checkpoint", type=path_argument, metavar="FILE",
            help="a .safetensors file that training wrote (default: that of the index, or of the newest run)",
        )  # fmt: skip
        each.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return parser


def _index_name(text: str) -> str:
    path_argument(text)
    return text  # as given: a path would lose a slash of http://


def _page_name(text: str) -> Path:
    """A page is written over an earlier one, and must not be written over an index, a checkpoint or an image."""
    path = path_argument(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name that ends in .html")
    return path


def _since(text: str) -> datetime:
    return _time(text, until=False)


def _until(text: str) -> datetime:
    return _time(text, until=True)


def _time(text: str, *, until: bool) -> datetime:
    try:
        return read_time(text, until=until)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
