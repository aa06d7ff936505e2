"""The preprocessing of an image for the image tower, shared by evaluation, search and a user's own code."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from upperson.data.augmentation import normalise
from upperson.data.images import load_pixels
from upperson.embedded.drawing import Drawing


@dataclass(frozen=True)
class Preprocess:
    """Resizes and normalises an image.

    Args:
        image_size: (height, width) in pixels.
        mean, std: of the red, green and blue values in [0, 1].
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image | Path | str | Drawing) -> Tensor:
        """An image or its path -> (3, H, W) float32, normalised.

        The image is resized bilinearly with antialiasing. Raises DataError for a missing or broken image.
        """
        return self.normalise(load_pixels(Path(image) if isinstance(image, str) else image, self.image_size))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> float32, normalised."""
        return normalise(pixels, self.mean, self.std)
