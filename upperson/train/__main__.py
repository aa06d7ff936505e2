"""Trains a method for text-based person retrieval: UP-Person, or the one that --method names."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from upperson.config import DataConfig
from upperson.config.command_line import parse_arguments
from upperson.errors import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    actions = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    actions.add_argument(
        "--check-data",
        action="store_true",
        help="read the data set, open every image, report what is wrong or unusual, and stop",
    )
    config = parse_arguments(argv, parents=[actions])
    if actions.parse_known_args(argv)[0].check_data:
        return exit_status(lambda: check_data(config.data))

    def command() -> int:
        from upperson.train.fit import fit  # imports torch, which --help does not need

        fit(config)
        return 0

    return exit_status(command)


def check_data(data: DataConfig) -> int:
    """Prints the report. Status 1 if an image is missing or broken; anything merely unusual does not count."""
    from upperson.data.check import check_dataset, text
    from upperson.data.splits import read_splits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        splits = read_splits(data, need=())
    report = check_dataset(data.dataset, splits)
    print(text(report))
    return 0 if report.usable else 1


if __name__ == "__main__":
    sys.exit(main())
