"""What can be compared on a CPU: pytest bench (needs pytest-benchmark). Not part of the tests.

attention       PyTorch backend against the definition, forward and backward: an image's call, batch 4
adapter         PyTorch backend, and LayerNorm alone as the bound
metrics         ranking and measuring at the size of CUHK-PEDES's test split
augmentation    the transform of one image, for training and for evaluation
"""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from upperson_kernels import layernorm_adapter, prefix_attention
from upperson_kernels.attention import reference

from upperson.data import Preprocess
from upperson.evaluate.metrics import retrieval_metrics


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.benchmark(group="attention, forward + backward")
@pytest.mark.parametrize("candidate", ["definition", "PyTorch backend"])
def test_attention(benchmark, candidate):
    qkv = torch.randn(4, 193, 3, 12, 64, requires_grad=True)
    key, value = (torch.randn(10, 12, 64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    grad = torch.randn(4, 193, 12, 64)

    def step(candidate=candidate):
        out = (
            reference.explicit(qkv, key, value, scale, False, "weights")
            if candidate == "definition"
            else prefix_attention(qkv, key, value, scale, backend="torch")
        )
        return [out.detach(), *torch.autograd.grad(out, (qkv, key, value, scale), grad)]

    for found, expected in zip(step(), step("definition"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    benchmark(step)


@pytest.mark.benchmark(group="adapter, forward + backward")
@pytest.mark.parametrize("candidate", ["PyTorch backend", "LayerNorm alone"])
def test_adapter(benchmark, candidate):
    x = torch.randn(4, 193, 768, requires_grad=True)
    weight, bias = torch.randn(2, 768)
    adapter = [
        t.requires_grad_()
        for t in (
            torch.randn(96, 768) * 768**-0.5,
            torch.randn(96),
            torch.randn(768, 96) * 96**-0.5,
            torch.randn(768),
            torch.tensor(1.0),
        )
    ]
    grad = torch.randn(4, 193, 768)

    def step():
        if candidate == "LayerNorm alone":
            return torch.autograd.grad(F.layer_norm(x, (768,), weight, bias), x, grad)
        return torch.autograd.grad(layernorm_adapter(x, weight, bias, *adapter, backend="torch"), (x, *adapter), grad)

    assert all(gradient.isfinite().all() for gradient in benchmark(step))


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
