"""Several adaptations of one backbone in memory, switched at run time.

adaptations = Adaptations(AdaptedCLIP(config))          # or the model of a checkpoint that does not train CLIP
adaptations.add("cuhk", "cuhk.safetensors")
adaptations.add("rstp", "rstp.safetensors")
adaptations.use("rstp")
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from upperson.errors import CheckpointError
from upperson.model import AdaptedCLIP
from upperson.model.adapted_clip import parameters_of
from upperson.model.checkpoint import copy_parameters, load_checkpoint, other_backbone

ORIGINAL = "original"
COMPUTED = ("backend", "skip_unread", "pack_captions", "low_rank_gradients")  # how it computes, not what


class Adaptations:
    """The adaptations of a model's backbone, by name; "original" is what the model had at the start.

    They may differ in everything but the backbone: method, kinds of modules, sizes, depths. A switch exchanges
    references to modules in the model's blocks, and its `config`; encode_image, encode_text and trained_parameters
    are then those of the adaptation in use. No switch must happen while another thread computes.

    Raises CheckpointError for a model whose method trains CLIP, which is no longer the backbone that others adapt.
    """

    def __init__(self, model: AdaptedCLIP):
        if model.config.method.trains_clip:
            raise CheckpointError(
                f"a model of method {model.config.method.name!r} has a backbone of its own; expected "
                "the one that the checkpoints adapt"
            )
        self.model = model
        self.active = ORIGINAL
        self._adaptations = {ORIGINAL: (model.config, model.trained_modules())}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adaptations)

    def add(self, name: str, path: Path | str, **changes: Any) -> None:
        """Reads a checkpoint of the model's backbone, to be used by `name`. What is in use stays in use.

        `changes` replace fields of its configuration, as in load_model: `pretrained="…"` where the backbone's file lay
        elsewhere when the checkpoint was trained. Raises CheckpointError for a name that is taken, for a file that is
        no checkpoint, and for a checkpoint of another backbone.
        """
        if name in self._adaptations:
            raise CheckpointError(f"the name {name!r} is taken; taken are {', '.join(self.names)}")
        checkpoint = load_checkpoint(path)
        config, own = checkpoint.config.replace(**changes).model, self.model.config
        if config.method.trains_clip:
            raise CheckpointError(
                f"{path}: of method {config.method.name!r}, a backbone of its own; expected an adaptation"
            )
        if differences := other_backbone(config, own):
            raise CheckpointError(f"{path}: of another backbone, {differences} as in the model")
        if config.pretrained == "none":
            raise CheckpointError(f"{path}: pretrained: none, random weights, which the model need not share")
        with torch.random.fork_rng(devices=[]):  # initial values, about to be replaced
            modules = self.model.new_modules(config)
        copy_parameters(checkpoint.parameters, parameters_of(modules), str(path))
        self._adaptations[name] = replace(config, **{field: getattr(own, field) for field in COMPUTED}), modules

    def use(self, name: str) -> None:
        """Puts an adaptation in use. CheckpointError lists the names where this is none of them."""
        if name not in self._adaptations:
            raise CheckpointError(f"there is no adaptation {name!r}; there are {', '.join(self.names)}")
        config, modules = self._adaptations[name]
        weight = self.model.image_blocks[0].attn.in_proj_weight
        for module in modules.values():
            module.to(weight.device, weight.dtype)  # the model may have moved; else nothing happens
        self.model.set_modules(config, modules)
        self.active = name
