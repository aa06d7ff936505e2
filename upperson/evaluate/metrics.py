"""Retrieval metrics of every query: R@k (CMC), average precision, INP. Queries are ranked in blocks to save memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from upperson.errors import RetrievalError

CMC_LENGTH = 10
BLOCK_ELEMENTS = 2**24  # similarities ranked at once; 20,000 images are ranked for 838 queries at a time


@dataclass(frozen=True)
class Retrieval:
    """The metrics of Q queries, in the order of the queries, on the CPU. Entries of the query's person match."""

    first_match: Tensor  # (Q,) int64: rank of the first match, counted from 1
    average_precision: Tensor  # (Q,) float64, percent
    inverse_negative_penalty: Tensor  # (Q,) float64, percent
    top: Tensor  # (Q, at most 10) int64: gallery indices, best first
    top_similarity: Tensor  # (Q, at most 10): the similarities of these entries

    @property
    def cmc(self) -> tuple[float, ...]:
        """Entry k - 1: the percentage of queries with a match among the first k entries, for k up to 10."""
        return tuple(100 * (self.first_match <= k).double().mean().item() for k in range(1, CMC_LENGTH + 1))

    @property
    def metrics(self) -> dict[str, float]:
        """The averages over the queries, in percent, by their common names."""
        cmc = self.cmc
        return {
            "R@1": cmc[0],
            "R@5": cmc[4],
            "R@10": cmc[9],
            "mAP": self.average_precision.mean().item(),
            "mINP": self.inverse_negative_penalty.mean().item(),
        }


def retrieval_metrics(
    query_features: Tensor,
    gallery_features: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    *,
    block_elements: int = BLOCK_ELEMENTS,
) -> Retrieval:
    """Ranks the gallery by cosine similarity to each query.

    Args:
        query_features, gallery_features: (Q, E) and (G, E), on one device; they are normalised in float32 or wider.
        query_ids, gallery_ids: (Q,) and (G,), integer person ids.
        block_elements: upper bound of Q' · G, where Q' is the number of queries ranked at once.

    Equal similarities keep the order of the gallery. Average precision is the mean of (k / rank of the k-th match) over
    the matches of a query. Inverse negative penalty is (number of matches / rank of the last match).

    Raises RetrievalError for non-finite features and for queries without a match, and ValueError for mismatched shapes.
    """
    if query_features.ndim != 2 or gallery_features.ndim != 2 or query_features.shape[1] != gallery_features.shape[1]:
        raise ValueError(
            "expected query features (Q, E) and gallery features (G, E), got "
            f"{tuple(query_features.shape)} and {tuple(gallery_features.shape)}"
        )
    dtype = torch.promote_types(query_features.dtype, torch.float32)
    for name, features in (("query", query_features), ("gallery", gallery_features)):
        _check_finite(f"{name} features", features)
    queries, gallery = F.normalize(query_features.to(dtype)), F.normalize(gallery_features.to(dtype))
    return _rank_in_blocks(
        lambda rows: queries[rows] @ gallery.t(),
        (len(queries), len(gallery)),
        query_ids,
        gallery_ids,
        block_elements,
        queries.device,
    )


def similarity_metrics(
    similarity: Tensor, query_ids: Tensor, gallery_ids: Tensor, *, block_elements: int = BLOCK_ELEMENTS
) -> Retrieval:
    """The same metrics from a similarity matrix (Q, G), where higher means more similar."""
    if similarity.ndim != 2:
        raise ValueError(f"expected a similarity matrix (Q, G), got {tuple(similarity.shape)}")
    _check_finite("similarities", similarity)
    return _rank_in_blocks(
        lambda rows: similarity[rows],
        (similarity.shape[0], similarity.shape[1]),
        query_ids,
        gallery_ids,
        block_elements,
        similarity.device,
    )


def _rank_in_blocks(
    similarity_of: Callable[[slice], Tensor],
    shape: tuple[int, int],
    query_ids: Tensor,
    gallery_ids: Tensor,
    block_elements: int,
    device: torch.device,
) -> Retrieval:
    query_count, gallery_count = shape
    if tuple(query_ids.shape) != (query_count,) or tuple(gallery_ids.shape) != (gallery_count,):
        raise ValueError(
            f"expected person ids ({query_count},) of the queries and ({gallery_count},) of the gallery, "
            f"got {tuple(query_ids.shape)} and {tuple(gallery_ids.shape)}"
        )
    query_ids, gallery_ids = query_ids.to(device), gallery_ids.to(device)
    _check_matches(query_ids, gallery_ids)

    rows = max(1, block_elements // gallery_count)
    blocks: list[tuple[Tensor, ...]] = []
    for start in range(0, query_count, rows):
        block = slice(start, start + rows)
        similarity, order = similarity_of(block).sort(dim=1, descending=True, stable=True)
        matches = gallery_ids[order] == query_ids[block, None]
        # (query, rank) of every match, ordered by query and then by rank: few values even for a large gallery
        query, rank = matches.nonzero(as_tuple=True)
        rank = rank + 1
        count = matches.sum(1)
        end = count.cumsum(0)
        number_of_match = torch.arange(1, len(rank) + 1, device=device) - (end - count)[query]
        precision_sum = torch.zeros(len(count), dtype=torch.double, device=device)
        precision_sum.index_add_(0, query, number_of_match / rank.double())
        results = (  # in the order of Retrieval; cloned, since views would keep all blocks in memory
            rank[end - count],
            100 * precision_sum / count,
            100 * count / rank[end - 1].double(),
            order[:, :CMC_LENGTH].clone(),
            similarity[:, :CMC_LENGTH].clone(),
        )
        blocks.append(tuple(result.cpu() for result in results))
    return Retrieval(*map(torch.cat, zip(*blocks, strict=True)))


def _check_finite(name: str, values: Tensor) -> None:
    finite = values.isfinite().all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise RetrievalError(
            f"{name}: {len(bad)} of {len(values)} rows contain NaN or infinity, the first is row {bad[0].item()}"
        )


def _check_matches(query_ids: Tensor, gallery_ids: Tensor) -> None:
    if not len(query_ids) or not len(gallery_ids):
        raise RetrievalError(f"nothing to rank: {len(query_ids)} queries, {len(gallery_ids)} gallery entries")
    unmatched = query_ids[~torch.isin(query_ids, gallery_ids)]
    if len(unmatched):
        raise RetrievalError(
            f"{len(unmatched)} of {len(query_ids)} queries have no match in the gallery, which leaves their "
            f"metrics undefined; the first is person {unmatched[0].item()}"
        )
