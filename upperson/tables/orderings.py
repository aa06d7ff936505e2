"""Which orderings of the paper reappear: each pair of rows, decided by a test over the seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Ordering:
    """Two rows of which the paper has the first before the second.

    `here`: by how much the first is better here, in percentage points. `p`: the probability of a difference that is at
    least as large in either direction, if both rows are equal.
    """

    better: str
    worse: str
    here: float
    p: float

    @property
    def verdict(self) -> str:
        if self.p >= SIGNIFICANT:
            return "undecided"
        return "reappears" if self.here > 0 else "reversed"


def orderings(paper: Mapping[str, float], here: Mapping[str, Sequence[float]]) -> list[Ordering]:
    """All pairs of rows that differ in the paper and have a spread here: several seeds, or one without training.

    Args:
        paper: the paper's figure of each row, in percent.
        here: the figures of all seeds of each row, in percent.
    """
    found = []
    rows = sorted((row for row in paper if here.get(row)), key=lambda row: -paper[row])
    for better, worse in combinations(rows, 2):
        values = here[better], here[worse]
        if paper[better] > paper[worse] and max(map(len, values)) > 1:
            difference = statistics.mean(values[0]) - statistics.mean(values[1])
            found.append(Ordering(better, worse, difference, welch(*values)))
    return found


def welch(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p of Welch's t-test of equal means (Biometrika 34, 1947). A single value has no spread.

    At least one side needs two values.
    """
    spreads = [(statistics.variance(values) / len(values), len(values) - 1) for values in (first, second) if values[1:]]
    squared = sum(spread for spread, _ in spreads)
    difference = abs(statistics.mean(first) - statistics.mean(second))
    if not squared:
        return float(not difference)
    freedom = squared**2 / sum(spread**2 / degrees for spread, degrees in spreads)
    return student(difference / math.sqrt(squared), freedom)


def student(t: float, freedom: float) -> float:
    """The probability of at least t ≥ 0 in either direction in Student's distribution.

    With t = √freedom · tan θ its density is cos θ to the power freedom - 1.
    """

    def area(start: float) -> float:
        angles = np.linspace(start, math.pi / 2, 20_001)
        heights = np.cos(angles[:-1]).clip(0) ** (freedom - 1)
        last = 1.0 if freedom == 1 else 0.0
        return float((heights.sum() + (last - heights[0]) / 2) * (angles[1] - angles[0]))

    return area(math.atan(t / math.sqrt(freedom))) / area(0.0)


def summary(found: Sequence[Ordering], metric: str) -> list[str]:
    """The orderings in words, as lines of Markdown; none without a pair."""
    if not found:
        return []
    of = {name: [pair for pair in found if pair.verdict == name] for name in ("reappears", "reversed", "undecided")}
    lines = [
        f"Of the paper's {len(found)} orderings by {metric}, {len(of['reappears'])} reappear, {len(of['reversed'])} "
        f"are reversed, and {len(of['undecided'])} are undecided (Welch's t-test over the seeds, two-sided, "
        f"{SIGNIFICANT:.0%}, each pair by itself).",
        "",
    ]
    for verdict, pairs in of.items():
        if pairs:
            shown = "; ".join(f"{pair.better} > {pair.worse} ({pair.here:+.2f}, p {pair.p:.2g})" for pair in pairs)
            lines += [f"* {verdict}: {shown}"]
    return [*lines, ""]
