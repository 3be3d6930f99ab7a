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
    """Every distance from (q, dim) queries to (n, dim) vectors: (q, n)."""
    if metric == "cosine":
        similar: NDArray[np.float32] = normalized(queries) @ normalized(vectors).T
        return np.clip(1 - similar, 0, 2, out=similar)
    dots: NDArray[np.float32] = queries @ vectors.T
    if metric == "ip":
        return -dots
    # |q - x|^2 = |q|^2 - 2 q.x + |x|^2, in place; clipped because rounding can give -1e-7
    dots *= -2
    dots += np.einsum("ij,ij->i", queries, queries)[:, None]
    dots += np.einsum("ij,ij->i", vectors, vectors)[None, :]
    return np.sqrt(np.maximum(dots, 0, out=dots), out=dots)


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

    Ties are broken by row number.
    """
    k = min(k, len(vectors))
    rows = np.empty((len(queries), k), dtype=np.int64)
    nearest = np.empty((len(queries), k), dtype=np.float32)
    block = max(1, _BLOCK_ENTRIES // max(1, len(vectors)))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        all_distances = distances(queries[part], vectors, metric)
        rows[part] = smallest_columns(all_distances, k)
        nearest[part] = np.take_along_axis(all_distances, rows[part], axis=1)
    return rows, nearest


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
