"""Launches the kernels of LayerNorm with a parallel adapter (device.py): torch tensors in and out."""

# pyright: reportArgumentType=false, reportCallIssue=false
# A kernel's constants are constexpr to Triton and plain values to its caller, which a type checker cannot see.

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from upperson_kernels import tiles
from upperson_kernels.adapter import device
from upperson_kernels.backend import accumulator, capability, float32_precision, multiprocessors
from upperson_kernels.rows import TRITON_DTYPES, as_rows

FINISH_BLOCKS = dict(BLOCK_C=8, num_warps=8, enable_fp_fusion=True)


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


class Shares(NamedTuple):
    """The sums of parameter_gradient_kernel over each share of the rows; empty for every sum that is not wanted."""

    up: Tensor  # (S, C, R), dyᵀ h
    column: Tensor  # (S, C), Σ dy
    down: Tensor  # (S, C, R), (dhᵀ x)ᵀ
    down_bias: Tensor  # (S, R), Σ dh
    weight: Tensor  # (S, C), Σ dy x̂


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
        chosen = row_tiles(x, rows, hidden_width)
        with torch.cuda.device_of(x):
            device.forward_kernel[(triton.cdiv(rows, chosen["BLOCK_T"]),)](
                x_rows,
                residual_rows,
                *contiguous(norm),
                *computed_with(layers, x.dtype),
                *contiguous(norm if own_norm is None else own_norm),
                y,
                stream,
                stream if own_norm is None else total,
                *saved,
                x_rows.stride(0),
                residual_rows.stride(0),
                rows,
                EPS=eps,
                HAS_RESIDUAL=residual is not None,
                OWN_NORM=own_norm is not None,
                **constants(x, layers),
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
) -> list[Tensor | None]:
    """The gradients in the order of Needs; None for every gradient that is not needed.

    Args:
        dy, dstream: gradients of y and of the stream; the latter is None where the stream was not returned.
        x: the input of LayerNorm, which is the sum where there was a residual.
        weight: (C,), LayerNorm's γ.
        layers, own_norm: the parameters of the adapter.
        saved: from forward.
    """
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    dstream_rows = None if dstream is None else as_rows(dstream)
    computed = computed_with(layers, x.dtype)
    dx, dhidden = input_gradient(dy_rows, dstream_rows, x, x_rows, weight, computed, own_norm, saved, needs)

    inputs = (x_rows, saved, dhidden, own_norm is not None)
    of_adapter = dict(up=needs.up_weight or needs.scale, column=needs.up_bias or needs.scale, down=needs.down)
    if own_norm is None or dstream_rows is None:
        wanted = of_adapter | dict(column=of_adapter["column"] or needs.bias, weight=needs.weight)
        shares = of_norm = parameter_shares(dy_rows, *inputs, **wanted)
    else:  # γ and β are frozen as a rule, and dy is then not read
        shares = parameter_shares(dstream_rows, *inputs, **of_adapter, weight=False)
        of_norm = parameter_shares(dy_rows, *inputs, up=False, column=needs.bias, down=False, weight=needs.weight)

    gradients: dict[str, Tensor] = {"x": dx}
    if needs.weight:
        gradients["weight"] = of_norm.weight.sum(0).to(weight.dtype)
    if needs.bias:
        gradients["bias"] = of_norm.column.sum(0).to(weight.dtype)
    if any(of_adapter.values()):
        gradients |= finish(shares, computed, layers, own_norm)
    if needs.scale:
        gradients["scale"] = gradients["scale"].sum().to(layers.scale.dtype)
    return [gradients[name] if needed else None for name, needed in zip(Needs._fields, needs, strict=True)]


