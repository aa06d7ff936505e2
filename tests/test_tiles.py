"""Which tiles a kernel runs with: those that ship, those that a file brings, and what they cost in padding."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operators import GPU, attention_functions, attention_inputs, packed_inputs
from torch.utils._pytree import tree_leaves
from upperson_kernels import tiles

ROOT = Path(__file__).parents[1]
ENTRY = dict(
    kernel="attention_forward",
    width=16,
    element_size=8,
    capability=90,
    BLOCK_M=64,
    BLOCK_N=16,
    num_warps=4,
    num_stages=1,
)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(tiles, "loaded", {})
    tiles.load_named_in_environment.cache_clear()
    yield
    tiles.load_named_in_environment.cache_clear()


@pytest.fixture
def save(tmp_path):
    def write(content):
        path = tmp_path / "tiles.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 16, 20, 64, 80, 96, 128])
@pytest.mark.parametrize("kernel", tiles.FIELDS)
def test_every_shape_on_every_gpu_has_tiles(kernel, width, element_size, capability):
    chosen = tiles.choose(kernel, width, element_size, capability)
    blocks = {
        name: size for name, size in chosen.items() if name.startswith(("BLOCK", "FIRST")) or size and name == "SECOND"
    }
    assert all(size >= 16 and math.log2(size).is_integer() for size in blocks.values())
    assert set(tiles.FIELDS[kernel][:2]) < set(blocks)
    assert (chosen["BLOCK_D"] if kernel.startswith("attention") else chosen["FIRST"] + chosen["SECOND"]) >= width
    # ptxas must be able to give every thread of a program the registers that it is promised.
    assert chosen["num_warps"] * 32 * chosen.get("maxnreg", 0) <= 65536


def test_a_loaded_file_takes_precedence(save):
    tiles.load(save(dict(tiles=[dict(ENTRY, maxnreg=128)])))
    assert tiles.choose("attention_forward", 16, 8, 90) == dict(
        BLOCK_M=64, BLOCK_N=16, BLOCK_D=16, num_warps=4, num_stages=1, maxnreg=128, enable_fp_fusion=True
    )
    assert tiles.choose("attention_forward", 32, 8, 90)["BLOCK_M"] == 32
    assert tiles.choose("attention_backward", 16, 8, 90)["BLOCK_M"] == 32


def test_the_environment_names_a_file(save, tmp_path, monkeypatch):
    def chosen(path):
        tiles.load_named_in_environment.cache_clear()
        monkeypatch.setenv("UPPERSON_TILES", str(path))
        return tiles.choose("attention_forward", 16, 8, 90)["BLOCK_N"]

    assert chosen("") == 32
    with pytest.raises(tiles.TilesError, match=r"UPPERSON_TILES: .*nothing\.json: No such file or directory"):
        chosen(tmp_path / "nothing.json")
    assert chosen(save(dict(tiles=[ENTRY]))) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "expected the JSON that bench/tune.py writes, with a list 'tiles'"),
        ([1], "expected the JSON that bench/tune.py writes"),
        (dict(tiles=3), "expected the JSON that bench/tune.py writes"),
        (dict(tiles=[3]), r"tiles\[0\]: 'kernel' must be one of attention_forward, attention_backward, adapter_rows"),
        (dict(tiles=[dict(ENTRY, kernel="softmax")]), r"tiles\[0\]: 'kernel' must be one of"),
        (dict(tiles=[ENTRY, dict(ENTRY, width=0)]), r"tiles\[1\]: 'width' must be a positive integer, not 0"),
        (dict(tiles=[dict(ENTRY, BLOCK_N=None)]), "'BLOCK_N' must be a positive integer, not None"),
        (dict(tiles=[dict(ENTRY, BLOCK_N=8)]), "'BLOCK_N' must be a power of two from 16 to 128, not 8"),
        (dict(tiles=[dict(ENTRY, BLOCK_N=48)]), "'BLOCK_N' must be a power of two from 16 to 128, not 48"),
        (dict(tiles=[dict(ENTRY, BLOCK_N=256)]), "'BLOCK_N' must be a power of two from 16 to 128, not 256"),
        (dict(tiles=[dict(ENTRY, num_warps=3)]), "'num_warps' must be a power of two from 1 to 128, not 3"),
        (dict(tiles=[dict(ENTRY, kernel="attention_backward", BLOCK_M=16)]), "'BLOCK_M' must be at least 32 here"),
        (dict(tiles=[dict(ENTRY, colour=5)]), r"tiles\[0\]: unknown fields: 'colour'"),
        (dict(tiles=[dict(ENTRY, num_stages=200)]), "'num_stages' must be at most 8, not 200"),
        (dict(tiles=[dict(ENTRY, kernel=["softmax"])]), r"tiles\[0\]: 'kernel' must be one of"),
        (dict(tiles={}), "with a list 'tiles'"),
        (dict(tiles=[dict(ENTRY, width=True)]), "'width' must be a positive integer, not True"),
        (dict(tiles=[dict(ENTRY, width=10**30)]), "'width' must be at most 65536, not 10000000"),
        (dict(tiles=[dict(ENTRY, maxnreg=True)]), "'maxnreg' must be a number of registers from 24 to 255, not True"),
        (dict(tiles=[dict(ENTRY, **{"a" * 9000: 1})]), "unknown fields: 'aaaaaaaaaaaa[a.]*'$"),
        (dict(tiles=[ENTRY, dict(ENTRY, BLOCK_N=32)]), r"tiles\[1\]: an entry before it is for the same kernel"),
        ('{"tiles": [], "tiles": []}', "a field stands twice"),
        ("[" * 100_000, "expected the JSON that bench/tune.py writes"),
        ('{"tiles": ' + "9" * 5000 + "}", "expected the JSON that bench/tune.py writes"),
        (dict(tiles=[dict(ENTRY, maxnreg=500)]), "'maxnreg' must be a number of registers from 24 to 255, not 500"),
    ],
)
def test_a_file_that_is_not_tiles_is_refused_and_changes_nothing(content, message, save):
    with pytest.raises(tiles.TilesError, match=rf"tiles\.json.*{message}"):
        tiles.load(save(content))
    assert tiles.loaded == {}


@pytest.mark.skipif(GPU, reason="counts what the interpreter computes")
@pytest.mark.parametrize(
    ("length", "causal", "packed", "forward", "backward"),
    [
        (193, False, False, 1.36, 1.36),
        (244, False, False, 1.06, 1.06),
        (77, True, False, 3.26, 2.71),
        (26, True, True, 6.7, 6.7),
    ],
)
def test_how_much_is_padded(length, causal, packed, forward, backward, monkeypatch):
    """Elements of the kernels' products over those of the definition: two products forward, five backward."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = []
    create_dot = InterpreterBuilder.create_dot

    def count(self, a, b, *rest):
        counted.append(a.data.shape[0] * b.data.shape[1] * a.data.shape[1])
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    inputs = dict(prefix=10, heads=1, width=64, dtype=torch.float16)
    if packed:
        tensors, cu_seqlens = packed_inputs([length], **inputs)
    else:
        tensors, cu_seqlens = attention_inputs(1, length, **inputs), None
    out = attention_functions(causal, "weights", cu_seqlens)[0](*(t.requires_grad_() for t in tensors))
    products = [sum(counted)]
    out.backward(torch.ones_like(out))
    products.append(sum(counted) - products[0])
    visible = (length * (length + 1) / 2 if causal else length**2) + 10 * length
    padded = [found / (number * 64 * visible) for found, number in zip(products, (2, 5), strict=True)]
    assert padded == pytest.approx([forward, backward], rel=0.01)


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import tune

    return tune


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="tunes in the interpreter")
def test_tuning_times_what_is_right_and_saves_what_loads(tune, tmp_path, monkeypatch, capsys):
    from upperson_kernels.attention import launch

    qkv, *prefix = attention_inputs(dtype=torch.float16)

    def broken():  # as a kernel of such tiles might be
        out, lse = launch.forward(qkv, launch.Prefix(*prefix), launch.Packing(None, 0), False, "weights")
        return (out + (tiles.choose("attention_forward", 16, 2, 90)["BLOCK_N"] == 16), lse)

    def choice(block_n):
        return dict(BLOCK_M=64, BLOCK_N=block_n, num_warps=4, num_stages=1)

    def too_large():
        if tiles.choose("attention_forward", 16, 2, 90)["BLOCK_N"] == 128:
            raise RuntimeError("out of resource: shared memory")
        return broken()

    rows = tune.tune(
        tune.Job("attention_forward", 16, [too_large]), [choice(n) for n in (16, 32, 128)], 2, torch.device("cpu"), 0.01
    )
    assert {row["tiles"]["BLOCK_N"]: row["ships"] for row in rows} == {64: True, 32: False}
    assert rows[0]["microseconds"] <= rows[1]["microseconds"]
    assert "out of resource" in capsys.readouterr().out and tiles.loaded == {}

    path = tmp_path / "tiles.json"
    tune.save(
        path,
        [dict(kernel="attention_forward", width=16, element_size=2, capability=90, **choice(32))],
        torch.device("cpu"),
    )
    tiles.load(path)
    assert tiles.choose("attention_forward", 16, 2, 90)["BLOCK_N"] == 32


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="calls the kernels at full width in the interpreter")
def test_every_tuning_job_runs(tune, monkeypatch):
    few = {hidden: (tune.CAPTION, width) for hidden, (_, width) in tune.ADAPTERS.items()}
    monkeypatch.setattr(tune, "ADAPTERS", few)  # the interpreter takes a minute for the rows of an image
    kernels = {}
    for job in tune.jobs(1, torch.float16, torch.device("cpu")):
        kernels.setdefault(job.kernel, []).append(job.width)
        for workload in job.workloads:
            found = [result for result in tree_leaves(workload()) if result is not None]
            assert found and all(result.isfinite().all() for result in found)
        assert len(tune.alternatives(job.kernel)) > 10
    assert kernels == {
        "attention_forward": [64],
        "attention_backward": [64],
        "adapter_few_rows": [64, 96, 128],
        "adapter_parameters": [64, 96, 128],
    }


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="what a machine without a GPU prints")
def test_tuning_needs_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "tune.py", tmp_path / "tiles.json"], capture_output=True, text=True
    )
    assert run.returncode == 1 and "error: tuning times kernels on a GPU, and there is none" in run.stderr
    assert not (tmp_path / "tiles.json").exists()
