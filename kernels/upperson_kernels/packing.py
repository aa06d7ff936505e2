"""Packed sequences: rows of all sequences one after the other in a (T, …) tensor, with offsets between them."""

import torch
from torch import Tensor


def unpack_sequences(packed: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed rows as a padded tensor, and where each row is in it.

    Args:
        packed: (T, …).
        cu_seqlens: (S + 1,) int32, the offsets: sequence i has the rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: rows of the longest sequence, or more.

    Returns:
        (S, max_seqlen, …) with zeros after shorter sequences; the sequence of each row and its position there, (T,)
        int64 each. The device is not waited for.
    """
    row = torch.arange(packed.shape[0], device=packed.device)
    sequence = torch.bucketize(row, cu_seqlens[1:], right=True)
    position = row - cu_seqlens[sequence]
    padded = packed.new_zeros(cu_seqlens.shape[0] - 1, max_seqlen, *packed.shape[1:])
    return padded.index_put((sequence, position), packed), sequence, position
