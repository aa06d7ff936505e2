"""Several adaptations of one backbone in memory, switched at run time.

adaptations = Adaptations(AdaptedCLIP(config))          # or a checkpoint's model whose method does not train CLIP
adaptations.add("cuhk", "cuhk.safetensors")
adaptations.add("rstp", "rstp.safetensors")
adaptations.use("rstp")                                 # for all threads; an error while another thread computes
with adaptations.using("cuhk") as model:                # waits until it may switch; threads with the same name share
    features = model.encode_text(tokens)
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from upperson.errors import CheckpointError, RunError
from upperson.model import AdaptedCLIP
from upperson.model.adapted_clip import parameters_of
from upperson.model.checkpoint import copy_parameters, load_checkpoint, other_backbone, require_backbone

ORIGINAL = "original"
COMPUTED = ("backend", "skip_unread", "pack_captions", "low_rank_gradients")  # fields that do not change results


class Adaptations:
    """The adaptations of a model's backbone, by name. "original" is the model's first adaptation.

    Adaptations may differ in method, kinds of modules, sizes and depths, but not in the backbone. A switch exchanges
    references to modules in the model's blocks, and the model's `config`; encode_image, encode_text and
    trained_parameters then use the active adaptation. No call mixes two adaptations: a switch while another thread
    computes is an error, and so is computing after another thread has switched away from this thread's own choice. A
    thread that never calls `use` computes with the last choice of any thread.

    `using` makes switches safe while other threads compute: a thread waits for its turn. Threads are served in the
    order in which they asked; neighbours that ask for the same adaptation compute at once.

    Raises CheckpointError for a model whose method trains CLIP, since this changes the backbone of other adaptations.
    """

    def __init__(self, model: AdaptedCLIP):
        if model.config.method.trains_clip:
            raise CheckpointError(
                f"method {model.config.method.name!r} has changed the model's backbone; expected the backbone of the "
                "checkpoints"
            )
        self.model = model
        self.active = ORIGINAL
        self._adaptations = {ORIGINAL: (model.config, model.trained_modules())}
        self._turn = threading.Condition()
        self._waiting: deque[object] = deque()  # a ticket for each thread, in the order in which they asked
        self._computing = 0  # threads within `using`
        self._own = threading.local()  # the adaptation that a thread uses

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._adaptations)

    def add(self, name: str, path: Path | str, **changes: Any) -> None:
        """Adds a checkpoint of the model's backbone under a name. The active adaptation is not changed.

        `changes` replace fields of the checkpoint's configuration, as in load_model: `pretrained="…"` if the backbone's
        file was elsewhere during the training. Raises CheckpointError for a name in use, for a file that is not a
        checkpoint, and for a checkpoint of another backbone.
        """
        if name in self._adaptations:
            raise CheckpointError(f"the name {name!r} is in use; names in use are {', '.join(self.names)}")
        checkpoint = load_checkpoint(path)
        config, own = checkpoint.config.replace(**changes).model, self.model.config
        if config.method.trains_clip:
            raise CheckpointError(
                f"{path}: a checkpoint of method {config.method.name!r}, which changes the backbone; expected a method "
                "that keeps the backbone"
            )
        if differences := other_backbone(config, own):
            raise CheckpointError(f"{path}: a checkpoint of another backbone, {differences} as in the model")
        if config.pretrained == "none":
            raise CheckpointError(
                f"{path}: a checkpoint with pretrained 'none'; its random weights may differ from the model's"
            )
        require_backbone(checkpoint, config, self.model.fingerprint)
        with torch.random.fork_rng(devices=[]):  # copy_parameters replaces the initial values
            modules = self.model.new_modules(config)
        copy_parameters(checkpoint.parameters, parameters_of(modules), str(path))
        self._adaptations[name] = replace(config, **{field: getattr(own, field) for field in COMPUTED}), modules

    def use(self, name: str) -> None:
        """Activates an adaptation for all threads.

        Raises CheckpointError with the known names for an unknown name, and RunError if another thread is computing.
        """
        if name not in self._adaptations:
            raise CheckpointError(f"unknown adaptation {name!r}; expected one of {', '.join(self.names)}")
        config, modules = self._adaptations[name]
        weight = self.model.image_blocks[0].attn.in_proj_weight
        with self.model.turns.switch():
            for module in modules.values():
                module.to(weight.device, weight.dtype)  # the model may have moved to another device
            self.model.set_modules(config, modules)
            self.active = name

    @contextmanager
    def using(self, name: str) -> Iterator[AdaptedCLIP]:
        """A context in which this thread computes with an adaptation, while others wait or use the same one.

        Raises CheckpointError for an unknown name, and RunError for another adaptation within a context, which would
        wait for itself. All threads that compute must be in such a context: a thread that is not is an error, as in
        `use`.
        """
        if name not in self._adaptations:
            raise CheckpointError(f"unknown adaptation {name!r}; expected one of {', '.join(self.names)}")
        inside = getattr(self._own, "name", None)
        if inside is not None:
            if inside != name:
                raise RunError(f"using {name!r} within using {inside!r} would wait for itself; expected one at a time")
            yield self.model
            return
        ticket = object()
        with self._turn:
            self._waiting.append(ticket)
            try:
                self._turn.wait_for(lambda: self._waiting[0] is ticket and (not self._computing or self.active == name))
                if self.active == name:
                    self.model.turns.agree()
                else:
                    self.use(name)
                self._computing += 1
            finally:
                self._waiting.remove(ticket)
                self._turn.notify_all()
        self._own.name = name
        try:
            yield self.model
        finally:
            self._own.name = None
            with self._turn:
                self._computing -= 1
                self._turn.notify_all()
