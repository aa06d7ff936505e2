"""Batches of the training loader on the device that computes, augmented there."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from upperson.data.augmentation import augment

Batch = dict[str, Any]


def to_device(batch: Batch, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> Batch:
    """A batch of `train_loader` on `device`, its images augmented and normalised there: (B, 3, H, W) float32.

    "augmentation" is used up; everything else is moved as it is. Copies from pinned memory do not wait for the device.
    """
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    moved["images"] = augment(moved["images"], moved.pop("augmentation"), mean, std)
    return moved


class DeviceBatches:
    """The batches of `loader` as `to_device` gives them, on a GPU one ahead of the batch that is computed with.

    `options` are those of `to_device` after the device. On a GPU a thread fetches the next batch, which is copied and
    augmented on a stream of its own while the caller waits for the results of the current one.
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
        current.wait_event(ready)  # not for the stream, which already works on the batch after this one
        for tensor in batch.values():
            tensor.record_stream(current)
        return batch
