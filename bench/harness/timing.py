"""The clocks.

The candidates of a comparison take turns within one process, so that a machine whose speed drifts slows all
of them. Inputs rotate through enough copies to fall out of the last-level cache. Reported are the median and the
20th and 80th percentile of single calls. On a GPU these are times of the GPU. The time that Python needs to launch a
call is measured too, and kept apart.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """`run` is timed. `prepare` goes before it each time, untimed, and its result is given to `run`."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Microseconds a call; `launch` is what Python needs to queue it on a GPU, None where there is no queue."""

    median: float
    p20: float
    p80: float
    launch: float | None


class CpuClock:
    """Times each call by the wall clock."""

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
    """Times each call on the GPU, between events, without the gaps in which the GPU would wait for Python.

    To launch an autograd call takes Python 50 to 200 µs, longer than a fast candidate computes. So the GPU is first
    put to sleep, the calls queue up behind, and the GPU then works through them without a pause. If the GPU woke up
    before the last call was queued, the sleep was too short: these times are dropped, and the next sleep is twice as
    long. A call that itself waits for the GPU can never be queued; at the longest sleep its times are taken as they
    are, gaps included.
    """

    QUEUED = 8  # calls; a GPU's queue holds about 1000 kernels
    LONGEST_SLEEP = 2**26  # cycles, some 40 ms

    def __init__(self) -> None:
        self.cycles = 2**19

    def times(self, calls: Sequence[Call]) -> tuple[list[float], list[float]]:
        """Microseconds of each call on the GPU, and of launching the calls from Python; none after a short sleep."""
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
