"""Loading of images, and a check before a long training that every image can be decoded."""

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

NAMED_IN_ERROR = 5  # limit of broken images listed in an error

# Drawing an image takes longer than decoding a JPEG. Each process caches the pixels for the lifetime of the drawing.
_drawn: WeakKeyDictionary[Drawing, np.ndarray] = WeakKeyDictionary()


def load_image(image: Path | Drawing | Image.Image) -> Image.Image:
    """The decoded RGB image. Raises DataError with the path of a missing or broken image."""
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
    """[3, H, W] uint8: the image resized to `image_size` (height, width), bilinear with antialiasing.

    Raises the errors of `load_image`.
    """
    loaded: Any = load_image(image)  # torchvision's annotations omit PIL images, which it also resizes
    resized = v2.functional.resize(loaded, list(image_size), v2.InterpolationMode.BILINEAR, antialias=True)
    return v2.functional.pil_to_tensor(resized)


def check_images(samples: Iterable[Sample], *, progress: bool = True) -> None:
    """Decodes every distinct image file once, in threads. Synthetic images need no check.

    Raises DataError with the number of missing or broken images and the paths of the first ones.
    """
    paths = list(dict.fromkeys(sample.image for sample in samples if isinstance(sample.image, Path)))
    problems = [found for found in inspect_images(paths, progress=progress) if isinstance(found, str)]
    if problems:
        listed = first_of(problems, NAMED_IN_ERROR)
        raise DataError("\n  ".join([f"{len(problems)} of {len(paths)} images cannot be read:", *listed]))


def inspect_images(images: Sequence[Path | Drawing], *, progress: bool = True) -> list[tuple[int, int] | str]:
    """Decodes every image once, in threads. Returns (width, height) or an error message for each image."""
    with ThreadPoolExecutor() as threads:
        inspected = threads.map(_inspect, images)
        return list(tqdm(inspected, total=len(images), desc="checking images", unit="image", disable=not progress))


def first_of(lines: Sequence[str], most: int) -> list[str]:
    """The first `most` lines, and the number of the others."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def _inspect(image: Path | Drawing) -> tuple[int, int] | str:
    try:
        return load_image(image).size
    except DataError as error:
        return str(error)
