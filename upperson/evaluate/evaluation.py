"""Evaluates a checkpoint on any data set, text → image and image → text, and writes one line for each query."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upperson.config import Config, DataConfig
from upperson.config.files import CONFIG
from upperson.data import Sample, check_images, gallery, read_splits
from upperson.data.samples import names_of
from upperson.errors import RunError
from upperson.evaluate.embed import embed
from upperson.evaluate.metrics import Retrieval
from upperson.evaluate.results import RESULTS, TABLE, Results
from upperson.evaluate.tables import both_directions
from upperson.files import expanded, make_folder, require_folder, write_atomically
from upperson.machine import device_and_precision
from upperson.model.adapted_clip import require_backend
from upperson.model.checkpoint import Checkpoint, build_model

TEXT_TO_IMAGE, IMAGE_TO_TEXT = "queries-text-to-image.jsonl", "queries-image-to-text.jsonl"
SIMILARITY_DECIMALS = 6  # the precision of a cosine in float32


def evaluate_checkpoint(checkpoint: Checkpoint, config: Config, split: str, output: Path | None = None) -> Results:
    """Evaluates a checkpoint on a split of `config.data`; prints and writes the results.

    Args:
        checkpoint: the trained parameters.
        config: the checkpoint's configuration, possibly with another data set, device, batch size, …
        split: "train", "val" or "test".
        output: folder for the results, the table and one line for each query; None: a folder beside the checkpoint.

    Raises BackboneError, CheckpointError, DataError, RetrievalError or RunError for errors that the user can correct,
    and OSError for a file that cannot be written.
    """
    device, precision = device_and_precision(config.train.device, config.train.precision)
    samples = read_splits(config.data, need=[split])[split]
    if not config.data.is_synthetic:
        check_images(samples)
    backend = config.model.backend
    if device.type != "cuda" and backend == "triton":
        backend = "auto"  # the model was trained on a GPU
    require_backend(backend, device)
    model = build_model(checkpoint, pretrained=config.model.pretrained, backend=backend).to(device)
    path = checkpoint.path
    beside = path.with_name(f"{path.stem}-{config.data.dataset}-{split}")
    output = output or beside
    require_folder(output, "output")
    if (output / CONFIG).exists():
        raise RunError(f"{output} contains a run, whose results would be overwritten; choose another --output")
    require_same(output, path, config.data, split, beside=output == beside)
    make_folder(output, "output")

    embeddings = embed(
        model,
        samples,
        batch_size=config.train.evaluate_batch_size,
        workers=config.data.workers,
        precision=precision,
    )
    text_to_image, image_to_text = embeddings.text_to_image(), embeddings.image_to_text()
    captions, images = _captions(samples), _images(samples)
    results = Results(
        method=config.model.method.title,
        model=config.model.model,
        trained_on=name_of(checkpoint.config.data),
        evaluated_on=name_of(config.data),
        split=split,
        captions=len(captions),
        images=len(images),
        text_to_image=text_to_image.metrics,
        image_to_text=image_to_text.metrics,
        selection=checkpoint.selection,
        epoch=checkpoint.epoch,
        epochs=config.train.epochs,
        checkpoint=str(path.absolute()),  # a relative path names another file in another working folder
        precision=precision,
    )
    shown = both_directions(results)
    write_atomically(output / TEXT_TO_IMAGE, _lines(text_to_image, captions, images))
    write_atomically(output / IMAGE_TO_TEXT, _lines(image_to_text, images, captions))
    write_atomically(output / TABLE, shown)
    results.write(output / RESULTS)
    print(f"{shown}\nin {output}: {', '.join((TABLE, RESULTS, TEXT_TO_IMAGE, IMAGE_TO_TEXT))}", flush=True)
    return results


def require_same(output: Path, checkpoint: Path, data: DataConfig, split: str, *, beside: bool) -> None:
    """Raises RunError for a folder with results of another checkpoint, data set or split.

    `beside`: the folder is that beside the checkpoint. Both may have moved, so only the checkpoint's name is compared.
    """
    file = output / RESULTS
    if not file.exists():
        return
    found = Results.read(file)
    recorded = Path(found.checkpoint or "")
    if beside:
        same = recorded.name == checkpoint.name
    else:
        same = recorded.is_absolute() and recorded.resolve() == checkpoint.resolve()
    if not same or (found.evaluated_on, found.split) != (name_of(data), split):
        earlier, later = ("", "") if beside and same else (f" of {found.checkpoint}", f" of {checkpoint}")
        raise RunError(
            f"{output} contains results{earlier} on {found.evaluated_on}, split {found.split}, which those{later} on "
            f"{name_of(data)}, split {split}, would overwrite; choose another --output"
        )


def name_of(data: DataConfig) -> str:
    """The name of the data set. The name of a user's own folder includes its path."""
    if data.dataset == "folder" and data.data_root is not None:
        return f"folder {os.path.realpath(expanded(data.data_root))}"
    return data.dataset


def _captions(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The fields of a line for each caption, in the order of upperson.data.queries."""
    return [{"caption": sample.caption, "person_id": sample.person} for sample in samples]


def _images(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The fields of a line for each image, in the order of upperson.data.gallery. Synthetic images have no path."""
    images, person_ids = gallery(samples)
    image_ids = dict.fromkeys(sample.image_id for sample in samples)
    names = names_of(samples)
    return [
        {**({"image": str(image)} if isinstance(image, Path) else {"image_id": image_id}), "person_id": names[person]}
        for image, image_id, person in zip(images, image_ids, person_ids.tolist(), strict=True)
    ]


def _lines(retrieval: Retrieval, queries: list[dict[str, Any]], entries: list[dict[str, Any]]) -> str:
    """JSON lines, one for each query: its metrics, and its first gallery entries, best first."""
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
    return "".join(lines)
