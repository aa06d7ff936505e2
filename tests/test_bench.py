"""The benchmarks run on a machine without a GPU, and say what they leave out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU prints")
def test_attention_benchmark(tmp_path):
    report = tmp_path / "attention.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCH / "attn.py", "--shape", "text", "--batch", "2", "--seconds", "0.1",
               "--json", report]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "These need a GPU and are left out: the fused kernels" in run.stdout
    assert "image, forward               152    15.4       35 µs      165 µs" in run.stdout     # the floors
    assert "wrong" not in run.stdout and "cannot run" not in run.stdout
    result = json.loads(report.read_text())
    assert {(row["mode"], row["candidate"]) for row in result["rows"]} == {
        (mode, candidate) for mode in ("forward", "backward", "both")
        for candidate in ("explicit softmax", "folded SDPA", "SDPA, no prefix")}
    assert all(0 < row["p20"] <= row["median"] <= row["p80"] for row in result["rows"])
    assert result["environment"]["torch"] == torch.__version__
