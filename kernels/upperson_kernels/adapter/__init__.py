"""LayerNorm with a bottleneck adapter in parallel: UP-Person's L-Adapter (arXiv 2504.10084, Sec. III)."""

import math

import torch
from torch import Tensor, nn

from upperson_kernels.adapter import reference
from upperson_kernels.backend import in_autocast, require_backend, resolve
from upperson_kernels.checks import (
    refuse_forward_mode,
    require_device,
    require_dtype,
    require_epsilon,
    require_rows,
    require_shape,
    require_size,
)

MAX_HIDDEN_WIDTH = 256


def layernorm_adapter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LN(x) + scale · up(relu(down(x))). The adapter reads x itself, beside LayerNorm and not after it.

    With norm_weight and norm_bias the adapter has a LayerNorm of its own, LN', with the statistics of the other, and
    adds to the residual stream: LN(x) and x + scale · up(relu(down(LN'(x)))), as in arXiv 2309.09496.

    Args:
        x: (..., C), of any strides; float32, float16 or bfloat16 on a GPU, float64, float32 or float16 in
            Triton's interpreter, any of them with backend="torch". Statistics are float32 (float64 for float64).
        weight, bias: (C,), of LayerNorm, both of one dtype. Like all parameters in x's dtype or float32.
        down_weight, down_bias: (R, C) and (R,), as nn.Linear(C, R) keeps them.
        up_weight, up_bias: (C, R) and (C,), as nn.Linear(R, C) keeps them.
        scale: (), the adapter's learnable scale.
        eps: added to the variance; at least 0.
        residual: x's shape and dtype. With a residual, x + residual takes the place of x and is returned too. Under
            autocast their dtypes may differ; both are then cast to the wider one.
        norm_weight, norm_bias: (C,), of the adapter's own LayerNorm; both or neither.
        backend: None (Triton on CUDA or under TRITON_INTERPRET=1, else PyTorch), "triton" or "torch".

    Returns:
        (..., C) in x's dtype. With a residual, a pair: this tensor, and x + residual. With norm_weight always a pair:
        LN(x), and the residual stream with the adapter's output added. Differentiable once, in every tensor.

    Raises:
        ValueError: an unsupported shape, device or eps; norm_weight without norm_bias or the reverse.
        TypeError: an unsupported dtype, here or with the backend; an argument of another type.
        RuntimeError: the backend cannot run on this machine.
    """
    name = "layernorm_adapter"
    require_rows(name, "x", x)
    width = x.shape[-1]
    require_shape(name, "weight", weight, (width,))
    require_shape(name, "bias", bias, (width,))
    require_shape(name, "down_weight", down_weight, ("R", width))
    hidden_width = down_weight.shape[0]
    if hidden_width == 0:
        raise ValueError(f"{name}: down_weight must be (R, {width}) with R ≥ 1, not {tuple(down_weight.shape)}")
    require_shape(name, "down_bias", down_bias, (hidden_width,))
    require_shape(name, "up_weight", up_weight, (width, hidden_width))
    require_shape(name, "up_bias", up_bias, (width,))
    require_shape(name, "scale", scale, ())
    parameters = dict(
        weight=weight,
        bias=bias,
        down_weight=down_weight,
        down_bias=down_bias,
        up_weight=up_weight,
        up_bias=up_bias,
        scale=scale,
    )
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_bias" if norm_bias is None else "norm_weight"
        raise ValueError(f"{name}: norm_weight and norm_bias go together, and {missing} is missing")
    if norm_weight is not None and norm_bias is not None:
        require_shape(name, "norm_weight", norm_weight, (width,))
        require_shape(name, "norm_bias", norm_bias, (width,))
        parameters |= dict(norm_weight=norm_weight, norm_bias=norm_bias)
    for parameter_name, parameter in parameters.items():
        require_device(name, parameter_name, parameter, "x", x)
        require_dtype(name, parameter_name, parameter, "x", x)
    if bias.dtype != weight.dtype:
        raise TypeError(f"{name}: bias must have weight's dtype, {weight.dtype}, not {bias.dtype}")
    require_epsilon(name, "eps", eps)
    if residual is not None:
        require_shape(name, "residual", residual, tuple(x.shape))
        require_device(name, "residual", residual, "x", x)
        if in_autocast(x):  # where x often comes from a matrix product
            wider = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(wider), residual.to(wider)
        if residual.dtype != x.dtype:
            raise TypeError(f"{name}: residual must have x's dtype, {x.dtype}, not {residual.dtype}")

    tensors = (x, residual, weight, bias, down_weight, down_bias, up_weight, up_bias, scale, norm_weight, norm_bias)
    if resolve(backend, x) == "torch":
        y, stream = reference.plain(*tensors, eps)
    elif hidden_width > MAX_HIDDEN_WIDTH:
        raise ValueError(
            f"{name}: backend 'triton' takes hidden widths up to {MAX_HIDDEN_WIDTH}, not "
            f"{hidden_width}; use backend='torch'"
        )
    else:
        refuse_forward_mode(name, (t for t in tensors if t is not None))
        from upperson_kernels.adapter import op  # imports Triton

        y, stream = op.layernorm_adapter(*tensors, eps)
    return y if residual is None and norm_weight is None else (y, stream)


class LayerNormAdapter(nn.Module):
    """LayerNorm and the adapter beside it as a module. See layernorm_adapter.

    Args:
        width: C.
        hidden: R, the adapter's hidden width.
        eps: LayerNorm's.
        scale: the adapter's learnable scale at the start.
        backend: None, "triton" or "torch".

    Starts as LayerNorm alone, since the up projection starts at zero; the down projection as nn.Linear's does.
    Raises TypeError, ValueError.
    """

    def __init__(self, width: int, hidden: int, *, eps: float = 1e-5, scale: float = 1.0, backend: str | None = None):
        super().__init__()
        name = "LayerNormAdapter"
        require_size(name, "width", width)
        require_size(name, "hidden", hidden)
        require_epsilon(name, "eps", eps)
        require_backend(backend)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.down_weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(hidden, width), a=math.sqrt(5)))
        self.down_bias = nn.Parameter(torch.zeros(hidden))
        self.up_weight = nn.Parameter(torch.zeros(width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.eps = eps
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual and the result: (..., C). With a residual returns the pair (result, x + residual)."""
        return layernorm_adapter(
            x,
            self.weight,
            self.bias,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            self.scale,
            eps=self.eps,
            residual=residual,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        hidden, width = self.down_weight.shape
        return f"width={width}, hidden={hidden}, eps={self.eps}"
