"""The ways to compute a training step, which step.py times and counts: both towers, SDM loss, backward, Adam.

    plain               what the released code does, in eager PyTorch: captions padded to 77 tokens, softmax
                        attention that holds its weights, LoRA merged into a weight whose whole gradient is formed,
                        QuickGELU and adapters operator by operator, all tokens through the last block
    full fine-tuning    all of CLIP trained, captions padded, this project's attention without prefix
    ours                the configuration's defaults: fused operators where there is a GPU, and no operation whose
                        result is not read
    the other methods   with the same defaults, by their titles; each stage of a method in stages

All paths of one training start from the same weights and see the same batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from upperson_kernels.attention.reference import explicit

from upperson.config import Config, TrainConfig
from upperson.config.presets import PRESETS, with_method
from upperson.losses.pairs import sdm_loss
from upperson.machine import autocast, frozen_dtype
from upperson.methods import BASELINES, DEFAULT, METHODS
from upperson.model import AdaptedCLIP
from upperson.train.optimizer import build_optimizer

NOTHING_SPARED: dict[str, Any] = dict(skip_unread=False, pack_captions=False, low_rank_gradients=False)


@dataclass(frozen=True)
class Path:
    """What is trained and how a step is computed: changes of the configuration, and of the model."""

    changes: dict[str, Any] = field(default_factory=dict)
    plain: bool = False  # the released code's operators
    compiled: bool = False  # the blocks, by torch.compile
    method: str = DEFAULT
    stage: str = ""  # of a method in stages

    def configuration(self, base: Config) -> Config:
        """The base with the method, its recipe and the path's changes."""
        return with_method(base, self.method).replace(**self.changes).settled()


def further_methods() -> Iterator[tuple[str, Path]]:
    """Every method that is no baseline, by title; each stage of a method in stages."""
    for name in METHODS:
        if name in (DEFAULT, *BASELINES):
            continue
        method = with_method(full_size(), name).model.method
        if not method.stages():
            yield method.title, Path(method=name)
        for stage in method.stages():
            yield f"{method.title}, {stage.name}", Path(stage.changes, method=name, stage=stage.name)


def full_size() -> Config:
    """The CUHK-PEDES preset with random weights: ViT-B/16 at 384×128."""
    return PRESETS["cuhk-pedes"].replace(pretrained="none")


def small() -> Config:
    """The same training of the embedded model, for machines without a GPU."""
    return replace(full_size(), model=PRESETS["embedded"].model)


PLAIN = NOTHING_SPARED | {"backend": "torch", "frozen_weights": "cast"}
TIMED = {
    "plain": Path(PLAIN, plain=True),
    "plain, compiled": Path(PLAIN, plain=True, compiled=True),
    **{METHODS[name]().title: Path(NOTHING_SPARED, method=name) for name in BASELINES if METHODS[name]().trains},
    "ours": Path(),
    "ours, compiled": Path(compiled=True),
    **dict(further_methods()),
}
# Each switch turned off: counted, not timed.
WITHOUT = {
    "ours, all tokens in the last block": Path({"skip_unread": False}),
    "ours, captions padded": Path({"pack_captions": False}),
    "ours, gradients of whole weights": Path({"low_rank_gradients": False}),
}
COUNTED = {name: path for name, path in TIMED.items() if not path.compiled} | WITHOUT


def build(path: Path, base: Config) -> AdaptedCLIP:
    """The model of a path, on the CPU. Factors that start at zero are random, as a zero would hide errors behind it."""
    torch.manual_seed(0)
    config = path.configuration(base)
    model = AdaptedCLIP(config.model)
    model.freeze(config.train.freeze)
    generator = torch.Generator().manual_seed(0)
    for module in model.trained_modules().values():
        for parameter in module.parameters():
            if parameter.dim() == 2 and not parameter.any():
                nn.init.normal_(parameter, std=0.02, generator=generator)
    if path.plain:
        for block in model.blocks():
            block.attention = explicit_attention
            block.activation = None  # open_clip's own QuickGELU
    return model


