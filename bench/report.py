"""Everything this machine can measure, in one command: a JSON and a Markdown report named after its GPU.

    python bench/report.py                     about 10 minutes with a GPU, 5 without; goes on where it was stopped
    python bench/report.py --fresh             measures all anew
    python bench/report.py --output DIR        reports to DIR instead of bench/results

Each part is a program of its own with a time limit. A part that finishes is kept at once in a folder below runs/,
so that a report that was killed goes on with the next; a folder belongs to one device, one state of the sources
and one version of PyTorch and Triton. A part that fails or runs over does not stop the others; it stands in the
report with the end of its output, and the exit status is 1.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import device_slug, environment, microseconds

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COMPILED_TARGETS = (80, 89, 90, 100)  # that bench/resources.py knows
MODES = ("forward", "backward", "both")
TAIL = 25  # lines of a failed part's output


@dataclass(frozen=True)
class Part:
    """One program, what it may take, and how to read what it found."""

    name: str
    command: Sequence[str | Path]
    seconds: float
    needs: tuple[str, ...] = ()  # modules that must be installed
    collect: Callable[[], Any] = lambda: None  # called when it has ended; None: nothing there


@dataclass
class Record:
    """How a part went. Only a part that passed is not run again."""

    name: str
    status: str  # passed, failed, over time, left out
    seconds: float = 0.0
    reason: str = ""
    tail: str = ""
    result: Any = None


@dataclass
class Report:
    """What the JSON file holds."""

    environment: dict[str, str | None]
    gpu: bool
    parts: list[Record] = field(default_factory=list)
    targets: list[dict] = field(default_factory=list)

    def record(self, name: str) -> Record | None:
        return next((part for part in self.parts if part.name == name), None)

    def rows(self, name: str, key: str = "rows") -> list[dict]:
        record = self.record(name)
        return record.result[key] if record and record.result else []

    @property
    def doubt(self) -> str:
        """Why the figures of fused kernels do not count; empty if they do."""
        tests = self.record("kernel tests")
        if not self.gpu or (tests and tests.status == "passed"):
            return ""
        if tests is None:
            return "The kernel tests have not run yet"
        return {
            "failed": "The kernel tests fail on this machine",
            "over time": "The kernel tests did not end in their time",
            "left out": f"The kernel tests did not run ({tests.reason})",
        }[tests.status]


# ---------------------------------------------------------------------------------------- parts


def gpu_parts(work: Path) -> list[Part]:
    """The limits are generous and add up to more than the report may take; the order is that of importance, and a
    slow machine does not reach the last."""
    major, minor = torch.cuda.get_device_capability()
    target = max((t for t in COMPILED_TARGETS if t <= 10 * major + minor), default=COMPILED_TARGETS[0])
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    # Most of the tests' time goes into compiling a few hundred kernels, on as many cores as there are.
    spread = ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()
    return [
        program(
            "kernel tests",
            150,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *spread,
            *sorted((ROOT / "tests").glob("test_kernels*.py")),
            needs=("pytest", "hypothesis"),
        ),
        benchmark("attention", 125, work, "attn.py", "--sweep"),
        benchmark("adapter", 125, work, "adapter.py", "--sweep"),
        benchmark("training step", 240, work, "step.py", needs=MODEL_NEEDS),
        training(90, work, "--backend", "triton", "--workers", str(workers)),
        benchmark("resources", 90, work, "resources.py", "--target", str(target), "--dtype", "bf16"),
    ]


def cpu_parts(work: Path) -> list[Part]:
    return [
        benchmark("attention", 60, work, "attn.py", "--sweep", "--seconds", "1"),
        benchmark("adapter", 60, work, "adapter.py", "--sweep", "--seconds", "1"),
        benchmark("training step", 150, work, "step.py", needs=MODEL_NEEDS),
        training(100, work, "--epochs", "2", "--embedded-identities", "200", "50", "100"),
        benchmark("resources", 120, work, "resources.py", "--target", "90", "--dtype", "bf16"),
    ]


NEEDS_A_GPU = (
    Record("kernel tests", "left out", reason="no GPU; `pytest` runs them in Triton's interpreter"),
    Record(
        "speed of the fused kernels",
        "left out",
        reason="no GPU; the interpreter says nothing about speed. Only "
        "PyTorch candidates are timed, in small batches, and the training step is that of the embedded model",
    ),
    Record(
        "full embedded training",
        "left out",
        reason="8 epochs take two cores about 5 minutes; a short run stands in, `python train.py` is the full one",
    ),
)
MODEL_NEEDS = ("open_clip", "torchvision", "safetensors", "tqdm", "PIL")


def program(name: str, seconds: float, *arguments: str | Path, **options) -> Part:
    return Part(name, [sys.executable, *arguments], seconds, **options)


def benchmark(name: str, seconds: float, work: Path, script: str, *arguments: str, **options) -> Part:
    """A script of this folder that writes what it found to --json."""
    path = work / f"{file_name(name)}.json"
    return program(
        name,
        seconds,
        ROOT / "bench" / script,
        *arguments,
        "--json",
        path,
        collect=lambda: json.loads(path.read_text()) if path.exists() else None,
        **options,
    )


def training(seconds: float, work: Path, *arguments: str) -> Part:
    """The embedded training; one that was stopped goes on."""
    folder = work / "run"
    where = ("--resume", folder) if (folder / "config.json").exists() else ("--run-dir", folder)

    def collect() -> dict | None:
        if not (folder / "results.json").exists():
            return None
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if line["kind"] == "epoch"]
        return json.loads((folder / "results.json").read_text()) | {"images_per_second": statistics.median(rates)}

    return program(
        "embedded training",
        seconds,
        ROOT / "train.py",
        *where,
        *arguments,
        needs=(*MODEL_NEEDS, "matplotlib"),
        collect=collect,
    )


def file_name(name: str) -> str:
    return name.replace(" ", "-")


# ---------------------------------------------------------------------------------------- running


def run(parts: Sequence[Part], work: Path, seconds: float, finished: Callable[[Record], None]) -> None:
    """Runs the parts that have not passed yet, within `seconds` in all, and calls `finished` for each."""
    end = time.monotonic() + seconds
    for number, part in enumerate(parts, 1):
        following = parts[number].name if number < len(parts) else "the report"
        kept = work / f"part-{file_name(part.name)}.json"
        heading = f"[{number}/{len(parts)}] {part.name}"
        missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
        allowed = min(part.seconds, end - time.monotonic())
        if kept.exists():
            record = Record(**json.loads(kept.read_text()))
            print(f"{heading}: passed before, in {record.seconds:.0f} s", flush=True)
        elif missing:
            record = Record(part.name, "left out", reason=f"not installed: {', '.join(missing)}")
            print(f"{heading}: left out, {record.reason}", flush=True)
        elif allowed < 1:
            record = Record(part.name, "over time", reason="the time for the whole report was used up before it")
            print(f"{heading}: not begun, {record.reason}", flush=True)
        else:
            print(f"{heading}: at most {allowed:.0f} s; next is {following}", flush=True)
            record = execute(part, work / f"{file_name(part.name)}.log", allowed)
            print(f"      {record.status} after {record.seconds:.0f} s", flush=True)
            if record.status == "passed":
                write(kept, json.dumps(asdict(record)))
        finished(record)


def execute(part: Part, log: Path, seconds: float) -> Record:
    """Runs one part with its output in `log`. What it started is stopped with it: first asked, then killed."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [variables.get("PYTHONPATH")])])
    began = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            list(map(str, part.command)),
            cwd=ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        over_time = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            over_time = True
        finally:
            stop(process)
    record = Record(part.name, "passed", time.monotonic() - began)
    if over_time:
        record.status, record.reason = "over time", f"stopped after {seconds:.0f} s"
    elif process.returncode:
        record.status, record.reason = "failed", f"exit status {process.returncode}"
    lines = log.read_text(errors="replace").replace(f"{ROOT}{os.sep}", "").splitlines()
    record.tail = "\n".join(lines[-1:] if record.status == "passed" else lines[-TAIL:])
    try:
        record.result = part.collect()
    except (OSError, ValueError, KeyError) as error:
        record.status, record.reason = "failed", f"its result cannot be read: {error!r}"
    return record


