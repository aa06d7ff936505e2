"""What a compiled kernel is made of: registers, spills, and the instructions that its warps execute.

Triton brings NVIDIA's disassembler along. The code is cut into blocks without branches; a loop is a jump back to a
block that every way into the loop passes (a natural loop), with all blocks from which the jump is reached. A loop that
only asks whether a barrier or memory is ready counts once: how often it asks depends on the machine. Every other loop
counts as often as the caller says. Both sides of a branch count, unless the caller says how many programs take it.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]+)([^;]*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
ENDS = ("BRA", "EXIT", "RET", "JMP")  # of a block
# The beginning of instructions' names.
SPECIAL = ("MUFU",)  # exponentials, roots, reciprocals
WARPGROUP = ("HGMMA", "UTCHMMA")  # products on the large matrix units of Hopper and data-centre Blackwell
MATRIX = ("HMMA",)  # products on the units of all GPUs
OWN_MEMORY = ("LDL", "STL")
ONE_WARP = ("UTC",)  # what one warp asks Blackwell's matrix unit for, in the name of all
POLLS = ("SYNCS.PHASECHK", "NANOSLEEP")  # questions whether a barrier or memory is ready
WORK = re.compile(r"(LD|ST)[GSTL]|RED|HMMA|HGMMA|UTCHMMA|MUFU|F(ADD|MUL|FMA|MNMX)|BAR")  # no loop that waits has these
LOADS = re.compile(r"LDG(STS)?\..*\b128\b")  # of 16 bytes a thread, in which tiles come; others are broadcasts


class Instruction(NamedTuple):
    predicate: str  # empty where it is executed in any case
    name: str
    operands: str

    @property
    def conditional(self) -> bool:
        """Whether a jump is taken or not: by its predicate, or by that of BRA.U, an operand."""
        return bool(self.predicate) or bool(re.match(r"\s*!?U?P\d", self.operands))


@dataclass(frozen=True)
class Counts:
    """Of all warps of a program."""

    instructions: float
    special: float
    loads: float  # bytes, by loads of 16 bytes a thread
    spills: float  # loads and stores of a thread's own memory, where registers that did not fit wait


class Loop(NamedTuple):
    header: int  # the block that is jumped back to
    blocks: frozenset[int]
    waits: bool  # whether it does nothing but ask


class Branch(NamedTuple):
    """A part of the code with loops of its own."""

    steps: tuple[float, ...]  # of each of its loops, in the order of the code
    share: float = 1.0  # of the programs that take it


@functools.cache
def code_of(cubin: bytes) -> "Code":
    """The code of a compiled kernel, disassembled once."""

    def tool(*command: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(cubin)
            return subprocess.run([TOOLS / command[0], *command[1:], path], capture_output=True, text=True).stdout

    return Code(tool("nvdisasm", "-c", "-ndf"), tool("cuobjdump", "-res-usage"))  # -ndf: no dataflow, which costs time


@dataclass(frozen=True)
class Code:
    """A compiled kernel: what nvdisasm and cuobjdump print about it."""

    text: str
    usage: str = ""

    @property
    def resources(self) -> tuple[int, int]:
        """Registers, and bytes of stack, of a thread. Stack above 0 is a spill."""
        found = re.search(r"REG:(\d+) STACK:(\d+)", self.usage)
        if found is None:
            raise RuntimeError(f"cuobjdump reported no resources: {self.usage}")
        return int(found[1]), int(found[2])

    @functools.cached_property
    def blocks(self) -> list[list[Instruction]]:
        return self._blocks_and_labels[0]

    @functools.cached_property
    def _blocks_and_labels(self) -> tuple[list[list[Instruction]], dict[str, int]]:
        """The instructions between labels and jumps, in the order of the code, and the block behind each label."""
        blocks: list[list[Instruction]] = [[]]
        labels = {}
        for line in self.text.splitlines():
            if label := LABEL.match(line):
                if blocks[-1]:
                    blocks.append([])
                labels[label[1]] = len(blocks) - 1
            elif (found := INSTRUCTION.search(line)) and not found[2].startswith("NOP"):
                blocks[-1].append(Instruction(found[1] or "", found[2], found[3]))
                if found[2].startswith(ENDS):
                    blocks.append([])
        return blocks, labels

    @functools.cached_property
    def successors(self) -> list[list[int]]:
        """The blocks that may follow each block; calls return, and are not followed."""
        labels, found = self._blocks_and_labels[1], []
        for position, block in enumerate(self.blocks):
            last = block[-1] if block else Instruction("", "", "")
            target = re.search(r"\.L_x_\d+", last.operands) if last.name.startswith("BRA") else None
            following = [labels[target[0]]] if target else []
            if not last.name.startswith(ENDS) or last.conditional:
                following.append(position + 1)
            found.append([number for number in dict.fromkeys(following) if number < len(self.blocks)])
        return found

    @functools.cached_property
    def predecessors(self) -> dict[int, list[int]]:
        """The blocks that may come before each block that is reached."""
        found: dict[int, list[int]] = {0: []}
        waiting = [0]
        while waiting:
            block = waiting.pop()
            for after in self.successors[block]:
                if after not in found:
                    found[after] = []
                    waiting.append(after)
                found[after].append(block)
        return dict(sorted(found.items()))

    @functools.cached_property
    def dominators(self) -> dict[int, frozenset[int]]:
        """For each block that is reached, those that every way from the beginning to it passes, and itself."""
        found = dict.fromkeys(self.predecessors, frozenset(self.predecessors)) | {0: frozenset([0])}
        before = {}
        while before != found:
            before = dict(found)
            for block, preceding in self.predecessors.items():
                if block:
                    found[block] = frozenset.intersection(*(found[one] for one in preceding)) | {block}
        return found

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """The natural loops, in the order of the code."""
        bodies: dict[int, set[int]] = {}
        for header, before in self.predecessors.items():
            waiting = [block for block in before if header in self.dominators[block]]
            if waiting:
                bodies[header] = body = {header}
                while waiting:
                    if (block := waiting.pop()) not in body:
                        body.add(block)
                        waiting += self.predecessors[block]
        return [Loop(header, frozenset(bodies[header]), self._waits(bodies[header])) for header in sorted(bodies)]

    def _waits(self, body: set[int]) -> bool:
        names = [instruction.name for block in body for instruction in self.blocks[block]]
        return any(name.startswith(POLLS) for name in names) and not any(WORK.match(name) for name in names)

    def counts(self, warps: int, branches: Sequence[Branch] = ()) -> Counts:
        """What a program of `warps` warps executes on average.

        branches: of the code with loops, in the order of the code; together they name every loop that does not wait.
        Instructions that belong to no branch are executed by every program.

        Raises ValueError if the loops are not as many as the branches say.
        """
        loops = [loop for loop in self.loops if not loop.waits]
        branches = self._unrolled(loops, branches)
        if len(loops) != sum(len(branch.steps) for branch in branches):
            raise ValueError(f"the code has {len(loops)} loops, and the branches are {branches}")
        times = dict.fromkeys(self.dominators, 1.0)
        rest = list(loops)
        for branch in branches:
            own, rest = rest[: len(branch.steps)], rest[len(branch.steps) :]
            for block in self._branch(own, [loop for loop in loops if loop not in own]) if branch.share < 1 else ():
                times[block] *= branch.share
            for loop, steps in zip(own, branch.steps, strict=True):
                for block in loop.blocks:
                    times[block] *= steps
        instructions = special = loads = spills = 0.0
        for block, number in times.items():
            names = [instruction.name for instruction in self.blocks[block]]
            executed = number * (1 if any(name.startswith(ONE_WARP) for name in names) else warps)
            instructions += executed * len(names)
            special += executed * sum(name.startswith(SPECIAL) for name in names)
            loads += executed * 32 * 16 * sum(bool(LOADS.match(name)) for name in names)
            spills += executed * sum(name.startswith(OWN_MEMORY) for name in names)
        return Counts(instructions, special, loads, spills)

    def _unrolled(self, loops: list[Loop], branches: Sequence[Branch]) -> Sequence[Branch]:
        """One loop, as the assembler may have made two of it: one for several steps at once, one for the rest."""
        if [len(branch.steps) for branch in branches] != [1] or len(loops) != 2:
            return branches
        several, one = (sum(map(self._loads_memory, loop.blocks)) for loop in loops)
        whole, rest = divmod(branches[0].steps[0], several // one)
        return [Branch((whole, rest))]

    def _loads_memory(self, block: int) -> int:
        return sum(instruction.name.startswith("LDG") for instruction in self.blocks[block])

    def _branch(self, own: list[Loop], others: list[Loop]) -> list[int]:
        """The blocks of a branch: most that one block dominates without another branch's loop."""
        passed = frozenset.intersection(*(self.dominators[loop.header] for loop in own))
        taken = passed.difference(*(self.dominators[loop.header] for loop in others))
        entry = min(taken, key=lambda block: len(self.dominators[block]))
        return [block for block, passing in self.dominators.items() if entry in passing]

    def products(self, kind: tuple[str, ...]) -> int:
        """How many matrix instructions of a kind stand in the code."""
        return sum(instruction.name.startswith(kind) for block in self.blocks for instruction in block)
