"""A gallery with the interface of upperson.search.Gallery that needs no model: synthetic people and their colours."""

import io
from datetime import datetime, timedelta
from fnmatch import fnmatch

import numpy as np
from PIL import Image

from upperson.embedded.dataset import read_embedded
from upperson.errors import SearchError
from upperson.search import Entry, Hit, Query

START = datetime(2026, 1, 31, 8, 30)
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}


class GalleryInMemory:
    """Ranks images by the colour of the middle of the body. Sentences count by their colour words."""

    name = "/data/people.db"
    model = "runs/embedded-1/best.safetensors"

    def __init__(self, people: int = 8, views: int = 4):
        captioned = read_embedded(train=1, val=1, test=people, views=views)["test"] if people else []
        drawings = list({item.image_id: item.image for item in captioned}.values())
        self.images = {id: drawing.draw() for id, drawing in enumerate(drawings, start=1)}
        self.entries = {
            id: Entry(
                id,
                f"/photos/<b>street & park</b>/{id:04d}.jpg",
                f"entrance {id % 3 + 1}",
                START + timedelta(minutes=id),
                seconds=None if id % 2 else 60.0 + id,
                box=(120, 40, 64, 192) if id % 4 == 0 else None,
            )
            for id in self.images
        }

    def __len__(self):
        return len(self.entries)

    def search(self, query: Query):
        features = [self.words(text) for text in query.sentences]
        features += [self.colour(image) for image in query.images]
        for id in query.like:
            if id not in self.entries:
                raise SearchError(f"image {id} is not in {self.name}")
            features.append(self.colour(self.images[id]))
        if "broken" in query.sentences:
            raise SearchError("people.db: the index is damaged; expected a file that `upperson search index` wrote")
        direction = np.mean(features, axis=0)
        if query.avoid:
            direction = direction - query.avoid_weight * np.mean([self.words(text) for text in query.avoid], axis=0)
        kept = [entry for entry in self.entries.values() if self.fits(entry, query)]
        scored = [(cosine(direction, self.colour(self.images[entry.id])), entry) for entry in kept]
        scored.sort(key=lambda pair: -pair[0])
        return [Hit(rank, score, entry) for rank, (score, entry) in enumerate(scored[: query.top], start=1)]

    def fits(self, entry, query):
        return (
            (not query.cameras or entry.camera in query.cameras)
            and (query.since is None or entry.time >= query.since)
            and (query.until is None or entry.time <= query.until)
            and (query.path is None or fnmatch(entry.path, query.path))
        )

    def words(self, text):
        found = [np.array(rgb, float) for word, rgb in COLOURS.items() if word in text]
        return np.mean(found, axis=0) - 0.5 if found else np.full(3, 0.1)

    def colour(self, image):
        width, height = image.size
        middle = image.crop((width // 3, height // 4, 2 * width // 3, height // 2))
        return np.asarray(middle, float).mean(axis=(0, 1)) / 255 - 0.5

    def thumbnail(self, id):
        if id not in self.images:
            raise SearchError(f"image {id} is not in {self.name}")
        file = io.BytesIO()
        self.images[id].save(file, "JPEG", quality=90)
        return file.getvalue()

    def sample(self, number):
        return list(self.entries.values())[:number]

    def cameras(self):
        return sorted({entry.camera for entry in self.entries.values()})

    def times(self):
        times = [entry.time for entry in self.entries.values()]
        return (min(times), max(times)) if times else None

    def examples(self):
        return ["a person in a red jacket", "someone with a blue coat and a backpack", "a <i>green</i> shirt"]


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def jpeg(colour="red", size=(60, 180)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()
