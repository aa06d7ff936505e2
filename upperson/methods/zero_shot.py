"""Zero-shot CLIP: nothing is trained, the backbone is measured as it is."""

from dataclasses import dataclass
from typing import ClassVar

from upperson.methods.method import Method


@dataclass(frozen=True)
class ZeroShot(Method):
    """CLIP as it is."""

    name: ClassVar[str] = "zero-shot"

    @property
    def title(self) -> str:
        return "zero-shot CLIP"

    @property
    def trains(self) -> bool:
        return False
