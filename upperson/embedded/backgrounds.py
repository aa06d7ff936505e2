"""The background of a figure or an object: public places for pedestrians, rooms for the pretraining scenes."""

import random

from upperson.embedded.drawing import Canvas, mix, shade
from upperson.embedded.vocabulary import RGB

# name -> phrases for a caption
ROOMS = {
    "studio": ("on a plain background",),
    "room": ("in a room", "in an empty room"),
    "table": ("on a table", "on a wooden table"),
}
PLACES = {
    "street": ("on the street", "beside the road"),
    "wall": ("in front of a brick wall", "by a brick wall"),
    "park": ("on the grass", "in a park"),
    "shop": ("in front of a shop", "by a shop window"),
    "hall": ("in a hall", "on a tiled floor"),
    "fence": ("in front of a fence", "by a wooden fence"),
}


def draw_background(canvas: Canvas, place: str, rng: random.Random) -> None:
    """Fills the canvas with one of PLACES or ROOMS. The details are sampled from `rng`."""
    horizon = canvas.height * rng.uniform(0.42, 0.72)
    _PAINTERS[place](canvas, horizon, rng)


def _muted(rng: random.Random, low: int, high: int, tint: RGB = (128, 128, 128), share: float = 0.3) -> RGB:
    grey = rng.randint(low, high)
    return mix((grey, grey, grey), tint, share * rng.random())


