"""Augmentations of images and captions.

The recipe is the one of the released UP-Person code (arXiv 2504.10084) and of its ancestors in this field.
"""

import torch
from torchvision.transforms import v2

# Ids of CLIP's vocabulary. UP-Person's mask token takes the place of the
# last word that open_clip knows ("jekyll"), which descriptions of pedestrians can do without.
MASK_ID = 49405
END_ID = 49407
NOT_MASKED = -100  # in labels: nothing to predict here; what torch's cross entropy leaves out

SELECTED, MASKED, REPLACED = 0.15, 0.8, 0.1  # of the tokens; of the selected ones; the rest stay as they are


def image_transform(
    image_size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], *, train: bool
) -> v2.Compose:
    """RGB PIL image -> [3, H, W] float32, normalised with `mean` and `std`, which refer to values in [0, 1].

    Both: bilinear resize to `image_size` (height, width), with the antialiasing that PIL images always get.
    Training only: horizontal flip with probability 0.5; a black border and a random crop back to the size;
    last, with probability 0.5, a random rectangle of 2 to 40 % of the area is filled with `mean`. That is the
    mean taken as a normalised value, so not the average colour, but it is what the released code trains with.
    The border is 10 pixels at height 384 and proportional to the height elsewhere.

    Random choices come from torch's global generator, as in all of torchvision.
    """
    height, _ = image_size
    augment = [v2.RandomHorizontalFlip(0.5), v2.RandomCrop(image_size, padding=round(10 * height / 384))]
    erase = [v2.RandomErasing(p=0.5, scale=(0.02, 0.4), value=list(mean))]
    return v2.Compose(
        [
            v2.Resize(image_size, v2.InterpolationMode.BILINEAR, antialias=True),
            *(augment if train else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
            *(erase if train else []),
            v2.ToPureTensor(),
        ]
    )


def mask_caption(token_ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks a caption as BERT does: [L] int64 -> the masked caption and what was there, both new, [L] int64.

    Each token between start and end is selected with probability 0.15; of the selected, 80 % become the mask
    id, 10 % a random id from 1 to 49404 and 10 % stay. When none is selected, the first is masked. Start, end
    and padding are never touched. The labels are the ids of the selected tokens, and NOT_MASKED elsewhere. The
    result is a function of the tokens and of the generator's state alone.

    Raises ValueError for another shape or dtype, and for tokens without an end token (id 49407).
    """
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids: expected [L] int64, found {list(token_ids.shape)} {token_ids.dtype}")
    end = int(token_ids.argmax())
    if token_ids[end] != END_ID:
        raise ValueError(f"token_ids: expected an end token ({END_ID}), found none")
    masked, labels = token_ids.clone(), torch.full_like(token_ids, NOT_MASKED)
    content = masked[1:end]  # a view
    if not len(content):
        return masked, labels
    selected = torch.rand(len(content), generator=generator) < SELECTED
    fate = torch.rand(len(content), generator=generator)
    random_ids = torch.randint(1, MASK_ID, (len(content),), generator=generator)
    if not selected.any():
        selected[0], fate[0] = True, 0.0
    labels[1:end] = torch.where(selected, content, NOT_MASKED)
    replaced = selected & (fate >= MASKED) & (fate < MASKED + REPLACED)
    content[selected & (fate < MASKED)] = MASK_ID
    content[replaced] = random_ids[replaced]
    return masked, labels
