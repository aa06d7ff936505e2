"""Exports on a CPU: size, images and captions a second, R@1, and rankings, beside open_clip and this project's PyTorch.

    python bench/export.py CHECKPOINT                            the checkpoint, on its test split, minutes
    python bench/export.py CHECKPOINT --full-size                also the speed of ViT-B/16 with random weights
    python bench/export.py CHECKPOINT --output bench/results     also writes export-cpu.md and export-cpu.json

All contenders of a model are timed in turns, with the same number of threads (OMP_NUM_THREADS). open_clip computes the
backbone without the adaptation, as it cannot compute the other. Captions are those of the test split: open_clip pads
them, this project packs them, and an export pads them to the longest of a batch.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from harness.options import at_least
from harness.output import save_json, table
from harness.timing import Call, time_in_turns
from torch import Tensor

from upperson import AdaptedCLIP, Config, preset
from upperson.data import gallery, queries, read_splits
from upperson.deploy.export import BOUNDS, INPUTS, export, write_towers
from upperson.deploy.merge import fold
from upperson.errors import exit_status
from upperson.evaluate.metrics import retrieval_metrics
from upperson.files import write_atomically
from upperson.model.backbone import build_clip, fit_image_size
from upperson.model.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint

BATCH = 16
CPU = torch.device("cpu")
OURS, SAME = "this project, PyTorch", "ONNX, float32"
FULL_SIZE = "ViT-B/16 at 384×128, random weights"
Encoders = dict[str, Callable[[Any], Any]]  # of each tower, from preprocessed images or sentences


def contenders(checkpoint: Checkpoint, folder: Path) -> dict[str, tuple[Encoders, float]]:
    """open_clip, this project, and the exports: their encoders and their size in MB."""
    from upperson.deploy.towers import Towers

    model = build_model(checkpoint, backend="torch").eval().requires_grad_(False)
    clip: Any = backbone(checkpoint.config)

    def words(texts: list[str]) -> Tensor:
        return torch.as_tensor(model.tokenizer(texts))

    found: dict[str, tuple[Encoders, float]] = {
        "open_clip, without the adaptation": (
            {"image": clip.encode_image, "text": lambda texts: clip.encode_text(words(texts))},
            megabytes(clip),
        ),
        OURS: (
            {"image": model.encode_image, "text": lambda texts: model.encode_text(words(texts))},
            megabytes(model),
        ),
    }
    for precision in BOUNDS:
        about = export(checkpoint, folder / precision, precision)
        towers = Towers(folder / precision, torch.get_num_threads())
        size = sum(path.stat().st_size for path in (folder / precision).glob("*.onnx*")) / 1e6

        def text(texts: list[str], towers: Towers = towers) -> np.ndarray:
            return towers.run("text", towers.padded([towers.tokenizer.encode(text) for text in texts]))

        def image(images: Tensor, towers: Towers = towers) -> np.ndarray:
            return towers.run("image", images.numpy())

        found[f"ONNX, {precision}"] = {"image": image, "text": text}, size
        print(f"ONNX, {precision}: relative difference of features {about['largest_difference']:.1e}", flush=True)
    return found


def backbone(config: Config) -> Any:
    """open_clip's own model at the image size of the checkpoint."""
    torch.manual_seed(config.train.seed)
    clip: Any = build_clip(config.model)
    fit_image_size(clip.visual, config.model.image_size)
    return clip.eval().requires_grad_(False)


def megabytes(model: torch.nn.Module) -> float:
    """Of the weights in float32."""
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6


@torch.inference_mode()
def features(encode: Callable[[Any], Any], inputs: Any) -> Tensor:
    parts = [torch.as_tensor(encode(inputs[start : start + BATCH])) for start in range(0, len(inputs), BATCH)]
    return torch.nn.functional.normalize(torch.cat(parts))


@torch.inference_mode()
def speeds(found: dict[str, Encoders], images: Tensor, texts: list[str], seconds: float) -> dict[str, dict[str, float]]:
    """Images and captions a second of each contender, timed in turns."""
    rates: dict[str, dict[str, float]] = {name: {} for name in found}
    batches = {"image": images[:BATCH], "text": texts[:BATCH]}
    for tower in INPUTS:
        calls = {
            name: [Call(lambda _, encode=encoders[tower], tower=tower: encode(batches[tower]))]
            for name, encoders in found.items()
        }
        for name, timing in time_in_turns(calls, CPU, seconds).items():
            rates[name][tower] = 1e6 * BATCH / timing.median
    return rates


def measure(checkpoint: Checkpoint, label: str, data: Config | None, seconds: float) -> list[dict[str, Any]]:
    """A row for each contender. Without `data` the inputs are random, and nothing is ranked."""
    model_size = checkpoint.config.model.image_size
    texts, ids = [sample_caption(number) for number in range(BATCH)], None
    images = torch.randn(BATCH, 3, *model_size, generator=torch.Generator().manual_seed(0))
    if data is not None:
        samples = read_splits(data.data, need=["test"])["test"]
        drawings, image_ids = gallery(samples)
        texts, caption_ids = queries(samples)
        preprocess = build_model(checkpoint, backend="torch").preprocess
        images = torch.stack([preprocess(image) for image in drawings])
        ids = caption_ids, image_ids
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(checkpoint, Path(folder))
        rates = speeds({name: encoders for name, (encoders, _) in found.items()}, images, list(texts), seconds)
        rows, reference = [], None
        for name, (encoders, size) in found.items():
            row: dict[str, Any] = dict(model=label, contender=name, megabytes=size, **rates[name])
            if ids is not None:
                sides = features(encoders["text"], list(texts)), features(encoders["image"], images)
                row["R@1"] = retrieval_metrics(*sides, *ids).metrics["R@1"]
                similarity = sides[0] @ sides[1].t()
                ranking = ranking_by(similarity)
                if name == OURS:
                    reference = similarity, ranking
                elif reference is not None:
                    row["swapped"] = largest_swap(reference[0], ranking)
                    row["same first ten"] = percent_equal(ranking[:, :10], reference[1][:, :10])
                if name == SAME:
                    row["same in float64"] = same_in_float64(checkpoint, list(texts), images)
            rows.append(row)
            print(f"{label}, {name}: measured", flush=True)
    return rows


