"""The embedded data sets: drawn pedestrians and scenes, by day and by night, and a small CLIP that never saw a person.

It needs no network and no files beside the package, and proves the whole path, not the paper's accuracy.
"""

from upperson.embedded.dataset import read_embedded, read_scenes
from upperson.embedded.weights import CLIP_CONFIG, load_embedded_clip

__all__ = ["CLIP_CONFIG", "load_embedded_clip", "read_embedded", "read_scenes"]
