"""The night domain of the embedded data: the content of a drawing, photographed at night."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from upperson.embedded.drawing import Drawing, Light

AMBIENT = 0.6  # brightness outside the light of the street lamp; the brightness inside is 1


@dataclass(frozen=True)
class Night:
    """A drawing under a street lamp: dark, bluish, noisy, and low in contrast. The pixels are always the same."""

    day: Drawing
    seed: int  # seed of the lamp's position, the camera and its noise

    def draw(self) -> Image.Image:
        """Draws the RGB image, of the same size as by day."""
        rng = random.Random(f"night/{self.seed}")
        lit = Image.fromarray(_under_lamp(np.asarray(self.day.draw(), dtype=np.float32), rng).round().astype(np.uint8))
        camera = Light(
            brightness=rng.uniform(0.48, 0.62),
            contrast=rng.uniform(0.7, 0.85),
            cast=(rng.uniform(0.75, 0.85), 0.92, rng.uniform(1.2, 1.35)),
            noise=rng.uniform(6, 10),
            blur=rng.uniform(0.3, 0.6),
        )
        return camera.apply(lit, rng.getrandbits(63))


def _under_lamp(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Darkens pixels (H, W, 3) outside a cone of light, which widens from the top of the picture to the bottom."""
    height, width = pixels.shape[:2]
    lamp, middle = rng.uniform(0.1, 0.9), rng.uniform(0.35, 0.65)  # the cone's axis at top and bottom, in widths
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    off_axis = np.abs(across - (lamp + (middle - lamp) * down)) / (0.15 + 0.65 * down)
    inside = 1 / (1 + off_axis**4)
    return pixels * (AMBIENT + (1 - AMBIENT) * inside)[:, :, None]
