"""Launches the kernels of LayerNorm with a parallel adapter (device.py): torch tensors in and out."""

# pyright: reportArgumentType=false, reportCallIssue=false
# A kernel's constants are constexpr to Triton and plain values to its caller, which a type checker cannot see.

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from upperson_kernels import tiles
from upperson_kernels.adapter import device
from upperson_kernels.backend import accumulator, capability, float32_precision
from upperson_kernels.rows import TRITON_DTYPES, as_rows

MAX_SHARES = 32  # partial sums of the parameter gradients


class Norm(NamedTuple):
    """The parameters of a LayerNorm."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)


class Layers(NamedTuple):
    """The parameters of the adapter."""

    down_weight: Tensor  # (R, C)
    down_bias: Tensor  # (R,)
    up_weight: Tensor  # (C, R)
    up_bias: Tensor  # (C,)
    scale: Tensor  # ()


class Saved(NamedTuple):
    """What forward computes for backward, for T rows."""

    mean: Tensor  # (T,)
    rstd: Tensor  # (T,), 1 / std
    hidden: Tensor  # (T, R), hidden activations


class Needs(NamedTuple):
    """Which gradients are wanted, in the order in which backward returns them."""

    x: bool
    weight: bool
    bias: bool
    down_weight: bool
    down_bias: bool
    up_weight: bool
    up_bias: bool
    scale: bool
    norm_weight: bool
    norm_bias: bool

    @property
    def down(self) -> bool:
        """Whether any gradient needs that of the hidden activations, besides x's."""
        return self.down_weight or self.down_bias or self.norm_weight or self.norm_bias


class Sums(NamedTuple):
    """The sums of parameter_gradient_kernel; empty for every sum that is not wanted."""

    up: Tensor  # (C, R), dyᵀ h
    column: Tensor  # (C,), Σ dy
    down: Tensor  # (C, R), (dhᵀ x)ᵀ
    down_bias: Tensor  # (R,), Σ dh
    weight: Tensor  # (C,), Σ dy x̂


