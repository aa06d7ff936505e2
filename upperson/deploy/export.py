"""Exports both towers of a checkpoint as ONNX, for programs without PyTorch.

    upperson export CHECKPOINT OUT/
    upperson export CHECKPOINT OUT/ --precision int8

OUT/ is a new folder:

    image.onnx         images (batch, 3, H, W) float32 -> features (batch, E) float32
    text.onnx          token_ids (batch, length) int64 -> features (batch, E) float32
    export.json        preprocessing, tokenizer, method, results, and how far features differ from PyTorch's
    vocabulary.json    the tokens and merges of CLIP's byte pair encoding
    towers.py          reads the folder by onnxruntime, NumPy and Pillow alone

LoRA and the like are merged into the weights first. Captions are padded; their length is open, except with prompts.
The features of onnxruntime are compared with those of PyTorch, for several batch sizes, before OUT/ is made.
"""

import argparse
import contextlib
import importlib.util
import inspect
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upperson.data.images import BACKGROUND
from upperson.deploy.merge import fold, largest_distance, random_inputs
from upperson.deploy.outputs import new_folder, require_empty
from upperson.errors import ExportError, Parser, exit_status, path_argument
from upperson.evaluate.evaluation import name_of
from upperson.files import write_atomically
from upperson.model import AdaptedCLIP
from upperson.model.checkpoint import Checkpoint, build_model, load_checkpoint
from upperson.model.download import without_messages

NEEDED = ("onnx", "onnxruntime", "onnxscript")
EXTRA = "upperson[onnx]"
# The largest relative difference of a feature from PyTorch's in float32, for each precision of the weights. That of
# int8 is of rounding to 8 bits; bench/export.py measures what it costs in R@1.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "int8": 0.2}
BATCHES = (1, 4)  # compared; the towers are traced with another batch
FORMAT, VERSION = "upperson export", 1
Pair = tuple[Tensor, Tensor]  # images and captions, or their features


class ImageTower(nn.Module):
    """encode_image as a module, which torch.export takes."""

    def __init__(self, model: AdaptedCLIP):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)


class TextTower(nn.Module):
    """encode_text as a module."""

    def __init__(self, model: AdaptedCLIP):
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.model.encode_text(token_ids)


def export(checkpoint: Checkpoint, folder: Path, precision: str = "float32", **changes: Any) -> dict[str, Any]:
    """Writes an export to a new folder, and returns the content of its export.json.

    Args:
        checkpoint: the checkpoint.
        folder: a path without a folder, or an empty folder.
        precision: a key of BOUNDS.
        changes: fields of the configuration, as in build_model.

    The folder is complete or not there. Raises ExportError for a method that cannot be exported, for features that
    differ by more than BOUNDS, and without the extra; OSError for a folder that cannot be written.
    """
    require_extra()
    from upperson.deploy import towers  # a late import: onnxruntime is an extra; it is set up before others import it

    require_empty(folder, "OUT")
    model = build_model(checkpoint, **{**changes, "backend": "torch"}).eval().requires_grad_(False)
    inputs = [random_inputs(model, samples) for samples in BATCHES]
    with torch.no_grad():  # of the model before anything is merged
        expected = [(model.encode_image(images), model.encode_text(tokens)) for images, tokens in inputs]
    fold(model)
    with new_folder(folder, "OUT") as written:
        write_towers(checkpoint, model, written, precision)
        write_atomically(written / "towers.py", inspect.getsource(towers))
        write_atomically(written / "vocabulary.json", json.dumps(vocabulary_of(model), ensure_ascii=False))
        about = description(checkpoint, model, precision)
        write_atomically(written / towers.ABOUT, json.dumps(about, indent=2) + "\n")
        about["largest_difference"] = compare(checkpoint, inputs, expected, towers.Towers(written), precision)
        write_atomically(written / towers.ABOUT, json.dumps(about, indent=2) + "\n")
    return about


def require_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"upperson export needs {', '.join(missing)}; expected the extra: pip install '{EXTRA}'")


# ------------------------------------------------------------------------------------ the towers


def write_towers(checkpoint: Checkpoint, model: AdaptedCLIP, folder: Path, precision: str) -> None:
    """Writes image.onnx and text.onnx."""
    height, width = model.config.image_size
    images = torch.zeros(3, 3, height, width, dtype=next(model.parameters()).dtype)
    tokens = torch.as_tensor(model.tokenizer(["a person"] * 3))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.context_length)
    text = {0: batch, 1: length} if open_length(model) else {0: batch}
    for tower, module, example, shapes in (
        ("image", ImageTower(model), images, {0: batch}),
        ("text", TextTower(model), tokens, text),
    ):
        with quietly():
            try:
                program: Any = torch.onnx.export(
                    module.eval(), (example,), input_names=[INPUTS[tower]], output_names=["features"],
                    dynamic_shapes=(shapes,), dynamo=True, verbose=False,
                )  # fmt: skip
            except Exception as error:  # of many types, with many lines
                raise ExportError(
                    f"{checkpoint.path}: the {tower} tower of method {model.config.method.name} "
                    f"({model.config.method.title}) cannot be exported as ONNX: {innermost(error)}"
                ) from error
            path = folder / f"{tower}.onnx"
            program.save(path)
            if precision != "float32":
                convert(path, precision)


