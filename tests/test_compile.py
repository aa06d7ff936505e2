"""The kernels as their launchers compile them for every GPU generation: few instructions, the right units, no spills.

In a process of its own, because the interpreter that the other tests run in replaces the compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RESOURCES = Path(__file__).parents[1] / "bench" / "resources.py"
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}  # KB a program may have
# Register allocation changes with Triton's version. Nothing spills with 3.6 and 3.8. With 3.9 operands' addresses take
# more registers: attention's backward on Hopper stores up to 64 bytes of a thread once, and loads them once. A tile
# that is too large spills hundreds of bytes, again and again.
STACK, SPILLS = 96, 0.01  # bytes of a thread, share of the instructions
ATTENTION = ("image", "image, λ on logits", "image L/14", "image L/14, λ on logits", "text", "text, packed")
ADAPTERS = ("image, 768 → 96", "text, packed, 512 → 64", "image L/14, 1024 → 128")
ACTIVATIONS = ("2048", "3072", "4096")
# Thousands of warp instructions of a program on Hopper, with a margin for other versions of Triton.
INSTRUCTIONS = {
    ("attention.resident.forward_kernel", "image"): 16.0,
    ("attention.resident.backward_kernel", "image"): 32.0,
    ("attention.resident.backward_kernel", "image, λ on logits"): 33.5,
    ("attention.resident.forward_kernel", "image L/14"): 19.5,
    ("attention.resident.backward_kernel", "image L/14"): 35.5,
    ("attention.resident.forward_kernel", "text"): 8.0,
    ("attention.resident.backward_kernel", "text"): 9.8,
    ("adapter.device.forward_kernel", "image, 768 → 96, residual"): 49.0,
    ("adapter.device.input_gradient_kernel", "image, 768 → 96, residual"): 59.0,
    ("adapter.device.parameter_gradient_kernel", "image, 768 → 96, residual"): 110.0,
    ("quick_gelu.device.forward_kernel", "3072"): 1.6,
    ("quick_gelu.device.backward_kernel", "3072"): 2.4,
}
LOADS = {"image": 0.22, "image, λ on logits": 0.22}  # GB of attention's backward, each operand read once


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("Triton compiles on Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = tmp_path_factory.mktemp("compiled") / "resources.json"
    command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION"]  # each launch says whether products are fused
    subprocess.run([*command, RESOURCES, "--dtype", "bf16", "--json", report], env=environment, check=True)
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def rows(report):
    return report["rows"]


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_production_calls_compile_and_registers_suffice(target, rows):
    rows = [row for row in rows if row["target"] == target]
    compiled = {(row["call"], row["shape"]) for row in rows}
    modes = ("forward", "backward")
    assert compiled == {
        *((f"attention {mode}", shape) for mode in modes for shape in ATTENTION),
        *(
            (f"adapter {mode}", f"{shape}{variant}")
            for mode in modes
            for shape in ADAPTERS
            for variant in ("", ", residual", ", residual, own norm")
        ),
        *((f"QuickGELU {mode}", width) for mode in modes for width in ACTIVATIONS),
    }
    for row in rows:
        assert row["stack"] <= STACK and row["spills"] <= SPILLS * row["instructions"], row
        assert row["shared"] <= SHARED_MEMORY[target] * 1024, row
        assert 0 < row["occupancy"] <= 1, row
        assert row["instructions"] > 0, row
        assert row["unaligned"] == [], row  # every tensor and stride: loads of 16 bytes


def test_every_call_has_a_predicted_time_on_every_gpu(report, rows):
    """And a share of the floor. Blackwell's waiting loops count once, so that its instructions are about Hopper's."""
    lines = report["text"].splitlines()
    head = next(line for line in lines if line.startswith("| call"))
    assert all(f"{gpu}, bf16" in head for gpu in ("H100", "H200", "B200", "RTX 4090"))
    predicted = [line for line in lines if line.startswith(("| attention", "| adapter", "| QuickGELU"))]
    assert len(predicted) == len({(row["call"], row["shape"]) for row in rows})
    assert all(line.count(" µs (") == 4 for line in predicted), predicted
    executed = {(row["target"], row["kernel"], row["shape"], row["call"]): row["instructions"] for row in rows}
    for (target, *launch), instructions in executed.items():
        if target == 100:
            assert 0.25 < instructions / executed[(90, *launch)] < 4, launch


def test_which_kernels_run_where(rows):
    """Short sequences are held whole on Hopper and data-centre Blackwell; every call is a few launches."""
    for row in rows:
        if row["call"].startswith("attention") and "prefix_gradient" not in row["kernel"]:
            whole = row["target"] in (90, 100) and row["shape"] != "text, packed"
            assert row["kernel"].split(".")[1] == ("resident" if whole else "device"), row
    launches = {}
    for row in rows:
        launches.setdefault((row["call"], row["shape"], row["target"]), []).append(row["kernel"].split(".")[-1])
    for (call, _, _), kernels in launches.items():
        assert (
            kernels
            == {
                "attention forward": ["forward_kernel"],
                "attention backward": ["backward_kernel", "prefix_gradient_kernel"],
                "adapter forward": ["forward_kernel"],
                "adapter backward": ["input_gradient_kernel", "parameter_gradient_kernel", "finish_kernel"],
                "QuickGELU forward": ["forward_kernel"],
                "QuickGELU backward": ["backward_kernel"],
            }[call]
        )


def test_products_run_on_the_unit_made_for_them(rows):
    """Where a tile has 64 rows; a few rows of text are taken 16 at a time."""
    for row in rows:
        few = row["shape"].startswith("text, packed") and row["kernel"].split(".")[-1] in (
            "forward_kernel",
            "input_gradient_kernel",
        )
        if row["kernel"].startswith("quick_gelu") or row["kernel"].endswith(
            ("finish_kernel", "prefix_gradient_kernel")
        ):
            assert row["warpgroup"] == row["matrix"] == 0, row
        elif row["target"] in (90, 100) and not (few and row["call"].startswith("adapter")):
            assert row["warpgroup"] > 0 and row["matrix"] == 0, row
        else:
            assert row["matrix"] > 0 and row["warpgroup"] == 0, row


def test_instructions(rows):
    found = {(row["kernel"], row["shape"]): row for row in rows if row["target"] == 90}
    for (kernel, shape), thousands in INSTRUCTIONS.items():
        assert 0.5 * thousands <= found[kernel, shape]["instructions"] / 1000 <= thousands, found[kernel, shape]
    for shape, gigabytes in LOADS.items():
        assert found["attention.resident.backward_kernel", shape]["loads"] <= 1000 * gigabytes
