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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from comparison import DTYPES, MODES, Candidate, Case, Function, bench, parser
from torch import Tensor
from upperson_kernels import layernorm_adapter
from upperson_kernels.adapter import reference

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


# ---------------------------------------------------------------------------------------- candidates


def definition(x: Tensor, residual: Tensor | None, *parameters: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    *parameters, norm_weight, norm_bias = (*parameters, None, None)[:9]
    y, stream = reference.plain(x, residual, *parameters, norm_weight, norm_bias, EPS)
    return y if residual is None and norm_weight is None else (y, stream)


def public(x: Tensor, residual: Tensor | None, *parameters: Tensor, backend: str) -> Tensor | tuple[Tensor, Tensor]:
    *parameters, norm_weight, norm_bias = (*parameters, None, None)[:9]
    return layernorm_adapter(
        x, *parameters, eps=EPS, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias, backend=backend
    )


def layernorm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *adapter: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """The bound of an adapter that costs nothing. Another function."""
    total = x if residual is None else x + residual
    y = F.layer_norm(total, total.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), EPS)
    return y if residual is None else (y, total)


def autotuned(deadline: float) -> Function:
    """torch.compile with max-autotune, for shapes whose turn comes before the deadline.

    It compiles dozens of kernels for every product of every shape, and the benchmark is to end. CUDA graphs are
    off: they copy the inputs and overwrite the outputs of the call before, and save launches that a GPU with calls
    queued up does not wait for.
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
        found = (
            {"fused (this project)": Candidate(partial(public, backend="triton"), "fused")}
            | found
            | {
                "torch.compile": Candidate(torch.compile(definition, dynamic=False)),
                "torch.compile, max-autotune": Candidate(autotuned(deadline)),
            }
        )
    found["LayerNorm alone"] = Candidate(layernorm, "bound")
    return {name: replace(candidate, function=at(candidate.function, shape)) for name, candidate in found.items()}


def at(function: Callable, shape: Shape) -> Function:
    """The function of the tensors alone: x, the residual if there is one, and the parameters."""
    if shape.residual:
        return function
    return lambda x, *parameters: function(x, None, *parameters)


# ---------------------------------------------------------------------------------------- cases


def inputs(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """x, residual if any, γ, β (both frozen), down weight and bias, up weight and bias, scale, γ' and β' if any; output
    gradients."""

    def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    width, hidden = shape.width, shape.hidden
    activations = [randn(batch, shape.length, width, dtype=dtype) for _ in range(1 + shape.residual)]
    adapter = [
        randn(hidden, width) * width**-0.5,
        randn(hidden),
        randn(width, hidden) * hidden**-0.5,
        randn(width),
        torch.tensor(1.0, device=device),
        *(randn(width) for _ in range(2 * shape.own_norm)),
    ]
    tensors = [*activations, randn(width), randn(width), *adapter]
    trained = [*activations, *adapter]
    for tensor in trained:
        tensor.requires_grad_()
    outputs = 2 if shape.residual or shape.own_norm else 1
    return tensors, [randn(batch, shape.length, width, dtype=dtype) for _ in range(outputs)]


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


def sweep_cases(dtype: torch.dtype, device: torch.device, deadline: float) -> Iterator[tuple[str, int, Case]]:
    """(axis, value, case): the image's call over batch, then over length."""
    gpu = device.type == "cuda"
    image = SHAPES["image"]
    batch = 128 if gpu else 2
    points = [(f"batch (of {image.length} tokens)", n, image, n) for n in ((8, 32, 128, 256) if gpu else (1, 2, 4, 8))]
    points += [
        (f"tokens (batch {batch})", n, replace(image, length=n), batch)
        for n in ((77, 193, 512) if gpu else (50, 77, 128, 193))
    ]
    for axis, value, shape, batch in points:
        each = case(f"sweep, {axis}", shape, batch, dtype, device, deadline)
        yield (
            axis,
            value,
            replace(
                each, candidates={name: candidate for name, candidate in each.candidates.items() if name in IN_SWEEP}
            ),
        )


def floors() -> Iterator[tuple[str, float, float]]:
    """Name, bytes and FLOPs of the calls of training at batch 128 in 16 bits."""
    for name, shape in SHAPES.items():
        for mode in MODES[:2]:
            yield f"{name}, {mode}", shape.bytes(128, mode, 2), shape.flops(128, mode)


def main() -> int:
    options = parser(__doc__.splitlines()[0], SHAPES)
    arguments = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, deadline = DTYPES[arguments.dtype], time.monotonic() + AUTOTUNING
    names = [arguments.shape] if arguments.shape else list(SHAPES)
    cases = (case(name, SHAPES[name], arguments.batch, dtype, device, deadline) for name in names)
    return bench(
        "adapter",
        options,
        arguments,
        device,
        cases,
        sweep_cases(dtype, device, deadline),
        "the fused kernels,\ntorch.compile, launch time and peak memory",
        floors(),
    )


if __name__ == "__main__":
    sys.exit(main())
