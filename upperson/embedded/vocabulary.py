"""The items in the drawings, and their names. Pedestrians, scenes and captions share them."""

import random
from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Colour:
    names: tuple[str, ...]  # synonyms; the first is the most frequent
    shades: tuple[RGB, ...]
    weight: float  # relative frequency


COLOURS = {
    "black": Colour(("black",), ((26, 26, 30), (38, 37, 40), (18, 20, 26)), 3.0),
    "white": Colour(("white",), ((240, 240, 238), (226, 228, 232), (246, 243, 236)), 2.2),
    "grey": Colour(("grey", "gray"), ((128, 130, 134), (146, 146, 148), (112, 114, 118)), 2.0),
    "red": Colour(("red", "bright red", "reddish"), ((204, 32, 36), (220, 46, 40), (190, 24, 44)), 1.5),
    "maroon": Colour(("maroon", "dark red", "burgundy"), ((104, 22, 36), (120, 30, 40), (92, 18, 30)), 0.8),
    "orange": Colour(("orange", "bright orange"), ((236, 124, 28), (244, 140, 40), (228, 108, 20)), 0.8),
    "yellow": Colour(("yellow", "bright yellow"), ((242, 208, 44), (250, 220, 70), (232, 192, 30)), 1.0),
    "green": Colour(("green", "bright green"), ((44, 150, 70), (60, 164, 60), (30, 132, 76)), 1.0),
    "dark green": Colour(("dark green", "olive", "olive green"), ((44, 72, 46), (62, 76, 40), (34, 64, 52)), 0.9),
    "turquoise": Colour(("turquoise", "teal", "aqua"), ((30, 158, 160), (44, 172, 168), (24, 140, 150)), 0.7),
    "light blue": Colour(
        ("light blue", "sky blue", "pale blue"), ((136, 186, 228), (150, 196, 232), (124, 174, 220)), 1.2
    ),
    "blue": Colour(("blue", "bright blue"), ((38, 88, 196), (50, 104, 208), (30, 76, 180)), 1.6),
    "dark blue": Colour(("dark blue", "navy", "navy blue"), ((28, 40, 92), (34, 48, 100), (24, 34, 78)), 1.8),
    "purple": Colour(("purple", "violet"), ((118, 56, 158), (130, 70, 170), (104, 46, 140)), 0.8),
    "pink": Colour(("pink", "light pink"), ((238, 140, 176), (244, 158, 188), (228, 120, 164)), 1.0),
    "brown": Colour(("brown", "dark brown"), ((112, 72, 40), (126, 84, 50), (98, 62, 36)), 1.1),
    "beige": Colour(
        ("beige", "tan", "khaki", "cream colored"), ((214, 190, 148), (222, 200, 162), (202, 178, 136)), 1.1
    ),
}

DENIM = ("blue", "dark blue", "light blue", "black", "grey")

