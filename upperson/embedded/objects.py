"""The items in the scenes, one short function each. Coordinates are -1 to 1 around the centre, with y downwards."""

from collections.abc import Callable

from upperson.embedded.drawing import Brush, Canvas, Paint, crease, edge, shade
from upperson.embedded.vocabulary import HAIR, LOWER, SHOES, UPPER, Item


def draw_item(canvas: Canvas, item: Item, x: float, y: float, size: float, height: float = 0) -> None:
    """Draws an item with its centre (x, y), half its width and half its height (the same without it) in pixels."""
    b = _Brush(canvas, item, x, y, size, height or size)
    if item.kind in UPPER:
        _upper(b, item)
    elif item.kind in LOWER:
        _lower(b, item.kind)
    elif item.kind in HAIR:
        _wig(b, item.kind)
    elif item.kind in SHOES:
        for offset in (-0.55, 0.55):
            _shoe(b, item, offset)
    else:
        _THINGS[item.kind](b)


class _Brush(Brush):
    """A brush with the colours of one item."""

    def __init__(self, canvas: Canvas, item: Item, x: float, y: float, size: float, height: float):
        super().__init__(canvas, x, y, size, height)
        self.paint, self.rgb = Paint.of(item), item.rgb
        self.edge, self.crease = edge(item.rgb), crease(item.rgb)


def _upper(b: _Brush, item: Item) -> None:
    kind = item.kind
    hem = {"coat": 1.45, "dress": 1.6}.get(kind, 0.95)
    wide = {"coat": 0.62, "dress": 0.85, "padded jacket": 0.6}.get(kind, 0.54)
    if kind in ("t-shirt", "dress"):
        for s in (-1, 1):
            b.shape(
                (s * 0.3, -0.82),
                (s * 0.58, -0.7),
                (s * 0.9, -0.3),
                (s * 0.68, -0.12),
                (s * 0.45, -0.38),
                paint=b.paint,
            )
    elif kind != "tank top":
        thick = 0.19 if kind == "padded jacket" else 0.155
        for s in (-1, 1):
            b.tube((s * 0.45, -0.62), (s * 0.72, 0.05), (s * 0.82, 0.62), radii=thick, paint=b.paint)
    shoulder = 0.36 if kind == "tank top" else 0.56
    waist = 0.4 if kind == "dress" else 0.5
    b.both((0.2, -0.85), (shoulder, -0.72), (0.5, -0.35), (waist, 0.15), (wide, hem), paint=b.paint)
    if kind in ("t-shirt", "tank top", "dress"):
        deep = -0.7 if kind == "t-shirt" else -0.5
        b.both((0.2, -0.87), (0.1, deep), paint=shade(item.rgb, 0.55))
    if kind == "sweater":
        b.tube((-0.16, -0.84), (0.16, -0.84), radii=0.09, paint=b.edge)
        b.line((-0.52, 0.88), (0.52, 0.88), width=3, fill=b.crease)
    if kind in ("jacket", "coat"):
        b.both((0.17, -0.85), (0.06, 0.1), paint=(235, 235, 235))
        for s in (-1, 1):
            b.shape((s * 0.17, -0.87), (s * 0.32, -0.6), (s * 0.06, 0.0), paint=b.edge)
    if kind in ("jacket", "coat", "padded jacket"):
        b.line((0, -0.1 if kind != "padded jacket" else -0.8), (0, hem), width=1.3, fill=b.crease)
    if kind == "coat":
        b.line((-0.5, 0.35), (0.5, 0.35), width=2.6, fill=b.edge)
    if kind == "padded jacket":
        for y in (-0.5, -0.15, 0.2, 0.55, 0.85):
            b.line((-0.55, y), (0, y + 0.06), (0.55, y), width=1.3, fill=b.crease)
    if kind == "shirt":
        for s in (-1, 1):
            b.shape((s * 0.02, -0.72), (s * 0.22, -0.95), (s * 0.26, -0.62), paint=b.edge)
        b.line((0, -0.7), (0, hem), width=0.9, fill=b.crease)
        for y in (-0.5, -0.15, 0.2, 0.55):
            b.oval(0, y, 0.045, 0.045, b.edge)
    if kind == "hoodie":
        b.tube((-0.26, -0.9), (0, -0.68), (0.26, -0.9), radii=0.11, paint=Paint.of(item, light=0.8))
        b.both((0.24, 0.35), (0.34, 0.75), paint=b.crease)
        for s in (-1, 1):
            b.line((s * 0.07, -0.65), (s * 0.09, -0.2), width=1.1, fill=(240, 240, 240))
    if item.accent_rgb is not None and item.pattern == "logo":
        b.oval(0, -0.12, 0.25, 0.24, item.accent_rgb)
        b.oval(0, -0.12, 0.12, 0.11, item.rgb)


