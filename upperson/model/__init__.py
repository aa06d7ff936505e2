"""UP-Person (arXiv 2504.10084): open_clip's towers, frozen, with trained modules in every block.

    backbone.py   builds and loads the open_clip model, and fits it to upright images
    weights.py    reads the files that its weights come from
    petl/         the trained modules: S-Prefix, LoRA, L-Adapter, and their variants
    block.py      one transformer block with them, on the fused operators
    upperson.py   the model
"""

from upperson.model.backbone import BackboneError
from upperson.model.upperson import UPPerson

__all__ = ["BackboneError", "UPPerson"]
