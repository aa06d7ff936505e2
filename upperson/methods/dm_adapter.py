"""DM-Adapter (Domain-Aware Mixture-of-Adapters for Text-Based Person Retrieval, AAAI 2025).

A mixture of adapters stands beside the MLP in every block of both towers. The released code counts 395,776 parameters
more as trained: task vectors of both towers beside those of the blocks, and a projection. Nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from upperson.fields import option
from upperson.methods.method import Method, Place, require_room

if TYPE_CHECKING:
    from torch import nn

    from upperson.methods.method import Towers


@dataclass(frozen=True)
class DMAdapter(Method):
    """Options of DM-Adapter. The defaults are the released code's values."""

    name: ClassVar[str] = "dm-adapter"

    experts: int = option(6, "number of adapters in a block", at_least=1, at_most=1000)
    chosen_experts: int = option(2, "number of adapters that a token chooses", at_least=1, at_most=1000)
    adapter_reduction: int = option(8, "tower width / adapter width", at_least=1, at_most=100_000)
    adapter_scale_image: float = option(
        0.1, "constant factor of the mixtures in the image tower", at_least=-1e6, at_most=1e6
    )
    adapter_scale_text: float = option(
        4.0, "constant factor of the mixtures in the text tower", at_least=-1e6, at_most=1e6
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen_experts > self.experts:
            raise ValueError(
                f"chosen_experts: {self.chosen_experts} is not allowed; it must be at most experts, which is "
                f"{self.experts}"
            )

    @property
    def title(self) -> str:
        return "DM-Adapter"

    @property
    def savings(self) -> tuple[str, ...]:
        """None: the balance loss counts padding, and every token of the last block."""
        return ()

    def unread(self) -> dict[str, str]:
        return {"low_rank_gradients": "DM-Adapter has no LoRA"}

    @classmethod
    def recipe(cls, synthetic: bool) -> dict[str, Any]:
        """The recipe of the released code; weight decay, schedule and temperature are UP-Person's."""
        losses = {"losses": "sdm+0.5*balance"}
        if synthetic:
            return losses | {"adapter_reduction": 4}
        return losses | {"learning_rate": 3e-4, "bias_learning_rate": 6e-4, "mask_captions": True}

    @classmethod
    def sweeps(cls, synthetic: bool) -> dict[str, dict[str, dict[str, Any]]]:
        return {
            "adapters in a block": {str(number): {"experts": number} for number in (2, 4, 6, 8, 12)},
            "adapters of a token, of six": {str(number): {"chosen_experts": number} for number in (1, 2, 3, 6)},
            "adapter width, of the tower's": {
                f"{1 / reduction:.2f}": {"adapter_reduction": reduction} for reduction in (32, 16, 8, 4)
            },
        }

    def modules(self, towers: Towers) -> dict[Place, nn.Module]:
        """A mixture in every block."""
        from upperson.petl import Mixture  # a late import: options do not need torch

        scales = {"image": self.adapter_scale_image, "text": self.adapter_scale_text}
        modules: dict[Place, nn.Module] = {}
        for tower, blocks in towers.items():
            width = blocks[0].attn.embed_dim
            require_room(tower, "adapter_reduction", self.adapter_reduction, width, "the width")
            for i, block in enumerate(blocks):
                modules[Place(tower, i, "adapter_mlp")] = Mixture(
                    block.ln_2, self.experts, self.chosen_experts, width // self.adapter_reduction, scales[tower]
                )
        return modules