def stop(process: subprocess.Popen) -> None:
    """Ends what is left of the process group."""
    for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def identity(found: dict[str, str | None]) -> str:
    """What finished parts belong to: device, versions, and every source file that a part runs."""
    digest = hashlib.sha256(repr([found[name] for name in ("device", "driver", "torch", "triton")]).encode())
    sources = [path for folder in ("bench", "kernels", "upperson", "tests") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted([*sources, ROOT / "train.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


# ---------------------------------------------------------------------------------------- what it says


def targets(attention: list[dict], adapter: list[dict]) -> list[dict]:
    """What the project set out to reach at its production shapes, and what was measured; values are ratios."""
    found = []

    def add(what: str, required: float, measured: float, unit: str, note: str = "") -> None:
        found.append(
            dict(what=what, required=required, measured=measured, unit=unit, note=note, met=measured >= required)
        )

    for operator, rows in (("attention", attention), ("adapter", adapter)):
        for shape in dict.fromkeys(row["shape"] for row in rows):
            table = {(row["mode"], row["candidate"]): row for row in rows if row["shape"] == shape}
            ours = {mode: row for (mode, _), row in table.items() if row["kind"] == "fused"}
            if not ours:
                continue

            def speed_up(mode: str, *prefixes: str, table: dict = table, ours: dict = ours) -> tuple[float, str] | None:
                """Over the fastest baseline whose name begins so, and its name."""
                rivals = [
                    row
                    for (m, name), row in table.items()
                    if m == mode and row["kind"] == "baseline" and name.startswith(prefixes)
                ]
                if not rivals:
                    return None
                best = min(rivals, key=lambda row: row["median"])
                return best["median"] / ours[mode]["median"], best["candidate"]

            wanted = (
                (("best folded SDPA", 1.5, ("folded SDPA",)), ("explicit softmax", 4.0, ("explicit softmax",)))
                if operator == "attention"
                else (("eager", 3.0, ("eager",)), ("best torch.compile", 1.3, ("torch.compile",)))
            )
            for rival, required, prefixes in wanted:
                if result := speed_up("both", *prefixes):
                    add(f"{operator}, {shape}: forward + backward against {rival}", required, result[0], "×", result[1])
            if operator == "attention":
                add(
                    f"{operator}, {shape}: forward + backward, share of the floor",
                    0.6,
                    ours["both"]["share_of_floor"],
                    "%",
                )
            if worst := min(((*result, mode) for mode in MODES if (result := speed_up(mode, ""))), default=None):
                ratio, name, mode = worst
                add(f"{operator}, {shape}: slowest mode against its best baseline", 1.0, ratio, "×", f"{mode}, {name}")
    return found


def step_targets(rows: list[dict]) -> list[dict]:
    """The same for the training step of CLIP ViT-B/16 at batch 128, of our paths the faster one."""
    plain = next((row for row in rows if row["path"] == "plain"), None)
    ours = min(
        (row for row in rows if row["path"].startswith("ours")), key=lambda row: row["milliseconds"], default=None
    )
    if plain is None or ours is None:
        return []
    measured = (
        ("20 ms ÷ its time", 1.0, 20 / ours["milliseconds"], "×"),
        ("share of the measured matrix rate", 0.55, ours["share_of_matrix_rate"], "%"),
        ("speed against the plain path", 4.0, plain["milliseconds"] / ours["milliseconds"], "×"),
        ("peak memory of the plain path ÷ its own", 2.0, plain["peak_memory"] / ours["peak_memory"], "×"),
    )
    return [
        dict(
            what=f"training step: {what}",
            required=required,
            measured=value,
            unit=unit,
            note=ours["path"],
            met=value >= required,
        )
        for what, required, value, unit in measured
    ]


def markdown(report: Report, plots: dict[str, str]) -> str:
    """The report for a reader; `plots` are the files beside it, by part."""
    lines = [f"# {report.environment['device']}", ""]
    if report.doubt:
        lines += [f"**{report.doubt}: no figure of a fused kernel on this page is valid.**", ""]
    troubled = [part for part in report.parts if part.status in ("failed", "over time")]
    for part in troubled:
        lines += [f"**{part.name}: {part.status}** ({part.reason})", ""]
        if part.tail:
            lines += ["```", part.tail, "```", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {value or 'unknown'} |" for name, value in report.environment.items()]
    lines += ["", "## Parts", "", "| part | | seconds | |", "|---|---|---:|---|"]
    for part in report.parts:
        note = part.reason or (part.tail if part.name == "kernel tests" else "")
        lines.append(f"| {part.name} | {part.status} | {f'{part.seconds:.0f}' if part.seconds else ''} | {note} |")
    lines += ["", "## Targets", "", *target_lines(report)]
    for name in ("attention", "adapter"):
        if rows := report.rows(name):
            lines += ["", f"## {name.capitalize()}", "", *operator_lines(rows, report.rows(name, "left_out"))]
            rates = report.record(name).result["rates"]
            lines += [
                "",
                f"Floors are those of this device's own rates: a copy at "
                f"{rates['bytes_per_second'] / 1e9:,.0f} GB/s, a product at "
                f"{rates['flops_per_second'] / 1e12:,.2f} TFLOP/s. Times are medians in µs with the 20th and the "
                "80th percentile; share, launch (Python's time to queue the call) and peak memory are of "
                "forward + backward.",
            ]
        if name in plots:
            lines += ["", f"![Share of the floor against batch and length]({plots[name]})"]
    lines += step_lines(report) + training_lines(report) + resource_lines(report)
    return "\n".join(lines) + "\n"


def target_lines(report: Report) -> list[str]:
    if not report.gpu:
        return ["Not measured: they are about fused kernels on a GPU, and this machine has none."]
    if report.doubt:
        return [f"{report.doubt}, so no speed-up is reported."]
    if not report.targets:
        return ["Not measured: no benchmark of a fused kernel has ended."]

    def number(value: float, unit: str) -> str:
        return f"{value:.0%}" if unit == "%" else f"{value:.2f}×"

    return [
        "Set for an H200.",
        "",
        "| target | at least | measured | met |",
        "|---|---:|---:|---|",
        *(
            f"| {row['what']} | {number(row['required'], row['unit'])} | {number(row['measured'], row['unit'])}"
            f"{' (' + row['note'] + ')' if row['note'] else ''} | {'yes' if row['met'] else 'no'} |"
            for row in report.targets
        ),
    ]


def operator_lines(rows: list[dict], left_out: list[dict]) -> list[str]:
    """A table for each shape: a line for each candidate, a column for each mode."""
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        table = {(row["mode"], row["candidate"]): row for row in rows if row["shape"] == shape}
        first = next(iter(table.values()))
        lines += [
            "",
            f"**{shape}**, batch {first['batch']}, {first['dtype']}",
            "",
            "| | forward | backward | forward + backward | of the floor | launch | peak memory |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for candidate in dict.fromkeys(name for _, name in table):
            each = [table.get((mode, candidate)) for mode in MODES]
            both = each[-1] or {}
            share, launch, memory = (both.get(key) for key in ("share_of_floor", "launch", "peak_memory"))
            cells = [
                "{} ({}–{})".format(*(microseconds(row[key]) for key in ("median", "p20", "p80"))) if row else ""
                for row in each
            ]
            cells += [
                f"{share:.0%}" if share else "–",
                f"{launch:,.0f} µs" if launch else "–",
                f"{memory / 2**20:,.0f} MiB" if memory is not None else "–",
            ]
            lines.append(f"| {candidate} | {' | '.join(cells)} |")
        for row in left_out:
            if row["shape"] == shape:
                lines += ["", f"Not timed: {row['candidate']}, {row['reason']}"]
    return lines[1:]


def step_lines(report: Report) -> list[str]:
    """What bench/step.py says of itself, below its title."""
    record = report.record("training step")
    if record is None or not record.result:
        return []
    _, *lines = record.result["text"].rstrip().splitlines()
    return ["", "## Training step", *(f"#{line}" if line.startswith("## ") else line for line in lines)]


def training_lines(report: Report) -> list[str]:
    record = report.record("embedded training")
    if record is None or not record.result:
        return []
    result = record.result
    names = list(result["adapted"])
    lines = [
        "",
        "## Embedded training",
        "",
        f"{result['epochs']} epochs on {'the fused kernels' if report.gpu else 'plain PyTorch'}, "
        f"{result['images_per_second']:,.0f} images/s; {result['queries']:,} captions search "
        f"{result['gallery']:,} images.",
        "",
        f"| | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    for title, metrics in (("zero-shot CLIP", result["zero_shot"]), ("UP-Person", result["adapted"])):
        lines.append(f"| {title} | {' | '.join(f'{metrics[name]:.2f}' for name in names)} |")
    return lines


def resource_lines(report: Report) -> list[str]:
    rows = report.rows("resources")
    if not rows:
        return []
    kernels = dict.fromkeys(row["kernel"] for row in rows)
    lines = [
        "",
        "## Compiled kernels",
        "",
        f"Ahead of time for sm_{rows[0]['target']}, at {len({row['shape'] for row in rows})} shapes; a stack "
        "above 0 is a spill.",
        "",
        "| kernel | registers, at most | stack, at most | shared memory, at most |",
        "|---|---:|---:|---:|",
    ]
    for kernel in kernels:
        most = {
            key: max(row[key] for row in rows if row["kernel"] == kernel) for key in ("registers", "stack", "shared")
        }
        lines.append(f"| {kernel} | {most['registers']} | {most['stack']} B | {most['shared'] / 1024:.0f} KB |")
    return lines


def publish(report: Report, work: Path, output: Path, slug: str) -> Path:
    """Writes the JSON and the Markdown, and puts the plots beside them."""
    plots = {}
    for name in ("attention", "adapter"):
        if (work / f"{name}.png").exists():
            plots[name] = f"report-{slug}-{name}.png"
            shutil.copyfile(work / f"{name}.png", output / plots[name])
    report.targets = [] if report.doubt else targets(report.rows("attention"), report.rows("adapter"))
    if report.gpu and not report.doubt:
        report.targets += step_targets(report.rows("training step"))
    write(output / f"report-{slug}.json", json.dumps(asdict(report) | {"doubt": report.doubt}, indent=1) + "\n")
    write(output / f"report-{slug}.md", markdown(report, plots))
    return output / f"report-{slug}.md"


def main(make_parts: Callable[[Path], list[Part]] | None = None, work_folder: Path = ROOT / "runs") -> int:
    """`make_parts` gives the parts for a work folder; by default those that this machine can run."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0 if gpu else 5.0,
        metavar="M",
        help="time for everything (default: 10, without a GPU 5)",
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="folder of the reports (default: bench/results)"
    )
    parser.add_argument("--fresh", action="store_true", help="run parts again that passed before")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes: {arguments.minutes} is not allowed; expected a number above 0")
    arguments.output.mkdir(parents=True, exist_ok=True)

    device = torch.device("cuda" if gpu else "cpu")
    found, slug = environment(device), device_slug(device)
    work = work_folder / f"report-{slug}-{identity(found)}"
    if arguments.fresh and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    report = Report(found, gpu)
    print(
        f"{found['device']}; torch {found['torch']}, Triton {found['triton']}, commit {found['commit']}; "
        f"logs and finished parts in {work}"
    )

    def finished(record: Record) -> None:
        report.parts.append(record)
        publish(report, work, arguments.output, slug)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the part that runs is stopped too
    parts = (make_parts or (gpu_parts if gpu else cpu_parts))(work)
    try:
        run(parts, work, 60 * arguments.minutes, finished)
    except KeyboardInterrupt:
        print(f"\nstopped; the parts that passed are kept in {work}, and the same command goes on")
        return 130
    if not gpu:
        report.parts += NEEDS_A_GPU
    path = publish(report, work, arguments.output, slug)

    if report.doubt:
        print(f"\n{report.doubt}: no figure of a fused kernel is valid.")
    for part in report.parts:
        if part.status != "passed":
            print(f"{part.name}: {part.status}, {part.reason}")
            if part.tail:
                print("    " + part.tail.replace("\n", "\n    "))
    print(f"\nreport: {path} and .json")
    return int(any(part.status in ("failed", "over time") for part in report.parts))


if __name__ == "__main__":
    sys.exit(main())
