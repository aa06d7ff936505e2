"""Tables, JSON files, and one line for an error."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from upperson.files import write_atomically


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple", left: Sequence[str] = ()) -> str:
    """A table whose header is the keys of the rows. The first column and those in `left` are aligned to the left.

    `style` is one of tabulate: "simple" for a terminal, "pipe" for Markdown. Text stays as it is.
    """
    alignment = ["left" if number == 0 or name in left else "right" for number, name in enumerate(rows[0])]
    lines = [
        {name: f"{value:,.2f}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    return tabulate(lines, "keys", tablefmt=style, disable_numparse=True, colalign=alignment)


def microseconds(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def save_json(path: Path, content: Any) -> None:
    """Writes the whole file or leaves the old one."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def cannot_run(error: Exception) -> str:
    """The first line of an error, for a list of candidates that are not timed."""
    return f"cannot run: {(str(error).strip() or repr(error)).splitlines()[0][:90]}"
