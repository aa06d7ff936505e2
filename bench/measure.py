"""How the benchmarks measure: what they have in common, whatever the operator.

The candidates of a comparison take turns within one process, so that a machine whose speed drifts slows all of
them. Inputs rotate through enough copies to fall out of the last-level cache. Reported are the median and the
20th and 80th percentile. A device's floor for a call is what its memory and its matrix units need at least for
the bytes and the operations of that call, at rates that are measured here too.
"""

import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    median: float
    p20: float
    p80: float


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


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of one call: between events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return 1e3 * start.elapsed_time(end)


def time_in_turns(candidates: dict[str, list[Callable[[], object]]], device: torch.device,
                  seconds: float) -> dict[str, Timing]:
    """Times the candidates in turns for about `seconds` in all, at least five rounds.

    Each candidate is a list of calls that do the same on different copies of the inputs; they are used in rotation.
    """
    rotations = {name: itertools.cycle(calls) for name, calls in candidates.items()}
    for _ in range(2):                                                                  # compile and warm up
        for rotation in rotations.values():
            next(rotation)()
    synchronise(device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, rotation in rotations.items():
            times[name].append(time_once(next(rotation), device))
    return {name: Timing(statistics.median(values), *percentiles(values)) for name, values in times.items()}


def percentiles(values: list[float]) -> tuple[float, float]:
    tenths = statistics.quantiles(values, n=10)
    return tenths[1], tenths[7]


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call allocates above what was there before; None where PyTorch does not count them (a CPU)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copies_beyond_cache(bytes_of_one: int, device: torch.device) -> int:
    """How many copies of the inputs no longer fit the last-level cache together."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 * 2**20
    return max(1, min(16, -(-3 * cache // bytes_of_one)))


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """This device's own rates, from the faster fifth of large copies and of large matrix products."""
    gpu = device.type == "cuda"
    source = torch.ones((1 << 30) // 4 if gpu else (1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    copy = time_in_turns({"copy": [lambda: target.copy_(source)]}, device, 0.5)["copy"].p20
    size = 8192 if gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = time_in_turns({"product": [lambda: a @ b]}, device, 0.5)["product"].p20
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
    return dict(device=device_name(device), driver=driver, torch=torch.__version__, triton=triton_version,
                python=platform.python_version(), commit=output("git", "rev-parse", "--short", "HEAD"),
                date=time.strftime("%Y-%m-%d"), cores=str(os.cpu_count()))
