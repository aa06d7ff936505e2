"""Zero-shot CLIP: the backbone is evaluated without training."""

from dataclasses import dataclass
from typing import ClassVar

from upperson.methods.method import Method


@dataclass(frozen=True)
class ZeroShot(Method):
    """CLIP without training."""

    name: ClassVar[str] = "zero-shot"

    @property
    def title(self) -> str:
        return "zero-shot CLIP"

    @property
    def trains(self) -> bool:
        return False
