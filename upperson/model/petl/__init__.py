"""The modules that are trained in a block, each a small class that a configuration chooses by name.

    prefix.py     salable (S-Prefix), vanilla
    low_rank.py   lora, dora, wora: updates of the key and value projections
    adapters.py   l-parallel (L-Adapter), l-sequential, parallel, sequential, ln-tuning

Initial values: the modules start as close to doing nothing as training allows. Low-rank updates and adapters end in
zeros; the prefix starts small.

What is fused: every prefix (kernels.prefix_attention, with λ = 1 for the vanilla one) and the parallel L-Adapter
(kernels.layernorm_adapter). The other adapters read something else than the input of LayerNorm, which no fused operator
covers; they, LN-tuning, and the merging of low-rank updates into a weight, once a step, are plain PyTorch.
"""

from upperson.model.petl.adapters import ADAPTERS, FROZEN, Adapter, LayerNormTuning
from upperson.model.petl.low_rank import LOW_RANK, LoRA
from upperson.model.petl.prefix import PREFIXES, Prefix

__all__ = ["ADAPTERS", "FROZEN", "LOW_RANK", "PREFIXES", "Adapter", "LayerNormTuning", "LoRA", "Prefix"]
