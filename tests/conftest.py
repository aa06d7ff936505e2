"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import functools
import os
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes on the same cores slow each other tenfold
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

GOLDEN = Path(__file__).parent / "golden"


# The files that take longest, in the order in which workers of pytest-xdist begin with them (--dist loadfile). A long
# file that is begun last leaves the other workers without work.
FIRST = (
    "test_compile.py",
    "test_kernels.py",
    "test_training.py",
    "test_tables.py",
    "test_distributed.py",
    "test_export.py",
    "test_golden_cskt.py",
    "test_step.py",
    "test_golden_model.py",
    "test_stages.py",
    "test_golden_irra.py",
    "test_model.py",
    "test_golden_dm_adapter.py",
    "test_methods.py",
    "test_import_golden.py",
    "test_index.py",
    "test_pytorch.py",
    "test_mutations.py",
    "test_bench.py",
    "test_cache.py",
    "test_bench_exchange.py",
    "test_wheel.py",
    "test_kernels_pytorch.py",
    "test_kernels_resident.py",
)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_auto_num_workers():
    """`-n auto`: one worker more than cores, since many tests wait for processes of their own."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else (os.cpu_count() or 1) + 1


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_runtest_setup(item):
    if item.get_closest_marker("network") and not index_answers():
        pytest.skip("pip reaches no package index")


@functools.cache
def index_answers():
    """Whether pip's own index, whichever is configured, answers within seconds."""
    question = [sys.executable, "-m", "pip", "index", "versions", "kernels", "--retries", "0", "--timeout", "5"]
    return subprocess.run(question, capture_output=True).returncode == 0


@pytest.fixture(scope="session", autouse=True)
def shared_tokenizers():
    """One tokenizer for each length of captions: reading its vocabulary takes longer than building a tiny model."""
    open_clip = sys.modules.get("open_clip")  # the tests of the kernels run without it
    if open_clip is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))
        yield


@pytest.fixture
def tiny(tmp_path):
    """UP-Person on a tiny random CLIP; a module may have another fixture of this name."""
    from tiny import tiny_config  # after the choice of the interpreter above

    return tiny_config(tmp_path)


@pytest.fixture(scope="session")
def tokenizer():
    import open_clip  # the tests of the kernels run without it

    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="session")
def golden():
    """golden("cuhk") is the opened tests/golden/cuhk.npz."""
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def recipe():
    """tests/golden/recipe.py: the weights and inputs behind the golden numbers."""
    from released import recipe_in  # the tests of the kernels run without open_clip

    return recipe_in(GOLDEN)


@pytest.fixture
def poisoned_memory():
    """New memory holds NaN, so that an element that was never written fails a test; float32 products stay exact."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
