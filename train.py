"""Trains a method for text-based person retrieval: UP-Person, or the one that --method names.

python train.py                                                the embedded data set and model, no network
python train.py --preset cuhk-pedes --data-root DIR            a real data set with CLIP ViT-B/16
python train.py --check-data --dataset NAME --data-root DIR    looks a data set through and does not train
python train.py --resume runs/embedded-1                       continues a run that was stopped
python train.py --help                                         every option
torchrun --nproc-per-node 8 train.py --preset cuhk-pedes …     the same on 8 GPUs, each with its share of the batch
"""

import argparse
import sys
import warnings
from collections.abc import Sequence

from upperson.errors import USER_ERRORS
from upperson.config.command_line import parse_arguments
from upperson.config import DataConfig
from upperson.data.check import check_dataset, text
from upperson.machine import ALONE, Group
from upperson.data.splits import read_splits
from upperson.train.fit import fit


def main(argv: Sequence[str] | None = None) -> int:
    actions = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    actions.add_argument(
        "--check-data",
        action="store_true",
        help="read the data set and open every image, report what is in it and what is wrong with it, and stop",
    )
    config = parse_arguments(argv, parents=[actions])
    group = ALONE
    try:
        group = Group.of_environment()
        if actions.parse_known_args(argv)[0].check_data:
            return check_data(config.data)
        fit(config)
    except USER_ERRORS as error:
        print(f"error: {group.prefix}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        if group.is_main:
            print(str(interruption) or "stopped", file=sys.stderr)
        return 130
    return 0


def check_data(data: DataConfig) -> int:
    """Prints the report. Status 1 if an image is missing or broken; what is merely odd does not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says the same
        splits = read_splits(data, need=())
    report = check_dataset(data.dataset, splits)
    print(text(report))
    return 0 if report.usable else 1


if __name__ == "__main__":
    sys.exit(main())
