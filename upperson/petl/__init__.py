"""The modules that are trained in a block. Each is a small class that a configuration selects by name.

    prefix.py     salable (S-Prefix), vanilla
    low_rank.py   lora, dora, wora: updates of the key and value projections
    prompts.py    tokens of a layer, of one tower or coupled between both
    adapters.py   l-parallel (L-Adapter), l-sequential, parallel, sequential, ln-tuning; normed
    mixture.py    several adapters, of which each token chooses a few

Most modules start close to the identity: the last factor of low-rank updates, adapters and mixtures is zero, and the
prefix is small. Prompts and the normed adapter do not start in this way.

Both prefixes, prompts, the parallel L-Adapter and the normed adapter are fused. Prefixes use prefix_attention, with
λ = 1 for the vanilla prefix. Prompts enter as a prefix, see upperson/model/prompts.py. The two adapters use the two
modes of layernorm_adapter, up to a width of 256. The other adapters, LN-tuning, and the merging of low-rank updates
into a weight in every step are plain PyTorch. So is the mixture, which uses PyTorch's grouped products.
"""

from upperson.petl.adapters import ADAPTERS, FROZEN, Adapter, LayerNormTuning, NormedAdapter
from upperson.petl.low_rank import LOW_RANK, LoRA, Merged, merged_linear
from upperson.petl.mixture import Mixture
from upperson.petl.prefix import PREFIXES, Prefix
from upperson.petl.prompts import CoupledPrompt, Prompt

__all__ = [
    "ADAPTERS",
    "FROZEN",
    "LOW_RANK",
    "PREFIXES",
    "Adapter",
    "CoupledPrompt",
    "LayerNormTuning",
    "LoRA",
    "Merged",
    "Mixture",
    "NormedAdapter",
    "Prefix",
    "Prompt",
    "merged_linear",
]
