"""What the compiled kernels need on each GPU generation, without a GPU: registers, spills, shared memory, padding.

    python bench/resources.py                          every production shape on every target
    python bench/resources.py --target 90 --json resources.json

Compiles every kernel ahead of time, as it is launched at the shapes of CLIP ViT-B/16 and ViT-L/14, and reads what
the compiler and the assembler report:

    stack       bytes a thread; above 0 is a spill
    occupancy   share of a multiprocessor's warps that can be resident
    padded      elements of the matrix products computed, tiles being what they are, over those of the definition (two
                products forward, five backward; the second walk of backward, which recomputes two, counts here too)
    matrix      matrix instructions; on Hopper and data-centre Blackwell also how many products of 64 rows or more miss
                the unit for those (wgmma, tcgen05)
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import triton
import triton.language as tl
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


@dataclass(frozen=True)
class Resources:
    """One compiled kernel."""

    kernel: str
    shape: str
    target: int
    dtype: str
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a program
    warps: int
    occupancy: float
    padded: float
    matrix: str  # matrix instructions and how many
    off_unit: int  # products of 64 rows that miss their unit


# ---------------------------------------------------------------------------------------- what is compiled


def cases(target: int) -> Iterator[Case]:
    """Every kernel at every production shape, parameters in float32 beside 16-bit activations as under autocast."""
    common = dict(PRECISION="ieee", ACC=tl.float32)
    wide = dict.fromkeys(
        ("p_prefix_key", "p_prefix_value", "p_prefix_scale", "p_lse", "p_dprefix_key", "p_dprefix_value", "p_dscale"),
        "fp32",
    ) | dict(p_cu_seqlens="i32")
    for (name, call), prefix, scale_target in product(ATTENTION.items(), PREFIXES, ("weights", "logits")):
        if scale_target == "logits" and prefix != 10:  # as good as the same code
            continue
        constants = dict(
            D=HEAD_WIDTH, CAUSAL=call.causal, PACKED=call.packed, SCALE_LOGITS=scale_target == "logits", **common
        )
        needs = dict.fromkeys(("NEED_QKV", "NEED_KEY", "NEED_VALUE", "NEED_SCALE"), True)
        shape = f"{name}, P {prefix}{', λ on logits' if scale_target == 'logits' else ''}"
        for mode, kernel, extra in (
            ("forward", attention.forward_kernel, {}),
            ("backward", attention.backward_kernel, needs),
        ):
            chosen = tiles.choose(f"attention_{mode}", HEAD_WIDTH, 2, target)
            last = last_tiles(call.length, prefix, call.packed, chosen["BLOCK_M"], chosen["BLOCK_N"])
            yield Case(
                f"attention {mode}",
                shape,
                kernel,
                constants | extra | last,
                chosen,
                wide,
                attention_products(mode, call, prefix, chosen | last) / attention_needed(mode, call, prefix),
            )

    wide = dict.fromkeys(
        (
            "p_weight",
            "p_bias",
            "p_down_weight",
            "p_down_bias",
            "p_up_weight",
            "p_up_bias",
            "p_scale",
            "p_norm_weight",
            "p_norm_bias",
            "p_down_norm",
            "p_down_shift",
            "p_mean",
            "p_rstd",
            "p_dup",
            "p_dcolumn",
            "p_ddown",
            "p_ddown_bias",
            "p_dweight",
        ),
        "fp32",
    )
    for width, hidden in ADAPTERS:
        rows, columns = (tiles.choose(kernel, hidden, 2, target) for kernel in ("adapter_rows", "adapter_parameters"))
        padded = rows["BLOCK_R"] / hidden  # the width is a multiple of every block
        for residual, own_norm in product((False, True), (False, True)):
            shape = f"{width} → {hidden}{', residual' if residual else ''}{', own norm' if own_norm else ''}"
            yield Case(
                "adapter forward",
                shape,
                adapter.forward_kernel,
                dict(EPS=1e-5, HAS_RESIDUAL=residual, OWN_NORM=own_norm, **common),
                rows,
                wide,
                padded,
            )
            if residual and own_norm:  # whose stream has a gradient in any case
                continue
            yield Case(
                "adapter input gradient",
                shape,
                adapter.input_gradient_kernel,
                dict(NEED_DX=True, HAS_DSTREAM=residual or own_norm, OWN_NORM=own_norm, **common),
                rows,
                wide,
                padded,
            )
        for own_norm in (False, True):
            yield Case(
                "adapter parameter gradient",
                f"{width} → {hidden}{', own norm' if own_norm else ''}",
                adapter.parameter_gradient_kernel,
                dict(NEED_UP=True, NEED_COLUMN=True, NEED_DOWN=True, NEED_WEIGHT=False, OWN_NORM=own_norm, **common),
                columns,
                wide,
                padded,
            )
    for width, (mode, kernel) in product(
        ACTIVATIONS, (("forward", quick_gelu.forward_kernel), ("backward", quick_gelu.backward_kernel))
    ):
        yield Case(
            f"QuickGELU {mode}",
            str(width),
            kernel,
            dict(HAS_BIAS=True, ACC=tl.float32),
            BLOCKS,
            dict(p_bias="fp32"),
            1.0,
        )


def attention_needed(mode: str, call: Attention, prefix: int) -> float:
    """Elements of the products that the definition asks for, per head and unit of its width."""
    visible = call.length * (call.length + 1) / 2 if call.causal else call.length**2
    return (visible + call.length * prefix) * {"forward": 2, "backward": 5}[mode]


def attention_products(mode: str, call: Attention, prefix: int, chosen: dict) -> float:
    """The same as the kernels cut it: tiles of rows and columns, and which of them meet."""

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


# ---------------------------------------------------------------------------------------- what came out


def compile_case(case: Case, target: int, dtype: str) -> Resources:
    constants = case.constants | case.tiles
    options = {key: constants.pop(key) for key in LAUNCH_OPTIONS if key in constants}
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(position,)] = constants[name]
            continue
        signature[name] = "*" + case.pointers.get(name, dtype) if name.startswith("p_") else "i32"
        if name.startswith(("p_", "stride_")) or name in ("C", "R"):  # what PyTorch's tensors have at these shapes
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(case.kernel, signature, values, attributes), target=GPUTarget("cuda", target, 32), options=options
    )
    registers, stack = resource_usage(compiled.asm["cubin"])
    shared, warps = compiled.metadata.shared, options["num_warps"]
    return Resources(
        case.name,
        case.shape,
        target,
        dtype,
        registers,
        stack,
        shared,
        warps,
        occupancy(target, registers, shared, warps),
        case.padded,
        *matrix_instructions(compiled, target),
    )


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
    """Kinds of matrix instructions with their number, and how many products of 64 rows or more do without the unit
    made for them."""
    units = [BIG_UNIT[target]] if target in BIG_UNIT else []
    counts = {name: compiled.asm["ptx"].count(code) for name, code in (*units, ("mma", "mma.sync"))}
    found = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    left = re.findall(r"= tt\.dot .*-> tensor<(\d+)x\d+x\w+,", compiled.asm["ttgir"]) if units else []
    return found, sum(int(rows) >= 64 for rows in left)


# ---------------------------------------------------------------------------------------- the command


def compile_numbered(job: tuple[int, int, str]) -> Resources:
    target, position, dtype = job
    return compile_case(list(cases(target))[position], target, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, choices=TARGETS, help="one target instead of all")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype instead of both")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set; kernels are compiled here, so unset it")

    try:
        tiles.load_named_in_environment()
    except tiles.TilesError as error:
        parser.error(str(error))

    print(f"Triton {triton.__version__}")
    print(
        f"{'kernel':<28}{'shape':<34}{'target':>7}{'dtype':>6}{'regs':>6}{'stack':>7}{'shared':>8}{'occupancy':>11}"
        f"{'padded':>8}   matrix instructions"
    )
    jobs = [
        (target, position, dtype)
        for target in ([arguments.target] if arguments.target else TARGETS)
        for position, _ in enumerate(cases(target))
        for dtype in ([arguments.dtype] if arguments.dtype else DTYPES)
    ]
    rows = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_numbered, jobs):
            rows.append(row)
            missed = f", {row.off_unit} products of 64 rows elsewhere" if row.off_unit else ""
            print(
                f"{row.kernel:<28}{row.shape:<34}{'sm_' + str(row.target):>7}{row.dtype:>6}{row.registers:>6}"
                f"{row.stack:>7}{row.shared / 1024:>5.0f} KB{row.occupancy:>11.0%}{row.padded:>7.2f}×   "
                f"{row.matrix}{missed}",
                flush=True,
            )
    spilled, missed = sum(row.stack > 0 for row in rows), sum(row.off_unit > 0 for row in rows)
    print(f"\n{len(rows)} kernels compiled, {spilled} spill, {missed} keep a product of 64 rows off wgmma or tcgen05")
    if arguments.json:
        result = dict(triton=triton.__version__, rows=[asdict(row) for row in rows])
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