def _street(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    canvas.rectangle(0, 0, width, horizon, _muted(rng, 150, 225, (150, 180, 220), 0.6))
    x = -rng.uniform(0, 20)
    while x < width:  # a row of house fronts
        wide, top = rng.uniform(18, 40), horizon * rng.uniform(0.0, 0.5)
        front = _muted(rng, 100, 190, (170, 130, 100), 0.7)
        canvas.rectangle(x, top, x + wide, horizon, front)
        for y in range(int(top) + 6, int(horizon) - 6, 14):
            canvas.rectangle(x + 4, y, x + wide * 0.45, y + 7, shade(front, 0.7))
            canvas.rectangle(x + wide * 0.6, y, x + wide - 3, y + 7, shade(front, 0.7))
        x += wide
    road = _muted(rng, 90, 150)
    canvas.rectangle(0, horizon, width, height, road)
    kerb = horizon + (height - horizon) * rng.uniform(0.1, 0.3)
    canvas.rectangle(0, horizon, width, kerb, shade(road, 1.25))
    canvas.rectangle(0, kerb, width, kerb + 2, shade(road, 0.8))
    if rng.random() < 0.5:
        x = rng.uniform(0, width)
        canvas.polygon(((x, kerb + 4), (x + 4, kerb + 4), (x + 14, height), (x + 2, height)), shade(road, 1.5))


def _wall(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    brick = mix(_muted(rng, 120, 190), (176, 96, 72), rng.uniform(0.2, 0.7))
    canvas.rectangle(0, 0, width, height, brick)
    horizon = max(horizon, height * 0.62)
    for row, y in enumerate(range(0, int(horizon), 7)):
        canvas.line(((0, y), (width, y)), 0.7, shade(brick, 1.2))
        for x in range(-8 if row % 2 else 0, width, 16):
            canvas.line(((x, y), (x, y + 7)), 0.7, shade(brick, 1.2))
    floor = _muted(rng, 110, 180)
    canvas.rectangle(0, horizon, width, height, floor)
    canvas.rectangle(0, horizon, width, horizon + 2, shade(floor, 0.7))


def _park(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    canvas.rectangle(0, 0, width, horizon, _muted(rng, 185, 230, (160, 200, 240), 0.8))
    for _ in range(rng.randint(2, 4)):
        x, r = rng.uniform(0, width), rng.uniform(12, 26)
        leaves = mix((60, 110, 50), (110, 130, 70), rng.random())
        canvas.rectangle(x - 2, horizon - r, x + 2, horizon + 4, (92, 70, 50))
        canvas.ellipse(x, horizon - r * 1.4, r, r * 1.2, leaves)
        canvas.ellipse(x - r * 0.3, horizon - r * 1.6, r * 0.5, r * 0.5, shade(leaves, 1.15))
    grass = mix((96, 140, 72), (130, 150, 90), rng.random())
    canvas.rectangle(0, horizon, width, height, grass)
    for _ in range(14):
        x, y = rng.uniform(0, width), rng.uniform(horizon, height)
        canvas.line(((x, y), (x + rng.uniform(-2, 2), y - 4)), 0.8, shade(grass, rng.uniform(0.8, 1.2)))


def _shop(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    front = _muted(rng, 120, 210, (200, 180, 150), 0.6)
    canvas.rectangle(0, 0, width, height, front)
    horizon = max(horizon, height * 0.6)
    awning = mix(_muted(rng, 100, 180), (150, 90, 90), rng.random() * 0.5)
    canvas.rectangle(0, horizon * 0.08, width, horizon * 0.2, awning)
    pane = _muted(rng, 150, 215, (170, 200, 220), 0.8)
    start = rng.uniform(-30, 0)
    for x in range(int(start), width, 44):
        canvas.rectangle(x, horizon * 0.26, x + 38, horizon * 0.9, pane)
        canvas.polygon(
            (
                (x + 4, horizon * 0.9),
                (x + 14, horizon * 0.26),
                (x + 20, horizon * 0.26),
                (x + 10, horizon * 0.9),
            ),
            shade(pane, 1.12),
        )
    canvas.rectangle(0, horizon, width, height, _muted(rng, 120, 190))


def _hall(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    canvas.rectangle(0, 0, width, horizon, _muted(rng, 170, 235, (230, 220, 200), 0.8))
    for x in range(rng.randint(-20, 0), width, rng.randint(28, 50)):
        canvas.rectangle(x, 0, x + 5, horizon, _muted(rng, 140, 180))
    floor = _muted(rng, 150, 215, (200, 190, 170), 0.6)
    canvas.rectangle(0, horizon, width, height, floor)
    middle = rng.uniform(0, width)
    for step in range(-8, 9):
        canvas.line(((middle + step * 6, horizon), (middle + step * 26, height)), 0.8, shade(floor, 0.85))
    y, gap = horizon, 4.0
    while y < height:
        canvas.line(((0, y), (width, y)), 0.8, shade(floor, 0.85))
        y, gap = y + gap, gap * 1.4


def _fence(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    canvas.rectangle(0, 0, width, horizon, _muted(rng, 180, 230, (170, 200, 230), 0.6))
    wood = mix(_muted(rng, 110, 190), (160, 120, 80), rng.random() * 0.7)
    top = horizon * rng.uniform(0.1, 0.45)
    for x in range(rng.randint(-8, 0), width, 9):
        canvas.polygon(((x, horizon), (x, top + 4), (x + 4, top), (x + 8, top + 4), (x + 8, horizon)), wood)
    for y in (top + 14, horizon - 10):
        canvas.rectangle(0, y, width, y + 3, shade(wood, 0.85))
    canvas.rectangle(0, horizon, width, height, mix(_muted(rng, 120, 180), (150, 140, 100), 0.4))


def _studio(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    canvas.rectangle(0, 0, canvas.width, canvas.height, _muted(rng, 140, 240))


def _room(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    canvas.rectangle(0, 0, width, horizon, _muted(rng, 170, 240, (230, 210, 180), 0.6))
    floor = mix(_muted(rng, 110, 190), (150, 110, 70), rng.random() * 0.6)
    canvas.rectangle(0, horizon, width, height, floor)
    canvas.rectangle(0, horizon - 3, width, horizon, shade(floor, 0.8))


def _table(canvas: Canvas, horizon: float, rng: random.Random) -> None:
    width, height = canvas.width, canvas.height
    canvas.rectangle(0, 0, width, height, _muted(rng, 150, 230))
    wood = mix(_muted(rng, 120, 190), (170, 120, 76), rng.uniform(0.3, 0.9))
    canvas.rectangle(0, horizon * 0.5, width, height, wood)
    for y in range(int(horizon * 0.5) + 6, height, 9):
        canvas.line(((0, y), (width, y + rng.uniform(-2, 2))), 0.7, shade(wood, 0.9))


_PAINTERS = {
    "studio": _studio,
    "room": _room,
    "table": _table,
    "street": _street,
    "wall": _wall,
    "park": _park,
    "shop": _shop,
    "hall": _hall,
    "fence": _fence,
}
