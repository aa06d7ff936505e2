"""An image of the embedded data set: an identity in a view."""

import random
from dataclasses import dataclass, replace

from PIL import Image

from upperson.embedded.backgrounds import draw_background
from upperson.embedded.drawing import Canvas, mix, shade
from upperson.embedded.figure import draw_figure
from upperson.embedded.identities import HEIGHT, WIDTH, Identity, View
from upperson.embedded.vocabulary import Item


@dataclass(frozen=True)
class Pedestrian:
    """An image of a person. Every call of `draw` gives the same pixels."""

    identity: Identity
    view: View

    def draw(self) -> Image.Image:
        """Draws the RGB image, 192 pixels high and 64 wide."""
        rng = random.Random(self.view.seed)
        canvas = Canvas(WIDTH, HEIGHT, (128, 128, 128))
        draw_background(canvas, self.view.place, rng)
        draw_figure(canvas, self.identity, self.view)
        if self.view.occluded:
            _draw_obstacle(canvas, rng)
        return self.view.light.apply(canvas.finish(), self.view.seed)

    def visible(self) -> dict[str, Item]:
        """The items that a caption may mention, by part. Items that are hidden in this view are excluded."""
        person, facing = self.identity, self.view.facing
        parts = {"upper": person.upper, "lower": person.lower, "hair": person.hair, "hat": person.hat}
        if facing != "front":
            parts["upper"] = person.upper.without_logo()
        if person.hair.kind == "bald":
            parts["hair"] = None if person.hat else person.hair
        elif person.hat or (facing == "front" and person.hair.kind in ("ponytail", "bun")):
            parts["hair"] = replace(person.hair, kind="hair")  # the colour is visible, the style is not
        if person.beard and facing != "back":
            parts["beard"] = Item("beard", person.hair.colour, person.hair.rgb)
        if person.glasses and facing != "back":
            parts["glasses"] = Item("glasses", "black", (25, 25, 30))
        if not self.view.occluded:
            parts["shoes"] = person.shoes
        if person.bag and _bag_shows(person.bag, person.bag_hand, facing):
            parts["bag"] = person.bag
        return {part: item for part, item in parts.items() if item is not None}

    def looks_like(self) -> str:
        """ "woman" or "man" where this view shows a sign of it, otherwise "person"."""
        shown = self.visible()
        kinds = {item.kind for item in shown.values()}
        if kinds & {"skirt", "long skirt", "dress", "handbag", "long hair", "ponytail", "bun"}:
            return "woman"
        return "man" if kinds & {"beard", "bald"} or (not self.identity.woman and "short hair" in kinds) else "person"


def _bag_shows(bag: Item, hand: int, facing: str) -> bool:
    """Whether a bag is visible. Seen from the side, a bag in the far hand is behind the body."""
    if bag.kind == "backpack" or facing in ("front", "back"):
        return True
    return hand == (-1 if facing == "right" else 1)


def _draw_obstacle(canvas: Canvas, rng: random.Random) -> None:
    """A hedge or a low wall between the camera and the feet."""
    top = HEIGHT * rng.uniform(0.84, 0.88)
    if rng.random() < 0.5:
        hedge = mix((52, 92, 48), (96, 120, 60), rng.random())
        for x in range(-4, WIDTH + 8, 9):
            canvas.ellipse(x, top + 10, 10, 10 + rng.uniform(-3, 3), shade(hedge, rng.uniform(0.85, 1.15)))
        canvas.rectangle(0, top + 10, WIDTH, HEIGHT, hedge)
    else:
        grey = rng.randint(110, 180)
        stone = (grey, grey, grey)
        canvas.rectangle(0, top, WIDTH, HEIGHT, stone)
        canvas.rectangle(0, top, WIDTH, top + 4, shade(stone, 1.2))
