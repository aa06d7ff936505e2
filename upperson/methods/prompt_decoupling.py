"""Prompt Decoupling (arXiv 2401.02173): prompts adapt CLIP to the domain, then fine-tuning adapts it to the task.

Stage one trains prompts in both towers, with both encoders frozen; stage two freezes the prompts and fine-tunes the
encoders. No code was released, and the hyper-parameters could not be found. Only the backbone, CLIP ViT-B/16, and these
two stages are known. The rest are defaults of this project: deep prompts without coupling, of length 4, the SDM loss in
both stages, and a learning rate of 1e-5 in stage two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from upperson.fields import MOST_EPOCHS, MOST_RATE, option
from upperson.losses.names import parse_losses
from upperson.methods.method import Method, Place, Stage, require_room

if TYPE_CHECKING:
    from torch import nn

    from upperson.methods.method import Towers


@dataclass(frozen=True)
class PromptDecoupling(Method):
    """Options of the prompts and of stage two. --epochs, --learning-rate and --losses apply to stage one."""

    name: ClassVar[str] = "prompt-decoupling"

    stage: Literal["both", "prompts", "encoders"] = option(
        "both", "both stages in turn; or only the prompts; or only the encoders, with --start-from a checkpoint of the "
        "prompts"
    )  # fmt: skip
    prompt_length: int = option(4, "number of prompts in a layer of each tower", at_least=1, at_most=1000)
    depth_prompt: int | None = option(
        None, "number of first layers with prompts; none: all layers", at_least=1, at_most=1000
    )
    prompt_positions: bool = option(
        True, "text prompts take positions of the caption; its words move behind them and are truncated at the end; "
        "otherwise words keep their positions, and prompts have none"
    )  # fmt: skip
    encoder_epochs: int = option(60, "epochs of stage two", at_least=1, at_most=MOST_EPOCHS)
    encoder_warmup_epochs: int = option(
        5, "epochs of linear warm-up in stage two; must be below encoder_epochs", at_least=0
    )
    encoder_learning_rate: float = option(1e-5, "learning rate of stage two", above=0, at_most=MOST_RATE)
    encoder_losses: str = option("sdm", "losses of stage two, as in --losses")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_warmup_epochs >= self.encoder_epochs:
            raise ValueError(
                f"encoder_warmup_epochs: {self.encoder_warmup_epochs} is not allowed; it must be below "
                f"encoder_epochs, which is {self.encoder_epochs}"
            )
        try:
            parse_losses(self.encoder_losses)
        except ValueError as error:
            raise ValueError(f"encoder_losses: {error}") from None

    @property
    def title(self) -> str:
        return "Prompt Decoupling's prompts" if self.stage == "prompts" else "Prompt Decoupling"

    @property
    def trains_clip(self) -> bool:
        return self.stage != "prompts"

    @property
    def positions_taken(self) -> int:
        return self.prompt_length if self.prompt_positions else 0

    @classmethod
    def recipe(cls, synthetic: bool) -> dict[str, Any]:
        if synthetic:
            return {
                "learning_rate": 1e-2,
                "encoder_epochs": 4,
                "encoder_warmup_epochs": 1,
                "encoder_learning_rate": 3e-4,
            }
        return {"learning_rate": 1e-3, "mask_captions": False}

    def decided(self) -> dict[str, Any]:
        """The fields of stage two, from its options."""
        if self.stage != "encoders":
            return {}
        return {
            "freeze": "prompt", "epochs": self.encoder_epochs, "warmup_epochs": self.encoder_warmup_epochs,
            "learning_rate": self.encoder_learning_rate, "bias_learning_rate": None, "learning_rates": None,
            "losses": self.encoder_losses,
        }  # fmt: skip

    def unread(self) -> dict[str, str]:
        found = {"low_rank_gradients": "Prompt Decoupling has no LoRA"}
        if self.stage == "prompts":
            names = ("encoder_epochs", "encoder_warmup_epochs", "encoder_learning_rate", "encoder_losses")
            found |= dict.fromkeys(names, "stage is prompts")
        if self.stage == "encoders":
            found |= dict.fromkeys(self.decided(), "stage encoders freezes the prompts and reads the encoder_ options")
        return found

    @property
    def continues(self) -> bool:
        return self.stage == "encoders"

    def stages(self) -> Sequence[Stage]:
        if self.stage != "both":
            return ()
        return (
            Stage("prompts", "domain adaptation, prompts", {"stage": "prompts"}),
            Stage("encoders", "task adaptation, encoders", {"stage": "encoders"}),
        )

    def modules(self, towers: Towers) -> dict[Place, nn.Module]:
        """Prompts in layers i < depth, where the input is layer 0."""
        from upperson.petl import Prompt  # a late import: options do not need torch

        modules: dict[Place, nn.Module] = {}
        for tower, blocks in towers.items():
            require_room(tower, "depth_prompt", self.depth_prompt, len(blocks))
            for i, block in enumerate(blocks[: self.depth_prompt]):
                modules[Place(tower, i, "prompt")] = Prompt(self.prompt_length, block.attn.embed_dim)
        return modules

    def without(self, kinds: Iterable[str]) -> PromptDecoupling:
        """The prompts only, since the encoders have become the backbone."""
        return replace(self, stage="prompts")
