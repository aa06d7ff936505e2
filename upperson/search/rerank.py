"""Re-ranking by k-reciprocal neighbours (Zhong et al. 2017, arXiv 1701.08398).

Two images that have each other among their nearest neighbours are more likely of one person than one near the other
alone. Each image is described by its k-reciprocal neighbours, and compared by the Jaccard distance of these sets.
"""

import numpy as np

K1, K2, LAMBDA = 20, 6, 0.3  # the values of the paper
BEST = 200  # images that are ranked again


def rerank(distances: np.ndarray, k1: int = K1, k2: int = K2, weight: float = LAMBDA) -> np.ndarray:
    """(N,) float64: the final distance d* of the query to each of N images.

    Args:
        distances: (N + 1, N + 1), of the query, which comes first, and the images, among each other.
        k1, k2: numbers of neighbours for the sets and for their expansion.
        weight: lambda, the share of the original distance.
    """
    distances = np.asarray(distances, np.float64)
    itself = np.eye(len(distances), dtype=bool)
    order = np.argsort(np.where(itself, -np.inf, distances), axis=1, kind="stable")  # each is its own first neighbour
    sets, halves = reciprocal_sets(order, k1), reciprocal_sets(order, round(k1 / 2))
    shared = sets.astype(np.float32) @ halves.T.astype(np.float32)  # |R(p, k1) & R(q, k1 / 2)|
    joined = sets & (3 * shared >= 2 * halves.sum(1))  # the q of p whose halves are joined
    larger = sets | (joined.astype(np.float32) @ halves.astype(np.float32) > 0)  # R* of the paper
    vectors = np.where(larger, np.exp(-distances), 0.0)  # V of the paper
    vectors = vectors[order[:, :k2]].mean(1)  # the paper's local query expansion
    inner = np.minimum(vectors[0], vectors[1:]).sum(1)  # the Jaccard distance of weighted sets
    outer = np.maximum(vectors[0], vectors[1:]).sum(1)
    return (1 - weight) * (1 - inner / outer) + weight * distances[0, 1:]


def reciprocal_sets(order: np.ndarray, k: int) -> np.ndarray:
    """(M, M) bool: R(p, k) of each row p, the images that have p among their k nearest, and are among those of p.

    `order` are the neighbours of each row, itself first; so k neighbours are the first k + 1, as in the
    authors' program.
    """
    near = np.zeros(order.shape, bool)
    np.put_along_axis(near, order[:, : k + 1], True, axis=1)
    return near & near.T


def distances_of(similarities: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(N + 1, N + 1): cosine distances of a query and N images, from its similarities (N,) and their vectors (N, E)."""
    whole = np.ones((len(vectors) + 1, len(vectors) + 1))
    whole[1:, 1:] = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    whole[0, 1:] = whole[1:, 0] = similarities
    return np.maximum(1 - whole, 0)
