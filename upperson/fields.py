"""Fields of the configuration: each has a default, a help text, a type and bounds, checked on construction."""

import dataclasses
import sys
import types
import typing
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

MOST_EPOCHS = 100_000
MOST_RATE = 100  # of learning
MOST_SHOWN = 200  # characters of a value in an error


def option(
    default: Any,
    text: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    changes_results: bool = True,
    metavar: tuple[str, ...] | None = None,
    added: bool = False,
) -> Any:
    """A field with its help text and bounds. The bounds apply to each number of a tuple.

    Args:
        default: value of the field.
        text: help text.
        at_least, above, at_most: bounds. Whole numbers also have at most 64 bits.
        changes_results: False if the value may differ when a run is resumed.
        metavar: names of the numbers of a tuple, for the help.
        added: True if older files lack this field; its default then applies.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most}
    return field(
        default=default,
        metadata={
            "help": text,
            "changes_results": changes_results,
            "metavar": metavar,
            "added": added,
            "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
        },
    )


def fields_of(section: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(section)
    return [(spec, hints[spec.name]) for spec in dataclasses.fields(section)]


def _is_a(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_is_a, value, arguments))
    if arguments:
        return any(_is_a(value, kind) for kind in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(hint) is tuple:
        return f"{len(arguments)} values of type {arguments[0].__name__}"
    words: dict[Any, str] = {float: "a finite number", int: "a whole number of at most 64 bits", types.NoneType: "none"}
    return " or ".join(str(words.get(kind, kind.__name__)) for kind in arguments or (hint,))


def _shown(value: Any) -> str:
    """The value in an error."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def _is_writable(text: str) -> bool:
    """Whether files and paths can hold the text. Half of a surrogate pair stands for a byte that is not UTF-8."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _within(number: float, name: str, bound: float) -> bool:
    return {"at least": number >= bound, "above": number > bound, "at most": number <= bound}[name]


class Checked:
    """Checks the type and bounds of every field on construction. Raises ValueError with field, value and limits."""

    def __post_init__(self) -> None:
        for spec, hint in fields_of(type(self)):
            if "bounds" not in spec.metadata:
                raise TypeError(f"{type(self).__name__}.{spec.name}: expected a default made by upperson.fields.option")
            value = getattr(self, spec.name)
            if not _is_a(value, hint):
                raise ValueError(f"{spec.name}: {_shown(value)} is not allowed; expected {_in_words(hint)}")
            if isinstance(value, str | Path) and not _is_writable(str(value)):
                raise ValueError(f"{spec.name}: {_shown(value)} is not allowed; expected Unicode text without NUL")
            numbers: Any = value if isinstance(value, tuple) else (value,)
            for name, bound in spec.metadata["bounds"].items():
                if any(number is not None and not _within(number, name, bound) for number in numbers):
                    raise ValueError(f"{spec.name}: {_shown(value)} is not allowed; it must be {name} {bound:g}")
