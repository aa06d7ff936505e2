"""Full fine-tuning: all weights of CLIP that affect its features are trained."""

from dataclasses import dataclass
from typing import Any, ClassVar

from upperson.methods.method import Method


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Trains all of CLIP, with the learning rate of IRRA (arXiv 2303.12501)."""

    name: ClassVar[str] = "full"

    @property
    def title(self) -> str:
        return "full fine-tuning"

    @property
    def trains_clip(self) -> bool:
        return True

    def unread(self) -> dict[str, str]:
        return {"low_rank_gradients": "full fine-tuning has no LoRA"}

    @classmethod
    def recipe(cls, synthetic: bool) -> dict[str, Any]:
        return {"learning_rate": 3e-4 if synthetic else 1e-5}
