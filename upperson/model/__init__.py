"""open_clip's towers, frozen, with a method's trained modules in every block.

backbone.py      builds and loads the open_clip model, and fits it to upright images
weights.py       reads the files that its weights come from
block.py         one transformer block with trained modules, on the fused operators
attention.py     attention of a single query, for the last block
prompts.py       prompts, which enter the blocks as a prefix
captions.py      captions without padding
adapted_clip.py  the model
checkpoint.py    what a checkpoint holds, and the model that it gives
tensor_files.py  the file format of checkpoints and resume states
"""

from upperson.model.adapted_clip import AdaptedCLIP
from upperson.model.checkpoint import load_model

__all__ = ["AdaptedCLIP", "load_model"]
