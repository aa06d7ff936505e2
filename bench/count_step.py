"""What a training step costs on each path, counted without running it: at full size on any machine, in a minute.

    python bench/count_step.py                       CLIP ViT-B/16 at 384×128, batch 128, 16 bits, fused kernels
    python bench/count_step.py --activations         also what lives at the peak, and what is kept for the backward pass
    python bench/count_step.py --batch 64 --json counts.json

The paths stand in paths.py, what is counted in counting.py. Tensors are without memory and on the CPU; sizes are those
that the operators declare, so they are a GPU's. fp16 stands for bf16, which Triton's interpreter does not take.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import paths
import torch
from comparison import at_least_one, json_path
from counting import Group, cost, flops, saved, without_memory
from torch import Tensor

from upperson.config import Config
from upperson.evaluate.tables import pipe_table
from upperson.model import AdaptedCLIP

MIB = 2**20


@dataclass(frozen=True)
class Count:
    """The cost of one step of a path; see counting.py. FLOPs of the towers are those of the forward pass."""

    path: str
    flops: int
    image_flops: int
    text_flops: int
    touched: int
    peak: int
    trained_parameters: int
    at_peak: tuple[Group, ...]
    image_saved: tuple[Group, ...]
    text_saved: tuple[Group, ...]
    image_row: int  # bytes of one row of the tower's width for every token and block
    text_row: int


def count(name: str, path: paths.Path, config: Config, batch: int) -> Count:
    """Of the second step: the first also allocates the optimizer's state."""
    config = config.replace(backend="triton")
    real = paths.build(path, config)
    batches = paths.random_batches(config, real.tokenizer, real.context_length, batch, 1)
    prepared = paths.prepare(real, batches, torch.device("cpu"))  # the captions' lengths are real
    mode, (model,) = without_memory(real)
    with mode:
        step = paths.Step(model, prepared, "fp16", path.configuration(config).train)
        step()
        found = cost(step)
        own = [*model.parameters(), *model.buffers()]
        trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
        return Count(
            name,
            found.flops,
            flops(step.image_features),
            flops(step.text_features),
            found.touched,
            found.peak,
            trained,
            found.at_peak,
            saved(step.image_features, own),
            saved(step.text_features, own),
            *rows_of_width(model, prepared[0]),
        )


def rows_of_width(model: AdaptedCLIP, prepared: tuple[Any, ...]) -> tuple[int, int]:
    """Bytes in 16 bits of a row of the tower's width for every token of a batch and every block, image and text."""
    images, captions, _ = prepared
    height, width = model.config.image_size
    patch_height, patch_width = model.clip.visual.patch_size
    image_tokens = len(images) * (1 + height // patch_height * (width // patch_width))
    text_tokens = captions.numel() if isinstance(captions, Tensor) else len(captions.token_ids)
    return tuple(
        2 * tokens * len(blocks) * blocks[0].attn.embed_dim
        for tokens, blocks in ((image_tokens, model.image_blocks), (text_tokens, model.text_blocks))
    )


# ---------------------------------------------------------------------------------------- what it says


def table(counts: list[dict[str, Any]]) -> list[str]:
    """A line for each path; ratios are those to the first."""
    first = counts[0]
    header = [
        "",
        "GFLOP",
        f"{first['path']} ÷ it",
        "image forward",
        "text forward",
        "GB touched",
        "peak MiB",
        f"of {first['path']}",
        "saved MiB",
        "trained",
    ]
    body = [
        [
            row["path"],
            f"{row['flops'] / 1e9:,.0f}",
            f"{first['flops'] / row['flops']:.2f}×",
            f"{row['image_flops'] / 1e9:,.0f}",
            f"{row['text_flops'] / 1e9:,.0f}",
            f"{row['touched'] / 1e9:,.1f}",
            f"{row['peak'] / MIB:,.0f}",
            f"{row['peak'] / first['peak']:.0%}",
            f"{sum(group['bytes'] for group in [*row['image_saved'], *row['text_saved']]) / MIB:,.0f}",
            f"{row['trained_parameters']:,}",
        ]
        for row in counts
    ]
    return pipe_table(header, body).splitlines()


def activations(row: dict[str, Any], shown: int = 16) -> list[str]:
    """What lives at the peak of a path, and what its towers keep for the backward pass: in MiB and, per token and
    block, in rows of the tower's width C."""
    lines = ["", f"{row['path']}: at the peak live {row['peak'] / MIB:,.0f} MiB"]
    lines += [f"  {Group(**group)}" for group in row["at_peak"][:shown]]
    for tower in ("image", "text"):
        kept, unit = row[f"{tower}_saved"], row[f"{tower}_row"]
        total = sum(group["bytes"] for group in kept)
        lines.append(
            f"{row['path']}: the {tower} tower keeps {total / MIB:,.0f} MiB, {total / unit:.1f} C a token and block"
        )
        lines += [f"  {group['bytes'] / unit:6.2f} C  {Group(**group)}" for group in kept[:shown]]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=at_least_one, default=128, metavar="N", help="pairs (default: 128)")
    parser.add_argument(
        "--activations",
        action="store_true",
        help="list what lives at the peak and what is kept for the backward pass, plain and ours",
    )
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the counts to FILE")
    arguments = parser.parse_args()
    if arguments.batch < 2:
        parser.error("--batch: expected at least 2, as the loss compares pairs")
    os.environ["TRITON_INTERPRET"] = "1"  # for kernels on tensors of the CPU; Triton is not imported yet
    config = paths.full_size()
    counts = [asdict(count(name, path, config, arguments.batch)) for name, path in paths.COUNTED.items()]
    print("\n".join(table(counts)))
    if arguments.activations:
        for row in counts:
            if row["path"] in ("plain", "ours"):
                print("\n".join(activations(row)))
    if arguments.json:
        arguments.json.write_text(json.dumps(dict(batch=arguments.batch, counts=counts), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
