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


# Switches of ModelConfig that leave out operations whose results the features do not depend on.
SAVINGS = ("skip_unread", "pack_captions")


class Place(NamedTuple):
    """The place of a trained module in the model: tower, block, kind."""

    tower: str  # "image" or "text"
    block: int  # counted from the input
    kind: str  # one of upperson.model.block.KINDS

    def __str__(self) -> str:
        """The prefix of its parameters' names in a checkpoint."""
        return f"{self.tower}.blocks.{self.block}.{self.kind}"


class Stage(NamedTuple):
    """A stage of a training. Each stage is a run, which starts from the checkpoint of the previous stage."""

    name: str  # the stage's folder in the run folder
    title: str  # name for readers
    changes: dict[str, Any]  # changed fields of the configuration


@dataclass(frozen=True)
class Method(Checked):
    """The base class of all methods.

    A subclass is a frozen dataclass. Its fields, made by upperson.fields.option, are the method's options: flags on the
    command line, and fields in the configuration of a checkpoint. A subclass has a `name`, and overrides the properties
    below whose default does not fit.
    """

    name: ClassVar[str]

    @property
    def title(self) -> str:
        """The method's name for readers, as in tables."""
        return self.name

    @property
    def trains(self) -> bool:
        """Whether the method trains any parameters."""
        return True

    @property
    def trains_clip(self) -> bool:
        """Whether CLIP's own weights are trained. Checkpoints then contain them."""
        return False

    @property
    def savings(self) -> tuple[str, ...]:
        """The SAVINGS that do not change the method's training.

        A loss may read tokens that the features do not depend on: padding, or all tokens of the last block. The other
        SAVINGS are then off wherever gradients are computed.
        """
        return SAVINGS

    @property
    def mlm_reads_padding(self) -> bool:
        """Whether the blocks of the mlm loss attend to padding. Captions must then not be packed (`savings`)."""
        return False

    @property
    def positions_taken(self) -> int:
        """The number of positions behind a caption's start token that prompts occupy."""
        return 0

    @classmethod
    def recipe(cls, synthetic: bool) -> dict[str, Any]:
        """The fields of the training configuration that differ from UP-Person's.

        `synthetic`: whether the embedded data and CLIP are used, which are smaller.
        """
        return {}

    @classmethod
    def sweeps(cls, synthetic: bool) -> dict[str, dict[str, dict[str, Any]]]:
        """The options that a figure varies: title of an axis → label of a point → changed fields."""
        return {}

    def modules(self, towers: Towers) -> dict[Place, nn.Module]:
        """New trained modules with initial values, by their places in the model.

        The kinds are upperson.model.block.KINDS. A tower has either prompts in its first layers or prefixes in any
        blocks. Raises MethodError for options that do not fit the towers.
        """
        return {}

    def decided(self) -> dict[str, Any]:
        """The fields of the configuration that the method's options override."""
        return {}

    def unread(self) -> dict[str, str]:
        """The fields of the configuration that the method does not read beside its other options, with the reasons."""
        return {}

    @property
    def continues(self) -> bool:
        """Whether a training must start from the parameters of an earlier training (--start-from)."""
        return False

    def stages(self) -> Sequence[Stage]:
        """The stages of a training; empty for a training in one stage."""
        return ()

    def without(self, kinds: Iterable[str]) -> Method:
        """The method that remains after its modules of these kinds were merged into CLIP's weights.

        If the method trains CLIP's own weights, these have become the backbone (upperson/deploy/merge.py). Raises
        MethodError unless the method defines the remaining method.
        """
        if folded := list(kinds):
            raise MethodError(f"{self.title} does not define the method that remains without {', '.join(folded)}")
        return self


def require_room(tower: str, field: str, value: int | None, most: int, what: str = "the number of blocks") -> None:
    """Raises MethodError for an option above the limit of a tower."""
    if (value or 0) > most:
        raise MethodError(f"{field}: {value} is more than {what} of the {tower} tower, {most}")
