"""Captions in varied wording, as of several annotators. A caption mentions most of the visible items, but not all.

Their words and their length are those of captions of pedestrian photographs: "The man is wearing a white shirt with
black pants and is carrying a backpack over his shoulder. He has short dark hair."
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from upperson.embedded.backgrounds import PLACES
from upperson.embedded.pedestrians import Pedestrian
from upperson.embedded.vocabulary import COLOURS, HAIR, NAMES, PATTERNS, PLURAL, Item

# The probability that an annotator mentions a visible part.
MENTIONED = {
    "upper": 0.97,
    "lower": 0.95,
    "bag": 0.9,
    "hat": 0.9,
    "hair": 0.75,
    "shoes": 0.75,
    "glasses": 0.6,
    "beard": 0.6,
}


@dataclass(frozen=True)
class Speech:
    """How a caption speaks of the wearer: subjects, pronouns and verbs of the first clause."""

    subjects: tuple[str, ...]
    pronoun: str
    possessive: str


WOMAN = Speech(("a woman", "the woman", "this woman", "a young woman", "a lady", "the lady", "a female"), "she", "her")
MAN = Speech(("a man", "the man", "this man", "a young man", "a male", "the guy", "a gentleman"), "he", "his")
SOMEONE = Speech(
    ("a person", "the person", "this person", "someone", "a pedestrian", "an individual"), "the person", "their"
)

_WEARS = ("is wearing", "is wearing", "is wearing", "wears", "is dressed in", "has on", "is in", "wore")
_ALSO = ("{pronoun} is also wearing", "{pronoun} also wears", "{pronoun} has", "{pronoun} is wearing")
_SEEN = {
    "front": ("walking towards the camera", "walking forward", "facing the camera", "coming toward us"),
    "back": ("walking away from the camera", "seen from behind", "walking away", "facing away from the camera"),
    "left": ("walking to the left", "seen from the side", "facing left"),
    "right": ("walking to the right", "seen from the side", "facing right"),
}
# Item and way of carrying, as clauses of a verb and as phrases with "with".
_CARRIED = {
    "backpack": (
        ("carrying {}", "wearing {}", "carrying {} on {their} back"),
        ("with {}", "with {} on {their} back"),
    ),
    "shoulder bag": (
        ("carrying {} over {their} shoulder", "carrying {}", "wearing {} across {their} body"),
        ("with {} over {their} shoulder", "with {} hanging at {their} side"),
    ),
    "handbag": (
        ("holding {}", "carrying {} in {their} hand", "carrying {}"),
        ("with {}", "with {} in one hand"),
    ),
    "shopping bag": (
        ("holding {}", "carrying {} in {their} hand", "carrying {}"),
        ("with {}", "with {} in one hand"),
    ),
    "suitcase": (("pulling {}", "pulling {} behind {them}"), ("with {}", "with {} at {their} side")),
}
_FEET = ("On {their} feet are {}.", "{They} has {} on {their} feet.", "{Their} footwear is {}.")


def colour_word(rng: random.Random, colour: str, synonyms: bool) -> str:
    """The first name of a colour, or sometimes a synonym."""
    names = COLOURS[colour].names
    return names[0] if not synonyms or rng.random() < 0.6 else rng.choice(names)


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun_phrase(
    rng: random.Random, item: Item, names: Mapping[str, tuple[str, ...]] = NAMES, synonyms: bool = True
) -> str:
    """An item in words: "a red t-shirt with white stripes", "a pair of blue jeans", "a coat in navy".

    Without synonyms, only the first name of every colour and kind of item is used. With them, the first is the most
    frequent.
    """
    name = names[item.kind][0] if not synonyms or rng.random() < 0.4 else rng.choice(names[item.kind])
    colour = colour_word(rng, item.colour, synonyms)
    ending = ""
    if item.accent is not None and item.pattern != "plain" and rng.random() < 0.9:
        adjectives, endings = PATTERNS[item.pattern]
        accent = colour_word(rng, item.accent, synonyms)
        choice = rng.random()
        if not adjectives or choice < 0.45:
            ending = " " + rng.choice(endings).format(accent)
            if ending.startswith(" with a ") and accent[0] in "aeiou":
                ending = ending.replace(" with a ", " with an ", 1)
        elif choice < 0.8:
            colour = f"{colour} and {accent} {rng.choice(adjectives)}"
        else:
            colour = f"{rng.choice(adjectives)} {colour}"
    words = f"{colour} {name}{ending}"
    if not ending and rng.random() < 0.05:
        words = f"{name} in {colour}"
    if item.kind not in PLURAL:
        return article(words)
    return f"a pair of {words}" if rng.random() < 0.2 else words


def describe(rng: random.Random, pedestrian: Pedestrian) -> str:
    """A caption of an image, in one to four sentences."""
    speech = {"woman": WOMAN, "man": MAN, "person": SOMEONE}[pedestrian.looks_like()]
    setting = ""
    if rng.random() < 0.06:
        setting = " " + rng.choice(PLACES[pedestrian.view.place])
    seen = rng.choice(_SEEN[pedestrian.view.facing]) if rng.random() < 0.15 else ""
    caption = _Caption(rng, mentioned(rng, pedestrian.visible()), speech, setting, seen)
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in rng.choice(_STYLES)(caption))


def mentioned(rng: random.Random, visible: dict[str, Item]) -> dict[str, Item]:
    """The parts that an annotator mentions: at least two of two or more, with an upper or lower garment."""
    parts = [part for part in visible if rng.random() < MENTIONED[part]]
    if len(parts) == len(visible) > 3 and rng.random() < 0.5:
        parts.remove(rng.choice([part for part in parts if part != "upper"]))
    if "upper" in visible and not {"upper", "lower"} & set(parts):
        parts.append("upper")
    if len(parts) == 1 and len(visible) > 1:
        parts.append(rng.choice([part for part in visible if part not in parts]))
    return {part: visible[part] for part in visible if part in parts}


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


class _Caption:
    """The parts of one caption in words."""

    def __init__(self, rng: random.Random, items: dict[str, Item], speech: Speech, setting: str, seen: str):
        self.rng, self.items, self.speech, self.setting, self.seen = rng, items, speech, setting, seen
        self.subject = rng.choice(speech.subjects)

    def fill(self, form: str, item: str = "") -> str:
        they, their = self.speech.pronoun, self.speech.possessive
        them = {"he": "him", "she": "her"}.get(they, "them")
        capital = they[0].upper() + they[1:]
        return form.format(item, pronoun=they, they=they, They=capital, their=their, Their=their.title(), them=them)

    def part(self, part: str) -> str:
        item = self.items[part]
        if part == "glasses":
            return self.rng.choice(("glasses", "dark glasses", "sunglasses", "a pair of sunglasses"))
        if part == "beard":
            return self.rng.choice(("a beard", f"a {item.colour} beard"))
        if part == "hair":
            return self.rng.choice(HAIR.get(item.kind, ("{} hair",))).format(item.colour)
        return noun_phrase(self.rng, item)

    def has(self, part: str) -> bool:
        return part in self.items

    def clothes(self, shoes: bool) -> str:
        """ "a white shirt with black pants and brown shoes"."""
        rng = self.rng
        upper, lower, feet = (self.part(part) if self.has(part) else "" for part in ("upper", "lower", "shoes"))
        feet = feet if shoes else ""
        if upper and lower and rng.random() < 0.15:
            upper, lower = lower, upper
        if upper and lower and not feet:
            return upper + rng.choice((" and ", " and ", " with ", ", ")) + lower
        if upper and lower and rng.random() < 0.3:
            return f"{upper} with {lower} and {feet}"
        worn = [words for words in (upper, lower, feet) if words]
        return listed(worn) if worn else "clothes"

    def looks(self) -> str:
        return listed([self.part(part) for part in ("hair", "beard") if self.has(part)])

    def has_looks(self) -> bool:
        return self.has("hair") or self.has("beard")

    def head(self) -> str:
        """What is worn on the head."""
        return listed([self.part(part) for part in ("hat", "glasses") if self.has(part)])

    def has_head(self) -> bool:
        return self.has("hat") or self.has("glasses")

    def carrying(self) -> str:
        forms = _CARRIED[self.items["bag"].kind][0]
        return self.fill(self.rng.choice(forms), self.part("bag"))

    def with_bag(self) -> str:
        forms = _CARRIED[self.items["bag"].kind][1]
        return self.fill(self.rng.choice(forms), self.part("bag"))

    def also(self) -> str:
        return self.fill(self.rng.choice(_ALSO))

    def rest(self, *, shoes: bool, looks: bool, head: bool, bag: bool) -> list[str]:
        """Sentences about the parts that are still to be mentioned, in any order."""
        rng, sentences = self.rng, []
        shoes, bag = shoes and self.has("shoes"), bag and self.has("bag")
        looks, head = looks and self.has_looks(), head and self.has_head()
        if looks and head and rng.random() < 0.6:
            sentences.append(self.fill(f"{{They}} has {self.looks()} and is wearing {self.head()}."))
        elif looks or head:
            if looks:
                sentences.append(self.fill(f"{{They}} has {self.looks()}."))
            if head:
                sentences.append(f"{self.also()} {self.head()}.")
        if shoes and bag and rng.random() < 0.4:
            sentences.append(self.fill(f"{{They}} is {self.carrying()} and wears {self.part('shoes')}."))
        elif shoes or bag:
            if shoes:
                plain = self.fill(rng.choice(_FEET), self.part("shoes"))
                sentences.append(plain if rng.random() < 0.4 else f"{self.also()} {self.part('shoes')}.")
            if bag:
                sentences.append(self.fill(f"{{They}} is {self.carrying()}."))
        if self.seen and rng.random() < 0.6:
            sentences.append(self.fill(f"{{They}} is {self.seen}."))
            self.seen = ""
        rng.shuffle(sentences)
        return sentences

    def lead_seen(self) -> str:
        """The view in the first sentence, or nothing."""
        seen, self.seen = self.seen, ""
        return f", {seen}" if seen else ""


def _straight(c: _Caption) -> list[str]:
    """A man with ... is wearing ... and is carrying ... . He has ... ."""
    rng = c.rng
    looks_first, bag_first, shoes_first = rng.random() < 0.35, rng.random() < 0.5, rng.random() < 0.6
    looks = f" with {c.looks()}" if looks_first and c.has_looks() else ""
    lead = f"{c.subject}{looks} {rng.choice(_WEARS)} {c.clothes(shoes_first)}{c.setting}"
    if bag_first and c.has("bag"):
        lead += f" and is {c.carrying()}" if rng.random() < 0.5 else f", {c.carrying()}"
    rest = c.rest(shoes=not shoes_first, looks=not looks_first, head=True, bag=not bag_first)
    return [lead + c.lead_seen() + ".", *rest]


def _looks_first(c: _Caption) -> list[str]:
    """The woman has long black hair and is wearing ... . She is carrying ... ."""
    if not c.has_looks():
        return _straight(c)
    shoes_first = c.rng.random() < 0.5
    clothes = c.clothes(shoes_first)
    lead = f"{c.subject} has {c.looks()} and {c.rng.choice(_WEARS[:4])} {clothes}{c.setting}"
    rest = c.rest(shoes=not shoes_first, looks=False, head=True, bag=True)
    return [lead + c.lead_seen() + ".", *rest]


def _wearing_first(c: _Caption) -> list[str]:
    """Wearing ... and ..., the man walks ... ."""
    verb = c.rng.choice(("walks", "is walking", "goes along"))
    bag = f" {c.with_bag()}" if c.has("bag") else ""
    lead = f"{c.rng.choice(('wearing', 'dressed in'))} {c.clothes(True)}, {c.subject} {verb}{c.setting}{bag}."
    return [lead, *c.rest(shoes=False, looks=True, head=True, bag=False)]


def _someone_in(c: _Caption) -> list[str]:
    """A woman in a red coat and black boots, with a purse in one hand. She has ... ."""
    shoes_first = c.rng.random() < 0.7
    bag = f", {c.with_bag()}" if c.has("bag") else ""
    clothes = c.clothes(shoes_first)
    lead = f"{c.subject} {c.rng.choice(('in', 'wearing', 'wearing', 'dressed in'))} {clothes}{c.setting}{bag}"
    return [lead + c.lead_seen() + ".", *c.rest(shoes=not shoes_first, looks=True, head=True, bag=False)]


def _telegraphic(c: _Caption) -> list[str]:
    """Woman, long black hair, red coat, black boots, carrying a purse."""
    things = [c.part(part) for part in ("upper", "lower", "shoes") if c.has(part)]
    looks = [c.looks()] if c.has_looks() else []
    things = looks + things if c.rng.random() < 0.5 else things + looks
    things += [c.head()] if c.has_head() else []
    bare = [thing.removeprefix("a pair of ").removeprefix("a ").removeprefix("an ") for thing in things]
    bare += [c.carrying()] if c.has("bag") else []
    return [", ".join(bare) + c.setting + "."]


_STYLES = (_straight,) * 5 + (_looks_first,) * 3 + (_someone_in,) * 3 + (_wearing_first, _telegraphic)
