"""Indexing: which files are new, changed, moved or gone, and their features.

A batch of images is embedded, and its rows are stored in one transaction. A file is complete when the row of its last
image is stored; a file that is not is indexed again. So a process can be killed at any time.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from upperson.data.images import NAMED_IN_ERROR, first_of, load_image, load_pixels
from upperson.data.loaders import data_loader
from upperson.embedded.drawing import Drawing
from upperson.errors import DataError, SearchError
from upperson.files import is_unicode, require_regular
from upperson.search.boxes import Box, read_boxes
from upperson.search.media import absolute, find_media, frames, gone, is_video
from upperson.search.origin import by_pattern, compiled, origin
from upperson.search.store import Row, Store
from upperson.search.thumbnails import Thumbnails, thumbnail

Encode = Callable[[Tensor], np.ndarray]  # (B, 3, H, W) uint8 -> (B, E) float32, normalised

WORTH_WORKERS = 256  # images for which starting loader processes pays
AT_ONCE = 16  # files that a loader process hands over


@dataclass
class Report:
    """What an indexing did, in numbers of files."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    moved: int = 0
    removed: int = 0
    problems: list[str] = field(default_factory=list)  # one for each file or folder that could not be read

    @property
    def all_failed(self) -> bool:
        return bool(self.problems) and not (self.added or self.changed or self.unchanged or self.moved)

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("added", "changed", "moved", "unchanged", "removed")}
        lines = [", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing to do"]
        if self.problems:
            lines.append(
                f"{len(self.problems):,} could not be indexed: {'; '.join(first_of(self.problems, NAMED_IN_ERROR))}"
            )
        return "; ".join(lines)


@dataclass
class Known:
    """A file in the index."""

    state: tuple[int, int, str]  # size, time of the last change, and cut
    digest: str
    ids: list[int] = field(default_factory=list)
    parts: int = 0

    @property
    def content(self) -> tuple[str, str]:
        return self.digest, self.state[2]

    @property
    def complete(self) -> bool:
        return self.parts == len(self.ids)


@dataclass(frozen=True)
class Job:
    """A file that may have to be embedded."""

    path: Path
    size: int
    mtime: int
    cut: str
    boxes: tuple[Box, ...] = ()


@dataclass
class Loaded:
    """What a loader process hands over: the content, or a problem."""

    digest: str = ""
    camera: str | None = None
    time: datetime | None = None
    pixels: Tensor | None = None  # (N, 3, H, W) uint8; None: the content may be known, or is that of a video
    thumbnails: list[bytes] = field(default_factory=list)
    problem: str | None = None


class Files(torch.utils.data.Dataset):
    """index -> Loaded."""

    def __init__(
        self, jobs: Sequence[Job], known: set[tuple[str, str]], size: tuple[int, int], pattern: re.Pattern[str] | None
    ):
        self.jobs, self.known, self.size, self.pattern = jobs, known, size, pattern

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Loaded:
        job = self.jobs[index]
        try:
            digest = digest_of(job.path)
            video = is_video(job.path)
            found = Loaded(digest, *origin(job.path, self.pattern, exif=not video))
            if video or (digest, job.cut) in self.known:
                return found
            image = load_image(job.path)
            for box in job.boxes:
                box.require_within(image.size)
            images = [image.crop(box.corners) for box in job.boxes] or [image]
            found.pixels = torch.stack([load_pixels(image, self.size) for image in images])
            found.thumbnails = [thumbnail(image) for image in images]
            return found
        except DataError as error:
            return Loaded(problem=str(error))
        except OSError as error:
            return Loaded(problem=f"{job.path}: cannot be read ({error.strerror})")


