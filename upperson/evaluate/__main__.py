"""Evaluates a checkpoint, text → image and image → text, on the data set it was trained on or on any other.

upperson evaluate runs/embedded-1/best.safetensors                          its own test split
upperson evaluate runs/embedded-1/best.safetensors --data embedded-night    cross-domain
upperson evaluate --help                                                    every option
"""

import argparse
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from upperson.config import Config, Dataset
from upperson.errors import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    parser = _parser()
    options = parser.parse_args(argv)
    return exit_status(lambda: _evaluate(parser, options))


def _evaluate(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from upperson.evaluate.evaluation import evaluate_checkpoint  # imports torch, which --help does not need
    from upperson.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(options.checkpoint)
    try:
        config = _configuration(checkpoint.config, options)
    except ValueError as error:
        parser.error(str(error))
    evaluate_checkpoint(checkpoint, config, options.split, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upperson evaluate",
        description="Evaluate a checkpoint in both directions. What is not given is as in the checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .safetensors file that training wrote")
    parser.add_argument(
        "--data", choices=typing.get_args(Dataset), metavar="DATASET",
        help=f"the data set to evaluate on (default: the one of training): {', '.join(typing.get_args(Dataset))}",
    )  # fmt: skip
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data set; none for embedded ones")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="which split (default: test)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where results go (default: beside the checkpoint, CHECKPOINT-DATASET-SPLIT)",
    )  # fmt: skip
    parser.add_argument("--pretrained", metavar="FILE", help="the backbone's weights, where they have moved")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images or captions embedded at once")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="autocast; auto: bf16 on a GPU, fp32 on a CPU (default: auto)",
    )  # fmt: skip
    return parser


def _configuration(trained: Config, options: argparse.Namespace) -> Config:
    """The checkpoint's configuration with the changes of the command line. ValueError names a field out of range."""
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
        raise ValueError(f"--data-root: {dataset} is synthetic and has no files; name a data set by --data")
    if options.data not in (None, trained.data.dataset):
        changes.setdefault("data_root", None)  # the folder in the checkpoint is that of another data set
    return trained.replace(**changes)


if __name__ == "__main__":
    sys.exit(main())
