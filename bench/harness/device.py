"""The device: its name, its rates, and the environment of a measurement.

A device's floor for a call is the time that its memory and its matrix units need at least for the bytes and the
operations of that call.
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.timing import Call, time_in_turns

AGREEMENT = 0.1  # largest relative difference of two clocks


@dataclass(frozen=True)
class Rates:
    """What a device reaches: bytes read plus written a second by a large copy, and FLOP/s of a large matrix product.

    On a GPU the product is also timed by triton.testing.do_bench; `warning` says so if the two rates disagree.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    do_bench_flops_per_second: float | None = None
    warning: str | None = None

    def floor(self, read_and_written: float, flops: float) -> float:
        """Microseconds that a call needs at least."""
        return 1e6 * max(read_and_written / self.bytes_per_second, flops / self.flops_per_second)


# Rates of GPUs, for floors and predictions where no GPU is at hand: H100 and H200 as measured by a large copy and a
# large bf16 product; RTX 4090 about what its data sheet promises; B200 the shares of its data sheet (8 TB/s, 2,250
# TFLOP/s) that H100 and H200 reach of theirs, 90 and 73 %.
KNOWN_RATES = {
    "H100": Rates("H100", 3.0e12, 650e12),
    "H200": Rates("H200", 4.3e12, 790e12),
    "B200": Rates("B200", 7.2e12, 1650e12),
    "RTX 4090": Rates("RTX 4090", 0.92e12, 165e12),
}


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """This device's own rates, from the 20th percentile of the times of large copies and of large matrix products."""
    gpu = device.type == "cuda"
    source = torch.ones((1 << 30) // 4 if gpu else (1 << 27) // 4, device=device)
    target = torch.empty_like(source)
    size = 8192 if gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> torch.Tensor:
        return a @ b

    def seconds(call: Callable[[], object]) -> float:
        return time_in_turns({"": [Call(lambda _: call())]}, device, 0.5)[""].p20 / 1e6

    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    multiplied = 2 * size**3 / seconds(multiply)
    checked = check(multiplied, 2 * size**3, multiply) if gpu else ()
    return Rates(device_name(device), copied, multiplied, *checked)


def check(rate: float, flops: int, call: Callable[[], object]) -> tuple[float, str | None]:
    """FLOP/s of a call by triton.testing.do_bench, and a warning if `rate` is not about the same."""
    import triton.testing

    other = 1e3 * flops / triton.testing.do_bench(call, quantiles=[0.2])  # do_bench returns milliseconds
    if abs(rate - other) <= AGREEMENT * other:
        return other, None
    warning = (
        f"the clock of the benchmarks and triton.testing.do_bench disagree about a matrix product: "
        f"{rate / 1e12:,.1f} and {other / 1e12:,.1f} TFLOP/s"
    )
    print(f"warning: {warning}", file=sys.stderr)
    return other, warning


def device_at_hand() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{[*names, platform.processor() or platform.machine()][0]}, {torch.get_num_threads()} threads"


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
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return dict(
        device=device_name(device),
        driver=output(*query) if device.type == "cuda" else None,
        torch=torch.__version__,
        triton=triton_version,
        python=platform.python_version(),
        commit=output("git", "describe", "--always", "--dirty", "--exclude=*"),
        date=time.strftime("%Y-%m-%d"),
        cores=str(os.cpu_count()),
    )
