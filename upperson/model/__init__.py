"""open_clip's towers, frozen, with a method's trained modules in every block.

backbone.py   builds and loads the open_clip model, and fits it to upright images
weights.py    reads the files that its weights come from
block.py      one transformer block with them, on the fused operators
prompts.py    prompts, which enter the blocks as a prefix
adapted_clip.py   the model
"""

from upperson.errors import BackboneError
from upperson.model.adapted_clip import AdaptedCLIP

__all__ = ["BackboneError", "AdaptedCLIP"]
