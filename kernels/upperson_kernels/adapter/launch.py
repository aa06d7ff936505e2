"""Launches the kernels of LayerNorm with a parallel adapter (device.py); torch tensors in and out."""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from upperson_kernels import tiles
from upperson_kernels.adapter import device
from upperson_kernels.backend import accumulator, capability, float32_precision
from upperson_kernels.rows import TRITON_DTYPES, as_rows

MAX_SHARES = 32  # partial sums of the parameter gradients


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y, the stream, x + residual where backward needs it and the stream is something else, and per row:
    mean, 1/std, hidden activations (T, R). With t = x, or x + residual, the stream is

        t                    with a residual, without norm_weight
        t + scale · A        with norm_weight, whether there is a residual or not

    and a tensor that there is not is empty. Backward, whose two kernels read t, could keep x and the residual in its
    place and add them again: one write less and two reads more, and two tensors held instead of one.
    """
    own_norm = norm_weight is not None
    hidden_width, width = down_weight.shape
    rows = x.numel() // width
    acc_dtype = accumulator(x.dtype)
    y = x.new_empty(x.shape)
    stream = x.new_empty(x.shape if own_norm or residual is not None else 0)
    total = x.new_empty(x.shape if own_norm and residual is not None else 0)
    mean = x.new_empty(rows, dtype=acc_dtype)
    rstd = x.new_empty(rows, dtype=acc_dtype)
    hidden = x.new_empty(rows, hidden_width)
    if rows:
        x_rows = as_rows(x)
        residual_rows = x_rows if residual is None else as_rows(residual)
        norm = (norm_weight, norm_bias) if own_norm else (weight, bias)
        chosen = tiles.choose("adapter_rows", hidden_width, x.element_size(), capability(x))
        with torch.cuda.device_of(x):
            device.forward_kernel[(triton.cdiv(rows, chosen["BLOCK_T"]),)](
                x_rows,
                residual_rows,
                weight.contiguous(),
                bias.contiguous(),
                down_weight.contiguous(),
                down_bias.contiguous(),
                up_weight.contiguous(),
                up_bias.contiguous(),
                scale,
                *(t.contiguous() for t in norm),
                y,
                stream,
                total if own_norm else stream,
                mean,
                rstd,
                hidden,
                x_rows.stride(0),
                residual_rows.stride(0),
                rows,
                width,
                hidden_width,
                EPS=eps,
                HAS_RESIDUAL=residual is not None,
                OWN_NORM=own_norm,
                PRECISION=float32_precision(),
                ACC=TRITON_DTYPES[acc_dtype],
                **chosen,
            )
    return y, stream, total, mean, rstd, hidden


def backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, down_weight, down_bias, up_weight, up_bias, scale, norm_weight and norm_bias, where
    x is what was normalised (the sum, if there was a residual); an empty tensor for each that `needs` denies.

    dstream is the stream's gradient, without which norm_weight cannot be.
    """
    (
        need_x,
        need_weight,
        need_bias,
        need_down,
        need_down_bias,
        need_up,
        need_up_bias,
        need_scale,
        need_norm_weight,
        need_norm_bias,
    ) = needs
    own_norm = norm_weight is not None
    hidden_width, width = down_weight.shape
    rows = x.numel() // width
    acc_dtype = accumulator(x.dtype)
    common = dict(OWN_NORM=own_norm, PRECISION=float32_precision(), ACC=TRITON_DTYPES[acc_dtype])
    wide_scale, wide_down = scale.to(acc_dtype), down_weight.contiguous().to(acc_dtype) if own_norm else None
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    dstream_rows = dy_rows if dstream is None else as_rows(dstream)

    dx = x.new_empty(x.shape if need_x else 0)
    dhidden = x.new_empty(rows, hidden_width)
    compute_down = need_down or need_down_bias or need_norm_weight or need_norm_bias
    if rows and (need_x or compute_down):
        norm, down_norm, down_shift = weight, down_bias, down_bias  # neither read without an own norm
        if own_norm:
            norm = norm_weight
            down_norm = wide_down @ norm_weight.to(acc_dtype)
            down_shift = torch.addmv(down_bias.to(acc_dtype), wide_down, norm_bias.to(acc_dtype))
        chosen = tiles.choose("adapter_rows", hidden_width, x.element_size(), capability(x))
        with torch.cuda.device_of(x):
            device.input_gradient_kernel[(triton.cdiv(rows, chosen["BLOCK_T"]),)](
                dy_rows,
                dstream_rows,
                x_rows,
                weight.contiguous(),
                down_weight.contiguous(),
                up_weight.contiguous(),
                scale,
                norm.contiguous(),
                down_norm,
                down_shift,
                mean,
                rstd,
                hidden,
                dx,
                dhidden,
                dy_rows.stride(0),
                dstream_rows.stride(0),
                x_rows.stride(0),
                rows,
                width,
                hidden_width,
                NEED_DX=need_x,
                HAS_DSTREAM=dstream is not None,
                **common,
                **chosen,
            )

    chosen = tiles.choose("adapter_parameters", hidden_width, x.element_size(), capability(x))
    row_blocks = triton.cdiv(rows, chosen["BLOCK_T"])
    shares = min(MAX_SHARES, row_blocks)

    def sums(dy: Tensor, up: bool, column: bool, down: bool, weight: bool) -> list[Tensor | None]:
        """dyᵀ h (C, R), Σ dy (C), (dhᵀ x)ᵀ (C, R), Σ dh (R), Σ dy x̂ (C) over the rows, each if it is asked for."""
        shapes = (
            (up, (width, hidden_width)),
            (column, (width,)),
            (down, (width, hidden_width)),
            (down, (hidden_width,)),
            (weight, (width,)),
        )
        buffers = [x.new_empty((shares, *shape) if needed else 0, dtype=acc_dtype) for needed, shape in shapes]
        if rows and (up or column or down or weight):
            with torch.cuda.device_of(x):
                device.parameter_gradient_kernel[(triton.cdiv(width, chosen["BLOCK_C"]), shares)](
                    dy,
                    x_rows,
                    mean,
                    rstd,
                    hidden,
                    dhidden,
                    *buffers,
                    dy.stride(0),
                    x_rows.stride(0),
                    rows,
                    width,
                    hidden_width,
                    triton.cdiv(row_blocks, shares) * chosen["BLOCK_T"],
                    NEED_UP=up,
                    NEED_COLUMN=column,
                    NEED_DOWN=down,
                    NEED_WEIGHT=weight,
                    **common,
                    **chosen,
                )
        return [buffer.sum(0) if needed else None for buffer, (needed, _) in zip(buffers, shapes, strict=True)]

    compute_up, column = need_up or need_scale, need_up_bias or need_scale
    if own_norm:  # γ and β are frozen as a rule, and dy not read
        dup, dcolumn, ddown, ddown_bias, _ = sums(dstream_rows, compute_up, column, compute_down, False)
        _, dbias, _, _, dgamma = sums(dy_rows, False, need_bias, False, need_weight)
    else:
        dup, dcolumn, ddown, ddown_bias, dgamma = sums(
            dy_rows, compute_up, column or need_bias, compute_down, need_weight
        )
        dbias = dcolumn

    def down_gradient() -> Tensor:
        if not own_norm:
            return ddown.t().contiguous()
        # Of z = x̂ ∘ γ' + β', which the adapter read: dhᵀ z = (dhᵀ x̂) ∘ γ' + (Σ dh) ⊗ β'.
        of_weight = ddown.t() * norm_weight.to(acc_dtype)
        return torch.addr(of_weight, ddown_bias, norm_bias.to(acc_dtype)).contiguous()

    def result(needed: bool, value: Callable[[], Tensor], like: Tensor) -> Tensor:
        return value().to(like.dtype) if needed else x.new_empty(0)

    return (
        dx,
        result(need_weight, lambda: dgamma, weight),
        result(need_bias, lambda: dbias, weight),
        result(need_down, down_gradient, down_weight),
        result(need_down_bias, lambda: ddown_bias, down_bias),
        result(need_up, lambda: wide_scale * dup, up_weight),
        result(need_up_bias, lambda: wide_scale * dcolumn, up_bias),
        result(
            need_scale, lambda: (dup * up_weight.to(acc_dtype)).sum() + (dcolumn * up_bias.to(acc_dtype)).sum(), scale
        ),
        result(need_norm_weight, lambda: (wide_down.t() * ddown).sum(1), norm_weight),
        result(need_norm_bias, lambda: ddown_bias @ wide_down, norm_bias),
    )
