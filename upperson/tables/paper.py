"""The figures of the paper's tables, as arXiv 2504.10084 prints them, from paper.csv.

A line of paper.csv is one figure: table, data set, row, the row of this project's table that it belongs to (empty: this
project has no such row), metric and value.
"""

import csv
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

SOURCE = "arXiv 2504.10084"
# The tables of this project that have no number in the paper, and the table with the paper's figures of their rows.
TABLES = {"methods": "IV", "figure5": "IV"}


@dataclass(frozen=True)
class Published:
    """A row of a table of the paper. `ours`: the row of this project's table. `figures`: values by metric."""

    table: str
    dataset: str
    row: str
    ours: str
    figures: dict[str, str] = field(default_factory=dict)


@cache
def published(number: str) -> tuple[Published, ...]:
    """The rows of a table of the paper in the paper's order; none for a table without numbers."""
    rows: dict[tuple[str, str], Published] = {}
    with files("upperson.tables").joinpath("paper.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["table"] == TABLES.get(number, number):
                key = line["dataset"], line["row"]
                row = rows.setdefault(key, Published(line["table"], *key, line["ours"]))
                row.figures[line["metric"]] = line["value"]
    return tuple(rows.values())


def number_of(figure: str) -> float:
    """A printed figure as a number: "13783.40M" is 13,783,400,000."""
    factors = {"M": 1e6, "B": 1e9}
    return float(figure.rstrip("MB")) * factors.get(figure[-1], 1)
