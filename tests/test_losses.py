"""SDM: the golden numbers, the definition written out, and what it refuses."""

import math

import pytest
import torch

from upperson.losses import sdm_loss

CASES = ("small", "repeated", "unique", "same")


def from_golden(golden, case, dtype=torch.float64):
    data = golden("loss")
    features = [
        torch.from_numpy(data[f"{case}/{side}_features"]).to(dtype).requires_grad_() for side in ("image", "text")
    ]
    return data, *features, torch.from_numpy(data[f"{case}/pids"])


@pytest.mark.parametrize("case", CASES)
def test_golden_loss_and_gradients(golden, case):
    data, images, texts, ids = from_golden(golden, case)
    loss = sdm_loss(images, texts, ids)
    loss.backward()
    # The reference keeps its labels in float32, which moves the loss by up to 4e-8 of itself.
    assert abs(loss.item() / data[f"{case}/sdm"] - 1) < 6e-8
    for features, side in ((images, "image"), (texts, "text")):
        expected = torch.from_numpy(data[f"{case}/sdm_grad_{side}"])
        assert (features.grad - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_definition_written_out(golden, case):
    _, images, texts, ids = from_golden(golden, case)
    size, total = len(ids), 0.0
    for anchors, others in ((images, texts), (texts, images)):
        for i in range(size):
            scores = [torch.cosine_similarity(anchors[i], others[j], dim=0).item() / 0.02 for j in range(size)]
            log_norm = math.log(sum(math.exp(score - max(scores)) for score in scores)) + max(scores)
            positives = sum(int(ids[j] == ids[i]) for j in range(size))
            for j in range(size):
                log_p = scores[j] - log_norm
                target = float(ids[j] == ids[i]) / positives
                total += math.exp(log_p) * (log_p - math.log(target + 1e-8)) / size
    assert sdm_loss(images, texts, ids).item() == pytest.approx(total, rel=1e-12)


def test_golden_features_of_the_whole_model(golden):
    data = golden("cuhk")
    images, texts = (torch.from_numpy(data[f"{side}_features"]) for side in ("image", "text"))
    loss = sdm_loss(images, texts, torch.from_numpy(data["pids"]))
    assert abs(loss.item() / data["sdm_loss"] - 1) < 6e-8


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    ids = torch.tensor([3, 3, 0, 7, 0])
    # A mild temperature: finite differences of step 1e-6 cannot follow a sharp softmax.
    assert torch.autograd.gradcheck(lambda a, b: sdm_loss(a, b, ids, temperature=0.5), features)


def test_half_precision_and_autocast_compute_in_float32(golden):
    _, images, texts, ids = from_golden(golden, "repeated", torch.bfloat16)
    expected = sdm_loss(images.float(), texts.float(), ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sdm_loss(images, texts, ids)
        loss_of_float32 = sdm_loss(images.float(), texts.float(), ids)
    assert loss.dtype == loss_of_float32.dtype == torch.float32
    assert loss.item() == loss_of_float32.item() == expected.item()


def test_perfect_and_wrong_matching():
    features = torch.eye(4)
    right = sdm_loss(features, features, torch.arange(4))
    wrong = sdm_loss(features, features.roll(1, 0), torch.arange(4))
    assert right.item() == pytest.approx(0, abs=1e-5)
    assert wrong.item() == pytest.approx(-2 * math.log(1e-8), rel=1e-5)


@pytest.mark.parametrize(
    ("image_shape", "text_shape", "id_shape", "message"),
    [
        ((4, 8), (4, 9), (4,), r"\(4, 8\) and \(4, 9\)"),
        ((4, 8), (3, 8), (4,), r"\(4, 8\) and \(3, 8\)"),
        ((4,), (4,), (4,), r"\(B, E\)"),
        ((4, 8), (4, 8), (5,), r"\(4,\), got \(5,\)"),
        ((1, 8), (1, 8), (1,), "at least two, got 1"),
        ((0, 8), (0, 8), (0,), "at least two, got 0"),
    ],
)
def test_refuses(image_shape, text_shape, id_shape, message):
    with pytest.raises(ValueError, match=message):
        sdm_loss(torch.ones(image_shape), torch.ones(text_shape), torch.ones(id_shape, dtype=torch.int64))
