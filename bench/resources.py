"""What the compiled kernels need on each GPU generation, counted without a GPU.

    python bench/resources.py                          every production call on every target
    python bench/resources.py --target 90 --json resources.json
    python bench/resources.py --every-length           attention at every length that its resident kernels take instead

Each operator is called at the shapes of CLIP ViT-B/16 and ViT-L/14 with 128 samples, as training calls it, on a GPU
that is not there (harness/absent_gpu.py): the kernels are those that the project's own launchers choose, compiled for
the very arguments. For each kernel, from its code:

    registers      of a thread
    stack          bytes a thread; above 0 is a spill
    shared         bytes of shared memory a program
    occupancy      share of a multiprocessor's warps that can be resident
    programs       of the launch
    instructions   that all warps of a program execute
    special        exponentials, roots and reciprocals among them
    spills         loads and stores of spilled registers among them
    loads          MB that 16-byte loads of all programs ask the L2 cache for, masked elements too
    warpgroup      matrix instructions in the code for the large units of Hopper (wgmma) and data-centre Blackwell
                   (tcgen05)
    matrix         and for the units of all GPUs

Where programs of a launch differ, as in the kernels for attention of any length, instructions to loads are the mean of
all programs. A loop that waits counts once (harness/sass.py).

For each call, the least time on GPUs whose rates are known: the time to issue these instructions, or the floor, which
is the time for the least bytes or the useful operations. The share of the floor follows. Latencies are not in it: a
measured time is longer.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import triton
from harness import absent_gpu
from harness.absent_gpu import SHARED_MEMORY, Launch
from harness.branches import Branches, adapter_branches, attention_branches
from harness.device import KNOWN_RATES
from harness.options import json_path
from harness.output import save_json, table
from harness.sass import MATRIX, WARPGROUP, Branch, code_of
from torch import Tensor
from tqdm import tqdm
from upperson_kernels import tiles
from upperson_kernels.adapter import launch as adapter
from upperson_kernels.attention import choose
from upperson_kernels.attention import launch as attention
from upperson_kernels.backend import capability
from upperson_kernels.quick_gelu import launch as quick_gelu

from upperson.errors import exit_status

TARGETS = (80, 89, 90, 100)  # A100, RTX 40, H100 and H200, B200
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
WARPS = {80: 64, 89: 48, 90: 64, 100: 64}  # that one multiprocessor holds at most
REGISTERS = 65536  # of a multiprocessor
# Of KNOWN_RATES: the target, and warp instructions a second that its multiprocessors issue, four a cycle each.
ISSUE = {"H100": (90, 0.93e12), "H200": (90, 0.93e12), "B200": (100, 1.09e12), "RTX 4090": (89, 1.29e12)}
LEFT = ("shape", "kernel")
SAMPLES, PREFIX, HEAD_WIDTH = 128, 10, 64
CAPTION = 26  # tokens of a usual caption


@dataclass(frozen=True)
class Call:
    """One call of an operator. `branches`: how often the loops of its kernels are taken."""

    name: str
    shape: str
    run: Callable[[], object]
    branches: Branches
    bytes: float = 0.0  # at least read and written
    flops: float = 0.0  # useful


def calls(dtype: torch.dtype) -> Iterator[Call]:
    """Every operator at every production shape, forward and backward."""
    for name, length, heads, causal, packed in (
        ("image", 193, 12, False, False),
        ("image L/14", 244, 16, False, False),
        ("text", 77, 8, True, False),
        ("text, packed", CAPTION, 8, True, True),
    ):
        yield from attention_calls(name, length, PREFIX, heads, causal, packed, "weights", dtype)
        if not causal:
            yield from attention_calls(f"{name}, λ on logits", length, PREFIX, heads, causal, packed, "logits", dtype)
    for name, rows, width, hidden in (
        ("image", SAMPLES * 193, 768, 96),
        ("text, packed", SAMPLES * CAPTION, 512, 64),
        ("image L/14", SAMPLES * 244, 1024, 128),
    ):
        for residual, own_norm in ((True, False), (False, False), (True, True)):
            shape = f"{name}, {width} → {hidden}{', residual' * residual}{', own norm' * own_norm}"
            yield from adapter_calls(shape, rows, width, hidden, residual, own_norm, dtype)
    for rows, width in ((SAMPLES * 193, 3072), (SAMPLES * CAPTION, 2048), (SAMPLES * 244, 4096)):
        x, bias = torch.empty(rows, width, dtype=dtype), torch.empty(width, dtype=dtype)
        for mode, tensors, run in (
            ("forward", 2, partial(quick_gelu.forward, x, bias)),
            ("backward", 3, partial(quick_gelu.backward, x, x, bias)),
        ):
            yield Call(f"QuickGELU {mode}", str(width), run, {}, tensors * x.nbytes)


def calls_at_every_length(dtype: torch.dtype) -> Iterator[Call]:
    """The resident kernels of attention as they are compiled for every length and prefix that they take.

    Many lengths share their constants, so that one call for each choice of constants compiles all of them.
    """
    capable = capability(torch.empty(0))
    chosen: dict[tuple[Any, ...], tuple[int, int]] = {}
    for prefix in (PREFIX, *range(2, choose.MOST_PREFIX + 1), 0, 1):  # the usual prefix where a choice allows it
        for length, causal in itertools.product(range(choose.MOST_COLUMNS, 0, -1), (False, True)):
            if choose.is_resident(length, prefix, HEAD_WIDTH, 2, capable, causal=causal, packed=False):
                forward = choose.forward_pieces(length, prefix, causal, capable)
                chosen.setdefault(("forward", causal, *forward.values()), (length, prefix))
                if backward := choose.backward_pieces(length, prefix):
                    chosen.setdefault(("backward", causal, *backward.values()), (length, prefix))
    for (mode, causal, *_), (length, prefix) in chosen.items():
        shape = f"{length} + {prefix}{', causal' * causal}"
        for target in ("weights", "logits"):
            of_shape = f"{shape}{', λ on logits' * (target == 'logits')}"
            for call in attention_calls(of_shape, length, prefix, 12, causal, False, target, dtype):
                if call.name == f"attention {mode}":
                    yield call


def attention_calls(
    shape: str, length: int, prefix_length: int, heads: int, causal: bool, packed: bool, target: str, dtype: torch.dtype
) -> Iterator[Call]:
    tokens = SAMPLES * length
    qkv = torch.empty(*((tokens,) if packed else (SAMPLES, length)), 3, heads, HEAD_WIDTH, dtype=dtype)
    key, value = torch.empty(2, prefix_length, heads, HEAD_WIDTH, dtype=dtype)  # as kept weights hand them over
    prefix = attention.Prefix(key, value, torch.tensor(10.0))
    offsets = length * torch.arange(SAMPLES + 1, dtype=torch.int32)
    inputs = (qkv, prefix, attention.Packing(offsets if packed else None, length))
    out, lse = torch.empty_like(qkv.select(-3, 0)), torch.empty(heads, tokens)
    options = (causal, target)
    needs = attention.Needs(qkv=True, key=True, value=True, scale=True)
    visible = (length * (length + 1) / 2 if causal else length**2) + length * prefix_length
    forward = 4 * heads * HEAD_WIDTH * SAMPLES * visible
    shape_of_columns = (length, prefix_length, HEAD_WIDTH, qkv.element_size(), capability(qkv))
    branches = attention_branches(*shape_of_columns, causal, packed, SAMPLES)
    moved = 4 * out.nbytes + lse.nbytes
    yield Call("attention forward", shape, lambda: attention.forward(*inputs, *options), branches, moved, forward)
    backward = partial(attention.backward, torch.empty_like(out), *inputs, out, lse, *options, needs)
    yield Call("attention backward", shape, backward, branches, moved + 4 * out.nbytes, 2.5 * forward)


def adapter_calls(
    shape: str, rows: int, width: int, hidden: int, residual: bool, own_norm: bool, dtype: torch.dtype
) -> Iterator[Call]:
    def parameter(*size: int) -> Tensor:
        return torch.empty(size)

    x = torch.empty(rows, width, dtype=dtype)
    norm = adapter.Norm(parameter(width), parameter(width))
    layers = adapter.Layers(
        torch.empty(hidden, width, dtype=dtype),
        parameter(hidden),
        torch.empty(width, hidden, dtype=dtype),
        parameter(width),
        torch.tensor(1.0),
    )
    saved = adapter.Saved(parameter(rows), parameter(rows), torch.empty(rows, hidden, dtype=dtype))
    own = norm if own_norm else None
    needs = adapter.Needs(True, False, False, True, True, True, True, True, own_norm, own_norm)
    flops, statistics = 4 * rows * width * hidden, 8 * rows
    forward = partial(adapter.forward, x, x if residual else None, norm, layers, own, 1e-5)
    branches = adapter_branches(rows, width, hidden, own_norm, dtype)
    moved = (2 + 2 * residual + own_norm) * x.nbytes + statistics
    yield Call("adapter forward", shape, forward, branches, moved, flops)
    dstream = x if residual or own_norm else None
    backward = partial(adapter.backward, x, dstream, x, norm.weight, layers, own, saved, needs)
    moved = (3 + (residual or own_norm)) * x.nbytes + statistics
    yield Call("adapter backward", shape, backward, branches, moved, 2 * flops)


def measure(job: tuple[int, str, bool]) -> list[dict[str, Any]]:
    """A row for each kernel of each call; the module's docstring explains the columns. For a process of its own."""
    target, dtype, every_length = job
    absent_gpu.install(target)
    rows = []
    for call in (calls_at_every_length if every_length else calls)(DTYPES[dtype]):
        absent_gpu.launches.clear()
        call.run()
        for launch in absent_gpu.launches:
            row = dict(call=call.name, shape=call.shape, target=target, dtype=dtype, floor=[call.bytes, call.flops])
            rows.append(row | figures(launch, target, call.branches.get(launch.name, [])))
    return rows


