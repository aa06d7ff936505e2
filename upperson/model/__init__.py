"""The model: open_clip's frozen towers, with a method's trained modules in every block.

backbone.py      builds and loads the open_clip model, and adapts it to upright images
download.py      published weights, from the local cache or downloaded
weights.py       files with the weights of a CLIP
archive.py       TorchScript archives, read without running their code
block.py         one transformer block with trained modules, on the fused operators
attention.py     attention of a single query, for the last block
prompts.py       prompts, which enter the blocks as a prefix
captions.py      packed captions, without padding
adapted_clip.py  the model
checkpoint.py    the content of a checkpoint, and its model
turns.py         several threads and one model
tensor_files.py  the file format of checkpoints and resume states
"""

from upperson.model.adapted_clip import AdaptedCLIP
from upperson.model.checkpoint import load_model

__all__ = ["AdaptedCLIP", "load_model"]
