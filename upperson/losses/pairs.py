"""Losses over the pairs of a batch.

sdm     similarity distribution matching (IRRA, arXiv 2303.12501, Eq. 5-6), UP-Person's loss
itc     image-text contrast (CLIP, arXiv 2103.00020): each pair is its own class
cmpm    cross-modal projection matching (Zhang and Lu, ECCV 2018, Eq. 1-6)

All losses take image and text features (B, E) of any floating dtype, not normalised; row i of both is one pair. The
person ids are (B,) integers; pairs of one person are positives of each other. All losses return a scalar, computed in
float32 or wider, also under autocast. They raise ValueError for mismatched shapes and for a batch of one pair, which
has no negatives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sdm_loss(
    image_features: Tensor,
    text_features: Tensor,
    person_ids: Tensor,
    *,
    temperature: float = 0.02,
    epsilon: float = 1e-8,
) -> Tensor:
    """KL divergence from the predicted to the true matching distribution, image → text plus text → image.

    p_i = softmax_j(cos(f_i, g_j) / temperature)        t_ij = [same person] / number of the same person
    loss = mean_i Σ_j p_ij (log p_ij − log(t_ij + epsilon)),  in both directions
    """
    images, texts = _checked(image_features, text_features, person_ids, "sdm_loss")
    with torch.autocast(images.device.type, enabled=False):
        logits = F.normalize(images) @ F.normalize(texts).t() / temperature
        same = _same_person(person_ids, logits.dtype)
        log_target = torch.log(same / same.sum(1, keepdim=True) + epsilon)
        return _divergence(logits, log_target) + _divergence(logits.t(), log_target)


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    person_ids: Tensor,
    *,
    temperature: float = 0.02,
) -> Tensor:
    """Cross entropy of each image among the texts and of each text among the images, averaged.

        loss = − mean_i [log softmax_j(cos(f_i, g_j) / temperature)]_ii,  the mean of both directions

    Other pairs of the same person count as negatives, as in CLIP.
    """
    images, texts = _checked(image_features, text_features, person_ids, "itc_loss")
    with torch.autocast(images.device.type, enabled=False):
        logits = F.normalize(images) @ F.normalize(texts).t() / temperature
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def cmpm_loss(
    image_features: Tensor,
    text_features: Tensor,
    person_ids: Tensor,
    *,
    epsilon: float = 1e-8,
) -> Tensor:
    """KL divergence from the distribution of projections to the matching labels, image → text plus text → image.

        p_i = softmax_j(f_i · g_j / |g_j|)        t_ij = [same person] / (number of the same person)^½
        loss = mean_i Σ_j p_ij (log p_ij − log(t_ij + epsilon)),  in both directions

    The labels are divided by their L2 norm, as in the field's code. They are not a distribution, so the loss may be
    negative.
    """
    images, texts = _checked(image_features, text_features, person_ids, "cmpm_loss")
    with torch.autocast(images.device.type, enabled=False):
        log_target = torch.log(F.normalize(_same_person(person_ids, images.dtype)) + epsilon)
        return _divergence(images @ F.normalize(texts).t(), log_target) + _divergence(
            texts @ F.normalize(images).t(), log_target
        )


PAIR_LOSSES = {"sdm": sdm_loss, "itc": itc_loss, "cmpm": cmpm_loss}


def _divergence(logits: Tensor, log_target: Tensor) -> Tensor:
    log_predicted = F.log_softmax(logits, dim=1)
    return (log_predicted.exp() * (log_predicted - log_target)).sum(1).mean()


def _same_person(person_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, B): 1 if both pairs show the same person, else 0."""
    return (person_ids.unsqueeze(0) == person_ids.unsqueeze(1)).to(dtype)


def _checked(image_features: Tensor, text_features: Tensor, person_ids: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The features in float32 or wider. Raises ValueError for invalid shapes."""
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"{name} expects image and text features of one shape (B, E), got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    if person_ids.shape != image_features.shape[:1]:
        raise ValueError(
            f"{name} expects one person id a pair, ({len(image_features)},), got {tuple(person_ids.shape)}"
        )
    if len(image_features) < 2:
        raise ValueError(
            f"{name} compares the pairs of a batch with each other and needs at least two, got {len(image_features)}"
        )
    dtype = torch.promote_types(torch.promote_types(image_features.dtype, text_features.dtype), torch.float32)
    return image_features.to(dtype), text_features.to(dtype)
