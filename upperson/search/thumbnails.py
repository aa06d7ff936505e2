"""Thumbnails: JPEG files in a folder beside the index, named by id, 1,000 in a folder."""

import io
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from upperson.files import write_atomically
from upperson.search.media import TAG

END = b"\xff\xd9"  # of a JPEG file
SIZE = (1024, 384)  # at most, width and height in pixels
SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# thumbnails of upperson search; they can be made again\n"


def thumbnail(image: Image.Image) -> bytes:
    """The JPEG file of an RGB image, made smaller if necessary."""
    image = image.copy()
    image.thumbnail(SIZE)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


class Thumbnails:
    """The folder of the thumbnails of an index, which begins with the path `kept_at`."""

    def __init__(self, kept_at: Path):
        self.folder = kept_at.with_name(f"{kept_at.name}.thumbnails")

    def path(self, id: int) -> Path:
        return self.folder / f"{id // 1000}" / f"{id}.jpg"

    def read(self, id: int) -> bytes | None:
        """The file; None for one that is lost or cannot be read, or that a power failure has damaged."""
        with suppress(OSError):
            content = self.path(id).read_bytes()
            return content if content.endswith(END) else None
        return None

    def write(self, id: int, content: bytes) -> None:
        path = self.path(id)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / TAG, SIGNATURE)
        write_atomically(path, content, durable=False)

    @contextmanager
    def removed(self, ids: Collection[int]) -> Iterator[None]:
        """A context that removes entries from the index, whose files are removed too.

        They go before it, as the process may be killed, and after it, as a search meanwhile may make them again.
        """
        for id in ids:
            self.remove(id)
        yield
        for id in ids:
            self.remove(id)

    def remove(self, id: int) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path(id))

    def clear(self) -> None:
        """Removes those that an earlier index of this name has left; its ids are given again."""
        if (self.folder / TAG).is_file():  # otherwise the folder is somebody's own
            for path in self.folder.glob("*/*.jpg"):
                path.unlink(missing_ok=True)
