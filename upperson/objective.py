"""What training minimises: a weighted sum of losses, with the heads that two of them train along.

id      identity classification: the image and the text feature name the person among those of the training split
mlm     masked language modelling: a cross-modal transformer fills in the masked words, looking at the image

Both are IRRA's (arXiv 2303.12501); neither head is needed for retrieval, so checkpoints do not hold them. Where several
processes train together, all losses are those of the whole batch, see distributed.py.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from upperson.data import NOT_MASKED
from upperson.distributed import ALONE, Group
from upperson.losses import PAIR_LOSSES, parse_losses
from upperson.model import AdaptedCLIP

DEPTH = 4  # blocks of the cross-modal transformer
HEAD_WIDTH = 64


class Objective(nn.Module):
    """The sum of the losses that `losses` names, such as "sdm" or "sdm+0.5*id+mlm".

    Args:
        losses: see upperson.losses.parse_losses.
        temperature: of SDM and ITC.
        width: E, that of the embeddings.
        vocabulary: number of tokens, for mlm.
        person_ids: those of the training split, in any order and number; for id.
        mask_captions: the captions of a batch are masked as mlm's are, so that all losses share one pass through the
            text tower (DataConfig.mask_captions).
        group: the processes that have a share of each batch.
    """

    def __init__(self, losses: str, temperature: float, width: int, vocabulary: int, person_ids: Iterable[int],
                 *, mask_captions: bool = False, group: Group = ALONE):
        super().__init__()
        self.weights = parse_losses(losses)
        self.temperature = temperature
        self.mask_captions = mask_captions
        self.group = group
        self.id = IdentityClassifier(width, person_ids) if "id" in self.weights else None
        self.mlm = MaskedLanguageModel(width, vocabulary, group) if "mlm" in self.weights else None

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the heads: objective.{id,mlm}.…"""
        return {f"objective.{name}": parameter for name, parameter in self.named_parameters()}

    def forward(self, model: AdaptedCLIP, batch: Mapping[str, Tensor], pairs: int | None = None
                ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and the single losses by name, all scalars, of a batch of upperson.data.train_loader.

        Several processes give their shares of a batch of `pairs` in all, and get the same losses, those of the whole.
        """
        images, captions, person_ids = batch["images"], batch["captions"], batch["person_ids"]
        pairs = len(person_ids) if pairs is None else pairs
        losses = {}
        if self.mlm is None:
            image_features, text_features = model.encode_image(images), model.encode_text(captions)
        else:
            masked, labels = batch["masked_captions"], batch["mask_labels"]
            image_features, image_tokens = model.encode_image_tokens(images)
            text_features, text_tokens = model.encode_text_tokens(masked)
            counted = torch.arange(len(labels), device=labels.device) < len(self.group.share_of(pairs))
            labels = labels.where(counted[:, None], NOT_MASKED)
            losses["mlm"] = self.mlm(image_tokens, text_tokens, masked, labels)
            if self.weights.keys() != {"mlm"} and not self.mask_captions:   # the others see them unmasked
                text_features = model.encode_text(captions)
        image_features, text_features, person_ids = (
            self.group.gather(x, pairs) for x in (image_features, text_features, person_ids))
        if self.id is not None:
            losses["id"] = self.id(image_features, text_features, person_ids)
        for name in (name for name in self.weights if name in PAIR_LOSSES):
            options = {} if name == "cmpm" else {"temperature": self.temperature}
            losses[name] = PAIR_LOSSES[name](image_features, text_features, person_ids, **options)
        return sum(weight * losses[name] for name, weight in self.weights.items()), losses


class LossesOfModel(nn.Module):
    """Objective and model in one, batch in and losses out: what DistributedDataParallel can wrap."""

    def __init__(self, objective: Objective, model: AdaptedCLIP):
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, batch: Mapping[str, Tensor], pairs: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch, pairs)


class IdentityClassifier(nn.Module):
    """The id loss: mean of the cross entropies of W f + b for the image and for the text feature, not normalised."""

    def __init__(self, width: int, person_ids: Iterable[int]):
        super().__init__()
        self.register_buffer("person_ids", torch.tensor(sorted(set(person_ids))), persistent=False)
        self.weight = nn.Parameter(torch.empty(len(self.person_ids), width).normal_(std=0.001))
        self.bias = nn.Parameter(torch.zeros(len(self.person_ids)))

    def forward(self, image_features: Tensor, text_features: Tensor, person_ids: Tensor) -> Tensor:
        """Features (B, E), ids (B,), which need not be contiguous; a scalar, in float32 at least, also under autocast.

        Raises ValueError for a person who is not of the training split; on a GPU, which is not waited for, the next
        operation that does wait ends with a device-side assertion.
        """
        classes = torch.searchsorted(self.person_ids, person_ids).clamp(max=len(self.person_ids) - 1)
        known = (self.person_ids[classes] == person_ids).all()
        message = "person_ids: the id loss knows the people of the training split alone, found others"
        if known.device.type == "cpu" and not known:
            raise ValueError(message)
        torch._assert_async(known, message)
        with torch.autocast(image_features.device.type, enabled=False):
            losses = [F.cross_entropy(F.linear(features.to(self.weight.dtype), self.weight, self.bias), classes)
                      for features in (image_features, text_features)]
        return sum(losses) / 2


class MaskedLanguageModel(nn.Module):
    """The mlm loss: masked text tokens attend to the image's, four blocks of self-attention follow, and an MLP.

        x = attention(query=LN(text), key=value=LN(image));  x = LN(blocks(x));  logits = W LN(quickgelu(V x))

    Padding behind the end token is masked out, so that a caption's loss does not depend on its batch; IRRA lets it in.
    """

    def __init__(self, width: int, vocabulary: int, group: Group = ALONE):
        super().__init__()
        self.group = group
        heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.ln_text, self.ln_image, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation=QuickGELU(),
                                           batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(block, DEPTH, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, width), QuickGELU(), nn.LayerNorm(width),
                                  nn.Linear(width, vocabulary))
        self.initialise(width)

    def initialise(self, width: int) -> None:
        """CLIP's own start of a transformer, as IRRA takes it: standard deviations by width and depth."""
        inner, outer, wide = width**-0.5, width**-0.5 * (2 * DEPTH) ** -0.5, (2 * width) ** -0.5
        for attention in (self.attention, *(block.self_attn for block in self.transformer.layers)):
            nn.init.normal_(attention.in_proj_weight, std=inner)
            nn.init.normal_(attention.out_proj.weight, std=outer)
        for block in self.transformer.layers:
            block.linear1.reset_parameters()                             # torch copies one block; biases of its own
            block.linear2.reset_parameters()
            nn.init.normal_(block.linear1.weight, std=wide)
            nn.init.normal_(block.linear2.weight, std=outer)
        nn.init.normal_(self.head[0].weight, std=wide)
        nn.init.normal_(self.head[3].weight, std=outer)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, token_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the masked tokens of all processes, a scalar in float32 at least; 0 where none is.

        image_tokens (B, N, E) and text_tokens (B, L, E), of the masked captions; token_ids and labels (B, ≥ L) int64,
        with NOT_MASKED where nothing is to be predicted.
        """
        length = text_tokens.shape[1]
        padding = torch.arange(length, device=token_ids.device) > token_ids.argmax(1, keepdim=True)
        image = self.ln_image(image_tokens)
        x, _ = self.attention(self.ln_text(text_tokens), image, image, need_weights=False)
        x = self.ln_post(self.transformer(x, src_key_padding_mask=padding))
        masked = labels[:, :length] != NOT_MASKED
        logits = self.head(x[masked])
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, :length][masked],
                               reduction="sum")
        loss, count = self.group.total(torch.stack([loss, masked.sum().to(loss.dtype)])).unbind()
        return loss / count.clamp(min=1)
