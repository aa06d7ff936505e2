"""Where the time of a training step goes, by kind of operation: torch.profiler, summed up."""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from harness.output import table

STEPS = 3
OPTIMIZER = "optimizer"
# An operator is of the first kind whose pattern is found in its name.
KINDS = {
    "attention": r"attention",
    "LayerNorm and adapter": r"layer_?norm",
    "activation": r"gelu|silu|sigmoid|relu|threshold",
    "softmax": r"softmax",
    "matrix products": r"::(add)?(b?mm|bmm)|linear|matmul|gemm",
    "convolution": r"conv",
    "copies and layout": r"copy|clone|contiguous|::cat|index|embedding|gather|scatter|fill|zero|slice|select|pad|::to$|"
    r"split|stack",
    "sums": r"::sum|mean|norm|max|min|cumsum",
    "elementwise": r"::(add|sub|mul|div|neg|exp|log|pow|sqrt|where|masked|eq|le|lt|ge|gt|bitwise)",
}
REST = "rest"


def kind_of(event: FunctionEvent) -> str:
    """The kind of an operator; all operators that the optimizer calls are of the optimizer's kind."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer."):
            return OPTIMIZER
        parent = parent.cpu_parent
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.name, re.IGNORECASE)), REST)


def profile(step: Callable[[], object], device: torch.device, trace: Path) -> str:
    """A Markdown table of milliseconds a step by kind, on the GPU where there is one; the trace goes to a file."""
    gpu = device.type == "cuda"
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize(device)
        wall = 1e3 * (time.perf_counter() - began) / STEPS
    profiler.export_chrome_trace(str(trace))

    milliseconds, calls = Counter(), Counter()
    for event in profiler.events():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        if event.device_type == torch.autograd.DeviceType.CPU and own > 0:
            milliseconds[kind_of(event)] += own / 1e3 / STEPS
            calls[kind_of(event)] += 1 / STEPS
    lines = [(kind, value, f"{calls[kind]:,.0f}") for kind, value in milliseconds.most_common()]
    if gpu:
        lines.append(("GPU idle", wall - sum(milliseconds.values()), ""))
    lines.append(("wall time under the profiler", wall, ""))
    return table(
        [
            {"": kind, "ms a step": f"{value:,.2f}", "share": f"{value / wall:.0%}", "operators": number}
            for kind, value, number in lines
        ],
        "pipe",
    )
