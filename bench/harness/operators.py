"""The command of the operators' benchmarks, attn.py and adapter.py: every shape, the sweeps, the results, the plot."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from harness.comparison import Case, compare, describe
from harness.device import KNOWN_RATES, Rates, device_at_hand, device_slug, environment, measure_rates
from harness.options import above_zero, at_least, json_path
from harness.output import save_json, table

RESULTS_FOLDER = Path(__file__).parents[1] / "results"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Results:
    """The content of the JSON file."""

    environment: dict[str, str | None]
    rates: Rates
    rows: list[dict] = field(default_factory=list)  # one for each candidate and mode
    left_out: list[dict] = field(default_factory=list)  # candidates that were not timed, and why
    sweep: list[dict] = field(default_factory=list)  # rows over batch and length, for the plot
    text: str = ""  # for a reader, as Markdown


def parser(description: str, shapes: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every operator."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description)
    option = parser.add_argument
    option("--shape", choices=list(shapes), help="one shape instead of all")
    batch, dtype, seconds = (128, "bf16", 1.0) if gpu else (4, "fp32", 2.0)
    option("--batch", type=at_least(1), default=batch, metavar="N", help="samples (default: 128, on a CPU 4)")
    option("--dtype", choices=DTYPES, default=dtype, help="of the activations (default: bf16, on a CPU fp32)")
    note = "time for each mode of each shape (default: 1, on a CPU 2)"
    option("--seconds", type=above_zero, default=seconds, metavar="S", help=note)
    note = "also over batch and length, drawn as a plot beside the JSON file; needs --json"
    option("--sweep", action="store_true", help=note)
    note = "write the figures and the environment to FILE (default: a file named after the device in bench/results)"
    option("--json", type=json_path, nargs="?", const="", metavar="FILE", help=note)
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.dtype, torch.device]:
    """The arguments, and the dtype and the device that they ask for."""
    arguments = parser.parse_args()
    if arguments.sweep and arguments.json is None:
        parser.error("--sweep draws its plot beside the JSON file; give --json as well")
    return arguments, DTYPES[arguments.dtype], device_at_hand()


def sweep(
    image: Any, make_case: Callable[[str, Any, int], Case], names: Sequence[str], batches: Sequence[int], lengths: Any
) -> Iterator[tuple[str, int, Case]]:
    """(axis, value, case): the image's call over batch, then over length, with the candidates called `names`.

    `make_case` takes title, shape and batch. `batches` and `lengths` are for a GPU; a CPU gets fewer.
    """
    gpu = torch.cuda.is_available()
    batch = 128 if gpu else 2
    points = [(f"batch (of {image.length} tokens)", n, image, n) for n in (batches if gpu else (1, 2, 4, 8))]
    for n in lengths if gpu else (50, 77, 128, 193):
        points.append((f"tokens (batch {batch})", n, replace(image, length=n), batch))
    for axis, value, shape, size in points:
        case = make_case(f"sweep, {axis}", shape, size)
        kept = {name: candidate for name, candidate in case.candidates.items() if name in names}
        yield axis, value, replace(case, candidates=kept)


def bench(
    name: str,
    arguments: argparse.Namespace,
    cases: Iterator[Case],
    sweep_cases: Iterator[tuple[str, int, Case]],
    needs_gpu: str,
    floors: Iterable[tuple[str, float, float]],
) -> int:
    """Runs all cases, then those of the sweep, and saves after each.

    `floors` are (name, bytes, FLOPs) of calls. The exit status is 1 if a fused candidate is wrong or cannot run.
    """
    dtype, device = DTYPES[arguments.dtype], device_at_hand()
    path = arguments.json
    if path == Path():
        path = RESULTS_FOLDER / f"{name}-{device_slug(device)}.json"
    torch.manual_seed(0)
    rates = measure_rates(device, dtype)
    results = Results(environment(device), rates)

    def say(*paragraphs: str) -> None:
        print(*paragraphs, sep="\n\n", end="\n\n", flush=True)
        results.text += "".join(f"{paragraph}\n\n" for paragraph in paragraphs)

    def save(left_out: list[dict]) -> None:
        results.left_out += left_out
        if path is not None:
            save_json(path, asdict(results))

    checked = f", by triton.testing.do_bench {(rates.do_bench_flops_per_second or 0) / 1e9:,.0f} GFLOP/s"
    say(
        f"{rates.name}: a copy reaches {rates.bytes_per_second / 1e9:,.0f} GB/s, a {arguments.dtype} product "
        f"{rates.flops_per_second / 1e9:,.0f} GFLOP/s{checked if device.type == 'cuda' else ''} (measured now). Floors "
        "are computed from these rates. Times are medians in µs with the 20th and the 80th percentile. GFLOP/s, share "
        "of the floor, launch (Python's time to queue the call) and peak memory are of forward + backward."
    )
    if rates.warning:
        say(f"**Warning: {rates.warning}.**")
    if device.type != "cuda":
        say(f"No GPU: the PyTorch candidates run on the CPU. Left out, as they need a GPU: {needs_gpu}.")
    for case in cases:
        rows, left_out = compare(case, device, arguments.seconds, rates)
        say(*describe(case, rows, left_out))
        results.rows += rows
        save(left_out)
    if arguments.sweep:
        for axis, value, case in sweep_cases:
            rows, left_out = compare(case, device, arguments.seconds / 4, rates, modes=("both",))
            print(*describe(case, rows, left_out), sep="\n\n", end="\n\n", flush=True)
            results.sweep += [dict(axis=axis, value=value, **row) for row in rows]
            save(left_out)
        if importlib.util.find_spec("matplotlib"):
            plot(results, path.with_suffix(".png"))
        else:
            print("no plot of the sweep: matplotlib is not installed")
    print("Floors at batch 128, 16-bit (least bytes over memory bandwidth, useful FLOPs over matrix rate):\n")
    print(table([floor_cells(*floor) for floor in floors]))
    if path is not None:
        print(f"\nwritten to {path}")
    failed = [f"{row['shape']}, {row['candidate']}" for row in results.left_out if row["kind"] == "fused"]
    if failed:
        print(f"error: fused kernels that are wrong or cannot run: {'; '.join(failed)}", file=sys.stderr)
    return bool(failed)


def floor_cells(name: str, moved: float, flops: float) -> dict[str, str]:
    """What a call needs at least, on GPUs whose rates are known."""
    line = {"": name, "MB": f"{moved / 1e6:,.0f}", "GFLOP": f"{flops / 1e9:,.1f}"}
    return line | {f"{rates.name}, µs": f"{rates.floor(moved, flops):,.0f}" for rates in KNOWN_RATES.values()}


def plot(results: Results, path: Path) -> None:
    """Share of the floor, forward and backward together, against each axis of the sweep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in results.sweep:
        line = lines.setdefault(row["axis"], {}).setdefault(row["candidate"], [])
        line.append((row["value"], 100 * row["share_of_floor"]))
    size = (5.2 * len(lines), 4)
    figure, axes = pyplot.subplots(1, len(lines), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for (axis, candidates), panel in zip(lines.items(), axes[0], strict=True):
        for name, points in candidates.items():
            panel.plot(*zip(*points, strict=True), "o-", ms=3, label=name, lw=2.5 if name.startswith("fused") else 1.2)
        values = sorted({value for points in candidates.values() for value, _ in points})
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, map(str, values))
        panel.minorticks_off()
        panel.set(xlabel=axis, ylim=(0, None))
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the floor, forward + backward, %")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{results.rates.name}, torch {results.environment['torch']}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