def digest_of(path: Path) -> str:
    require_regular(path)
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class Indexing:
    """One indexing of a store, which no other process may change meanwhile."""

    def __init__(
        self, store: Store, thumbnails: Thumbnails, encode: Encode, size: tuple[int, int], batch_size: int = 64
    ):
        self.store, self.thumbnails, self.encode, self.size = store, thumbnails, encode, size
        self.batch_size, self.report = batch_size, Report()
        self.pending: list[tuple[Row, Tensor, bytes]] = []
        self.known = known_files(store)
        if not self.known:
            self.thumbnails.clear()
        self.by_content = {file.content: path for path, file in self.known.items() if file.complete and file.digest}
        self.replaced: dict[str, list[int]] = {}  # ids of earlier contents of files, by path

    # -------------------------------------------------------------------------------- files

    def add(
        self,
        given: Sequence[str | Path],
        *,
        boxes: Path | None,
        every: float,
        prune: bool,
        pattern: str | None,
        workers: int | None,
        progress: bool,
    ) -> Report:
        """See Gallery.add."""
        named = compiled(pattern)
        boxed = {} if boxes is None else read_boxes(boxes)
        paths, self.report.problems = find_media(given or list(boxed))
        outside = boxed.keys() - set(paths)
        if outside:
            first = next(found[0] for path, found in boxed.items() if path in outside)
            raise DataError(f"{first.place}, field path: the file is not among those that are to be indexed")
        jobs = self.changed(paths, boxed if boxes else None, every, named)
        if workers is None:
            workers = 0 if len(jobs) < WORTH_WORKERS else min(4, os.cpu_count() or 1)
        dataset = Files(jobs, set(self.by_content), self.size, named)
        loader = data_loader(dataset, workers, batch_size=AT_ONCE if workers else 1, collate_fn=list)
        with tqdm(total=len(jobs), desc="indexing", unit="image", disable=None if progress else True) as bar:
            index = 0
            for batch in loader:
                for loaded in batch:
                    self.take(jobs[index], loaded, every, bar, dataset)
                    index += 1
                    bar.update()
            self.flush()
        if prune:
            self.prune([absolute(path) for path in given])
        self.store.tidy()
        return self.report

    def changed(
        self,
        paths: Sequence[Path],
        boxed: Mapping[Path, list[Box]] | None,
        every: float,
        pattern: re.Pattern[str] | None,
    ) -> list[Job]:
        """The files whose size, time or cut is not that of the index."""
        jobs = []
        for path in paths:
            if boxed is not None and path not in boxed:
                continue
            found = tuple(boxed[path]) if boxed else ()
            cut = cut_of(path, found, every)
            if not is_unicode(str(path)):
                self.report.problems.append(f"{path}: the name is not UTF-8")
                continue
            try:
                status = path.stat()
            except OSError as error:
                self.report.problems.append(f"{path}: cannot be read ({error.strerror})")
                continue
            known = self.known.get(str(path))
            if known and known.complete and known.state == (status.st_size, status.st_mtime_ns, cut):
                self.report.unchanged += 1
                if pattern is not None:
                    try:
                        self.relabel(known, path, pattern)
                    except DataError as error:
                        self.report.problems.append(str(error))
            else:
                jobs.append(Job(path, status.st_size, status.st_mtime_ns, cut, found))
        return jobs

    def relabel(self, known: Known, path: Path, pattern: re.Pattern[str]) -> None:
        """Camera and time of a file that has not changed, by a pattern that may be new."""
        camera, time = by_pattern(path, pattern)
        rows = self.store.rows(known.ids)
        named = {id: replace(row, camera=camera or row.camera, time=at(time, row.seconds) or row.time)
                 for id, row in rows.items()}  # fmt: skip
        if named != rows:
            self.store.update(named)

    def take(self, job: Job, loaded: Loaded, every: float, bar: tqdm, files: Files) -> None:
        """One file whose content was read."""
        path, content = str(job.path), (loaded.digest, job.cut)
        if loaded.problem is not None:
            self.report.problems.append(loaded.problem)
            return
        if any((row.digest, row.cut) == content for row, *_ in self.pending):
            self.flush()
        known, same = self.known.get(path), self.by_content.get(content)
        if known is not None and known.complete and known.content == content:
            same = path  # before a copy of it
        if same is not None:
            self.take_known(job, loaded, same)
            return
        if is_video(job.path):
            done = self.take_video(job, loaded, every, bar)
        else:
            if loaded.pixels is None:  # the content was known, but has been replaced meanwhile
                again = Files([job], set(), self.size, files.pattern)[0]
                if again.problem is not None or again.pixels is None:
                    self.report.problems.append(again.problem or f"{path}: changed while it was read")
                    return
                loaded = again
            self.put(job, loaded, known)
            done = True
        if done and known:
            self.report.changed += 1
        elif done:
            self.report.added += 1

    def put(self, job: Job, loaded: Loaded, known: Known | None) -> None:
        """An image, or its crops, into the next batch."""
        if known:
            self.replaced[str(job.path)] = known.ids
            self.discard(self.known.pop(str(job.path)), str(job.path))
        pixels = loaded.pixels if loaded.pixels is not None else ()
        for number, (each, small) in enumerate(zip(pixels, loaded.thumbnails, strict=True), 1):
            box = job.boxes[number - 1] if job.boxes else None
            row = row_for(job, loaded, box=box, parts=number if number == len(pixels) else 0)
            self.append(row, each, small)

    def take_video(self, job: Job, loaded: Loaded, every: float, bar: tqdm) -> bool:
        """The frames, or the crops of frames, of a video. A video that breaks off is not indexed."""
        path, before = str(job.path), self.known.get(str(job.path))
        boxes: dict[int, list[Box | None]] = {}
        for box in job.boxes:
            boxes.setdefault(box.frame or 0, []).append(box)
        self.flush()
        self.known[path] = Known((job.size, job.mtime, job.cut), loaded.digest)
        held, count = None, 0
        try:
            for frame, seconds, image in frames(job.path, None if boxes else every, boxes):
                for box in boxes.get(frame, [None]):
                    if box is not None:
                        box.require_within(image.size)
                    part = image if box is None else image.crop(box.corners)
                    if held is not None:
                        self.append(*held)
                    count += 1
                    row = row_for(job, loaded, box=box, frame=frame, seconds=seconds)
                    held = row, load_pixels(part, self.size), thumbnail(part)
                    bar.set_postfix(frames=count, refresh=False)
            if held is not None:
                self.append(replace(held[0], parts=count), *held[1:])
            self.flush()
        except DataError as error:
            self.report.problems.append(str(error))
            self.pending.clear()
            self.remove(self.known[path].ids)
            self.known.pop(path)
            if before:
                self.known[path] = before
            return False
        if before:
            self.remove(before.ids)
        return True

    def take_known(self, job: Job, loaded: Loaded, same: str) -> None:
        """A file whose content is in the index: touched, moved, or a copy. Nothing is embedded."""
        path, source = str(job.path), self.known[same]
        before = self.known.get(path)
        rows = self.store.rows(source.ids)
        ids = [id for id in source.ids if id in rows]
        named = {
            id: replace(
                rows[id], path=path, camera=loaded.camera, time=at(loaded.time, rows[id].seconds), size=job.size,
                mtime=job.mtime,
            )
            for id in ids
        }  # fmt: skip
        found = Known((job.size, job.mtime, job.cut), loaded.digest, ids, source.parts)
        if same == path or gone(same):
            self.store.update(named)
            self.report.unchanged += same == path
            self.report.moved += same != path
            self.known.pop(same)
        else:
            found.ids = self.store.add(list(named.values()), self.store.vectors(ids))
            for id in found.ids:  # an earlier index of this name may have left a thumbnail; the right one is made later
                self.thumbnails.remove(id)
            self.report.added += before is None
            self.report.changed += before is not None
        if before is not None and same != path:
            self.discard(before, path)
            self.remove(before.ids)
        self.known[path] = found
        if gone(same) or same == path:
            self.by_content[found.content] = path

    # -------------------------------------------------------------------------------- drawings

    def add_drawings(self, drawings: Mapping[str, Drawing], progress: bool) -> Report:
        """Synthetic images by their names, without those that the index has."""
        new = [name for name in drawings if name not in self.known]
        for name in tqdm(new, desc="indexing", unit="image", disable=None if progress else True):
            image = load_image(drawings[name])
            self.append(Row(name, None, None, parts=1), load_pixels(image, self.size), thumbnail(image))
        self.flush()
        self.store.tidy()
        self.report.added, self.report.unchanged = len(new), len(drawings) - len(new)
        return self.report

    # -------------------------------------------------------------------------------- batches

    def append(self, row: Row, pixels: Tensor, small: bytes) -> None:
        self.pending.append((row, pixels, small))
        if len(self.pending) >= self.batch_size:
            self.flush()

    def flush(self) -> None:
        """Embeds and stores the images that wait."""
        if not self.pending:
            return
        batch, self.pending = self.pending, []
        vectors = self.encode(torch.stack([pixels for _, pixels, _ in batch]))
        rows = [row for row, *_ in batch]
        replaced = [id for row in rows for id in self.replaced.pop(row.path, ())]
        with self.thumbnails.removed(replaced):
            ids = self.store.add(rows, vectors, replaced)
        for id, row, (_, _, small) in zip(ids, rows, batch, strict=True):
            self.thumbnails.write(id, small)
            known = self.known.setdefault(row.path, Known((row.size, row.mtime, row.cut), row.digest))
            known.ids.append(id)
            known.parts = max(known.parts, row.parts)
            if known.complete and known.digest:
                self.by_content[known.content] = row.path

    # -------------------------------------------------------------------------------- removal

    def discard(self, known: Known, path: str) -> None:
        """Forgets that a path has this content."""
        if self.by_content.get(known.content) == path:
            del self.by_content[known.content]

    def remove(self, ids: Sequence[int]) -> None:
        with self.thumbnails.removed(ids):
            self.store.remove(ids)

    def prune(self, folders: Sequence[Path]) -> None:
        """Removes files that are gone and were below these folders."""
        found = [path for path in self.known if any(folder in Path(path).parents for folder in folders) and gone(path)]
        self.remove([id for path in found for id in self.known.pop(path).ids])
        self.report.removed += len(found)


