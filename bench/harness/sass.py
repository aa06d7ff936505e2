"""What a compiled kernel is made of: registers, spills, and the instructions that a warp executes.

Triton brings NVIDIA's disassembler along. A loop is a branch back; its instructions count as often as the caller says
that the loop is taken. Both sides of a branch within the code count.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^;]*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
SPIN = 4  # a loop of fewer instructions waits for memory or a barrier
# The beginning of instructions' names.
SPECIAL = ("MUFU",)  # exponentials, roots, reciprocals
WARPGROUP = ("HGMMA", "UTCHMMA")  # products on the large matrix units of Hopper and data-centre Blackwell
MATRIX = ("HMMA",)  # products on the units of all GPUs
LOADS = re.compile(r"LDG(STS)?\..*\b128$")  # of 16 bytes a thread, in which tiles come; others are broadcasts


@dataclass(frozen=True)
class Counts:
    """Of one warp."""

    instructions: int
    special: int
    loads: int  # bytes, by loads of 16 bytes a thread


@functools.cache
def code_of(cubin: bytes) -> "Code":
    """The code of a compiled kernel, disassembled once."""
    return Code(cubin)


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    cubin: bytes

    def tool(self, *command: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(self.cubin)
            return subprocess.run([TOOLS / command[0], *command[1:], path], capture_output=True, text=True).stdout

    @functools.cached_property
    def resources(self) -> tuple[int, int]:
        """Registers, and bytes of stack, of a thread. Stack above 0 is a spill."""
        output = self.tool("cuobjdump", "-res-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", output)
        if found is None:
            raise RuntimeError(f"cuobjdump reported no resources: {output}")
        return int(found[1]), int(found[2])

    @property
    def instructions(self) -> list[str]:
        """The names of all instructions, in the order of the code."""
        return self.disassembly[0]

    @property
    def loops(self) -> list[tuple[int, int]]:
        """The positions of the first and the last instruction of each loop."""
        return self.disassembly[1]

    @functools.cached_property
    def disassembly(self) -> tuple[list[str], list[tuple[int, int]]]:
        names, labels, branches = [], {}, []
        for line in self.tool("nvdisasm", "-c").splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(names)
            elif (found := INSTRUCTION.search(line)) and not found[1].startswith("NOP"):
                if found[1].startswith("BRA") and (target := re.search(r"\.L_x_\d+", found[2])):
                    branches.append((target[0], len(names)))
                names.append(found[1])
        loops = {(labels[label], end) for label, end in branches if labels.get(label, end) < end}
        return names, sorted(loop for loop in loops if loop[1] - loop[0] >= SPIN)

    def counts(self, trips: Sequence[int]) -> Counts:
        """The counts with each loop, in the order of the code, taken `trips` times."""
        times = [1] * len(self.instructions)
        for (first, last), number in zip(self.loops, trips, strict=True):
            for position in range(first, last + 1):
                times[position] *= number
        found = list(zip(self.instructions, times, strict=True))
        return Counts(
            instructions=sum(times),
            special=sum(number for name, number in found if name.startswith(SPECIAL)),
            loads=sum(32 * 16 * number for name, number in found if LOADS.match(name)),
        )

    def products(self, kind: tuple[str, ...]) -> int:
        """How many matrix instructions of a kind stand in the code."""
        return sum(name.startswith(kind) for name in self.instructions)
