"""IRRA (arXiv 2303.12501): full fine-tuning with SDM, identity classification and masked language modelling."""

from dataclasses import dataclass
from typing import Any, ClassVar

from upperson.methods.full_fine_tuning import FullFineTuning

# Factors of the learning rate: the cross-modal blocks, all biases, the classifier, the head of words with its biases.
FACTORS = {"mlm.attention": 5, "mlm.transformer": 5, "bias": 2, "objective.id": 5, "mlm.head": 5}


@dataclass(frozen=True)
class IRRA(FullFineTuning):
    """Trains all of CLIP, with a classifier of people and a cross-modal transformer, which retrieval does not need."""

    name: ClassVar[str] = "irra"

    @property
    def title(self) -> str:
        return "IRRA"

    @property
    def savings(self) -> tuple[str, ...]:
        """Captions stay padded, since masked language modelling reads the padding."""
        return ("skip_unread",)

    @property
    def mlm_reads_padding(self) -> bool:
        return True

    @classmethod
    def recipe(cls, synthetic: bool) -> dict[str, Any]:
        """The recipe of the released code; weight decay, schedule and temperature are UP-Person's.

        All losses read the masked captions, as in the released code.
        """
        recipe = super().recipe(synthetic)
        rate = recipe["learning_rate"]
        return recipe | {
            "losses": "sdm+id+mlm", "batch_size": 64, "mask_captions": True,
            "learning_rates": ", ".join(f"{part}={factor * rate:g}" for part, factor in FACTORS.items()),
        }  # fmt: skip
