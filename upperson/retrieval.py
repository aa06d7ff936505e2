"""Text → image retrieval by a model: embeds gallery and queries, ranks, measures."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from upperson.data import Sample, caption_loader, gallery, image_loader, queries
from upperson.metrics import Retrieval, retrieval_metrics
from upperson.model import UPPerson

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of forward passes in "fp32", "bf16" or "fp16"."""
    return torch.autocast(device.type, AUTOCAST_DTYPES.get(precision), enabled=precision in AUTOCAST_DTYPES)


@torch.inference_mode()
def evaluate(
    model: UPPerson,
    samples: Sequence[Sample],
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    progress: bool = True,
) -> Retrieval:
    """Every caption of `samples` searches the distinct images of `samples`.

    Runs where the model is. `top` of the result indexes the images in the order of `upperson.data.gallery`.
    """
    images, image_ids = gallery(samples)
    captions, caption_ids = queries(samples)
    device = next(model.parameters()).device
    with autocast(device, precision):
        image_features = _embed(
            model.encode_image,
            image_loader(
                images,
                image_size=model.config.image_size,
                mean=model.image_mean,
                std=model.image_std,
                batch_size=batch_size,
                workers=workers,
            ),
            device,
            "images",
            progress,
        )
        text_features = _embed(
            model.encode_text,
            caption_loader(captions, tokenizer=model.tokenizer, batch_size=batch_size),
            device,
            "captions",
            progress,
        )
    return retrieval_metrics(text_features, image_features, caption_ids, image_ids)


def _embed(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], device: torch.device, name: str, progress: bool
) -> Tensor:
    bar = tqdm(batches, desc=f"embedding {name}", unit="batch", leave=False, disable=None if progress else True)
    return torch.cat([encode(batch.to(device, non_blocking=True)).float() for batch in bar])
