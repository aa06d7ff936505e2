"""The embedded data sets as lists of captioned drawings: people in several views, or scenes, by day or by night."""

import itertools
import random
from typing import NamedTuple

from upperson.embedded.captions import describe
from upperson.embedded.drawing import Drawing
from upperson.embedded.identities import Identity, draw_identity, draw_views
from upperson.embedded.night import Night
from upperson.embedded.pedestrians import Pedestrian
from upperson.embedded.scenes import draw_scene

CAPTIONS_PER_IMAGE = 2

# The first seed of draw_scene by night (True) and day (False). The small CLIP was trained with seed 0.
SCENE_SERIES = {False: 1_000_000, True: 2_000_000}


class CaptionedDrawing(NamedTuple):
    """A caption and its drawing."""

    image: Drawing
    caption: str
    person_id: int
    image_id: int


def read_embedded(
    seed: int = 0, *, train: int = 600, val: int = 100, test: int = 200, views: int = 4, night: bool = False
) -> dict[str, list[CaptionedDrawing]]:
    """Synthetic pedestrians by split. `train`, `val` and `test` are numbers of identities, each with `views` images.

    No identity is in two splits, and no two identities look the same from every side. The identities of night and day
    differ. The same arguments give the same drawings in every process. `image.draw()` draws an image of 192 x 64 pixels
    (height x width). Raises ValueError for a size below 1.
    """
    _check_sizes(train=train, val=val, test=test, views=views)
    rng = random.Random(f"pedestrians by night/{seed}" if night else f"pedestrians/{seed}")
    seen: set[tuple] = set()
    splits: dict[str, list[CaptionedDrawing]] = {}
    person_id = image_id = 0
    for split, identities in (("train", train), ("val", val), ("test", test)):
        splits[split] = []
        for _ in range(identities):
            identity = _new_identity(rng, seen)
            for view in draw_views(rng, views):
                pedestrian = Pedestrian(identity, view)
                image = Night(pedestrian, view.seed) if night else pedestrian
                for caption in _captions(rng, pedestrian):
                    splits[split].append(CaptionedDrawing(image, caption, person_id, image_id))
                image_id += 1
            person_id += 1
    return splits


def read_scenes(
    seed: int = 0, *, train: int = 600, val: int = 100, test: int = 200, night: bool = False
) -> dict[str, list[CaptionedDrawing]]:
    """Synthetic scenes without people, by split. Each scene has its own identity and one unique caption.

    The small CLIP was not trained on these scenes. The scenes of night and day differ. The same arguments give the same
    drawings in every process. `image.draw()` draws an image of 128 x 128 pixels. Raises ValueError for a size below 1.
    """
    _check_sizes(train=train, val=val, test=test)
    scenes = (draw_scene(SCENE_SERIES[night] + seed, index) for index in itertools.count())
    seen: set[str] = set()
    splits: dict[str, list[CaptionedDrawing]] = {}
    for split, size in (("train", train), ("val", val), ("test", test)):
        splits[split] = []
        while len(splits[split]) < size:
            scene = next(scenes)
            if scene.caption not in seen:
                image = Night(scene, scene.seed) if night else scene
                splits[split].append(CaptionedDrawing(image, scene.caption, person_id=len(seen), image_id=len(seen)))
                seen.add(scene.caption)
    return splits


def _check_sizes(**sizes: int) -> None:
    if min(sizes.values()) < 1:
        raise ValueError(f"{', '.join(sizes)} must be at least 1, found {tuple(sizes.values())}")


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
