"""The similarity distribution matching (SDM) loss of IRRA (arXiv 2303.12501, Eq. 5-6), which UP-Person trains with."""

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

    Args:
        image_features, text_features: (B, E), any floating dtype, not normalised; row i of both is one pair.
        person_ids: (B,) integers; pairs of one person are positives of each other.

    Returns a scalar, computed in float32 at least, also under autocast.
    Raises ValueError for shapes that do not fit and for a batch of one, which has nothing to tell apart.
    """
    _check_shapes(image_features, text_features, person_ids)
    dtype = torch.promote_types(torch.promote_types(image_features.dtype, text_features.dtype), torch.float32)
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = F.normalize(image_features.to(dtype)), F.normalize(text_features.to(dtype))
        logits = images @ texts.t() / temperature
        same = (person_ids.unsqueeze(0) == person_ids.unsqueeze(1)).to(dtype)
        log_target = torch.log(same / same.sum(1, keepdim=True) + epsilon)
        return _divergence(logits, log_target) + _divergence(logits.t(), log_target)


def _divergence(logits: Tensor, log_target: Tensor) -> Tensor:
    log_predicted = F.log_softmax(logits, dim=1)
    return (log_predicted.exp() * (log_predicted - log_target)).sum(1).mean()


def _check_shapes(image_features: Tensor, text_features: Tensor, person_ids: Tensor) -> None:
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "sdm_loss expects image and text features of one shape (B, E), got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    if person_ids.shape != image_features.shape[:1]:
        raise ValueError(
            f"sdm_loss expects one person id a pair, ({len(image_features)},), got {tuple(person_ids.shape)}"
        )
    if len(image_features) < 2:
        raise ValueError(
            f"sdm_loss compares the pairs of a batch with each other and needs at least two, got {len(image_features)}"
        )
