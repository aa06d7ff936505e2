"""How the benchmarks measure: what they have in common, whatever the operator.

The candidates of a comparison take turns within one process, so that a machine whose speed drifts slows all of
them. Inputs rotate through enough copies to fall out of the last-level cache. Reported are the median and the
20th and 80th percentile of single calls. On a GPU these are times of the GPU: what Python needs to launch a call
is measured too, and kept apart. A device's floor for a call is what its memory and its matrix units need at least
for the bytes and the operations of that call, at rates that are measured here too.
"""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """What is timed, `run`, and what goes before it untimed each time, `prepare`, whose result `run` is given."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Microseconds a call; `launch` is what Python needs to queue it on a GPU, None where there is no queue."""

    median: float
    p20: float
    p80: float
    launch: float | None


@dataclass(frozen=True)
class Rates:
    """What a device reaches: bytes read plus written a second by a large copy, and FLOP/s of a large product."""

    name: str
    bytes_per_second: float
    flops_per_second: float

    def floor(self, read_and_written: float, flops: float) -> float:
        """Microseconds that a call needs at least."""
        return 1e6 * max(read_and_written / self.bytes_per_second, flops / self.flops_per_second)


# Rates of two GPUs, for floors where no GPU is at hand: H200 as measured by a large copy and a large bf16
# product; RTX 4090 about what its data sheet promises.
KNOWN_RATES = (Rates("H200", 4.3e12, 790e12), Rates("RTX 4090", 0.92e12, 165e12))


def microseconds(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


class CpuClock:
    """Times calls by the wall clock."""

    def times(self, calls: Sequence[Call]) -> tuple[list[float], list[float]]:
        """Microseconds of each call, and none for launching."""
        times = []
        prepared = [call.prepare() for call in calls]
        for call in calls:
            start = time.perf_counter()
            call.run(prepared.pop(0))
            times.append(1e6 * (time.perf_counter() - start))
        return times, []


class GpuClock:
    """Times calls on the GPU, between events, without the gaps in which it would wait for Python.

    To launch an autograd call takes Python 50 to 200 µs, longer than a fast candidate computes. So the GPU is first
    put to sleep, the calls queue up behind, and it then works through them without a pause. If it woke up before
    the last one was queued, the sleep was too short: these times are thrown away, and it sleeps twice as long
    next time. A call that itself waits for the GPU can never be queued; at the longest sleep its times are taken
    as they are, gaps included.
    """

    QUEUED = 8  # calls; a GPU's queue holds about 1000 kernels
    LONGEST_SLEEP = 2**26  # cycles, some 40 ms

    def __init__(self) -> None:
        self.cycles = 2**19

    def times(self, calls: Sequence[Call]) -> tuple[list[float], list[float]]:
        """Microseconds of each call on the GPU, and of Python's launching it; none if the sleep was too short."""
        times, launches = [], []
        prepared = [call.prepare() for call in calls]  # all of them before: they fill the cache
        for first in range(0, len(calls), self.QUEUED):
            chunk = calls[first : first + self.QUEUED]
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in chunk]
            torch.cuda.synchronize()
            torch.cuda._sleep(self.cycles)
            began = time.perf_counter()
            for call, (start, end) in zip(chunk, events, strict=True):
                start.record()
                call.run(prepared.pop(0))
                end.record()
            launch = 1e6 * (time.perf_counter() - began) / len(chunk)
            too_short = events[0][0].query()
            torch.cuda.synchronize()
            if too_short and self.cycles < self.LONGEST_SLEEP:
                self.cycles *= 2
            else:
                times += [1e3 * start.elapsed_time(end) for start, end in events]
                launches.append(launch)
        return times, launches


def time_in_turns(candidates: dict[str, list[Call]], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Times the candidates in turns for about `seconds` in all, each at least five times.

    Each candidate is a list of calls that do the same on different copies of the inputs, one after the other.
    """
    clocks = {name: GpuClock() if device.type == "cuda" else CpuClock() for name in candidates}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    launches: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(2):  # compile and warm up
        for name, calls in candidates.items():
            clocks[name].times(calls[:1])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, calls in candidates.items():
            found = clocks[name].times(calls)
            times[name] += found[0]
            launches[name] += found[1]
    return {name: summary(times[name], launches[name]) for name in candidates}


def summary(times: list[float], launches: list[float]) -> Timing:
    tenths = statistics.quantiles(times, n=10)
    return Timing(statistics.median(times), tenths[1], tenths[7], statistics.median(launches) if launches else None)


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that a call allocates above what was there before; None where PyTorch does not count them (a CPU)."""
    if device.type != "cuda":
        return None
    prepared = call.prepare()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call.run(prepared)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copies_beyond_cache(bytes_of_one: float, device: torch.device) -> int:
    """How many copies of the inputs no longer fit the last-level cache together."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 * 2**20
    return max(1, min(64, -int(-3 * cache // bytes_of_one)))


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """This device's own rates, from the faster fifth of large copies and of large matrix products."""
    gpu = device.type == "cuda"
    source = torch.ones((1 << 30) // 4 if gpu else (1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    copy = time_in_turns({"copy": [Call(lambda _: target.copy_(source))]}, device, 0.5)["copy"].p20
    size = 8192 if gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = time_in_turns({"product": [Call(lambda _: a @ b)]}, device, 0.5)["product"].p20
    return Rates(device_name(device), 2 * source.numel() * 4 / copy * 1e6, 2 * size**3 / product * 1e6)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def device_slug(device: torch.device) -> str:
    """The device as part of a file name: "cpu", "nvidia-h200"."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def environment(device: torch.device) -> dict[str, str | None]:
    """What a figure depends on and a reader needs to know."""

    def output(*command: str) -> str | None:
        try:
            run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
            return run.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = output(*query) if device.type == "cuda" else None
    return dict(
        device=device_name(device),
        driver=driver,
        torch=torch.__version__,
        triton=triton_version,
        python=platform.python_version(),
        commit=output("git", "describe", "--always", "--dirty", "--exclude=*"),
        date=time.strftime("%Y-%m-%d"),
        cores=str(os.cpu_count()),
    )
