"""The masking of caption tokens in training, as in the released UP-Person code."""

import torch

from upperson.losses.names import NOT_MASKED

# Ids of CLIP's vocabulary. UP-Person's mask token replaces the last word of open_clip's vocabulary ("jekyll"), which
# descriptions of pedestrians do not need.
MASK_ID = 49405
END_ID = 49407

SELECTED, MASKED, REPLACED = 0.15, 0.8, 0.1  # share of all tokens; shares of the selected tokens; the rest is kept


def mask_caption(token_ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks a caption as BERT does: [L] int64 -> the masked caption and the labels, both [L] int64 and new.

    Each token between start and end is selected with probability 0.15. Of the selected tokens, 80 % become the mask id,
    10 % a random id from 1 to 49404, and 10 % are kept. If no token is selected, the first is masked. Start, end and
    padding are never changed. The labels are the ids of the selected tokens, and NOT_MASKED elsewhere. The result
    depends only on the tokens and the state of the generator.

    Raises ValueError for another shape or dtype, and for tokens without an end token (id 49407).
    """
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids: expected [L] int64, found {list(token_ids.shape)} {token_ids.dtype}")
    end = int(token_ids.argmax())
    if token_ids[end] != END_ID:
        raise ValueError(f"token_ids: expected an end token ({END_ID}), found none")
    masked, labels = token_ids.clone(), torch.full_like(token_ids, NOT_MASKED)
    content = masked[1:end]  # a view
    if not len(content):
        return masked, labels
    selected = torch.rand(len(content), generator=generator) < SELECTED
    action = torch.rand(len(content), generator=generator)
    random_ids = torch.randint(1, MASK_ID, (len(content),), generator=generator)
    if not selected.any():
        selected[0], action[0] = True, 0.0
    labels[1:end] = torch.where(selected, content, NOT_MASKED)
    replaced = selected & (action >= MASKED) & (action < MASKED + REPLACED)
    content[selected & (action < MASKED)] = MASK_ID
    content[replaced] = random_ids[replaced]
    return masked, labels


def masked_positions(labels: torch.Tensor) -> torch.Tensor:
    """The caption and the place of each of the M tokens with a label: (B, L) int64 -> (M, 2) int64."""
    return (labels != NOT_MASKED).nonzero()
