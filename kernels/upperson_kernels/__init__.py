"""Fused Triton operators for parameter-efficient CLIP, usable on their own.

prefix_attention    multi-head attention with a learned prefix scaled by a learnable λ
layernorm_adapter   LayerNorm with a bottleneck adapter in parallel, optionally after a residual addition, or with a
                    LayerNorm of the adapter's own
quick_gelu          the activation of OpenAI's CLIP with the bias before it, backward from its input alone

PrefixAttention and LayerNormAdapter are the same as modules that own their parameters.
"""

from upperson_kernels.adapter import LayerNormAdapter, layernorm_adapter
from upperson_kernels.attention import PrefixAttention, prefix_attention
from upperson_kernels.quick_gelu import quick_gelu

__all__ = ["LayerNormAdapter", "PrefixAttention", "layernorm_adapter", "prefix_attention", "quick_gelu"]