def explicit_attention(
    qkv: Tensor, key: Tensor, value: Tensor, scale: Tensor, *, causal: bool, scale_target: str, **_: Any
) -> Tensor:
    """prefix_attention by its definition. Under autocast everything stays in the dtype of qkv, as in the released code;
    autocast would keep the weights in float32."""
    with torch.autocast(qkv.device.type, enabled=False):
        return explicit(qkv, key, value, scale, causal, scale_target)


@dataclass(frozen=True)
class Batch:
    """B pairs: images (B, 3, H, W), token ids (B, L), person ids (B,) with two pairs a person."""

    images: Tensor
    tokens: Tensor
    person_ids: Tensor


# Tokens a caption with start and end token: mean and standard deviation of 18,470 captions of CUHK-PEDES, which have
# 23.5 words on average, as in Li et al. (arXiv 1702.05729, Sec. 3.2).
TOKENS, DEVIATION, FEWEST = 28.7, 9.1, 10


def random_batches(config: Config, tokenizer: Callable, context_length: int, size: int, number: int) -> list[Batch]:
    """Batches of noise and of captions of unequal length, normally distributed: the quantiles in random order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(number * size, generator=generator)
    lengths = TOKENS + DEVIATION * torch.special.ndtri((order + 0.5) / len(order))
    lengths = lengths.round().clamp(FEWEST, context_length).int().tolist()
    tokens = tokenizer([" ".join(["coat"] * (length - 2)) for length in lengths])
    return [
        Batch(torch.randn(size, 3, *config.model.image_size, generator=generator), part, torch.arange(size) // 2)
        for part in tokens.split(size)
    ]


def fill(batches: Sequence[Batch]) -> float:
    """The share of the token positions that captions fill, start and end tokens included."""
    tokens = torch.cat([batch.tokens for batch in batches])
    return (tokens != 0).float().mean().item()


def prepare(model: AdaptedCLIP, batches: Sequence[Batch], device: torch.device) -> list[tuple[Any, ...]]:
    """Images, captions and person ids as a training gets them from its loader: packed where the model packs."""

    def on_device(batch: Batch) -> tuple[Any, ...]:
        return tuple(part.to(device) for part in (batch.images, model.pack_captions(batch.tokens), batch.person_ids))

    return list(map(on_device, batches))


class Step:
    """One optimizer step after the other on prepared batches in turn: as in upperson.train.loop, but without loading,
    augmenting, and reading the loss and the gradient norm.

    A call returns the loss before the step, (), on the device.
    """

    def __init__(self, model: AdaptedCLIP, batches: Sequence[tuple[Any, ...]], precision: str, settings: TrainConfig):
        self.model, self.batches, self.precision, self.taken = model, batches, precision, 0
        self.temperature = settings.temperature
        if (dtype := frozen_dtype(settings.frozen_weights, batches[0][0].device, precision)) is not None:
            model.keep_frozen_weights(dtype)
        self.optimizer = build_optimizer(model.trained_parameters(), settings)

    def image_features(self) -> Tensor:
        with autocast(self.batch[0].device, self.precision):
            return self.model.encode_image(self.batch[0])

    def text_features(self) -> Tensor:
        with autocast(self.batch[0].device, self.precision):
            return self.model.encode_text(self.batch[1])

    def loss(self) -> Tensor:
        """Forward alone."""
        return sdm_loss(self.image_features(), self.text_features(), self.batch[2], temperature=self.temperature)

    @property
    def batch(self) -> tuple[Any, ...]:
        return self.batches[self.taken % len(self.batches)]

    def take_gradients_of_zero(self) -> None:
        """An optimizer step that allocates the optimizer's state and changes no parameter."""
        for parameter in self.model.trained_parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def __call__(self) -> Tensor:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        return loss.detach()
