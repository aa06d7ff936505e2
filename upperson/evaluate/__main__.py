"""Evaluates a checkpoint, text → image and image → text, on the data set it was trained on or on any other.

python -m upperson.evaluate runs/embedded-1/best.safetensors                          its own test split
python -m upperson.evaluate runs/embedded-1/best.safetensors --data embedded-night    cross-domain
python -m upperson.evaluate --help                                                    every option
"""

import argparse
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upperson.errors import RunError, USER_ERRORS
from upperson.files import write_atomically
from upperson.model.checkpoint import Checkpoint, load_checkpoint, load_model
from upperson.config import SELECTIONS, Config, DataConfig, Dataset
from upperson.data import Sample, check_images, gallery
from upperson.evaluate.metrics import Retrieval
from upperson.evaluate.pictures import METRICS, aligned
from upperson.machine import device_and_precision
from upperson.evaluate.embed import embed
from upperson.train.run_folder import CONFIG, RESULTS, TABLE
from upperson.data.splits import read_splits

TEXT_TO_IMAGE, IMAGE_TO_TEXT = "queries-text-to-image.jsonl", "queries-image-to-text.jsonl"
SIMILARITY_DECIMALS = 6  # what float32 holds of a cosine


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after one line on what went wrong; wrong arguments exit with 2, as argparse does."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        checkpoint = load_checkpoint(options.checkpoint)
        try:
            config = _configuration(checkpoint.config, options)
        except ValueError as error:
            parser.error(str(error))
        evaluate_checkpoint(checkpoint, config, options.checkpoint, options.split, options.output)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upperson.evaluate",
        description="Evaluate a checkpoint in both directions. What is not given is as in the checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .safetensors file that training wrote")
    parser.add_argument(
        "--data", choices=typing.get_args(Dataset), metavar="DATASET",
        help=f"what to evaluate on (default: what it was trained on): {', '.join(typing.get_args(Dataset))}",
    )  # fmt: skip
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data set; none for embedded ones")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="(default: test)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where results go (default: beside the checkpoint, CHECKPOINT-DATASET-SPLIT)",
    )  # fmt: skip
    parser.add_argument("--pretrained", metavar="FILE", help="the backbone's weights, where they have moved")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images or captions embedded at once")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="autocast; auto: bf16 on a GPU, fp32 on a CPU (default: auto)",
    )  # fmt: skip
    return parser


def _configuration(trained: Config, options: argparse.Namespace) -> Config:
    """The checkpoint's configuration with what the command line changes. ValueError names a field out of range."""
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
    if options.data_root is not None and trained.replace(dataset=dataset).data.is_drawn:
        raise ValueError(f"--data-root: {dataset} is drawn, not read; name a data set by --data")
    if options.data not in (None, trained.data.dataset):
        changes.setdefault("data_root", None)  # the folder in the checkpoint is that of another data set
    return trained.replace(**changes)


def evaluate_checkpoint(
    checkpoint: Checkpoint, config: Config, path: Path, split: str, output: Path | None = None
) -> dict[str, Any]:
    """Evaluates the checkpoint at `path` on a split of `config.data`, prints and writes what it finds.

    `config` is the checkpoint's own with another data set, device, batch size, ... in it. Results, table and one line
    a query go to the folder `output`, or to one beside the checkpoint; the value is what results.json holds. Raises
    BackboneError, CheckpointError, DataError, RetrievalError or RunError for what the user can mend, OSError where
    nothing can be written.
    """
    device, precision = device_and_precision(config.train.device, config.train.precision)
    samples = read_splits(config.data, need=[split])[split]
    if not config.data.is_drawn:
        check_images(samples)
    backend = config.model.backend
    if device.type == "cpu" and backend == "triton":
        backend = "auto"  # it was trained on a GPU
    model = load_model(path, pretrained=config.model.pretrained, backend=backend).to(device)
    output = output or path.with_name(f"{path.stem}-{config.data.dataset}-{split}")
    if (output / CONFIG).exists():
        raise RunError(f"{output} holds a run, whose results this would overwrite; name another --output")
    output.mkdir(parents=True, exist_ok=True)

    embeddings = embed(
        model,
        samples,
        batch_size=config.train.evaluate_batch_size,
        workers=config.data.workers,
        precision=precision,
    )
    text_to_image, image_to_text = embeddings.text_to_image(), embeddings.image_to_text()
    captions, images = _captions(samples), _images(samples)
    results = {
        "checkpoint": str(path),
        "method": config.model.method.title,
        "model": config.model.model,
        "trained_on": _name(checkpoint.config.data),
        "epochs": config.train.epochs,
        **{key: checkpoint.results.get(key) for key in ("epoch", "selection")},
        "selection_meaning": SELECTIONS.get(checkpoint.results.get("selection")),
        "evaluated_on": _name(config.data),
        "split": split,
        "domain": "in-domain" if _same_data_set(checkpoint.config.data, config.data) else "cross-domain",
        "precision": precision,
        "text_to_image": {"queries": len(captions), "gallery": len(images), **text_to_image.metrics},
        "image_to_text": {"queries": len(images), "gallery": len(captions), **image_to_text.metrics},
    }
    shown = summary(results)
    write_atomically(output / TEXT_TO_IMAGE, _lines(text_to_image, captions, images))
    write_atomically(output / IMAGE_TO_TEXT, _lines(image_to_text, images, captions))
    write_atomically(output / TABLE, shown.encode())
    write_atomically(output / RESULTS, (json.dumps(results, indent=2) + "\n").encode())
    print(f"{shown}\nin {output}: {', '.join((TABLE, RESULTS, TEXT_TO_IMAGE, IMAGE_TO_TEXT))}", flush=True)
    return results


