"""What a method is: what it trains in a CLIP, by which recipe, in which stages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import nn

from upperson.errors import MethodError
from upperson.fields import Checked

if TYPE_CHECKING:
    from upperson.model.block import Block

Towers = Mapping[str, Sequence["Block"]]  # the blocks of "image" and "text"


class Stage(NamedTuple):
    """A part of a training: a run of its own, which starts from the checkpoint of the stage before."""

    name: str  # its folder in the run folder
    title: str  # in the field's words
    changes: dict[str, Any]  # fields of the configuration


@dataclass(frozen=True)
class Method(Checked):
    """The base of all methods. Its subclasses are frozen dataclasses whose fields, made by upperson.fields.option, are
    the method's options: flags on the command line, and in the configuration of a checkpoint.

    A subclass has a `name`, and answers what of the following is another for it than for one that trains nothing.
    """

    name: ClassVar[str]

    @property
    def title(self) -> str:
        """What is trained, in the field's words, for tables."""
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
        """Positions behind a caption's start token that prompts take from its words: as many as they are, or none."""
        return 0

    @classmethod
    def recipe(cls, drawn: bool) -> dict[str, Any]:
        """The fields of the configuration that it is trained with, where they differ from those of UP-Person.

        `drawn`: on the embedded data and CLIP, which are smaller.
        """
        return {}

    @classmethod
    def sweeps(cls, drawn: bool) -> dict[str, dict[str, dict[str, Any]]]:
        """What to vary for a figure: title of an axis → label of a point → the fields that it changes."""
        return {}

    def modules(self, towers: Towers) -> dict[str, nn.Module]:
        """New trained modules with initial values, by name: {image,text}.blocks.{i}.{kind}.

        The kinds are those that upperson.model.block.Block has a place for. A tower has prompts in its first layers, or
        prefixes anywhere, but not both. Raises MethodError.
        """
        return {}

    def decided(self) -> dict[str, Any]:
        """Fields of the configuration that the method's own options decide, whatever stands in them."""
        return {}

    @property
    def continues(self) -> bool:
        """Whether a training only makes sense from the parameters of an earlier one (--start-from)."""
        return False

    def stages(self) -> Sequence[Stage]:
        """The stages of a training, each a run of its own; none: it has no stages."""
        return ()

    def without(self, kinds: Iterable[str]) -> "Method":
        """The method that is left when its modules of these kinds have become weights of CLIP, and CLIP's own weights,
        where it trains those, are the backbone's (upperson.deploy.merge).
        """
        if folded := list(kinds):
            raise MethodError(f"{self.title} does not say what is left of it without {', '.join(folded)}")
        return self


def require_room(tower: str, field: str, value: int | None, most: int, what: str = "the number of blocks") -> None:
    """MethodError for an option above what a tower has."""
    if (value or 0) > most:
        raise MethodError(f"{field}: {value} is more than {what} of the {tower} tower, {most}")
