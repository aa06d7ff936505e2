"""A training step on every path: UP-Person's plain one, the same compiled, full fine-tuning, ours, other methods.

    python bench/step.py                       CLIP ViT-B/16 at 384×128, batch 128, bf16; without a GPU the embedded
                                               model, batch 8, float32, and the full size counted without running it
    python bench/step.py --compiled            on a CPU the compiled paths as well: minutes to compile
    python bench/step.py --full-size --batch 4 plain and ours at full size on a CPU as well: some minutes
    python bench/step.py --batch 64 --json step.json
    python bench/step.py --output bench/results             step-DEVICE.md and step-DEVICE.json
    python bench/step.py --profile DIR         also where the time goes, with traces for chrome://tracing
    python bench/step.py --count               counts the full size alone, without running it: minutes on any machine
    python bench/step.py --count --activations --json counts.json

harness/paths.py describes the paths, harness/counting.py the counts. Weights, images and captions are random, captions
as long as those of CUHK-PEDES. The paths of one training start alike and must agree on their first losses, before and
after optimizer steps. A compiled path that disagrees is named and not timed; if plain and ours disagree, nothing is
timed. Times are those of steps in a row, Python included: what a training waits for. The paths are timed one after the
other, compiled ones last, and the files are written after each.

Counting uses tensors without memory on the CPU. Their sizes are those that the operators declare, so they are a GPU's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from harness import paths
from harness.counting import MIB, activations, cost, count, counts_table, figures
from harness.device import Rates, device_at_hand, device_slug, environment, measure_rates
from harness.options import above_zero, at_least, json_path
from harness.output import cannot_run, save_json, table
from harness.profiling import profile
from harness.timing import Call, Timing, peak_memory, time_in_turns

from upperson.errors import exit_status, path_argument
from upperson.files import make_folder, write_atomically

# Largest relative difference of the first losses: the paths round bf16 differently in every block.
AGREEMENT = {"bf16": 3e-2, "fp32": 1e-4}
COMPARED = 3  # losses, an optimizer step between them
BATCHES = 4  # take turns, so that lengths change
CPU = torch.device("cpu")
CONTEXT = 77  # tokens of every CLIP here


def build_steps(
    names: list[str], batch: int, device: torch.device, precision: str, full_size: bool
) -> dict[str, paths.Step]:
    """The steps of the paths. Ours run the fused operators on a GPU, PyTorch elsewhere."""
    config = paths.full_size() if full_size else paths.small()
    steps = {}
    for name in names:
        path = paths.TIMED[name]
        model = paths.build(path, config).to(device)
        batches = paths.random_batches(config, model.tokenizer, model.context_length, batch, BATCHES)
        prepared = paths.prepare(model, batches, device)
        steps[name] = paths.Step(model, prepared, precision, path.configuration(config).train)
        if path.compiled:
            torch.compiler.reset()  # another path may have compiled the same functions
            model.compile_blocks()
    return steps


def first_losses(step: paths.Step) -> list[float]:
    """The losses of a path, once through all batches, which compiles the path too."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled in silence
    return [step().item() for _ in range(BATCHES)]


def disagreements(losses: dict[str, list[float]], tolerance: float) -> dict[str, str]:
    """Paths whose losses differ from those of the first path of the same method and stage, each with both losses."""

    def shown(values: list[float]) -> str:
        return ", ".join(f"{value:.4f}" for value in values[:COMPARED])

    found, first = {}, {}
    for name, values in losses.items():
        right = first.setdefault((paths.TIMED[name].method, paths.TIMED[name].stage), values)
        if not all(abs(a - b) <= tolerance * abs(b) for a, b in zip(values[:COMPARED], right, strict=False)):
            found[name] = f"wrong: first losses {shown(values)}, not {shown(right)}"
    return found


def all_batches(step: paths.Step) -> Call:
    """A step of each batch in a row."""

    def run(_: None) -> None:
        for _ in range(BATCHES):
            step()
        if step.batch[0].is_cuda:
            torch.cuda.synchronize()

    return Call(run)


