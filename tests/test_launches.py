"""What the launchers ask of a GPU, on one that is not there: which kernels, their grids, and no second compilation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("absent_gpu_worker.py")
ATTENTION = {
    80: ["attention.device.forward_kernel", "attention.device.backward_kernel"],
    90: ["attention.resident.forward_kernel", "attention.resident.backward_kernel"],
}
ADAPTER = [
    "adapter.device.forward_kernel",
    "adapter.device.input_gradient_kernel",
    "adapter.device.parameter_gradient_kernel",
    "adapter.device.finish_kernel",
]


@pytest.fixture(scope="module", params=ATTENTION)
def launched(request):
    """The target, and for each call its launches with every batch."""
    if sys.platform != "linux":
        pytest.skip("Triton compiles on Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, WORKER, str(request.param)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return request.param, json.loads(run.stdout)


def test_which_kernels(launched):
    target, calls = launched
    finish = "attention.device.prefix_gradient_kernel"
    expected = {
        "image": [*ATTENTION[target], finish],
        "captions": [*ATTENTION[80], finish],  # packed
        "image adapter": ADAPTER,
        "caption adapter": ADAPTER,
        "image MLP": ["quick_gelu.device.forward_kernel", "quick_gelu.device.backward_kernel"],
    }
    expected["misaligned MLP"] = expected["image MLP"]
    for name, batches in calls.items():
        for launches in batches:
            assert [launch["name"] for launch in launches] == expected[name], name


def test_later_batches_compile_nothing(launched):
    """The code of the first batch serves all others, also the last one of an epoch."""
    for name, (first, *others) in launched[1].items():
        for launches in others:
            assert [launch["key"] for launch in launches] == [launch["key"] for launch in first], name


def test_every_tensor_and_stride_is_specialised_for_loads_of_16_bytes(launched):
    for name, batches in launched[1].items():
        for launch in sum(batches, []):
            assert launch["unaligned"] == (["p_x"] if name == "misaligned MLP" else []), launch


def test_grids_grow_with_the_batch(launched):
    """A program for each head or block of rows; the absent GPU refuses grids that are empty or out of bounds."""
    target, calls = launched
    programs = [launches[0]["grid"][0] for launches in calls["image"]]
    per_head = 4 if target == 80 else 1  # blocks of 64 queries
    assert programs == [batch * 12 * per_head for batch in (128, 127, 64, 1)]
    shares = [launches[2]["grid"] for launches in calls["image adapter"]]
    assert all(grid[0] * grid[1] <= 132 for grid in shares)  # each multiprocessor has one
