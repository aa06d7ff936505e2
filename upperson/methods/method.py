"""A method: the modules that it trains in a CLIP, the recipe, the stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from upperson.errors import MethodError
from upperson.fields import Checked

if TYPE_CHECKING:
    from torch import nn

    from upperson.model.block import Block

    Towers = Mapping[str, Sequence[Block]]  # the blocks of "image" and "text"


class Place(NamedTuple):
    """The place of a trained module in the model: tower, block, kind."""

    tower: str  # "image" or "text"
    block: int  # counted from the input
    kind: str  # one of upperson.model.block.KINDS

    def __str__(self) -> str:
        """The prefix of its parameters' names in a checkpoint."""
        return f"{self.tower}.blocks.{self.block}.{self.kind}"


class Stage(NamedTuple):
    """A part of a training: a run of its own, which starts from the checkpoint of the stage before."""

    name: str  # its folder in the run folder
    title: str  # in the field's words
    changes: dict[str, Any]  # fields of the configuration


@dataclass(frozen=True)
class Method(Checked):
    """The base of all methods. Its subclasses are frozen dataclasses whose fields, made by upperson.fields.option, are
    the method's options: flags on the command line, and in the configuration of a checkpoint.

    A subclass has a `name`, and overrides the properties below whose default does not fit.
    """

    name: ClassVar[str]

    @property
    def title(self) -> str:
        """The method in the field's words, for tables."""
        return self.name

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return True

    @property
    def trains_clip(self) -> bool:
        """Whether CLIP's own weights change; checkpoints then hold them."""
        return False

    @property
    def positions_taken(self) -> int:
        """Number of positions behind a caption's start token that prompts take from its words."""
        return 0

    @classmethod
    def recipe(cls, drawn: bool) -> dict[str, Any]:
        """The fields of the configuration that the method is trained with, where they differ from UP-Person's.

        `drawn`: on the embedded data and CLIP, which are smaller.
        """
        return {}

    @classmethod
    def sweeps(cls, drawn: bool) -> dict[str, dict[str, dict[str, Any]]]:
        """The options that a figure varies: title of an axis → label of a point → the fields that the point changes."""
        return {}

    def modules(self, towers: Towers) -> dict[Place, nn.Module]:
        """New trained modules with initial values, by their places in the model.

        The kinds are upperson.model.block.KINDS. A tower has prompts in its first layers, or prefixes anywhere, but not
        both. Raises MethodError.
        """
        return {}

    def decided(self) -> dict[str, Any]:
        """Fields of the configuration that the method's own options override."""
        return {}

    @property
    def continues(self) -> bool:
        """Whether a training must start from the parameters of an earlier one (--start-from)."""
        return False

    def stages(self) -> Sequence[Stage]:
        """The stages of a training, each a run of its own; empty for a training in one piece."""
        return ()

    def without(self, kinds: Iterable[str]) -> Method:
        """The method that remains after its modules of these kinds were folded into CLIP's weights.

        CLIP's own weights, where the method trains them, have then become the backbone (upperson/deploy/merge.py).
        """
        if folded := list(kinds):
            raise MethodError(f"{self.title} does not say what is left of it without {', '.join(folded)}")
        return self


def require_room(tower: str, field: str, value: int | None, most: int, what: str = "the number of blocks") -> None:
    """MethodError for an option above what a tower has."""
    if (value or 0) > most:
        raise MethodError(f"{field}: {value} is more than {what} of the {tower} tower, {most}")
