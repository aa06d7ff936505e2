"""The identities of synthetic pedestrians, and their views."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from upperson.embedded.backgrounds import PLACES
from upperson.embedded.drawing import Light
from upperson.embedded.vocabulary import (
    BAGS,
    COLOURS,
    DENIM,
    HAIR,
    HAIR_COLOURS,
    HATS,
    RGB,
    SHOES,
    SKIN,
    Item,
    contrast,
    pick_item,
)

HEIGHT, WIDTH = 192, 64
FACINGS = ("front", "back", "left", "right")

# The frequency of each kind, as relative weights.
_UPPER = {
    "t-shirt": 5.0,
    "shirt": 3.0,
    "sweater": 3.0,
    "hoodie": 3.0,
    "jacket": 4.0,
    "padded jacket": 2.0,
    "coat": 2.0,
    "tank top": 1.5,
    "dress": 1.5,
}
_LOWER = {"trousers": 5.0, "jeans": 4.0, "shorts": 2.5, "skirt": 2.0, "long skirt": 1.0}
_UNDER_COAT = ("trousers", "jeans", "long skirt")
_SHOES = dict(zip(SHOES, (5.0, 3.0, 2.0, 1.5), strict=True))
_BAGS = dict(zip(BAGS, (5.0, 3.0, 2.0, 2.0, 1.0), strict=True))
_MENS_LOWER = {"trousers": 5.0, "jeans": 5.0, "shorts": 3.0}
_HAIR = dict(zip(HAIR, (1.0, 4.0, 3.0, 2.0, 1.5, 0.0), strict=True))
_MENS_HAIR = {"short hair": 6.0, "curly hair": 1.0, "bald": 0.8}
_HAIR_COLOURS = dict(zip(HAIR_COLOURS, (6.0, 4.0, 2.0, 1.0, 1.0), strict=True))


@dataclass(frozen=True)
class Identity:
    """The properties of a person that are the same in all views."""

    woman: bool
    skin: RGB
    girth: float  # 1 is average
    hair: Item
    upper: Item
    lower: Item | None  # None under a dress
    shoes: Item
    bag: Item | None
    bag_hand: int  # +1: the person's left hand, -1: the right hand
    hat: Item | None
    glasses: bool
    beard: bool
    inner: RGB  # the shirt in the neckline of a jacket or coat

    @property
    def appearance(self) -> tuple:
        """The features that are visible from every side. No two identities of a data set have the same appearance."""
        items = (self.hat, self.upper.without_logo(), self.lower, self.shoes)
        worn = tuple(item and (item.kind, item.colour, item.pattern, item.accent) for item in items)
        return (self.hair.colour, *worn)


@dataclass(frozen=True)
class View:
    """The view of an identity in one image."""

    facing: str  # one of FACINGS
    phase: float  # of the walk, radians
    height: float  # of the figure, pixels
    centre: float  # of the figure, pixels from the left
    feet: float  # pixels from the top
    place: str  # one of PLACES
    light: Light
    occluded: bool  # an obstacle is in front of the feet
    seed: int  # seed of the background's details and of the noise


def draw_identity(rng: random.Random) -> Identity:
    """Samples a person. Black, white, grey and blue clothes are more frequent, as on the street.

    Skirts, dresses, handbags and long hair are drawn on women; beards and bald heads on men. Captions in this field
    say "woman" and "man" by such signs.
    """
    skin, woman = rng.choice(SKIN), rng.random() < 0.5
    upper_kind = _choose(rng, {kind: weight for kind, weight in _UPPER.items() if woman or kind != "dress"})
    upper = _unlike(skin, lambda: pick_item(rng, upper_kind, patterned=0.4))
    bags = {kind: weight for kind, weight in _BAGS.items() if woman or kind != "handbag"}
    return Identity(
        woman=woman,
        skin=skin,
        girth=rng.uniform(0.86, 1.1) if woman else rng.uniform(0.94, 1.18),
        hair=_unlike(skin, lambda: _draw_hair(rng, woman)),
        upper=upper,
        lower=None if upper.kind == "dress" else _draw_lower(rng, upper, woman),
        shoes=pick_item(rng, _choose(rng, _SHOES)),
        bag=pick_item(rng, _choose(rng, bags)) if rng.random() < 0.65 else None,
        bag_hand=rng.choice((-1, 1)),
        hat=pick_item(rng, rng.choice(tuple(HATS))) if rng.random() < 0.2 else None,
        glasses=rng.random() < 0.2,
        beard=not woman and rng.random() < 0.3,
        inner=rng.choice(COLOURS[rng.choice(("white", "grey", "black", "light blue"))].shades),
    )


def draw_views(rng: random.Random, count: int) -> list[View]:
    """Samples `count` views of an identity, from different sides, at different places, with different cameras."""
    facings = rng.sample(FACINGS, len(FACINGS))
    places = rng.sample(tuple(PLACES), len(PLACES))
    return [_draw_view(rng, facings[i % len(facings)], places[i % len(places)]) for i in range(count)]


def _draw_view(rng: random.Random, facing: str, place: str) -> View:
    height, warmth = rng.uniform(158, 178), rng.gauss(0, 0.05)
    return View(
        facing=facing,
        phase=rng.uniform(0, 2 * math.pi),
        height=height,
        centre=WIDTH / 2 + rng.uniform(-4, 4),
        feet=min(HEIGHT - 4, (HEIGHT + height) / 2 + rng.uniform(-5, 7)),
        place=place,
        light=Light(
            brightness=rng.uniform(0.72, 1.12),
            contrast=rng.uniform(0.75, 1.1),
            cast=(1 + warmth, 1.0, 1 - warmth),
            slope=rng.uniform(-0.3, 0.3),
            noise=rng.uniform(2, 7),
            blur=rng.choice((0, 0.4, 0.7)),
        ),
        occluded=rng.random() < 0.12,
        seed=rng.getrandbits(63),
    )


def _draw_hair(rng: random.Random, woman: bool) -> Item:
    colour = _choose(rng, _HAIR_COLOURS)
    return Item(_choose(rng, _HAIR if woman else _MENS_HAIR), colour, rng.choice(HAIR_COLOURS[colour]))


def _draw_lower(rng: random.Random, upper: Item, woman: bool) -> Item:
    kinds = _LOWER if woman else _MENS_LOWER
    if upper.kind == "coat":  # it would hide shorter kinds
        kinds = {kind: weight for kind, weight in kinds.items() if kind in _UNDER_COAT}
    kind = _choose(rng, kinds)
    among = DENIM if kind == "jeans" else tuple(COLOURS)
    patterned = 0.12 if kind in ("skirt", "long skirt", "shorts") else 0.0
    return _unlike(upper.rgb, lambda: pick_item(rng, kind, among, patterned).without_logo())


def _unlike(rgb: RGB, draw: Callable[[], Item]) -> Item:
    """Samples items until the item's colour differs enough from the adjacent colour."""
    while contrast((item := draw()).rgb, rgb) < 50:
        pass
    return item


def _choose(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]
