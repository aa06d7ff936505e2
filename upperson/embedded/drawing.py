"""A supersampled canvas for polygons, limbs and patterned fills. Coordinates are final pixels."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from upperson.embedded.vocabulary import RGB, Item

Point = tuple[float, float]
Fill = RGB | tuple[int, int, int, int]


class Drawing(Hashable, Protocol):
    """A synthetic image, such as a frozen dataclass. Equal drawings have equal pixels."""

    def draw(self) -> Image.Image:
        """Draws the RGB image, always with the same pixels."""
        ...


def shade(rgb: RGB, factor: float) -> RGB:
    """A darker (factor < 1) or brighter colour."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in rgb)
    return red, green, blue


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """A mixture of two colours, with `share` of b."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def edge(rgb: RGB) -> RGB:
    """A colour for trimmings: darker than the item's colour, or lighter for a dark item."""
    return shade(rgb, 1.9) if sum(rgb) < 200 else shade(rgb, 0.66)


def crease(rgb: RGB) -> Fill:
    """A translucent colour for seams and folds."""
    return (255, 255, 255, 110) if sum(rgb) < 200 else (0, 0, 0, 115)


_PERIOD = {"stripes": 9, "vertical stripes": 7, "checks": 10, "dots": 8}  # final pixels


@dataclass(frozen=True)
class Paint:
    """A colour, or two colours in a repeating pattern. A logo is not a pattern; the garment draws its logo."""

    rgb: RGB
    pattern: str = "plain"
    accent: RGB | None = None

    @classmethod
    def of(cls, item: Item, light: float = 1.0) -> "Paint":
        """The paint of an item, darkened or brightened by the factor `light`."""
        accent = None if item.accent_rgb is None else shade(item.accent_rgb, light)
        return cls(shade(item.rgb, light), item.pattern, accent)

    @property
    def flat(self) -> bool:
        return self.pattern in ("plain", "logo")

    def texture(self, box: tuple[int, int, int, int], scale: int) -> Image.Image:
        """The pattern inside a box (left, top, right, bottom) of canvas pixels. The patterns of adjacent boxes fit."""
        left, top, right, bottom = box
        width, height = right - left, bottom - top
        image = Image.new("RGB", (width, height), self.rgb)
        draw = ImageDraw.Draw(image)
        step = _PERIOD[self.pattern] * scale
        across, down = range(-(left % step), width, step), range(-(top % step), height, step)
        if self.pattern == "stripes":
            for y in down:
                draw.rectangle((0, y, width, y + 0.45 * step), fill=self.accent)
        elif self.pattern == "vertical stripes":
            for x in across:
                draw.rectangle((x, 0, x + 0.4 * step, height), fill=self.accent)
        elif self.pattern == "checks" and self.accent is not None:
            between = mix(self.rgb, self.accent, 0.5)
            for y in down:
                draw.rectangle((0, y, width, y + 0.4 * step), fill=between)
            for x in across:
                draw.rectangle((x, 0, x + 0.4 * step, height), fill=between)
                for y in down:
                    draw.rectangle((x, y, x + 0.4 * step, y + 0.4 * step), fill=self.accent)
        else:
            radius = 0.27 * step
            for row, y in enumerate(down, start=top // step):
                for x in range(-(left % step) - (row % 2) * step // 2, width + step, step):
                    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=self.accent)
        return image


class Canvas:
    """An RGB picture of `width` x `height` final pixels, which is drawn `scale` times larger and then reduced."""

    def __init__(self, width: int, height: int, background: RGB, scale: int = 3):
        self.width, self.height, self.scale = width, height, scale
        self.image = Image.new("RGB", (width * scale, height * scale), background)
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def finish(self) -> Image.Image:
        return self.image.reduce(self.scale)

    def polygon(self, points: Sequence[Point], paint: Paint | Fill) -> None:
        corners = [(x * self.scale, y * self.scale) for x, y in points]

        def shape(pen: ImageDraw.ImageDraw, dx: float, dy: float, fill: Fill | int) -> None:
            pen.polygon([(x + dx, y + dy) for x, y in corners], fill)

        self._fill(corners, 0, paint, shape)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, paint: Paint | Fill) -> None:
        self.polygon(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), paint)

    def ellipse(self, x: float, y: float, rx: float, ry: float, paint: Paint | Fill) -> None:
        """An ellipse with centre (x, y) and half axes rx and ry."""
        s = self.scale
        x0, y0, x1, y1 = (x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s

        def shape(pen: ImageDraw.ImageDraw, dx: float, dy: float, fill: Fill | int) -> None:
            pen.ellipse((x0 + dx, y0 + dy, x1 + dx, y1 + dy), fill)

        self._fill(((x0, y0), (x1, y1)), 0, paint, shape)

    def chord(self, x: float, y: float, rx: float, ry: float, start: float, end: float, fill: Fill) -> None:
        """The segment of an ellipse between two angles (degrees, clockwise from the right)."""
        s = self.scale
        self.pen.chord(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), start, end, fill)

    def line(self, points: Sequence[Point], width: float, fill: Fill) -> None:
        s = self.scale
        self.pen.line([(x * s, y * s) for x, y in points], fill, max(1, round(width * s)), joint="curve")

    def limb(self, joints: Sequence[Point], radii: Sequence[float], paint: Paint | Fill) -> None:
        """A tube with round ends through the joints, with one radius for each joint."""
        s = self.scale
        discs = [(x * s, y * s, r * s) for (x, y), r in zip(joints, radii, strict=True)]

        def shape(pen: ImageDraw.ImageDraw, dx: float, dy: float, fill: Fill | int) -> None:
            for x, y, r in discs:
                pen.ellipse((x - r + dx, y - r + dy, x + r + dx, y + r + dy), fill)
            for (ax, ay, ar), (bx, by, br) in zip(discs, discs[1:], strict=False):
                length = max(1e-6, ((bx - ax) ** 2 + (by - ay) ** 2) ** 0.5)
                nx, ny = (ay - by) / length, (bx - ax) / length
                one, other = (ax + nx * ar, ay + ny * ar), (bx + nx * br, by + ny * br)
                back, start = (bx - nx * br, by - ny * br), (ax - nx * ar, ay - ny * ar)
                pen.polygon([(x + dx, y + dy) for x, y in (one, other, back, start)], fill)

        self._fill([(x, y) for x, y, _ in discs], max(r for *_, r in discs), paint, shape)

    def _fill(self, points: Sequence[Point], margin: float, paint: Paint | Fill, shape: Callable[..., None]) -> None:
        """Draws a shape that lies within `margin` of the points. Patterns are pasted through a mask."""
        if not isinstance(paint, Paint):
            return shape(self.pen, 0, 0, paint)
        if paint.flat:
            return shape(self.pen, 0, 0, paint.rgb)
        xs, ys = [x for x, _ in points], [y for _, y in points]
        left, top = max(0, int(min(xs) - margin)), max(0, int(min(ys) - margin))
        right = min(self.image.width, int(max(xs) + margin) + 2)
        bottom = min(self.image.height, int(max(ys) + margin) + 2)
        if left >= right or top >= bottom:
            return None
        mask = Image.new("L", (right - left, bottom - top))
        shape(ImageDraw.Draw(mask), -left, -top, 255)
        self.image.paste(paint.texture((left, top, right, bottom), self.scale), (left, top), mask)


