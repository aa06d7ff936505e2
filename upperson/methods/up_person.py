"""UP-Person (arXiv 2504.10084): salable prefixes, LoRA and L-Adapters in every block of a frozen CLIP.

The options also cover the variants that the paper's tables compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from upperson.fields import option
from upperson.methods.method import Method, Place, require_room

if TYPE_CHECKING:
    from torch import nn

    from upperson.methods.method import Towers

AdapterKind = Literal["l-parallel", "l-sequential", "parallel", "sequential", "ln-tuning", "none"]
PLACES = (
    "beside LayerNorm (L-Adapter), after LayerNorm, beside the attention, after the attention, LayerNorm's own gain "
    "and bias, or none"
)
TITLES = {
    "salable": "S-Prefix", "vanilla": "prefix", "lora": "LoRA", "dora": "DoRA", "wora": "WoRA",
    "l-parallel": "L-Adapter", "l-sequential": "sequential L-Adapter", "parallel": "parallel adapter",
    "sequential": "sequential adapter", "ln-tuning": "LN-tuning",
}  # fmt: skip


@dataclass(frozen=True)
class UPPerson(Method):
    """Options of the modules in each block. Depths count blocks from the input."""

    name: ClassVar[str] = "up-person"

    prefix: Literal["salable", "vanilla", "none"] = option(
        "salable",
        "prefix in the attention: with a learnable λ (S-Prefix), without λ (prefix tuning), or none",
        added=True,
    )
    prefix_length: int = option(10, "number P of prefix tokens in a block of each tower", at_least=1, at_most=1000)
    prefix_scale: float = option(
        10.0, "initial value of the learnable λ of the salable prefix", at_least=-1e6, at_most=1e6
    )
    scale_target: Literal["weights", "logits"] = option(
        "weights", "target of λ: the prefix's attention weights (the paper's Eq. 15) or its logits"
    )
    lora: Literal["lora", "dora", "wora", "none"] = option(
        "lora", "low-rank update of the key and value projections: LoRA, DoRA, WoRA, or none", added=True
    )
    lora_rank: int = option(32, "rank of the low-rank update", at_least=1, at_most=4096)
    adapter_attn: AdapterKind = option("l-parallel", f"adapter at the attention: {PLACES}", added=True)
    adapter_mlp: AdapterKind = option("l-parallel", "adapter at the MLP, of the same kinds", added=True)
    adapter_reduction: int = option(8, "tower width / adapter width", at_least=1, at_most=100_000)
    depth_prefix: int | None = option(
        None, "number of first blocks with a prefix; none: all blocks", at_least=0, at_most=1000
    )
    depth_lora: int | None = option(
        None, "number of first blocks with LoRA; none: all blocks", at_least=0, at_most=1000
    )
    depth_adapter: int = option(0, "number of first blocks without adapters", at_least=0, at_most=1000)

    @property
    def kinds(self) -> tuple[str, str]:
        """The kinds of prefix and low-rank update that blocks have: "none" also for a depth of no block."""
        return "none" if self.depth_prefix == 0 else self.prefix, "none" if self.depth_lora == 0 else self.lora

    @property
    def title(self) -> str:
        parts = [TITLES[kind] for kind in self.kinds if kind != "none"]
        adapters = [self.adapter_attn, self.adapter_mlp]
        if adapters[0] == adapters[1]:
            parts += [TITLES[kind] for kind in adapters[:1] if kind != "none"]
        else:
            places = zip(adapters, ("attention", "MLP"), strict=True)
            parts += [f"{TITLES[kind]} at the {place}" for kind, place in places if kind != "none"]
        return "UP-Person" if parts == ["S-Prefix", "LoRA", "L-Adapter"] else " + ".join(parts)

    def unread(self) -> dict[str, str]:
        found: dict[str, str] = {}
        prefix, lora = self.kinds
        if prefix == "none":
            found |= dict.fromkeys(("prefix_length", "prefix_scale", "scale_target"), "no block has a prefix")
        if prefix == "vanilla":
            found |= dict.fromkeys(("prefix_scale", "scale_target"), "a vanilla prefix has no λ")
        if lora == "none":
            found |= dict.fromkeys(("lora_rank", "low_rank_gradients"), "no block has a low-rank update")
        for field, kind in (("depth_prefix", self.prefix), ("depth_lora", self.lora)):
            if kind == "none":
                found[field] = f"{field.removeprefix('depth_')} is none"
        if lora == "wora":
            found["low_rank_gradients"] = "WoRA needs the gradient of the whole weight"
        adapters = {self.adapter_attn, self.adapter_mlp}
        if adapters <= {"none", "ln-tuning"}:
            found["adapter_reduction"] = "no adapter has a bottleneck"
        if adapters == {"none"}:
            found["depth_adapter"] = "there are no adapters"
        return found

    @classmethod
    def sweeps(cls, synthetic: bool) -> dict[str, dict[str, dict[str, Any]]]:
        """The axes of the paper's Figure 6."""
        values: dict[str, tuple[int, ...]] = {
            "lora_rank": (2, 4, 8, 16) if synthetic else (8, 16, 32, 64),
            "prefix_length": (1, 2, 4, 8) if synthetic else (2, 6, 10, 14, 18),
            "adapter_reduction": (2, 4, 8, 16) if synthetic else (4, 8, 16, 32),
        }
        return {field: {str(value): {field: value} for value in numbers} for field, numbers in values.items()}

    def modules(self, towers: Towers) -> dict[Place, nn.Module]:
        """LoRA and prefix in blocks i < depth, adapters in blocks i ≥ depth."""
        from upperson.petl import ADAPTERS, LOW_RANK, PREFIXES  # a late import: options do not need torch

        modules: dict[Place, nn.Module] = {}
        for tower, blocks in towers.items():
            width = blocks[0].attn.embed_dim
            for field in ("depth_prefix", "depth_lora", "depth_adapter"):
                require_room(tower, field, getattr(self, field), len(blocks))
            require_room(tower, "adapter_reduction", self.adapter_reduction, width, "the width")
            depth_prefix = len(blocks) if self.depth_prefix is None else self.depth_prefix
            depth_lora = len(blocks) if self.depth_lora is None else self.depth_lora
            for i, block in enumerate(blocks):
                if self.prefix != "none" and i < depth_prefix:
                    modules[Place(tower, i, "prefix")] = PREFIXES[self.prefix](
                        self.prefix_length, width, self.prefix_scale, self.scale_target
                    )
                if self.lora != "none" and i < depth_lora:
                    modules[Place(tower, i, "lora")] = LOW_RANK[self.lora](self.lora_rank, block.attn.in_proj_weight)
                for position, kind, norm in (
                    ("adapter_attn", self.adapter_attn, block.ln_1),
                    ("adapter_mlp", self.adapter_mlp, block.ln_2),
                ):
                    if kind != "none" and i >= self.depth_adapter:
                        modules[Place(tower, i, position)] = ADAPTERS[kind](norm, width // self.adapter_reduction)
        return modules

    def without(self, kinds: Iterable[str]) -> UPPerson:
        """The same method with the option of each merged kind set to "none"."""
        own = ("prefix", "lora", "adapter_attn", "adapter_mlp")
        return replace(self, **{kind: "none" for kind in kinds if kind in own})
