"""Throughput of LayerNorm with a parallel adapter: the fused kernels against eager and compiled PyTorch.

    python bench/adapter.py                    every shape, on the GPU if there is one; prints tables, writes nothing
    python bench/adapter.py --json --sweep     also bench/results/adapter-<device>.json and .png
    python bench/adapter.py --shape image --batch 32 --json adapter.json

Each shape comes alone and fused with the addition of a residual before it; the image's also with an adapter that has
a LayerNorm of its own. Gradients are made as in training: of the input, the adapter with its LayerNorm, and
its scale, while LayerNorm's own parameters are frozen. Parameters are float32 beside 16-bit activations, as under
autocast. Candidates are first compared with the definition in float64.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from harness import operators
from harness.comparison import MODES, Candidate, Case, Function, Inputs
from torch import Tensor
from upperson_kernels import layernorm_adapter
from upperson_kernels.adapter import reference

from upperson.errors import exit_status

EPS = 1e-5
AUTOTUNING = 25  # seconds from the start; see `autotuned`
IN_SWEEP = ("fused (this project)", "eager", "torch.compile")


@dataclass(frozen=True)
class Shape:
    """One call of CLIP: rows of a sample, width of the tower and of the adapter."""

    length: int
    width: int
    hidden: int
    residual: bool
    own_norm: bool = False

    def flops(self, batch: int, mode: str) -> float:
        """Useful operations: two products forward; backward, two for each of those."""
        forward = 4 * batch * self.length * self.width * self.hidden
        return forward * {"forward": 1.0, "backward": 2.0, "both": 3.0}[mode]

    def bytes(self, batch: int, mode: str, element: int) -> float:
        """Each activation read or written once: x, y; then dy, x, dx. A residual adds itself and the sum; then the
        gradient of the sum. With a LayerNorm of its own the adapter has been added to the sum, which comes back with a
        gradient in any case; backward still reads the sum before that. Mean and deviation of a row, in float32, are
        written and read."""
        rows = batch * self.length
        tensor, statistics = rows * self.width * element, 8 * rows
        forward = (2 + 2 * self.residual + self.own_norm) * tensor + statistics
        backward = (3 + (self.residual or self.own_norm)) * tensor + statistics
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


SHAPES = {
    f"{name}{' + residual' if residual else ''}": Shape(length, width, hidden, residual)
    for name, length, width, hidden in (
        ("image", 193, 768, 96),  # ViT-B/16 at 384×128
        ("text", 77, 512, 64),
        ("image-L/14", 244, 1024, 128),
    )
    for residual in (False, True)
} | {"image, own norm": Shape(193, 768, 96, residual=True, own_norm=True)}


def split(parameters: tuple[Tensor, ...]) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
    """The seven parameters that every adapter has, and weight and bias of its own LayerNorm if it has one."""
    *first, norm_weight, norm_bias = (*parameters, None, None)[:9]
    return first, norm_weight, norm_bias


def definition(x: Tensor, residual: Tensor | None, *parameters: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    first, norm_weight, norm_bias = split(parameters)
    y, stream = reference.plain(x, residual, *first, norm_weight, norm_bias, EPS)
    return y if residual is None and norm_weight is None else (y, stream)


def public(x: Tensor, residual: Tensor | None, *parameters: Tensor, backend: str) -> Tensor | tuple[Tensor, Tensor]:
    first, norm_weight, norm_bias = split(parameters)
    own_norm = dict(norm_weight=norm_weight, norm_bias=norm_bias)
    return layernorm_adapter(x, *first, eps=EPS, residual=residual, **own_norm, backend=backend)


def layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *adapter: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """The bound of an adapter that costs nothing. Another function."""
    total = x if residual is None else x + residual
    y = F.layer_norm(total, total.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)
    return y if residual is None else (y, total)


def autotuned(deadline: float) -> Function:
    """torch.compile with max-autotune, for shapes whose turn comes before the deadline.

    Autotuning compiles dozens of kernels for every product of every shape, and the time is limited. CUDA graphs are
    off: they copy the inputs and overwrite the outputs of the call before, and they only save launches, for which a
    GPU with queued calls does not wait.
    """
    compiled = torch.compile(definition, mode="max-autotune-no-cudagraphs", dynamic=False)
    started = False

    def candidate(*arguments) -> Tensor | tuple[Tensor, ...]:
        nonlocal started
        if not started and time.monotonic() > deadline:
            raise RuntimeError(f"not compiled, as the {AUTOTUNING} s for autotuning went to the shapes before")
        started = True
        return compiled(*arguments)

    return candidate


def candidates(shape: Shape, device: torch.device, deadline: float) -> dict[str, Candidate]:
    """All that can run on the device. "eager" is this project's PyTorch backend."""
    found = {"eager": Candidate(partial(public, backend="torch"))}
    if device.type == "cuda":
        found = {"fused (this project)": Candidate(partial(public, backend="triton"), "fused")} | found
        found["torch.compile"] = Candidate(torch.compile(definition, dynamic=False))
        found["torch.compile, max-autotune"] = Candidate(autotuned(deadline))
    found["LayerNorm alone"] = Candidate(layernorm, "bound")
    return {name: replace(candidate, function=at(candidate.function, shape)) for name, candidate in found.items()}


