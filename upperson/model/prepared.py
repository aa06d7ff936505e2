"""What the blocks of a tower compute with, made for all of them at once at the beginning of a forward pass.

A block on its own merges, scales and casts its small trained tensors by some ten operators, and casts its frozen
weights in every step. A GPU computes these operators faster than they are launched. Here the tensors of all blocks are
stacked, computed by one operator, and unstacked. Frozen weights are kept in the dtype of the computation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from upperson_kernels.backend import in_transform

from upperson.model.block import NOTHING, Block, Prepared
from upperson.petl import LoRA


def keep_frozen_weights(blocks: Sequence[Block], dtype: torch.dtype) -> Tensor | None:
    """Casts the frozen weights and biases of the blocks' products to `dtype` in place.

    Returns the packed projections of all blocks as one tensor (blocks, 3 C, C), of which the blocks' own are then
    parts; None if they are trained.
    """
    for block in blocks:
        for parameter in (*block.attn.parameters(), *block.mlp.parameters()):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    projections: list[Any] = [block.attn.in_proj_weight for block in blocks]
    if any(projection.requires_grad for projection in projections):
        return None
    stacked = torch.stack([projection.data for projection in projections])
    for projection, part in zip(projections, stacked, strict=True):
        projection.data = part
    return stacked


def prepare(blocks: Sequence[Block], projections: Tensor | None, dtype: torch.dtype) -> list[Prepared]:
    """For each block what it would compute from its trained modules, in `dtype`.

    `projections`, from keep_frozen_weights, are those into which LoRA is merged; None: the blocks merge it themselves.
    """
    found = [NOTHING._asdict() for _ in blocks]

    def modules_of(kind: str) -> tuple[range, list[Any]]:
        """The modules of a kind, of blocks in a row from the first one that has it."""
        places = [i for i, block in enumerate(blocks) if block.adapted and getattr(block, kind) is not None]
        row = range(places[0], places[-1] + 1) if places else range(0)
        return (row, [getattr(blocks[i], kind) for i in row]) if len(row) == len(places) else (range(0), [])

    with torch.autocast(blocks[0].ln_1.weight.device.type, enabled=False):
        row, loras = modules_of("lora")
        low_rank = blocks[0].low_rank_gradients and not in_transform()
        if loras and projections is not None and type(loras[0]) is LoRA and low_rank:
            for i, merged in zip(row, LoRA.merge(loras, projections[row.start : row.stop]), strict=True):
                found[i]["projection"] = merged
        row, prefixes = modules_of("prefix")
        if prefixes:
            columns = type(prefixes[0]).columns_of(prefixes, blocks[0].attn.num_heads, dtype)
            for i, pair in zip(row, columns, strict=True):
                found[i]["prefix"] = pair
        for kind in ("adapter_attn", "adapter_mlp"):
            row, adapters = modules_of(kind)
            if adapters and hasattr(adapters[0], "down_weight"):
                down, up = (
                    torch.stack([getattr(adapter, name) for adapter in adapters]).to(dtype).unbind()
                    for name in ("down_weight", "up_weight")
                )
                for i, *pair in zip(row, down, up, strict=True):
                    found[i][kind] = tuple(pair)
    return [Prepared(**fields) for fields in found]
