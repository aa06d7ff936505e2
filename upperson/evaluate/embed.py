"""The features of a split, and retrieval in both directions, text → image and image → text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from upperson.data import ImageCache, Sample, caption_loader, gallery, image_loader, queries
from upperson.evaluate.metrics import Retrieval, retrieval_metrics
from upperson.machine import SINGLE_PROCESS, Group, autocast
from upperson.model import AdaptedCLIP


@dataclass(frozen=True)
class Embeddings:
    """The features of G distinct images and Q captions, of E dimensions and not normalised, and their person ids."""

    image_features: Tensor  # (G, E) float32, in the order of upperson.data.gallery
    text_features: Tensor  # (Q, E) float32, in the order of upperson.data.queries
    image_person_ids: Tensor  # (G,) int64
    caption_person_ids: Tensor  # (Q,) int64

    def text_to_image(self) -> Retrieval:
        """Ranks the images for every caption; images of its person match. Raises RetrievalError."""
        return retrieval_metrics(
            self.text_features, self.image_features, self.caption_person_ids, self.image_person_ids
        )

    def image_to_text(self) -> Retrieval:
        """Ranks the captions for every image; captions of its person match. Raises RetrievalError."""
        return retrieval_metrics(
            self.image_features, self.text_features, self.image_person_ids, self.caption_person_ids
        )


@torch.inference_mode()
def embed(
    model: AdaptedCLIP,
    samples: Sequence[Sample],
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    progress: bool = True,
    group: Group = SINGLE_PROCESS,
    cache: ImageCache | None = None,
) -> Embeddings:
    """The features of the captions of `samples` and of their distinct images, computed on the model's device.

    Args:
        model: model on any device; compiled blocks run eagerly.
        samples: one sample for each caption.
        batch_size: number of images or captions embedded at once.
        workers: number of processes that load images.
        precision: "fp32", "bf16" or "fp16".
        progress: whether a progress bar is shown.
        group: processes that embed one share each; all of them get all features.
        cache: image cache to read instead of image files.

    Raises DataError for an image that cannot be read.
    """
    images, image_person_ids = gallery(samples)
    captions, caption_person_ids = queries(samples)
    device = next(model.parameters()).device
    own_images = image_loader(
        group.own(images),
        preprocess=model.preprocess,
        batch_size=batch_size,
        workers=workers,
        cache=cache,
    )
    own_captions = caption_loader(
        group.own(captions), tokenizer=model.tokenizer, batch_size=batch_size, pack=model.caption_packer()
    )

    def features(encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], name: str) -> Tensor:
        shown = None if progress and group.is_main else True
        bar = tqdm(batches, desc=f"embedding {name}", unit="batch", leave=False, disable=shown)
        none = torch.empty(0, model.embedding_width, device=device)  # a share may be empty
        return torch.cat([none, *(encode(batch.to(device, non_blocking=True)).float() for batch in bar)])

    with autocast(device, precision), torch.compiler.set_stance("force_eager"):
        image_features = features(model.encode_image, own_images, "images")
        text_features = features(model.encode_text, own_captions, "captions")
    image_features = group.gather(image_features, len(images))
    text_features = group.gather(text_features, len(captions))
    if device.type == "mps":  # mps has no float64, and the metrics are averaged in float64
        image_features, text_features = image_features.cpu(), text_features.cpu()
    return Embeddings(image_features, text_features, image_person_ids, caption_person_ids)


def evaluate(model: AdaptedCLIP, samples: Sequence[Sample], **options: Any) -> Retrieval:
    """Ranks the distinct images of `samples` for every caption of `samples`; `options` are those of `embed`.

    `top` of the result contains indices in the order of `upperson.data.gallery`. Raises DataError and RetrievalError.
    """
    return embed(model, samples, **options).text_to_image()