# kind -> names. A plural name has no article ("blue jeans" or "a pair of blue jeans").
UPPER = {
    "t-shirt": ("t-shirt", "shirt", "short sleeved shirt", "tee shirt", "short sleeve t-shirt", "tshirt", "tee"),
    "shirt": ("shirt", "long sleeved shirt", "button up shirt", "collared shirt", "long sleeve button down shirt"),
    "sweater": ("sweater", "pullover", "long sleeved sweater", "sweatshirt", "jumper"),
    "hoodie": ("hoodie", "hooded sweatshirt", "hooded sweater"),
    "jacket": ("jacket", "blazer", "suit jacket", "light jacket"),
    "padded jacket": ("padded jacket", "down jacket", "puffy jacket", "puffer jacket", "quilted winter jacket"),
    "coat": ("coat", "long coat", "knee length coat", "belted coat", "overcoat", "trench coat"),
    "tank top": ("tank top", "sleeveless top", "sleeveless shirt", "sleeveless blouse"),
    "dress": ("dress", "knee length dress", "short sleeved dress", "sundress"),
}
LOWER = {
    "trousers": ("pants", "trousers", "slacks", "long pants", "dress pants"),
    "jeans": ("jeans", "denim jeans", "jean pants", "denim pants"),
    "shorts": ("shorts", "short pants", "knee length shorts", "bermuda shorts"),
    "skirt": ("skirt", "short skirt", "flared skirt", "miniskirt"),
    "long skirt": ("long skirt", "ankle length skirt", "long flowing skirt"),
}
SHOES = {
    "sneakers": ("sneakers", "tennis shoes", "athletic shoes", "running shoes", "sports shoes"),
    "shoes": ("shoes", "dress shoes", "flat shoes", "loafers", "leather shoes"),
    "boots": ("boots", "ankle boots", "leather boots"),
    "sandals": ("sandals", "flip flops", "strappy sandals", "open toed sandals"),
}
BAGS = {
    "backpack": ("backpack", "back pack", "bookbag", "knapsack", "book bag"),
    "shoulder bag": ("shoulder bag", "messenger bag", "crossbody bag", "satchel", "cross body bag"),
    "handbag": ("handbag", "purse", "hand bag", "pocketbook"),
    "shopping bag": ("shopping bag", "plastic bag", "paper bag", "tote bag"),
    "suitcase": ("suitcase", "rolling suitcase", "wheeled suitcase"),
}
HATS = {
    "cap": ("cap", "baseball cap", "ball cap"),
    "beanie": ("beanie", "knit cap", "knitted hat"),
    "sun hat": ("hat", "brimmed hat", "sun hat", "straw hat"),
}
HAIR = {
    "short hair": ("short {} hair", "short hair that is {}", "short cropped {} hair"),
    "long hair": ("long {} hair", "long flowing {} hair", "{} hair falling on the shoulders"),
    "ponytail": ("{} hair in a ponytail", "a {} ponytail", "{} hair pulled back in a pony tail"),
    "bun": ("{} hair in a bun", "{} hair tied up in a bun"),
    "curly hair": ("curly {} hair", "a lot of curly {} hair"),
    "bald": ("a bald head", "a shaved head"),
}
HAIR_COLOURS = {
    "black": ((28, 24, 24), (20, 20, 24)),
    "brown": ((92, 58, 34), (110, 70, 40)),
    "blond": ((222, 186, 110), (208, 168, 92)),
    "red": ((170, 74, 30), (186, 86, 40)),
    "grey": ((168, 168, 170), (190, 190, 192)),
}
SKIN = ((244, 206, 178), (230, 184, 150), (204, 152, 112), (164, 112, 76), (122, 80, 54), (90, 58, 42))

# pattern -> (adjectives, endings with the second colour)
PATTERNS = {
    "stripes": (("striped",), ("with {} stripes", "with horizontal {} stripes", "with {} stripes across it")),
    "vertical stripes": (("vertically striped",), ("with vertical {} stripes", "with {} pinstripes")),
    "checks": (("checkered", "plaid", "checked"), ("with {} checks", "with a {} plaid pattern")),
    "dots": (("polka dotted", "dotted", "spotted"), ("with {} dots", "with {} polka dots")),
    "logo": ((), ("with a {} logo", "with a {} print on the chest", "with a {} design on the front")),
}

NAMES = {**UPPER, **LOWER, **SHOES, **BAGS, **HATS}
PLURAL = frozenset({"trousers", "jeans", "shorts", "leggings", "socks", "gloves", "glasses", *SHOES})


@dataclass(frozen=True)
class Item:
    """A coloured item, such as a garment, a bag or a toy car. `accent` is the second colour of its pattern."""

    kind: str
    colour: str
    rgb: RGB
    pattern: str = "plain"
    accent: str | None = None
    accent_rgb: RGB | None = None

    def without_logo(self) -> "Item":
        """The item without a logo, as seen from a side where the logo on its front is not visible."""
        return Item(self.kind, self.colour, self.rgb) if self.pattern == "logo" else self


def pick_colour(rng: random.Random, among: tuple[str, ...] = tuple(COLOURS)) -> str:
    """Samples a colour name by the weights of the colours."""
    return rng.choices(among, [COLOURS[name].weight for name in among])[0]


def pick_item(rng: random.Random, kind: str, among: tuple[str, ...] = tuple(COLOURS), patterned: float = 0.0) -> Item:
    """Samples an item of a kind in a colour from `among`, and with probability `patterned` in two colours."""
    colour = pick_colour(rng, among)
    rgb = rng.choice(COLOURS[colour].shades)
    if rng.random() >= patterned:
        return Item(kind, colour, rgb)
    accent = rng.choice([name for name in COLOURS if contrast(COLOURS[name].shades[0], rgb) > 230])
    return Item(kind, colour, rgb, rng.choice(list(PATTERNS)), accent, rng.choice(COLOURS[accent].shades))


def contrast(a: RGB, b: RGB) -> int:
    """The sum of the absolute differences of the channels: 0 for the same colour, 765 for black and white."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))
