"""Synthetic scenes without people, for pretraining: garments, bags, shoes and toys in several places."""

import random
from dataclasses import dataclass

from PIL import Image

from upperson.embedded.backgrounds import ROOMS, draw_background
from upperson.embedded.captions import listed, noun_phrase
from upperson.embedded.drawing import Canvas, Light
from upperson.embedded.objects import draw_item
from upperson.embedded.vocabulary import BAGS, COLOURS, DENIM, HATS, LOWER, NAMES, SHOES, UPPER, Item, pick_item

SIZE = 128

TOYS = {
    "ball": ("ball", "round ball"),
    "box": ("box", "crate"),
    "cup": ("cup", "mug"),
    "car": ("car", "small car"),
    "house": ("house", "small house"),
    "flag": ("flag", "flag on a pole"),
    "umbrella": ("umbrella", "parasol"),
    "chair": ("chair", "wooden chair"),
    "bottle": ("bottle",),
    "balloon": ("balloon",),
    "fish": ("fish",),
    "bird": ("bird", "little bird"),
    "flower": ("flower", "tall flower"),
    "blanket": ("blanket", "rug"),
    "boat": ("boat", "sailing boat"),
    "horse": ("horse", "toy horse"),
}
_NAMES = {**NAMES, **TOYS}
_PATTERNED_TOYS = ("ball", "box", "cup", "flag", "umbrella", "balloon", "blanket", "fish")


@dataclass(frozen=True)
class Placed:
    """An item with its centre and half size, in pixels."""

    item: Item
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """An image for pretraining, with its caption."""

    things: tuple[Placed, ...]
    place: str
    light: Light
    caption: str
    seed: int

    def draw(self) -> Image.Image:
        """Draws the RGB image of 128 x 128 pixels. The pixels are always the same."""
        canvas = Canvas(SIZE, SIZE, (128, 128, 128), scale=2)
        draw_background(canvas, self.place, random.Random(self.seed))
        for thing in self.things:
            draw_item(canvas, thing.item, thing.x, thing.y, thing.size)
        return self.light.apply(canvas.finish(), self.seed)


def draw_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the infinite series of a seed."""
    rng = random.Random(f"scene/{seed}/{index}")
    things, words = rng.choices((_side_by_side, _shelf, _alone), (4, 2, 3))[0](rng)
    place = rng.choice(tuple(ROOMS))
    if rng.random() < 0.3:
        words += " " + rng.choice(ROOMS[place])
    warmth = rng.gauss(0, 0.03)
    light = Light(
        brightness=rng.uniform(0.9, 1.1),
        contrast=rng.uniform(0.9, 1.05),
        cast=(1 + warmth, 1.0, 1 - warmth),
        slope=rng.uniform(-0.15, 0.15),
        noise=rng.uniform(0, 4),
    )
    return Scene(tuple(things), place, light, words[0].upper() + words[1:] + ".", rng.getrandbits(63))


# -- arrangements: the placed items, and their description


def _side_by_side(rng: random.Random) -> tuple[list[Placed], str]:
    left, right = _anything(rng), _anything(rng)
    things = [
        Placed(left, rng.uniform(28, 38), rng.uniform(45, 90), rng.uniform(18, 29)),
        Placed(right, rng.uniform(90, 100), rng.uniform(45, 90), rng.uniform(18, 29)),
    ]
    a, b = _words(rng, left), _words(rng, right)
    ways = (
        "{0} to the left of {1}",
        "{1} to the right of {0}",
        "{0} on the left and {1} on the right",
        "{0} and {1}",
        "{1} beside {0}",
    )
    return things, rng.choice(ways).format(a, b)


def _shelf(rng: random.Random) -> tuple[list[Placed], str]:
    items = [_anything(rng) for _ in range(3)]
    y = rng.uniform(50, 85)
    things = [Placed(item, 22 + 42 * column, y, rng.uniform(15, 19)) for column, item in enumerate(items)]
    ending = rng.choice(("", " in a row", " on a shelf"))
    return things, listed([_words(rng, item) for item in items]) + ending


def _alone(rng: random.Random) -> tuple[list[Placed], str]:
    item, size = _anything(rng), rng.uniform(20, 46)
    words = _words(rng, item)
    if rng.random() < 0.3:
        ways = ("there is {}", "one can see {}", "a picture of {}", "this is {}", "someone left {}")
        words = rng.choice(ways).format(words)
    elif size > 38 and item.kind in TOYS:
        words = f"{words} seen from close by"
    return [Placed(item, rng.uniform(50, 78), rng.uniform(56, 76), size)], words


def _words(rng: random.Random, item: Item) -> str:
    """An item in words without synonyms: only the captions of pedestrians contain synonyms."""
    return noun_phrase(rng, item, _NAMES, synonyms=False)


def _garment(rng: random.Random, kind: str) -> Item:
    among = DENIM if kind == "jeans" else tuple(COLOURS)
    patterned = 0.5 if kind in UPPER else 0.15 if kind in LOWER and kind != "jeans" else 0.0
    item = pick_item(rng, kind, among, patterned)
    return item if kind in UPPER else item.without_logo()


def _anything(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        return _garment(rng, rng.choice(tuple(rng.choice((UPPER, LOWER, SHOES, BAGS, HATS)))))
    kind = rng.choice(tuple(TOYS))
    return pick_item(rng, kind, patterned=0.4 if kind in _PATTERNED_TOYS else 0.0).without_logo()
