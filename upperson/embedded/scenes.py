"""Synthetic scenes without people, for pretraining: garments, bags, shoes, hats, wigs and toys."""

import random
from dataclasses import dataclass

from PIL import Image

from upperson.embedded.backgrounds import ROOMS, draw_background
from upperson.embedded.captions import listed, noun_phrase
from upperson.embedded.drawing import Canvas, Light
from upperson.embedded.objects import draw_item
from upperson.embedded.sentences import MISSPELT, SHOP, WEARERS
from upperson.embedded.vocabulary import (
    BAGS,
    DENIM,
    HAIR,
    HAIR_COLOURS,
    HATS,
    LOWER,
    NAMES,
    SHOES,
    UPPER,
    Item,
    pick_item,
)

SIZE = 128
SYNONYMS = 0.1  # the share of items with synonyms; captions of pedestrians have them for all items

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
    "scarf": ("scarf", "shawl"),
    "tie": ("tie", "necktie"),
    "belt": ("belt", "belt with a buckle"),
    "watch": ("watch", "wristwatch"),
    "socks": ("socks", "ankle socks"),
    "gloves": ("gloves", "winter gloves"),
    "phone": ("cell phone", "phone", "cellphone"),
    "book": ("book", "notebook", "folder"),
    "bicycle": ("bicycle", "bike"),
    "leggings": ("leggings", "tights"),
    "tree": ("tree",),
    "star": ("star",),
    "stroller": ("stroller", "baby stroller"),
    "guitar": ("guitar",),
    "glasses": ("glasses", "sunglasses"),
}
_NAMES = {**NAMES, **TOYS}
_PATTERNED_TOYS = ("ball", "box", "cup", "flag", "umbrella", "balloon", "blanket", "fish", "scarf", "tie", "socks")


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
        """Draws the RGB image of 128 x 128 pixels, always the same."""
        rng = random.Random(self.seed)
        canvas = Canvas(SIZE, SIZE, (128, 128, 128), scale=2)
        draw_background(canvas, self.place, rng)
        for thing in self.things:
            draw_item(canvas, thing.item, thing.x, thing.y, thing.size)
        return self.light.apply(canvas.finish(), self.seed)

    def items(self) -> list[Item]:
        """All visible items."""
        return [thing.item for thing in self.things]


def draw_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the infinite series of a seed."""
    rng = random.Random(f"scene/{seed}/{index}")
    place = rng.choice(tuple(ROOMS))
    things, words = rng.choices((_side_by_side, _shelf, _alone), (4, 2, 3))[0](rng)
    if rng.random() < 0.3:
        words += " " + rng.choice(ROOMS[place])
    caption = _with_sentences(rng, words[0].upper() + words[1:] + ".")
    warmth = rng.gauss(0, 0.05)
    light = Light(
        brightness=rng.uniform(0.75, 1.12),
        contrast=rng.uniform(0.75, 1.1),
        cast=(1 + warmth, 1.0, 1 - warmth),
        slope=rng.uniform(-0.3, 0.3),
        noise=rng.uniform(0, 7),
        blur=rng.choice((0, 0, 0.5)),
    )
    return Scene(tuple(things), place, light, caption, rng.getrandbits(63))


def _with_sentences(rng: random.Random, caption: str) -> str:
    """The caption, often with a sentence about what the picture does not show, and rarely with misspelt words."""
    if rng.random() < 0.75:
        more = rng.choice(rng.choice((WEARERS, SHOP)))
        caption = f"{caption} {more}" if rng.random() < 0.8 else f"{more} {caption}"
    if rng.random() < 0.06:
        for word, spellings in MISSPELT.items():
            if f" {word} " in caption:
                caption = caption.replace(f" {word} ", f" {rng.choice(spellings)} ", 1)
    return caption


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
    """An item in words."""
    if item.kind in HAIR:
        return "a wig with " + rng.choice(HAIR[item.kind]).format(item.colour)
    return noun_phrase(rng, item, _NAMES, synonyms=rng.random() < SYNONYMS)


def _anything(rng: random.Random) -> Item:
    choice = rng.random()
    if choice < 0.05:
        hair = _hair(rng)
        return hair if hair.kind != "bald" else _garment(rng, rng.choice(tuple(HATS)))
    if choice < 0.6:
        return _garment(rng, rng.choice(tuple(rng.choice((UPPER, LOWER, SHOES, BAGS, HATS)))))
    kind = rng.choice(tuple(TOYS))
    return pick_item(rng, kind, patterned=0.4 if kind in _PATTERNED_TOYS else 0.0).without_logo()


def _garment(rng: random.Random, kind: str) -> Item:
    """A garment, a bag, a hat or shoes of a kind."""
    patterned = 0.5 if kind in UPPER else 0.15 if kind in LOWER and kind != "jeans" else 0.0
    item = pick_item(rng, kind, DENIM, patterned) if kind == "jeans" else pick_item(rng, kind, patterned=patterned)
    return item if kind in UPPER else item.without_logo()


def _hair(rng: random.Random) -> Item:
    """A wig, or hair of a bald head, which cannot be shown alone."""
    colour = rng.choice(tuple(HAIR_COLOURS))
    return Item(rng.choice(tuple(HAIR)), colour, rng.choice(HAIR_COLOURS[colour]))
