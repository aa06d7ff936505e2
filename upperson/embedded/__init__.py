"""The embedded default: drawn pedestrians with captions, and a small CLIP that has never seen one.

It needs no network and no files beside the package, and proves the whole path, not the paper's accuracy.
"""

from upperson.embedded.dataset import read_embedded
from upperson.embedded.weights import CLIP_CONFIG, load_embedded_clip

__all__ = ["CLIP_CONFIG", "load_embedded_clip", "read_embedded"]
