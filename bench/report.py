"""Everything this machine can measure, in one command: a JSON and a Markdown report named after its GPU.

    python bench/report.py                     about 10 minutes with a GPU, 5 without; resumes an interrupted report
    python bench/report.py --fresh             measures everything again
    python bench/report.py --output DIR        reports to DIR instead of bench/results

Each part is a program of its own with a time limit. The result of a part is kept at once in a folder beside the
reports, so that a report that was killed resumes with the next part, on another machine of the same kind too if the
folder came along. A folder belongs to one kind of device, one state of the measured sources and one version of PyTorch
and Triton. A part that fails or runs over its time does not stop the others. The report shows the end of its output,
and the exit status is 1.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from harness.device import device_at_hand, device_slug, environment
from harness.operators import RESULTS_FOLDER
from harness.options import above_zero
from harness.output import save_json, table
from harness.parts import ROOT, Part, Record, file_name, run
from harness.targets import operator_targets, step_targets, targets_table

from upperson.errors import exit_status, path_argument
from upperson.evaluate.results import RESULTS, TABLE
from upperson.files import make_folder, write_atomically

COMPILED_TARGETS = (80, 89, 90, 100)  # of bench/resources.py
OPERATORS = ("attention", "adapter")
MODEL_NEEDS = ("open_clip", "torchvision", "safetensors", "tqdm", "PIL")


@dataclass
class Report:
    """The content of the JSON file."""

    environment: dict[str, str | None]
    gpu: bool
    parts: list[Record] = field(default_factory=list)
    targets: list[dict] = field(default_factory=list)

    def record(self, name: str) -> Record | None:
        return next((part for part in self.parts if part.name == name), None)

    def rows(self, name: str) -> list[dict]:
        record = self.record(name)
        return record.result["rows"] if record and record.result else []

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

NEEDS_A_GPU = {
    "kernel tests": "no GPU; `pytest` runs them in Triton's interpreter",
    "speed of the fused kernels": "no GPU, and the interpreter's speed means nothing. Only PyTorch candidates are "
    "timed, in small batches, and the training step is that of the embedded model",
    "full embedded training": "it takes two cores minutes, so a short run is made; `python train.py` is the full one",
}


def gpu_parts(work: Path) -> list[Part]:
    """The most important part first: the limits add up to more than the report may take, and a slow machine does not
    reach the last part."""
    major, minor = torch.cuda.get_device_capability()
    target = max((t for t in COMPILED_TARGETS if t <= 10 * major + minor), default=COMPILED_TARGETS[0])
    workers = str(max(1, min(12, (os.cpu_count() or 2) - 2)))
    # Most of the tests' time goes into compiling a few hundred kernels, on all cores at once.
    spread = ("-n", workers) if importlib.util.find_spec("xdist") else ()
    tests = sorted((ROOT / "tests").glob("test_kernels*.py"))
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, *tests]
    return [
        Part("kernel tests", pytest, 150, needs=("pytest", "hypothesis")),
        benchmark("attention", 125, work, "attn.py", "--sweep"),
        benchmark("adapter", 125, work, "adapter.py", "--sweep"),
        benchmark("training step", 240, work, "step.py", needs=MODEL_NEEDS),
        training(90, work, "--backend", "triton", "--workers", workers),
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


def benchmark(name: str, seconds: float, work: Path, script: str, *arguments: str, needs: tuple = ()) -> Part:
    """A script of this folder, which writes its result to --json."""
    path = work / f"{file_name(name)}.json"
    command = [sys.executable, ROOT / "bench" / script, *arguments, "--json", path]
    return Part(name, command, seconds, needs, lambda: json.loads(path.read_text()) if path.exists() else None)


def training(seconds: float, work: Path, *arguments: str) -> Part:
    """The embedded training; an interrupted one is resumed."""
    folder = work / "run"
    where = ("--resume", folder) if (folder / "config.json").exists() else ("--run-dir", folder)

    def collect() -> dict | None:
        if not (folder / RESULTS).exists():
            return None
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rate = statistics.median(line["images_per_second"] for line in lines if line["kind"] == "epoch")
        text = f"{(folder / TABLE).read_text()}\n{rate:,.0f} images/s.\n"
        return json.loads((folder / RESULTS).read_text()) | dict(images_per_second=rate, text=text)

    command = [sys.executable, ROOT / "train.py", *where, *arguments]
    return Part("embedded training", command, seconds, (*MODEL_NEEDS, "matplotlib"), collect)


def identity(found: dict[str, str | None]) -> str:
    """The name of a state: kind of device, versions, and every source file that is measured."""
    digest = hashlib.sha256(repr([found[name] for name in ("device", "driver", "torch", "triton")]).encode())
    sources = [path for folder in ("bench", "kernels", "upperson") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted([*sources, ROOT / "train.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


# ---------------------------------------------------------------------------------------- the page


def markdown(report: Report, plots: dict[str, str]) -> str:
    """The report for a reader; `plots` are the files beside it, by part."""
    paragraphs = [f"# {report.environment['device']}"]
    if report.doubt:
        paragraphs.append(f"**{report.doubt}: no figure of a fused kernel on this page is valid.**")
    for part in troubled(report):
        paragraphs.append(f"**{part.name}: {part.status}** ({part.reason})")
        paragraphs += [f"```\n{part.tail}\n```"] if part.tail else []
    found = [{"environment": name, "value": value or "unknown"} for name, value in report.environment.items()]
    paragraphs += [table(found, "pipe", left=["value"]), "## Parts"]
    parts = [
        {
            "part": part.name,
            "status": part.status,
            "seconds": f"{part.seconds:.0f}" if part.seconds else "",
            "note": part.reason or (part.tail if part.name == "kernel tests" else ""),
        }
        for part in report.parts
    ]
    paragraphs += [table(parts, "pipe", left=("status", "note")), "## Targets", *target_paragraphs(report)]
    for part in report.parts:
        if part.result and part.result.get("text"):
            paragraphs += [f"## {part.name.capitalize()}", nested(part.result["text"])]
        if part.name in plots:
            paragraphs.append(f"![Share of the floor against batch and length]({plots[part.name]})")
    return "\n\n".join(paragraphs) + "\n"


def nested(text: str) -> str:
    """The text of a part below its own title, its headings one level lower."""
    lines = [f"#{line}" if line.startswith("## ") else line for line in text.splitlines() if not line.startswith("# ")]
    return "\n".join(lines).strip()


def troubled(report: Report) -> list[Record]:
    return [part for part in report.parts if part.status in ("failed", "over time")]


def target_paragraphs(report: Report) -> list[str]:
    if not report.gpu:
        return ["Not measured: they are about fused kernels on a GPU, and this machine has none."]
    if report.doubt:
        return [f"{report.doubt}, so no speed-up is reported."]
    if not report.targets:
        return ["Not measured: no benchmark of a fused kernel has ended."]
    return ["Set for an H200.", targets_table(report.targets)]


def publish(report: Report, work: Path, output: Path, slug: str) -> Path:
    """Writes the JSON and the Markdown, and puts the plots beside them."""
    plots = {}
    for name in OPERATORS:
        if (work / f"{name}.png").exists():
            plots[name] = f"report-{slug}-{name}.png"
            shutil.copyfile(work / f"{name}.png", output / plots[name])
    report.targets = []
    if not report.doubt:
        report.targets = [found for name in OPERATORS for found in operator_targets(name, report.rows(name))]
        report.targets += step_targets(report.rows("training step")) if report.gpu else []
    path = output / f"report-{slug}.md"
    save_json(path.with_suffix(".json"), asdict(report) | {"doubt": report.doubt})
    write_atomically(path, markdown(report, plots).encode())
    return path


# ---------------------------------------------------------------------------------------- the command


def main(make_parts: Callable[[Path], list[Part]] | None = None) -> int:
    """`make_parts` gives the parts for a work folder; by default those that this machine can run."""
    device = device_at_hand()
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    minutes, note = (10.0 if gpu else 5.0), "time for everything (default: 10, without a GPU 5)"
    option("--minutes", type=above_zero, default=minutes, metavar="M", help=note)
    note = "folder of the reports (default: bench/results)"
    option("--output", type=path_argument, default=RESULTS_FOLDER, metavar="DIR", help=note)
    option("--fresh", action="store_true", help="run the parts that passed before again")
    arguments = parser.parse_args()
    make_folder(arguments.output, "--output")

    found, slug = environment(device), device_slug(device)
    work = arguments.output.resolve() / f"parts-{slug}-{identity(found)}"
    if arguments.fresh and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    report = Report(found, gpu)
    print(f"{found['device']}; torch {found['torch']}, Triton {found['triton']}, commit {found['commit']}")
    print(f"logs and finished parts in {work}")

    def finished(records: Iterable[Record]) -> Path:
        report.parts += records
        return publish(report, work, arguments.output, slug)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the running part is stopped too
    parts = (make_parts or (gpu_parts if gpu else cpu_parts))(work)
    try:
        run(parts, work, 60 * arguments.minutes, lambda record: finished([record]))
    except KeyboardInterrupt:
        print(f"\nstopped; the parts that passed are kept in {work}, and the same command resumes")
        return 130
    needs_gpu = {} if gpu else NEEDS_A_GPU
    path = finished(Record(name, "left out", reason=reason) for name, reason in needs_gpu.items())

    if report.doubt:
        print(f"\n{report.doubt}: no figure of a fused kernel is valid.")
    for part in report.parts:
        if part.status != "passed":
            print(f"{part.name}: {part.status}, {part.reason}")
            if part.tail:
                print("    " + part.tail.replace("\n", "\n    "))
    print(f"\nreport: {path} and .json")
    return int(bool(troubled(report)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
