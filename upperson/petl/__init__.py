"""The modules that are trained in a block, each a small class that a configuration chooses by name.

    prefix.py     salable (S-Prefix), vanilla
    low_rank.py   lora, dora, wora: updates of the key and value projections
    prompts.py    tokens of a layer, of one tower or coupled between both
    adapters.py   l-parallel (L-Adapter), l-sequential, parallel, sequential, ln-tuning; normed

Initial values: most modules start as close to doing nothing as training allows. Low-rank updates and adapters end in
zeros; the prefix starts small. Prompts and the normed adapter do not.

Fused are every prefix (prefix_attention, with λ = 1 for the vanilla one), prompts (as a prefix, see
upperson/model/prompts.py), the parallel L-Adapter and the normed adapter (layernorm_adapter in its two modes, up to a
width of 256). The other adapters, LN-tuning, and the merging of low-rank updates into a weight, once a step, are plain
PyTorch.
"""

from upperson.petl.adapters import ADAPTERS, FROZEN, Adapter, LayerNormTuning, NormedAdapter
from upperson.petl.low_rank import LOW_RANK, LoRA
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
    "NormedAdapter",
    "Prefix",
    "Prompt",
]