class Brush:
    """Draws in its own coordinates, whose origin is pixel (x, y) and whose units are (unit_x, unit_y) pixels."""

    def __init__(self, canvas: Canvas, x: float, y: float, unit_x: float, unit_y: float):
        self.canvas, self.x, self.y, self.unit_x, self.unit_y = canvas, x, y, unit_x, unit_y

    def at(self, u: float, v: float) -> Point:
        """The pixel of the coordinates (u, v)."""
        return self.x + u * self.unit_x, self.y + v * self.unit_y

    def shape(self, *points: Point, paint: Paint | Fill) -> None:
        self.canvas.polygon([self.at(u, v) for u, v in points], paint)

    def both(self, *points: Point, paint: Paint | Fill) -> None:
        """A symmetric polygon, given by its right half."""
        self.shape(*points, *((-u, v) for u, v in reversed(points)), paint=paint)

    def oval(self, u: float, v: float, ru: float, rv: float, paint: Paint | Fill) -> None:
        self.canvas.ellipse(*self.at(u, v), ru * abs(self.unit_x), rv * abs(self.unit_y), paint)

    def dome(self, u: float, v: float, ru: float, rv: float, fill: Fill, start: float = 180, end: float = 360) -> None:
        """The segment of an oval between two angles; by default the upper half."""
        self.canvas.chord(*self.at(u, v), ru * abs(self.unit_x), rv * abs(self.unit_y), start, end, fill)

    def line(self, *points: Point, width: float, fill: Fill) -> None:
        """A line of `width` final pixels."""
        self.canvas.line([self.at(u, v) for u, v in points], width, fill)

    def tube(self, *points: Point, radii: float | Sequence[float], paint: Paint | Fill) -> None:
        """A limb through the points, with one radius for all points or one for each."""
        radii = radii if isinstance(radii, Sequence) else [radii] * len(points)
        self.canvas.limb([self.at(u, v) for u, v in points], [r * abs(self.unit_x) for r in radii], paint)


@dataclass(frozen=True)
class Light:
    """The camera's effects on a picture: factors for brightness, contrast and channels; noise and blur."""

    brightness: float = 1.0
    contrast: float = 1.0
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)
    slope: float = 0.0  # relative difference in brightness between the right and the left edge
    noise: float = 0.0  # standard deviation in grey levels
    blur: float = 0.0  # radius in pixels

    def apply(self, image: Image.Image, seed: int) -> Image.Image:
        """The picture of this camera. The noise depends only on `seed`."""
        if self.blur > 0:
            image = image.filter(ImageFilter.GaussianBlur(self.blur))
        pixels = np.asarray(image, dtype=np.float32)
        pixels = (pixels - 128) * (self.contrast * self.brightness) + 128 * self.brightness
        ramp = 1 + self.slope * np.linspace(-0.5, 0.5, image.width, dtype=np.float32)
        pixels = pixels * (ramp[:, None] * np.asarray(self.cast, dtype=np.float32))
        if self.noise > 0:
            generator = np.random.Generator(np.random.PCG64(seed))
            pixels += self.noise * generator.standard_normal(pixels.shape, dtype=np.float32)
        return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
