"""The embedded data sets as lists of captioned drawings: people in several views, or scenes; by day and by night."""

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

# Series of draw_scene, by "is it night", which the embedded seed is added to. The small CLIP was trained on series 0.
SCENE_SERIES = {False: 1_000_000, True: 2_000_000}


class CaptionedDrawing(NamedTuple):
    """One caption and the drawing that it describes."""

    image: Drawing
    caption: str
    person_id: int
    image_id: int


def read_embedded(
    seed: int = 0, *, train: int = 600, val: int = 100, test: int = 200, views: int = 4, night: bool = False
) -> dict[str, list[CaptionedDrawing]]:
    """Pedestrians by split; `train`, `val` and `test` are numbers of identities, each shown in `views` images.

    No identity is in two splits, and no two of them look alike from every side. Those of the night are other
    people than those of the day. The same arguments give the same drawings in every process. Images are 192 x 64
    (height x width), drawn by `image.draw()`.
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
    """Scenes without people by split; each is an identity of its own, with one caption that no other one has.

    The small CLIP has seen none of them in its training, and those of the night are others than those of the day.
    The same arguments give the same drawings in every process. Images are 128 x 128, drawn by `image.draw()`.
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
