"""Evaluates a checkpoint, text → image and image → text, on the data set of its training or on any other.

upperson evaluate runs/embedded-1/best.safetensors                          the test split of its training data
upperson evaluate runs/embedded-1/best.safetensors --data embedded-night    cross-domain
upperson evaluate --help                                                    every option
"""

import argparse
import sys
import typing
from collections.abc import Sequence

from upperson.config import Config, Dataset
from upperson.errors import Parser, exit_status, path_argument


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    return exit_status(lambda: _evaluate(argv))


def _evaluate(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    from upperson.evaluate.evaluation import evaluate_checkpoint  # a late import: --help does not need torch
    from upperson.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(options.checkpoint)
    try:
        config = _configuration(checkpoint.config, options)
    except ValueError as error:
        parser.error(str(error))
    evaluate_checkpoint(checkpoint, config, options.split, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="upperson evaluate",
        description="Evaluate a checkpoint in both directions. Other settings are those of the checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint", type=path_argument, metavar="CHECKPOINT", help="a .safetensors file that training wrote"
    )
    parser.add_argument(
        "--data", choices=typing.get_args(Dataset), metavar="DATASET",
        help=f"data set to evaluate on (default: that of the training): {', '.join(typing.get_args(Dataset))}",
    )  # fmt: skip
    parser.add_argument(
        "--data-root", type=path_argument, metavar="DIR", help="folder of the data set; not for embedded ones"
    )
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="the split (default: test)")
    parser.add_argument(
        "--output", type=path_argument, metavar="DIR",
        help="folder of the results (default: beside the checkpoint, CHECKPOINT-DATASET-SPLIT)",
    )  # fmt: skip
    parser.add_argument("--pretrained", metavar="FILE", help="the backbone's weights, if the file has moved")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images or captions embedded at once")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="autocast dtype; auto: bf16 on a GPU, fp32 on a CPU (default: auto)",
    )  # fmt: skip
    return parser


def _configuration(trained: Config, options: argparse.Namespace) -> Config:
    """The checkpoint's configuration with the changes of the command line. Raises ValueError for invalid fields."""
    changes = {
        "dataset": options.data,
        "data_root": options.data_root,
        "pretrained": options.pretrained,
        "evaluate_batch_size": options.batch_size,
        "workers": options.workers,
        "device": options.device,
        "precision": options.precision,
        "tensorboard": False,
    }
    changes = {field: value for field, value in changes.items() if value is not None}
    dataset = options.data or trained.data.dataset
    if options.data_root is not None and trained.replace(dataset=dataset).data.is_synthetic:
        raise ValueError(f"--data-root: {dataset} is synthetic and has no files; choose a data set with --data")
    if options.data not in (None, trained.data.dataset):
        changes.setdefault("data_root", None)  # the checkpoint has the folder of another data set
    return trained.replace(**changes)


if __name__ == "__main__":
    sys.exit(main())
