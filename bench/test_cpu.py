"""What can be compared on a CPU: pytest bench (needs pytest-benchmark). Not part of the tests.

attention       PyTorch backend against the definition, forward and backward: an image's call, batch 4
adapter         PyTorch backend, and LayerNorm alone as the bound
metrics         ranking and measuring at the size of CUHK-PEDES's test split
augmentation    the transform of one image, for training and for evaluation
"""

import adapter
import attn
import pytest
import torch
from harness.comparison import Case, reasons_to_leave_out, timed_call
from PIL import Image

from upperson.data import Preprocess
from upperson.evaluate.metrics import retrieval_metrics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def time_candidate(benchmark, case: Case, name: str) -> None:
    assert name not in reasons_to_leave_out(case)
    gradients = benchmark(timed_call(case.candidates[name], *case.setup(), "both").run, None)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.benchmark(group="attention, forward + backward")
@pytest.mark.parametrize("candidate", ["explicit softmax", "folded SDPA"])
def test_attention(benchmark, candidate):
    case = attn.case("image", attn.SHAPES["image"], 4, torch.float32, CPU, "weights")
    time_candidate(benchmark, case, candidate)


@pytest.mark.benchmark(group="adapter, forward + backward")
@pytest.mark.parametrize("candidate", ["eager", "LayerNorm alone"])
def test_adapter(benchmark, candidate):
    time_candidate(benchmark, adapter.case("image", adapter.SHAPES["image"], 4, torch.float32, CPU, 0.0), candidate)


@pytest.mark.benchmark(group="metrics")
def test_metrics(benchmark):
    """6,156 captions of 1,000 people search 3,074 images."""
    people = torch.randn(1000, 512)
    gallery_ids, query_ids = torch.arange(3074) % 1000, torch.arange(6156) % 1000
    gallery, queries = (people[ids] + 3 * torch.randn(len(ids), 512) for ids in (gallery_ids, query_ids))
    found = benchmark.pedantic(retrieval_metrics, (queries, gallery, query_ids, gallery_ids), rounds=3)
    assert 1 < found.metrics["R@1"] < 100


@pytest.mark.benchmark(group="resizing and normalising one image")
def test_transform(benchmark):
    transform = Preprocess((384, 128), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    image = Image.effect_noise((100, 250), 50).convert("RGB")  # about as large as the crops of CUHK-PEDES
    assert benchmark(transform, image).shape == (3, 384, 128)
