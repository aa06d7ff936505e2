"""What the compiled kernels need on each GPU generation, without a GPU: registers, spills, shared memory, padding.

    python bench/resources.py                          every production shape on every target
    python bench/resources.py --target 90 --json resources.json

Compiles every kernel ahead of time, as it is launched at the shapes of CLIP ViT-B/16 and ViT-L/14, and reads what
the compiler and the assembler report:

    registers   of a thread
    stack       bytes a thread; above 0 is a spill
    shared      bytes of shared memory a program
    occupancy   share of a multiprocessor's warps that can be resident
    padded      elements of the matrix products that the tiles compute, over those of the definition (two products
                forward, five backward; the second pass of backward recomputes two, which count here too)
    matrix      matrix instructions and how many
    off_unit    on Hopper and data-centre Blackwell: products of 64 rows or more that miss the unit for those (wgmma,
                tcgen05)
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from harness.options import json_path
from harness.output import save_json, table
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from upperson_kernels import tiles
from upperson_kernels.adapter import device as adapter
from upperson_kernels.attention import device as attention
from upperson_kernels.attention.launch import last_tiles
from upperson_kernels.quick_gelu import device as quick_gelu
from upperson_kernels.quick_gelu.launch import BLOCKS

TARGETS = (80, 89, 90, 100)  # A100, RTX 40, H100 and H200, B200
DTYPES = ("fp16", "bf16")
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # KB that one program may have
REGISTERS = 65536  # on one multiprocessor
WARPS = {80: 64, 89: 48, 90: 64, 100: 64}  # that one multiprocessor holds at most
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
BIG_UNIT = {90: ("wgmma", "wgmma.mma_async"), 100: ("tcgen05", "tcgen05.mma")}  # takes 64 rows or more


@dataclass(frozen=True)
class Attention:
    """One attention call of CLIP, heads of 64. Padding is counted for sequences of `length` tokens."""

    length: int
    causal: bool
    packed: bool = False


ATTENTION = {
    "image": Attention(193, False),
    "image L/14": Attention(244, False),
    "text": Attention(77, True),
    "text, short": Attention(28, True),  # a batch cut to its longest caption
    "text, packed": Attention(26, True, packed=True),  # a usual caption
}
HEAD_WIDTH = 64
PREFIXES = (2, 10, 14)
ADAPTERS = ((512, 64), (768, 96), (1024, 128))  # width, hidden width
ACTIVATIONS = (2048, 3072, 4096)  # width of the MLP


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: its constants, launch options, and the dtypes of pointers that are not the input's."""

    name: str
    shape: str
    kernel: triton.JITFunction
    constants: dict
    tiles: dict
    pointers: dict[str, str]
    padded: float


COMMON = dict(PRECISION="ieee", ACC=tl.float32)
# Pointers to float32 (parameters, their gradients, statistics); the others point to 16-bit activations, as under
# autocast.
ATTENTION_FP32 = "prefix_key prefix_value prefix_scale lse dprefix_key dprefix_value dscale"
ADAPTER_FP32 = (
    "weight bias down_weight down_bias up_weight up_bias scale norm_weight norm_bias down_norm down_shift mean rstd "
    "dup dcolumn ddown ddown_bias dweight"
)


def cases(target: int) -> Iterator[Case]:
    """Every kernel at every production shape."""
    yield from attention_cases(target)
    for width, hidden in ADAPTERS:
        yield from adapter_cases(target, width, hidden)
    kernels = {"forward": quick_gelu.forward_kernel, "backward": quick_gelu.backward_kernel}
    for width, (mode, kernel) in product(ACTIVATIONS, kernels.items()):
        constants = dict(HAS_BIAS=True, ACC=tl.float32)
        yield Case(f"QuickGELU {mode}", str(width), kernel, constants, BLOCKS, fp32("bias"), 1.0)


def fp32(names: str) -> dict[str, str]:
    return {f"p_{name}": "fp32" for name in names.split()}


