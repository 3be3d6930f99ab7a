"""Exact distances: the oracle that every approximate path is compared with.

Smaller is nearer for every metric, and the values are those of DuckDB, so that Python and SQL agree:

====== ===================================== =============================
metric distance                              DuckDB
====== ===================================== =============================
l2     ``sqrt(sum((q - x)^2))``, not squared ``array_distance``
cosine ``1 - q.x / (|q| |x|)``               ``array_cosine_distance``
ip     ``-q.x``                              ``array_negative_inner_product``
====== ===================================== =============================

FAISS and hnswlib return squared l2 distances, and similarities for the other two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError
from semid_index.quantizer import Vectors
from semid_index.records import Metric

METRICS: tuple[Metric, ...] = ("l2", "cosine", "ip")
SQL_FUNCTIONS: dict[Metric, str] = {
    "l2": "array_distance",
    "cosine": "array_cosine_distance",
    "ip": "array_negative_inner_product",
}
_BLOCK_ENTRIES = 16_000_000  # distances held at once: 64 MB
_TILE_BYTES = 16 << 20  # vectors copied at once
_SAMPLE = 256  # vectors, or up to twice as many, that tell how far from zero all of them lie
_FAR = 3  # from here on, in squared lengths, the copy that moves vectors to zero spares more than it costs


def check_metric(metric: str) -> Metric:
    """The metric, if there is one of this name."""
    for known in METRICS:
        if metric == known:
            return known
    raise InvalidArgumentError(f"No metric '{metric}'. Use one of {', '.join(METRICS)}.")


def normalized(vectors: Vectors) -> Vectors:
    """The vectors at length 1; a zero vector stays zero."""
    return vectors / divisors(vectors)[:, None]


def comparable(vectors: Vectors, metric: Metric) -> Vectors:
    """Vectors as they are encoded, and compared with what codes decode to: at length 1 under cosine."""
    return normalized(vectors) if metric == "cosine" else vectors


def divisors(vectors: Vectors) -> NDArray[np.float32]:
    """What vectors (n, dim) are divided by to be at length 1: (n,); a zero vector by 1."""
    lengths: NDArray[np.float32] = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    if not lengths.all():
        lengths[lengths == 0] = 1
    return lengths


def distances(queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float32]:
    """Every distance from (q, dim) queries to (n, dim) vectors: (q, n), by products of matrices."""
    if metric == "cosine":
        similar: NDArray[np.float32] = normalized(queries) @ normalized(vectors).T
        return np.clip(1 - similar, 0, 2, out=similar)
    if metric == "ip":
        return -(queries @ vectors.T)
    squares = _squares(queries, vectors)
    return np.sqrt(np.maximum(squares, 0, out=squares), out=squares)  # rounding can give -1e-7


def paired_distances(queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float32]:
    """The distance of each query to the vectors that stand beside it: (q, dim) and (q, r, dim) in, (q, r) out.

    Computed from differences, without the cancellation that :func:`distances` has for near-identical vectors.
    """
    if metric == "l2":
        differences = vectors - queries[:, None, :]
        squares: NDArray[np.float32] = np.einsum("qrd,qrd->qr", differences, differences)
        return np.sqrt(squares, out=squares)
    dots: NDArray[np.float32] = np.matmul(vectors, queries[:, :, None])[:, :, 0]
    if metric == "ip":
        return -dots
    squared = np.einsum("qrd,qrd->qr", vectors, vectors) * np.einsum("qd,qd->q", queries, queries)[:, None]
    dots /= np.sqrt(squared)
    return np.clip(1 - dots, 0, 2, out=dots)


def exact_search(
    queries: Vectors, vectors: Vectors, k: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Brute force: the rows and distances of the min(k, n) nearest vectors, each (q, min(k, n)), nearest first.

    Ties are broken by row number. Under l2 distances are those of :func:`paired_distances`, and so is the choice.
    """
    k = min(k, len(vectors))
    rows = np.empty((len(queries), k), dtype=np.int64)
    nearest = np.empty((len(queries), k), dtype=np.float32)
    block = max(1, _BLOCK_ENTRIES // max(1, len(vectors)))
    for start in range(0, len(queries) if k else 0, block):
        part = slice(start, start + block)
        if metric == "l2":
            rows[part], nearest[part] = _nearest_by_differences(queries[part], vectors, k)
        else:
            all_distances = distances(queries[part], vectors, metric)
            rows[part] = smallest_columns(all_distances, k)
            nearest[part] = np.take_along_axis(all_distances, rows[part], axis=1)
    return rows, nearest


def _nearest_by_differences(
    queries: Vectors, vectors: Vectors, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest of some vectors under l2, which :func:`paired_distances` decides, however far from zero all lie.

    Products of matrices leave few in doubt: of most vectors they tell that k others are nearer, whatever was rounded.
    """
    # Each of dim products and sums is rounded by half of eps, and so are a few sums and differences around them. So
    # squared differences by products err by less than this times |q|^2 + |x|^2, and true ones by less times themselves.
    rounding = (vectors.shape[1] + 8) * float(np.finfo(np.float32).eps)
    at_least = _squares(queries, vectors, share=1 - rounding)
    kth = np.partition(at_least, k - 1, axis=1)[:, k - 1]
    rows = np.stack([np.flatnonzero(row <= last)[:k] for row, last in zip(at_least, kth, strict=True)])
    found = np.empty(rows.shape, dtype=np.float32)
    tile = max(1, _TILE_BYTES // (4 * k * vectors.shape[1]))
    for start in range(0, len(queries), tile):
        part = slice(start, start + tile)
        found[part] = paired_distances(queries[part], vectors[rows[part]], "l2")
    in_doubt = at_least <= np.square(found.max(axis=1, keepdims=True)) * np.float32(1 + rounding)
    np.put_along_axis(in_doubt, rows, values=False, axis=1)
    order = np.argsort(found, axis=1, kind="stable")
    rows, found = np.take_along_axis(rows, order, axis=1), np.take_along_axis(found, order, axis=1)
    for i in np.flatnonzero(in_doubt.any(axis=1)):
        others = np.flatnonzero(in_doubt[i])
        near = np.append(found[i], paired_distances(queries[i : i + 1], vectors[others][None], "l2"))
        columns = np.append(rows[i], others)
        best = np.lexsort((columns, near))[:k]
        rows[i], found[i] = columns[best], near[best]
    return rows, found


def _squares(queries: Vectors, vectors: Vectors, share: float = 1.0) -> NDArray[np.float32]:
    """Squared differences as |q|^2 - 2 q.x + |x|^2: (q, n), not exact. ``share``: how much of the squares is added.

    If most of each vector is common to all, that is taken from them and from the queries: no difference changes, and
    less is rounded away.
    """
    common = _common_part(vectors)
    squares = np.empty((len(queries), len(vectors)), dtype=np.float32)
    tile = max(1, len(vectors))
    if common is not None:
        queries = queries - common
        tile = max(1, _TILE_BYTES // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), tile):
        part = slice(start, start + tile)
        rows = vectors[part] if common is None else vectors[part] - common
        np.matmul(np.float32(-2) * queries, rows.T, out=squares[:, part])
        squares[:, part] += np.float32(share) * np.einsum("ij,ij->i", rows, rows)
    squares += np.float32(share) * np.einsum("ij,ij->i", queries, queries)[:, None]
    return squares


def _common_part(vectors: Vectors) -> Vectors | None:
    """The mean (dim,) of a sample of vectors, if they lie farther from zero than from each other; else None."""
    sample = vectors[:: max(1, len(vectors) // _SAMPLE)]
    if not len(sample):
        return None
    mean: Vectors = sample.mean(axis=0, dtype=np.float32)
    spread = np.square(sample - mean).sum(dtype=np.float64) / len(sample)
    return mean if np.square(mean).sum() > _FAR * spread else None


def smallest_columns(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Column numbers of the k smallest values of each row, in order, ties by column."""
    if k < values.shape[1]:
        columns = np.sort(np.argpartition(values, k - 1, axis=1)[:, :k], axis=1)
        last = np.take_along_axis(values, columns, axis=1).max(axis=1, initial=-np.inf, keepdims=True)
        # Where more than k are as small as the k-th, argpartition took any of those that tie.
        for row in np.flatnonzero((values <= last).sum(axis=1) > k):
            columns[row] = np.sort(np.argsort(values[row], kind="stable")[:k])
    else:
        columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(np.take_along_axis(values, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
