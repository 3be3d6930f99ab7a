"""What results are made of: recall that is fair to ties, medians with their spread, fronts, ties between subjects.

All of it is arithmetic on plain arrays, and each function is tested with numbers worked by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import SemidError
from semid_index.metrics import paired_distances
from semid_index.quantizer import Vectors
from semid_index.records import Metric

Item = TypeVar("Item")
Verdict = Literal["faster", "slower", "tie"]

_ROUNDING = 1e-5  # of a distance: float32 sums of some hundred terms differ by less
_BLOCK_ENTRIES = 1 << 24  # floats gathered at once


class WrongResultError(SemidError, ValueError):
    """A subject gave what cannot be an answer: the same id twice, an id that does not exist, too many ids."""


@dataclass(frozen=True)
class Truth:
    """The distances of the true nearest neighbours of each query, nearest first: (q, k)."""

    distances: NDArray[np.float32]

    def limits(self, k: int) -> NDArray[np.float64]:
        """How far a hit may be to be among the k nearest, as far as float32 can tell: (q,)."""
        last: NDArray[np.float64] = self.distances[:, k - 1].astype(np.float64)
        limits: NDArray[np.float64] = last + _ROUNDING * np.maximum(np.abs(last), np.abs(self.distances).mean())
        return limits


# -- recall -----------------------------------------------------------------------------------------------------------


def checked_ids(found: Sequence[NDArray[np.integer]] | NDArray[np.integer], k: int, rows: int) -> NDArray[np.int64]:
    """What a subject found, as (q, k) ids, -1 for what is missing.

    Raises :class:`WrongResultError` for an id that is given twice for one query, that is no row, or for more than k.
    """
    ids = np.full((len(found), k), -1, dtype=np.int64)
    for query, row in enumerate(found):
        if len(row) > k:
            raise WrongResultError(f"{len(row)} ids for query {query}, where {k} were asked for.")
        ids[query, : len(row)] = np.asarray(row).astype(np.int64)
    if ((ids < -1) | (ids >= rows)).any():
        query, place = np.argwhere((ids < -1) | (ids >= rows))[0]
        raise WrongResultError(f"Query {query} got the id {ids[query, place]}; ids are 0 to {rows - 1}.")
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        query, place = np.argwhere(twice)[0]
        raise WrongResultError(f"Query {query} got the id {ordered[query, place]} twice.")
    return ids


def distances_of(ids: NDArray[np.int64], queries: Vectors, vectors: Vectors, metric: Metric) -> NDArray[np.float32]:
    """The distance of each query to what it got, computed here: (q, k) ids in, (q, k) out, inf for -1."""
    found = np.full(ids.shape, np.inf, dtype=np.float32)
    block = max(1, _BLOCK_ENTRIES // (ids.shape[1] * vectors.shape[1]))
    for start in range(0, len(ids), block):
        part = ids[start : start + block]
        gathered = np.asarray(vectors[np.maximum(part, 0)])
        computed = paired_distances(queries[start : start + block], gathered, metric)
        found[start : start + block] = np.where(part >= 0, computed, np.float32(np.inf))
    return found


def recall(distances: NDArray[np.float32], truth: Truth, k: int) -> float:
    """The share of the k nearest that was found.

    A hit counts if it is no farther than the true k-th neighbour. So of two that are equally far either will do, as in
    ann-benchmarks; what is missing does not count.
    """
    hits = distances[:, :k] <= truth.limits(k)[: len(distances), None]
    return float(hits.sum() / (len(distances) * k))


# -- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The median of some values, the smallest and the largest."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return Spread(float(np.median(values)), min(values), max(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as long they take as we: the spread over rounds of their seconds by ours.

    Round i of both ran one shortly after the other, so what disturbed the machine then disturbed both.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds of one, {len(theirs)} of the other: they were not run in turn.")
    return spread([there / here for here, there in zip(ours, theirs, strict=True)])


def verdict(times: Spread) -> Verdict:
    """Faster or slower only if it was so in every round, else a tie."""
    if times.least > 1:
        return "faster"
    return "slower" if times.most < 1 else "tie"


def front(items: Sequence[Item], gain: Callable[[Item], float], cost: Callable[[Item], float]) -> list[Item]:
    """Those that nothing else beats in both gain and cost, by rising cost."""
    best: list[Item] = []
    for item in sorted(items, key=lambda item: (cost(item), -gain(item))):
        if not best or gain(item) > gain(best[-1]):
            best.append(item)
    return best


def near_front(
    items: Sequence[Item], gain: Callable[[Item], float], cost: Callable[[Item], float], *, slack: float
) -> list[Item]:
    """The front, and what costs at most ``slack`` times as much as the cheapest that gains as much."""
    best = front(items, gain, cost)
    return [
        item for item in items if cost(item) <= slack * min(cost(other) for other in best if gain(other) >= gain(item))
    ]


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent e for which seconds grow as size^e: the slope of the straight line through both logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
