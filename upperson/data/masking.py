"""The caption mask: tokens are hidden in training, as in the released UP-Person code."""

import torch

from upperson.losses.names import NOT_MASKED

# Ids of CLIP's vocabulary. UP-Person's mask token takes the place of the
# last word that open_clip knows ("jekyll"), which descriptions of pedestrians can do without.
MASK_ID = 49405
END_ID = 49407

SELECTED, MASKED, REPLACED = 0.15, 0.8, 0.1  # of the tokens; of the selected ones; the rest stay as they are


def mask_caption(token_ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks a caption as BERT does: [L] int64 -> the masked caption and what was there, both new, [L] int64.

    Each token between start and end is selected with probability 0.15; of the selected, 80 % become the mask
    id, 10 % a random id from 1 to 49404 and 10 % stay. When none is selected, the first is masked. Start, end
    and padding are never touched. The labels are the ids of the selected tokens, and NOT_MASKED elsewhere. The
    result is a function of the tokens and of the generator's state alone.

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
    fate = torch.rand(len(content), generator=generator)
    random_ids = torch.randint(1, MASK_ID, (len(content),), generator=generator)
    if not selected.any():
        selected[0], fate[0] = True, 0.0
    labels[1:end] = torch.where(selected, content, NOT_MASKED)
    replaced = selected & (fate >= MASKED) & (fate < MASKED + REPLACED)
    content[selected & (fate < MASKED)] = MASK_ID
    content[replaced] = random_ids[replaced]
    return masked, labels
