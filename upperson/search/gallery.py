"""The gallery: an index of images, and the model that searches it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from upperson.data import Sample, gallery, load_image, read_splits
from upperson.embedded.drawing import Drawing
from upperson.errors import DataError, IndexMissing, SearchError
from upperson.search.entry import Entry, Hit, Query
from upperson.search.indexing import Indexing, Report, require_numbers
from upperson.search.media import absolute, frames, is_video
from upperson.search.rerank import BEST, distances_of, rerank
from upperson.search.searcher import Searcher, combined
from upperson.search.store import Filter, Row, Store, missing, open_store
from upperson.search.thumbnails import Thumbnails, thumbnail
from upperson.train.run_folder import BEST as CHECKPOINT

INDEX = "people.db"
RUNS = Path("runs")
SYNTHETIC = "synthetic/test"  # the paths of the images of the embedded people
OWN = "gallery.db"  # the index of these images, in the run folder
EXAMPLES = 6
SENTENCES = (
    "a woman in a red coat",
    "a man in a blue jacket and black trousers",
    "a person with a backpack",
    "a woman with long dark hair and a white handbag",
    "a man in a grey suit",
    "a child in a yellow shirt",
)


class Gallery:
    """An index and the model with which it was made. Threads may search at once; one process may add at a time.

    with Gallery.open("people.db", "best.safetensors") as gallery:
        gallery.add(["photos"])
        hits = gallery.search(Query(("a woman in a red coat",)))
    """

    def __init__(self, store: Store, searcher: Searcher):
        self.store, self.searcher = store, searcher
        self.name, self.model = store.name, str(searcher.checkpoint)
        self.thumbnails = Thumbnails(store.kept_at)

    @classmethod
    def open(
        cls,
        index: str | Path,
        checkpoint: str | Path | None = None,
        *,
        device: str = "auto",
        half: bool = False,
        create: bool = True,
    ) -> Gallery:
        """Opens an index, or makes an empty one with the model of `checkpoint`.

        Args:
            index: a file, NAME.milvus.db for Milvus Lite, or http://HOST:PORT/NAME for a server of Milvus.
            checkpoint: a file that training wrote; None: that of the index, or for a new index the newest run's.
            device: auto, cpu, cuda, cuda:N or mps.
            half: a new index stores its vectors in float16; an index that stores float32 is refused.
            create: whether an index that does not exist is made.

        Raises SearchError for an index that cannot be read or was made with another model, and CheckpointError.
        """
        index = str(index)
        try:
            found = open_store(index)
        except IndexMissing:
            if not create:
                raise
            found = None
        try:
            if half and found is not None and found.settings["dtype"] != "float16":
                raise SearchError(f"{index}: this index stores float32; --half is for a new --index")
            if checkpoint is None:
                checkpoint = newest_checkpoint() if found is None else checkpoint_of(found)
                print(f"the model is {checkpoint}", file=sys.stderr)
            searcher = Searcher(Path(checkpoint), device)
            store = found if found is not None else open_store(index, searcher.settings(half))
        except BaseException:
            if found is not None:
                found.close()
            raise
        try:
            searcher.require_same(index, store.settings)
        except BaseException:
            store.close()
            raise
        return cls(store, searcher)

    @classmethod
    def find(
        cls, index: str | Path | None = None, checkpoint: str | Path | None = None, *, device: str = "auto"
    ) -> Gallery:
        """The index of that name; without a name the default."""
        if index is None:
            return cls.default(checkpoint, device=device)
        return cls.open(index, checkpoint, device=device, create=False)

    @classmethod
    def default(cls, checkpoint: str | Path | None = None, *, device: str = "auto") -> Gallery:
        """people.db in the current folder, or else the synthetic test images of the newest run of embedded data.

        These are indexed in the run folder first. Raises SearchError if there is neither.
        """
        if Path(INDEX).exists():
            return cls.open(INDEX, checkpoint, device=device, create=False)
        chosen = Path(checkpoint) if checkpoint is not None else newest_checkpoint(missing(INDEX))
        searcher = Searcher(chosen, device)
        if not searcher.config.data.is_synthetic:
            raise missing(INDEX)
        index = str(chosen.parent / OWN)
        store = open_store(index, searcher.settings(half=False))
        try:
            searcher.require_same(index, store.settings)
            found = cls(store, searcher)
            drawings = found.drawings
            todo = len(drawings) - len(found)
            doing = f"indexing {todo} synthetic test images" if todo else "searching the synthetic test images"
            print(f"{INDEX} does not exist; {doing} of {chosen} in {index}", file=sys.stderr)
            if todo:
                with found.locked():
                    found.indexing().add_drawings(drawings, progress=True)
        except BaseException:
            store.close()
            raise
        return found

    def __len__(self) -> int:
        return len(self.store)

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.store.close()

    # -------------------------------------------------------------------------------- indexing

    def add(
        self,
        paths: Sequence[str | Path],
        *,
        boxes: str | Path | None = None,
        every: float = 1.0,
        prune: bool = False,
        pattern: str | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        progress: bool = True,
    ) -> Report:
        """Indexes files and folders, as far as they are new or have changed.

        Args:
            paths: images, videos, and folders, which are searched through; empty: the files of `boxes`.
            boxes: CSV file of people in these files, which are indexed instead of the whole images; files without
                boxes are left out. See upperson.search.boxes.
            every: seconds between two frames of a video.
            prune: whether files that are gone from the given folders are removed from the index.
            pattern: regular expression with the groups camera and time, searched for in each path.
            batch_size: images embedded and stored at once.
            workers: processes that load images; None: by the number of images.
            progress: whether a progress bar is shown on a terminal.

        Broken files are listed in the report. Raises SearchError for paths that do not exist, a folder without images,
        and an index that another process changes; and DataError for `boxes`.
        """
        require_numbers(every, batch_size, workers)
        given = [paths] if isinstance(paths, str | Path) else list(paths)
        with self.locked():
            return self.indexing(batch_size).add(
                given, boxes=None if boxes is None else Path(boxes), every=every, prune=prune, pattern=pattern,
                workers=workers, progress=progress,
            )  # fmt: skip

    def indexing(self, batch_size: int = 64) -> Indexing:
        size = self.searcher.model.preprocess.image_size
        return Indexing(self.store, self.thumbnails, self.searcher.encode_pixels, size, batch_size)

    def forget(self, paths: Sequence[str | Path]) -> int:
        """Removes files, or all files below folders, from the index; returns the number of images. See `forget`."""
        with self.locked():
            return remove(self.store, self.thumbnails, [paths] if isinstance(paths, str | Path) else paths)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with lock_of(self.store):
            yield

    # -------------------------------------------------------------------------------- searching

    def search(self, query: Query) -> list[Hit]:
        """The images that fit best, best first; equal ones in the order in which they were indexed.

        Raises SearchError for an empty index, for an id that has gone, and for a query that cancels itself out.
        """
        if not len(self):
            raise SearchError(f"{self.name}: the index holds no images; add some with upperson search index PHOTOS")
        parts = [
            *([self.searcher.encode_texts(query.sentences)] if query.sentences else []),
            *([self.searcher.encode_images(query.images)] if query.images else []),
            *([self.store.vectors(self.possible(query.like))] if query.like else []),
        ]
        avoid = self.searcher.encode_texts(query.avoid) if query.avoid else np.empty((0, 1), np.float32)
        directions = combined(np.concatenate(parts), avoid, query.avoid_weight, query.every)
        where = Filter(query.cameras, query.since, query.until, query.path)
        found = self.store.search(directions, max(query.top, BEST) if query.rerank else query.top, where)
        if query.rerank and found:
            found = self.reranked(found)
        rows = self.store.rows([id for id, _ in found])
        kept = [(id, similarity) for id, similarity in found if id in rows][: query.top]  # others have gone meanwhile
        return [
            Hit(rank, min(max(similarity, -1.0), 1.0), rows[id].entry(id))
            for rank, (id, similarity) in enumerate(kept, 1)
        ]

    def possible(self, ids: Sequence[int]) -> Sequence[int]:
        """These ids. Raises SearchError for one that no store can hold."""
        for id in ids:
            if not 0 < id < 2**63:
                raise SearchError(f"{self.name}: no image has the id {id}")
        return ids

    def reranked(self, found: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """The first BEST in the order of their k-reciprocal neighbours, then the others. Similarities stay."""
        first, others = found[:BEST], found[BEST:]
        try:
            vectors = self.store.vectors([id for id, _ in first])
        except SearchError:
            rows = self.store.rows([id for id, _ in found])
            if len(rows) == len(found):
                raise
            left = [(id, similarity) for id, similarity in found if id in rows]  # others have gone meanwhile
            return self.reranked(left) if left else []
        final = rerank(distances_of(np.array([similarity for _, similarity in first]), vectors))
        return [first[place] for place in np.argsort(final, kind="stable")] + others

    def sample(self, number: int) -> list[Entry]:
        """At most `number` images, spread over the index."""
        rows = self.store.rows(self.store.some(number))
        return [row.entry(id) for id, row in sorted(rows.items())]

    def cameras(self) -> list[str]:
        """The names of all cameras."""
        return self.store.cameras()

    def times(self) -> tuple[datetime, datetime] | None:
        """The earliest and the latest time of an image; None if no time is known."""
        return self.store.times()

    def examples(self) -> list[str]:
        """Some sentences for this gallery: short captions of the synthetic people, or of people in general."""
        if not self.searcher.config.data.is_synthetic:
            return list(SENTENCES)
        captions = sorted({sample.caption for sample in self.samples}, key=lambda caption: (len(caption), caption))
        return random.Random(0).sample(captions[: max(EXAMPLES, len(captions) // 10)], min(EXAMPLES, len(captions)))

    # -------------------------------------------------------------------------------- images

    def thumbnail(self, id: int) -> bytes:
        """The JPEG file of an image, at most 384 pixels high. One that is lost is made again.

        Raises SearchError for an unknown id, and for a file that has gone or changed.
        """
        row = self.store.rows(self.possible([id])).get(id)
        if row is None:
            raise SearchError(f"{self.name}: no image has the id {id}")
        content = self.thumbnails.read(id)
        if content is None:
            try:
                content = thumbnail(self.image(row))
            except (DataError, OSError) as error:
                raise SearchError(str(error)) from error
            with suppress(OSError):  # the disk is full or read-only; the image can be shown all the same
                self.thumbnails.write(id, content)
                if id not in self.store.rows([id]):  # another process has removed it meanwhile
                    self.thumbnails.remove(id)
        return content

    def image(self, row: Row) -> Any:
        """The image of a row, read from its file again."""
        if not row.digest:
            if row.path not in self.drawings:
                raise SearchError(f"{row.path}: not a synthetic image of {self.model}")
            return load_image(self.drawings[row.path])
        path = Path(row.path)
        if not path.is_file() or (path.stat().st_size, path.stat().st_mtime_ns) != (row.size, row.mtime):
            raise SearchError(f"{path}: the file has gone or changed since it was indexed; index it again")
        if is_video(path):
            image = next(image for _, _, image in frames(path, None, [row.frame or 0]))
        else:
            image = load_image(path)
        if row.box is None:
            return image
        x, y, width, height = row.box
        return image.crop((x, y, x + width, y + height))

    @cached_property
    def samples(self) -> list[Sample]:
        """The synthetic test pairs of the model's training."""
        return read_splits(self.searcher.config.data, need=["test"])["test"]

    @cached_property
    def drawings(self) -> dict[str, Drawing]:
        """The synthetic test images by path; none for a model of real data."""
        if not self.searcher.config.data.is_synthetic:
            return {}
        images, _ = gallery(self.samples)
        return {
            f"{SYNTHETIC}/{number:04d}": image for number, image in enumerate(images) if not isinstance(image, Path)
        }


