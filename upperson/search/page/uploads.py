"""Images that a user of the page searches by: decoded, and kept in memory only."""

import io
import secrets
import threading
from collections import OrderedDict

from PIL import Image

from upperson.data import load_image

MAX_BYTES = 32 * 2**20
MAX_SIDE = 1024  # pixels of an image that is kept; a CLIP sees at most a few hundred
KEPT = 32


class Uploads:
    """The latest KEPT images by a name that cannot be guessed. Threads may use it at once."""

    def __init__(self):
        self.images: OrderedDict[str, Image.Image] = OrderedDict()
        self.lock = threading.Lock()

    def add(self, content: bytes) -> str:
        """Decodes the content of an image file and returns the image's name. Raises DataError as `load_image`."""
        image = load_image(content)
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        name = secrets.token_urlsafe(12)
        with self.lock:
            self.images[name] = image
            while len(self.images) > KEPT:
                self.images.popitem(last=False)
        return name

    def get(self, name: str) -> Image.Image | None:
        with self.lock:
            if name in self.images:
                self.images.move_to_end(name)
            return self.images.get(name)

    def jpeg(self, name: str) -> bytes | None:
        """A small picture of an image, for the page."""
        image = self.get(name)
        if image is None:
            return None
        small = image.copy()
        small.thumbnail((192, 192))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=85)
        return file.getvalue()
