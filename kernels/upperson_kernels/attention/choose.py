"""Which kernels run for a call, and how they cut tokens and prefix.

    resident.py     16-bit tensors, heads of 64, sequences of equal length with at most 256 columns (tokens and prefix),
                    128 if causal, of which at most 32 are a prefix's: forward and backward on Hopper and data-centre
                    Blackwell, whose matrix units take operands from shared memory
    device.py       everything else: longer sequences, packed ones, other head widths, float32, other GPUs

The pieces of the resident kernels were chosen by counting instructions, registers and shared memory of compiled code.
None spills with Triton 3.6 or 3.8. With 3.9 the longest do on Hopper, by at most 64 bytes of a thread that are stored
and loaded once. `python bench/resources.py --every-length` compiles all choices, and tests/test_compile.py those of
CLIP's lengths. Beyond the bounds, with more masked columns, some spill more.
Block sizes of device.py are in tiles.py.
"""

import functools
from typing import Any

MOST_COLUMNS, MOST_CAUSAL_COLUMNS, MOST_PREFIX = 256, 128, 32
HEAD_WIDTH = 64
PIECE = 64  # queries of a full piece in backward


def is_resident(
    length: int, prefix: int, width: int, element_size: int, capability: int, *, causal: bool, packed: bool
) -> bool:
    """Whether the resident kernels run.

    Args:
        length, prefix: tokens of the longest sequence, and prefix columns.
        width: of a head.
        element_size: bytes of an element of qkv.
        capability: compute capability as a number, such as 90.
        causal, packed: whether attention is causal, and whether sequences are packed.
    """
    most = MOST_CAUSAL_COLUMNS if causal else MOST_COLUMNS
    fits = length + prefix <= most and prefix <= MOST_PREFIX and width == HEAD_WIDTH and element_size == 2
    return fits and not packed and 90 <= capability < 120


@functools.cache
def forward_pieces(length: int, prefix: int, causal: bool, capability: int) -> dict[str, Any]:
    """Constants and launch options of resident.forward_kernel.

    Up to three pieces, powers of two, of the least padded sum. A masked column costs half as much again as a plain one,
    and each further piece as much as 16 columns.
    """

    def cost(widths: tuple[int, ...]) -> float:
        masked = sum(width for width, plain in zip(widths, plain_pieces(widths, length), strict=True) if not plain)
        return sum(widths) + masked / 2 + 16 * sum(width > 0 for width in widths)

    choices = [
        (first, second, third)
        for first in (16, 32, 64, 128)
        for second in (0, 16, 32, 64, 128)
        for third in (0, 16, 32, 64)
        if first >= second >= third and first + second + third >= length + prefix
    ]
    widths = min(choices, key=lambda widths: (cost(widths), widths))
    return dict(
        FIRST=widths[0],
        SECOND=widths[1],
        THIRD=widths[2],
        PLAIN=0 if causal else sum(plain_pieces(widths, length)),
        CORRECTED=length + prefix > 128,
        BLOCK_M=64,
        num_warps=4 if capability < 100 else 8,
        num_stages=1,
        enable_fp_fusion=True,
    )


def plain_pieces(widths: tuple[int, ...], length: int) -> list[bool]:
    """Which pieces are full of tokens."""
    ends = [sum(widths[: number + 1]) for number in range(len(widths))]
    return [width > 0 and end <= length for width, end in zip(widths, ends, strict=True)]


@functools.cache
def backward_pieces(length: int, prefix: int) -> dict[str, Any] | None:
    """Constants and launch options of resident.backward_kernel; None where not even one tile is full of tokens."""
    columns = length + prefix
    block, tiles = (64, 1) if columns <= 64 else (64, 2) if columns <= 128 else (128, 2)
    if length < block * (tiles - 1):
        return None
    full = (length - 1) // PIECE
    last = max(16, 1 << (length - PIECE * full - 1).bit_length())
    return dict(
        BLOCK_N=block,
        TILES=tiles,
        PIECE=PIECE,
        FULL=full,
        LAST=last,
        num_warps=8 if block == 128 else 4,
        num_stages=1,
        enable_fp_fusion=True,
    )
