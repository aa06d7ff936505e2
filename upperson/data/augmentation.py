"""The augmentation of training images: sampled for each image, applied to a whole batch on any device.

The recipe is that of the released UP-Person code (arXiv 2504.10084) and of earlier work in this field: horizontal flip
with probability 0.5; a black border and a random crop back to the size; normalisation; with probability 0.5, random
erasing of a rectangle of 2 to 40 % of the area. The rectangle is filled with `mean` as a normalised value. This is not
the average colour, but the released code trains in this way. The border is 10 pixels, as in the released code. Images
lower than 224, which the released code does not train on, have a border in proportion to 10 pixels at height 384.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

# The columns of a sampled augmentation: whether the image is flipped; the offset of the crop from the image's upper
# left corner in pixels (negative: in the border); the erased rectangle, with height and width 0 if nothing is erased.
COLUMNS = ("flip", "top", "left", "erased_top", "erased_left", "erased_height", "erased_width")

BORDER, LOWEST = 10, 224  # pixels; the lowest images with the whole border


class RandomAugmentation:
    """Samples the augmentation of an image of `image_size` (height, width), as torchvision's transforms do."""

    def __init__(self, image_size: tuple[int, int]):
        height, width = image_size
        self.border = BORDER if height >= LOWEST else round(BORDER * height / 384)
        self.flip = v2.RandomHorizontalFlip(0.5)
        self.crop = v2.RandomCrop(image_size, padding=self.border)
        self.erasing = v2.RandomErasing(p=0.5, scale=(0.02, 0.4))
        self.like = [torch.empty(3, height, width, device="meta")]  # torchvision reads the size from an image

    def draw(self) -> Tensor:
        """Samples [7] int64, COLUMNS, from torch's global generator, as torchvision does."""
        flip = int(torch.rand(1) < self.flip.p)
        crop = self.crop.make_params(self.like)
        erased = 0, 0, 0, 0
        if torch.rand(1) < self.erasing.p:
            rectangle = self.erasing.make_params(self.like)
            if rectangle["v"] is not None:  # else no rectangle fitted in ten attempts
                erased = tuple(rectangle[side] for side in "ijhw")
        return torch.tensor([flip, crop["top"] - self.border, crop["left"] - self.border, *erased])


def augment(images: Tensor, augmentation: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Augments and normalises a batch on its device, without a loop over the images or a transfer to the host.

    Args:
        images: [B, 3, H, W] uint8.
        augmentation: [B, 7] int64, the sampled COLUMNS of each image.
        mean, std: of the red, green and blue values in [0, 1].

    Returns [B, 3, H, W] float32. On the CPU the result is bitwise equal to torchvision's transforms of each image.
    Raises ValueError for other shapes or dtypes.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images: expected [B, 3, H, W] uint8, found {list(images.shape)} {images.dtype}")
    if augmentation.shape != (len(images), len(COLUMNS)) or augmentation.dtype != torch.int64:
        raise ValueError(
            f"augmentation: expected [{len(images)}, {len(COLUMNS)}] int64, found {list(augmentation.shape)} "
            f"{augmentation.dtype}"
        )
    height, width = images.shape[2:]
    flip, top, left, erased_top, erased_left, erased_height, erased_width = augmentation[:, :, None].unbind(1)
    row, column = (torch.arange(side, device=images.device) for side in (height, width))

    # The source row and column of each pixel, [B, H] and [B, W]; the flip comes before the crop.
    from_row, from_column = row + top, column + left
    inside = _rectangle((from_row >= 0) & (from_row < height), (from_column >= 0) & (from_column < width))[:, None]
    from_column = torch.where(flip == 1, width - 1 - from_column, from_column)
    rows, columns = from_row.clamp(0, height - 1), from_column.clamp(0, width - 1)
    cropped = images.gather(2, rows[:, None, :, None].expand_as(images))
    cropped = cropped.gather(3, columns[:, None, None, :].expand_as(images))
    normalised = normalise(cropped.mul_(inside), mean, std)

    erased = _rectangle(
        (row >= erased_top) & (row < erased_top + erased_height),
        (column >= erased_left) & (column < erased_left + erased_width),
    )
    for channel, value in zip(normalised.unbind(1), mean, strict=True):
        channel.masked_fill_(erased, value)
    return normalised


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[..., 3, H, W] uint8 -> float32, normalised with `mean` and `std` of the values in [0, 1]."""
    scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    channels: list[Any] = [_channels(values, pixels.device) for values in (mean, std)]  # on the GPU already: no copy
    return v2.functional.normalize(scaled, *channels, inplace=True)


def _rectangle(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, H] and [B, W] -> [B, H, W]."""
    return rows[:, :, None] & columns[:, None, :]


@lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3] float32, cached, since copying a list to a GPU waits for the GPU."""
    return torch.tensor(values, device=device)
