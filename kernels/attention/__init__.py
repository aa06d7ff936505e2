"""Multi-head attention with a salable prefix (UP-Person, arXiv 2504.10084, Sec. III and Eq. 15)."""

from torch import Tensor

from kernels.attention import reference
from kernels.backend import resolve
from kernels.checks import require_device, require_dtype, require_float, require_shape

SCALE_TARGETS = ("weights", "logits")
MAX_HEAD_WIDTH = 128


def prefix_attention(qkv: Tensor, prefix_key: Tensor, prefix_value: Tensor, prefix_scale: Tensor, *,
                     causal: bool = False, scale_target: str = "weights",
                     backend: str | None = None) -> Tensor:
    """Attention of N tokens over P learned prefix columns and the N tokens, in one softmax.

    o_i = Σ_j w_j p_ij v_j with p = softmax over all visible columns of σ q_i·k_j, σ = 1/√D. Every token sees
    the whole prefix, also under the causal mask. λ = prefix_scale acts in one of two places:

    scale_target="weights"   on the prefix weights after the softmax (Eq. 15): w = λ on prefix columns, 1 on
                             token columns, and no renormalising
    scale_target="logits"    on the prefix logits before the softmax: σ λ q_i·k_j on prefix columns, w = 1

    Args:
        qkv: queries, keys and values, (B, N, 3, H, D), of any strides; float32, float16 or bfloat16 on a GPU,
            float64, float32 or float16 in Triton's interpreter, any of them with backend="torch".
        prefix_key, prefix_value: (P, H, D), P ≥ 0, shared by the batch; in qkv's dtype or float32.
        prefix_scale: λ, a tensor of shape (); in qkv's dtype or float32.
        causal: token i sees tokens 0 … i only.
        backend: None (Triton on CUDA or under TRITON_INTERPRET=1, else PyTorch), "triton" or "torch".

    Returns:
        (B, N, H, D) in qkv's dtype. Differentiable once, in all four tensors.

    Raises:
        ValueError: a shape, a device or an option that does not fit.
        TypeError: a dtype that does not fit, here or with the backend.
        RuntimeError: the backend cannot run on this machine.
    """
    name = "prefix_attention"
    if scale_target not in SCALE_TARGETS:
        raise ValueError(f"{name}: scale_target must be 'weights' or 'logits', not {scale_target!r}")
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{name}: qkv must be (B, N, 3, H, D), not {tuple(qkv.shape)}")
    require_float(name, "qkv", qkv)
    *_, heads, width = qkv.shape
    require_shape(name, "prefix_key", prefix_key, ("P", heads, width))
    require_shape(name, "prefix_value", prefix_value, (prefix_key.shape[0], heads, width))
    require_shape(name, "prefix_scale", prefix_scale, ())
    others = dict(prefix_key=prefix_key, prefix_value=prefix_value, prefix_scale=prefix_scale)
    for other_name, other in others.items():
        require_device(name, other_name, other, "qkv", qkv)
        require_dtype(name, other_name, other, "qkv", qkv)

    if resolve(backend, qkv) == "torch":
        return reference.folded(qkv, prefix_key, prefix_value, prefix_scale, causal, scale_target)
    if width > MAX_HEAD_WIDTH:
        raise ValueError(f"{name}: backend 'triton' takes head widths up to {MAX_HEAD_WIDTH}, not {width}; "
                         "use backend='torch'")
    from kernels.attention import op  # imports Triton
    return op.forward(qkv, prefix_key, prefix_value, prefix_scale, causal, scale_target)[0]
