"""A training step on every path: UP-Person's plain one, the same compiled, full fine-tuning, ours, other methods.

    python bench/step.py                       CLIP ViT-B/16 at 384×128, batch 128, bf16; without a GPU the embedded
                                               model, batch 8, float32, and the full size counted without running it
    python bench/step.py --compiled            on a CPU the compiled paths as well: minutes to compile
    python bench/step.py --batch 64 --json step.json
    python bench/step.py --output bench/results             step-DEVICE.md and step-DEVICE.json
    python bench/step.py --profile DIR         also where the time goes, with traces for chrome://tracing

paths.py says what the paths are, counting.py what is counted. Weights, images and captions are random, captions as
long as those of CUHK-PEDES. The paths of one training start alike and must agree on their first losses, before and
after optimizer steps: a compiled path that does not is named and not timed; if plain and ours differ, nothing is timed.
Times are those of steps in a row, Python included: what a training waits for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import count_step
import paths
import torch
import torch._dynamo
from comparison import above_zero, at_least_one, json_path
from counting import cost
from measure import Call, Rates, device_slug, environment, measure_rates, peak_memory, summary
from profile_step import profile

from upperson.evaluate.tables import pipe_table

# Largest relative difference of the first losses: the paths round bf16 differently in every block.
AGREEMENT = {"bf16": 3e-2, "fp32": 1e-4}
COMPARED = 3  # losses, each after an optimizer step more
BATCHES = 4  # that take turns, so that lengths change
MIB = 2**20
CONTEXT = 77  # tokens of every CLIP here


def build_steps(names: list[str], batch: int, device: torch.device, precision: str) -> dict[str, paths.Step]:
    """The steps of the paths. Ours run the fused operators on a GPU, PyTorch elsewhere."""
    config = paths.full_size() if device.type == "cuda" else paths.small()
    steps = {}
    for name in names:
        path = paths.TIMED[name]
        model = paths.build(path, config).to(device)
        batches = paths.random_batches(config, model.tokenizer, model.context_length, batch, BATCHES)
        steps[name] = paths.Step(
            model, paths.prepare(model, batches, device), precision, path.configuration(config).train
        )
        if path.compiled:
            model.compile_blocks()
    return steps


def first_losses(steps: dict[str, paths.Step]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Of each path, once through all batches, which compiles it too; and why a compiled path was left out."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled in silence
    torch._dynamo.config.recompile_limit *= 2  # two paths compile the same functions
    losses, left_out = {}, {}
    for name, step in steps.items():
        try:
            losses[name] = [step().item() for _ in range(BATCHES)]
        except Exception as error:  # whatever a compiler raises
            if not paths.TIMED[name].compiled:
                raise
            left_out[name] = f"cannot run: {str(error).strip().splitlines()[0][:90] if str(error) else repr(error)}"
    return losses, left_out


def disagreements(losses: dict[str, list[float]], tolerance: float) -> dict[str, str]:
    """Paths whose losses are not those of the first path of their method and stage, and how they differ."""
    found, first = {}, {}
    for name, values in losses.items():
        right = first.setdefault((paths.TIMED[name].method, paths.TIMED[name].stage), values)
        if not all(abs(a - b) <= tolerance * abs(b) for a, b in zip(values[:COMPARED], right, strict=False)):
            found[name] = (
                f"wrong: first losses {', '.join(f'{value:.4f}' for value in values[:COMPARED])}, not "
                f"{', '.join(f'{value:.4f}' for value in right[:COMPARED])}"
            )
    return found


def time_in_turns(steps: dict[str, paths.Step], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Microseconds a step, from rounds in which every path takes all batches once; at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(BATCHES):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e6 * (time.perf_counter() - began) / BATCHES)
    return times


def count_apart(batch: int) -> list[dict[str, Any]]:
    """The counts of count_step.py at full size, in a process of its own: they need Triton's interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        command = [sys.executable, count_step.__file__, "--batch", str(batch), "--json", str(path)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"count_step.py failed: {run.stderr.strip().splitlines()[-1:]}")
        return json.loads(path.read_text())["counts"]