def attention_cases(target: int) -> Iterator[Case]:
    pointers = fp32(ATTENTION_FP32) | dict(p_cu_seqlens="i32")
    needs = dict.fromkeys(("NEED_QKV", "NEED_KEY", "NEED_VALUE", "NEED_SCALE"), True)
    kernels = {"forward": (attention.forward_kernel, {}), "backward": (attention.backward_kernel, needs)}
    for (name, call), prefix, on_logits in product(ATTENTION.items(), PREFIXES, (False, True)):
        if on_logits and prefix != 10:  # almost the same code
            continue
        shape = f"{name}, P {prefix}{', λ on logits' if on_logits else ''}"
        flags = dict(D=HEAD_WIDTH, CAUSAL=call.causal, PACKED=call.packed, SCALE_LOGITS=on_logits, **COMMON)
        for mode, (kernel, extra) in kernels.items():
            chosen = tiles.choose(f"attention_{mode}", HEAD_WIDTH, 2, target)
            last = last_tiles(call.length, prefix, call.packed, chosen["BLOCK_M"], chosen["BLOCK_N"])
            padded = attention_products(mode, call, prefix, chosen | last) / attention_needed(mode, call, prefix)
            yield Case(f"attention {mode}", shape, kernel, flags | extra | last, chosen, pointers, padded)


def adapter_cases(target: int, width: int, hidden: int) -> Iterator[Case]:
    rows, columns = (tiles.choose(kernel, hidden, 2, target) for kernel in ("adapter_rows", "adapter_parameters"))
    padded = rows["BLOCK_R"] / hidden  # the width is a multiple of every block

    def case(name: str, kernel: triton.JITFunction, chosen: dict, residual: bool, own_norm: bool, **flags) -> Case:
        shape = f"{width} → {hidden}{', residual' if residual else ''}{', own norm' if own_norm else ''}"
        constants = dict(OWN_NORM=own_norm, **flags, **COMMON)
        return Case(f"adapter {name}", shape, kernel, constants, chosen, fp32(ADAPTER_FP32), padded)

    for residual, own_norm in product((False, True), (False, True)):
        variant = (rows, residual, own_norm)
        yield case("forward", adapter.forward_kernel, *variant, EPS=1e-5, HAS_RESIDUAL=residual)
        if not (residual and own_norm):  # the same as own_norm alone, whose stream has a gradient in any case
            flags = dict(NEED_DX=True, HAS_DSTREAM=residual or own_norm)
            yield case("input gradient", adapter.input_gradient_kernel, *variant, **flags)
    for own_norm in (False, True):
        flags = dict(NEED_UP=True, NEED_COLUMN=True, NEED_DOWN=True, NEED_WEIGHT=False)
        yield case("parameter gradient", adapter.parameter_gradient_kernel, columns, False, own_norm, **flags)


def attention_needed(mode: str, call: Attention, prefix: int) -> float:
    """Elements of the definition's products, per head and unit of its width."""
    visible = call.length * (call.length + 1) / 2 if call.causal else call.length**2
    return (visible + call.length * prefix) * {"forward": 2, "backward": 5}[mode]


