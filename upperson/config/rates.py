"""Learning rates by a part of the parameters' names, as text: "mlm.head=5e-5, bias=2e-5"."""

from reprlib import repr as short

from upperson.fields import MOST_RATE


def parse_rates(text: str) -> dict[str, float]:
    """The learning rates by part of a name, in their order. Raises ValueError for other texts."""
    rates: dict[str, float] = {}
    for term in text.split(","):
        part, _, number = (each.strip() for each in term.partition("="))
        try:
            rate = float(number)
        except ValueError:
            rate = 0.0
        if not part or not 0 < rate <= MOST_RATE:
            raise ValueError(
                f"{short(text)} is not allowed; expected parts of names, each with a rate above 0 and at most "
                f"{MOST_RATE}, such as bias=2e-5, mlm.head=5e-5"
            )
        if part in rates:
            raise ValueError(f"{short(text)} is not allowed; it contains {part} twice")
        rates[part] = rate
    return rates
