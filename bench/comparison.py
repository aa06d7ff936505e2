"""Compares candidates that compute one operator: right first, then fast. What attn.py and adapter.py share.

A case is one call of the operator at one shape. Its candidates are compared with the definition in float64 on the
very inputs that are timed; one that differs or cannot run is named and not timed. The others are timed forward,
backward and both, and their peak memory is read. Rows in which this project loses stay in the tables.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo
from measure import (
    KNOWN_RATES,
    Call,
    Rates,
    copies_beyond_cache,
    device_slug,
    environment,
    measure_rates,
    microseconds,
    peak_memory,
    time_in_turns,
)
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("forward", "backward", "both")

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Candidate:
    """One way to compute the operator, or a lesser function ("bound": what the operator would cost at best).

    `layout` is how it takes the first input and gives its outputs, if not as the case's setup makes them.
    """

    function: Function
    kind: Literal["fused", "baseline", "bound"] = "baseline"
    layout: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """One call of an operator: its inputs, what is right, what it needs at least, and who is compared."""

    shape: str
    title: str
    labels: dict[str, Any]  # what else a row of results says about it
    setup: Callable[[], tuple[list[Tensor], list[Tensor]]]  # inputs, and gradients of the outputs
    definition: Function  # in plain PyTorch
    scaled: tuple[int, int]  # positions of the scale and of what it scales
    candidates: dict[str, Candidate]
    bytes: dict[str, float]  # by mode: each input and output once
    flops: dict[str, float]  # by mode


@dataclass
class Results:
    """What a benchmark found, as its JSON file holds it."""

    environment: dict[str, str | None]
    rates: Rates
    rows: list[dict] = field(default_factory=list)  # one for each candidate and mode
    left_out: list[dict] = field(default_factory=list)  # candidates that were not timed, and why
    sweep: list[dict] = field(default_factory=list)  # rows over batch and length, for the plot

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(temporary, path)


# ---------------------------------------------------------------------------------------- right


def run(function: Function, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all tensors that require one."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in tensors if t.requires_grad]
    return [o.detach() for o in outputs], list(torch.autograd.grad(outputs, wanted, grads))


def lay_out(candidate: Candidate, tensors: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs and the gradients of the outputs as the candidate takes them."""
    if candidate.layout is None:
        return tensors, grads
    first = candidate.layout(tensors[0].detach()).requires_grad_(tensors[0].requires_grad)
    return [first, *tensors[1:]], [candidate.layout(g) for g in grads]


def reasons_to_leave_out(case: Case) -> dict[str, str]:
    """Candidates that cannot run or are wrong, and in which way. Bounds compute something else and are not judged.

    An error may be twice that of the definition in the same dtype, each against the definition in float64.
    """
    tensors, grads = case.setup()
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    exact_outputs, exact_gradients = run(case.definition, doubles, [g.double() for g in grads])
    wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
    sizes = [e.norm() for e in exact_outputs + exact_gradients]
    scale, scaled = case.scaled
    # The scale's gradient is a sum that may cancel to almost nothing. Its error is taken relative to what was
    # summed, whose size is that of what the scale multiplies times the gradient of it, over the scale.
    sizes[len(grads) + wanted.index(scale)] = (
        doubles[scaled].detach().norm() / doubles[scale].detach().abs() * exact_gradients[wanted.index(scaled)].norm()
    )

    def errors(candidate: Candidate) -> list[float]:
        lay = candidate.layout or (lambda t: t)
        outputs, gradients = run(candidate.function, *lay_out(candidate, tensors, grads))
        exact = [*map(lay, exact_outputs), lay(exact_gradients[0]), *exact_gradients[1:]]
        return [
            float((value.double() - e).norm() / size)
            for value, e, size in zip(outputs + gradients, exact, sizes, strict=True)
        ]

    budget = [2 * e + 4 * torch.finfo(tensors[0].dtype).eps for e in errors(Candidate(case.definition))]
    reasons = {}
    for name, candidate in case.candidates.items():
        if candidate.kind == "bound":
            continue
        try:
            found = errors(candidate)
            timed_call(candidate.function, *lay_out(candidate, tensors, grads), "forward").run(None)  # without autograd
        except Exception as error:  # whatever a library of the field raises
            reasons[name] = f"cannot run: {str(error).strip().splitlines()[0][:90] if str(error) else repr(error)}"
            continue
        if not all(e <= b for e, b in zip(found, budget, strict=True)):  # NaN is not
            reasons[name] = "wrong: errors " + ", ".join(f"{e:.1e}" for e in found)
    return reasons


