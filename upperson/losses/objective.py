"""The weighted sum of losses that training minimises, computed from a model and a batch.

With several processes, all losses are those of the whole batch; see upperson/machine.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from upperson.losses.balance import balance_loss
from upperson.losses.heads import IdentityClassifier, MaskedLanguageModel
from upperson.losses.names import NOT_MASKED, parse_losses
from upperson.losses.pairs import PAIR_LOSSES
from upperson.machine import SINGLE_PROCESS, Group

if TYPE_CHECKING:
    from upperson.model import AdaptedCLIP


class Objective(nn.Module):
    """The sum of the losses in `losses`, such as "sdm" or "sdm+0.5*id+mlm".

    Args:
        losses: see upperson.losses.names.parse_losses.
        temperature: temperature of SDM and ITC.
        width: width E of the embeddings.
        vocabulary: number of tokens, for mlm.
        person_ids: person ids of the training split, in any order, with or without repetitions; for id.
        mask_captions: whether the captions of a batch are masked as for mlm, so that all losses share one pass through
            the text tower (DataConfig.mask_captions).
        mlm_reads_padding: see MaskedLanguageModel.
        group: the processes that share each batch.
    """

    def __init__(
        self,
        losses: str,
        temperature: float,
        width: int,
        vocabulary: int,
        person_ids: Iterable[int],
        *,
        mask_captions: bool = False,
        mlm_reads_padding: bool = False,
        group: Group = SINGLE_PROCESS,
    ):
        super().__init__()
        self.weights = parse_losses(losses)
        self.temperature = temperature
        self.mask_captions = mask_captions
        self.reads_padding = "balance" in self.weights or ("mlm" in self.weights and mlm_reads_padding)
        self.group = group
        self.id = IdentityClassifier(width, person_ids) if "id" in self.weights else None
        self.mlm = (
            MaskedLanguageModel(width, vocabulary, group, reads_padding=mlm_reads_padding)
            if "mlm" in self.weights
            else None
        )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the heads, named objective.{id,mlm}.…"""
        return {f"objective.{name}": parameter for name, parameter in self.named_parameters()}

    def heads(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters of each head, id or mlm, by name."""
        heads = {"id": self.id, "mlm": self.mlm}
        return {name: dict(head.named_parameters()) for name, head in heads.items() if head is not None}

    def forward(
        self, model: AdaptedCLIP, batch: Mapping[str, Tensor], pairs: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and the losses by name, all scalars, for a batch of upperson.data.train_loader.

        With several processes, each passes its share of a batch of `pairs` pairs, and all get the losses of the whole
        batch.
        """
        pairs = len(batch["person_ids"]) if pairs is None else pairs
        if self.reads_padding and not isinstance(batch["captions"], Tensor):
            raise ValueError("captions: these losses read padding; expected padded captions, found packed ones")
        with model.computing_losses(tally="balance" in self.weights) as mixtures:
            losses = self.losses_of_features(model, batch, pairs)
            if "balance" in self.weights:
                if not mixtures:
                    raise ValueError("balance: expected a model whose tokens choose among experts")
                tallies = torch.stack([mixture.tallied_routes() for mixture in mixtures])
                counted = len(self.group.share_of(pairs)) > 0  # otherwise the pair is another process's as well
                losses["balance"] = balance_loss(self.group.total(tallies * counted), mixtures[0].chosen)
        weighted = [weight * losses[name] for name, weight in self.weights.items()]
        return sum(weighted[1:], weighted[0]), losses

    def losses_of_features(self, model: AdaptedCLIP, batch: Mapping[str, Tensor], pairs: int) -> dict[str, Tensor]:
        """All losses but balance, by name."""
        images, captions, person_ids = batch["images"], batch["captions"], batch["person_ids"]
        losses = {}
        if self.mlm is None:
            image_features, text_features = model.encode_image(images), model.encode_text(captions)
        else:
            masked, labels = batch["masked_captions"], batch["mask_labels"]
            image_features, image_tokens = model.encode_image_tokens(images)
            text_features, text_tokens, ends = model.encode_text_tokens(masked)
            counted = torch.arange(len(labels), device=labels.device) < len(self.group.share_of(pairs))
            labels = labels.where(counted[:, None], NOT_MASKED)
            losses["mlm"] = self.mlm(image_tokens, text_tokens, ends, labels, batch["mask_positions"])
            if self.weights.keys() != {"mlm"} and not self.mask_captions:  # the other losses need unmasked captions
                text_features = model.encode_text(captions)
        image_features, text_features, person_ids = (
            self.group.gather(x, pairs) for x in (image_features, text_features, person_ids)
        )
        if self.id is not None:
            losses["id"] = self.id(image_features, text_features, person_ids)
        for name in (name for name in self.weights if name in PAIR_LOSSES):
            options = {} if name == "cmpm" else {"temperature": self.temperature}
            losses[name] = PAIR_LOSSES[name](image_features, text_features, person_ids, **options)
        return losses


class LossesOfModel(nn.Module):
    """Objective and model in one module, from a batch to its losses, as DistributedDataParallel requires."""

    def __init__(self, objective: Objective, model: AdaptedCLIP):
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, batch: Mapping[str, Tensor], pairs: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch, pairs)
