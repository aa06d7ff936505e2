"""Compares candidates that compute one operator: first whether they are correct, then how fast they are.

A case is one call of the operator at one shape. Its candidates are compared with the definition in float64 on the
very inputs that are timed. A candidate that differs or cannot run is named and not timed. The others are timed forward,
backward and both, and their peak memory is read. Rows in which this project loses stay in the tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch._dynamo
from torch import Tensor

from harness.device import Rates
from harness.output import cannot_run, microseconds, table
from harness.timing import Call, copies_beyond_cache, peak_memory, time_in_turns

TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
MODES = tuple(TITLES)

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = tuple[list[Tensor], list[Tensor]]  # the inputs of a call, and the gradients of its outputs


@dataclass(frozen=True)
class Candidate:
    """One way to compute the operator. A bound computes less: what the operator would cost at best.

    `layout` converts the first input and the outputs of the case to the candidate's own layout.
    """

    function: Function
    kind: Literal["fused", "baseline", "bound"] = "baseline"
    layout: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """One call of an operator: its inputs, its definition, its least cost, and the candidates."""

    shape: str
    title: str
    labels: dict[str, Any]  # further columns of the results
    setup: Callable[[], Inputs]
    definition: Function  # in plain PyTorch
    scaled: tuple[int, int]  # positions of the scale and of the input that it multiplies
    candidates: dict[str, Candidate]
    bytes: dict[str, float]  # by mode: each input and output once
    flops: dict[str, float]  # by mode


def run(function: Function, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all tensors that require one."""
    outputs = as_tuple(function(*tensors))
    wanted = [t for t in tensors if t.requires_grad]
    return [o.detach() for o in outputs], list(torch.autograd.grad(outputs, wanted, grads))


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def lay_out(candidate: Candidate, tensors: list[Tensor], grads: list[Tensor]) -> Inputs:
    """The inputs and the gradients of the outputs as the candidate takes them."""
    if candidate.layout is None:
        return tensors, grads
    first = candidate.layout(tensors[0].detach()).requires_grad_(tensors[0].requires_grad)
    return [first, *tensors[1:]], [candidate.layout(g) for g in grads]


def reasons_to_leave_out(case: Case) -> dict[str, str]:
    """Candidates that cannot run or are wrong, each with the reason. Bounds compute something else and are not judged.

    An error may be twice that of the definition in the same dtype, each against the definition in float64.
    """
    tensors, grads = case.setup()
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    exact_outputs, exact_gradients = run(case.definition, doubles, [g.double() for g in grads])
    wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
    sizes = [e.norm() for e in exact_outputs + exact_gradients]
    scale, scaled = case.scaled
    # The scale's gradient is a sum that may cancel to almost nothing. Its error is taken relative to the size of the
    # summands: the norm of the input that the scale multiplies times the norm of its gradient, over the scale.
    sizes[len(grads) + wanted.index(scale)] = (
        doubles[scaled].detach().norm() / doubles[scale].detach().abs() * exact_gradients[wanted.index(scaled)].norm()
    )

    def errors(candidate: Candidate) -> list[float]:
        lay = candidate.layout or (lambda t: t)
        outputs, gradients = run(candidate.function, *lay_out(candidate, tensors, grads))
        exact = [*map(lay, exact_outputs), lay(exact_gradients[0]), *exact_gradients[1:]]
        triples = zip(outputs + gradients, exact, sizes, strict=True)
        return [float((value.double() - e).norm() / size) for value, e, size in triples]

    budget = [2 * e + 4 * torch.finfo(tensors[0].dtype).eps for e in errors(Candidate(case.definition))]
    reasons = {}
    for name, candidate in case.candidates.items():
        if candidate.kind == "bound":
            continue
        try:
            found = errors(candidate)
            timed_call(candidate, tensors, grads, "forward").run(None)  # without autograd
        except Exception as error:  # a library may raise any
            reasons[name] = cannot_run(error)
            continue
        if not all(e <= b for e, b in zip(found, budget, strict=True)):  # also where an error is NaN
            reasons[name] = "wrong: errors " + ", ".join(f"{e:.1e}" for e in found)
    return reasons


