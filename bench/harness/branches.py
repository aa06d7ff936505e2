"""How often programs take the loops of the kernels that are not as long as their tiles: for counts of instructions.

Branches and their loops are in the order of the source, which compiled code keeps.
"""

import torch
import triton
from upperson_kernels import tiles
from upperson_kernels.adapter import launch as adapter
from upperson_kernels.attention import launch as attention

from harness.sass import Branch

Branches = dict[str, list[Branch]]  # by kernel


def attention_branches(
    length: int, prefix: int, width: int, element_size: int, capability: int, causal: bool, packed: bool, samples: int
) -> Branches:
    """Of attention's kernels, for sequences of one length."""
    found = {
        "attention.resident.forward_kernel": [Branch((triton.cdiv(length, 64),))],
        "attention.device.prefix_gradient_kernel": [
            Branch((triton.cdiv(samples, attention.PREFIX_BLOCKS["STEP"]),)),
        ],
    }
    for mode in ("forward", "backward"):
        chosen = tiles.choose(f"attention_{mode}", width, element_size, capability)
        rows, columns = chosen["BLOCK_M"], chosen["BLOCK_N"]
        last = attention.last_tiles(length, prefix, packed, rows, columns)
        queries = query_branches(length, prefix, causal, rows, columns, **last)
        own = column_branches(length, prefix, causal, rows, columns, **last) if mode == "backward" else []
        programs = triton.cdiv(length, rows) + (triton.cdiv(length + prefix, columns) if own else 0)
        found[f"attention.device.{mode}_kernel"] = [
            Branch(tuple(sum(steps) / max(1, len(steps)) for steps in zip(*walks, strict=True)), len(walks) / programs)
            if walks
            else Branch((0.0,) * loops, 0.0)
            for loops, walks in [*queries, *own]
        ]
    return found


def query_branches(
    length: int, prefix: int, causal: bool, rows: int, columns: int, LAST_M: int, LAST_N: int, MIXED_TILES: bool
) -> list[tuple[int, list[tuple[int, ...]]]]:
    """For each branch of the programs that own queries: how many loops it has, and their steps in each program."""
    plain = min(length // columns, (length + prefix - 1) // columns)
    mixed = triton.cdiv(length + prefix, columns) - plain - (columns > LAST_N)

    def walk(start: int, size: int) -> tuple[int, ...]:
        seen = min(plain, triton.cdiv(start + size, columns)) if causal else plain
        return (seen, mixed) if MIXED_TILES else (seen,)

    starts = range(0, length, rows)
    full = starts[:-1] if rows > LAST_M else starts
    branches = [[walk(starts[-1], LAST_M)]] if rows > LAST_M else []
    return [(1 + MIXED_TILES, walks) for walks in [*branches, [walk(start, rows) for start in full]]]


def column_branches(
    length: int, prefix: int, causal: bool, rows: int, columns: int, LAST_M: int, LAST_N: int, MIXED_TILES: bool
) -> list[tuple[int, list[tuple[int, ...]]]]:
    """The same for the programs that own columns: of tokens alone, of the last tile, of tokens and prefix."""
    tiles_of_columns = triton.cdiv(length + prefix, columns)
    plain = min(length // columns, (length + prefix - 1) // columns)
    half, last_half = rows // 2, min(LAST_M, rows // 2)

    def walk(block: int, last: int, begin: int = 0) -> tuple[int]:
        end = length if last == block else (length - 1) // block * block
        return (max(0, triton.cdiv(end - begin // block * block, block)),)

    plain_sizes = (half, last_half) if causal else (rows, LAST_M)
    branches = [[walk(*plain_sizes, causal * columns * number) for number in range(plain)]]
    if columns > LAST_N:
        branches.append([walk(half, last_half)])
    if MIXED_TILES:
        branches.append([walk(half, last_half)] * (tiles_of_columns - plain - (columns > LAST_N)))
    return [(1, walks) for walks in branches]


def adapter_branches(rows: int, width: int, hidden: int, own_norm: bool, dtype: torch.dtype) -> Branches:
    """Of the adapter's kernels: walks over the width, over a share of the rows, and over the shares."""
    x = torch.empty(0, dtype=dtype)
    over_width = triton.cdiv(width, adapter.row_tiles(x, rows, hidden)["BLOCK_C"])
    chosen = tiles.choose("adapter_parameters", hidden, x.element_size(), adapter.capability(x))
    blocks, shares = triton.cdiv(rows, chosen["BLOCK_T"]), adapter.shares_of(x, rows, width, chosen)
    return {
        "adapter.device.forward_kernel": [Branch((over_width,) * (2 + own_norm))],
        "adapter.device.input_gradient_kernel": [Branch((over_width, over_width))],
        "adapter.device.parameter_gradient_kernel": [Branch((triton.cdiv(blocks, shares),))],
        "adapter.device.finish_kernel": [Branch((shares,))],
    }