def _lower(b: _Brush, kind: str) -> None:
    if kind in ("skirt", "long skirt"):
        hem = 0.45 if kind == "skirt" else 1.1
        b.both((0.42, -0.8), (0.52, -0.5), (0.75, hem), paint=b.paint)
        for x in (-0.4, 0.0, 0.4):
            b.line((x * 0.7, -0.5), (x * 1.3, hem), width=1.0, fill=b.crease)
    else:
        hem = 0.15 if kind == "shorts" else 1.1
        spread = 0.62 if kind == "shorts" else 0.5
        b.both((0.46, -0.8), (0.52, -0.45), (spread, hem), (0.12, hem), (0.03, -0.2), paint=b.paint)
        b.line((0, -0.8), (0, -0.2), width=1.0, fill=b.crease)
        if kind == "jeans":
            for s in (-1, 1):
                b.line((s * 0.49, -0.5), (s * 0.46, hem), width=0.8, fill=b.edge)
                b.line((s * 0.12, hem - 0.06), (s * 0.5, hem - 0.06), width=2.2, fill=shade(b.rgb, 1.45))
                b.line((s * 0.15, -0.5), (s * 0.38, -0.55), width=1.0, fill=b.crease)
    b.line((-0.44, -0.74), (0.44, -0.74), width=1.6, fill=b.crease)


def _shoe(b: _Brush, item: Item, x: float) -> None:
    if item.kind == "boots":
        b.shape(
            (x - 0.4, -0.9),
            (x + 0.1, -0.9),
            (x + 0.12, 0.1),
            (x + 0.48, 0.25),
            (x + 0.48, 0.5),
            (x - 0.4, 0.5),
            paint=b.paint,
        )
    elif item.kind == "sandals":
        b.shape((x - 0.45, 0.38), (x + 0.5, 0.38), (x + 0.5, 0.5), (x - 0.45, 0.5), paint=b.paint)
        for start in (-0.3, 0.1):
            b.line((x + start, 0.4), (x + start + 0.1, 0.05), (x + start + 0.25, 0.4), width=2.4, fill=item.rgb)
    else:
        b.shape(
            (x - 0.45, 0.5),
            (x - 0.45, -0.2),
            (x - 0.05, -0.15),
            (x + 0.15, 0.12),
            (x + 0.5, 0.25),
            (x + 0.5, 0.5),
            paint=b.paint,
        )
    if item.kind == "sneakers":
        white = (236, 236, 236) if item.colour != "white" else (150, 150, 155)
        b.line((x - 0.45, 0.5), (x + 0.5, 0.5), width=3.0, fill=white)
        b.line((x - 0.05, 0.0), (x + 0.12, -0.05), width=1.2, fill=white)
    else:
        b.line((x - 0.45, 0.5), (x + 0.5, 0.5), width=2.0, fill=shade(item.rgb, 0.6))


def _wig(b: _Brush, kind: str) -> None:
    """Hair on a stand."""
    b.line((0, 0.2), (0, 1.1), width=2.4, fill=(120, 120, 124))
    if kind == "bald":
        return b.oval(0, 0, 0.55, 0.7, (214, 196, 176))
    if kind == "long hair":
        for s in (-1, 1):
            b.tube((s * 0.42, -0.1), (s * 0.55, 1.0), radii=0.24, paint=b.rgb)
    elif kind == "curly hair":
        for x, y in ((-0.6, -0.1), (-0.5, -0.5), (0, -0.7), (0.5, -0.5), (0.6, -0.1), (-0.5, 0.3), (0.5, 0.3)):
            b.oval(x, y, 0.36, 0.34, b.rgb)
    elif kind == "ponytail":
        b.tube((0.35, -0.4), (0.8, 0.1), (0.7, 0.9), radii=(0.16, 0.24, 0.1), paint=shade(b.rgb, 1.18))
        b.oval(0.42, -0.38, 0.13, 0.13, (200, 60, 80))
    elif kind == "bun":
        b.oval(0, -0.9, 0.34, 0.32, b.rgb)
        b.oval(0, -0.9, 0.2, 0.18, shade(b.rgb, 1.3))
    b.dome(0, 0.15, 0.6, 0.85, b.rgb)
    b.both((0.6, 0.1), (0.52, 0.4), (0.3, 0.1), paint=b.rgb)


