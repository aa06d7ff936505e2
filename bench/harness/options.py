"""Types of command-line arguments. Each names what was expected."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from upperson.files import A_FOLDER, NOTHING, REGULAR, found_at


def at_least(least: int, reason: str = "") -> Callable[[str], int]:
    """The type of whole numbers from `least`; `reason` follows the error."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            expected = ", ".join(filter(None, (f"expected a whole number from {least}", reason)))
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; {expected}")
        return int(text)

    return whole_number


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected a number above 0")
    return value


def json_path(text: str) -> Path:
    """A file that can be written; the path may be empty."""
    path = Path(text)
    if text and found_at(path.parent) != A_FOLDER:
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist; expected a file in one that does")
    if text and (found_at(path) not in (REGULAR, NOTHING) or not os.access(path.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{path} cannot be written; expected a file in a folder that can be written")
    return path
