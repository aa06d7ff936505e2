"""The one way from an image to what the image tower takes: evaluation, search and a user's own code share it."""

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

    def __call__(self, image: Image.Image | Path | Drawing) -> Tensor:
        """An image, or the path of one -> (3, H, W) float32, normalised.

        The image is resized bilinearly with antialiasing. Raises DataError as load_image.
        """
        return self.normalise(load_pixels(image, self.image_size))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> float32, normalised."""
        return normalise(pixels, self.mean, self.std)