def forward(
    x: Tensor, residual: Tensor | None, norm: Norm, layers: Layers, own_norm: Norm | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """y, the stream, the sum x + residual where backward needs it and it is not the stream, and what backward needs.

    With t = x, or x + residual, the stream is

        t                    with a residual, without a norm of the adapter's own
        t + scale · A        with a norm of its own, whether there is a residual or not

    Outputs that do not apply are returned as empty tensors. Backward's two kernels read t. They could add x and the
    residual again instead: one write less and two reads more, and two tensors kept instead of one.
    """
    hidden_width, width = layers.down_weight.shape
    rows = x.numel() // width
    acc_dtype = accumulator(x.dtype)
    y = x.new_empty(x.shape)
    stream = x.new_empty(x.shape if own_norm is not None or residual is not None else 0)
    total = x.new_empty(x.shape if own_norm is not None and residual is not None else 0)
    saved = Saved(
        mean=x.new_empty(rows, dtype=acc_dtype),
        rstd=x.new_empty(rows, dtype=acc_dtype),
        hidden=x.new_empty(rows, hidden_width),
    )
    if rows:
        x_rows = as_rows(x)
        residual_rows = x_rows if residual is None else as_rows(residual)
        chosen = tiles.choose("adapter_rows", hidden_width, x.element_size(), capability(x))
        with torch.cuda.device_of(x):
            device.forward_kernel[(triton.cdiv(rows, chosen["BLOCK_T"]),)](
                x_rows,
                residual_rows,
                *(parameter.contiguous() for parameter in norm),
                *(parameter.contiguous() for parameter in layers),
                *(parameter.contiguous() for parameter in (norm if own_norm is None else own_norm)),
                y,
                stream,
                stream if own_norm is None else total,
                *saved,
                x_rows.stride(0),
                residual_rows.stride(0),
                rows,
                width,
                hidden_width,
                EPS=eps,
                HAS_RESIDUAL=residual is not None,
                OWN_NORM=own_norm is not None,
                PRECISION=float32_precision(),
                ACC=TRITON_DTYPES[acc_dtype],
                **chosen,
            )
    return y, stream, total, saved


def backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    layers: Layers,
    own_norm: Norm | None,
    saved: Saved,
    needs: Needs,
) -> tuple[Tensor, ...]:
    """The gradients in the order of Needs; empty for every gradient that is not needed.

    Args:
        dy, dstream: gradients of y and of the stream; the latter is None where the stream was not returned.
        x: the input of LayerNorm, which is the sum where there was a residual.
        weight: (C,), LayerNorm's γ.
        layers, own_norm: the parameters of the adapter.
        saved: from forward.
    """
    hidden_width, width = layers.down_weight.shape
    acc_dtype = accumulator(x.dtype)
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    dstream_rows = dy_rows if dstream is None else as_rows(dstream)
    dx, dhidden = input_gradient(
        dy_rows, dstream_rows, dstream is not None, x, x_rows, weight, layers, own_norm, saved, needs
    )

    common = (x_rows, saved, dhidden, width, hidden_width, own_norm is not None)
    up, column = needs.up_weight or needs.scale, needs.up_bias or needs.scale
    if own_norm is None:
        sums = parameter_sums(
            dy_rows, *common, up=up, column=column or needs.bias, down=needs.down, weight=needs.weight
        )
        of_norm = sums
    else:  # γ and β are frozen as a rule, and dy is then not read
        sums = parameter_sums(dstream_rows, *common, up=up, column=column, down=needs.down, weight=False)
        of_norm = parameter_sums(dy_rows, *common, up=False, column=needs.bias, down=False, weight=needs.weight)

    gradients = {name: x.new_empty(0) for name in Needs._fields} | {"x": dx}
    wide_scale = layers.scale.to(acc_dtype)
    if needs.weight:
        gradients["weight"] = of_norm.weight.to(weight.dtype)
    if needs.bias:
        gradients["bias"] = of_norm.column.to(weight.dtype)
    if needs.down_weight:
        gradients["down_weight"] = down_gradient(sums, own_norm, acc_dtype).to(layers.down_weight.dtype)
    if needs.down_bias:
        gradients["down_bias"] = sums.down_bias.to(layers.down_bias.dtype)
    if needs.up_weight:
        gradients["up_weight"] = (wide_scale * sums.up).to(layers.up_weight.dtype)
    if needs.up_bias:
        gradients["up_bias"] = (wide_scale * sums.column).to(layers.up_bias.dtype)
    if needs.scale:
        of_weight, of_bias = sums.up * layers.up_weight.to(acc_dtype), sums.column * layers.up_bias.to(acc_dtype)
        gradients["scale"] = (of_weight.sum() + of_bias.sum()).to(layers.scale.dtype)
    if own_norm is not None and (needs.norm_weight or needs.norm_bias):
        wide_down = layers.down_weight.contiguous().to(acc_dtype)
        if needs.norm_weight:
            gradients["norm_weight"] = (wide_down.t() * sums.down).sum(1).to(own_norm.weight.dtype)
        if needs.norm_bias:
            gradients["norm_bias"] = (sums.down_bias @ wide_down).to(own_norm.bias.dtype)
    return tuple(gradients.values())