def _backpack(b: _Brush) -> None:
    b.line((-0.2, -0.85), (-0.1, -1.05), (0.1, -1.05), (0.2, -0.85), width=2.0, fill=b.edge)
    b.both((0.32, -0.9), (0.62, -0.65), (0.68, 0.75), (0.5, 0.92), paint=b.paint)
    b.both((0.42, 0.15), (0.45, 0.75), paint=b.edge)
    b.line((-0.5, -0.2), (0.5, -0.2), width=1.3, fill=b.crease)


def _shoulder_bag(b: _Brush) -> None:
    b.line((-0.6, 0.0), (-0.1, -1.1), (0.1, -1.1), (0.6, 0.0), width=2.2, fill=b.rgb)
    b.both((0.7, -0.05), (0.7, 0.8), paint=b.paint)
    b.both((0.7, -0.05), (0.6, 0.4), paint=b.edge)


def _handbag(b: _Brush) -> None:
    b.line((-0.4, -0.1), (-0.25, -0.75), (0.25, -0.75), (0.4, -0.1), width=2.0, fill=b.edge)
    b.both((0.55, -0.15), (0.75, 0.75), paint=b.paint)
    b.oval(0, 0.05, 0.1, 0.08, b.edge)


def _shopping_bag(b: _Brush) -> None:
    b.line((-0.25, -0.6), (-0.15, -0.95), (0.15, -0.95), (0.25, -0.6), width=1.6, fill=b.edge)
    b.both((0.55, -0.6), (0.5, 0.95), paint=b.paint)
    b.line((-0.55, -0.6), (0.55, -0.6), width=2.2, fill=b.edge)


def _suitcase(b: _Brush) -> None:
    for s in (-1, 1):
        b.line((s * 0.25, -0.5), (s * 0.25, -1.05), width=1.6, fill=(70, 70, 74))
        b.oval(s * 0.38, 0.95, 0.1, 0.1, (30, 30, 30))
    b.line((-0.25, -1.05), (0.25, -1.05), width=2.2, fill=(70, 70, 74))
    b.both((0.52, -0.55), (0.52, 0.88), paint=b.paint)
    for y in (-0.2, 0.2, 0.6):
        b.line((-0.42, y), (0.42, y), width=1.3, fill=b.edge)


def _cap(b: _Brush) -> None:
    b.dome(-0.15, 0.2, 0.65, 0.7, b.rgb)
    b.shape((0.4, 0.2), (1.05, 0.28), (1.0, 0.36), (0.3, 0.2), paint=b.edge)
    b.line((-0.8, 0.2), (0.5, 0.2), width=1.6, fill=b.edge)


def _beanie(b: _Brush) -> None:
    b.dome(0, 0.2, 0.65, 0.85, b.rgb)
    b.both((0.7, 0.1), (0.7, 0.42), paint=b.edge)
    b.oval(0, -0.7, 0.17, 0.16, b.edge)


def _sun_hat(b: _Brush) -> None:
    b.oval(0, 0.25, 1.0, 0.2, b.paint)
    b.dome(0, 0.22, 0.52, 0.7, b.rgb)
    b.line((-0.5, 0.12), (0.5, 0.12), width=3.0, fill=b.edge)


def _ball(b: _Brush) -> None:
    b.oval(0, 0, 0.75, 0.75, b.paint)
    b.oval(-0.25, -0.28, 0.15, 0.12, (255, 255, 255, 130))


def _box(b: _Brush) -> None:
    b.shape((-0.7, -0.35), (0.45, -0.35), (0.45, 0.7), (-0.7, 0.7), paint=b.paint)
    b.shape((-0.7, -0.35), (-0.4, -0.7), (0.75, -0.7), (0.45, -0.35), paint=shade(b.rgb, 1.2))
    b.shape((0.45, -0.35), (0.75, -0.7), (0.75, 0.35), (0.45, 0.7), paint=shade(b.rgb, 0.7))


def _cup(b: _Brush) -> None:
    b.oval(0.55, 0.1, 0.32, 0.32, b.edge)
    b.oval(0.55, 0.1, 0.18, 0.18, (200, 200, 200))
    b.both((0.55, -0.6), (0.45, 0.7), paint=b.paint)
    b.oval(0, -0.6, 0.55, 0.13, b.edge)


