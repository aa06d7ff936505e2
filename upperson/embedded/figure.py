"""Draws a walking person.

Coordinates are in body heights: u from the spine, v up from the ground. From the front or the back, +u is the right of
the image. From the side, +u is the walking direction, and limb +1 is the near limb.
"""

import math

from upperson.embedded.drawing import Brush, Canvas, Paint, Point, crease, edge, shade
from upperson.embedded.identities import Identity, View
from upperson.embedded.vocabulary import RGB, Item

_HEM = {
    "coat": 0.30,
    "dress": 0.47,
    "padded jacket": 0.455,
    "t-shirt": 0.475,
}  # height of the lower edge of the upper garment
_SKIRT = {"skirt": (0.32, 0.035), "long skirt": (0.11, 0.045), "dress": (0.27, 0.045)}  # hem, flare
_OPEN = ("jacket", "coat")
_LIGHT_COLLAR = ("t-shirt", "tank top", "dress")
_DARK = (28, 26, 28)


def draw_figure(canvas: Canvas, person: Identity, view: View) -> None:
    _Figure(canvas, person, view).draw()


def _towards(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


class _Figure(Brush):
    def __init__(self, canvas: Canvas, person: Identity, view: View):
        flip = -1 if view.facing == "left" else 1
        super().__init__(canvas, view.centre, view.feet, flip * view.height, -view.height)
        self.person, self.girth, self.swing = person, person.girth, math.sin(view.phase)
        self.front, self.back = view.facing == "front", view.facing == "back"
        self.side = not (self.front or self.back)
        left = {"front": 1, "back": -1, "left": 1, "right": -1}[view.facing]  # the limb on the person's left
        self.bag_limb = left * person.bag_hand
        self.hem = _HEM.get(person.upper.kind, 0.465)
        self.arms = {limb: self._arm_joints(limb) for limb in (-1, 1)}

    def draw(self) -> None:
        """Draws all parts from back to front."""
        self.oval(0, 0.005, 0.15, 0.018, (20, 20, 25, 90))  # shadow on the ground
        self._backpack_behind()
        self._hair_behind()
        if self.side:
            self._arm(-1)
            if self.bag_limb < 0:
                self._bag()
        self._legs()
        self._lower()
        self._torso()
        if not self.side:
            self._arm(-1)
        self._head()
        self._arm(1)
        if not self.side or self.bag_limb > 0:
            self._bag()

    # -- legs

    def _leg_joints(self, limb: int) -> tuple[Point, Point, Point]:
        """The positions of hip, knee and ankle."""
        if self.side:
            stride = 0.36 if self.person.lower and self.person.lower.kind not in _SKIRT else 0.24
            thigh = stride * self.swing * limb
            shin = thigh - (0.35 if thigh < 0 else 0.06)
            knee = (0.22 * math.sin(thigh), 0.50 - 0.22 * math.cos(thigh))
            return (0, 0.50), knee, (knee[0] + 0.215 * math.sin(shin), knee[1] - 0.215 * math.cos(shin))
        lift = max(0.0, self.swing * limb) * 0.035
        spread = limb * 0.048 * self.girth
        return (spread, 0.50), (spread * 1.08, 0.275 + lift), (spread, 0.06 + lift)

    def _legs(self) -> None:
        lower, shoes = self.person.lower, self.person.shoes
        for limb in (-1, 1):
            light = 0.82 if self.side and limb < 0 else 1.0
            hip, knee, ankle = self._leg_joints(limb)
            self.tube(hip, knee, ankle, radii=(0.045, 0.033, 0.022), paint=shade(self.person.skin, light))
            self._shoe(ankle, limb, light)
            if lower and lower.kind == "shorts":
                end = _towards(hip, knee, 0.72)
                self.tube(hip, end, radii=(0.055 * self.girth, 0.053), paint=Paint.of(lower, light))
            elif lower and lower.kind in ("trousers", "jeans"):
                cuff, wide = (ankle[0], ankle[1] + 0.01), 0.034 if lower.kind == "jeans" else 0.04
                radii = (0.054 * self.girth, wide + 0.006, wide)
                self.tube(hip, knee, cuff, radii=radii, paint=Paint.of(lower, light))
                if lower.kind == "jeans":
                    self._denim(hip, knee, cuff, limb, shade(lower.rgb, 1.45))
            if shoes.kind == "boots":
                top = (ankle[0], ankle[1] + 0.07)
                self.tube(top, ankle, radii=(0.036, 0.034), paint=Paint.of(shoes, light))

    def _denim(self, hip: Point, knee: Point, cuff: Point, limb: int, thread: RGB) -> None:
        out = 0.0 if self.side else limb * 0.026
        self.line(*((u + out, v) for u, v in (hip, knee, cuff)), width=0.7, fill=thread)
        u, v = cuff
        self.line((u - 0.032, v - 0.012), (u + 0.032, v - 0.012), width=2.2, fill=thread)

    def _shoe(self, ankle: Point, limb: int, light: float) -> None:
        shoes, (u, v) = self.person.shoes, ankle
        paint, sole = Paint.of(shoes, light), v - 0.052
        if self.side:
            heel, toe = u - 0.03, u + 0.085
            outline = (
                (heel, sole),
                (heel, v + 0.022),
                (u + 0.022, v + 0.022),
                (toe, sole + 0.022),
                (toe, sole),
            )
        else:
            u += limb * 0.008
            heel, toe = u - 0.036, u + 0.036
            outline = ((heel, sole), (u - 0.026, v + 0.02), (u + 0.026, v + 0.02), (toe, sole))
        if shoes.kind == "sandals":
            self.shape(*outline, paint=shade(self.person.skin, light))
            for strap in (sole + 0.008, sole + 0.03):
                self.line((heel, strap), (toe - 0.006, strap), width=2.0, fill=paint.rgb)
        else:
            self.shape(*outline, paint=paint)
        if shoes.kind == "sneakers":
            self.line((heel, sole), (toe, sole), width=2.2, fill=_trim(shoes))
        else:
            self.line((heel, sole), (toe, sole), width=1.4, fill=shade(paint.rgb, 0.6))

    def _lower(self) -> None:
        lower = self.person.lower or self.person.upper
        wide = 0.062 if self.side else 0.098 * self.girth
        waist = wide - (0.004 if self.side else 0.014)
        paint = Paint.of(lower)
        if lower.kind in _SKIRT:
            hem, flare = _SKIRT[lower.kind]
            flare, sway = wide + flare, 0.012 * self.swing
            bottom = ((flare + sway, hem), (sway, hem - 0.008), (sway - flare, hem))
            self.shape((-waist, 0.57), (waist, 0.57), (wide, 0.48), *bottom, paint=paint)
            for fold in (-0.45, 0.1, 0.6):
                self.line((fold * wide, 0.45), (fold * flare * 1.2 + sway, hem), width=1.0, fill=(0, 0, 0, 45))
        else:
            self.both((waist, 0.56), (wide, 0.48), (wide * 0.9, 0.44), paint=paint)
            if not self.side:
                self.line((0, 0.47), (0, 0.36), width=1.0, fill=(0, 0, 0, 90))

    # -- torso

    def _torso(self) -> None:
        upper, g = self.person.upper, self.girth
        self.tube((0, 0.83), (0.008 * self.side, 0.89), radii=(0.03, 0.028), paint=shade(self.person.skin, 0.9))
        if self.side:
            puff = 0.012 if upper.kind == "padded jacket" else 0.0
            hem_wide = 0.066 * g + (0.012 if upper.kind == "coat" else 0.0)
            chest = ((0.035, 0.845), (0.064 * g + puff, 0.75), (0.058 * g + puff, 0.58), (hem_wide, self.hem))
            spine = (
                (-hem_wide, self.hem),
                (-0.056 * g - puff, 0.6),
                (-0.066 * g - puff, 0.77),
                (-0.03, 0.85),
            )
        else:
            shoulder = 0.075 if upper.kind == "tank top" else 0.118 * g
            hem_wide = {"coat": 0.118, "padded jacket": 0.108}.get(upper.kind, 0.1) * g
            waist = (0.078 if upper.kind == "dress" else 0.09) * g
            chest = ((0.04, 0.85), (shoulder, 0.815), (0.102 * g, 0.72), (waist, 0.58), (hem_wide, self.hem))
            spine = tuple((-u, v) for u, v in reversed(chest))
        self.shape(*chest, *spine, paint=Paint.of(upper))
        self._neckline(upper)
        self._trimmings(upper, hem_wide)
        if upper.accent_rgb is not None and upper.pattern == "logo" and self.front:
            self.oval(0, 0.69, 0.046, 0.042, upper.accent_rgb)
            self.oval(0, 0.69, 0.022, 0.02, upper.rgb)
        inner = [(0.55 * u, v) for u, v in reversed(chest)]
        self.shape(*chest, *inner, paint=(0, 0, 0, 32))  # a shadow down one side rounds the body

    def _neckline(self, upper: Item) -> None:
        line, trim = crease(upper.rgb), edge(upper.rgb)
        if upper.kind in _OPEN and self.front:
            self.both((0.03, 0.845), (0.012, 0.60), paint=self.person.inner)
            for s in (-1, 1):  # lapels
                self.shape((s * 0.03, 0.85), (s * 0.058, 0.79), (s * 0.012, 0.64), paint=trim)
        elif upper.kind == "shirt":
            for s in (-1, 1):
                self.shape((s * 0.006, 0.835), (s * 0.036, 0.868), (s * 0.044, 0.82), paint=trim)
            if self.front:
                self.line((0, 0.83), (0, self.hem), width=0.8, fill=line)
                for v in (0.79, 0.73, 0.67, 0.61, 0.55):
                    self.oval(0, v, 0.007, 0.007, trim)
        elif upper.kind == "hoodie":
            self._hood(Paint.of(upper, 0.82))
        elif upper.kind == "sweater":
            self.tube((-0.03, 0.855), (0.03, 0.855), radii=0.016, paint=trim)
        elif upper.kind in _LIGHT_COLLAR and self.front:
            deep = 0.815 if upper.kind == "t-shirt" else 0.79
            self.both((0.04, 0.855), (0.018, deep), paint=self.person.skin)

    def _hood(self, paint: Paint) -> None:
        if self.back:
            self.oval(0, 0.81, 0.062, 0.05, paint)
        elif self.side:
            self.oval(-0.045, 0.83, 0.035, 0.035, paint)
        else:
            self.tube((-0.048, 0.865), (0, 0.822), (0.048, 0.865), radii=0.019, paint=paint)
            self.both((0.045, 0.58), (0.062, 0.51), paint=(0, 0, 0, 50))  # pocket
            for s in (-1, 1):
                self.line((s * 0.014, 0.82), (s * 0.018, 0.74), width=1.2, fill=(240, 240, 240, 220))

    def _trimmings(self, upper: Item, hem_wide: float) -> None:
        line = crease(upper.rgb)
        if upper.kind in (*_OPEN, "padded jacket") and not self.back:
            zip_u, top = (0.05, 0.80) if self.side else (0.0, 0.62)
            self.line((zip_u, top), (zip_u, self.hem), width=1.2, fill=line)
        if upper.kind == "padded jacket":
            wide = 0.07 * self.girth if self.side else 0.098 * self.girth
            for v in (0.76, 0.69, 0.62, 0.55, 0.49):
                self.line((-wide, v), (0, v - 0.012), (wide, v), width=1.3, fill=line)
        elif upper.kind == "coat":
            self.line((-hem_wide * 0.9, 0.575), (hem_wide * 0.9, 0.575), width=2.6, fill=edge(upper.rgb))
            if self.back:
                self.line((0, 0.45), (0, self.hem), width=1.2, fill=line)
        elif upper.kind == "dress":
            waist = 0.058 if self.side else 0.08 * self.girth
            self.line((-waist, 0.575), (waist, 0.575), width=2.6, fill=line)
        elif upper.kind == "sweater":
            self.line((-hem_wide, self.hem + 0.014), (hem_wide, self.hem + 0.014), width=3.4, fill=(0, 0, 0, 60))
        if upper.kind in ("jacket", "hoodie") and self.side:
            self.line((0.0, 0.56), (0.02, 0.51), width=1.2, fill=line)  # pocket

    # -- arms

    def _arm_joints(self, limb: int) -> tuple[Point, Point, Point]:
        """The positions of shoulder, elbow and hand."""
        if self.side:
            bag = self.person.bag
            carries = bag is not None and bag.kind != "backpack" and self.bag_limb == limb
            upper = 0.15 if carries else -0.6 * self.swing * limb
            lower = upper + 0.25
            elbow = (0.165 * math.sin(upper), 0.80 - 0.165 * math.cos(upper))
            return (0.0, 0.80), elbow, (elbow[0] + 0.16 * math.sin(lower), elbow[1] - 0.16 * math.cos(lower))
        g, sway = self.girth, 0.012 * self.swing * limb
        elbow = (limb * (0.132 * g + 0.01), 0.635)
        return (limb * 0.108 * g, 0.79), elbow, (limb * (0.135 * g + 0.012 + sway), 0.475 + abs(sway))

    def _arm(self, limb: int) -> None:
        upper, (shoulder, elbow, hand) = self.person.upper, self.arms[limb]
        light = 0.8 if self.side and limb < 0 else 0.93
        skin, paint = shade(self.person.skin, light), Paint.of(upper, light)
        self.tube(shoulder, elbow, hand, radii=(0.028, 0.023, 0.019), paint=skin)
        self.oval(*hand, 0.022, 0.026, skin)
        if upper.kind in ("t-shirt", "dress"):
            self.tube(shoulder, _towards(shoulder, elbow, 0.62), radii=(0.036, 0.037), paint=paint)
        elif upper.kind != "tank top":
            thick = {"padded jacket": 0.044, "coat": 0.039, "hoodie": 0.038}.get(upper.kind, 0.035)
            wrist = _towards(elbow, hand, 0.86)
            self.tube(shoulder, elbow, wrist, radii=(thick, thick * 0.92, thick * 0.72), paint=paint)
            if upper.kind == "padded jacket" and not self.side:
                u, v = elbow
                for rise in (0.08, 0.01, -0.06):
                    self.line((u - thick, v + rise), (u + thick, v + rise), width=1.2, fill=crease(upper.rgb))

    # -- head

    def _hair_behind(self) -> None:
        kind, rgb = self.person.hair.kind, shade(self.person.hair.rgb, 0.85)
        if kind == "long hair" and self.side:
            self.tube((-0.03, 0.92), (-0.04, 0.77), radii=(0.066, 0.055), paint=rgb)
        elif kind == "long hair" and self.front:
            self.tube((0, 0.92), (0, 0.77), radii=(0.066, 0.072), paint=rgb)
        elif kind == "curly hair":
            self.oval(-0.015 * self.side, 0.925, 0.084, 0.078, rgb)

    def _head(self) -> None:
        skin, mouth = self.person.skin, shade(self.person.skin, 0.6)
        self.oval(0.012 * self.side, 0.922, 0.05, 0.064, skin)
        if self.side:
            self.shape((0.055, 0.935), (0.075, 0.91), (0.055, 0.905), paint=skin)  # nose
            self.oval(0.041, 0.932, 0.011, 0.01, (235, 235, 232))
            self.oval(0.044, 0.932, 0.007, 0.008, _DARK)
            self.line((0.042, 0.886), (0.058, 0.886), width=1.0, fill=mouth)
        elif self.front:
            for u in (-0.02, 0.02):
                self.oval(u, 0.928, 0.012, 0.009, (235, 235, 232))
                self.oval(u, 0.928, 0.007, 0.008, _DARK)
            self.line((-0.014, 0.888), (0.014, 0.888), width=1.1, fill=mouth)
        if self.person.beard and not self.back:
            self._beard()
        if self.person.hair.kind != "bald":
            {"front": self._hair_front, "back": self._hair_back, "side": self._hair_side}[self._aspect()]()
        if self.person.glasses and not self.back:
            for u in (0.045,) if self.side else (-0.022, 0.022):
                self.oval(u, 0.93, 0.018, 0.015, _DARK)
            self.line((-0.04, 0.934), (0.045, 0.934), width=1.2, fill=_DARK)
        if self.person.hat:
            self._hat(self.person.hat)

    def _aspect(self) -> str:
        return "side" if self.side else "front" if self.front else "back"

    def _beard(self) -> None:
        hair = self.person.hair.rgb
        if self.side:
            self.dome(0.022, 0.9, 0.042, 0.048, hair, -20, 110)
        else:
            self.dome(0, 0.905, 0.046, 0.052, hair, 10, 170)
            self.line((-0.012, 0.886), (0.012, 0.886), width=1.0, fill=shade(self.person.skin, 0.6))

    def _hair_front(self) -> None:
        kind, hair = self.person.hair.kind, self.person.hair.rgb
        self.dome(0, 0.935, 0.056, 0.06, hair, 185, 355)
        if kind == "long hair":
            for s in (-1, 1):
                self.tube((s * 0.05, 0.93), (s * 0.056, 0.79), radii=(0.018, 0.024), paint=hair)
        elif kind == "curly hair":
            self._curls(((-0.05, 0.97), (0.0, 0.99), (0.045, 0.965), (-0.062, 0.93), (0.062, 0.93)))

    def _hair_side(self) -> None:
        kind, hair = self.person.hair.kind, self.person.hair.rgb
        self.oval(-0.016, 0.94, 0.05, 0.056, hair)
        self.dome(0.006, 0.935, 0.058, 0.058, hair)
        if kind == "long hair":
            self.tube((-0.03, 0.93), (-0.04, 0.76), radii=(0.042, 0.045), paint=hair)
        elif kind == "curly hair":
            self._curls(((-0.05, 0.97), (0.0, 0.99), (0.045, 0.965), (-0.062, 0.93)))
        self._tied_hair(-0.061)

    def _hair_back(self) -> None:
        kind, hair = self.person.hair.kind, self.person.hair.rgb
        self.oval(0, 0.928, 0.056, 0.066, hair)
        if kind == "long hair":
            self.tube((0, 0.91), (0, 0.735), radii=(0.056, 0.066), paint=hair)
            for u in (-0.03, 0.0, 0.03):
                self.line((u, 0.87), (u * 1.2, 0.70), width=0.8, fill=shade(hair, 1.35))
        elif kind == "curly hair":
            self._curls(((-0.05, 0.95), (0.05, 0.95), (-0.06, 0.90), (0.06, 0.90), (0, 0.975), (0, 0.88)))
        self._tied_hair(0.0)

    def _curls(self, centres: tuple[Point, ...]) -> None:
        for u, v in centres:
            self.oval(u, v, 0.033, 0.031, self.person.hair.rgb)

    def _tied_hair(self, u: float) -> None:
        kind, hair = self.person.hair.kind, self.person.hair.rgb
        if kind == "bun":
            self.oval(u, 0.985, 0.034, 0.032, hair)
            self.oval(u, 0.985, 0.02, 0.018, shade(hair, 1.3))
        elif kind == "ponytail":
            radii = (0.018, 0.027, 0.012)
            self.tube((u, 0.955), (u * 1.5, 0.88), (u * 1.3, 0.78), radii=radii, paint=shade(hair, 1.18))
            self.oval(u, 0.955, 0.014, 0.012, (200, 60, 80))

    def _hat(self, hat: Item) -> None:
        trim = edge(hat.rgb)
        self.dome(-0.004 * self.side, 0.948, 0.06, 0.062, hat.rgb)
        if hat.kind == "cap" and self.side:
            self.shape((0.03, 0.958), (0.12, 0.945), (0.12, 0.937), (0.03, 0.942), paint=trim)
        elif hat.kind == "cap" and self.front:
            self.oval(0, 0.95, 0.055, 0.014, trim)
        elif hat.kind == "beanie":
            self.both((0.062, 0.972), (0.062, 0.944), paint=trim)
            self.oval(0, 1.01, 0.018, 0.016, trim)
        elif hat.kind == "sun hat":
            self.oval(0, 0.955, 0.115, 0.017, hat.rgb)
            self.line((-0.055, 0.965), (0.055, 0.965), width=2.4, fill=trim)

    # -- bags

    def _backpack_behind(self) -> None:
        """The part of a backpack that is visible behind the body, from the front or the side."""
        bag = self.person.bag
        if bag is None or bag.kind != "backpack" or self.back:
            return
        if self.side:
            outer = ((-0.115, 0.81), (-0.15, 0.74), (-0.15, 0.60), (-0.13, 0.575))
            self.shape((-0.05, 0.83), *outer, (-0.05, 0.575), paint=bag.rgb)
            self.shape((-0.15, 0.66), (-0.165, 0.65), (-0.165, 0.60), (-0.15, 0.585), paint=shade(bag.rgb, 0.75))
        else:
            wide = 0.11 * self.girth
            self.both((0.06, 0.87), (wide + 0.02, 0.84), (wide + 0.03, 0.62), paint=bag.rgb)

    def _bag(self) -> None:
        bag = self.person.bag
        if bag is not None:
            draw = {
                "backpack": self._backpack,
                "shoulder bag": self._shoulder_bag,
                "handbag": self._handbag,
                "shopping bag": self._shopping_bag,
                "suitcase": self._suitcase,
            }[bag.kind]
            draw(bag.rgb, edge(bag.rgb), *self.arms[self.bag_limb][2])

    def _backpack(self, rgb: RGB, trim: RGB, *_: float) -> None:
        if self.back:
            outline = ((0.045, 0.835), (0.083, 0.80), (0.092, 0.62), (0.075, 0.555))
            self.both(*((u + 0.006, v) for u, v in outline), paint=trim)
            self.both(*outline, paint=rgb)
            self.both((0.062, 0.675), (0.065, 0.585), paint=trim)
            self.line((-0.06, 0.74), (0.06, 0.74), width=1.2, fill=trim)
        elif self.side:
            self.line((-0.05, 0.82), (0.01, 0.835), (0.035, 0.77), (-0.03, 0.66), width=3.6, fill=rgb)
        else:
            for s in (-1, 1):
                self.line((s * 0.07, 0.84), (s * 0.072, 0.70), (s * 0.095, 0.62), width=4.2, fill=rgb)
                self.line((s * 0.088, 0.82), (s * 0.089, 0.71), width=0.8, fill=trim)

    def _shoulder_bag(self, rgb: RGB, trim: RGB, *_: float) -> None:
        if self.side:
            u, wide, strap_from = -0.02, 0.07, 0.0
        else:
            u, wide, strap_from = self.bag_limb * 0.115, 0.055, -self.bag_limb * 0.06
        self.line((strap_from, 0.845), (u, 0.56), width=2.8, fill=rgb)
        self.shape((u - wide, 0.56), (u + wide, 0.56), (u + wide, 0.43), (u - wide, 0.43), paint=rgb)
        flap = 0.9 * wide
        self.shape((u - wide, 0.56), (u + wide, 0.56), (u + flap, 0.49), (u - flap, 0.49), paint=trim)

    def _handbag(self, rgb: RGB, trim: RGB, u: float, v: float) -> None:
        top, bottom = v - 0.065, v - 0.15
        self.line((u - 0.035, top), (u - 0.015, v), (u + 0.015, v), (u + 0.035, top), width=1.6, fill=trim)
        self.shape((u - 0.045, top), (u + 0.045, top), (u + 0.06, bottom), (u - 0.06, bottom), paint=rgb)
        self.oval(u, top - 0.02, 0.012, 0.01, trim)

    def _shopping_bag(self, rgb: RGB, trim: RGB, u: float, v: float) -> None:
        top, bottom = v - 0.07, v - 0.25
        self.line((u - 0.03, top), (u, v), (u + 0.03, top), width=1.4, fill=trim)
        self.shape((u - 0.06, top), (u + 0.06, top), (u + 0.055, bottom), (u - 0.055, bottom), paint=rgb)
        self.line((u - 0.06, top), (u + 0.06, top), width=2.0, fill=trim)

    def _suitcase(self, rgb: RGB, trim: RGB, u: float, v: float) -> None:
        """A suitcase on wheels, beside or behind the person."""
        lean = 0.06 if self.side else 0.0
        u += -0.13 if self.side else 0.005 * self.bag_limb
        for s in (-0.03, 0.03):
            self.line((u + s, 0.30), (u + s + lean, v), width=1.4, fill=(70, 70, 74))
        self.shape((u - 0.06, 0.31), (u + 0.06, 0.31), (u + 0.06, 0.03), (u - 0.06, 0.03), paint=rgb)
        for rib in (0.25, 0.17, 0.09):
            self.line((u - 0.05, rib), (u + 0.05, rib), width=1.0, fill=trim)
        for s in (-0.045, 0.045):
            self.oval(u + s, 0.02, 0.013, 0.013, (30, 30, 30))


def _trim(shoes: Item) -> RGB:
    """The colour of a sneaker's sole: white, or grey for a white sneaker."""
    return (150, 150, 155) if shoes.colour == "white" else (236, 236, 236)