# ---------------------------------------------------------------------------------------- fast


def timed_call(function: Function, tensors: list[Tensor], grads: list[Tensor], mode: str) -> Call:
    """The call that is timed. Gradients are returned and dropped, nothing accumulates from one call to the next."""
    wanted = [t for t in tensors if t.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        outputs = function(*tensors)
        return outputs if isinstance(outputs, tuple) else (outputs,)

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
    """Times the candidates of a case that are right, for `seconds` each mode, and prints a table for each.

    Returns the rows, and who was left out and why.
    """
    torch.compiler.reset()  # shapes of earlier cases would count as recompilations of this one
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled in silence
    print(f"\n{case.title}")
    try:
        reasons = reasons_to_leave_out(case)
    except torch.OutOfMemoryError:
        reasons = dict.fromkeys(case.candidates, "not checked, as the definition in float64 does not fit the memory")
    for name, reason in reasons.items():
        print(f"  {name}: {reason}")
    able = {name: candidate for name, candidate in case.candidates.items() if name not in reasons}
    left_out = [
        dict(shape=case.shape, **case.labels, candidate=name, kind=case.candidates[name].kind, reason=reason)
        for name, reason in reasons.items()
    ]
    if not able:
        return [], left_out

    inputs = [case.setup() for _ in range(copies_beyond_cache(case.bytes["forward"], device))]
    rows = []
    for mode in modes:
        calls = {
            name: [timed_call(candidate.function, *lay_out(candidate, *each), mode) for each in inputs]
            for name, candidate in able.items()
        }
        timings = time_in_turns(calls, device, seconds)
        floor = rates.floor(case.bytes[mode], case.flops[mode])
        mode_rows = [
            dict(
                shape=case.shape,
                **case.labels,
                mode=mode,
                candidate=name,
                kind=able[name].kind,
                **asdict(timing),
                floor=floor,
                **rate(case, able[name], mode, floor, timing.median),
                peak_memory=peak_memory(calls[name][0], device),
            )
            for name, timing in timings.items()
        ]
        print(table(mode, mode_rows))
        rows += mode_rows
    return rows, left_out


def rate(case: Case, candidate: Candidate, mode: str, floor: float, median: float) -> dict[str, float | None]:
    """FLOP/s and share of the floor; None for a bound, which does less than the floor is about."""
    if candidate.kind == "bound":
        return dict(flops_per_second=None, share_of_floor=None)
    return dict(flops_per_second=1e6 * case.flops[mode] / median, share_of_floor=floor / median)


def table(mode: str, rows: list[dict]) -> str:
    """The rows of one mode: microseconds, rate, share of the floor; with a GPU also launch time and peak memory."""
    gpu = rows[0]["launch"] is not None
    unit, name = (1e12, "TFLOP/s") if gpu else (1e9, "GFLOP/s")
    floor = microseconds(rows[0]["floor"])
    lines = [
        f"  {mode:<30}{'median':>10}{'p20':>10}{'p80':>10}{name:>10}   of the floor ({floor} µs)"
        + ("   launch   peak memory" if gpu else "")
    ]
    for row in rows:
        line = f"    {row['candidate']:<28}"
        line += "".join(f"{microseconds(row[key]):>8}µs" for key in ("median", "p20", "p80"))
        line += (
            f"{'–':>10}{'–':>9}"
            if row["kind"] == "bound"
            else f"{row['flops_per_second'] / unit:>10,.1f}{row['share_of_floor']:>9.0%}"
        )
        if gpu:
            line += f"{row['launch']:>22,.0f}µs{row['peak_memory'] / 2**20:>10,.1f} MiB"
        lines.append(line)
    return "\n".join(lines)


def print_floors(calls: Iterable[tuple[str, float, float]]) -> None:
    """What calls (name, bytes, FLOPs) need at least, on GPUs whose rates are known."""
    print("\nFloors at batch 128, 16-bit (least bytes over memory bandwidth, useful FLOPs over matrix rate):")
    print(f"  {'':<32}{'MB':>8}{'GFLOP':>8}" + "".join(f"{r.name:>12}" for r in KNOWN_RATES))
    for name, moved, flops in calls:
        print(
            f"  {name:<32}{moved / 1e6:>8.0f}{flops / 1e9:>8.1f}"
            + "".join(f"{r.floor(moved, flops):>9.0f} µs" for r in KNOWN_RATES)
        )


# ---------------------------------------------------------------------------------------- the command


def parser(description: str, shapes: Iterable[str]) -> argparse.ArgumentParser:
    """The options that every benchmark of an operator has."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=list(shapes), help="one shape instead of all")
    parser.add_argument(
        "--batch", type=at_least_one, default=128 if gpu else 4, metavar="N", help="samples (default: 128, on a CPU 4)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16" if gpu else "fp32",
        help="of the activations (default: bf16, on a CPU fp32)",
    )
    parser.add_argument(
        "--seconds",
        type=above_zero,
        default=1.0 if gpu else 2.0,
        metavar="S",
        help="time for each mode of each shape (default: 1, on a CPU 2)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="also over batch and length, drawn as a plot beside the JSON file; needs --json",
    )
    parser.add_argument(
        "--json",
        type=json_path,
        nargs="?",
        const="",
        metavar="FILE",
        help="write the figures and the environment to FILE (default: one named after the device in bench/results)",
    )
    return parser


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected a whole number from 1")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected a number above 0")
    return value


def json_path(text: str) -> Path:
    path = Path(text)
    if text and not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist; expected a file in one that does")
    if text and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{path} cannot be written; expected a file in a folder that can be written")
    return path


def bench(
    name: str,
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    device: torch.device,
    cases: Iterator[Case],
    sweep: Iterator[tuple[str, int, Case]],
    needs_gpu: str,
    floors: Iterable[tuple[str, float, float]],
) -> int:
    """Runs all cases, then the sweep's (axis, value, case); prints, saves after each. The exit status: 1 if a
    fused candidate was left out, as it is wrong or cannot run."""
    if arguments.sweep and arguments.json is None:
        parser.error("--sweep draws its plot beside the JSON file; give --json as well")
    path = arguments.json
    if path == Path():
        path = RESULTS / f"{name}-{device_slug(device)}.json"

    torch.manual_seed(0)
    rates = measure_rates(device, DTYPES[arguments.dtype])
    print(
        f"{rates.name}: copy {rates.bytes_per_second / 1e9:,.0f} GB/s, {arguments.dtype} product "
        f"{rates.flops_per_second / 1e9:,.0f} GFLOP/s (measured now)"
    )
    if device.type != "cuda":
        print(f"No GPU: the PyTorch candidates run on the CPU. These need a GPU and are left out: {needs_gpu}.")
    results = Results(environment(device), rates)

    def save() -> None:
        if path is not None:
            results.save(path)

    for case in cases:
        rows, left_out = compare(case, device, arguments.seconds, rates)
        results.rows += rows
        results.left_out += left_out
        save()
    if arguments.sweep:
        for axis, value, case in sweep:
            rows, left_out = compare(case, device, arguments.seconds / 4, rates, modes=("both",))
            results.sweep += [dict(axis=axis, value=value, **row) for row in rows]
            results.left_out += left_out
            save()
        if importlib.util.find_spec("matplotlib"):
            plot(results, path.with_suffix(".png"))
        else:
            print("\nno plot of the sweep: matplotlib is not installed")
    print_floors(floors)
    if path is not None:
        print(f"\nwritten to {path}")
    failed = [f"{row['shape']}, {row['candidate']}" for row in results.left_out if row["kind"] == "fused"]
    if failed:
        print(f"error: fused kernels that are wrong or cannot run: {'; '.join(failed)}", file=sys.stderr)
    return bool(failed)


def plot(results: Results, path: Path) -> None:
    """Share of the floor, forward and backward together, against each axis of the sweep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_of_sweep = list(dict.fromkeys(row["axis"] for row in results.sweep))
    names = list(dict.fromkeys(row["candidate"] for row in results.sweep))
    figure, axes = pyplot.subplots(
        1, len(axes_of_sweep), figsize=(5.2 * len(axes_of_sweep), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, panel in zip(axes_of_sweep, axes[0], strict=True):
        for name in names:
            rows = [row for row in results.sweep if row["axis"] == axis and row["candidate"] == name]
            panel.plot(
                [row["value"] for row in rows],
                [100 * row["share_of_floor"] for row in rows],
                marker="o",
                markersize=3,
                label=name,
                linewidth=2.5 if name.startswith("fused") else 1.2,
            )
        values = sorted({row["value"] for row in results.sweep if row["axis"] == axis})
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, map(str, values))
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the floor, forward + backward, %")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{results.rates.name}, torch {results.environment['torch']}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