def forget(index: str, paths: Sequence[str | Path]) -> int:
    """Removes files, or all files below folders, from an index, with their thumbnails; the files need not exist.

    Returns the number of removed images. No model is loaded. Raises SearchError for a path that is not in the index.
    """
    store = open_store(index)
    try:
        with lock_of(store):
            return remove(store, Thumbnails(store.kept_at), paths)
    finally:
        store.close()


def remove(store: Store, thumbnails: Thumbnails, paths: Sequence[str | Path]) -> int:
    by_path: dict[str, list[int]] = {}
    for id, row in store.all_rows():
        by_path.setdefault(row.path, []).append(id)
    chosen: set[int] = set()
    for given in paths:
        if not str(given).strip():
            raise SearchError(f"expected a path, found the text {str(given)!r}; nothing was removed")
        names = {str(given).rstrip("/"), str(absolute(given))}
        found = [path for path in by_path if path in names or any(path.startswith(f"{name}/") for name in names)]
        if not found:
            raise SearchError(f"{given}: no image of this path is in {store.name}; nothing was removed")
        chosen.update(id for path in found for id in by_path[path])
    with thumbnails.removed(chosen):
        store.remove(sorted(chosen))
    store.tidy()
    return len(chosen)


@contextmanager
def lock_of(store: Store) -> Iterator[None]:
    """Keeps other processes of this machine from changing the index. Raises SearchError if one does."""
    path = store.kept_at.with_name(f"{store.kept_at.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SearchError(f"{store.name}: another process is changing this index; wait until it has ended") from None
    try:
        yield
    finally:
        lock.release()


def checkpoint_of(store: Store) -> Path:
    """The checkpoint with which an index was made; if it has gone, the newest run's. Raises SearchError for neither."""
    remembered = Path(store.settings["checkpoint"])
    if remembered.is_file():
        return remembered
    return newest_checkpoint(SearchError(f"{store.name}: the checkpoint of this index, {remembered}, has gone"))


def newest_checkpoint(otherwise: SearchError | None = None) -> Path:
    """The best checkpoint of the run that ended last. Raises SearchError if there is none."""
    found = sorted(RUNS.glob(f"*/{CHECKPOINT}"), key=lambda path: (path.stat().st_mtime, path))
    if not found:
        problem = f"no checkpoint is in {RUNS}/; train one (python train.py), or name one with --checkpoint"
        raise SearchError(f"{otherwise}; {problem}" if otherwise else problem)
    return found[-1]
