"""Two losses with their own parameters, which retrieval does not need (IRRA, arXiv 2303.12501).

id      identity classification: the image and text features predict the person among those of the training split
mlm     masked language modelling: a cross-modal transformer predicts the masked words from the caption and the image

Checkpoints do not contain these heads.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from upperson.losses.names import NOT_MASKED
from upperson.machine import SINGLE_PROCESS, Group

DEPTH = 4  # blocks of the cross-modal transformer
HEAD_WIDTH = 64


class IdentityClassifier(nn.Module):
    """The id loss: the mean of the cross entropies of W f + b for the image and the text feature f, not normalised."""

    def __init__(self, width: int, person_ids: Iterable[int]):
        super().__init__()
        self.person_ids: Tensor
        self.register_buffer("person_ids", torch.tensor(sorted(set(person_ids))), persistent=False)
        self.weight = nn.Parameter(torch.empty(len(self.person_ids), width).normal_(std=0.001))
        self.bias = nn.Parameter(torch.zeros(len(self.person_ids)))

    def forward(self, image_features: Tensor, text_features: Tensor, person_ids: Tensor) -> Tensor:
        """The loss of features (B, E) and ids (B,): a scalar in float32 or wider, also under autocast.

        Ids need not be contiguous. Raises ValueError for a person who is not in the training split. On a GPU the check
        is asynchronous, and a device-side assertion fails instead.
        """
        classes = torch.searchsorted(self.person_ids, person_ids).clamp(max=len(self.person_ids) - 1)
        known = (self.person_ids[classes] == person_ids).all()
        message = "person_ids: expected people of the training split only, found others"
        if known.device.type == "cpu" and not known:
            raise ValueError(message)
        torch._assert_async(known, message)  # pyright: ignore[reportPrivateImportUsage]
        with torch.autocast(image_features.device.type, enabled=False):
            image_loss, text_loss = (
                F.cross_entropy(F.linear(features.to(self.weight.dtype), self.weight, self.bias), classes)
                for features in (image_features, text_features)
            )
        return (image_loss + text_loss) / 2


class MaskedLanguageModel(nn.Module):
    """The mlm loss: masked text tokens attend to the image's tokens; four blocks of self-attention and an MLP follow.

        x = attention(query=LN(text), key=value=LN(image));  x = LN(blocks(x));  logits = W LN(quickgelu(V x))

    `reads_padding`: whether the blocks attend to the padding behind the end token, as in IRRA. All captions must then
    be padded to one length, whatever their batch. Otherwise padding is hidden, and a caption's loss does not depend on
    it.
    """

    def __init__(self, width: int, vocabulary: int, group: Group = SINGLE_PROCESS, *, reads_padding: bool = False):
        super().__init__()
        self.group, self.reads_padding = group, reads_padding
        heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.ln_text, self.ln_image, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation=QuickGELU(), batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(block, DEPTH, enable_nested_tensor=False)
        self.head = nn.Sequential(
            nn.Linear(width, width), QuickGELU(), nn.LayerNorm(width), nn.Linear(width, vocabulary)
        )
        self.initialise(width)

    def initialise(self, width: int) -> None:
        """CLIP's initial values of a transformer, as in IRRA: standard deviations depend on width and depth."""
        inner, outer, wide = width**-0.5, width**-0.5 * (2 * DEPTH) ** -0.5, (2 * width) ** -0.5
        blocks: list[Any] = list(self.transformer.layers)
        for attention in (self.attention, *(block.self_attn for block in blocks)):
            nn.init.normal_(attention.in_proj_weight, std=inner)
            nn.init.normal_(attention.out_proj.weight, std=outer)
        for block in blocks:
            block.linear1.reset_parameters()  # torch copies one block; each block needs its own biases
            block.linear2.reset_parameters()
            nn.init.normal_(block.linear1.weight, std=wide)
            nn.init.normal_(block.linear2.weight, std=outer)
        layers: list[Any] = list(self.head)
        hidden, logits = layers[0], layers[3]
        nn.init.normal_(hidden.weight, std=wide)
        nn.init.normal_(logits.weight, std=outer)

    def forward(
        self, image_tokens: Tensor, text_tokens: Tensor, ends: Tensor, labels: Tensor, positions: Tensor
    ) -> Tensor:
        """The mean cross entropy over the masked tokens of all processes, a scalar in float32 or wider.

        The loss is 0 if no token is masked.

        Args:
            image_tokens: (B, N, E).
            text_tokens: (B, L, E), of the masked captions.
            ends: (B,) int64, the position of the end token of each caption.
            labels: (B, ≥ L) int64, NOT_MASKED for tokens that are not predicted.
            positions: (M, 2) int64, caption and place of each token that may be predicted; found on the CPU, because
                their number would have to be read back from a GPU.
        """
        padding = None
        if not self.reads_padding:
            padding = torch.arange(text_tokens.shape[1], device=ends.device) > ends[:, None]
        image = self.ln_image(image_tokens)
        x, _ = self.attention(self.ln_text(text_tokens), image, image, need_weights=False)
        x = self.ln_post(self.transformer(x, src_key_padding_mask=padding))
        captions, places = positions.unbind(1)
        logits, labels = self.head(x[captions, places]), labels[captions, places]
        loss = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            labels,
            ignore_index=NOT_MASKED,
            reduction="sum",
        )
        count = (labels != NOT_MASKED).sum().to(loss.dtype)
        loss, count = self.group.total(torch.stack([loss, count])).unbind()
        return loss / count.clamp(min=1)
