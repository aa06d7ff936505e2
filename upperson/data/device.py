"""Moves batches of the training loader to the computing device, and augments them there."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from upperson.data.augmentation import augment

Batch = dict[str, Any]


def to_device(batch: Batch, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> Batch:
    """Moves a batch of `train_loader` to `device`. Its images are augmented and normalised: (B, 3, H, W) float32.

    The entry "augmentation" is removed; the other entries are only moved. Copies from pinned memory are asynchronous.
    """
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    moved["images"] = augment(moved["images"], moved.pop("augmentation"), mean, std)
    return moved


class DeviceBatches:
    """The batches of `loader`, each passed through `to_device`. On a GPU the next batch is prefetched.

    `options` are the arguments of `to_device` after the device. On a GPU a thread fetches the next batch. The batch is
    copied and augmented on a separate stream while the current batch is computed.
    """

    def __init__(self, loader: Iterable[Batch], device: torch.device, *options: Any):
        self.loader, self.device, self.options = loader, torch.device(device), options
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        if self.stream is None:
            for batch in self.loader:
                yield to_device(batch, self.device, *self.options)
            return
        batches = iter(self.loader)
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(self._fetch, batches, self.stream)
            while (fetched := ahead.result()) is not None:
                ahead = thread.submit(self._fetch, batches, self.stream)
                yield self._hand_out(*fetched)

    def _fetch(self, batches: Iterator[Batch], stream: torch.cuda.Stream) -> tuple[Batch, Any] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return to_device(batch, self.device, *self.options), stream.record_event()

    def _hand_out(self, batch: Batch, ready: Any) -> Batch:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)  # waiting for the stream would also wait for the batch after this one
        for tensor in batch.values():
            tensor.record_stream(current)
        return batch