def input_gradient(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    x_rows: Tensor,
    weight: Tensor,
    layers: Layers,
    own_norm: Norm | None,
    saved: Saved,
    needs: Needs,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, in its shape, and of the hidden activations, (T, R). dy and dstream are (T, C)."""
    hidden_width = layers.down_weight.shape[0]
    rows = x_rows.shape[0]
    dx = x.new_empty(x.shape if needs.x else 0)
    dhidden = x.new_empty(rows, hidden_width)
    if not rows or not (needs.x or needs.down):
        return dx, dhidden
    norm_weight, down_norm, down_shift = weight, layers.down_bias, layers.down_bias  # not read without an own norm
    if own_norm is not None:
        acc_dtype = accumulator(x.dtype)
        wide_down = layers.down_weight.to(acc_dtype)
        norm_weight = own_norm.weight
        down_norm = wide_down @ own_norm.weight.to(acc_dtype)
        down_shift = torch.addmv(layers.down_bias.to(acc_dtype), wide_down, own_norm.bias.to(acc_dtype))
    chosen = row_tiles(x, rows, hidden_width)
    with torch.cuda.device_of(x):
        device.input_gradient_kernel[(triton.cdiv(rows, chosen["BLOCK_T"]),)](
            dy,
            dy if dstream is None else dstream,
            x_rows,
            weight.contiguous(),
            layers.down_weight,
            layers.up_weight,
            layers.scale,
            norm_weight.contiguous(),
            down_norm,
            down_shift,
            *saved,
            dx,
            dhidden,
            dy.stride(0),
            dy.stride(0) if dstream is None else dstream.stride(0),
            x_rows.stride(0),
            rows,
            NEED_DX=needs.x,
            HAS_DSTREAM=dstream is not None,
            OWN_NORM=own_norm is not None,
            **constants(x, layers),
            **chosen,
        )
    return dx, dhidden


def parameter_shares(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    dhidden: Tensor,
    own_norm: bool,
    *,
    up: bool,
    column: bool,
    down: bool,
    weight: bool,
) -> Shares:
    """The sums over shares of the rows (T, C) of dy and x that are wanted."""
    (rows, width), hidden_width = x.shape, dhidden.shape[1]
    chosen = tiles.choose("adapter_parameters", hidden_width, x.element_size(), capability(x))
    row_blocks, column_blocks = triton.cdiv(rows, chosen["BLOCK_T"]), triton.cdiv(width, chosen["BLOCK_C"])
    shares = shares_of(x, rows, width, chosen)
    shapes = (
        (up, (width, hidden_width)),
        (column, (width,)),
        (down, (width, hidden_width)),
        (down, (hidden_width,)),
        (weight, (width,)),
    )
    acc_dtype = accumulator(x.dtype)
    nothing = x.new_empty(0, dtype=acc_dtype)
    found = Shares(*(x.new_empty((shares, *shape), dtype=acc_dtype) if wanted else nothing for wanted, shape in shapes))
    if shares and (up or column or down or weight):
        with torch.cuda.device_of(x):
            device.parameter_gradient_kernel[(column_blocks, shares)](
                dy,
                x,
                *saved,
                dhidden,
                *found,
                dy.stride(0),
                x.stride(0),
                rows,
                triton.cdiv(row_blocks, shares) * chosen["BLOCK_T"],
                C=width,
                R=hidden_width,
                NEED_UP=up,
                NEED_COLUMN=column,
                NEED_DOWN=down,
                NEED_WEIGHT=weight,
                OWN_NORM=own_norm,
                PRECISION=float32_precision(),
                ACC=TRITON_DTYPES[acc_dtype],
                # Triton 3.6 cannot pipeline an operand on Blackwell that is computed from what was loaded.
                STAGES=1 if own_norm and capability(x) >= 100 else chosen["num_stages"],
                **chosen,
            )
    return found


def shares_of(x: Tensor, rows: int, width: int, chosen: dict[str, Any]) -> int:
    """As many shares of the rows as give every multiprocessor one program; none where there are no rows."""
    row_blocks, column_blocks = triton.cdiv(rows, chosen["BLOCK_T"]), triton.cdiv(width, chosen["BLOCK_C"])
    return min(row_blocks, max(1, multiprocessors(x) // column_blocks))


def finish(shares: Shares, computed: Layers, layers: Layers, own_norm: Norm | None) -> dict[str, Tensor]:
    """The gradients of the adapter's parameters from their shares, by name; of the scale, (programs,), to be summed.

    Those whose sums are missing are not written. `computed`: the layers as the kernels multiplied with them.
    """
    hidden_width, width = layers.down_weight.shape
    norm = Norm(layers.up_bias, layers.up_bias) if own_norm is None else own_norm
    parameters = dict(
        down_weight=layers.down_weight,
        down_bias=layers.down_bias,
        up_weight=layers.up_weight,
        up_bias=layers.up_bias,
        scale=None,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
    )
    programs = triton.cdiv(width, FINISH_BLOCKS["BLOCK_C"])
    found = {
        name: shares.up.new_empty(programs)
        if parameter is None
        else torch.empty_like(parameter, memory_format=torch.contiguous_format)
        for name, parameter in parameters.items()
    }
    with torch.cuda.device_of(shares.up):
        device.finish_kernel[(programs,)](
            shares.up,
            shares.column,
            shares.down,
            shares.down_bias,
            computed.down_weight,
            computed.up_weight,
            computed.up_bias,
            computed.scale,
            *contiguous(norm),
            *found.values(),
            max(map(len, shares)),
            C=width,
            R=hidden_width,
            NEED_UP=shares.up.dim() > 1,
            NEED_COLUMN=shares.column.dim() > 1,
            NEED_DOWN=shares.down.dim() > 1,
            OWN_NORM=own_norm is not None,
            ACC=TRITON_DTYPES[shares.up.dtype],
            BLOCK_R=triton.next_power_of_2(hidden_width),
            **FINISH_BLOCKS,
        )
    return found


def row_tiles(x: Tensor, rows: int, hidden_width: int) -> dict[str, Any]:
    """The tiles of the kernels that own rows."""
    return tiles.choose(rows_kernel(x, rows), hidden_width, x.element_size(), capability(x))


def rows_kernel(x: Tensor, rows: int) -> str:
    """The entry of the tiles: with few rows, programs of 64 would leave multiprocessors idle."""
    return "adapter_rows" if rows >= 64 * multiprocessors(x) else "adapter_few_rows"


def constants(x: Tensor, layers: Layers) -> dict[str, Any]:
    """The constants of the kernels that own rows."""
    hidden_width, width = layers.down_weight.shape
    return dict(C=width, R=hidden_width, PRECISION=float32_precision(), ACC=TRITON_DTYPES[accumulator(x.dtype)])


def contiguous(tensors: NamedTuple) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def computed_with(layers: Layers, dtype: torch.dtype) -> Layers:
    """The layers as the kernels take them: contiguous, both weights in the dtype of the activations."""
    layers = Layers(*contiguous(layers))
    return layers._replace(down_weight=layers.down_weight.to(dtype), up_weight=layers.up_weight.to(dtype))
