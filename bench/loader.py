"""The training loader's own rate: JPEG files decoded each time, and the same images from the decoded cache.

    python bench/loader.py                     2,000 images at 384×128, one worker process, some 20 s
    python bench/loader.py --images 20000 --workers 8 --json loader.json

The images are made here, about as large as those of CUHK-PEDES, in a temporary folder that the operating system keeps
in memory: what is measured is computing, not the disk. The rate of one core is that of a second of a worker's
processor time, whatever else the machine does. The augmentation of a batch is timed on the device that trains.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from comparison import at_least_one, json_path
from measure import Call, environment, time_in_turns
from PIL import Image
from tqdm import tqdm

from upperson.data import ImageCache, Sample, augment, train_loader
from upperson.data.augmentation import RandomAugmentation

IMAGE_SIZE = (384, 128)
BATCH = 128
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
TARGET = 7000  # images/s, more than an H200 trains with
WORDS = (
    "a",
    "the",
    "man",
    "woman",
    "is",
    "wearing",
    "with",
    "red",
    "blue",
    "dark",
    "long",
    "short",
    "black",
    "white",
    "jacket",
    "coat",
    "shirt",
    "trousers",
    "skirt",
    "shoes",
    "carries",
    "bag",
    "backpack",
    "hair",
    "and",
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
    return " ".join(generator.choice(WORDS, generator.integers(15, 32)))


def measure_loader(source: str, samples: list[Sample], workers: int, cache: ImageCache | None) -> dict:
    """Two epochs of training batches: the first starts the workers, the second is timed, processor time is of both."""
    loader = train_loader(
        samples,
        tokenizer=open_clip.tokenize,
        image_size=IMAGE_SIZE,
        batch_size=BATCH,
        seed=0,
        mask_captions=True,
        workers=workers,
        epoch=0,
        cache=cache,
    )
    busy_before = processor_seconds(resource.RUSAGE_CHILDREN)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        began, receiving_before = time.perf_counter(), processor_seconds(resource.RUSAGE_SELF)
        images = sum(len(batch["person_ids"]) for batch in loader)
        seconds = time.perf_counter() - began
        receiving = processor_seconds(resource.RUSAGE_SELF) - receiving_before
    batches = len(loader)
    del loader  # ends the workers: their time is known then
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


def processor_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def measure_augmentation(device: torch.device) -> dict:
    """One batch that lies on the device already."""
    images = torch.randint(0, 256, (BATCH, 3, *IMAGE_SIZE), dtype=torch.uint8, device=device)
    random = RandomAugmentation(IMAGE_SIZE)
    drawn = torch.stack([random.draw() for _ in range(BATCH)]).to(device)
    timing = time_in_turns({"augment": [Call(lambda _: augment(images, drawn, MEAN, STD))]}, device, 2.0)["augment"]
    return dict(
        batch=BATCH,
        device=str(device),
        milliseconds=timing.median / 1e3,
        p20=timing.p20 / 1e3,
        p80=timing.p80 / 1e3,
        images_per_second=1e6 * BATCH / timing.median,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=at_least_one, default=2000, metavar="N", help="images (default: 2000)")
    parser.add_argument(
        "--workers", type=at_least_one, default=1, metavar="N", help="processes that load images (default: 1)"
    )
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    if arguments.images < 2:
        parser.error("--images: expected at least 2, as the loader makes batches of pairs")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = IMAGE_SIZE
    print(f"{arguments.images:,} images at {height}×{width}, batches of {BATCH}, {arguments.workers} worker processes")
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(1)
        paths = write_images(Path(folder), arguments.images)
        samples = [Sample(path, caption(generator), number, number) for number, path in enumerate(paths)]
        began = time.perf_counter()
        cache = ImageCache.open(paths, IMAGE_SIZE, Path(folder) / "cache", progress=False)
        building = time.perf_counter() - began
        began = time.perf_counter()
        open_clip.tokenize([sample.caption for sample in samples])
        tokenizing = time.perf_counter() - began
        rows = [
            measure_loader("JPEG files", samples, arguments.workers, None),
            measure_loader("decoded cache", samples, arguments.workers, cache),
        ]
    augmentation = measure_augmentation(device)

    print(
        f"\n{'images from':<16}{'images/s':>10}{'per worker':>12}{'per core':>10}"
        f"{f'cores for {TARGET:,}/s':>20}{'ms to receive a batch':>24}"
    )
    for row in rows:
        print(
            f"{row['source']:<16}{row['images_per_second']:>10,.0f}{row['images_per_second_per_worker']:>12,.0f}"
            f"{row['images_per_second_per_core']:>10,.0f}{row['cores_for_target']:>20.1f}"
            f"{row['receiving_milliseconds_per_batch']:>24.1f}"
        )
    once = dict(
        cache_images_per_second=arguments.images / building, captions_tokenized_per_second=arguments.images / tokenizing
    )
    print(
        f"\nonce: {once['cache_images_per_second']:,.0f} images/s into the cache, "
        f"{once['captions_tokenized_per_second']:,.0f} captions/s tokenized"
    )
    print(
        f"augmentation of a batch of {BATCH} on {device}: {augmentation['milliseconds']:,.2f} ms "
        f"({augmentation['p20']:,.2f} to {augmentation['p80']:,.2f}), "
        f"{augmentation['images_per_second']:,.0f} images/s"
    )
    if arguments.json:
        content = dict(environment=environment(device), rows=rows, once=once, augmentation=augmentation)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
