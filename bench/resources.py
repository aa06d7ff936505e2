"""What the compiled kernels need on each GPU generation, without a GPU: registers, spills, shared memory.

    python bench/resources.py                          every production shape on every target
    python bench/resources.py --target 90 --json resources.json

Compiles every kernel ahead of time, as it is launched at the shapes of CLIP ViT-B/16 and ViT-L/14, and reads what
the assembler reports. A stack above 0 is a spill.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.adapter import device as adapter
from kernels.attention import device as attention

TARGETS = (80, 89, 90, 100)                                             # A100, RTX 40, H100 and H200, B200
DTYPES = ("fp16", "bf16")
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}                    # KB that one program may have
REGISTERS = 65536                                                       # on one multiprocessor
WARPS = {80: 64, 89: 48, 90: 64, 100: 64}                               # that one multiprocessor holds at most
ATTENTION = {"image": False, "text": True}                              # causal; heads of 64, any number of tokens
PREFIXES = (2, 10, 14)
ADAPTERS = ((512, 64), (768, 96), (1024, 128))                          # width, hidden width
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Resources:
    """One compiled kernel."""

    kernel: str
    shape: str
    target: int
    dtype: str
    registers: int
    stack: int                                                          # bytes a thread; above 0 it spills
    shared: int                                                         # bytes a program
    warps: int
    matrix: str                                                         # matrix instructions and how many

    @property
    def occupancy(self) -> float:
        """Share of the warps of a multiprocessor that can be resident."""
        by_registers = REGISTERS // (max(self.registers, 1) * 32 * self.warps)
        by_shared = (SHARED_MEMORY[self.target] + 1) * 1024 // max(self.shared + 1024, 1)
        return min(by_registers, by_shared, WARPS[self.target] // self.warps) * self.warps / WARPS[self.target]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape: its constants, launch options, and the dtypes of pointers that are not the input's."""

    name: str
    shape: str
    kernel: triton.JITFunction
    constants: dict
    tiles: dict
    pointers: dict[str, str]


def cases(target: int) -> Iterator[Case]:
    """Every kernel at every production shape, parameters in float32 beside 16-bit activations as under autocast."""
    common = dict(PRECISION="ieee", ACC=tl.float32)
    wide = dict.fromkeys(("p_prefix_key", "p_prefix_value", "p_prefix_scale", "p_lse", "p_dprefix_key",
                          "p_dprefix_value", "p_dscale"), "fp32")
    for name, causal in ATTENTION.items():
        for prefix in PREFIXES:
            for target_name in ("weights", "logits"):
                shape = f"{name}, P {prefix}, λ on {target_name}"
                constants = dict(P=prefix, D=HEAD_WIDTH, CAUSAL=causal, SCALE_LOGITS=target_name == "logits", **common)
                needs = dict(NEED_QKV=True, NEED_KEY=True, NEED_VALUE=True, NEED_SCALE=True)
                yield Case("attention forward", shape, attention.forward_kernel, constants,
                           attention.forward_tiles(HEAD_WIDTH, 2), wide)
                yield Case("attention backward", shape, attention.backward_kernel, constants | needs,
                           attention.backward_tiles(HEAD_WIDTH, 2, target), wide)

    wide = dict.fromkeys(("p_weight", "p_bias", "p_down_weight", "p_down_bias", "p_up_weight", "p_up_bias", "p_scale",
                          "p_mean", "p_rstd", "p_dup", "p_dcolumn", "p_ddown", "p_ddown_bias", "p_dweight"), "fp32")
    for width, hidden in ADAPTERS:
        rows, columns = adapter.row_tiles(hidden, 2), adapter.parameter_tiles(hidden, 2, target)
        for residual in (False, True):
            shape = f"{width} → {hidden}{', residual' if residual else ''}"
            yield Case("adapter forward", shape, adapter.forward_kernel,
                       dict(EPS=1e-5, HAS_RESIDUAL=residual, **common), rows, wide)
            yield Case("adapter input gradient", shape, adapter.input_gradient_kernel,
                       dict(NEED_DX=True, HAS_DTOTAL=residual, **common), rows, wide)
        yield Case("adapter parameter gradient", f"{width} → {hidden}", adapter.parameter_gradient_kernel,
                   dict(NEED_UP=True, NEED_COLUMN=True, NEED_DOWN=True, NEED_WEIGHT=False, **common), columns, wide)


def compile_case(case: Case, target: int, dtype: str) -> Resources:
    tiles = dict(case.tiles)
    options = {key: tiles.pop(key) for key in ("num_warps", "num_stages")}
    constants = case.constants | tiles
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(position,)] = constants[name]
            continue
        signature[name] = "*" + case.pointers.get(name, dtype) if name.startswith("p_") else "i32"
        if name.startswith(("p_", "stride_")) or name in ("C", "R"):    # what PyTorch's tensors have at these shapes
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(case.kernel, signature, values, attributes),
                              target=GPUTarget("cuda", target, 32), options=options)
    registers, stack = resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    counts = {name: ptx.count(code) for name, code in
              (("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync"))}
    matrix = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return Resources(case.name, case.shape, target, dtype, registers, stack, compiled.metadata.shared,
                     options["num_warps"], matrix)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, choices=TARGETS, help="one target instead of all")
    parser.add_argument("--dtype", choices=DTYPES, help="one dtype instead of both")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set; kernels are compiled here, so unset it")

    print(f"Triton {triton.__version__}")
    print(f"{'kernel':<28}{'shape':<30}{'target':>8}{'dtype':>7}{'regs':>6}{'stack':>7}{'shared':>9}{'occupancy':>11}"
          "   matrix instructions")
    rows = []
    for target in [arguments.target] if arguments.target else TARGETS:
        for case in cases(target):
            for dtype in [arguments.dtype] if arguments.dtype else DTYPES:
                row = compile_case(case, target, dtype)
                rows.append(row)
                print(f"{row.kernel:<28}{row.shape:<30}{'sm_' + str(target):>8}{dtype:>7}{row.registers:>6}"
                      f"{row.stack:>7}{row.shared / 1024:>6.0f} KB{row.occupancy:>11.0%}   {row.matrix}", flush=True)
    spilled = [row for row in rows if row.stack]
    print(f"\n{len(rows)} kernels compiled, {len(spilled)} spill")
    if arguments.json:
        result = dict(triton=triton.__version__, rows=[asdict(row) for row in rows])
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
