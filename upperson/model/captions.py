"""Captions one behind the other, without padding: what the text tower computes when nothing is computed in vain."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedCaptions:
    """S captions of T tokens in all, each to its end token, from its start token or, with prompts, its first word."""

    token_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, of each token in its caption
    cu_seqlens: Tensor  # (S + 1,) int32: caption i is tokens cu_seqlens[i] to cu_seqlens[i + 1]
    longest: int  # tokens of the longest caption
    first_position: int  # of each caption's first token: 0, or behind the prompts

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedCaptions":
        tensors = (self.token_ids, self.positions, self.cu_seqlens)
        return PackedCaptions(
            *(tensor.to(device, non_blocking=non_blocking) for tensor in tensors), self.longest, self.first_position
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """As of tensors: their memory is not used again before `stream` is done with it."""
        for tensor in (self.token_ids, self.positions, self.cu_seqlens):
            tensor.record_stream(stream)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1


def words_of(tokens: Tensor, room: int) -> Tensor:
    """Captions (S, L) int64 without their start token, and cut to `room` tokens, of which the last is the end token."""
    ends, words = tokens.amax(1), tokens[:, 1 : 1 + room]
    if tokens.shape[1] > 1 + room:
        cut = tokens.argmax(1) > room
        words = torch.cat([words[:, :-1], ends.where(cut, words[:, -1]).unsqueeze(1)], 1)
    return words


def pack_captions(tokens: Tensor, first_position: int = 0) -> PackedCaptions:
    """Packs padded captions (S, L) int64. The end token is the one with the largest id, as everywhere in CLIP.

    Their first tokens are at `first_position`.

    On a GPU this waits for the tokens; on the CPU, before they are copied, it does not.
    """
    ends = tokens.argmax(1)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    kept = positions <= ends[:, None]
    cu_seqlens = torch.zeros(len(tokens) + 1, dtype=torch.int32, device=tokens.device)
    cu_seqlens[1:] = (ends + 1).cumsum(0)
    longest = int(ends.max()) + 1 if len(tokens) else 0
    return PackedCaptions(tokens[kept], first_position + positions[kept], cu_seqlens, longest, first_position)
