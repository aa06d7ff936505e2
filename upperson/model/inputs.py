"""Checks of what a user passes to a model: images and token ids.

Shapes and dtypes are compared always, but shapes not in a trace, which has none to compare. Values are compared where
this costs nothing that matters: on a CPU, outside of compilers, traces and transforms. A GPU would have to be waited
for.
"""

from typing import Any

import torch
from torch import Tensor
from upperson_kernels.backend import runs_plainly

from upperson.model.captions import PackedCaptions

TOKEN_DTYPES = (torch.int64, torch.int32)


def check_images(images: Any, size: tuple[int, int], dtype: torch.dtype | None) -> None:
    """Raises TypeError or ValueError unless images are finite numbers (B, 3, H, W).

    size: height and width. dtype: that of the first weights; None: unknown.
    """
    advice = "model.preprocess makes them from an image"
    expected = f"a floating-point tensor of shape (B, 3, {size[0]}, {size[1]})"
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected {expected}, found a {type(images).__name__}; {advice}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected {expected}, found {dtype_name(images)}; {advice}")
    # Turned images have as many patches, at wrong positions.
    if not tracing() and (images.dim() != 4 or images.shape[1:] != (3, *size)):
        raise ValueError(f"images: expected {expected}, found {tuple(images.shape)}; {advice}")
    if not torch.compiler.is_compiling() and images.shape[0] == 0:  # a graph with any B has no such case
        raise ValueError("images: expected at least one image, found a batch of none")
    converted = torch.is_autocast_enabled(images.device.type) and images.dtype != torch.float64  # which stays
    if dtype not in (None, images.dtype) and not converted:
        raise TypeError(
            f"images: expected {str(dtype).removeprefix('torch.')} as of the model's weights, found "
            f"{dtype_name(images)}; images.to(dtype) or torch.autocast converts them"
        )
    # A sum is finite if all numbers are; the reverse holds for numbers that are not huge.
    if has_values(images) and not images.detach().sum().isfinite() and not images.isfinite().all():
        wrong = int((~images.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"images: expected finite numbers; image {wrong} has NaN or infinity")


def check_captions(captions: Any, longest: int, vocabulary: int, end: int | None) -> None:
    """Raises TypeError or ValueError unless captions are packed, or token ids (B, L) of int64 or int32.

    longest: the largest L. vocabulary: the number of token ids. end: the id that each caption needs; None: no such id.
    """
    advice = "model.tokenizer makes them from a list of texts"
    if isinstance(captions, PackedCaptions):
        ids, end = captions.token_ids, None
    else:
        ids, expected = captions, f"token ids of shape (B, L) in int64, with L from 1 to {longest}"
        if not isinstance(ids, Tensor):
            raise TypeError(f"captions: expected {expected}, found a {type(ids).__name__}; {advice}")
        if ids.dtype not in TOKEN_DTYPES:
            raise TypeError(f"captions: expected {expected}, found {dtype_name(ids)}; {advice}")
        if not tracing() and (ids.dim() != 2 or not 1 <= ids.shape[1] <= longest):
            raise ValueError(f"captions: expected {expected}, found {tuple(ids.shape)}; {advice}")
    if not ids.numel() or not has_values(ids):
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise ValueError(f"captions: expected token ids from 0 to {vocabulary - 1}, found {wrong}; {advice}")
    if end is not None and not (ended := (ids == end).any(1)).all():
        wrong = int((~ended).nonzero()[0])
        raise ValueError(f"captions: expected the end token {end} in each caption; caption {wrong} has none; {advice}")


def tracing() -> bool:
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def has_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read at once: it is on a CPU, and nothing records the operations."""
    return runs_plainly((tensor,)) and tensor.device.type == "cpu"


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
