"""Trains a method for text-based person retrieval: UP-Person, or the method of --method."""

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
        help="read the data set, open every image, report errors and unusual entries, and exit",
    )
    config = parse_arguments(argv, parents=[actions])
    if actions.parse_known_args(argv)[0].check_data:
        return exit_status(lambda: check_data(config.data))

    def command() -> int:
        from upperson.train.fit import fit  # a late import: --help does not need torch

        fit(config)
        return 0

    return exit_status(command)


def check_data(data: DataConfig) -> int:
    """Prints the report. The exit status is 1 if an image is missing or broken; unusual entries do not count."""
    from upperson.data.check import check_dataset, text
    from upperson.data.splits import read_splits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report has the same findings
        splits = read_splits(data, need=())
    report = check_dataset(data.dataset, splits)
    print(text(report))
    return 0 if report.usable else 1


if __name__ == "__main__":
    sys.exit(main())