def attention_products(mode: str, call: Attention, prefix: int, chosen: dict) -> float:
    """Elements of the kernels' products: all pairs of a tile of rows and a tile of columns that are multiplied."""

    def cut(count: int, block: int, last: int) -> list[tuple[int, int]]:
        return [(start, last if start + block >= count else block) for start in range(0, count, block)]

    block_m, block_n, last_m = chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["LAST_M"]
    columns = cut(call.length + prefix, block_n, chosen["LAST_N"])
    plain = min(call.length // block_n, (call.length + prefix - 1) // block_n) * block_n
    by_rows = sum(
        m * n
        for start_m, m in cut(call.length, block_m, last_m)
        for start_n, n in columns
        if not (call.causal and start_m + m <= start_n < plain)
    )
    if mode == "forward":
        return 2 * by_rows
    by_columns = 0
    for start_n, n in columns:
        step = block_m if start_n < plain and not call.causal else block_m // 2
        begin = start_n // step * step if start_n < plain and call.causal else 0
        by_columns += sum(n * m for start_m, m in cut(call.length, step, min(last_m, step)) if start_m >= begin)
    return 3 * by_rows + 4 * by_columns


def compile_case(case: Case, target: int, dtype: str) -> dict[str, Any]:
    """A row of the results, whose columns the module's docstring explains."""
    constants = case.constants | case.tiles
    options = {key: constants.pop(key) for key in LAUNCH_OPTIONS if key in constants}
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(position,)] = constants[name]
            continue
        signature[name] = "*" + case.pointers.get(name, dtype) if name.startswith("p_") else "i32"
        if name.startswith(("p_", "stride_")) or name in ("C", "R"):  # multiples of 16 at these shapes
            attributes[(position,)] = [["tt.divisibility", 16]]
    source, gpu = ASTSource(case.kernel, signature, values, attributes), GPUTarget("cuda", target, 32)
    compiled = triton.compile(source, target=gpu, options=options)
    registers, stack = resource_usage(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, options["num_warps"]
    matrix, off_unit = matrix_instructions(compiled, target)
    row = dict(kernel=case.name, shape=case.shape, target=target, dtype=dtype, registers=registers, stack=stack)
    row |= dict(shared=shared, warps=warps, occupancy=occupancy(target, registers, shared, warps))
    return row | dict(padded=case.padded, matrix=matrix, off_unit=off_unit)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as Triton's own cuobjdump reads them from the compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout + run.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources: {run.stdout + run.stderr}")
    return int(found[1]), int(found[2])


def occupancy(target: int, registers: int, shared: int, warps: int) -> float:
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)  # handed out in eights
    by_shared = (SHARED_MEMORY[target] + 1) * 1024 // (shared + 1024)  # the system takes 1 KB of each program's
    return min(by_registers, by_shared, WARPS[target] // warps) * warps / WARPS[target]


def matrix_instructions(compiled: triton.compiler.CompiledKernel, target: int) -> tuple[str, int]:
    """Kinds of matrix instructions with their number, and how many products of 64 rows or more miss the large unit."""
    units = [BIG_UNIT[target]] if target in BIG_UNIT else []
    counts = {name: compiled.asm["ptx"].count(code) for name, code in (*units, ("mma", "mma.sync"))}
    found = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    left = re.findall(r"= tt\.dot .*-> tensor<(\d+)x\d+x\w+,", compiled.asm["ttgir"]) if units else []
    return found, sum(int(rows) >= 64 for rows in left)


def compile_numbered(job: tuple[int, int, str]) -> dict[str, Any]:
    target, position, dtype = job
    return compile_case(list(cases(target))[position], target, dtype)


def most(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most that each kernel takes at any shape."""
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        of_kernel = [row for row in rows if row["kernel"] == kernel]
        keys = ("registers", "stack", "shared")
        lines.append({"at most": kernel} | {key: max(row[key] for row in of_kernel) for key in keys})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, choices=TARGETS, help="one target instead of all")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype instead of both")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set; kernels are compiled here, so unset it")
    try:
        tiles.load_named_in_environment()
    except tiles.TilesError as error:
        parser.error(str(error))

    jobs = [
        (target, position, dtype)
        for target in ([arguments.target] if arguments.target else TARGETS)
        for position, _ in enumerate(cases(target))
        for dtype in ([arguments.dtype] if arguments.dtype else DTYPES)
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        compiled = pool.map(compile_numbered, jobs)
        rows = list(tqdm(compiled, "compiling", len(jobs), unit="kernel", leave=False, disable=None))
    print(table(rows, left=("shape", "matrix")))
    spilled, missed = sum(row["stack"] > 0 for row in rows), sum(row["off_unit"] > 0 for row in rows)
    text = (
        f"{len(rows)} kernels compiled by Triton {triton.__version__}; {spilled} spill, {missed} keep a product of 64 "
        f"rows off wgmma or tcgen05.\n\n{table(most(rows), 'pipe')}\n"
    )
    print(f"\n{text}")
    if arguments.json:
        save_json(arguments.json, dict(triton=triton.__version__, rows=rows, text=text))


if __name__ == "__main__":
    main()
