"""Packed captions, one after the other and without padding, since most tokens of a padded batch are padding."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedCaptions:
    """S captions with T tokens in total, each from its start token (with prompts: first word) to its end token."""

    token_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, position of each token in its caption
    cu_seqlens: Tensor  # (S + 1,) int32: caption i has the tokens cu_seqlens[i] to cu_seqlens[i + 1]
    longest: int  # number of tokens in the longest caption
    first_position: int  # position of each caption's first token: 0, or behind the prompts

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedCaptions":
        return replace(
            self,
            token_ids=self.token_ids.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "PackedCaptions":
        """The same captions in pinned memory; a DataLoader calls this."""
        return replace(
            self,
            token_ids=self.token_ids.pin_memory(),
            positions=self.positions.pin_memory(),
            cu_seqlens=self.cu_seqlens.pin_memory(),
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """As Tensor.record_stream: the memory is not reused before `stream` has finished its work with the tensors."""
        for tensor in (self.token_ids, self.positions, self.cu_seqlens):
            tensor.record_stream(stream)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1


@dataclass(frozen=True)
class CaptionPacker:
    """Converts token ids to the input of the text tower. A loader can use and pickle this object.

    Args:
        packs: whether captions are packed; otherwise they stay padded.
        first_position: position of a caption's first token: 0, or the position behind the prompts.
        room: number of positions from the first token on.
    """

    packs: bool
    first_position: int
    room: int

    def __call__(self, tokens: Tensor) -> Tensor | PackedCaptions:
        """Token ids (B, L) int64 -> packed captions, or the ids themselves."""
        return pack_captions(self.words_seen(tokens), self.first_position) if self.packs else tokens

    def words_seen(self, tokens: Tensor) -> Tensor:
        """The token ids of (B, L) that are computed for each caption.

        With prompts these are the words without the start token, truncated to the available positions.
        """
        return words_of(tokens, self.room) if self.first_position else tokens


def words_of(tokens: Tensor, room: int) -> Tensor:
    """Captions (S, L) int64 without their start token, truncated to `room` tokens including the end token."""
    ends, words = tokens.amax(1), tokens[:, 1 : 1 + room]
    if tokens.shape[1] > 1 + room:
        cut = tokens.argmax(1) > room
        words = torch.cat([words[:, :-1], ends.where(cut, words[:, -1]).unsqueeze(1)], 1)
    return words


def pack_captions(tokens: Tensor, first_position: int = 0) -> PackedCaptions:
    """Packs padded captions (S, L) int64, whose first tokens are at `first_position`.

    The end token has the largest id, as everywhere in CLIP. Packing on a GPU waits for the GPU. A loader therefore
    packs on the CPU, before the tokens are copied.
    """
    ends = tokens.argmax(1)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    kept = positions <= ends[:, None]
    cu_seqlens = torch.zeros(len(tokens) + 1, dtype=torch.int32, device=tokens.device)
    cu_seqlens[1:] = (ends + 1).cumsum(0)
    longest = int(ends.max()) + 1 if len(tokens) else 0
    return PackedCaptions(tokens[kept], first_position + positions[kept], cu_seqlens, longest, first_position)