def input_gradient(
    dy: Tensor,
    dstream: Tensor,
    has_dstream: bool,
    x: Tensor,
    x_rows: Tensor,
    weight: Tensor,
    layers: Layers,
    own_norm: Norm | None,
    saved: Saved,
    needs: Needs,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, in its shape, and of the hidden activations, (T, R). dy and dstream are (T, C)."""
    hidden_width, width = layers.down_weight.shape
    rows = x_rows.shape[0]
    acc_dtype = accumulator(x.dtype)
    dx = x.new_empty(x.shape if needs.x else 0)
    dhidden = x.new_empty(rows, hidden_width)
    if not rows or not (needs.x or needs.down):
        return dx, dhidden
    norm_weight, down_norm, down_shift = weight, layers.down_bias, layers.down_bias  # not read without an own norm
    if own_norm is not None:
        wide_down = layers.down_weight.contiguous().to(acc_dtype)
        norm_weight = own_norm.weight
        down_norm = wide_down @ own_norm.weight.to(acc_dtype)
        down_shift = torch.addmv(layers.down_bias.to(acc_dtype), wide_down, own_norm.bias.to(acc_dtype))
    chosen = tiles.choose("adapter_rows", hidden_width, x.element_size(), capability(x))
    with torch.cuda.device_of(x):
        device.input_gradient_kernel[(triton.cdiv(rows, chosen["BLOCK_T"]),)](
            dy,
            dstream,
            x_rows,
            weight.contiguous(),
            layers.down_weight.contiguous(),
            layers.up_weight.contiguous(),
            layers.scale,
            norm_weight.contiguous(),
            down_norm,
            down_shift,
            *saved,
            dx,
            dhidden,
            dy.stride(0),
            dstream.stride(0),
            x_rows.stride(0),
            rows,
            width,
            hidden_width,
            NEED_DX=needs.x,
            HAS_DSTREAM=has_dstream,
            OWN_NORM=own_norm is not None,
            PRECISION=float32_precision(),
            ACC=TRITON_DTYPES[acc_dtype],
            **chosen,
        )
    return dx, dhidden


def parameter_sums(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    dhidden: Tensor,
    width: int,
    hidden_width: int,
    own_norm: bool,
    *,
    up: bool,
    column: bool,
    down: bool,
    weight: bool,
) -> Sums:
    """The sums over the rows (T, C) of dy and x that are wanted."""
    rows, acc_dtype = x.shape[0], accumulator(x.dtype)
    chosen = tiles.choose("adapter_parameters", hidden_width, x.element_size(), capability(x))
    row_blocks = triton.cdiv(rows, chosen["BLOCK_T"])
    shares = min(MAX_SHARES, row_blocks)
    shapes = (
        (up, (width, hidden_width)),
        (column, (width,)),
        (down, (width, hidden_width)),
        (down, (hidden_width,)),
        (weight, (width,)),
    )
    buffers = [x.new_empty((shares, *shape) if wanted else 0, dtype=acc_dtype) for wanted, shape in shapes]
    if rows and (up or column or down or weight):
        with torch.cuda.device_of(x):
            device.parameter_gradient_kernel[(triton.cdiv(width, chosen["BLOCK_C"]), shares)](
                dy,
                x,
                *saved,
                dhidden,
                *buffers,
                dy.stride(0),
                x.stride(0),
                rows,
                width,
                hidden_width,
                triton.cdiv(row_blocks, shares) * chosen["BLOCK_T"],
                NEED_UP=up,
                NEED_COLUMN=column,
                NEED_DOWN=down,
                NEED_WEIGHT=weight,
                OWN_NORM=own_norm,
                PRECISION=float32_precision(),
                ACC=TRITON_DTYPES[acc_dtype],
                **chosen,
            )
    return Sums(*(buffer.sum(0) if wanted else buffer for buffer, (wanted, _) in zip(buffers, shapes, strict=True)))


def down_gradient(sums: Sums, own_norm: Norm | None, acc_dtype: torch.dtype) -> Tensor:
    """dWd (R, C).

    With an own norm the adapter reads z = x̂ ∘ γ' + β', and dhᵀ z = (dhᵀ x̂) ∘ γ' + (Σ dh) ⊗ β'.
    """
    if own_norm is None:
        return sums.down.t().contiguous()
    of_weight = sums.down.t() * own_norm.weight.to(acc_dtype)
    return torch.addr(of_weight, sums.down_bias, own_norm.bias.to(acc_dtype)).contiguous()
