"""The embedded data set as lists of samples: identities, their views, two captions an image."""

import random

from upperson.data.samples import Sample
from upperson.embedded.captions import describe
from upperson.embedded.identities import Identity, draw_identity, draw_views
from upperson.embedded.pedestrians import Pedestrian

CAPTIONS_PER_IMAGE = 2


def read_embedded(
    seed: int = 0, *, train: int = 600, val: int = 100, test: int = 200, views: int = 4
) -> dict[str, list[Sample]]:
    """Samples by split; `train`, `val` and `test` are numbers of identities, each shown in `views` images.

    No identity is in two splits, and no two of them look alike from every side. The same arguments give the
    same samples in every process. Images are 192 x 64 (height x width), drawn by `Sample.image.draw()`.
    """
    if min(train, val, test, views) < 1:
        raise ValueError(f"train, val, test and views must be at least 1, found {(train, val, test, views)}")
    rng = random.Random(f"pedestrians/{seed}")
    seen: set[tuple] = set()
    splits: dict[str, list[Sample]] = {}
    person_id = image_id = 0
    for split, identities in (("train", train), ("val", val), ("test", test)):
        splits[split] = []
        for _ in range(identities):
            identity = _new_identity(rng, seen)
            for view in draw_views(rng, views):
                image = Pedestrian(identity, view)
                for caption in _captions(rng, image):
                    splits[split].append(Sample(image, caption, person_id, image_id))
                image_id += 1
            person_id += 1
    return splits


def _new_identity(rng: random.Random, seen: set[tuple]) -> Identity:
    while (identity := draw_identity(rng)).appearance in seen:
        pass
    seen.add(identity.appearance)
    return identity


def _captions(rng: random.Random, image: Pedestrian) -> list[str]:
    captions: list[str] = []
    while len(captions) < CAPTIONS_PER_IMAGE:
        caption = describe(rng, image)
        if caption not in captions:
            captions.append(caption)
    return captions
