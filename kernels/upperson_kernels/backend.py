"""Which implementation of an operator runs where, and how a user forces one.

    backend=None      Triton on an NVIDIA GPU of compute capability 8.0 or newer, or anywhere under TRITON_INTERPRET=1;
                      PyTorch elsewhere: on another GPU, or without Triton, with one warning
    backend="triton"  the fused kernels, or an error that says why they cannot run
    backend="torch"   plain PyTorch, on any device and in any dtype

Nothing falls back in silence: inputs that the chosen backend does not support are an error.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("triton", "torch")
COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# NumPy, which the interpreter computes with, has no bfloat16: products of it are wrong there.
INTERPRETED_DTYPES = (torch.float64, torch.float32, torch.float16)


def interpreter_problem(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter fails with these versions; None where it works.

    Triton before 3.7 converts arrays of one element to int, which NumPy 2.4 no longer allows.
    """
    if release(triton) >= (3, 7) or release(numpy) < (2, 4):
        return None
    return (
        f"the interpreter of Triton {triton} does not work with NumPy {numpy}: install 'triton>=3.7' or 'numpy<2.4', "
        "or use backend='torch'"
    )


def release(version: str) -> tuple[int, int]:
    """(2, 4) of "2.4.6", of "2.4rc1" and of "2.4.0+cpu"."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


# Found out once, at import: torch.compile cannot trace these calls.
HAS_TRITON = importlib.util.find_spec("triton") is not None
try:
    INTERPRETER_PROBLEM = interpreter_problem(importlib.metadata.version("triton"), importlib.metadata.version("numpy"))
except importlib.metadata.PackageNotFoundError:  # no Triton, or a nightly build under another name
    INTERPRETER_PROBLEM = None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (on the CPU) instead of being compiled."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def require_backend(backend: object) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None, 'triton' or 'torch', not {backend!r}")


def resolve(backend: str | None, tensor: torch.Tensor) -> str:
    """The backend that runs for `tensor`: "triton" or "torch".

    Raises ValueError for an unknown name, RuntimeError where Triton cannot run, TypeError for a dtype that the Triton
    kernels do not support.
    """
    require_backend(backend)
    if backend is None:
        backend = "triton" if interpreting() or (tensor.is_cuda and takes_kernels(tensor.device)) else "torch"
    if backend == "torch":
        return backend

    if not HAS_TRITON:
        raise RuntimeError(
            "backend 'triton' needs the package triton, which is not installed; backend='torch' runs without it"
        )
    if not (tensor.is_cuda or interpreting()):
        raise RuntimeError(
            f"backend 'triton' needs a CUDA device, but the tensors are on {tensor.device}; set "
            "TRITON_INTERPRET=1 before Triton is imported to interpret the kernels on the CPU, "
            "or use backend='torch'"
        )
    if interpreting() and INTERPRETER_PROBLEM is not None:
        raise RuntimeError(INTERPRETER_PROBLEM)
    allowed = INTERPRETED_DTYPES if interpreting() else COMPILED_DTYPES
    if tensor.dtype not in allowed:
        where = "in Triton's interpreter" if interpreting() else "on a GPU"
        raise TypeError(
            f"backend 'triton' takes {', '.join(str(d).removeprefix('torch.') for d in allowed)} "
            f"{where}, not {str(tensor.dtype).removeprefix('torch.')}; use backend='torch'"
        )
    return backend


def takes_kernels(device: torch.device) -> bool:
    """Whether the kernels can run on a CUDA device. Warns once for a device where they cannot."""
    problem = gpu_problem(device)
    if problem is not None and not torch.compiler.is_compiling() and device not in warned:
        warned.add(device)
        warnings.warn(f"the fused kernels do not run here: {problem}. Plain PyTorch runs instead", stacklevel=4)
    return problem is None


def gpu_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on a CUDA device; None where they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] < 8:
        name = torch.cuda.get_device_name(device)
        return f"they need an NVIDIA GPU of compute capability 8.0 or newer, and {name} is none"
    return None


warned: set[torch.device] = set()


def runs_plainly(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether nothing but autograd looks at an operator: no compiler or tracer, no mode of the dispatcher (counters,
    fake tensors), no subclass of Tensor, no transform of torch.func; and the tensors, all on the device of the first
    one, have values (those on the meta device do not).

    An operator is then an autograd.Function, which costs Python half as much as a registered operator.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or in_transform() or (tensors[0] is not None and tensors[0].is_meta):
        return False
    return all(tensor is None or type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)


def in_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, …) or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def batched(grads: Iterable[torch.Tensor | None]) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) passes several gradients at once.

    A registered operator then runs for each of them; a kernel cannot read such tensors.
    """
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return any(grad is not None and functorch.is_legacy_batchedtensor(grad) for grad in grads)


class SecondDerivative(torch.autograd.Function):
    """Returns the first `count` of the tensors; the backward of any of the tensors is refused."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise NotImplementedError(
            "trying to differentiate twice an operator that is differentiable once; upperson_kernels take "
            "backend='torch' for second derivatives"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an autograd.Function whose gradients cannot be differentiated: trying to is an error.

    PyTorch's own decorator misses some attempts, whose result is then zero in silence: it looks at the incoming
    gradients alone, which are constants for a plain sum, and it is not on the way to the inputs, which is all that
    torch.autograd.grad walks.
    """

    @functools.wraps(backward)
    def refuse_twice(ctx: Any, *grads: torch.Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # create_graph=False
            return found
        gradients = found if isinstance(found, tuple) else (found,)
        return SecondDerivative.apply(len(gradients), *gradients, *ctx.saved_tensors, *grads)

    return refuse_twice


def cheapest(
    plain: type[torch.autograd.Function],
    in_transforms: Callable[..., Any],
    registered: Callable[..., Any],
    tensors: Sequence[torch.Tensor | None],
) -> Callable[..., Any]:
    """Of the three ways to call an operator on `tensors`, the one that costs Python least."""
    if runs_plainly(tensors):
        return plain.apply
    return in_transforms if in_transform() else registered


def for_transforms(
    name: str,
    operator: Callable[..., Any],
    save: Callable[..., None] = lambda *_: None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """An operator for the transforms of torch.func, which take no registered operator with a derivative.

    save, differentiate: what register_autograd takes; None: the derivative of `operator` is refused.
    """

    def refuse(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{name}: backend 'triton' is differentiable once, in reverse mode; use backend='torch' for second "
            "derivatives and forward mode (hessian, jvp, jacfwd)"
        )

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(operator)
        setup_context = staticmethod(save)
        backward = staticmethod(differentiate or refuse)
        jvp = staticmethod(refuse)

    return Transformed.apply


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums inside the kernels: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_autocast(tensor: torch.Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device."""
    kind = tensor.device.type
    # PyTorch 2.11 cannot trace is_autocast_available; the devices that are compiled for have autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return available and torch.is_autocast_enabled(kind)


def float32_precision() -> str:
    """Precision of float32 products in Triton's terms: TF32 only where the user allowed it in PyTorch, by
    torch.set_float32_matmul_precision or torch.backends.cuda.matmul.fp32_precision; full float32 otherwise."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def capability(tensor: torch.Tensor) -> int:
    """Compute capability of the tensor's GPU as a number: 80, 89, 90, 100; Hopper's, 90, in the interpreter."""
    if not tensor.is_cuda:
        return 90
    if (problem := gpu_problem(tensor.device)) is not None:
        raise RuntimeError(f"backend 'triton' cannot run: {problem}; use backend='torch'")
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def multiprocessors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; Hopper's, 132, in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132