def at(function: Callable, shape: Shape) -> Function:
    """The function of the tensors alone: x, the residual if there is one, and the parameters."""
    return function if shape.residual else lambda x, *parameters: function(x, None, *parameters)


def inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """x, residual if any, γ, β (both frozen), down weight and bias, up weight and bias, scale, γ' and β' if any; output
    gradients."""

    def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    width, hidden, rows = shape.width, shape.hidden, (batch, shape.length, shape.width)
    activations = [randn(*rows, dtype=dtype) for _ in range(1 + shape.residual)]
    down = [randn(hidden, width) * width**-0.5, randn(hidden)]
    up = [randn(width, hidden) * hidden**-0.5, randn(width)]
    own_norm = [randn(width) for _ in range(2 * shape.own_norm)]
    adapter = [*down, *up, torch.tensor(1.0, device=device), *own_norm]
    frozen = [randn(width), randn(width)]
    for tensor in (*activations, *adapter):
        tensor.requires_grad_()
    outputs = 2 if shape.residual or shape.own_norm else 1
    return [*activations, *frozen, *adapter], [randn(*rows, dtype=dtype) for _ in range(outputs)]


def case(name: str, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, deadline: float) -> Case:
    dtype_name = str(dtype).removeprefix("torch.")
    return Case(
        shape=name,
        title=f"{name}: {batch} × {shape.length} rows, {shape.width} → {shape.hidden}, {dtype_name}"
        + (", after a residual addition" if shape.residual else "")
        + (", the adapter with its own LayerNorm" if shape.own_norm else ""),
        labels=dict(**asdict(shape), batch=batch, dtype=dtype_name),
        setup=lambda: inputs(shape, batch, dtype, device),
        definition=at(definition, shape),
        scaled=(7 + shape.residual, 5 + shape.residual),  # the scale, and the up weight
        candidates=candidates(shape, device, deadline),
        bytes={mode: shape.bytes(batch, mode, dtype.itemsize) for mode in MODES},
        flops={mode: shape.flops(batch, mode) for mode in MODES},
    )


def floors() -> Iterator[tuple[str, float, float]]:
    """Name, bytes and FLOPs of the calls of training at batch 128 in 16 bits."""
    for name, shape in SHAPES.items():
        for mode in MODES[:2]:
            yield f"{name}, {mode}", shape.bytes(128, mode, 2), shape.flops(128, mode)


def main() -> int:
    arguments, dtype, device = operators.parse(operators.parser(__doc__.splitlines()[0], SHAPES))
    deadline = time.monotonic() + AUTOTUNING

    def make_case(name: str, shape: Shape, batch: int) -> Case:
        return case(name, shape, batch, dtype, device, deadline)

    names = [arguments.shape] if arguments.shape else SHAPES
    cases = (make_case(name, SHAPES[name], arguments.batch) for name in names)
    sweep = operators.sweep(SHAPES["image"], make_case, IN_SWEEP, (8, 32, 128, 256), (77, 193, 512))
    needs_gpu = "the fused kernels, torch.compile, launch time and peak memory"
    return operators.bench("adapter", arguments, cases, sweep, needs_gpu, floors())


if __name__ == "__main__":
    sys.exit(exit_status(main))
