"""The losses by name, and a weighted sum of them as text."""

import re
from reprlib import repr as short

PAIR_LOSSES = ("sdm", "itc", "cmpm")
LOSSES = (*PAIR_LOSSES, "id", "mlm", "balance")
MOST_WEIGHT = 1e6
NOT_MASKED = -100  # label of a token that is not predicted; PyTorch's cross entropy ignores this label


def parse_losses(text: str) -> dict[str, float]:
    """The weights by name of a sum such as "sdm", "sdm+id" or "sdm+0.5*cmpm". Raises ValueError for other texts."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        found = re.fullmatch(r"\s*(?:(\d+\.?\d*|\.\d+)\s*\*\s*)?([a-z]+)\s*", term)
        if found is None or found[2] not in LOSSES:
            raise ValueError(
                f"{short(text)} is not allowed; expected a sum of {', '.join(LOSSES)}, each with an optional weight, "
                "such as sdm+0.5*itc"
            )
        if found[2] in weights:
            raise ValueError(f"{short(text)} is not allowed; it contains {found[2]} twice")
        weights[found[2]] = float(found[1] or 1)
        if not 0 < weights[found[2]] <= MOST_WEIGHT:
            raise ValueError(
                f"{short(text)} is not allowed; the weight of {found[2]} must be above 0 and at most {MOST_WEIGHT:g}"
            )
    return weights
