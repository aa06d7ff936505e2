"""Trains a method for text-based person retrieval: UP-Person, or the method of --method."""

import sys
import warnings
from collections.abc import Sequence

from upperson.config import DataConfig
from upperson.config.command_line import parse_arguments
from upperson.errors import Parser, exit_status

COUNTS_DIFFER = 3  # exit status of --check-data


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    return exit_status(lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> int:
    actions = Parser(add_help=False, allow_abbrev=False)
    actions.add_argument(
        "--check-data",
        action="store_true",
        help="read the data set, open every image, report errors and unusual entries, and exit with status 0, 1 "
        "(unusable) or 3 (other counts than the published ones)",
    )
    config = parse_arguments(argv, parents=[actions])
    if actions.parse_known_args(argv)[0].check_data:
        return check_data(config.data)
    from upperson.train.fit import fit  # a late import: --help does not need torch

    fit(config)
    return 0


def check_data(data: DataConfig) -> int:
    """Prints the report, and returns the exit status.

    The status is 1 for data with which training or evaluation would fail, such as an image that cannot be read, and
    COUNTS_DIFFER for other counts than the published ones. Other unusual entries do not count.
    """
    from upperson.data.check import check_dataset, text
    from upperson.data.splits import read_splits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report has the same findings
        splits = read_splits(data, need=())
    report = check_dataset(data.dataset, splits)
    print(text(report))
    if not report.usable:
        return 1
    return 0 if report.as_published else COUNTS_DIFFER


if __name__ == "__main__":
    sys.exit(main())