def timed_call(candidate: Candidate, tensors: list[Tensor], grads: list[Tensor], mode: str) -> Call:
    """The call that is timed. Gradients are returned and dropped, nothing accumulates from one call to the next."""
    tensors, grads = lay_out(candidate, tensors, grads)
    wanted = [t for t in tensors if t.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        return as_tuple(candidate.function(*tensors))

    def backward(outputs: tuple[Tensor, ...]) -> object:
        return torch.autograd.grad(outputs, wanted, grads[: len(outputs)], allow_unused=True)

    if mode == "forward":
        return Call(torch.no_grad()(lambda _: forward()))
    if mode == "backward":
        return Call(backward, prepare=forward)
    return Call(lambda _: backward(forward()))


def compare(
    case: Case, device: torch.device, seconds: float, rates: Rates, modes: Sequence[str] = MODES
) -> tuple[list[dict], list[dict]]:
    """Times the correct candidates of a case, each mode for `seconds`.

    Returns a row for each candidate and mode, and a row with the reason for each candidate that is not timed.
    """
    torch.compiler.reset()  # shapes of earlier cases would count as recompilations of this one
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled in silence
    try:
        reasons = reasons_to_leave_out(case)
    except torch.OutOfMemoryError:
        reasons = dict.fromkeys(case.candidates, "not checked, as the definition in float64 does not fit the memory")

    def row(name: str) -> dict[str, Any]:
        return dict(shape=case.shape, **case.labels, candidate=name, kind=case.candidates[name].kind)

    left_out = [row(name) | dict(reason=reason) for name, reason in reasons.items()]
    able = {name: candidate for name, candidate in case.candidates.items() if name not in reasons}
    copies = copies_beyond_cache(case.bytes["forward"], device) if able else 0
    inputs = [case.setup() for _ in range(copies)]
    rows = []
    for mode in modes if able else ():
        calls = {name: [timed_call(candidate, *each, mode) for each in inputs] for name, candidate in able.items()}
        floor = rates.floor(case.bytes[mode], case.flops[mode])
        for name, timing in time_in_turns(calls, device, seconds).items():
            bound = able[name].kind == "bound"  # does less than what the floor counts
            speed = None if bound else 1e6 * case.flops[mode] / timing.median
            share = None if bound else floor / timing.median
            figures = dict(floor=floor, flops_per_second=speed, share_of_floor=share)
            peak = peak_memory(calls[name][0], device)
            rows.append(row(name) | dict(mode=mode, **asdict(timing), **figures, peak_memory=peak))
    return rows, left_out


def describe(case: Case, rows: list[dict], left_out: list[dict]) -> list[str]:
    """A case for a reader, as Markdown: a line for each candidate, a column for each mode."""
    found = [f"**{case.title}**"]
    candidates: dict[str, dict[str, dict]] = {}
    for row in rows:
        candidates.setdefault(row["candidate"], {})[row["mode"]] = row
    if candidates:
        modes = next(iter(candidates.values()))
        floors = ", ".join(f"{TITLES[mode]} {microseconds(row['floor'])} µs" for mode, row in modes.items())
        found += [table([cells(name, of) for name, of in candidates.items()], "pipe"), f"Floors: {floors}."]
    return found + [f"Not timed: {row['candidate']}, {row['reason']}" for row in left_out]


def cells(candidate: str, modes: dict[str, dict]) -> dict[str, str]:
    line = {"": candidate}
    for mode, row in modes.items():
        median, p20, p80 = (microseconds(row[key]) for key in ("median", "p20", "p80"))
        line[TITLES[mode]] = f"{median} ({p20}–{p80})"
    last = list(modes.values())[-1]
    speed, share, launch, memory = map(last.get, ("flops_per_second", "share_of_floor", "launch", "peak_memory"))
    line["GFLOP/s"] = f"{speed / 1e9:,.1f}" if speed else "–"
    line["of the floor"] = f"{share:.0%}" if share else "–"
    line["launch"] = f"{launch:,.0f} µs" if launch else "–"
    return line | {"peak memory": f"{memory / 2**20:,.1f} MiB" if memory is not None else "–"}
