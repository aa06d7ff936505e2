"""What the column FLOPs of the paper's Table IV counts (arXiv 2504.10084), to the digit.

Multiply-adds of linear modules and of the patch convolution, in one training forward of one pair. It leaves out the
attention (nn.MultiheadAttention: its projections and its products) and what LoRA and prefixes add inside of it, about
36 % of a plain pass through CLIP.
"""

from functools import singledispatch
from typing import Any

from torch import nn

from upperson.losses.heads import IdentityClassifier, MaskedLanguageModel
from upperson.losses.objective import Objective
from upperson.model import AdaptedCLIP
from upperson.petl import CoupledPrompt, Mixture, NormedAdapter, Prompt
from upperson.petl.adapters import Bottleneck


def paper_flops(model: AdaptedCLIP, objective: Objective) -> int:
    """The count for a model and the losses of its training."""
    prompts = {"image": 0, "text": -model.config.method.positions_taken}  # the text's prompts take places of words
    for place, module in model.trained_modules().items():
        if isinstance(module, Prompt) and place.block == 0:
            prompts[place.tower] += tokens_of(module)
    patch = model.clip.visual.conv1.weight
    patches = model.clip.visual.positional_embedding.shape[0] - 1
    tokens = {"image": 1 + patches + prompts["image"], "text": model.context_length + prompts["text"]}

    def mlps(tower: str) -> int:
        return tokens[tower] * sum(linear_weights(block.mlp) for block in model.towers[tower])

    total = patches * patch.numel() + mlps("image") + mlps("text")
    total += sum(multiply_adds(module, tokens[place.tower]) for place, module in model.trained_modules().items())
    if objective.id is not None:
        total += multiply_adds(objective.id, tokens["text"])
    if objective.mlm is not None:  # the masked captions are a second pass through the text tower
        total += mlps("text") + multiply_adds(objective.mlm, tokens["text"])
    return total


def linear_weights(module: nn.Module) -> int:
    """The elements of the weights of all linear modules outside of attentions: multiply-adds for each token."""
    inside = {
        id(part) for each in module.modules() if isinstance(each, nn.MultiheadAttention) for part in each.modules()
    }
    linear = (each for each in module.modules() if isinstance(each, nn.Linear) and id(each) not in inside)
    return sum(each.weight.numel() for each in linear)


def tokens_of(prompt: Prompt) -> int:
    """The number of tokens that a layer gets: its own, and as many of the other tower's."""
    return len(prompt.tokens) * (1 + isinstance(prompt, CoupledPrompt))


@singledispatch
def multiply_adds(module: Any, tokens: int) -> int:
    """The count of a trained module for a sequence of `tokens`: 0 inside of the attention, and without a product."""
    return 0


@multiply_adds.register(Bottleneck)
@multiply_adds.register(NormedAdapter)
def _(module: Any, tokens: int) -> int:
    return tokens * (module.down_weight.numel() + module.up_weight.numel())


@multiply_adds.register
def _(module: Mixture, tokens: int) -> int:
    """The experts that a token chose, and the gate of the tokens; not the gate of the task."""
    experts = module.down_weight[0].numel() + module.up_weight[0].numel()
    return tokens * (module.chosen * experts + module.input_gate.numel())


@multiply_adds.register
def _(module: CoupledPrompt, tokens: int) -> int:
    return len(module.tokens) * module.projection.weight.numel()


@multiply_adds.register
def _(module: IdentityClassifier, tokens: int) -> int:
    """Once for the image, once for the caption."""
    return 2 * module.weight.numel()


@multiply_adds.register
def _(module: MaskedLanguageModel, tokens: int) -> int:
    """The MLPs of the cross-modal blocks, and the head of words, for all tokens."""
    return tokens * (linear_weights(module.transformer) + linear_weights(module.head))
