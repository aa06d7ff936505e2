"""Retrieval metrics: the golden numbers, a naive count, ties, blocks, and what they refuse."""

import dataclasses

import pytest
import torch

from upperson.errors import RetrievalError
from upperson.evaluate.metrics import retrieval_metrics, similarity_metrics

CASES = ("text_to_image", "image_to_text", "many_positives", "one_positive")


def from_golden(golden, case):
    data = golden("metrics")
    return data, *(torch.from_numpy(data[f"{case}/{name}"]) for name in ("similarity", "query_ids", "gallery_ids"))


@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case):
    data, similarity, query_ids, gallery_ids = from_golden(golden, case)
    result = similarity_metrics(similarity, query_ids, gallery_ids)
    assert result.cmc == pytest.approx(data[f"{case}/cmc"].tolist(), abs=1e-10)
    for name, key in (("R@1", "R1"), ("R@5", "R5"), ("R@10", "R10"), ("mAP", "mAP"), ("mINP", "mINP")):
        assert result.metrics[name] == pytest.approx(data[f"{case}/{key}"].item(), abs=1e-10), name


@pytest.mark.parametrize("block_elements", [1, 90, 333, 3600])
def test_blocks_change_nothing(golden, block_elements):
    _, similarity, query_ids, gallery_ids = from_golden(golden, "many_positives")
    whole = similarity_metrics(similarity, query_ids, gallery_ids)
    blocks = similarity_metrics(similarity, query_ids, gallery_ids, block_elements=block_elements)
    assert blocks.cmc == whole.cmc and blocks.metrics == whole.metrics
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(blocks, field.name), getattr(whole, field.name)), field.name


def test_results_of_each_query(golden):
    _, similarity, query_ids, gallery_ids = from_golden(golden, "many_positives")
    shuffled = torch.randperm(len(query_ids), generator=torch.Generator().manual_seed(0))
    result = similarity_metrics(similarity[shuffled], query_ids[shuffled], gallery_ids)
    assert (result.first_match.dtype, result.average_precision.dtype) == (torch.int64, torch.float64)
    for position, query in enumerate(shuffled.tolist()):
        alone = similarity_metrics(similarity[[query]], query_ids[[query]], gallery_ids)
        assert result.average_precision[position].item() == alone.metrics["mAP"]
        assert result.inverse_negative_penalty[position].item() == alone.metrics["mINP"]
        assert [100 * (result.first_match[position] <= k).item() for k in range(1, 11)] == list(alone.cmc)
        assert torch.equal(result.top_similarity[position], similarity[query, result.top[position]])


def test_features_against_a_naive_count():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, 6, generator=generator) for n in (30, 40))
    query_ids, gallery_ids = torch.arange(30) % 7, torch.arange(40) % 7
    result = retrieval_metrics(queries * 5, gallery / 3, query_ids, gallery_ids)

    precision = penalty = first_hits = 0.0
    for q in range(30):
        scores = torch.cosine_similarity(queries[q], gallery).tolist()
        order = sorted(range(40), key=lambda g: -scores[g])
        ranks = [rank for rank, g in enumerate(order, 1) if gallery_ids[g] == query_ids[q]]
        precision += sum(k / rank for k, rank in enumerate(ranks, 1)) / len(ranks) / 30
        penalty += len(ranks) / ranks[-1] / 30
        first_hits += (ranks[0] == 1) / 30
        assert result.top[q].tolist() == order[:10]
        assert result.first_match[q] == ranks[0]
        assert result.top_similarity[q].tolist() == pytest.approx([scores[g] for g in order[:10]])
    assert result.metrics["mAP"] == pytest.approx(100 * precision)
    assert result.metrics["mINP"] == pytest.approx(100 * penalty)
    assert result.metrics["R@1"] == pytest.approx(100 * first_hits)


def test_ties_keep_the_order_of_the_gallery():
    similarity = torch.zeros(1, 100)
    result = similarity_metrics(similarity, torch.tensor([5]), torch.arange(100))
    assert result.cmc == (0, 0, 0, 0, 0, 100, 100, 100, 100, 100)
    assert result.top.tolist() == [list(range(10))]


def test_gallery_smaller_than_ten():
    result = similarity_metrics(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([1]), torch.tensor([1, 2, 1]))
    assert result.cmc == (0,) + (100,) * 9
    assert result.metrics["mAP"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert result.metrics["mINP"] == pytest.approx(100 * 2 / 3)
    assert result.top.tolist() == [[1, 2, 0]]


def test_half_precision_features_are_compared_in_float32():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(50, 16, generator=generator).bfloat16() for _ in range(2))
    ids = torch.arange(50)
    assert torch.equal(
        retrieval_metrics(queries, gallery, ids, ids).top,
        retrieval_metrics(queries.float(), gallery.float(), ids, ids).top,
    )


def test_many_queries_and_images():
    """A gallery of 20 000, ranked for 52 queries at a time."""
    count = 20_000
    ids = torch.arange(count)
    angle = torch.arange(count, dtype=torch.float64) / count * torch.pi
    features = torch.stack([angle.cos(), angle.sin()], 1)
    result = retrieval_metrics(features[:200], features, ids[:200], ids, block_elements=2**20)
    assert result.metrics == {"R@1": 100, "R@5": 100, "R@10": 100, "mAP": 100, "mINP": 100}


def bad(value):
    features = torch.ones(4, 2)
    features[2, 1] = value
    return features


@pytest.mark.parametrize(
    ("queries", "gallery", "query_ids", "gallery_ids", "message"),
    [
        (bad(float("nan")), torch.ones(3, 2), [0] * 4, [0] * 3, "query features: 1 of 4 rows contain NaN.*row 2"),
        (torch.ones(3, 2), bad(float("inf")), [0] * 3, [0] * 4, "gallery features: 1 of 4 rows"),
        (torch.ones(3, 2), torch.ones(3, 2), [0, 8, 9], [0, 1, 2], "2 of 3 queries have no match.*person 8"),
        (torch.ones(0, 2), torch.ones(3, 2), [], [0] * 3, "0 queries, 3 gallery"),
    ],
)
def test_refuses(queries, gallery, query_ids, gallery_ids, message):
    with pytest.raises(RetrievalError, match=message):
        retrieval_metrics(queries, gallery, torch.tensor(query_ids), torch.tensor(gallery_ids))


@pytest.mark.parametrize(
    ("gallery", "query_ids", "message"),
    [
        (torch.ones(3, 4), [0] * 3, r"\(3, 2\) and \(3, 4\)"),
        (torch.ones(3, 2), [0] * 2, r"got \(2,\) and \(3,\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(gallery, query_ids, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(torch.ones(3, 2), gallery, torch.tensor(query_ids), torch.zeros(3))


def test_refuses_nan_similarity():
    with pytest.raises(RetrievalError, match="similarities: 1 of 1 rows"):
        similarity_metrics(torch.tensor([[1.0, float("nan")]]), torch.tensor([0]), torch.tensor([0, 1]))
