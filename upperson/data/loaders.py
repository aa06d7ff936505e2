"""Data loaders: batches for training, and images and captions in order for evaluation.

In training, the content of an epoch depends only on (seed, epoch, index of the sample). The number of workers, the
number of processes, the first batch and the global random state have no influence, and the global random state is left
unchanged. A training that is resumed within an epoch is therefore equal to an uninterrupted one.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from upperson.data.augmentation import RandomAugmentation
from upperson.data.cache import ImageCache
from upperson.data.images import load_pixels
from upperson.data.masking import mask_caption, masked_positions
from upperson.data.preprocess import Preprocess
from upperson.data.samples import Sample
from upperson.embedded.drawing import Drawing
from upperson.errors import DataError
from upperson.machine import share_of

Tokenizer = Callable[[list[str]], torch.Tensor]  # texts -> (texts, L) int64
Packer = Callable[[torch.Tensor], Any]  # token ids (B, L) int64 -> input of the text tower
PixelLoader = Callable[[Path | Drawing], torch.Tensor]  # image -> [3, H, W] uint8


def batches_per_epoch(pairs: int, batch_size: int) -> int:
    """The number of batches in an epoch. A last batch of one pair is dropped, since it has no negatives."""
    return pairs // batch_size + (pairs % batch_size > 1)


def train_loader(
    samples: Sequence[Sample],
    *,
    tokenizer: Tokenizer,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    mask_captions: bool,
    workers: int,
    epoch: int,
    first_batch: int = 0,
    mask_labels: bool = False,
    rank: int = 0,
    world_size: int = 1,
    cache: ImageCache | None = None,
    pack: Packer | None = None,
) -> DataLoader:
    """One epoch of batches for `to_device`. A batch is a dictionary of

        "images": [B, 3, H, W] uint8, resized only; "augmentation": [B, 7] int64, the sampled
        `upperson.data.augmentation.COLUMNS`; "captions": [B, L] int64; "person_ids": [B] int64

    With `mask_captions` the captions are masked, see `mask_caption`. With `mask_labels` a batch also has
    "masked_captions" (equal to "captions" if those are masked) and "mask_labels", both [B, L] int64, and
    "mask_positions" [M, 2] int64, caption and place of each of the M tokens that have a label.

    `image_size` is (height, width). Each epoch contains every sample once, in a new random order. Batches before
    `first_batch` are skipped without being loaded. `loader.batch_sampler.set_epoch(epoch)` starts another epoch with
    the same worker processes; a new loader gives the same batches.

    Process `rank` of `world_size` loads only its `share_of` each batch. A process without a share, as in a small last
    batch, loads the first pair of the batch instead, so that it has something to compute.

    The captions are tokenised once, by this function. The loader applies `pack`, such as AdaptedCLIP.caption_packer(),
    to the captions of each batch. Image files are read from `cache` if given.

    Raises ValueError for a batch size below 2, a `first_batch` beyond the epoch, an invalid rank or a cache of another
    image size, and DataError for fewer than two samples. An unreadable image raises DataError with its path when its
    batch is loaded.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size: expected at least 2, as the loss compares pairs, found {batch_size}")
    if len(samples) < 2:
        raise DataError(f"training needs at least 2 pairs of image and caption, found {len(samples)}")
    pixels = _pixel_loader(image_size, cache)
    pairs = TrainingPairs(samples, pixels, RandomAugmentation(image_size), tokenizer, seed, mask_captions, mask_labels)
    batches = EpochBatches(len(samples), batch_size, seed, epoch, first_batch, rank, world_size)
    return data_loader(
        pairs,
        workers,
        batch_sampler=batches,
        persistent_workers=workers > 0,
        collate_fn=partial(_collate, pack=pack),
    )


def image_loader(
    images: Sequence[Path | Drawing],
    *,
    preprocess: Preprocess,
    batch_size: int,
    workers: int,
    cache: ImageCache | None = None,
) -> DataLoader:
    """Batches (B, 3, H, W) float32 of `images`, in order and without augmentation.

    Image files are read from `cache` if given. Raises ValueError if the cache has another image size.
    """
    dataset = EvaluationImages(images, _pixel_loader(preprocess.image_size, cache), preprocess)
    return data_loader(dataset, workers, batch_size=batch_size)


def caption_loader(
    captions: Sequence[str], *, tokenizer: Tokenizer, batch_size: int, pack: Packer | None = None
) -> DataLoader:
    """Batches (B, L) int64 of the token ids of `captions`, in order, or the results of `pack`.

    Tokens beyond L are truncated.
    """

    def collate(texts: list[str]) -> Any:
        return tokenizer(texts) if pack is None else pack(tokenizer(texts))

    return data_loader(captions, workers=0, batch_size=batch_size, collate_fn=collate)


