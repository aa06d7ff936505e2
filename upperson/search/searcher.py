"""The model of a gallery: features of images and sentences, and what tells one model from another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upperson.config import Config
from upperson.data.images import load_pixels
from upperson.errors import SearchError
from upperson.files import is_unicode
from upperson.machine import autocast, device_and_precision
from upperson.model.adapted_clip import require_backend
from upperson.model.checkpoint import build_model, load_checkpoint
from upperson.model.weights import fingerprint
from upperson.search.store import FORMAT

ALIKE = 1e-6  # a query shorter than this has no direction


class Searcher:
    """The model of a checkpoint on a device. Threads may compute at once."""

    def __init__(self, checkpoint: Path, device: str):
        loaded = load_checkpoint(checkpoint)
        self.config: Config = loaded.config
        try:
            self.config.replace(device=device)
        except ValueError as error:
            raise SearchError(str(error)) from error
        found, self.precision = device_and_precision(device, "auto")
        backend = self.config.model.backend
        if found.type != "cuda" and backend == "triton":
            backend = "auto"  # the model was trained on a GPU
        require_backend(backend, found)
        self.model = build_model(loaded, backend=backend).to(found).eval()
        self.device, self.checkpoint = found, checkpoint
        preprocess, method = self.model.preprocess, self.config.model.method
        options = json.dumps({"name": method.name, **asdict(method)}, default=str, sort_keys=True)
        self.identity = {
            "checkpoint": short(fingerprint(loaded.parameters)),
            "method": options,
            "backbone": short(self.model.fingerprint),
            "image size": " × ".join(map(str, preprocess.image_size)),
            "preprocessing": f"mean {list(preprocess.mean)}, standard deviation {list(preprocess.std)}",
        }

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> np.ndarray:
        """(B, 3, H, W) uint8 -> (B, E) float32, normalised. Raises SearchError for features that are not finite."""
        images = self.model.preprocess.normalise(pixels.to(self.device, non_blocking=True))
        with autocast(self.device, self.precision):
            features = self.model.encode_image(images)
        return self.normalised(features)

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return self.encode_pixels(
            torch.stack([load_pixels(image, self.model.preprocess.image_size) for image in images])
        )

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(B, E) float32, normalised. Tokens beyond the model's length are cut off, as in evaluation."""
        tokens = self.model.tokenizer(list(texts)).to(self.device)
        with autocast(self.device, self.precision):
            features = self.model.encode_text(tokens)
        return self.normalised(features)

    def normalised(self, features: Tensor) -> np.ndarray:
        found = F.normalize(features.float()).cpu().numpy()
        if not np.isfinite(found).all():
            raise SearchError(f"{self.checkpoint}: the model's features are NaN or infinite")
        return found

    def settings(self, half: bool) -> dict[str, Any]:
        """The settings of a new index. Raises SearchError for a checkpoint whose path they cannot hold."""
        path = str(self.checkpoint.absolute())
        if not is_unicode(path):
            raise SearchError(f"{ascii(path)}: an index names its checkpoint; expected a path in UTF-8")
        return {
            "format": FORMAT,
            "dimensions": self.model.embedding_width,
            "dtype": "float16" if half else "float32",
            "checkpoint": path,
            "identity": self.identity,
        }

    def require_same(self, index: str, settings: Mapping[str, Any]) -> None:
        """Raises SearchError, with the fields that differ, if an index was made with another model."""
        before = settings["identity"]
        different = [
            f"{name}: {value}, not {before.get(name)}"
            for name, value in self.identity.items()
            if before.get(name) != value
        ]
        if different or settings["dimensions"] != self.model.embedding_width:
            raise SearchError(
                f"{index}: this index was made with another model than {self.checkpoint}; "
                f"{'; '.join(different) or 'another width of features'}; search it with --checkpoint "
                f"{settings['checkpoint']}, or index the images with this model into another --index"
            )


def combined(parts: np.ndarray, avoid: np.ndarray, weight: float, every: bool) -> np.ndarray:
    """(1, E), or with `every` (P, E): the directions of a query, of length 1.

    Args:
        parts: (P, E), the normalised features of sentences and images.
        avoid: (A, E), those of the words to avoid; their mean is subtracted, times `weight`.

    Raises SearchError if nothing is left.
    """
    queries = parts if every else parts.mean(0, keepdims=True)
    if len(avoid):
        queries = queries - weight * avoid.mean(0)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    if lengths.min() < ALIKE:
        raise SearchError("the query cancels itself out: what is searched equals what is avoided; change the words")
    return (queries / lengths).astype(np.float32)


def short(digest: str | None) -> str:
    return (digest or "unknown")[:16]
