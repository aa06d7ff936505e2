"""Batches for training, and images and captions in order for evaluation.

In training, what an epoch shows is a function of (seed, epoch, index of the sample) alone: not of the number
of workers, of the batch one starts at, or of the process's random state, which stays as it is. So a training
that is resumed in the middle of an epoch continues as if it had never stopped.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from upperson.data.images import load_image
from upperson.data.samples import DataError, Drawing, Sample
from upperson.data.transforms import image_transform, mask_caption

Tokenizer = Callable[[list[str]], torch.Tensor]  # texts -> [texts, L] int64
ImageTransform = Callable[[Image.Image], torch.Tensor]


def batches_per_epoch(pairs: int, batch_size: int) -> int:
    """The batches of an epoch. A last batch of one pair has no negatives to learn from and is left out."""
    return pairs // batch_size + (pairs % batch_size > 1)


def train_loader(
    samples: Sequence[Sample],
    *,
    tokenizer: Tokenizer,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    seed: int,
    mask_captions: bool,
    workers: int,
    epoch: int,
    first_batch: int = 0,
    mask_labels: bool = False,
) -> DataLoader:
    """One epoch of {"images": [B, 3, H, W] float32, "captions": [B, L] int64, "person_ids": [B] int64}.

    With `mask_captions` the captions are masked, see `mask_caption`. With `mask_labels` there are "masked_captions",
    which are the captions themselves if those are masked, and "mask_labels" as well, both [B, L] int64.

    `image_size` is (height, width). Each epoch shows every sample once, in an order of its own. Batches
    before `first_batch` are skipped without being loaded. For a further epoch with the same worker processes
    call `loader.batch_sampler.set_epoch(epoch)`; a new loader gives the same batches.

    Raises ValueError for a batch size below 2 or a `first_batch` beyond the epoch, and DataError for fewer
    than two samples. An image that cannot be read raises DataError with its path when its batch is due.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size: expected at least 2, as the loss compares pairs, found {batch_size}")
    if len(samples) < 2:
        raise DataError(f"training needs at least 2 pairs of image and caption, found {len(samples)}")
    transform = image_transform(image_size, mean, std, train=True)
    pairs = TrainingPairs(samples, transform, tokenizer, seed, mask_captions, mask_labels)
    batches = EpochBatches(len(samples), batch_size, seed, epoch, first_batch)
    return _loader(pairs, workers, batch_sampler=batches, persistent_workers=workers > 0)


def image_loader(
    images: Sequence[Path | Drawing],
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    workers: int,
) -> DataLoader:
    """Batches [B, 3, H, W] float32 of `images`, in order and without augmentation."""
    transform = image_transform(image_size, mean, std, train=False)
    return _loader(EvaluationImages(images, transform), workers, batch_size=batch_size)


def caption_loader(captions: Sequence[str], *, tokenizer: Tokenizer, batch_size: int) -> DataLoader:
    """Batches [B, L] int64 of the token ids of `captions`, in order; what exceeds L tokens is cut off."""
    return _loader(captions, workers=0, batch_size=batch_size, collate_fn=tokenizer)


def _loader(dataset: Dataset, workers: int, **options) -> DataLoader:
    # With a generator of its own, a DataLoader leaves the global one alone.
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        **options,
    )


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): the indices in random order, a function of seed and epoch."""

    def __init__(self, size: int, batch_size: int, seed: int, epoch: int, first_batch: int = 0):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.total = batches_per_epoch(size, batch_size)
        self.set_epoch(epoch, first_batch)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """What the next iteration gives: the batches of `epoch`, from `first_batch` on."""
        if not 0 <= first_batch <= self.total:
            raise ValueError(f"first_batch: expected 0 to {self.total}, the end, found {first_batch}")
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.total - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = torch.randperm(self.size, generator=_generator("order", self.seed, epoch)).tolist()
        for batch in range(self.first_batch, self.total):
            start = batch * self.batch_size
            yield [(epoch, index) for index in order[start : start + self.batch_size]]


class TrainingPairs(Dataset):
    """(epoch, index) -> the augmented pair, whose random choices depend on seed, epoch and index alone."""

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: ImageTransform,
        tokenizer: Tokenizer,
        seed: int,
        mask_captions: bool,
        mask_labels: bool = False,
    ):
        self.samples, self.transform, self.tokenizer = samples, transform, tokenizer
        self.seed, self.mask_captions, self.mask_labels = seed, mask_captions, mask_labels

    def __getitem__(self, position: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        sample = self.samples[position[1]]
        image = load_image(sample.image)
        with torch.random.fork_rng(devices=[]):
            # torchvision draws from this generator. torch.manual_seed would reseed the GPU as well.
            torch.default_generator.manual_seed(_stable_seed("image", self.seed, *position))
            image = self.transform(image)
        caption = self.tokenizer([sample.caption])[0]
        pair = {"images": image, "captions": caption, "person_ids": sample.person_id}
        if self.mask_captions or self.mask_labels:
            masked, labels = mask_caption(caption, _generator("caption", self.seed, *position))
            if self.mask_captions:
                pair["captions"] = masked
            if self.mask_labels:
                pair |= {"masked_captions": masked, "mask_labels": labels}
        return pair


class EvaluationImages(Dataset):
    """index -> [3, H, W]."""

    def __init__(self, images: Sequence[Path | Drawing], transform: ImageTransform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(load_image(self.images[index]))


def _generator(*key: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(_stable_seed(*key))


def _stable_seed(*key: str | int) -> int:
    """64 bits that are the same in every process and on every machine, unlike those of hash()."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
