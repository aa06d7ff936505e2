"""The shipped weights of the small CLIP, in half precision. The token embedding contains only trained rows."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

FOLDER = Path(__file__).parent
CLIP_CONFIG = FOLDER / "clip.json"
CLIP_WEIGHTS = FOLDER / "clip.safetensors"

_EMBEDDING = "token_embedding.weight"
_ROWS, _IDS = "token_embedding.rows", "token_embedding.ids"


class EmbeddedWeightsError(RuntimeError):
    """Missing or damaged weights of the small CLIP. The message contains the command that creates them again."""


def build_embedded_clip() -> open_clip.CLIP:
    """The small CLIP with random weights in float32. The token embedding is always the same."""
    clip: Any = open_clip.CLIP(**json.loads(CLIP_CONFIG.read_text(encoding="utf-8")))
    with torch.no_grad():
        clip.token_embedding.weight.copy_(untrained_embedding(*clip.token_embedding.weight.shape))
    return clip


def untrained_embedding(tokens: int, width: int) -> Tensor:
    """The token embedding before training, [tokens, width] float32: normal, with standard deviation 0.02."""
    generator = np.random.Generator(np.random.PCG64(0))
    return torch.from_numpy(generator.standard_normal((tokens, width), dtype=np.float32) * np.float32(0.02))


def save_embedded_clip(clip: open_clip.CLIP, trained_tokens: Iterable[int], path: Path = CLIP_WEIGHTS) -> None:
    """Writes the weights in float16, atomically, with only the rows of `trained_tokens` of the token embedding."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in clip.state_dict().items()}
    ids = torch.tensor(sorted(set(trained_tokens)), dtype=torch.int32)
    tensors[_ROWS], tensors[_IDS] = tensors.pop(_EMBEDDING)[ids].contiguous(), ids
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished)
    os.replace(unfinished, path)


def load_embedded_clip(path: Path = CLIP_WEIGHTS) -> open_clip.CLIP:
    """The pretrained small CLIP in float32, for 128 x 128 images normalised with OpenAI's mean and deviation.

    Raises EmbeddedWeightsError for a file that is missing, damaged or of another model.
    """
    clip: Any = build_embedded_clip()
    try:
        tensors = load(path.read_bytes())
        rows, ids = tensors.pop(_ROWS), tensors.pop(_IDS)
        embedding = clip.token_embedding.weight.detach().clone()
        embedding[ids.long()] = rows.float()
        clip.load_state_dict({**{name: tensor.float() for name, tensor in tensors.items()}, _EMBEDDING: embedding})
    except FileNotFoundError:
        raise EmbeddedWeightsError(f"{path} is missing; {_REBUILD}") from None
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise EmbeddedWeightsError(f"{path} is damaged or of another model ({error}); {_REBUILD}") from error
    return clip.eval()


_REBUILD = "`python -m upperson.embedded.pretrain` creates the file again (about 30 minutes on two cores)"