def _car(b: _Brush) -> None:
    b.shape(
        (-1.0, 0.4),
        (-1.0, 0.0),
        (-0.6, -0.05),
        (-0.4, -0.45),
        (0.35, -0.45),
        (0.6, -0.05),
        (1.0, 0.05),
        (1.0, 0.4),
        paint=b.paint,
    )
    b.shape((-0.48, -0.05), (-0.34, -0.36), (0.28, -0.36), (0.46, -0.05), paint=(200, 220, 232))
    for x in (-0.55, 0.55):
        b.oval(x, 0.42, 0.22, 0.22, (30, 30, 32))
        b.oval(x, 0.42, 0.1, 0.1, (180, 180, 180))


def _house(b: _Brush) -> None:
    b.both((0.7, -0.1), (0.7, 0.85), paint=b.paint)
    b.both((0.0, -0.85), (0.9, -0.1), paint=b.edge)
    b.shape((-0.15, 0.3), (0.15, 0.3), (0.15, 0.85), (-0.15, 0.85), paint=(90, 64, 44))
    for x in (-0.45, 0.45):
        b.shape((x - 0.15, 0.1), (x + 0.15, 0.1), (x + 0.15, 0.4), (x - 0.15, 0.4), paint=(220, 232, 240))


def _flag(b: _Brush) -> None:
    b.line((-0.7, -1.0), (-0.7, 1.0), width=2.4, fill=(90, 80, 70))
    b.shape((-0.7, -0.95), (0.0, -0.85), (0.85, -0.95), (0.85, 0.05), (0.0, 0.15), (-0.7, 0.05), paint=b.paint)


def _umbrella(b: _Brush) -> None:
    b.line((0, -0.4), (0, 0.8), (0.15, 0.9), (0.25, 0.75), width=2.2, fill=(80, 60, 44))
    b.both((0.0, -0.8), (0.5, -0.6), (0.95, 0.0), (0.45, -0.12), paint=b.paint)
    b.line((0, -0.8), (0.3, -0.1), width=1.3, fill=b.edge)
    b.line((0, -0.8), (-0.3, -0.1), width=1.3, fill=b.edge)


def _chair(b: _Brush) -> None:
    for x0, y0, x1, y1 in (
        (-0.5, -1.0, -0.36, 0.95),
        (0.4, 0.1, 0.54, 0.95),
        (-0.5, -0.9, -0.1, -0.2),
        (-0.5, 0.1, 0.54, 0.28),
    ):
        b.shape((x0, y0), (x1, y0), (x1, y1), (x0, y1), paint=b.paint)
    b.line((-0.2, 0.28), (-0.2, 0.85), width=2.4, fill=b.edge)


def _bottle(b: _Brush) -> None:
    b.both((0.12, -0.95), (0.12, -0.5), (0.34, -0.25), (0.34, 0.9), paint=b.paint)
    b.both((0.34, 0.1), (0.34, 0.5), paint=(236, 234, 226))


def _balloon(b: _Brush) -> None:
    b.line((0, 0.3), (0.08, 0.6), (-0.05, 1.0), width=1.0, fill=(90, 90, 90))
    b.oval(0, -0.3, 0.55, 0.65, b.paint)
    b.oval(-0.2, -0.55, 0.1, 0.14, (255, 255, 255, 140))


def _fish(b: _Brush) -> None:
    b.shape((0.4, 0.0), (0.95, -0.4), (0.95, 0.4), paint=b.edge)
    b.oval(-0.1, 0, 0.7, 0.38, b.paint)
    b.oval(-0.5, -0.1, 0.07, 0.07, (20, 20, 20))


def _bird(b: _Brush) -> None:
    for x in (-0.1, 0.12):
        b.line((x, 0.3), (x, 0.75), width=1.4, fill=(200, 140, 40))
    b.shape((0.3, 0.0), (0.95, -0.25), (0.9, 0.1), paint=b.edge)
    b.oval(0, 0.05, 0.52, 0.34, b.paint)
    b.oval(-0.42, -0.3, 0.24, 0.23, b.paint)
    b.shape((-0.62, -0.32), (-0.9, -0.22), (-0.62, -0.18), paint=(230, 150, 40))
    b.oval(-0.47, -0.35, 0.05, 0.05, (20, 20, 20))


