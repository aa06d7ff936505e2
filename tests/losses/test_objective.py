"""What training minimises: sums of losses, the heads of id and mlm, and which captions each loss sees."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import build, inputs, stirred

from upperson import PRESETS, AdaptedCLIP
from upperson.data.masking import masked_positions
from upperson.losses.names import NOT_MASKED
from upperson.losses.objective import IdentityClassifier, MaskedLanguageModel, Objective
from upperson.losses.pairs import PAIR_LOSSES

PEOPLE = [7, 3, 3, 12]
WORDS = 49408


@pytest.fixture
def model(tiny):
    return stirred(build(tiny))


@pytest.fixture
def batch():
    """Unmasked captions, their masked versions, and labels at the first word of each and the last of the longest."""
    images, captions = inputs()
    masked, labels = captions.clone(), torch.full_like(captions, NOT_MASKED)
    for row, column in ((0, 1), (1, 1), (2, 1), (3, 1), (3, 9)):
        labels[row, column] = captions[row, column]
        masked[row, column] = 49405
    return dict(
        images=images,
        captions=captions,
        person_ids=torch.tensor(PEOPLE),
        masked_captions=masked,
        mask_labels=labels,
        mask_positions=masked_positions(labels),
    )


def objective(losses, temperature=0.02):
    torch.manual_seed(0)
    return Objective(losses, temperature, 16, WORDS, PEOPLE)


@pytest.mark.parametrize("losses", ["sdm", "sdm+itc", "0.5*cmpm+2*sdm", "sdm+id", "sdm+id+0.1*mlm", "itc+mlm"])
def test_sums(model, batch, losses):
    total, parts = (goal := objective(losses))(model, batch)
    assert set(parts) == set(goal.weights)
    assert total.item() == pytest.approx(sum(weight * parts[name].item() for name, weight in goal.weights.items()))
    features = model.encode_image(batch["images"]), model.encode_text(batch["captions"])
    for name in parts.keys() & PAIR_LOSSES.keys():
        torch.testing.assert_close(parts[name], PAIR_LOSSES[name](*features, batch["person_ids"]))
    if "id" in parts:
        torch.testing.assert_close(parts["id"], goal.id(*features, batch["person_ids"]))


def test_temperature_is_that_of_sdm_and_itc(model, batch):
    for losses, changes in (("sdm", True), ("itc", True), ("cmpm", False), ("id", False)):
        cold, warm = (objective(losses, temperature)(model, batch)[0].item() for temperature in (0.02, 0.1))
        assert (cold != pytest.approx(warm, rel=1e-3)) is changes


def test_the_losses_of_pairs_see_the_captions_and_mlm_the_masked_ones(model, batch):
    """One pass through the text tower serves both where the captions are masked, as in the released code."""
    _, apart = objective("sdm+mlm")(model, batch)
    _, alone = objective("sdm")(model, batch)
    torch.testing.assert_close(apart["sdm"], alone["sdm"])
    _, together = objective("sdm+mlm")(model, batch | dict(captions=batch["masked_captions"]))
    assert together["mlm"].item() == apart["mlm"].item() and abs(together["sdm"] - apart["sdm"]) > 1e-4


def test_every_parameter_of_heads_and_model_gets_a_gradient(model, batch):
    goal = objective("sdm+id+mlm")
    goal(model, batch)[0].backward()
    parameters = goal.trained_parameters()
    assert {name.split(".")[1] for name in parameters} == {"id", "mlm"}
    for name, parameter in (parameters | model.trained_parameters()).items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# ------------------------------------------------------------------------------------ id


def test_golden_id_loss(golden, recipe):
    numbers = golden("cuhk")
    head = IdentityClassifier(512, [0, 1, 2, 3, 4, 5, 6]).double()
    with torch.no_grad():
        for name, array in recipe.weights("cuhk", recipe.other_shapes()).items():
            getattr(head, name.removeprefix("classifier.")).copy_(torch.from_numpy(array))
    features = (torch.from_numpy(numbers[f"{side}_features"]) for side in ("image", "text"))
    loss = head(*features, torch.from_numpy(numbers["pids"]))
    assert loss.item() == pytest.approx(float(numbers["id_loss"]), rel=1e-12)


def test_id_takes_ids_with_gaps_and_refuses_strangers():
    head = IdentityClassifier(2, PEOPLE).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[5.0, 0], [0, 5], [0, 0]]))  # of the people 3, 7, 12
    right, wrong = torch.tensor([[1.0, 0]], dtype=torch.float64), torch.tensor([[0.0, 1]], dtype=torch.float64)
    expected = math.log(math.exp(5) + 2) - 5
    assert head(right, right, torch.tensor([3])).item() == pytest.approx(expected)
    assert head(wrong, wrong, torch.tensor([7])).item() == pytest.approx(expected)
    assert head(wrong, right, torch.tensor([12])).item() == pytest.approx(expected + 5)
    for stranger in (2, 4, 13):
        with pytest.raises(ValueError, match="people of the training split only"):
            head(right, right, torch.tensor([stranger]))
    with torch.autocast("cpu", torch.bfloat16):
        half = IdentityClassifier(2, PEOPLE)(right.bfloat16(), right.bfloat16(), torch.tensor([3]))
    assert half.dtype == torch.float32


def test_id_gradcheck():
    head = IdentityClassifier(3, range(4)).double()
    features = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *f: head(f[0], f[1], torch.tensor([0, 3])), (*features, *head.parameters()))


# ------------------------------------------------------------------------------------ mlm


def tokens_of(lengths, words=20):
    """Token ids of captions of so many words, with an end token."""
    ids = torch.zeros(len(lengths), max(lengths) + 3, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[0], row[1 : length + 1], row[length + 1] = words - 2, torch.arange(1, length + 1), words - 1
    return ids


def test_mlm_from_its_parts():
    """Cross-attention, blocks and head written out on the parameters, for one caption without padding."""
    torch.manual_seed(0)
    model = MaskedLanguageModel(128, 20).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    image, text = torch.randn(1, 5, 128, dtype=torch.float64), torch.randn(1, 6, 128, dtype=torch.float64)
    labels = torch.full((1, 6), NOT_MASKED)
    labels[0, 2], labels[0, 4] = 11, 7

    def attend(attention, q, k):
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
        q, v, k = (
            F.linear(x, w, b).unflatten(-1, (2, 64)).transpose(0, 1)
            for x, w, b in ((q, w_q, b_q), (k, w_v, b_v), (k, w_k, b_k))
        )
        mixed = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
        return attention.out_proj(mixed.transpose(0, 1).flatten(1))

    def quick_gelu(x):
        return x * torch.sigmoid(1.702 * x)

    x = attend(model.attention, model.ln_text(text[0]), model.ln_image(image[0]))
    for block in model.transformer.layers:
        y = block.norm1(x)
        x = x + attend(block.self_attn, y, y)
        x = x + block.linear2(quick_gelu(block.linear1(block.norm2(x))))
    dense, _, norm, words = model.head
    logits = words(norm(quick_gelu(dense(model.ln_post(x)))))
    expected = F.cross_entropy(logits[[2, 4]], torch.tensor([11, 7]))
    found = model(image, text, torch.tensor([5]), labels, masked_positions(labels))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(model.transformer.layers) == 4


def test_mlm_of_a_caption_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    head = MaskedLanguageModel(64, 20).double()

    def model(image, text, ends, labels):
        return head(image, text, ends, labels, masked_positions(labels))

    ids = tokens_of([3, 9])
    image = torch.randn(2, 5, 64, dtype=torch.float64)
    text = torch.randn(2, 11, 64, dtype=torch.float64)
    labels = torch.full_like(ids, NOT_MASKED)
    labels[0, 1], labels[1, 8] = 5, 6
    ends = ids.argmax(1)
    both = model(image, text, ends, labels)
    alone = [model(image[:1], text[:1, :5], ends[:1], labels[:1]), model(image[1:], text[1:], ends[1:], labels[1:])]
    torch.testing.assert_close(both, sum(alone) / 2)
    text[0, 6:] = 100  # behind the end of the first caption
    torch.testing.assert_close(model(image, text, ends, labels), both)
    assert model(image, text, ends, torch.full_like(ids, NOT_MASKED)).item() == 0


def test_mlm_that_reads_padding(tiny, batch):
    """Other padding is another loss, so captions stay padded to one length; without gradients as well."""
    model = stirred(build(tiny.replace(method="irra")))
    torch.manual_seed(0)
    goal = Objective("sdm+mlm", 0.02, 16, WORDS, PEOPLE, mlm_reads_padding=True)
    hidden = objective("sdm+mlm")
    assert not model.saves("pack_captions") and model.saves("skip_unread")
    (_, reads), (_, hides) = goal(model, batch), hidden(model, batch)
    assert reads["sdm"].item() == hides["sdm"].item() and abs(reads["mlm"] - hides["mlm"]) > 1e-4
    with torch.no_grad():
        assert model.saves("pack_captions")
        torch.testing.assert_close(goal(model, batch)[1]["mlm"], reads["mlm"])
        packed = {name: model.pack_captions(batch[name]) for name in ("captions", "masked_captions")}
    with pytest.raises(ValueError, match="captions: these losses read padding; expected padded captions"):
        goal(model, batch | packed)
    shorter = {name: batch[name][:, :11] for name in ("captions", "masked_captions", "mask_labels")}
    torch.testing.assert_close(hidden(model, batch | shorter)[1]["mlm"], hides["mlm"])
    assert abs(goal(model, batch | shorter)[1]["mlm"] - reads["mlm"]) > 1e-5


def test_mlm_learns_a_word_that_only_the_image_tells():
    torch.manual_seed(0)
    model = MaskedLanguageModel(64, 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ids, labels = tokens_of([2]).repeat(8, 1), torch.full((8, 5), NOT_MASKED)
    text = torch.randn(1, 4, 64).repeat(8, 1, 1)
    image = F.one_hot(torch.arange(8), 64).float().unsqueeze(1).repeat(1, 3, 1)
    labels[:, 1] = torch.arange(8) + 1
    losses = []
    for _ in range(60):
        losses.append(model(image, text, ids.argmax(1), labels, masked_positions(labels)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > math.log(8) and losses[-1] < 0.2


def test_parameter_counts_of_the_paper():
    """With id on CUHK-PEDES 13.06 M, with id and mlm 52.3 M (arXiv 2504.10084, Table X)."""
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-16-quickgelu", device="meta")
        model = AdaptedCLIP(PRESETS["cuhk-pedes"].model, clip)
    identities = range(1, 11_004)

    def count(losses):
        goal = Objective(losses, 0.02, 512, WORDS, identities)
        return sum(p.numel() for p in (model.trained_parameters() | goal.trained_parameters()).values())

    assert count("sdm") == 7_419_816
    assert count("sdm+id") == 7_419_816 + 11_003 * 513 == 13_064_355
    assert round(count("sdm+id+mlm") / 1e6, 1) == 52.3


def test_tokens_of_both_towers(model, batch):
    """Their first image token and their end token, projected, are the features themselves."""
    features, tokens = model.encode_image_tokens(batch["images"])
    torch.testing.assert_close(features, model.encode_image(batch["images"]))
    torch.testing.assert_close(tokens[:, 0], features)
    assert tokens.shape == (4, 13, 16)
    features, tokens, ends = model.encode_text_tokens(batch["captions"])
    torch.testing.assert_close(features, model.encode_text(batch["captions"]))
    assert torch.equal(ends, batch["captions"].argmax(1))
    torch.testing.assert_close(tokens[torch.arange(4), ends], features)
    assert tokens.shape == (4, 11, 16)
