"""Training steps on tensors of a GPU that hold no values: nothing reads a value, is on the CPU or is cast needlessly.

PyTorch's own attention is left out of the dtypes: without a GPU it is taken apart into products in float32.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does"),
    pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has CUDA's operators on Linux"),
]
WORKER = Path(__file__).with_name("fake_gpu_worker.py")


@pytest.fixture(scope="module")
def found():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, WORKER], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr  # a value that is read ends the worker
    return json.loads(run.stdout)


def products(dtypes):
    """Counts of matrix products and of this project's operators, by the dtypes of their inputs."""
    kinds = ("aten.mm", "aten.addmm", "aten.convolution", "aten.baddbmm", "upperson.")
    return {name: number for name, number in dtypes.items() if name.startswith(kinds)}


def test_every_tensor_is_on_the_gpu(found):
    for name, step in found["kept"].items():
        assert step["elsewhere"] == [], name
    assert found["all_losses"]["elsewhere"] == []


def test_all_losses_wait_for_nothing(found):
    """Also masked language modelling, which computes as many logits as tokens are masked."""
    assert found["all_losses"]["losses"] == ["id", "mlm", "sdm"] and found["all_losses"]["dtype"] == "torch.float32"


def test_products_are_in_the_dtype_of_autocast(found):
    """Alone the similarities of the loss, and their gradients, are in float32."""
    for name, step in found["kept"].items():
        assert step["features"] == ["torch.bfloat16"] * 2, name
        assert step["gradients"] == ["torch.float32 cuda"], name
        wide = {kind: number for kind, number in products(step["dtypes"]).items() if "bfloat16" not in kind}
        assert wide == {"aten.mm float32": 3}, name


def test_frozen_tensors_of_clip_are_never_cast(found):
    assert found["cast"]["casts"] > 100
    for name, step in found["kept"].items():
        assert step["casts"] == 0, name


def test_kept_weights_change_no_dtype(found):
    """Except that LoRA is merged in the dtype of the products."""
    kept, cast = (products(step["dtypes"]) for step in (found["kept"]["ours"], found["cast"]))
    for kind in ("aten.addmm bfloat16", "aten.mm bfloat16", "aten.convolution bfloat16"):
        assert kept[kind] == cast[kind]
    assert {kind: n for kind, n in kept.items() if "attention" in kind or "adapter" in kind} == {
        kind: n for kind, n in cast.items() if "attention" in kind or "adapter" in kind
    }