def _flower(b: _Brush) -> None:
    b.line((0, -0.3), (0, 1.0), width=2.4, fill=(60, 130, 60))
    b.oval(0.22, 0.5, 0.22, 0.1, (60, 130, 60))
    for x, y in ((0, -0.75), (0.36, -0.5), (0.24, -0.1), (-0.24, -0.1), (-0.36, -0.5)):
        b.oval(x, y, 0.25, 0.25, b.paint)
    b.oval(0, -0.4, 0.2, 0.2, (120, 84, 30) if b.rgb[0] > 200 else (244, 208, 70))


def _blanket(b: _Brush) -> None:
    b.shape((-0.75, -0.6), (0.95, -0.6), (0.75, 0.65), (-0.95, 0.65), paint=b.paint)
    b.line((-0.95, 0.65), (0.75, 0.65), width=2.4, fill=b.edge)


def _boat(b: _Brush) -> None:
    b.line((0, -0.95), (0, 0.4), width=1.8, fill=(90, 70, 50))
    b.shape((0.06, -0.9), (0.75, 0.2), (0.06, 0.2), paint=(240, 240, 236))
    b.both((0.95, 0.35), (0.55, 0.8), paint=b.paint)


def _horse(b: _Brush) -> None:
    for x in (-0.5, -0.3, 0.3, 0.48):
        b.tube((x, 0.2), (x, 0.85), radii=0.08, paint=b.paint)
    b.oval(0, 0.05, 0.62, 0.3, b.paint)
    b.tube((-0.45, 0.0), (-0.68, -0.6), radii=0.16, paint=b.paint)
    b.tube((-0.68, -0.6), (-0.95, -0.42), radii=0.12, paint=b.paint)
    b.line((-0.5, -0.7), (-0.32, -0.1), width=3.4, fill=b.edge)
    b.line((0.58, -0.05), (0.75, 0.5), width=3.0, fill=b.edge)


def _scarf(b: _Brush) -> None:
    b.tube((-0.5, -0.5), (0, -0.7), (0.5, -0.5), (0, -0.3), radii=0.17, paint=b.rgb)
    b.shape((-0.1, -0.4), (0.35, -0.4), (0.45, 0.9), (0.05, 0.9), paint=b.paint)
    b.line((0.05, 0.9), (0.45, 0.9), width=2.4, fill=b.edge)


def _tie(b: _Brush) -> None:
    b.both((0.18, -0.95), (0.1, -0.65), paint=b.edge)
    b.both((0.1, -0.65), (0.27, 0.65), (0, 0.95), paint=b.paint)


def _belt(b: _Brush) -> None:
    b.shape((-1.0, -0.15), (1.0, -0.15), (1.0, 0.15), (-1.0, 0.15), paint=b.paint)
    b.shape((-0.95, -0.22), (-0.55, -0.22), (-0.55, 0.22), (-0.95, 0.22), paint=(206, 178, 90))
    b.shape((-0.85, -0.1), (-0.65, -0.1), (-0.65, 0.1), (-0.85, 0.1), paint=b.paint)


def _watch(b: _Brush) -> None:
    b.both((0.24, -0.95), (0.24, 0.95), paint=b.paint)
    b.oval(0, 0, 0.46, 0.46, b.edge)
    b.oval(0, 0, 0.35, 0.35, (240, 240, 236))
    b.line((0, -0.26), (0, 0), (0.2, 0.08), width=1.2, fill=(30, 30, 30))


def _socks(b: _Brush) -> None:
    for x in (-0.6, 0.25):
        b.shape((x, -0.9), (x + 0.35, -0.9), (x + 0.35, 0.2), (x + 0.75, 0.5), (x + 0.7, 0.75), (x, 0.6), paint=b.paint)
        b.shape((x, -0.9), (x + 0.35, -0.9), (x + 0.35, -0.72), (x, -0.72), paint=b.edge)


def _gloves(b: _Brush) -> None:
    for s in (-1, 1):
        b.shape((s * 0.25, -0.3), (s * 0.75, -0.3), (s * 0.7, 0.85), (s * 0.3, 0.85), paint=b.paint)
        for finger in (0.3, 0.43, 0.57, 0.7):
            b.tube((s * finger, -0.2), (s * finger, -0.8), radii=0.07, paint=b.rgb)
        b.tube((s * 0.3, 0.3), (s * 0.1, -0.1), radii=0.08, paint=b.rgb)


def _phone(b: _Brush) -> None:
    b.both((0.42, -0.85), (0.42, 0.85), paint=b.paint)
    b.both((0.34, -0.68), (0.34, 0.6), paint=(176, 204, 220))
    b.oval(0, 0.72, 0.08, 0.08, b.edge)


