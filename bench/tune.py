"""Finds the fastest tiles of every kernel on the GPU at hand, at the shapes of CLIP, and saves them.

    python bench/tune.py tiles.json
    UPPERSON_TILES=tiles.json python train.py …

The shipped tiles (kernels/upperson_kernels/tiles.py) were chosen without measuring. Each alternative must give the same
results, up to the order of summation; alternatives that fail to compile or to fit are left out. Only tiles that are
faster than the shipped ones by more than 2 % are saved. Most of the time, tens of minutes for all kernels, goes into
compiling.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from harness.device import environment
from harness.options import above_zero, at_least, json_path
from harness.output import save_json
from harness.timing import Call, time_in_turns
from torch import Tensor
from torch.utils._pytree import tree_leaves
from upperson_kernels import tiles
from upperson_kernels.adapter import launch as adapter
from upperson_kernels.attention import launch as attention
from upperson_kernels.attention.choose import is_resident
from upperson_kernels.backend import capability

from upperson.errors import exit_status

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PREFIX = 10
CAPTION = 26  # tokens of a usual caption
ADAPTERS = {64: (CAPTION, 512), 96: (193, 768), 128: (244, 1024)}  # rows of a sample and width, by hidden width
WORTH = 0.98  # of the shipped tiles' time

Workload = Callable[[], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Job:
    """A kernel, and the calls whose time together decides about its tiles."""

    kernel: str
    width: int  # of a head, or the adapter's hidden width
    workloads: list[Workload]


def jobs(batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    """Attention of packed captions, of images too where no other kernel takes them (choose.py), then every adapter."""
    pairs = [attention_calls(batch, CAPTION, 8, True, True, dtype, device)]
    here = capability(torch.empty(0, device=device))
    if not is_resident(193, PREFIX, 64, dtype.itemsize, here, causal=False, packed=False):
        pairs.append(attention_calls(batch, 193, 12, False, False, dtype, device))
    for kernel, workloads in zip(("attention_forward", "attention_backward"), zip(*pairs, strict=True), strict=True):
        yield Job(kernel, 64, list(workloads))
    for hidden, (length, width) in ADAPTERS.items():
        yield from adapter_jobs(hidden, batch * length, width, dtype, device)


def attention_calls(
    batch: int, length: int, heads: int, causal: bool, packed: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Workload, Workload]:
    """The forward and the backward call."""
    shape = (batch * length,) if packed else (batch, length)
    qkv = torch.randn(*shape, 3, heads, 64, device=device, dtype=dtype)
    offsets = length * torch.arange(batch + 1, device=device, dtype=torch.int32) if packed else None
    key, value = torch.randn(2, PREFIX, heads, 64, device=device)
    prefix = attention.Prefix(key, value, torch.tensor(10.0, device=device))
    inputs, options = (qkv, prefix, attention.Packing(offsets, length)), (causal, "weights")
    out, lse = attention.forward(*inputs, *options)
    needs = attention.Needs(qkv=True, key=True, value=True, scale=True)
    backward = partial(attention.backward, torch.randn_like(out), *inputs, out, lse, *options, needs)
    return partial(attention.forward, *inputs, *options), backward


def adapter_jobs(hidden: int, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    """The kernel of rows and that of parameter gradients; with and without a residual and a LayerNorm of its own."""
    x, dy = torch.randn(2, rows, width, device=device, dtype=dtype)
    norm = adapter.Norm(torch.ones(width, device=device), torch.zeros(width, device=device))
    down, up = (torch.randn(*shape, device=device) * width**-0.5 for shape in ((hidden, width), (width, hidden)))
    zeros = torch.zeros(hidden, device=device)
    layers = adapter.Layers(down, zeros, up, norm.bias, torch.tensor(1.0, device=device))
    *_, saved = adapter.forward(x, None, norm, layers, None, 1e-5)

    def forward(residual: Tensor | None, own_norm: adapter.Norm | None) -> Workload:
        return partial(adapter.forward, x, residual, norm, layers, own_norm, 1e-5)

    def backward(dstream: Tensor | None, own_norm: adapter.Norm | None, wanted: range) -> Workload:
        """The gradients of which the positions in Needs are wanted."""
        needs = adapter.Needs(*(i in wanted for i in range(len(adapter.Needs._fields))))
        return partial(adapter.backward, dy, dstream, x, norm.weight, layers, own_norm, saved, needs)

    x_alone, adapter_alone = range(1), range(3, 8)
    variants = ((None, None), (dy, None), (dy, norm))
    calls = [forward(*variant) for variant in variants] + [backward(*variant, x_alone) for variant in variants]
    yield Job(adapter.rows_kernel(x, rows), hidden, calls)
    calls = [backward(*variant, adapter_alone) for variant in (variants[0], variants[2])]
    yield Job("adapter_parameters", hidden, calls)


def alternatives(kernel: str) -> list[tiles.Tiles]:
    """The tiles that are tried beside the shipped ones."""
    first, second = tiles.FIELDS[kernel][:2]
    rows = (16, 32, 64, 128) if kernel in ("adapter_parameters", "adapter_few_rows") else (32, 64, 128)
    return [
        {first: m, second: n, "num_warps": warps, "num_stages": stages}
        for m, n, warps, stages in itertools.product(rows, (32, 64, 128), (4, 8), (2, 3))
    ]


def tune(job: Job, choices: list[tiles.Tiles], element_size: int, device: torch.device, seconds: float) -> list[dict]:
    """Times the shipped tiles and the correct choices, each for about `seconds`; the fastest first.

    Returns rows of tiles, microseconds of all workloads together, and whether these tiles ship.
    """
    target = capability(torch.empty(0, device=device))
    key = (job.kernel, job.width, element_size, target)
    tiles.loaded.pop(key, None)
    expected = [workload() for workload in job.workloads]
    shipped = tiles.SHIPPED[job.kernel](job.width, element_size, target)
    rows = []
    for choice in [shipped, *choices]:
        tiles.loaded[key] = choice
        try:
            if all(map(same, (workload() for workload in job.workloads), expected)):
                calls = {i: [Call(lambda _, w=workload: w())] for i, workload in enumerate(job.workloads)}
                microseconds = sum(timing.median for timing in time_in_turns(calls, device, seconds).values())
                rows.append(dict(tiles=choice, microseconds=microseconds, ships=choice is shipped))
        except Exception as error:  # out of shared memory, most often
            if choice is shipped:
                raise
            print(f"    {choice}: {str(error).splitlines()[0][:70]}")
        finally:
            tiles.loaded.pop(key)
    return sorted(rows, key=lambda row: row["microseconds"])


def same(values: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Equal up to the order of summation, relative to the size of the whole tensor."""

    def close(a: Tensor, b: Tensor) -> bool:
        if a.dtype.itemsize == 2:
            return float((a.double() - b.double()).norm()) <= 4 * torch.finfo(a.dtype).eps * float(b.double().norm())
        return torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))

    pairs = zip(tree_leaves(values), tree_leaves(expected), strict=True)
    return all(close(a, b) for a, b in pairs if b is not None and b.numel())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("file", type=json_path, help="where the tiles go (JSON)")
    option("--batch", type=at_least(1), default=128, metavar="N", help="samples (default: 128)")
    option("--dtype", choices=DTYPES, default="bf16", help="of the activations (default: bf16)")
    option("--kernel", choices=tiles.FIELDS, help="one kernel instead of all")
    option("--seconds", type=above_zero, default=0.2, metavar="S", help="for each choice (default: 0.2)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: tuning times kernels on a GPU, and there is none; the shipped tiles hold", file=sys.stderr)
        return 1

    device = torch.device("cuda")
    torch.manual_seed(0)
    dtype = DTYPES[arguments.dtype]
    entries: list[dict] = []
    for job in jobs(arguments.batch, dtype, device):
        if arguments.kernel not in (None, job.kernel):
            continue
        print(f"{job.kernel}, width {job.width}")
        rows = tune(job, alternatives(job.kernel), dtype.itemsize, device, arguments.seconds)
        shipped = next(row["microseconds"] for row in rows if row["ships"])
        for row in rows[:5]:
            print(f"  {row['microseconds']:>8,.1f} µs  {row['tiles']}{'  (ships)' if row['ships'] else ''}")
        print(f"  {shipped:>8,.1f} µs  as shipped")
        if rows[0]["microseconds"] < WORTH * shipped:
            target = capability(torch.empty(0, device=device))
            entry = dict(kernel=job.kernel, width=job.width, element_size=dtype.itemsize, capability=target)
            entries.append(entry | rows[0]["tiles"])
        save(arguments.file, entries, device)
    print(f"{len(entries)} faster than the shipped ones, written to {arguments.file}")
    return 0


def save(path: Path, entries: list[dict], device: torch.device) -> None:
    save_json(path, dict(environment=environment(device), tiles=entries))


if __name__ == "__main__":
    sys.exit(exit_status(main))
