"""Counting instructions of compiled kernels: blocks, dominators, loops, and loops that only wait."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from harness import branches
from harness.sass import Branch, Code, Counts


def code(*lines):
    """What nvdisasm prints for these instructions and labels."""
    text = [line if line.endswith(":") else f"        /*{16 * n:04x}*/   {line} ;" for n, line in enumerate(lines)]
    return Code("\n".join(text))


STRAIGHT = (
    "MOV R1, RZ",
    "MUFU.EX2 R2, R1",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "NOP",
    "EXIT",
    ".L_x_9:",
    "BRA `(.L_x_9)",
)
LOOP = ("MOV R1, RZ", ".L_x_1:", "FFMA R2, R2, R3, R4", "IADD3 R1, R1, 0x1", "@P0 BRA `(.L_x_1)", "EXIT")
# The wait stands behind the code, as on Blackwell, and jumps back into the loop.
WAITS = (
    "MOV R1, RZ",
    ".L_x_1:",
    "FFMA R2, R2, R3, R4",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8",
    "@!P0 BRA `(.L_x_2)",
    ".L_x_3:",
    "FADD R2, R2, R3",
    "BRA.U UP0, `(.L_x_1)",
    "EXIT",
    ".L_x_2:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R8",
    "@!P0 BRA `(.L_x_2)",
    "BRA `(.L_x_3)",
)
ALLOCATES = (
    "BRA.U UP0, `(.L_x_2)",
    ".L_x_1:",
    "NANOSLEEP 0x64",
    "ATOMS.CAS R1, [UR4], R2, R3",
    "BRA.U !UP1, `(.L_x_1)",
    ".L_x_2:",
    "EXIT",
)
BRANCHES = (
    "@P0 BRA `(.L_x_2)",
    ".L_x_1:",
    "FADD R2, R2, R3",
    "@P1 BRA `(.L_x_1)",
    "STG.E [R2], R3",
    "EXIT",
    ".L_x_2:",
    "FMUL R2, R2, R3",
    ".L_x_3:",
    "FADD R2, R2, R3",
    "FADD R2, R2, R3",
    "@P1 BRA `(.L_x_3)",
    "EXIT",
)
NESTED = (
    ".L_x_1:",
    "MOV R1, RZ",
    ".L_x_2:",
    "FADD R2, R2, R3",
    "@P0 BRA `(.L_x_2)",
    "@P1 BRA `(.L_x_1)",
    "EXIT",
)


@pytest.mark.parametrize(
    ("lines", "loops", "waiting", "taken", "instructions"),
    [
        (STRAIGHT, 0, 0, [], 4),  # what is not reached does not count
        (LOOP, 1, 0, [Branch((5,))], 2 + 5 * 3),
        (LOOP, 1, 0, [Branch((0,))], 2),
        (WAITS, 1, 1, [Branch((5,))], 2 + 5 * (3 + 2 + 2 + 1)),
        (ALLOCATES, 0, 1, [], 5),
        (BRANCHES, 2, 0, [Branch((4,), 0.25), Branch((3,), 0.75)], 1 + 0.25 * (4 * 2 + 2) + 0.75 * (1 + 3 * 3 + 1)),
        (BRANCHES, 2, 0, [Branch((4,), 0), Branch((3,), 1)], 1 + 1 + 3 * 3 + 1),
        (NESTED, 2, 0, [Branch((2, 3))], 2 * (1 + 3 * 2 + 1) + 1),
    ],
)
def test_loops_and_counts(lines, loops, waiting, taken, instructions):
    found = code(*lines)
    assert [loop.waits for loop in found.loops].count(False) == loops
    assert [loop.waits for loop in found.loops].count(True) == waiting
    assert found.counts(1, taken).instructions == instructions
    assert found.counts(8, taken).instructions == 8 * instructions


def test_kinds_of_instructions():
    assert code(*STRAIGHT).counts(2) == Counts(instructions=8, special=2, loads=2 * 32 * 16, spills=0)
    spilling = code("STL.64 [R1+0x8], R144", ".L_x_1:", "LDL.LU R5, [R1+0x8]", "@P0 BRA `(.L_x_1)", "EXIT")
    assert spilling.counts(2, [Branch((3,))]).spills == 2 * (1 + 3)


def test_one_warp_starts_the_products_of_blackwell():
    lines = ("MOV R1, RZ", "BRA.U UP0, `(.L_x_1)", "UTCHMMA gdesc[UR4], tmem[UR6], UPT", ".L_x_1:", "EXIT")
    found = code(*lines)
    assert found.products(("UTCHMMA",)) == 1
    assert found.counts(4).instructions == 4 * 3 + 1


def test_a_loop_that_the_assembler_unrolled():
    """Four steps at once, then the rest one by one; both loops together make as many steps as the caller says."""
    load = "LDG.E R2, desc[UR4][R2.64]"
    lines = (".L_x_1:", *[load] * 4, "@P0 BRA `(.L_x_1)", ".L_x_2:", load, "@P1 BRA `(.L_x_2)", "EXIT")
    assert code(*lines).counts(1, [Branch((22,))]).instructions == 5 * 5 + 2 * 2 + 1


@pytest.mark.parametrize("taken", [[], [Branch((2, 3))], [Branch((2,)), Branch((3,))]])
def test_a_loop_without_a_number_of_steps_is_refused(taken):
    with pytest.raises(ValueError, match="the code has 1 loops"):
        code(*LOOP).counts(1, taken)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("length", "prefix"), [(193, 10), (244, 10), (77, 10), (26, 10), (64, 0), (1, 1), (300, 17)])
def test_programs_of_attention_of_any_length_cover_all_tiles(length, prefix, causal, packed, capability):
    """Each program takes one branch; without a causal mask its loops and last tile cover all columns, or all rows."""
    shape = (length, prefix, 64, 2, capability)
    for mode in ("forward", "backward"):
        taken = branches.attention_branches(*shape, causal, packed, 128)[f"attention.device.{mode}_kernel"]
        assert sum(branch.share for branch in taken) == pytest.approx(1)
        chosen = branches.tiles.choose(f"attention_{mode}", 64, 2, capability)
        last = branches.attention.last_tiles(length, prefix, packed, chosen["BLOCK_M"], chosen["BLOCK_N"])
        columns = -(-(length + prefix) // chosen["BLOCK_N"])
        queries = 1 + (last["LAST_M"] < chosen["BLOCK_M"])
        for branch in taken[:queries]:
            walked = sum(branch.steps) + (last["LAST_N"] < chosen["BLOCK_N"])
            if branch.share:
                assert 0 < walked <= columns if causal else walked == columns
