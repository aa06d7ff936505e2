"""How prompts enter the towers without being computed once a sample.

A layer's prompts take the place of m tokens before its block, the same ones for all samples. Where the next layer
replaces them again, what the block makes of them is thrown away: of the prompts only the keys and values count, and
those enter the attention as a prefix with λ = 1, computed once a batch.

The text tower is causal: a caption's start token sees itself alone and is the same for all captions; prompts stand
behind it and see nothing else but each other. So the start token and the prompts are one short sequence for the whole
batch, which the words of all captions see as their prefix, in every block.

In the image tower the last prompts, where there are layers without, run on unreplaced and see the image: from their
block on they are tokens of each image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from upperson.model.block import Block, Sequences, Stream


def run_images(blocks: Sequence[Block], x: Tensor, rows: Sequence[Tensor], read: Tensor | None) -> Tensor:
    """The output of the last block for images x (B, N, C), or of their tokens `read` (B,) alone, (B, C).

    rows: the prompts (m, C) of layers 0, 1, …, of as many blocks or of fewer.
    """
    length, stream = x.shape[1], Stream(x)
    tokens_from = len(blocks) if len(rows) == len(blocks) else len(rows) - 1  # this block on
    for i, block in enumerate(blocks):
        if i == tokens_from:
            x = stream.total()
            stream = Stream(torch.cat([x, rows[i].to(x.dtype).expand(len(x), -1, -1)], 1))
        last = i == len(blocks) - 1
        stream = block(stream, read=read if last else None, shared=rows[i] if i < tokens_from else None)
    return stream.total() if read is not None else stream.total()[:, :length]


def run_captions(
    blocks: Sequence[Block],
    start: Tensor,
    x: Tensor,
    rows: Sequence[Tensor],
    sequences: Sequences | None,
    read: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The output of the last block for captions without their start token, (B, N, C) or packed (T, C), and of the start
    token, (1, C). With `read`, of these tokens of the captions alone, (B, C), and None.

    start: the start token (1, C), in the first layer. rows: as above.
    """
    stream, shared = Stream(x), torch.cat([start, rows[0].to(start.dtype)])  # (1 + m, C)
    for i, block in enumerate(blocks):
        if i == len(blocks) - 1 and read is not None:
            return block(stream, sequences, read, shared).total(), None
        stream = block(stream, sequences, None, shared)
        if i + 1 < len(rows):  # these prompts have served
            start = block(Stream(shared[:1].unsqueeze(0))).total().squeeze(0)
            shared = torch.cat([start, rows[i + 1].to(start.dtype)])
        else:
            shared = block(Stream(shared.unsqueeze(0))).total().squeeze(0)
    return stream.total(), shared[:1]
