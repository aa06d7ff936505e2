"""Inserts prompts into the towers, and computes them once per batch instead of once per sample.

A layer's prompts are m tokens before its block, the same for all samples. If the next layer replaces the prompts, the
block's outputs for them are not used. Only their keys and values matter. These enter the attention as a prefix with
λ = 1, which is computed once per batch.

The text tower is causal. A caption's start token attends only to itself and is the same for all captions. Prompts
follow the start token, and attend only to it and each other. The start token and the prompts are therefore one short
sequence for the whole batch, which is the prefix of all captions' words in every block.

In the image tower, if later layers have no prompts, the last prompts are not replaced and attend to the image: from
their block on they are tokens of each image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from upperson.model.block import Sequences, Stream


def run_images(
    blocks: Sequence[Callable[..., Stream]], x: Tensor, rows: Sequence[Tensor], read: Tensor | None
) -> Tensor:
    """The output of the last block for images x (B, N, C), or only for their tokens `read` (B,), (B, C).

    rows: the prompts (m, C) of layers 0, 1, …; at most one for each block.
    """
    length, stream = x.shape[1], Stream(x)
    tokens_from = len(blocks) if len(rows) == len(blocks) else len(rows) - 1  # first block with prompts as tokens
    for i, block in enumerate(blocks):
        if i == tokens_from:
            x = stream.total()
            stream = Stream(torch.cat([x, rows[i].to(x.dtype).expand(x.shape[0], -1, -1)], 1))
        last = i == len(blocks) - 1
        stream = block(stream, read=read if last else None, shared=rows[i] if i < tokens_from else None)
    return stream.total() if read is not None else stream.total()[:, :length]


def run_captions(
    blocks: Sequence[Callable[..., Stream]],
    start: Tensor,
    x: Tensor,
    rows: Sequence[Tensor],
    sequences: Sequences | None,
    read: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The output of the last block for captions without their start token, (B, N, C) or packed (T, C), and for the
    start token, (1, C). With `read`, the output of only these tokens of the captions, (B, C), and None.

    start: the start token (1, C) before the first block. rows: as in run_images.
    """
    stream, shared = Stream(x), torch.cat([start, rows[0].to(start.dtype)])  # (1 + m, C)
    for i, block in enumerate(blocks):
        if i == len(blocks) - 1 and read is not None:
            return block(stream, sequences, read, shared).total(), None
        stream = block(stream, sequences, None, shared)
        if i + 1 < len(rows):  # the next layer replaces these prompts
            start = block(Stream(shared[:1].unsqueeze(0))).total().squeeze(0)
            shared = torch.cat([start, rows[i + 1].to(start.dtype)])
        else:
            shared = block(Stream(shared.unsqueeze(0))).total().squeeze(0)
    return stream.total(), shared[:1]
