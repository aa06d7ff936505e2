"""The benchmarks: nothing wrong is timed, floors are right, reports resume and say what failed."""

import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # the scripts find each other like this too
adapter, attn, report = map(importlib.import_module, ("adapter", "attn", "report"))
comparison, device, operators, targets, timing = (
    importlib.import_module(f"harness.{name}") for name in ("comparison", "device", "operators", "targets", "timing")
)

CPU = torch.device("cpu")
RATES = device.Rates("a device", 1e9, 1e9)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Rates that need no measuring."""
    monkeypatch.setattr(operators, "measure_rates", lambda *_: RATES)


@pytest.fixture
def small(monkeypatch):
    """The benchmarks' shapes, smaller."""
    monkeypatch.setitem(attn.SHAPES, "image", attn.Shape(length=7, heads=1, causal=False, prefix=2, width=16))
    monkeypatch.setitem(attn.SHAPES, "text", attn.Shape(length=29, heads=1, causal=True, prefix=2, width=16))
    monkeypatch.setitem(adapter.SHAPES, "image", adapter.Shape(length=7, width=32, hidden=4, residual=False))
    monkeypatch.setitem(adapter.SHAPES, "text + residual", adapter.Shape(length=5, width=32, hidden=4, residual=True))


def run_main(module, monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


# ---------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("name", ["adapter", "attn", "loader", "report", "resources", "step", "street", "tune"])
def test_the_help_is_printed_whatever_the_encoding(monkeypatch, name):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
    sys.stdout.flush()
    assert stopped.value.code == 0 and output.getvalue().startswith(b"usage: ")


@needs_no_gpu
@pytest.mark.parametrize(
    "module, shape, candidates",
    [
        (attn, "text", {"explicit softmax", "folded SDPA", "folded SDPA, lower right", "SDPA, no prefix"}),
        (
            attn,
            "text, packed",
            {
                "packed, PyTorch backend",
                "explicit softmax",
                "folded SDPA",
                "folded SDPA, lower right",
                "SDPA, no prefix",
            },
        ),
        (adapter, "text + residual", {"eager", "LayerNorm alone"}),
    ],
    ids=["attention", "packed attention", "adapter"],
)
def test_operator_benchmark(module, shape, candidates, small, tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    assert run_main(module, monkeypatch, "--shape", shape, "--batch", "3", "--seconds", "0.01", "--json", path) == 0
    printed = capsys.readouterr().out
    assert "Left out, as they need a GPU: the fused kernels" in printed and "Floors at batch 128" in printed
    result = json.loads(path.read_text())
    assert {(row["mode"], row["candidate"]) for row in result["rows"]} == {
        (mode, candidate) for mode in ("forward", "backward", "both") for candidate in candidates
    }
    assert result["left_out"] == [] and result["sweep"] == [] and result["text"] in printed
    for row in result["rows"]:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["launch"] is None and row["peak_memory"] is None  # a CPU has neither
        if row["kind"] == "baseline":
            assert row["share_of_floor"] == pytest.approx(row["floor"] / row["median"])
    assert result["environment"]["torch"] == torch.__version__


@pytest.mark.slow
@needs_no_gpu
@pytest.mark.parametrize("module", [attn, adapter])
def test_sweep(module, small, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "result.json"
    assert (
        run_main(
            module, monkeypatch, "--shape", "image", "--batch", "2", "--seconds", "0.01", "--sweep", "--json", path
        )
        == 0
    )
    sweep = json.loads(path.read_text())["sweep"]
    axes = {(row["axis"].split()[0], row["value"]) for row in sweep}
    assert {("batch", 1), ("batch", 8), ("tokens", 50), ("tokens", 193)} <= axes
    for row in sweep:
        assert row["value"] == row["batch" if row["axis"].startswith("batch") else "length"]
        assert row["mode"] == "both"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_unasked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "RESULTS_FOLDER", tmp_path)
    run_main(adapter, monkeypatch, "--shape", "image", "--batch", "2", "--seconds", "0.01")
    assert list(tmp_path.iterdir()) == []
    run_main(adapter, monkeypatch, "--shape", "image", "--batch", "2", "--seconds", "0.01", "--json")
    assert [path.name for path in tmp_path.iterdir()] == [f"adapter-{device.device_slug(device.device_at_hand())}.json"]


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (attn, ["--batch", "0"], "--batch: '0' is not allowed; expected a whole number from 1"),
        (attn, ["--seconds", "no"], "--seconds: 'no' is not allowed; expected a number above 0"),
        (adapter, ["--json", "/nowhere/at/all.json"], "--json: folder /nowhere/at does not exist; expected"),
        (adapter, ["--json", "/"], "--json: / cannot be written; expected a file in a folder that can be written"),
        (adapter, ["--sweep"], "--sweep draws its plot beside the JSON file; give --json as well"),
        (report, ["--minutes", "-1"], "--minutes: '-1' is not allowed; expected a number above 0"),
    ],
)
def test_bad_options(module, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(module, monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_cpu_comparisons_run_when_asked_alone():
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("open_clip")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    root = BENCH.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = subprocess.run([*command, "bench"], cwd=root, env=environment, capture_output=True, text=True)
    assert asked.returncode == 0 and "6 passed" in asked.stdout, asked.stdout
    assert 'testpaths = ["tests"]' in (root / "pyproject.toml").read_text()


# ---------------------------------------------------------------------------------------- floors


@pytest.mark.parametrize(
    "module, call, megabytes, gigaflop, h200, rtx4090",
    [
        (attn, "image, forward", 153, 15.4, 36, 166),
        (attn, "image, backward", 305, 38.5, 71, 331),
        (attn, "image-L/14, forward", 258, 32.5, 60, 280),
        (attn, "image-L/14, backward", 514, 81, 120, 558),
        (adapter, "image, forward", 76, 7.3, 18, 83),
        (adapter, "image, backward", 114, 14.6, 27, 124),
    ],
)
def test_floors(module, call, megabytes, gigaflop, h200, rtx4090):
    """The figures of the design, worked out by hand from the sizes of the tensors; the last digit may be rounded."""
    ((moved, flops),) = [rest for name, *rest in module.floors() if name == call]
    assert moved / 1e6 == pytest.approx(megabytes, abs=0.51)
    assert flops / 1e9 == pytest.approx(gigaflop, rel=0.005)
    assert [device.KNOWN_RATES[name].floor(moved, flops) for name in ("H200", "RTX 4090")] == [
        pytest.approx(h200, abs=0.6),
        pytest.approx(rtx4090, abs=0.6),
    ]


def test_floor_of_packed_captions_counts_their_tokens_alone():
    shape = attn.Shape(length=10, heads=2, causal=True, prefix=3, width=16)
    assert shape.flops([4], "forward") == 4 * 2 * 16 * (1 + 2 + 3 + 4 + 4 * 3)
    assert shape.flops([4, 7], "both") == 3.5 * (shape.flops([4], "forward") + shape.flops([7], "forward"))
    assert shape.bytes([4, 7], "backward", 2) == 11 * 2 * (8 * 16 * 2 + 4)


# ---------------------------------------------------------------------------------------- right before fast


def test_wrong_candidates_are_named_and_not_timed():
    shape = attn.Shape(length=9, heads=2, causal=True, prefix=3, width=16)
    case = attn.case("text", shape, 2, torch.float32, CPU, "weights")
    right = case.definition

    def wrong_gradient(qkv, key, value, scale):
        out = right(qkv, key, value, scale)
        return out + 0.01 * (out.detach() * (scale - scale.detach()))  # the same value

    def not_finite(*tensors):
        return right(*tensors) * torch.nan

    def breaks(*tensors):
        raise RuntimeError("no such backend\nand more")

    def breaks_without_gradients(*tensors):
        if not torch.is_grad_enabled():
            raise RuntimeError("only for training")
        return right(*tensors)

    candidates = {
        "right": right,
        "off by one": lambda *t: right(*t).roll(1, dims=1),
        "gradient": wrong_gradient,
        "NaN": not_finite,
        "breaks": breaks,
        "inference": breaks_without_gradients,
        "acausal": attn.at(attn.reference.explicit, replace(shape, causal=False), "weights"),
    }
    case = replace(case, candidates={name: comparison.Candidate(f) for name, f in candidates.items()})
    rows, left_out = comparison.compare(case, CPU, 0.01, RATES)
    assert {row["candidate"] for row in rows} == {"right"}
    assert [row["floor"] for row in rows] == [
        RATES.floor(case.bytes[row["mode"]], case.flops[row["mode"]]) for row in rows
    ]
    assert len({row["floor"] for row in rows}) == len(rows) == 3
    reasons = {entry["candidate"]: entry["reason"] for entry in left_out}
    assert set(reasons) == set(candidates) - {"right"}
    assert reasons["breaks"] == "cannot run: no such backend"
    assert reasons["inference"] == "cannot run: only for training"
    assert all(reasons[name].startswith("wrong: errors") for name in ("off by one", "gradient", "NaN", "acausal"))
    described = "\n".join(comparison.describe(case, rows, left_out))
    assert "Not timed: off by one, wrong: errors" in described and "| right " in described


def test_packed_candidates_are_compared_in_their_own_layout():
    shape = attn.Shape(length=20, heads=1, causal=True, prefix=2, width=16)
    case = attn.packed_case(shape, 4, torch.float32, CPU, "weights")
    packed = case.candidates["packed, PyTorch backend"]
    assert packed.layout is not None
    wrong = replace(packed, function=lambda *tensors: packed.function(*tensors).flip(0))
    _, left_out = comparison.compare(replace(case, candidates={"packed": packed, "wrong": wrong}), CPU, 0.01, RATES)
    assert [entry["candidate"] for entry in left_out] == ["wrong"]


def test_a_wrong_fused_kernel_ends_with_status_1(small, monkeypatch, capsys):
    found = attn.candidates

    def with_wrong(shape, target, device):
        wrong = comparison.Candidate(lambda qkv, *rest: qkv[:, :, 0], "fused")
        return {"fused (this project)": wrong} | found(shape, target, CPU)

    monkeypatch.setattr(attn, "candidates", with_wrong)
    assert run_main(attn, monkeypatch, "--shape", "image", "--batch", "2", "--seconds", "0.01") == 1
    assert "error: fused kernels that are wrong or cannot run: image, fused (this project)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- measuring


def test_candidates_take_turns_and_preparing_is_not_timed():
    order = []

    def slow_to_prepare():
        timing.time.sleep(0.02)
        return "prepared"

    def call(name, **options):
        return timing.Call(lambda given: order.append((name, given)), **options)

    timings = timing.time_in_turns({"a": [call("a")], "b": [call("b", prepare=slow_to_prepare)]}, CPU, 0.01)
    assert order[:4] == [("a", None), ("b", "prepared")] * 2
    assert len(order) >= 2 * (2 + 5)
    assert timings["b"].median < 10_000


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose clock is in cycles of 1 ns: `host` and `gpu` are the times up to which Python and the GPU are busy.

    `launch(nanoseconds)` queues a computation, which Python needs 3 ms to launch.
    """
    state = types.SimpleNamespace(host=0, gpu=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = state.gpu = max(state.gpu, state.host)  # an idle GPU is at it at once

        def query(self):
            return self.at <= state.host

        def elapsed_time(self, end):
            return (end.at - self.at) / 1e6  # milliseconds

    def sleep(cycles):
        state.gpu = max(state.gpu, state.host) + cycles

    def synchronise():
        state.host = max(state.host, state.gpu)

    def launch(nanoseconds):
        state.host += 3_000_000
        state.gpu = max(state.gpu, state.host) + nanoseconds

    for name, fake in (("Event", Event), ("_sleep", sleep), ("synchronize", synchronise)):
        monkeypatch.setattr(torch.cuda, name, fake)
    state.launch = launch
    return state


def test_gpu_times_without_waiting_for_python(gpu):
    clock = timing.GpuClock()
    calls = [timing.Call(lambda _: gpu.launch(5_000))] * 12
    rounds = [clock.times(calls)[0] for _ in range(12)]
    assert rounds[0] == []  # the first sleeps are too short
    assert rounds[-1] == [pytest.approx(5.0)] * 12
    assert all(time == pytest.approx(5.0) for times in rounds for time in times)


@pytest.mark.parametrize("slower, agree", [(0.88, False), (0.95, True), (1.0, True), (1.05, True), (1.12, False)])
def test_the_clock_is_held_against_do_bench(slower, agree, gpu, monkeypatch, capsys):
    """A product takes 2 ms on the GPU and a copy 1 ms; do_bench finds `slower` times as much for the same product."""
    testing = pytest.importorskip("triton.testing")
    multiply = torch.Tensor.__matmul__

    def timed_product(a, b):
        gpu.launch(2_000_000)
        return multiply(a, b)

    def do_bench(call, quantiles):
        assert quantiles == [0.2]
        gpu.host = began = max(gpu.host, gpu.gpu)
        assert call().shape == (8192, 8192)
        return slower * (gpu.gpu - began - 3_000_000) / 1e6  # milliseconds, without the launch

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed_product)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: gpu.launch(1_000_000))
    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    with FakeTensorMode():
        rates = device.measure_rates(torch.device("cuda"), torch.bfloat16)
    product = 2 * 8192**3 / 2e-3
    assert rates.flops_per_second == pytest.approx(product)
    assert rates.bytes_per_second == pytest.approx(2 * 2**30 / 1e-3)
    assert rates.do_bench_flops_per_second == pytest.approx(product / slower)
    printed = capsys.readouterr().err
    if agree:
        assert rates.warning is None and printed == ""
    else:
        both = f"{product / 1e12:,.1f} and {product / slower / 1e12:,.1f} TFLOP/s"
        assert both in rates.warning and printed == f"warning: {rates.warning}\n"
        results = operators.Results({}, rates)
        assert json.loads(json.dumps(asdict(results)))["rates"]["warning"] == rates.warning


def test_copies_fill_more_than_the_cache():
    assert timing.copies_beyond_cache(2**20, CPU) == 64  # the most there are
    assert timing.copies_beyond_cache(40 * 2**20, CPU) == 3  # of a 32 MiB cache: 96 MiB
    assert timing.copies_beyond_cache(2**30, CPU) == 1


# ---------------------------------------------------------------------------------------- the report


def python(name: str, code: str, seconds: float = 30, **options) -> "report.Part":
    return report.Part(name, [sys.executable, "-c", code], seconds, **options)


def run_report(parts, folder: Path, monkeypatch, *arguments) -> int:
    """`report.py` with other parts, reporting to folder/out."""
    monkeypatch.setattr(sys, "argv", ["report.py", "--output", str(folder / "out"), *arguments])
    return report.main(lambda work: parts)


def read_report(folder: Path) -> tuple[dict, str]:
    (data,), (text,) = (list((folder / "out").glob(f"report-*.{kind}")) for kind in ("json", "md"))
    return json.loads(data.read_text()), single_spaced(text.read_text())


def single_spaced(text: str) -> str:
    """Markdown without the padding of its tables."""
    return re.sub(" +", " ", text)


@pytest.mark.slow
def test_report_resumes_after_a_kill(tmp_path):
    """The first part counts its runs; the second kills the report the first time, as nothing could catch."""
    script = tmp_path / "killed.py"
    script.write_text(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(BENCH)!r})
import report

FOLDER = Path({str(tmp_path)!r})
COUNT = "open({str(tmp_path / "runs")!r}, 'a').write('x')"
KILL = '''
import os, pathlib, signal
flag = pathlib.Path({str(tmp_path / "flag")!r})
if not flag.exists():
    flag.touch()
    os.kill(os.getppid(), signal.SIGKILL)
'''
parts = [report.Part(name, [sys.executable, "-c", code], 30) for name, code in (("one", COUNT), ("two", KILL))]
sys.argv = ["report.py", "--output", str(FOLDER / "out"), *sys.argv[1:]]
sys.exit(report.main(lambda work: parts))
""")
    first = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert first.returncode == -9, first.stderr
    assert [part["name"] for part in read_report(tmp_path)[0]["parts"]] == ["one"]  # nothing is lost
    second = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "[1/2] one: passed before" in second.stdout and "[2/2] two: at most" in second.stdout
    assert (tmp_path / "runs").read_text() == "x"
    statuses = {part["name"]: part["status"] for part in read_report(tmp_path)[0]["parts"]}
    assert statuses["one"] == statuses["two"] == "passed"
    third = subprocess.run([sys.executable, script, "--fresh"], capture_output=True, text=True)
    assert third.returncode == 0 and (tmp_path / "runs").read_text() == "xx"


@pytest.mark.slow
def test_report_names_what_failed_and_runs_the_rest(tmp_path, monkeypatch, capsys):
    parts = [
        python("broken", "print('a line'); raise SystemExit('the reason it broke')"),
        python("endless", "import time; print('begun', flush=True); time.sleep(60)", seconds=2),
        python("absent", "raise SystemExit(1)", needs=("a_module_that_nobody_has",)),
        python("unreadable", "", collect=lambda: json.loads("{")),
        python("good", f"print('fine, in {report.ROOT}/runs')", collect=lambda: {"answer": 42}),
    ]
    assert run_report(parts, tmp_path, monkeypatch) == 1
    data, text = read_report(tmp_path)
    found = {part["name"]: part for part in data["parts"]}
    assert [found[part.name]["status"] for part in parts] == ["failed", "over time", "left out", "failed", "passed"]
    assert found["good"]["result"] == {"answer": 42}
    assert found["good"]["tail"] == "fine, in runs"  # no path of this machine
    assert "**broken: failed** (exit status 1)" in text and "the reason it broke" in text
    assert "**endless: over time** (stopped after 2 s)" in text and "begun" in text
    assert "not installed: a_module_that_nobody_has" in text
    assert "broken: failed, exit status 1" in capsys.readouterr().out

    assert run_report(parts, tmp_path, monkeypatch) == 1  # what failed is tried again, the good one not
    printed = capsys.readouterr().out
    assert "[5/5] good: passed before" in printed and "[1/5] broken: at most" in printed


def test_report_ends_in_its_time(tmp_path, monkeypatch):
    parts = [python("long", "import time; time.sleep(60)"), python("late", "")]
    began = timing.time.monotonic()
    assert run_report(parts, tmp_path, monkeypatch, "--minutes", "0.03") == 1
    assert timing.time.monotonic() - began < 20
    late = read_report(tmp_path)[0]["parts"][1]
    assert (late["status"], late["seconds"]) == ("over time", 0) and "used up" in late["reason"]


def test_finished_parts_belong_to_the_sources_and_the_versions(tmp_path, monkeypatch):
    found = device.environment(CPU)
    assert report.identity(found) == report.identity(dict(found, date="another day"))
    assert report.identity(found) != report.identity(dict(found, torch="another"))
    for folder in ("bench", "kernels", "upperson", "tests"):
        (tmp_path / folder).mkdir()
    for name in ("train.py", "tests/test_kernels.py", "kernels/device.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    before = report.identity(found)
    (tmp_path / "kernels/device.py").write_text("2")
    assert report.identity(found) != before


@needs_no_gpu
def test_report_of_a_cpu_says_what_it_leaves_out(tmp_path, monkeypatch):
    assert run_report([], tmp_path, monkeypatch) == 0
    _, text = read_report(tmp_path)
    assert "| kernel tests | left out |" in text and "| speed of the fused kernels | left out |" in text
    assert "this machine has none" in text
    assert [part.name for part in report.cpu_parts(tmp_path)] == [
        "attention",
        "adapter",
        "training step",
        "embedded training",
        "resources",
    ]


@pytest.mark.parametrize("capability, target", [((9, 0), "90"), ((8, 6), "80"), ((12, 0), "100")])
def test_report_of_a_gpu_runs_the_fused_kernels(capability, target, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    parts = {part.name: list(map(str, part.command)) for part in report.gpu_parts(tmp_path)}
    assert list(parts) == ["kernel tests", "attention", "adapter", "training step", "embedded training", "resources"]
    assert str(BENCH.parent / "tests" / "test_kernels.py") in parts["kernel tests"]
    assert parts["embedded training"][-4:-1] == ["--backend", "triton", "--workers"]
    assert "--run-dir" in parts["embedded training"]
    assert parts["resources"][3] == target and parts["resources"][2] == "--target"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    (again,) = [part.command for part in report.gpu_parts(tmp_path) if part.name == "embedded training"]
    assert "--resume" in again and "--run-dir" not in again  # a training that was stopped goes on


def rows_of(shape: str, kinds: dict[str, str], medians: dict[str, float], share: float = 0.5) -> list[dict]:
    return [
        dict(
            shape=shape,
            mode=mode,
            candidate=name,
            kind=kinds.get(name, "baseline"),
            median=median,
            p20=median,
            p80=median,
            launch=9.0,
            floor=share * median,
            share_of_floor=share,
            peak_memory=2**20,
            batch=128,
            dtype="bfloat16",
        )
        for mode in ("forward", "backward", "both")
        for name, median in medians.items()
    ]


def gpu_report(test_status: str) -> "report.Report":
    kinds = {"fused": "fused", "bound": "bound"}
    attention = rows_of(
        "image",
        kinds,
        {
            "fused": 100,
            "explicit softmax": 500,
            "folded SDPA": 180,
            "folded SDPA, flash": 160,
            "FlexAttention": 90,
            "bound": 50,
        },
    )
    adapters = rows_of("image", kinds, {"fused": 10, "eager": 25, "torch.compile": 14, "torch.compile, auto": 15})
    rates = dict(name="x", bytes_per_second=1e12, flops_per_second=1e14)
    results = {"attention": attention, "adapter": adapters}
    parts = [report.Record("kernel tests", test_status, 60.0, tail="1 failed, 5 passed")]
    left_out = [dict(shape="image", candidate="cuDNN", reason="cannot run: no kernel")]
    for name, rows in results.items():
        text = "\n\n".join(comparison.describe(types.SimpleNamespace(title=name), rows, left_out))
        result = dict(rows=rows, left_out=left_out, rates=rates, sweep=[], text=text)
        parts.append(report.Record(name, "passed", result=result))
    return report.Report(dict(device="NVIDIA H200", torch="2"), True, parts)


def test_targets_are_held_against_the_best_baseline():
    found = gpu_report("passed")
    rows = [row for name in report.OPERATORS for row in targets.operator_targets(name, found.rows(name))]
    reached = {row["what"]: row for row in rows}
    expected = {
        "attention, image: forward + backward against best folded SDPA": (1.6, True),
        "attention, image: forward + backward against explicit softmax": (5.0, True),
        "attention, image: forward + backward, share of the floor": (0.5, False),
        "attention, image: slowest mode against its best baseline": (0.9, False),
        "adapter, image: forward + backward against eager": (2.5, False),
        "adapter, image: forward + backward against best torch.compile": (1.4, True),
        "adapter, image: slowest mode against its best baseline": (1.4, True),
    }
    assert {what: (round(row["measured"], 6), row["met"]) for what, row in reached.items()} == expected


@pytest.mark.parametrize(
    "status, doubt",
    [
        ("passed", ""),
        ("failed", "The kernel tests fail on this machine"),
        ("over time", "The kernel tests did not end in their time"),
    ],
)
def test_no_speed_up_while_a_test_is_red(status, doubt, tmp_path):
    path = report.publish(gpu_report(status), tmp_path, tmp_path, "nvidia-h200")
    assert path.name == "report-nvidia-h200.md"
    text, data = single_spaced(path.read_text()), json.loads(path.with_suffix(".json").read_text())
    assert data["doubt"] == doubt and bool(data["targets"]) == (not doubt)
    assert ("1.60× (folded SDPA, flash) | yes" in text) == (not doubt)
    assert ("no figure of a fused kernel on this page is valid" in text) == bool(doubt)
    assert ("no speed-up is reported" in text) == bool(doubt)
    assert "Not timed: cuDNN, cannot run: no kernel" in text
    assert "| FlexAttention | 90.0 (90.0–90.0) |" in text  # rows that win over us are kept


def test_plots_stand_beside_the_report(tmp_path):
    work, output = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    output.mkdir()
    (work / "attention.png").write_bytes(b"a picture")
    path = report.publish(gpu_report("passed"), work, output, "nvidia-h200")
    assert "](report-nvidia-h200-attention.png)" in path.read_text()
    assert (output / "report-nvidia-h200-attention.png").read_bytes() == b"a picture"


def test_the_report_holds_the_training_as_it_is(tmp_path):
    part = report.training(1.0, tmp_path)
    assert part.collect() is None  # the training has not ended
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text('{"captions": 8}')
    (folder / "results.md").write_text("Retrieval\n\n| R@1 |\n")
    lines = [dict(kind="epoch", images_per_second=rate) for rate in (1.0, 1200.0, 1400.0)] + [dict(kind="evaluation")]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = part.collect()
    assert result["captions"] == 8 and result["images_per_second"] == 1200
    record = report.Record(part.name, "passed", result=result)
    page = report.markdown(report.Report(dict(device="a device"), False, [record]), {})
    assert "## Embedded training\n\nRetrieval\n\n| R@1 |\n\n1,200 images/s." in page
