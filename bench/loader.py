"""The training loader's own rate: JPEG files decoded each time, and the same images from the decoded cache.

    python bench/loader.py                     2,000 images at 384×128, one worker process, some 20 s
    python bench/loader.py --images 20000 --workers 8 --json loader.json

The images are made here, about as large as those of CUHK-PEDES. The operating system keeps their temporary folder in
memory, so computing is measured, not the disk. The rate of one core is that of a second of a worker's processor time,
whatever else the machine does. The augmentation of a batch is timed on the device that trains.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from harness.device import device_at_hand, environment
from harness.options import at_least, json_path
from harness.output import save_json, table
from harness.timing import Call, time_in_turns
from PIL import Image
from tqdm import tqdm

from upperson.data import ImageCache, Sample, augment, train_loader
from upperson.data.augmentation import RandomAugmentation
from upperson.errors import exit_status

IMAGE_SIZE = (384, 128)
BATCH = 128
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
TARGET = 7000  # images/s, more than an H200 trains with
WORDS = (
    "a the man woman is wearing with red blue dark long short black white jacket coat shirt trousers skirt shoes "
    "carries bag backpack hair and"
)


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of quality 90, 130 to 180 pixels wide and 350 to 480 high: soft shapes with some noise."""
    generator = np.random.default_rng(0)
    paths = []
    for number in tqdm(range(count), desc="making images", unit="image", leave=False):
        width, height = int(generator.integers(130, 181)), int(generator.integers(350, 481))
        shapes = Image.fromarray(generator.integers(0, 256, (22, 8, 3), dtype=np.uint8))
        pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (pixels + generator.integers(-8, 9, pixels.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


def caption(generator: np.random.Generator) -> str:
    """As long as those of CUHK-PEDES, which have 23 words on average."""
    return " ".join(generator.choice(WORDS.split(), generator.integers(15, 32)))


def measure_loader(source: str, samples: list[Sample], workers: int, cache: ImageCache | None) -> dict[str, Any]:
    """Two epochs of training batches. The first starts the workers, the second is timed; processor time is of both."""
    options = dict(tokenizer=open_clip.tokenize, image_size=IMAGE_SIZE, batch_size=BATCH, mask_captions=True)
    loader = train_loader(samples, **options, seed=0, workers=workers, epoch=0, cache=cache)
    loader.multiprocessing_context = "fork"  # Python 3.14's workers are a server's children, whose time is not counted
    busy_before = processor_seconds(resource.RUSAGE_CHILDREN)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        began, receiving_before = time.perf_counter(), processor_seconds(resource.RUSAGE_SELF)
        images = sum(len(batch["person_ids"]) for batch in loader)
        seconds = time.perf_counter() - began
        receiving = processor_seconds(resource.RUSAGE_SELF) - receiving_before
    batches = len(loader)
    del loader  # ends the workers: their processor time is known from then on
    per_core = 2 * images / (processor_seconds(resource.RUSAGE_CHILDREN) - busy_before)
    return dict(
        source=source,
        images=images,
        workers=workers,
        images_per_second=images / seconds,
        images_per_second_per_worker=images / seconds / workers,
        images_per_second_per_core=per_core,
        cores_for_target=TARGET / per_core,
        receiving_milliseconds_per_batch=1e3 * receiving / batches,
    )


def cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "images from": row["source"],
        "images/s": f"{row['images_per_second']:,.0f}",
        "per worker": f"{row['images_per_second_per_worker']:,.0f}",
        "per core": f"{row['images_per_second_per_core']:,.0f}",
        f"cores for {TARGET:,}/s": f"{row['cores_for_target']:.1f}",
        "ms to receive a batch": f"{row['receiving_milliseconds_per_batch']:.1f}",
    }


def processor_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def measure_augmentation(device: torch.device) -> dict[str, Any]:
    """One batch that is on the device already."""
    images = torch.randint(0, 256, (BATCH, 3, *IMAGE_SIZE), dtype=torch.uint8, device=device)
    random = RandomAugmentation(IMAGE_SIZE)
    drawn = torch.stack([random.draw() for _ in range(BATCH)]).to(device)
    timing = time_in_turns({"": [Call(lambda _: augment(images, drawn, MEAN, STD))]}, device, 2.0)[""]
    milliseconds = dict(milliseconds=timing.median / 1e3, p20=timing.p20 / 1e3, p80=timing.p80 / 1e3)
    return dict(batch=BATCH, device=str(device), **milliseconds, images_per_second=1e6 * BATCH / timing.median)


def rate(number: int, call: Callable[[], Any]) -> tuple[float, Any]:
    """How many of `number` things a call handles in a second, and the result of the call."""
    began = time.perf_counter()
    result = call()
    return number / (time.perf_counter() - began), result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    pairs = at_least(2, "as the loader makes batches of pairs")
    option("--images", type=pairs, default=2000, metavar="N", help="images (default: 2000)")
    option("--workers", type=at_least(1), default=1, metavar="N", help="processes that load images (default: 1)")
    option("--json", type=json_path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()

    device, number = device_at_hand(), arguments.images
    height, width = IMAGE_SIZE
    print(f"{number:,} images at {height}×{width}, batches of {BATCH}; worker processes: {arguments.workers}")
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(1)
        paths = write_images(Path(folder), number)
        samples = [Sample(path, caption(generator), person, person) for person, path in enumerate(paths)]
        cached, cache = rate(number, lambda: ImageCache.open(paths, IMAGE_SIZE, Path(folder) / "cache", progress=False))
        tokenized, _ = rate(number, lambda: open_clip.tokenize([sample.caption for sample in samples]))
        sources = {"JPEG files": None, "decoded cache": cache}
        rows = [measure_loader(source, samples, arguments.workers, cache) for source, cache in sources.items()]
    augmentation = measure_augmentation(device)

    print(f"\n{table(list(map(cells, rows)))}\n")
    print(f"once: {cached:,.0f} images/s into the cache, {tokenized:,.0f} captions/s tokenized")
    times = "{milliseconds:,.2f} ms ({p20:,.2f} to {p80:,.2f}), {images_per_second:,.0f} images/s"
    print(f"augmentation of a batch of {BATCH} on {device}: {times.format(**augmentation)}")
    if arguments.json:
        once = dict(cache_images_per_second=cached, captions_tokenized_per_second=tokenized)
        content = dict(environment=environment(device), rows=rows, once=once, augmentation=augmentation)
        save_json(arguments.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
