"""Checks of arguments that the operators share; every message names operator, argument and what was expected."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def require_tensor(operator: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, not {type(value).__name__}")


def require_switch(operator: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{operator}: {name} must be True or False, not {shown(value)}")


def require_epsilon(operator: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{operator}: {name} must be a number, not {shown(value)}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{operator}: {name} must be finite and at least 0, not {value}")


def require_size(operator: str, name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{operator}: {name} must be an integer, not {shown(value)}")
    if value < least:
        raise ValueError(f"{operator}: {name} must be at least {least}, not {value}")


def shown(value: object) -> str:
    """A value in an error: a tensor by its shape."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def require_float(operator: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{operator}: {name} must be a floating-point tensor, not {tensor.dtype}")


def require_rows(operator: str, name: str, tensor: Tensor) -> None:
    require_tensor(operator, name, tensor)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{operator}: {name} must be (..., C) with C ≥ 1, not {tuple(tensor.shape)}")
    require_float(operator, name, tensor)


def require_shape(operator: str, name: str, tensor: Tensor, shape: tuple) -> None:
    """Raises TypeError, ValueError. `shape` holds sizes, or a letter where every size is allowed."""
    require_tensor(operator, name, tensor)
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{operator}: {name} must be {wanted}, not {tuple(tensor.shape)}")


def require_device(operator: str, name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    if tensor.device != main.device:
        raise ValueError(f"{operator}: {name} is on {tensor.device}, but {main_name} is on {main.device}")


def require_dtype(operator: str, name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    """Raises TypeError unless a parameter has the activations' dtype, or is float32 beside 16-bit activations."""
    mixed = tensor.dtype == torch.float32 and main.dtype in (torch.float16, torch.bfloat16)
    if tensor.dtype != main.dtype and not mixed:
        wanted = {main.dtype, torch.float32} if main.dtype in (torch.float16, torch.bfloat16) else {main.dtype}
        wanted = " or ".join(sorted(str(d).removeprefix("torch.") for d in wanted))
        raise TypeError(
            f"{operator}: {name} must be {wanted} beside {main_name}, not {str(tensor.dtype).removeprefix('torch.')}"
        )


def refuse_forward_mode(operator: str, tensors: Iterable[Tensor]) -> None:
    """Raises NotImplementedError for forward-mode inputs: a custom operator ignores tangents and would return zero."""
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{operator}: backend 'triton' has no forward-mode derivative (jvp, jacfwd); use reverse mode, or "
            "backend='torch'"
        )
