"""Multi-head attention with a salable prefix (UP-Person, arXiv 2504.10084, Sec. III and Eq. 15)."""

import itertools

import torch
from torch import Tensor, nn

from upperson_kernels.attention import reference
from upperson_kernels.backend import in_autocast, require_backend, resolve
from upperson_kernels.checks import (
    refuse_forward_mode,
    require_device,
    require_dtype,
    require_float,
    require_shape,
    require_size,
    require_switch,
    require_tensor,
)

SCALE_TARGETS = ("weights", "logits")
MAX_HEAD_WIDTH = 128


def prefix_attention(
    qkv: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_scale: Tensor,
    *,
    causal: bool = False,
    scale_target: str = "weights",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of N tokens over P learned prefix columns and the N tokens, in one softmax.

    o_i = Σ_j w_j p_ij v_j with p = softmax over all visible columns of σ q_i·k_j, σ = 1/√D. Every token sees
    the whole prefix, also under the causal mask. λ = prefix_scale acts in one of two places:

    scale_target="weights"   on the prefix weights after the softmax (Eq. 15): w = λ on prefix columns, 1 on
                             token columns, and no renormalising
    scale_target="logits"    on the prefix logits before the softmax: σ λ q_i·k_j on prefix columns, w = 1

    Args:
        qkv: queries, keys and values, (B, N, 3, H, D), or (T, 3, H, D) packed with cu_seqlens, of any strides;
            float32, float16 or bfloat16 on a GPU, float64, float32 or float16 in Triton's interpreter, any of them
            with backend="torch". Under autocast, float32 is cast first, as for PyTorch's own attention.
        prefix_key, prefix_value: (P, H, D), P ≥ 0, shared by all sequences; in qkv's dtype or float32.
        prefix_scale: λ, a tensor of shape (); in qkv's dtype or float32.
        causal: token i of a sequence sees its tokens 0 … i only.
        cu_seqlens: (S + 1,), int32: sequence i holds the tokens cu_seqlens[i] to cu_seqlens[i + 1] of a packed qkv, and
            sees no others. The values begin with 0, never fall, and end with T; sequences may be empty. They are
            checked where that costs nothing, on the CPU or without max_seqlen; elsewhere, the output of tokens that
            belong to no sequence is undefined.
        max_seqlen: tokens of the longest sequence, or more. If it is None it is read from cu_seqlens, which waits for
            the GPU.
        backend: None (Triton on CUDA or under TRITON_INTERPRET=1, else PyTorch), "triton" or "torch".

    Returns:
        (B, N, H, D), or (T, H, D) packed, in qkv's dtype. Differentiable once, in qkv and the three prefix tensors.

    Raises:
        ValueError: an unsupported shape, device or option.
        TypeError: an unsupported dtype, here or with the backend; an argument of another type.
        RuntimeError: the backend cannot run on this machine.
    """
    name = "prefix_attention"
    if scale_target not in SCALE_TARGETS:
        raise ValueError(f"{name}: scale_target must be 'weights' or 'logits', not {scale_target!r}")
    require_switch(name, "causal", causal)
    require_tensor(name, "qkv", qkv)
    if cu_seqlens is None and (qkv.dim() != 5 or qkv.shape[2] != 3):
        raise ValueError(f"{name}: qkv must be (B, N, 3, H, D), not {tuple(qkv.shape)}")
    if cu_seqlens is not None and (qkv.dim() != 4 or qkv.shape[1] != 3):
        raise ValueError(f"{name}: qkv must be (T, 3, H, D) beside cu_seqlens, not {tuple(qkv.shape)}")
    require_float(name, "qkv", qkv)
    *_, heads, width = qkv.shape
    require_shape(name, "prefix_key", prefix_key, ("P", heads, width))
    require_shape(name, "prefix_value", prefix_value, (prefix_key.shape[0], heads, width))
    require_shape(name, "prefix_scale", prefix_scale, ())
    if qkv.dtype == torch.float32 and in_autocast(qkv):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    others = dict(prefix_key=prefix_key, prefix_value=prefix_value, prefix_scale=prefix_scale)
    for other_name, other in others.items():
        require_device(name, other_name, other, "qkv", qkv)
        require_dtype(name, other_name, other, "qkv", qkv)
    max_seqlen = longest_sequence(qkv, cu_seqlens, max_seqlen)

    if resolve(backend, qkv) == "torch":
        if cu_seqlens is None:
            return reference.folded(qkv, prefix_key, prefix_value, prefix_scale, causal, scale_target)
        return reference.packed(
            qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, causal, scale_target
        )
    if width > MAX_HEAD_WIDTH:
        raise ValueError(
            f"{name}: backend 'triton' takes head widths up to {MAX_HEAD_WIDTH}, not {width}; use backend='torch'"
        )
    refuse_forward_mode(name, (qkv, *others.values()))
    from upperson_kernels.attention import op  # imports Triton

    return op.prefix_attention(
        qkv, prefix_key, prefix_value, prefix_scale, cu_seqlens, max_seqlen, causal, scale_target
    )


def longest_sequence(qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    """max_seqlen, found if it was not given, after a check of cu_seqlens; 0 without packing."""
    name = "prefix_attention"
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"{name}: max_seqlen goes with cu_seqlens, which is missing")
        return 0
    require_tensor(name, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: cu_seqlens must be int32, not {str(cu_seqlens.dtype).removeprefix('torch.')}")
    if max_seqlen is not None and not isinstance(max_seqlen, int):
        raise TypeError(f"{name}: max_seqlen must be a whole number, not {max_seqlen!r}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name}: cu_seqlens must be (S + 1,), not {tuple(cu_seqlens.shape)}")
    require_device(name, "cu_seqlens", cu_seqlens, "qkv", qkv)
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"{name}: max_seqlen must be at least 0, not {max_seqlen}")
    if max_seqlen is not None and (cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling()):
        return max_seqlen
    marks = cu_seqlens.tolist()
    longest = max((end - begin for begin, end in itertools.pairwise(marks)), default=0)
    if marks[0] != 0 or marks[-1] != qkv.shape[0] or marks != sorted(marks):
        raise ValueError(
            f"{name}: cu_seqlens must begin with 0, never fall and end with T = {qkv.shape[0]}, "
            f"but is {marks if len(marks) < 10 else [*marks[:4], '…', *marks[-4:]]}"
        )
    if max_seqlen is None:
        return longest
    if max_seqlen < longest:
        raise ValueError(
            f"{name}: max_seqlen is {max_seqlen}, but the longest sequence of cu_seqlens has {longest} tokens"
        )
    return max_seqlen


class PrefixAttention(nn.Module):
    """The salable prefix as a module: owns prefix and λ, and attends. See prefix_attention.

    Args:
        heads, head_width: of the attention that it joins.
        length: prefix columns, P; at least 0.
        scale: λ at the start; UP-Person's is 10.
        scale_target: where λ acts, "weights" or "logits".
        causal: token i sees tokens 0 … i only.
        backend: None, "triton" or "torch".

    The prefix starts uniform in [0, 0.01), as UP-Person's does. Raises TypeError, ValueError.
    """

    def __init__(
        self,
        heads: int,
        head_width: int,
        length: int,
        *,
        scale: float = 10.0,
        scale_target: str = "weights",
        causal: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        name = "PrefixAttention"
        require_size(name, "heads", heads)
        require_size(name, "head_width", head_width)
        require_size(name, "length", length, least=0)
        require_switch(name, "causal", causal)
        require_backend(backend)
        if scale_target not in SCALE_TARGETS:
            raise ValueError(f"{name}: scale_target must be 'weights' or 'logits', not {scale_target!r}")
        self.prefix_key = nn.Parameter(torch.empty(length, heads, head_width).uniform_(0, 0.01))
        self.prefix_value = nn.Parameter(torch.empty(length, heads, head_width).uniform_(0, 0.01))
        self.prefix_scale = nn.Parameter(torch.tensor(float(scale)))
        self.scale_target = scale_target
        self.causal = causal
        self.backend = backend

    def forward(self, qkv: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """qkv: (B, N, 3, H, D), or (T, 3, H, D) packed with cu_seqlens. Returns (B, N, H, D) or (T, H, D)."""
        return prefix_attention(
            qkv,
            self.prefix_key,
            self.prefix_value,
            self.prefix_scale,
            causal=self.causal,
            scale_target=self.scale_target,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        length, heads, width = self.prefix_key.shape
        return (
            f"heads={heads}, head_width={width}, length={length}, scale_target={self.scale_target!r}, "
            f"causal={self.causal}"
        )