def count_apart(batch: int) -> list[dict[str, Any]]:
    """The counts at full size, by --count in a process of its own, as counting changes PyTorch and Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        command = [sys.executable, __file__, "--count", "--batch", str(batch), "--json", str(path)]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        if run.returncode:
            raise RuntimeError(f"step.py --count failed: {run.stderr.strip().splitlines()[-1:]}")
        return json.loads(path.read_text())["counts"]


def small_counts(steps: dict[str, paths.Step]) -> list[dict[str, Any]]:
    """The counts of the steps themselves, where they are small enough to run under a counter."""
    return [dict(path=name, **figures(cost(step))) for name, step in steps.items() if not paths.TIMED[name].compiled]


def row_of(
    name: str, step: paths.Step, losses: list[float], timing: Timing, count: dict[str, Any], rates: Rates
) -> dict[str, Any]:
    """All figures of a timed path; `timing` is of BATCHES steps, `count` of one.

    A compiled path has the operations of its eager one, but touches less.
    """
    images, compiled = step.batches[0][0], paths.TIMED[name].compiled
    counted_peak = None if compiled else count["peak"]
    # Bytes above weights and optimizer state, without the gradients of an earlier step.
    measured_peak = peak_memory(Call(lambda _: step(), prepare=step.optimizer.zero_grad), images.device)
    config = step.model.config
    milliseconds, p20, p80 = (time / 1e3 / BATCHES for time in (timing.median, timing.p20, timing.p80))
    row = dict(path=name, model=config.model, image_size=config.image_size, batch=len(images), precision=step.precision)
    row |= dict(losses=losses[:COMPARED], milliseconds=milliseconds, p20=p20, p80=p80)
    row |= dict(images_per_second=1e3 * len(images) / milliseconds, flops=count["flops"])
    row |= dict(touched=None if compiled else count["touched"])
    row |= dict(share_of_matrix_rate=1e3 * count["flops"] / milliseconds / rates.flops_per_second)
    return row | dict(peak_memory=measured_peak if images.is_cuda else counted_peak)


def cells(row: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    """A line of the table; the ratio is that to the first path."""
    touched, peak = row["touched"], row["peak_memory"]
    return {
        "": row["path"],
        "images/s": f"{row['images_per_second']:,.0f}",
        "ms": f"{row['milliseconds']:,.1f}",
        "p20–p80": f"{row['p20']:,.1f}–{row['p80']:,.1f}",
        f"× {first['path']}": f"{first['milliseconds'] / row['milliseconds']:.2f}",
        "GFLOP": f"{row['flops'] / 1e9:,.1f}",
        "of matrix rate": f"{row['share_of_matrix_rate']:.0%}",
        "GB touched": "–" if touched is None else f"{touched / 1e9:,.1f}",
        "peak MiB": "–" if peak is None else f"{peak / MIB:,.0f}",
    }


def text(result: dict[str, Any]) -> str:
    """The result for a reader, as Markdown."""
    rows, rates, found = result["rows"], result["rates"], result["environment"]
    first = rows[0]
    height, width = first["image_size"]
    paragraphs = [
        f"# A training step: {found['device']}",
        f"{first['model']} at {height}×{width}, batch {first['batch']}, {first['precision']}; torch "
        f"{found['torch']}, {found['date']}. Both towers, SDM loss, backward, Adam. A matrix product reaches "
        f"{rates['flops_per_second'] / 1e12:,.2f} TFLOP/s here (measured now). Captions fill "
        f"{result['fill']:.0%} of {CONTEXT} tokens (normally distributed, {paths.TOKENS} ± {paths.DEVIATION} tokens).",
        *filter(None, [rates["warning"] and f"Warning: {rates['warning']}."]),
        table([cells(row, first) for row in rows], "pipe"),
        "All figures are of one step. Bytes touched are those that the operators read and write one by one, which "
        "compiled code does not do. The peak is above weights and optimizer state, "
        f"{'measured' if result['gpu'] else 'counted'}.",
        *(f"Left out: {name}, {reason}." for name, reason in result["left_out"].items()),
        *(f"Not timed yet: {name}." for name in result["pending"]),
        f"## Counted at full size, batch {result['full_batch']}",
        "CLIP ViT-B/16 at 384×128, 16 bits, the CUHK-PEDES preset, on fused kernels, without running it "
        "(`bench/step.py --count`).",
        counts_table(result["full_counts"]),
    ]
    for name, kinds in result["profile"].items():
        paragraphs += [f"## Where the time goes: {name}", "\n".join(kinds)]
    return "\n\n".join(paragraphs) + "\n"


def count_full_size(batch: int, with_activations: bool, file: Path | None) -> int:
    from harness import absent_gpu

    absent_gpu.install(90)
    config = paths.full_size().replace(frozen_weights="kept")  # as on a GPU
    counts = [count(name, path, config, batch) for name, path in paths.COUNTED.items()]
    print(counts_table(counts))
    for row in counts:
        if with_activations and row["path"] in ("plain", "ours"):
            print("\n".join(activations(row)))
    if file:
        save_json(file, dict(batch=batch, counts=counts))
    return 0


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    note = "pairs of image and caption (default: 128; timed on a CPU 8)"
    option("--batch", type=at_least(2, "as the loss compares pairs"), metavar="N", help=note)
    option("--seconds", type=above_zero, default=15.0, metavar="S", help="time for all (default: 15)")
    note = "the compiled paths as well (default: on a GPU)"
    option("--compiled", action=argparse.BooleanOptionalAction, default=gpu, help=note)
    option("--full-size", action="store_true", help="plain and ours of ViT-B/16 at 384×128 without a GPU too")
    option("--json", type=json_path, metavar="FILE", help="write the figures to FILE")
    option("--output", type=path_argument, metavar="DIR", help="write step-DEVICE.md and .json to DIR")
    note = "sum up the time of plain and ours by kind of operation, with a trace of each in DIR"
    option("--profile", type=path_argument, metavar="DIR", help=note)
    option("--count", action="store_true", help="count the full size, and time nothing")
    note = "with --count: list the tensors of plain and ours at the peak and those kept for the backward pass"
    option("--activations", action="store_true", help=note)
    arguments = parser.parse_args()
    if arguments.activations and not arguments.count:
        parser.error("--activations lists what --count counts; give --count as well")
    if arguments.count and (arguments.output or arguments.profile):
        parser.error("--count times nothing, so --output and --profile do not apply; --json writes the counts")
    arguments.batch = arguments.batch or (128 if gpu or arguments.count else 8)
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.count:
        return count_full_size(arguments.batch, arguments.activations, arguments.json)
    for option in ("output", "profile"):
        if folder := getattr(arguments, option):
            make_folder(folder, f"--{option}")

    device = device_at_hand()
    gpu = device.type == "cuda"
    precision = "bf16" if gpu else "fp32"
    full_size, full_batch = gpu or arguments.full_size, arguments.batch if gpu else 128
    names = [name for name, path in paths.TIMED.items() if arguments.compiled or not path.compiled]
    why_not = "compiles for minutes; --compiled times it"
    if arguments.full_size and not gpu:
        names, why_not = ["plain", "ours"], "not timed at full size on a CPU"
    names.sort(key=lambda name: paths.TIMED[name].compiled)  # what takes minutes to compile comes last

    def steps_of(names: list[str]) -> dict[str, paths.Step]:
        return build_steps(names, arguments.batch, device, precision, full_size)

    steps = steps_of([name for name in names if not paths.TIMED[name].compiled])
    losses = {name: first_losses(step) for name, step in steps.items()}
    if wrong := disagreements(losses, AGREEMENT[precision]):
        for name, reason in wrong.items():
            print(f"error: {name}: {reason}", file=sys.stderr)
        print("error: plain and ours disagree, so nothing is timed", file=sys.stderr)
        return 1

    full_counts = count_apart(full_batch)
    counts = {count["path"]: count for count in (full_counts if gpu else small_counts(steps))}
    lengths = paths.random_batches(paths.full_size(), steps["ours"].model.tokenizer, CONTEXT, full_batch, 1)
    rates = measure_rates(device, torch.bfloat16 if gpu else torch.float32)
    result: dict[str, Any] = dict(environment=environment(device), gpu=gpu, rates=asdict(rates), rows=[])
    result |= dict(left_out={name: why_not for name in paths.TIMED if name not in names}, profile={})
    result |= dict(fill=paths.fill(lengths), full_batch=full_batch, full_counts=full_counts)
    for number, name in enumerate(names, 1):
        result["pending"] = names[number:]
        try:
            step = steps.pop(name, None) or steps_of([name])[name]
            losses[name] = losses.get(name) or first_losses(step)
        except Exception as error:  # a compiler may raise any
            if not paths.TIMED[name].compiled:
                raise
            result["left_out"][name] = cannot_run(error)
            save(result, arguments, device)
            continue
        if name in (disagreeing := disagreements(losses, AGREEMENT[precision])):
            print(f"error: {name}: {disagreeing[name]}", file=sys.stderr)
            result["left_out"][name] = wrong[name] = disagreeing[name]
        else:
            timing = time_in_turns({name: [all_batches(step)]}, CPU, arguments.seconds / len(names))[name]
            count = counts[name.removesuffix(", compiled")]
            result["rows"].append(row_of(name, step, losses[name], timing, count, rates))
            if arguments.profile and name in ("plain", "ours"):
                trace = arguments.profile / f"step-{name}.json.gz"
                result["profile"][name] = profile(step, device, trace).splitlines()
        save(result, arguments, device)
    print(result["text"])
    return int(bool(wrong))


def save(result: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Writes what there is so far, so that a run that is stopped leaves the paths that it has timed."""
    result["text"] = text(result)
    if arguments.json:
        save_json(arguments.json, result)
    if arguments.output:
        path = arguments.output / f"step-{device_slug(device)}.md"
        write_atomically(path, result["text"].encode())
        save_json(path.with_suffix(".json"), result)


if __name__ == "__main__":
    sys.exit(exit_status(main))