def known_files(store: Store) -> dict[str, Known]:
    """The files of an index by path."""
    found: dict[str, Known] = {}
    for id, row in store.all_rows():
        state = (row.size, row.mtime, row.cut)
        known = found.setdefault(row.path, Known(state, row.digest))
        known.ids.append(id)
        known.parts = max(known.parts, row.parts)
        if known.state != state or known.digest != row.digest:
            known.parts = -1  # two contents, of a process that was killed; not complete
    return found


def cut_of(path: Path, boxes: Sequence[Box], every: float) -> str:
    """How a file is cut into images, in words that differ if the images do."""
    if boxes:
        listed = [(box.x, box.y, box.width, box.height, box.frame) for box in boxes]
        return f"boxes {hashlib.blake2b(repr(listed).encode(), digest_size=16).hexdigest()}"
    return f"every {every:g} s" if is_video(path) else "whole"


def row_for(
    job: Job,
    loaded: Loaded,
    *,
    box: Box | None,
    frame: int | None = None,
    seconds: float | None = None,
    parts: int = 0,
) -> Row:
    return Row(
        str(job.path), loaded.camera, at(loaded.time, seconds), seconds, frame,
        None if box is None else (box.x, box.y, box.width, box.height),
        job.size, job.mtime, loaded.digest, job.cut, parts,
    )  # fmt: skip


def at(start: datetime | None, seconds: float | None) -> datetime | None:
    """The time of an image, or of a frame so many seconds after the start of its video."""
    return start + timedelta(seconds=seconds) if start is not None and seconds is not None else start


def require_numbers(every: float, batch_size: int, workers: int | None) -> None:
    """Raises SearchError for options out of range."""
    if not (math.isfinite(every) and every > 0):
        raise SearchError(f"every: {every}; expected seconds above 0")
    if not 1 <= batch_size <= 2**17:
        raise SearchError(f"batch size: {batch_size}; expected 1 to {2**17:,}")
    if workers is not None and not 0 <= workers <= 256:
        raise SearchError(f"workers: {workers}; expected 0 to 256")
