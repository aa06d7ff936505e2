"""Where the time of a training step goes, by kind of operation: torch.profiler, summed up."""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from upperson.evaluate.tables import pipe_table

STEPS = 3
OPTIMIZER = "optimizer"
# The first kind whose pattern is found in an operator's name.
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
    """The kind of an operator; all that the optimizer calls is the optimizer's."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer."):
            return OPTIMIZER
        parent = parent.cpu_parent
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.name, re.IGNORECASE)), REST)


def profile(step: Callable[[], object], device: torch.device, trace: Path) -> list[str]:
    """A table of milliseconds a step by kind, on the GPU where there is one; and the trace in the file `trace`."""
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
    return kinds_table(profiler.events(), wall, gpu)


def kinds_table(events: list[FunctionEvent], wall: float, gpu: bool) -> list[str]:
    """Lines of a Markdown table; `wall` are the milliseconds that a step took."""
    milliseconds, calls = Counter(), Counter()
    for event in events:
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        if event.device_type == torch.autograd.DeviceType.CPU and own > 0:
            milliseconds[kind_of(event)] += own / 1e3 / STEPS
            calls[kind_of(event)] += 1 / STEPS
    body = [
        [kind, f"{value:,.2f}", f"{value / wall:.0%}", f"{calls[kind]:,.0f}"]
        for kind, value in milliseconds.most_common()
    ]
    if gpu:
        idle = wall - sum(milliseconds.values())
        body.append(["GPU idle", f"{idle:,.2f}", f"{idle / wall:.0%}", ""])
    body.append(["wall time under the profiler", f"{wall:,.2f}", "100%", ""])
    return pipe_table(["", "ms a step", "share", "operators"], body).splitlines()
