"""The kernels compile for every GPU generation and spill nothing, checked ahead of time on any machine.

In a process of its own, because the interpreter that the other tests run in replaces the compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RESOURCES = Path(__file__).parents[1] / "bench" / "resources.py"
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}                    # KB a program may have


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_production_shapes_compile_without_spills(target, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = tmp_path / "resources.json"
    subprocess.run([sys.executable, RESOURCES, "--target", str(target), "--dtype", "bf16", "--json", report],
                   env=environment, check=True)
    rows = json.loads(report.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {
        "attention forward", "attention backward", "adapter forward", "adapter input gradient",
        "adapter parameter gradient"}
    for row in rows:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[target] * 1024, row
        unit = {90: "wgmma", 100: "tcgen05"}.get(target, "mma")
        assert unit in row["matrix"], row
