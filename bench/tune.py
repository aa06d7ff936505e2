"""Finds the fastest tiles of every kernel on the GPU at hand, at the shapes of CLIP, and saves them.

    python bench/tune.py tiles.json
    UPPERSON_TILES=tiles.json python train.py …

What ships (kernels/tiles.py) was chosen without measuring. Each alternative must give the same results as that, up
to the order of summation; those that fail to compile or to fit are left out. Only what is faster than the shipped tiles
by more than 2 % is saved. Most of the time, tens of minutes for all kernels, goes into compiling.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from comparison import above_zero, at_least_one, json_path
from measure import Call, environment, time_in_turns
from torch import Tensor
from upperson_kernels import tiles
from upperson_kernels.adapter import launch as adapter
from upperson_kernels.attention import launch as attention
from upperson_kernels.backend import capability

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PREFIX = 10
ADAPTERS = {64: (77, 512), 96: (193, 768), 128: (244, 1024)}  # rows of a sample and width, by hidden width
WORTH = 0.98  # of the shipped tiles' time

Workload = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Job:
    """A kernel whose tiles are chosen, and the calls whose time together decides."""

    kernel: str
    width: int  # of a head, or the adapter's hidden width
    workloads: list[Workload]


def jobs(batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    attend, attend_back = [], []
    for length, heads, causal in ((193, 12, False), (77, 8, True)):  # both towers of ViT-B/16
        qkv, grad = randn(batch, length, 3, heads, 64), randn(batch, length, heads, 64)
        key, value = randn(2, PREFIX, heads, 64, dtype=torch.float32)
        prefix = attention.Prefix(key, value, torch.tensor(10.0, device=device))
        inputs, options = (qkv, prefix, attention.Packing(None, 0)), (causal, "weights")
        out, lse = attention.forward(*inputs, *options)
        attend.append(partial(attention.forward, *inputs, *options))
        needs = attention.Needs(qkv=True, key=True, value=True, scale=True)
        attend_back.append(partial(attention.backward, grad, *inputs, out, lse, *options, needs))
    yield Job("attention_forward", 64, attend)
    yield Job("attention_backward", 64, attend_back)

    for hidden, (length, width) in ADAPTERS.items():
        x, dy = randn(batch * length, width), randn(batch * length, width)
        norm = adapter.Norm(torch.ones(width, device=device), torch.zeros(width, device=device))
        down, up = (randn(*shape, dtype=torch.float32) * width**-0.5 for shape in ((hidden, width), (width, hidden)))
        layers = adapter.Layers(
            down, torch.zeros(hidden, device=device), up, norm.bias, torch.tensor(1.0, device=device)
        )
        *_, saved = adapter.forward(x, None, norm, layers, None, 1e-5)
        forward = partial(forward_of, x, norm, layers)
        backward = partial(backward_of, dy, x, norm.weight, layers, saved)
        none, x_alone, adapter_alone = None, range(1), range(3, 8)
        yield Job(
            "adapter_rows",
            hidden,
            [
                forward(None, none),
                forward(dy, none),
                forward(dy, norm),
                backward(None, none, x_alone),
                backward(dy, none, x_alone),
                backward(dy, norm, x_alone),
            ],
        )
        yield Job(
            "adapter_parameters", hidden, [backward(None, none, adapter_alone), backward(dy, norm, adapter_alone)]
        )


def forward_of(
    x: Tensor, norm: adapter.Norm, layers: adapter.Layers, residual: Tensor | None, own_norm: adapter.Norm | None
) -> Workload:
    return partial(adapter.forward, x, residual, norm, layers, own_norm, 1e-5)


def backward_of(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    layers: adapter.Layers,
    saved: adapter.Saved,
    dstream: Tensor | None,
    own_norm: adapter.Norm | None,
    wanted: range,
) -> Workload:
    """The gradients of which the positions in Needs are wanted."""
    needs = adapter.Needs(*(i in wanted for i in range(len(adapter.Needs._fields))))
    return partial(adapter.backward, dy, dstream, x, weight, layers, own_norm, saved, needs)


def alternatives(kernel: str) -> list[tiles.Tiles]:
    """What is tried beside the shipped tiles."""
    first, second = tiles.FIELDS[kernel][:2]
    rows = (16, 32, 64, 128) if kernel == "adapter_parameters" else (32, 64, 128)
    return [
        {first: m, second: n, "num_warps": warps, "num_stages": stages}
        for m, n, warps, stages in itertools.product(rows, (32, 64, 128), (4, 8), (2, 3))
    ]


def tune(job: Job, choices: list[tiles.Tiles], element_size: int, device: torch.device, seconds: float) -> list[dict]:
    """Times the shipped tiles and the choices that are right, each for about `seconds`; the fastest first.

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
                timings = time_in_turns(calls, device, seconds)
                rows.append(
                    dict(tiles=choice, microseconds=sum(t.median for t in timings.values()), ships=choice is shipped)
                )
        except Exception as error:  # out of shared memory, most often
            if choice is shipped:
                raise
            print(f"    {choice}: {str(error).splitlines()[0][:70]}")
        finally:
            tiles.loaded.pop(key)
    return sorted(rows, key=lambda row: row["microseconds"])


def same(values: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Equal up to the order of summation, relative to the size of the whole tensor."""
    return all(
        float((a.double() - b.double()).norm()) <= 4 * torch.finfo(a.dtype).eps * float(b.double().norm())
        if a.dtype.itemsize == 2
        else torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))
        for a, b in zip(values, expected, strict=True)
        if b.numel()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=json_path, help="where the tiles go (JSON)")
    parser.add_argument("--batch", type=at_least_one, default=128, metavar="N", help="samples (default: 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations (default: bf16)")
    parser.add_argument("--kernel", choices=tiles.FIELDS, help="one kernel instead of all")
    parser.add_argument("--seconds", type=above_zero, default=0.2, metavar="S", help="for each choice (default: 0.2)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: tuning times kernels on a GPU, and there is none; the tiles of kernels/tiles.py hold",
            file=sys.stderr,
        )
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
        shipped = next(row for row in rows if row["ships"])
        for row in rows[:5]:
            print(f"  {row['microseconds']:>8,.1f} µs  {row['tiles']}{'  (ships)' if row['ships'] else ''}")
        print(f"  {shipped['microseconds']:>8,.1f} µs  as shipped")
        if rows[0]["microseconds"] < WORTH * shipped["microseconds"]:
            entries.append(
                dict(
                    kernel=job.kernel,
                    width=job.width,
                    element_size=dtype.itemsize,
                    capability=capability(torch.empty(0, device=device)),
                    **rows[0]["tiles"],
                )
            )
        save(arguments.file, entries, device)
    print(f"{len(entries)} faster than what ships, written to {arguments.file}")
    return 0


def save(path: Path, entries: list[dict], device: torch.device) -> None:
    path.write_text(json.dumps(dict(environment=environment(device), tiles=entries), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