def figures(launch: Launch, target: int, branches: list[Branch]) -> dict[str, Any]:
    code, programs = code_of(launch.cubin), launch.grid[0] * launch.grid[1]
    registers, stack = code.resources
    counts = code.counts(launch.warps, branches)
    return dict(
        kernel=launch.name,
        registers=registers,
        stack=stack,
        shared=launch.shared,
        warps=launch.warps,
        occupancy=occupancy(target, registers, launch.shared, launch.warps),
        programs=programs,
        instructions=round(counts.instructions),
        special=round(counts.special),
        spills=round(counts.spills),
        loads=counts.loads * programs / 1e6,
        warpgroup=code.products(WARPGROUP),
        matrix=code.products(MATRIX),
        unaligned=launch.unaligned,
    )


def occupancy(target: int, registers: int, shared: int, warps: int) -> float:
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)  # handed out in eights
    by_shared = (SHARED_MEMORY[target] + 1) * 1024 // (shared + 1024)  # the system takes 1 KB of each program's
    return min(by_registers, by_shared, WARPS[target] // warps) * warps / WARPS[target]


def least_times(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The least microseconds of each call, and the share of the floor, by GPU."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for gpu, (target, issued_per_second) in ISSUE.items():
        rates = KNOWN_RATES[gpu]
        by_call: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["target"] == target:
                by_call.setdefault((row["call"], row["shape"], row["dtype"]), []).append(row)
        for (call, shape, dtype), kernels in by_call.items():
            issue = 1e6 * sum(kernel["instructions"] * kernel["programs"] for kernel in kernels) / issued_per_second
            floor = rates.floor(*kernels[0]["floor"])
            line = found.setdefault((call, shape), {"call": call, "shape": shape})
            line[f"{gpu}, {dtype}"] = f"{max(issue, floor):,.0f} µs ({floor / max(issue, floor):.0%})"
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, choices=TARGETS, help="one target instead of all")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype instead of both")
    note = "attention at every length that its resident kernels take, on the targets that have them"
    parser.add_argument("--every-length", action="store_true", help=note)
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set; kernels are compiled here, so unset it")
    try:
        tiles.load_named_in_environment()
    except tiles.TilesError as error:
        parser.error(str(error))

    targets = [arguments.target] if arguments.target else TARGETS
    if arguments.every_length:
        targets = [
            target for target in targets if choose.is_resident(1, 0, HEAD_WIDTH, 2, target, causal=False, packed=False)
        ]
        if not targets:
            parser.error(f"--every-length: no resident kernels on target {arguments.target}")
    jobs = [
        (target, dtype, arguments.every_length)
        for target in targets
        for dtype in ([arguments.dtype] if arguments.dtype else DTYPES)
    ]
    with get_context("spawn").Pool(maxtasksperchild=1) as pool:  # a process for each, as it changes Triton for good
        found = tqdm(pool.imap(measure, jobs), "compiling", len(jobs), unit="target", leave=False, disable=None)
        rows = [row for of_target in found for row in of_target]
    shown = [{name: value for name, value in row.items() if name not in ("floor", "unaligned")} for row in rows]
    print(table(shown, left=LEFT))
    spilled = sum(row["stack"] > 0 for row in rows)
    text = f"{len(rows)} launches compiled by Triton {triton.__version__}; {spilled} spill.\n\n"
    if least := least_times(rows):
        text += f"{table(least, 'pipe', left=LEFT)}\n"
    print(f"\n{text}")
    if arguments.json:
        save_json(arguments.json, dict(triton=triton.__version__, rows=rows, text=text))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
