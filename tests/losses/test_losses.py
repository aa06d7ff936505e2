"""The losses: golden numbers, definitions written out, weighted sums, and what they refuse."""

import math

import pytest
import torch

from upperson.losses.names import parse_losses
from upperson.losses.pairs import PAIR_LOSSES, cmpm_loss, itc_loss, sdm_loss

CASES = ("small", "repeated", "unique", "same")


def from_golden(golden, case, dtype=torch.float64):
    data = golden("loss")
    features = [
        torch.from_numpy(data[f"{case}/{side}_features"]).to(dtype).requires_grad_() for side in ("image", "text")
    ]
    return data, *features, torch.from_numpy(data[f"{case}/pids"])


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_golden_loss_and_gradients(golden, case, name):
    data, images, texts, ids = from_golden(golden, case)
    loss = PAIR_LOSSES[name](images, texts, ids)
    loss.backward()
    # The reference keeps its labels in float32, which moves the loss by up to 4e-8 of itself.
    assert abs(loss.item() / data[f"{case}/{name}"] - 1) < 6e-8
    for features, side in ((images, "image"), (texts, "text")):
        expected = torch.from_numpy(data[f"{case}/{name}_grad_{side}"])
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
    for name, loss in PAIR_LOSSES.items():
        assert abs(loss(images, texts, torch.from_numpy(data["pids"])).item() / data[f"{name}_loss"] - 1) < 6e-8


def test_itc_written_out():
    """Two pairs at right angles: the right text has cosine 1, the other 0."""
    features = torch.eye(2, dtype=torch.float64)
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert itc_loss(3 * features, features, torch.arange(2), temperature=0.5).item() == pytest.approx(expected)
    # Who is shown changes nothing: other pairs of the same person are negatives.
    assert itc_loss(features, features, torch.zeros(2), temperature=0.5).item() == pytest.approx(expected)


def test_cmpm_written_out():
    """Two pairs of one person: each label is 1/√2, and so are both projections of the same length."""
    features = torch.ones(2, 1, dtype=torch.float64)
    expected = 2 * (math.log(0.5) - math.log(0.5**0.5 + 1e-8))
    assert cmpm_loss(features, features, torch.zeros(2)).item() == pytest.approx(expected) and expected < 0
    # Projections know the length of what is projected, cosines do not.
    features = torch.eye(2, dtype=torch.float64)
    assert cmpm_loss(5 * features, features, torch.arange(2)) < cmpm_loss(features, features, torch.arange(2))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("sdm", {"sdm": 1}),
        ("sdm+itc", {"sdm": 1, "itc": 1}),
        (" 0.5*cmpm + 2 * sdm ", {"cmpm": 0.5, "sdm": 2}),
        (".25*itc", {"itc": 0.25}),
        ("sdm+id+mlm", {"sdm": 1, "id": 1, "mlm": 1}),
    ],
)
def test_sums(text, weights):
    assert parse_losses(text) == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a sum of sdm, itc, cmpm, id, mlm,"),
        ("sdm+", "expected a sum"),
        ("tdm", "expected a sum"),
        ("sdm-itc", "expected a sum"),
        ("-1*sdm", "expected a sum"),
        ("sdm*2", "expected a sum"),
        ("sdm+sdm", "it contains sdm twice"),
        ("0*sdm", "the weight of sdm must be above 0"),
    ],
)
def test_sums_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_losses(text)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    ids = torch.tensor([3, 3, 0, 7, 0])
    # A mild temperature: finite differences of step 1e-6 cannot follow a sharp softmax.
    assert torch.autograd.gradcheck(lambda a, b: sdm_loss(a, b, ids, temperature=0.5), features)
    assert torch.autograd.gradcheck(lambda a, b: itc_loss(a, b, ids, temperature=0.5), features)
    assert torch.autograd.gradcheck(lambda a, b: cmpm_loss(a, b, ids), features)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_half_precision_and_autocast_compute_in_float32(golden, name):
    _, images, texts, ids = from_golden(golden, "repeated", torch.bfloat16)
    expected = PAIR_LOSSES[name](images.float(), texts.float(), ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = PAIR_LOSSES[name](images, texts, ids)
        loss_of_float32 = PAIR_LOSSES[name](images.float(), texts.float(), ids)
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
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_refuses(name, image_shape, text_shape, id_shape, message):
    with pytest.raises(ValueError, match=f"{name}_loss .*{message}"):
        PAIR_LOSSES[name](torch.ones(image_shape), torch.ones(text_shape), torch.ones(id_shape, dtype=torch.int64))
