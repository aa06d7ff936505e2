"""Batches for training, and images and captions in order for evaluation.

In training, what an epoch shows is a function of (seed, epoch, index of the sample) alone: not of the number
of workers, of the processes that share a batch, of the batch one starts at, or of the process's random state, which
stays as it is. So a training that is resumed in the middle of an epoch continues as if it had never stopped.
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
from upperson.data.masking import mask_caption
from upperson.data.preprocess import Preprocess
from upperson.data.samples import Sample
from upperson.embedded.drawing import Drawing
from upperson.errors import DataError
from upperson.machine import share_of

Tokenizer = Callable[[list[str]], torch.Tensor]  # texts -> (texts, L) int64
Packer = Callable[[torch.Tensor], Any]  # token ids (B, L) int64 -> what the text tower takes
PixelLoader = Callable[[Path | Drawing], torch.Tensor]  # image -> [3, H, W] uint8


def batches_per_epoch(pairs: int, batch_size: int) -> int:
    """The batches of an epoch. A last batch of one pair has no negatives to learn from and is left out."""
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
    """One epoch of batches for `to_device`: {"images": [B, 3, H, W] uint8, resized alone; "augmentation": [B, 7] int64,
    what is drawn for each (`upperson.data.augmentation.COLUMNS`); "captions": [B, L] int64; "person_ids": [B] int64}.

    With `mask_captions` the captions are masked, see `mask_caption`. With `mask_labels` there are "masked_captions",
    which are the captions themselves if those are masked, and "mask_labels" as well, both [B, L] int64.

    `image_size` is (height, width). Each epoch shows every sample once, in an order of its own. Batches
    before `first_batch` are skipped without being loaded. For a further epoch with the same worker processes
    call `loader.batch_sampler.set_epoch(epoch)`; a new loader gives the same batches.

    Of every batch, process `rank` of `world_size` loads the part that is its `share_of` the batch. A process without
    a share, as in a last batch of few pairs, loads the first pair of the batch instead, to have something to compute.

    The captions are tokenised here, once. `pack` is applied to the captions of each batch where it is loaded, such as
    AdaptedCLIP.caption_packer(). Images that are files come from `cache` if there is one.

    Raises ValueError for a batch size below 2, a `first_batch` beyond the epoch, a rank that is not there or a cache
    of another image size, and DataError for fewer than two samples. An image that cannot be read raises DataError
    with its path when its batch is due.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size: expected at least 2, as the loss compares pairs, found {batch_size}")
    if len(samples) < 2:
        raise DataError(f"training needs at least 2 pairs of image and caption, found {len(samples)}")
    pixels = _pixel_loader(image_size, cache)
    pairs = TrainingPairs(samples, pixels, RandomAugmentation(image_size), tokenizer, seed, mask_captions, mask_labels)
    batches = EpochBatches(len(samples), batch_size, seed, epoch, first_batch, rank, world_size)
    return _loader(
        pairs,
        workers,
        batch_sampler=batches,
        persistent_workers=workers > 0,
        collate_fn=default_collate if pack is None else partial(_collate, pack=pack),
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

    Images that are files come from `cache` if there is one. Raises ValueError if the cache has another image size.
    """
    dataset = EvaluationImages(images, _pixel_loader(preprocess.image_size, cache), preprocess)
    return _loader(dataset, workers, batch_size=batch_size)


def caption_loader(
    captions: Sequence[str], *, tokenizer: Tokenizer, batch_size: int, pack: Packer | None = None
) -> DataLoader:
    """Batches (B, L) int64 of the token ids of `captions`, in order, or what `pack` makes of them.

    Tokens beyond L are cut off.
    """

    def collate(texts: list[str]) -> Any:
        return tokenizer(texts) if pack is None else pack(tokenizer(texts))

    return _loader(captions, workers=0, batch_size=batch_size, collate_fn=collate)


def _collate(pairs: list[dict[str, Any]], pack: Packer) -> dict[str, Any]:
    batch = default_collate(pairs)
    return batch | {name: pack(batch[name]) for name in ("captions", "masked_captions") if name in batch}


def _leave_process_group(_: int) -> None:
    """Has Ctrl-C, and the signal by which torchrun stops a process with all its children, spare a loader's process.

    The training that it loads for goes on to the end of a step. It notices by itself when that process has ended.
    """
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)


def _loader(dataset: Any, workers: int, **options: Any) -> DataLoader:
    # With a generator of its own, a DataLoader leaves the global one alone.
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
    """One process's share of batches of (epoch, index): the indices in random order, a function of seed and epoch."""

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
        share_of(batch_size, rank, world_size)  # raises ValueError if there is no such rank
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.total = batches_per_epoch(size, batch_size)
        self.set_epoch(epoch, first_batch)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Sets the batches of the next iteration: those of `epoch`, from `first_batch` on."""
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
            indices = order[start : start + self.batch_size]
            share = share_of(len(indices), self.rank, self.world_size)
            yield [(epoch, index) for index in indices[share.start : share.stop] or indices[:1]]


class TrainingPairs(Dataset):
    """(epoch, index) -> the pair and its augmentation; random choices depend on seed, epoch and index alone."""

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
            # torchvision draws from this generator. torch.manual_seed would reseed the GPU as well.
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
    """[captions, L] int32, half the memory of int64. A bar appears if it takes long: 500,000 captions take 40 s."""
    starts = tqdm(range(0, len(captions), 1000), desc="tokenizing captions", delay=2, leave=False, disable=None)
    return torch.cat([tokenizer(list(captions[start : start + 1000])).to(torch.int32) for start in starts])


def _generator(*key: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(stable_seed(*key))


def stable_seed(*key: str | int) -> int:
    """64 bits that are the same in every process and on every machine, unlike those of hash()."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
