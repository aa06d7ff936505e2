"""Opening images, and making sure before a long training that every one of them opens."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from upperson.data.samples import Sample
from upperson.embedded.drawing import Drawing
from upperson.errors import DataError

NAMED_IN_ERROR = 5  # broken images that an error lists one by one

# Drawing costs more than decoding a JPEG. Each process keeps the pixels as long as the drawing lives.
_drawn: WeakKeyDictionary[Drawing, np.ndarray] = WeakKeyDictionary()


def load_image(image: Path | Drawing | Image.Image) -> Image.Image:
    """The decoded RGB image. Raises DataError with the path of an image that is missing or broken."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, Path):
        pixels = _drawn.get(image)
        if pixels is None:
            pixels = _drawn[image] = np.asarray(image.draw().convert("RGB"))
        return Image.fromarray(pixels)
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{image}: image is missing") from error
    except Exception as error:  # the decoders raise many types: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{image}: image is broken ({error})") from error


def load_pixels(image: Path | Drawing | Image.Image, image_size: tuple[int, int]) -> torch.Tensor:
    """[3, H, W] uint8: the image in `image_size` (height, width), bilinear and antialiased. Raises as `load_image`."""
    loaded: Any = load_image(image)  # torchvision resizes PIL images too, and is annotated for tensors only
    resized = v2.functional.resize(loaded, list(image_size), v2.InterpolationMode.BILINEAR, antialias=True)
    return v2.functional.pil_to_tensor(resized)


def check_images(samples: Iterable[Sample], *, progress: bool = True) -> None:
    """Decodes every distinct image file once, in threads; drawings have nothing to check.

    Raises DataError with the number of images that are missing or broken and the paths of the first few.
    """
    paths = list(dict.fromkeys(sample.image for sample in samples if isinstance(sample.image, Path)))
    problems = [found for found in inspect_images(paths, progress=progress) if isinstance(found, str)]
    if problems:
        listed = first_of(problems, NAMED_IN_ERROR)
        raise DataError("\n  ".join([f"{len(problems)} of {len(paths)} images cannot be read:", *listed]))


def inspect_images(images: Sequence[Path | Drawing], *, progress: bool = True) -> list[tuple[int, int] | str]:
    """Decodes every image once, in threads: (width, height) of each, or what is wrong with it, path first."""
    with ThreadPoolExecutor() as threads:
        inspected = threads.map(_inspect, images)
        return list(tqdm(inspected, total=len(images), desc="checking images", unit="image", disable=not progress))


def first_of(lines: Sequence[str], most: int) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def _inspect(image: Path | Drawing) -> tuple[int, int] | str:
    try:
        return load_image(image).size
    except DataError as error:
        return str(error)
