"""QuickGELU, the activation of OpenAI's CLIP (arXiv 2103.00020), with the bias of the product before it."""

from torch import Tensor

from upperson_kernels.backend import resolve
from upperson_kernels.checks import (
    refuse_forward_mode,
    require_device,
    require_dtype,
    require_rows,
    require_shape,
)
from upperson_kernels.quick_gelu import reference


def quick_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """u · sigmoid(1.702 u) with u = x + bias. Backward starts from x, and no other large tensor is saved.

    Args:
        x: (..., C), of any strides; float32, float16 or bfloat16 on a GPU, float64, float32 or float16 in Triton's
            interpreter, all of them with backend="torch".
        bias: (C,), in x's dtype or float32; None: u = x.
        backend: None (Triton on CUDA or under TRITON_INTERPRET=1, else PyTorch), "triton" or "torch".

    Returns:
        (..., C) in x's dtype. Differentiable once, in both tensors.

    Raises:
        ValueError: an unsupported shape or device.
        TypeError: an unsupported dtype; an argument that is not a tensor.
        RuntimeError: the backend cannot run on this machine.
    """
    name = "quick_gelu"
    require_rows(name, "x", x)
    tensors = [x]
    if bias is not None:
        require_shape(name, "bias", bias, (x.shape[-1],))
        require_device(name, "bias", bias, "x", x)
        require_dtype(name, "bias", bias, "x", x)
        tensors.append(bias)
    if resolve(backend, x) == "torch":
        return reference.plain(x, bias)
    refuse_forward_mode(name, tensors)
    from upperson_kernels.quick_gelu import op  # imports Triton

    return op.quick_gelu(x, bias)