INPUTS = {"image": "images", "text": "token_ids"}


def innermost(error: BaseException) -> str:
    """The first line of the error that began a chain of errors: the others tell only of steps of the exporter."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def open_length(model: AdaptedCLIP) -> bool:
    """Whether captions may be shorter than the context. Prompts cut captions by a rule that depends on their length."""
    return model.first_position == 0


def convert(path: Path, precision: str) -> None:
    """Converts the weights of a tower in place. Inputs and features stay in float32."""
    import onnx

    if precision == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(path, path, weight_type=QuantType.QInt8)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """A context without the exporter's progress, warnings and logs, which tell a user nothing."""
    with without_messages(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def compare(checkpoint: Checkpoint, inputs: list[Pair], expected: list[Pair], towers: Any, precision: str) -> float:
    """The largest relative difference from PyTorch's features. Raises ExportError above BOUNDS."""
    computed = [
        [torch.from_numpy(towers.run(tower, each.numpy())) for tower, each in zip(INPUTS, batch, strict=True)]
        for batch in inputs
    ]
    found = float(np.max([largest_distance(*features) for features in zip(expected, computed, strict=True)]))
    if not found <= BOUNDS[precision]:  # also true for NaN
        raise ExportError(
            f"{checkpoint.path}: the exported features have a relative difference of {found:.1e} from PyTorch's; "
            f"expected at most {BOUNDS[precision]:.0e} in {precision}; nothing was written"
        )
    return found


# ------------------------------------------------------------------------------------ what describes them


def description(checkpoint: Checkpoint, model: AdaptedCLIP, precision: str) -> dict[str, Any]:
    """The content of export.json, for programs without PyTorch."""
    height, width = model.config.image_size
    tokenizer = model.tokenizer
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": checkpoint.config.model.method.title,
        "trained_on": name_of(checkpoint.config.data),
        "results": checkpoint.results,
        "precision": precision,
        "width": model.embedding_width,
        "compare": "features are not normalised; the similarity of an image and a caption is their cosine",
        "image": {
            "file": "image.onnx",
            "input": INPUTS["image"],
            "height": height,
            "width": width,
            "shape": "batch, channels (red, green, blue), height, width; float32",
            "resize": "to height x width whatever the proportions, bilinear with antialiasing, in 8 bits (as Pillow)",
            "scale": "values / 255, minus mean, / std",
            "mean": list(model.preprocess.mean),
            "std": list(model.preprocess.std),
            "background": list(BACKGROUND),
        },
        "text": {
            "file": "text.onnx",
            "input": INPUTS["text"],
            "shape": "batch, length; int64",
            "length": model.context_length,
            "open_length": open_length(model),
            "start": tokenizer.sot_token_id,
            "end": tokenizer.eot_token_id,
            "padding": 0,
            "vocabulary": "vocabulary.json",
            "tokenizer": "byte pair encoding of CLIP, in lower case: start, words, end, padding; a longer caption is "
            "cut, and its last token is the end",
        },
    }


def vocabulary_of(model: AdaptedCLIP) -> dict[str, Any]:
    """The tokens in the order of their ids, and the merges in the order of their rank."""
    tokenizer = model.tokenizer
    return {
        "tokens": [tokenizer.decoder[number] for number in range(tokenizer.vocab_size)],
        "merges": [list(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)],
    }


# ------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    return exit_status(lambda: _export(argv))


def _export(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    require_extra()
    require_empty(options.folder, "OUT")
    checkpoint = load_checkpoint(options.checkpoint)
    changes = {} if options.pretrained is None else {"pretrained": options.pretrained}
    try:
        checkpoint = replace(checkpoint, config=checkpoint.config.replace(**changes))
    except ValueError as error:
        parser.error(str(error))
    about = export(checkpoint, options.folder, options.precision)
    sizes = {tower: sum(path.stat().st_size for path in options.folder.glob(f"{tower}.onnx*")) for tower in INPUTS}
    print(f"features differ from PyTorch's by {about['largest_difference']:.1e} at most (relative)")
    print(", ".join(f"{options.folder / about[tower]['file']}: {sizes[tower] / 1e6:.1f} MB" for tower in INPUTS))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="upperson export",
        allow_abbrev=False,
        description="Export both towers of a checkpoint as ONNX, with their preprocessing and tokenizer, for programs "
        f"without PyTorch (needs the extra: pip install '{EXTRA}'). The features are compared with PyTorch's before "
        "anything is kept.",
    )
    parser.add_argument(
        "checkpoint", type=path_argument, metavar="CHECKPOINT", help="a .safetensors file that training wrote"
    )
    parser.add_argument("folder", type=path_argument, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--precision", choices=BOUNDS, default="float32",
        help="of the weights; float16 halves the size, int8 (dynamic quantisation) quarters it (default: float32)",
    )  # fmt: skip
    parser.add_argument("--pretrained", metavar="FILE", help="the backbone's weights, if the file has moved")
    return parser


if __name__ == "__main__":
    sys.exit(main())
