"""Fused Triton operators for parameter-efficient CLIP, usable on their own.

prefix_attention    multi-head attention with a learned prefix scaled by a learnable λ
layernorm_adapter   LayerNorm with a bottleneck adapter in parallel, optionally after a residual addition
"""

from kernels.adapter import layernorm_adapter
from kernels.attention import prefix_attention

__all__ = ["layernorm_adapter", "prefix_attention"]