def _book(b: _Brush) -> None:
    b.shape((-0.6, -0.8), (0.55, -0.8), (0.55, 0.8), (-0.6, 0.8), paint=b.paint)
    b.shape((0.55, -0.76), (0.68, -0.7), (0.68, 0.76), (0.55, 0.76), paint=(244, 242, 234))
    b.line((-0.45, -0.8), (-0.45, 0.8), width=1.6, fill=b.edge)
    b.line((-0.2, -0.4), (0.35, -0.4), width=2.0, fill=b.edge)


def _glasses(b: _Brush) -> None:
    for s in (-1, 1):
        b.oval(s * 0.45, 0, 0.36, 0.3, b.rgb)
    b.line((-0.9, -0.1), (0.9, -0.1), width=1.2, fill=b.rgb)


def _bicycle(b: _Brush) -> None:
    for x in (-0.6, 0.6):
        b.oval(x, 0.35, 0.4, 0.4, (36, 36, 38))
        b.oval(x, 0.35, 0.32, 0.32, (206, 206, 206))
    for bar in (((-0.6, 0.35), (-0.25, -0.3), (0.45, -0.3), (0.0, 0.35), (-0.6, 0.35)), ((0.6, 0.35), (0.4, -0.55))):
        b.line(*bar, width=2.6, fill=b.rgb)
    b.line((0.0, 0.35), (-0.3, -0.45), width=2.6, fill=b.rgb)
    b.line((-0.45, -0.47), (-0.15, -0.47), width=2.8, fill=b.edge)
    b.line((0.4, -0.55), (0.62, -0.6), width=2.4, fill=b.edge)


def _leggings(b: _Brush) -> None:
    b.both((0.34, -0.9), (0.36, -0.5), (0.22, 1.0), (0.08, 1.0), (0.02, -0.3), paint=b.paint)


def _tree(b: _Brush) -> None:
    b.line((0, 0.1), (0, 1.0), width=4.0, fill=(96, 72, 50))
    for x, y in ((-0.35, -0.1), (0.35, -0.1), (0, -0.5)):
        b.oval(x, y, 0.48, 0.42, b.paint)


def _star(b: _Brush) -> None:
    b.both((0, -0.9), (0.22, -0.28), (0.88, -0.26), (0.36, 0.14), (0.56, 0.78), (0, 0.4), paint=b.paint)


def _stroller(b: _Brush) -> None:
    b.dome(0, 0.1, 0.65, 0.75, b.rgb)
    b.shape((-0.65, 0.1), (0.65, 0.1), (0.4, 0.5), (-0.4, 0.5), paint=b.edge)
    b.line((0.6, 0.1), (1.0, -0.45), width=2.2, fill=(80, 80, 84))
    for x in (-0.4, 0.4):
        b.oval(x, 0.75, 0.2, 0.2, (40, 40, 42))


def _guitar(b: _Brush) -> None:
    b.line((0, 0), (0, -1.0), width=3.4, fill=b.edge)
    b.oval(0, 0.5, 0.45, 0.42, b.paint)
    b.oval(0, 0.0, 0.34, 0.32, b.paint)
    b.oval(0, 0.25, 0.14, 0.14, (40, 34, 30))


_THINGS: dict[str, Callable[[_Brush], None]] = {
    "backpack": _backpack,
    "shoulder bag": _shoulder_bag,
    "handbag": _handbag,
    "shopping bag": _shopping_bag,
    "suitcase": _suitcase,
    "cap": _cap,
    "beanie": _beanie,
    "sun hat": _sun_hat,
    "ball": _ball,
    "box": _box,
    "cup": _cup,
    "car": _car,
    "house": _house,
    "flag": _flag,
    "umbrella": _umbrella,
    "chair": _chair,
    "bottle": _bottle,
    "balloon": _balloon,
    "fish": _fish,
    "bird": _bird,
    "flower": _flower,
    "blanket": _blanket,
    "boat": _boat,
    "horse": _horse,
    "scarf": _scarf,
    "tie": _tie,
    "belt": _belt,
    "watch": _watch,
    "socks": _socks,
    "gloves": _gloves,
    "phone": _phone,
    "book": _book,
    "glasses": _glasses,
    "bicycle": _bicycle,
    "leggings": _leggings,
    "tree": _tree,
    "star": _star,
    "stroller": _stroller,
    "guitar": _guitar,
}
