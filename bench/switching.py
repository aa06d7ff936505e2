"""Several adaptations of one CLIP on a CPU: what a switch costs, and a batch whose images want different adaptations.

    python bench/switching.py

A batch is encoded by one adaptation, or in as many parts as it has adaptations. Two threads encode batches of one
adaptation each, the same or different ones, under Adaptations.using.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness.options import at_least
from harness.output import table

from upperson import AdaptedCLIP, Config, preset
from upperson.deploy.switching import Adaptations
from upperson.errors import exit_status
from upperson.methods import UNTRAINED
from upperson.model.checkpoint import save_checkpoint

BATCH = 16
NAMES = [f"camera {number}" for number in range(BATCH)]


def adaptations_of(config: Config, folder: Path) -> Adaptations:
    """UP-Person's modules with initial values under each of NAMES, on one backbone in a file."""
    model = AdaptedCLIP(config.replace(method=UNTRAINED).model)
    adaptations = Adaptations(model.eval().requires_grad_(False))
    modules = AdaptedCLIP(config.model)
    save_checkpoint(folder / "one.safetensors", modules.adaptation(), config, {}, modules.fingerprint)
    for name in NAMES:
        adaptations.add(name, folder / "one.safetensors", backend="torch")
    return adaptations


def milliseconds(call: Callable[[], object], times: int) -> float:
    """The median of the wall times of a call."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


@torch.inference_mode()
def in_parts(adaptations: Adaptations, images: torch.Tensor, parts: int) -> torch.Tensor:
    """The features of a batch of which each part wants another adaptation."""
    features = []
    for name, part in zip(NAMES, images.chunk(parts), strict=False):
        with adaptations.using(name) as model:
            features.append(model.encode_image(part))
    return torch.cat(features)


def in_two_threads(adaptations: Adaptations, images: torch.Tensor, names: list[str]) -> None:
    def work(name: str) -> None:
        for _ in range(4):
            with torch.inference_mode(), adaptations.using(name) as model:
                model.encode_image(images)

    threads = [threading.Thread(target=work, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(config: Config, times: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        adaptations = adaptations_of(config, Path(folder))
        images = torch.randn(BATCH, 3, *config.model.image_size)
        numbers = iter(range(10**9))
        row: dict[str, str] = {}
        switch = milliseconds(lambda: adaptations.use(NAMES[next(numbers) % 2]), 20 * times)
        row["a switch"] = f"{switch:.2f}"
        in_parts(adaptations, images, 1)
        for parts in (1, 2, 4, BATCH):
            found = milliseconds(lambda parts=parts: in_parts(adaptations, images, parts), times)
            row[f"{BATCH} images with {parts} adaptations, in parts"] = f"{found:,.1f}"
        for what, names in (("the same adaptation", NAMES[:1] * 2), ("one adaptation each", NAMES[:2])):
            found = milliseconds(lambda names=names: in_two_threads(adaptations, images, names), max(times // 4, 3))
            row[f"{BATCH} images, in two threads with {what}"] = f"{found / 8:,.1f}"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=at_least(3), default=15, metavar="N", help="calls of each kind (default: 15)")
    arguments = parser.parse_args()
    row = measure(preset("embedded").replace(backend="torch"), arguments.times)
    print(table([{"what": what, "ms": value} for what, value in row.items()], "pipe"))
    print(f"\nMedians, UP-Person on the small CLIP, threads of PyTorch: {torch.get_num_threads()}, {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
