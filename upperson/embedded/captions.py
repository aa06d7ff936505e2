"""Captions in varied wording, as of several annotators. A caption mentions most of the visible items, but not all."""

import random

from upperson.embedded.backgrounds import PLACES
from upperson.embedded.pedestrians import Pedestrian
from upperson.embedded.vocabulary import COLOURS, HAIR, NAMES, PATTERNS, PLURAL, Item

# The probability that an annotator mentions a visible part.
MENTIONED = {"upper": 0.95, "lower": 0.9, "bag": 0.8, "hat": 0.8, "hair": 0.6, "shoes": 0.55, "glasses": 0.5}

_SOMEONE = ("a person", "someone", "a pedestrian", "a walker", "an individual")
_PEOPLE = (*_SOMEONE, "this person", "the pedestrian", "the person")
_WEARS = ("wears", "is wearing", "is dressed in", "has on", "is in")
_SEEN = {
    "front": ("facing the camera", "coming towards us", "seen from the front"),
    "back": ("seen from behind", "walking away"),
    "left": ("walking to the left", "seen from the side"),
    "right": ("walking to the right", "seen from the side"),
}
_CARRIED = {
    "backpack": ("carrying {}", "with {} on the back", "with {}"),
    "shoulder bag": ("carrying {}", "with {} over the shoulder", "with {}"),
    "handbag": ("holding {}", "with {} in one hand", "carrying {}"),
    "shopping bag": ("holding {}", "carrying {}", "with {} in one hand"),
    "suitcase": ("pulling {}", "with {}", "with {} at the side"),
}


def colour_word(rng: random.Random, colour: str, synonyms: bool) -> str:
    """The first name of a colour, or sometimes a synonym."""
    names = COLOURS[colour].names
    return names[0] if not synonyms or rng.random() < 0.6 else rng.choice(names)


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun_phrase(
    rng: random.Random, item: Item, names: dict[str, tuple[str, ...]] = NAMES, synonyms: bool = True
) -> str:
    """An item in words: "a red t-shirt with white stripes", "a pair of blue jeans", "a coat in navy".

    Without synonyms, only the first name of every colour and kind of item is used.
    """
    name = rng.choice(names[item.kind][: None if synonyms else 1])
    colour = colour_word(rng, item.colour, synonyms)
    ending = ""
    if item.accent is not None and item.pattern != "plain" and rng.random() < 0.85:
        adjectives, endings = PATTERNS[item.pattern]
        accent = colour_word(rng, item.accent, synonyms)
        choice = rng.random()
        if not adjectives or choice < 0.45:
            ending = " " + rng.choice(endings).format(accent)
            if ending.startswith(" with a ") and accent[0] in "aeiou":
                ending = ending.replace(" with a ", " with an ", 1)
        elif choice < 0.75:
            colour = f"{colour} and {accent} {rng.choice(adjectives)}"
        else:
            colour = f"{rng.choice(adjectives)} {colour}"
    words = f"{colour} {name}{ending}"
    if not ending and rng.random() < 0.08:
        words = f"{name} in {colour}"
    if item.kind not in PLURAL:
        return article(words)
    return f"a pair of {words}" if rng.random() < 0.3 else words


def describe(rng: random.Random, pedestrian: Pedestrian) -> str:
    """A caption of an image, in one or two sentences."""
    visible = pedestrian.visible()
    mentioned = [part for part in visible if rng.random() < MENTIONED[part]]
    if len(mentioned) == len(visible) > 2:
        mentioned.remove(rng.choice([part for part in mentioned if part != "upper"]))
    if not {"upper", "lower"} & set(mentioned):
        mentioned.append("upper")
    if len(mentioned) == 1:
        mentioned.append(rng.choice([part for part in visible if part not in mentioned]))
    words = {part: _part(rng, part, visible[part]) for part in mentioned}
    setting = ""
    if rng.random() < 0.12:
        setting = " " + rng.choice(PLACES[pedestrian.view.place])
    if rng.random() < 0.15:
        setting += ", " + rng.choice(_SEEN[pedestrian.view.facing])
    text = rng.choice(_STYLES)(rng, words, setting)
    return text[0].upper() + text[1:]


def _part(rng: random.Random, part: str, item: Item) -> str:
    if part == "glasses":
        return rng.choice(("glasses", "dark glasses", "sunglasses"))
    if part == "hair":
        phrases = HAIR.get(item.kind, ("{} hair",))
        return rng.choice(phrases).format(item.colour)
    if part == "bag":
        return rng.choice(_CARRIED[item.kind]).format(noun_phrase(rng, item))
    return noun_phrase(rng, item)


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _clothes(rng: random.Random, words: dict[str, str]) -> list[str]:
    """The clothes, usually from top to bottom."""
    worn = [words[part] for part in ("upper", "lower", "shoes") if part in words]
    if rng.random() < 0.25:
        rng.shuffle(worn)
    return worn


def _looks(words: dict[str, str]) -> list[str]:
    return [words[part] for part in ("hair", "hat", "glasses") if part in words]


def _straight(rng: random.Random, words: dict[str, str], setting: str) -> str:
    """A person with ... wears ..., ... and ..., carrying ... ."""
    looks = f" with {listed(_looks(words))}" if _looks(words) else ""
    bag = f", {words['bag']}" if "bag" in words else ""
    return f"{rng.choice(_PEOPLE)}{looks} {rng.choice(_WEARS)} {listed(_clothes(rng, words))}{bag}{setting}."


def _two_sentences(rng: random.Random, words: dict[str, str], setting: str) -> str:
    """Someone in ... and ..., with a backpack. They have ... ."""
    verb = rng.choice(("in", "wearing", "dressed in"))
    bag = f", {words['bag']}" if "bag" in words else ""
    looks = f" They have {listed(_looks(words))}." if _looks(words) else ""
    return f"{rng.choice(_SOMEONE)} {verb} {listed(_clothes(rng, words))}{setting}{bag}.{looks}"


def _wearing_first(rng: random.Random, words: dict[str, str], setting: str) -> str:
    """Wearing ... and ..., this person walks ... ."""
    extra = [words["bag"]] if "bag" in words else []
    extra += [f"with {listed(_looks(words))}"] if _looks(words) else []
    rng.shuffle(extra)
    tail = (", " + " and ".join(extra)) if extra else ""
    verb = rng.choice(("walks", "is walking", "goes along"))
    lead = f"{rng.choice(('wearing', 'dressed in', 'in'))} {listed(_clothes(rng, words))}"
    return f"{lead}, {rng.choice(_PEOPLE)} {verb}{setting}{tail}."


def _telegraphic(rng: random.Random, words: dict[str, str], setting: str) -> str:
    """Red t-shirt, black jeans, white shoes, with a backpack."""
    things = _clothes(rng, words) + _looks(words)
    if "bag" in words:
        things.append(words["bag"])
    bare = [thing.removeprefix("a pair of ").removeprefix("a ").removeprefix("an ") for thing in things]
    return ", ".join(bare) + setting + "."


def _bag_first(rng: random.Random, words: dict[str, str], setting: str) -> str:
    """With a backpack, the person wears ... . Glasses and short hair."""
    lead = f"{words['bag']}, {rng.choice(_PEOPLE)}" if "bag" in words else rng.choice(_PEOPLE)
    looks = f" The person has {listed(_looks(words))}." if _looks(words) else ""
    return f"{lead} {rng.choice(_WEARS)} {listed(_clothes(rng, words))}{setting}.{looks}"


_STYLES = (_straight, _straight, _two_sentences, _two_sentences, _wearing_first, _telegraphic, _bag_first)
