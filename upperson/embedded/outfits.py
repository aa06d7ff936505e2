"""Clothes on a stand, as in a shop: garments, shoes, a bag, a hat and a wig. Nobody wears them.

The captions speak of the one who may wear them, in the forms of captions of pedestrians.
"""

import random

from upperson.embedded.captions import Speech, describe_worn, mentioned
from upperson.embedded.drawing import Canvas
from upperson.embedded.objects import draw_item
from upperson.embedded.vocabulary import (
    BAGS,
    DENIM,
    HAIR,
    HAIR_COLOURS,
    HATS,
    LOWER,
    SHOES,
    UPPER,
    Item,
    pick_item,
)

HEIGHT, WIDTH = 192, 64

FOR_A_WOMAN = Speech(
    ("a stand for a woman", "this lady's stand", "a woman's stand", "the stand for the woman", "a stand for a female"),
    "she",
    "her",
)
FOR_A_MAN = Speech(
    ("a stand for a man", "this guy's stand", "a man's stand", "the stand for the man", "a stand for a male"),
    "he",
    "his",
)
FOR_SOMEONE = Speech(
    ("a stand for a person", "the stand", "this individual stand", "a clothes stand", "a stand for a pedestrian"),
    "it",
    "its",
)

# The share of items of a scene that have synonyms: a caption of pedestrians has them for all items.
SYNONYMS = 0.1

GLASSES = Item("glasses", "black", (25, 25, 30))

_WOMENS = {"skirt", "long skirt", "dress", "handbag", "long hair", "ponytail", "bun"}


def draw_garment(rng: random.Random, kind: str) -> Item:
    """Samples a garment, a bag, a hat or shoes of a kind."""
    patterned = 0.5 if kind in UPPER else 0.15 if kind in LOWER and kind != "jeans" else 0.0
    item = pick_item(rng, kind, DENIM, patterned) if kind == "jeans" else pick_item(rng, kind, patterned=patterned)
    return item if kind in UPPER else item.without_logo()


def draw_hair(rng: random.Random) -> Item:
    """Samples a wig, or a stand without one."""
    colour = rng.choice(tuple(HAIR_COLOURS))
    return Item(rng.choice(tuple(HAIR)), colour, rng.choice(HAIR_COLOURS[colour]))


def draw_outfit(rng: random.Random) -> dict[str, Item]:
    """Samples the items of an outfit by part: most outfits have an upper and a lower garment and shoes."""

    def one_of(kinds: dict[str, tuple[str, ...]]) -> Item:
        return draw_garment(rng, rng.choice(tuple(kinds)))

    parts = {}
    if rng.random() < 0.95:
        parts["upper"] = one_of(UPPER)
    if rng.random() < 0.93 and not ("upper" in parts and parts["upper"].kind == "dress"):
        parts["lower"] = one_of(LOWER)
    for part, kinds, share in (("shoes", SHOES, 0.85), ("bag", BAGS, 0.6), ("hat", HATS, 0.25)):
        if rng.random() < share:
            parts[part] = one_of(kinds)
    if not parts.keys() & {"upper", "lower"}:
        parts["upper"] = one_of(UPPER)
    if rng.random() < 0.2:
        parts["glasses"] = GLASSES
    if "hat" not in parts and rng.random() < 0.75:
        hair = draw_hair(rng)
        if hair.kind != "bald" or not _is_womens(parts):
            parts["hair"] = hair
    return parts


def _is_womens(parts: dict[str, Item]) -> bool:
    return any(item.kind in _WOMENS for item in parts.values())


def describe_outfit(rng: random.Random, parts: dict[str, Item], setting: str) -> str:
    """A caption of an outfit: a woman's with a skirt, dress, handbag or long hair, a man's with short hair."""
    mens = "hair" in parts and parts["hair"].kind in ("short hair", "bald")
    speech = FOR_A_WOMAN if _is_womens(parts) else FOR_A_MAN if mens else FOR_SOMEONE
    return describe_worn(rng, mentioned(rng, parts), speech, setting, synonyms=SYNONYMS)


def draw_stand(canvas: Canvas, parts: dict[str, Item], rng: random.Random) -> None:
    """Draws an outfit on a canvas of 192 x 64 pixels. The positions are sampled from `rng`."""
    x, steel = WIDTH / 2 + rng.uniform(-5, 5), (120, 120, 124)
    scale, drop = rng.uniform(0.88, 1.04), rng.uniform(-3, 8)

    def put(part: str, dx: float, y: float, width: float, height: float) -> None:
        if part in parts:
            grown = scale * rng.uniform(0.92, 1.08)
            at = (x + dx + rng.uniform(-2, 2), y * scale + drop + rng.uniform(-2, 2))
            draw_item(canvas, parts[part], *at, width * grown, height * grown)

    canvas.line(((x, 20), (x, HEIGHT - 6)), 2.4, steel)
    canvas.line(((x - 12, HEIGHT - 5), (x + 12, HEIGHT - 5)), 3.0, steel)
    canvas.line(((x - 16, 44 * scale + drop), (x, 36 * scale + drop), (x + 16, 44 * scale + drop)), 2.0, steel)
    put("hair", 0, 20, 14, 15)
    put("hat", 0, 18, 14, 13)
    put("glasses", 0, 24, 12, 12)
    upper_last = rng.random() < 0.8
    if upper_last:
        put("lower", 0, 132, rng.uniform(24, 32), 42)
    put("upper", 0, 70, rng.uniform(22, 28), 36)
    if not upper_last:
        put("lower", 0, 136, rng.uniform(24, 32), 40)
    put("shoes", 0, 175, 15, 14)
    side = rng.choice((-1, 1))
    if "bag" in parts:
        large = parts["bag"].kind in ("backpack", "suitcase")
        height = 148 if parts["bag"].kind == "suitcase" else rng.uniform(80, 125)
        put("bag", side * rng.uniform(12, 22), height, *((14, 20) if large else (12, 14)))