def rows_of(
    steps: dict[str, paths.Step],
    losses: dict[str, list[float]],
    times: dict[str, list[float]],
    counts: list[dict[str, Any]],
    rates: Rates,
    batch: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """What is known of each timed path. A compiled path has the operations of its eager one, but touches less."""
    rows = []
    for name, step in steps.items():
        timing, path, gpu = summary(times[name], []), paths.TIMED[name], device.type == "cuda"
        count = next(count for count in counts if count["path"] == name.removesuffix(", compiled"))
        counted_peak = None if path.compiled else count["peak"]
        rows.append(
            dict(
                path=name,
                model=step.model.config.model,
                image_size=step.model.config.image_size,
                batch=batch,
                precision=step.precision,
                losses=losses[name][:COMPARED],
                milliseconds=timing.median / 1e3,
                p20=timing.p20 / 1e3,
                p80=timing.p80 / 1e3,
                images_per_second=1e6 * batch / timing.median,
                flops=count["flops"],
                touched=None if path.compiled else count["touched"],
                share_of_matrix_rate=1e6 * count["flops"] / timing.median / rates.flops_per_second,
                peak_memory=measured_peak(step, device) if gpu else counted_peak,
            )
        )
    return rows


def measured_peak(step: paths.Step, device: torch.device) -> int | None:
    """Bytes above weights and optimizer state, gradients of an earlier step not among them."""
    return peak_memory(Call(lambda _: step(), prepare=step.optimizer.zero_grad), device)


def small_counts(steps: dict[str, paths.Step]) -> list[dict[str, Any]]:
    """The counts of the steps themselves, where they are small enough to run under a counter."""
    return [dict(path=name, **cost(step).to_dict()) for name, step in steps.items() if not paths.TIMED[name].compiled]


# ---------------------------------------------------------------------------------------- what it says


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each path; ratios are those to the first."""
    first = rows[0]
    header = [
        "",
        "images/s",
        "ms",
        "p20–p80",
        f"× {first['path']}",
        "GFLOP",
        "of matrix rate",
        "GB touched",
        "peak MiB",
    ]
    return pipe_table(
        header,
        [
            [
                row["path"],
                f"{row['images_per_second']:,.0f}",
                f"{row['milliseconds']:,.1f}",
                f"{row['p20']:,.1f}–{row['p80']:,.1f}",
                f"{first['milliseconds'] / row['milliseconds']:.2f}",
                f"{row['flops'] / 1e9:,.1f}",
                f"{row['share_of_matrix_rate']:.0%}",
                f"{row['touched'] / 1e9:,.1f}" if row["touched"] is not None else "–",
                f"{row['peak_memory'] / MIB:,.0f}" if row["peak_memory"] is not None else "–",
            ]
            for row in rows
        ],
    ).splitlines()


def text(result: dict[str, Any]) -> str:
    """The result for a reader, as Markdown."""
    rows, rates = result["rows"], result["rates"]
    first, found = rows[0], result["environment"]
    height, width = first["image_size"]
    captions = f"normally distributed, {paths.WORDS} ± {paths.DEVIATION} words"
    lines = [
        f"# A training step: {found['device']}",
        "",
        f"{first['model']} at {height}×{width}, batch {first['batch']}, {first['precision']}; torch "
        f"{found['torch']}, {found['date']}. Both towers, SDM loss, backward, Adam. A matrix product reaches "
        f"{rates['flops_per_second'] / 1e12:,.2f} TFLOP/s here (measured now). Captions fill "
        f"{result['fill']:.0%} of {CONTEXT} tokens ({captions}).",
        "",
        *table(rows),
        "",
        "Of one step. Bytes touched are those that the operators read and write one by one, as compiled code does "
        f"not; the peak is above weights and optimizer state, {'measured' if result['gpu'] else 'counted'}.",
    ]
    for name, reason in result["left_out"].items():
        lines += ["", f"Left out: {name}, {reason}."]
    lines += [
        "",
        f"## Counted at full size, batch {result['full_batch']}",
        "",
        "CLIP ViT-B/16 at 384×128, 16 bits, the CUHK-PEDES preset, on fused kernels, without running it "
        "(`bench/count_step.py`).",
        "",
        *count_step.table(result["full_counts"]),
    ]
    for name, kinds in result["profile"].items():
        lines += ["", f"## Where the time goes: {name}", "", *kinds]
    return "\n".join(lines) + "\n"


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch",
        type=at_least_one,
        default=128 if gpu else 8,
        metavar="N",
        help="pairs of image and caption (default: 128, on a CPU 8)",
    )
    parser.add_argument("--seconds", type=above_zero, default=15.0, metavar="S", help="time for all (default: 15)")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=gpu,
        help="the compiled paths as well (default: on a GPU)",
    )
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write step-DEVICE.md and .json to DIR")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="sum up the time of plain and ours by kind of operation, with a trace of each in DIR",
    )
    arguments = parser.parse_args()
    if arguments.batch < 2:
        parser.error("--batch: expected at least 2, as the loss compares pairs")
    for folder in filter(None, (arguments.output, arguments.profile)):
        folder.mkdir(parents=True, exist_ok=True)

    device, precision = torch.device("cuda" if gpu else "cpu"), "bf16" if gpu else "fp32"
    rates = measure_rates(device, torch.bfloat16 if gpu else torch.float32)
    names = [name for name, path in paths.TIMED.items() if arguments.compiled or not path.compiled]
    steps = build_steps(names, arguments.batch, device, precision)
    losses, left_out = first_losses(steps)
    left_out |= {name: "compiles for minutes; --compiled times it" for name in paths.TIMED if name not in names}
    wrong = disagreements(losses, AGREEMENT[precision])
    for name, reason in wrong.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if not all(paths.TIMED[name].compiled for name in wrong):
        print("error: plain and ours disagree, so nothing is timed", file=sys.stderr)
        return 1
    left_out |= wrong
    able = {name: steps[name] for name in losses if name not in wrong}
    times = time_in_turns(able, device, arguments.seconds)
    full_batch = arguments.batch if gpu else 128
    full_counts = count_apart(full_batch)
    rows = rows_of(able, losses, times, full_counts if gpu else small_counts(able), rates, arguments.batch, device)
    profiles = {
        name: profile(able[name], device, arguments.profile / f"step-{name}.json.gz")
        for name in ("plain", "ours")
        if arguments.profile
    }
    lengths = paths.random_batches(paths.full_size(), steps["ours"].model.tokenizer, CONTEXT, full_batch, 1)
    result = dict(
        environment=environment(device),
        gpu=gpu,
        rates=rates.__dict__,
        rows=rows,
        left_out=left_out,
        fill=paths.fill(lengths),
        full_batch=full_batch,
        full_counts=full_counts,
        profile=profiles,
    )
    result["text"] = text(result)
    print(result["text"])
    written = [arguments.json] if arguments.json else []
    if arguments.output:
        path = arguments.output / f"step-{device_slug(device)}.md"
        path.write_text(result["text"])
        written.append(path.with_suffix(".json"))
    for path in written:
        path.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