def _collate(pairs: list[dict[str, Any]], pack: Packer | None) -> dict[str, Any]:
    batch = default_collate(pairs)
    if "mask_labels" in batch:
        batch["mask_positions"] = masked_positions(batch["mask_labels"])
    if pack is not None:
        batch |= {name: pack(batch[name]) for name in ("captions", "masked_captions") if name in batch}
    return batch


def _leave_process_group(_: int) -> None:
    """Protects a loader process from Ctrl-C and from the signal by which torchrun stops a process and its children.

    The training process needs its loaders until the end of a step. A loader detects the end of that process by itself.
    """
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def data_loader(dataset: Any, workers: int, **options: Any) -> DataLoader:
    """PyTorch's loader with `workers` processes; `options` are its own."""
    # With its own generator, a DataLoader does not use the global one.
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_process_group,
        generator=torch.Generator(),
        **options,
    )


def _pixel_loader(image_size: tuple[int, int], cache: ImageCache | None) -> PixelLoader:
    if cache is None:
        return partial(load_pixels, image_size=image_size)
    if cache.image_size != tuple(image_size):
        raise ValueError(f"cache: expected images of {tuple(image_size)} pixels, found those of {cache.image_size}")
    return cache.load


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """One process's shares of batches of (epoch, index). The order of the indices depends on seed and epoch."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        epoch: int,
        first_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        share_of(batch_size, rank, world_size)  # raises ValueError for an invalid rank
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.total = batches_per_epoch(size, batch_size)
        self.set_epoch(epoch, first_batch)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Sets the batches of the next iteration: the batches of `epoch`, from `first_batch` on."""
        if not 0 <= first_batch <= self.total:
            raise ValueError(f"first_batch: expected 0 to {self.total}, the number of batches, found {first_batch}")
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.total - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = torch.randperm(self.size, generator=_generator("order", self.seed, epoch)).tolist()
        for batch in range(self.first_batch, self.total):
            start = batch * self.batch_size
            indices = order[start : start + self.batch_size]
            share = share_of(len(indices), self.rank, self.world_size)
            yield [(epoch, index) for index in indices[share.start : share.stop] or indices[:1]]


class TrainingPairs(Dataset):
    """(epoch, index) -> a pair and its augmentation. Random choices depend only on seed, epoch and index."""

    def __init__(
        self,
        samples: Sequence[Sample],
        pixels: PixelLoader,
        augmentation: RandomAugmentation,
        tokenizer: Tokenizer,
        seed: int,
        mask_captions: bool,
        mask_labels: bool = False,
    ):
        self.samples, self.pixels, self.augmentation = samples, pixels, augmentation
        self.token_ids = _token_ids([sample.caption for sample in samples], tokenizer)
        self.seed, self.mask_captions, self.mask_labels = seed, mask_captions, mask_labels

    def __getitem__(self, position: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        sample = self.samples[position[1]]
        with torch.random.fork_rng(devices=[]):
            # torchvision samples from this generator. torch.manual_seed would also reseed the GPU.
            torch.default_generator.manual_seed(stable_seed("image", self.seed, *position))
            augmentation = self.augmentation.draw()
        caption = self.token_ids[position[1]].long()
        pair = {
            "images": self.pixels(sample.image),
            "augmentation": augmentation,
            "captions": caption,
            "person_ids": sample.person_id,
        }
        if self.mask_captions or self.mask_labels:
            masked, labels = mask_caption(caption, _generator("caption", self.seed, *position))
            if self.mask_captions:
                pair["captions"] = masked
            if self.mask_labels:
                pair |= {"masked_captions": masked, "mask_labels": labels}
        return pair


class EvaluationImages(Dataset):
    """index -> (3, H, W) float32."""

    def __init__(self, images: Sequence[Path | Drawing], pixels: PixelLoader, preprocess: Preprocess):
        self.images, self.pixels, self.preprocess = images, pixels, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess.normalise(self.pixels(self.images[index]))


def _token_ids(captions: Sequence[str], tokenizer: Tokenizer) -> torch.Tensor:
    """[captions, L] int32, half the memory of int64. Long tasks show a bar: 500,000 captions take 40 s."""
    starts = tqdm(range(0, len(captions), 1000), desc="tokenizing captions", delay=2, leave=False, disable=None)
    return torch.cat([tokenizer(list(captions[start : start + 1000])).to(torch.int32) for start in starts])


def _generator(*key: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(stable_seed(*key))


def stable_seed(*key: str | int) -> int:
    """A 64-bit seed that is the same in every process and on every machine, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