def same_in_float64(checkpoint: Checkpoint, texts: list[str], images: Tensor) -> float:
    """For how many captions, in percent, the exported graphs rank all images as PyTorch does, both in float64.

    onnxruntime has no convolution in float64, so the reference implementation of ONNX computes the graphs.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = build_model(checkpoint, backend="torch").eval().requires_grad_(False).double()
    inputs = {"text": torch.as_tensor(model.tokenizer(texts)), "image": images.double()}
    text, image = features(model.encode_text, inputs["text"]), features(model.encode_image, inputs["image"])
    fold(model)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_towers(checkpoint, model, Path(folder), "float32")  # as it is, without a conversion
        for tower, name in INPUTS.items():
            graph = ReferenceEvaluator(onnx.load(Path(folder, f"{tower}.onnx")))

            def run(batch: Tensor, graph: Any = graph, name: str = name) -> np.ndarray:
                return graph.run(None, {name: batch.numpy()})[0]

            found[tower] = features(run, inputs[tower])
    return percent_equal(ranking_by(found["text"] @ found["image"].t()), ranking_by(text @ image.t()))


def ranking_by(similarity: Tensor) -> Tensor:
    """The images of each caption, the most similar first."""
    return similarity.argsort(dim=1, descending=True, stable=True)


def largest_swap(similarity: Tensor, ranking: Tensor) -> float:
    """The largest difference in similarity, by PyTorch, of two images that another ranking has in the other order."""
    ranked = similarity.gather(1, ranking)
    return (ranked - ranked.cummin(dim=1).values).max().item()


def percent_equal(ranking: Tensor, other: Tensor) -> float:
    return 100 * (ranking == other).all(1).double().mean().item()


def sample_caption(number: int) -> str:
    """A caption of 24 words, as long as those of CUHK-PEDES."""
    return f"The person {number} is wearing " + "a long red coat and black shoes with white socks " * 2


def full_size(folder: Path) -> Checkpoint:
    """A checkpoint of UP-Person on a ViT-B/16 with random weights."""
    config = preset("cuhk-pedes").replace(pretrained="none", backend="torch")
    torch.manual_seed(config.train.seed)
    model = AdaptedCLIP(config.model)
    save_checkpoint(folder / "full.safetensors", model.adaptation(), config, {}, model.fingerprint)
    return load_checkpoint(folder / "full.safetensors")


def cells(row: dict[str, Any]) -> dict[str, str]:
    def shown(name: str, form: str) -> str:
        return format(row[name], form) if name in row else "—"

    return {
        "model": row["model"],
        "computed by": row["contender"],
        "weights, MB": f"{row['megabytes']:,.1f}",
        "images/s": f"{row['image']:,.1f}",
        "captions/s": f"{row['text']:,.1f}",
        "R@1": shown("R@1", ".2f"),
        "same first ten, % of captions": shown("same first ten", ".2f"),
        "largest swap": shown("swapped", ".0e"),
    }


def report(rows: list[dict[str, Any]], config: Config, split: str, output: Path | None) -> str:
    """The table, which is also written to `output`."""
    import onnxruntime

    people, epochs = config.data.embedded_identities[0], config.train.epochs
    same = next(row["same in float64"] for row in rows if "same in float64" in row)
    text = (
        f"{table(list(map(cells, rows)), 'pipe', left=['computed by'])}\n\n"
        f"{config.model.method.title} on {config.data.dataset}, trained on {people} people for {epochs} epochs; "
        f"{split}. Batches of {BATCH}, median of calls in turns, threads: {torch.get_num_threads()}. Rates compare "
        "within the table, whatever else the machine does.\n"
        "Rankings of all test images are compared with those of this project's PyTorch: for how many captions the "
        "first ten images are the same in the same order; and how much the similarities of two images differ at most "
        "that have changed places. In float64, by the reference implementation of ONNX, the exported graphs rank all "
        f"images as PyTorch does for {same:.2f} % of the captions.\n"
        f"PyTorch {torch.__version__}, open_clip {open_clip.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}.\n"
    )
    if output:
        write_atomically(output / "export-cpu.md", f"# Exports on a CPU\n\n{text}")
        save_json(output / "export-cpu.json", dict(rows=rows))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint on embedded data, as of python train.py")
    option("--identities", type=at_least(1), default=200, metavar="N", help="people in the test split (default: 200)")
    option("--seconds", type=at_least(1), default=20, metavar="N", help="seconds of timing a tower (default: 20)")
    option("--full-size", action="store_true", help="also ViT-B/16 with random weights")
    option("--output", type=Path, metavar="DIR", help="folder for export-cpu.md and export-cpu.json")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.checkpoint)
    train, val, _ = checkpoint.config.data.embedded_identities
    data = checkpoint.config.replace(embedded_identities=(train, val, arguments.identities))
    rows = measure(checkpoint, "embedded", data, arguments.seconds)
    if arguments.full_size:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(full_size(Path(folder)), FULL_SIZE, None, arguments.seconds)
    split = f"{arguments.identities} people who were not in the training data"
    print(f"\n{report(rows, checkpoint.config, split, arguments.output)}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