def summary(results: dict[str, Any]) -> str:
    """What was evaluated on what, and the table of both directions: Markdown that a terminal shows well, too."""
    header = ("percent", *METRICS, "queries", "gallery")
    rows = [
        (name, *(f"{found[key]:.2f}" for key in METRICS), f"{found['queries']:,}", f"{found['gallery']:,}")
        for name, found in (("text → image", results["text_to_image"]), ("image → text", results["image_to_text"]))
    ]
    return "\n".join(
        [
            f"* checkpoint: {results['checkpoint']}, {results['method']}, backbone {results['model']}",
            f"* trained on: {results['trained_on']}, {_selection(results)}",
            f"* evaluated on: {results['evaluated_on']}, {results['split']} split, {results['domain']}",
            "",
            *aligned(header, rows),
            "",
        ]
    )


def _selection(results: dict[str, Any]) -> str:
    """Which epoch the checkpoint holds, and how it was chosen, in words."""
    epoch = "epoch not recorded" if results["epoch"] is None else f"epoch {results['epoch']} of {results['epochs']}"
    if results["selection_meaning"] is None:
        return f"{epoch}, which no selection is recorded for"
    return f"{epoch}, selected there by {results['selection']} ({results['selection_meaning']})"


def _same_data_set(trained: DataConfig, evaluated: DataConfig) -> bool:
    """Whether both name the same data; "folder" is the name of anybody's, so there the folder decides."""
    if evaluated.dataset == "folder" == trained.dataset:
        return trained.data_root is not None and trained.data_root.resolve() == evaluated.data_root.resolve()
    return evaluated.dataset == trained.dataset


def _name(data: DataConfig) -> str:
    return f"folder {data.data_root}" if data.dataset == "folder" else data.dataset


def _captions(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What a line says of a caption, in the order of upperson.data.queries."""
    return [{"caption": sample.caption, "person_id": sample.person_id} for sample in samples]


def _images(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What a line says of an image, in the order of upperson.data.gallery; a drawing has a number, not a path."""
    images, person_ids = gallery(samples)
    image_ids = dict.fromkeys(sample.image_id for sample in samples)
    return [
        {**({"image": str(image)} if isinstance(image, Path) else {"image_id": image_id}), "person_id": person_id}
        for image, image_id, person_id in zip(images, image_ids, person_ids.tolist(), strict=True)
    ]


def _lines(retrieval: Retrieval, queries: list[dict[str, Any]], entries: list[dict[str, Any]]) -> bytes:
    """JSON lines, one a query: what it is, its results, and the gallery entries that it finds, best first."""
    columns = (
        retrieval.first_match, retrieval.average_precision, retrieval.inverse_negative_penalty, retrieval.top,
        retrieval.top_similarity,
    )  # fmt: skip
    lines = []
    for index, (query, first, precision, penalty, top, similarity) in enumerate(
        zip(queries, *(column.tolist() for column in columns), strict=True)
    ):
        found = [
            {**entries[entry], "similarity": round(value, SIMILARITY_DECIMALS)}
            for entry, value in zip(top, similarity, strict=True)
        ]
        line = {
            "index": index, **query, "first_match": first, "average_precision": precision,
            "inverse_negative_penalty": penalty, "top": found,
        }  # fmt: skip
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


if __name__ == "__main__":
    sys.exit(main())
