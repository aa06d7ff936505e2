"""Fused Triton operators for parameter-efficient CLIP. They need torch, and Triton for the fused kernels.

prefix_attention    multi-head attention with a learned prefix that a learnable λ scales
layernorm_adapter   LayerNorm with a bottleneck adapter in parallel, optionally after a residual addition, or with a
                    LayerNorm of the adapter's own
quick_gelu          the activation of OpenAI's CLIP with the bias before it, whose backward needs its input only

PrefixAttention and LayerNormAdapter are the same operators as modules that own their parameters. resolve_backend says
which implementation runs for a tensor. unpack_sequences pads packed sequences. TilesError is the error of a file of
tiles.
"""

from upperson_kernels.adapter import LayerNormAdapter, layernorm_adapter
from upperson_kernels.attention import PrefixAttention, prefix_attention
from upperson_kernels.backend import resolve as resolve_backend
from upperson_kernels.packing import unpack_sequences
from upperson_kernels.quick_gelu import quick_gelu
from upperson_kernels.tiles import TilesError

__all__ = [
    "LayerNormAdapter",
    "PrefixAttention",
    "TilesError",
    "layernorm_adapter",
    "prefix_attention",
    "quick_gelu",
    "resolve_backend",
    "unpack_sequences",
]
