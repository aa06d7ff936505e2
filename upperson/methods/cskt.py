"""CSKT (arXiv 2309.09496): prompts coupled between the towers in both directions, adapters beside the MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from upperson.fields import option
from upperson.methods.method import Method, Place, require_room

if TYPE_CHECKING:
    from torch import nn

    from upperson.methods.method import Towers


@dataclass(frozen=True)
class CSKT(Method):
    """Options of CSKT. Each of its two parts can be disabled. The defaults are the released code's values."""

    name: ClassVar[str] = "cskt"

    prompts: bool = option(True, "prompts in both towers, each also projected into the other tower")
    prompt_length: int = option(
        4, "number n of a layer's own prompts; with those of the other tower, a layer has 2 n", at_least=1, at_most=1000
    )
    depth_prompt: int | None = option(
        None, "number of first layers with prompts; none: all layers of the shallower tower", at_least=1, at_most=1000
    )
    prompt_positions: bool = option(
        True, "text prompts take 2 n positions of the caption; its words move behind them and are truncated at the "
        "end; otherwise words keep their positions, and prompts have none"
    )  # fmt: skip
    adapters: bool = option(True, "an adapter with its own LayerNorm beside each MLP")
    adapter_reduction: int = option(8, "tower width / adapter width", at_least=1, at_most=100_000)
    adapter_scale_image: float = option(
        0.1, "constant factor of the adapters in the image tower", at_least=-1e6, at_most=1e6
    )
    adapter_scale_text: float = option(
        4.0, "constant factor of the adapters in the text tower", at_least=-1e6, at_most=1e6
    )

    @property
    def title(self) -> str:
        if self.prompts and self.adapters:
            return "CSKT"
        return "coupled prompts" if self.prompts else "CSKT's adapters" if self.adapters else "CSKT without its parts"

    @property
    def positions_taken(self) -> int:
        return 2 * self.prompt_length if self.prompts and self.prompt_positions else 0

    def unread(self) -> dict[str, str]:
        found = {"low_rank_gradients": "CSKT has no LoRA"}
        if not self.prompts:
            found |= dict.fromkeys(("prompt_length", "depth_prompt", "prompt_positions"), "there are no prompts")
        if not self.adapters:
            names = ("adapter_reduction", "adapter_scale_image", "adapter_scale_text")
            found |= dict.fromkeys(names, "there are no adapters")
        return found

    @classmethod
    def recipe(cls, synthetic: bool) -> dict[str, Any]:
        """The recipe of the released code; weight decay, schedule and temperature are UP-Person's."""
        if synthetic:
            return {"adapter_reduction": 4}
        return {"learning_rate": 3e-4, "bias_learning_rate": 6e-4, "mask_captions": False}

    @classmethod
    def sweeps(cls, synthetic: bool) -> dict[str, dict[str, dict[str, Any]]]:
        """Prompts with positions end at 64: these leave eleven words of a caption's 77 positions."""
        lengths, reductions = (2, 4, 8, 16, 32, 64), (100, 32, 16, 8, 4, 2)
        return {
            "prompts a layer, taking positions of the caption": {
                str(2 * n): {"prompt_length": n} for n in lengths[:-1]
            },
            "prompts a layer, without positions": {
                str(2 * n): {"prompt_length": n, "prompt_positions": False} for n in lengths
            },
            "adapter width, of the tower's": {
                f"{1 / reduction:.2f}": {"adapter_reduction": reduction} for reduction in reductions
            },
        }

    def modules(self, towers: Towers) -> dict[Place, nn.Module]:
        """Prompts in layers i < depth, where the input is layer 0; adapters in all blocks."""
        from upperson.petl import CoupledPrompt, NormedAdapter  # a late import: options do not need torch

        widths = {tower: blocks[0].attn.embed_dim for tower, blocks in towers.items()}
        scales = {"image": self.adapter_scale_image, "text": self.adapter_scale_text}
        modules: dict[Place, nn.Module] = {}
        for tower, blocks in towers.items():
            width = widths[tower]
            other_width = widths["text" if tower == "image" else "image"]
            require_room(tower, "depth_prompt", self.depth_prompt, len(blocks))
            require_room(tower, "adapter_reduction", self.adapter_reduction, width, "the width")
            depth = min(map(len, towers.values())) if self.depth_prompt is None else self.depth_prompt
            for i, block in enumerate(blocks):
                if self.prompts and i < depth:
                    modules[Place(tower, i, "prompt")] = CoupledPrompt(
                        self.prompt_length, width, other_width, first=tower == "text"
                    )
                if self.adapters:
                    modules[Place(tower, i, "adapter_mlp")] = NormedAdapter(
                        block.ln_2, width // self.adapter_reduction, scales[tower]
                    )
        return modules
