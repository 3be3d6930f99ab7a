"""``balanced-rq``: residual k-means whose training clusters all have the same size.

Plain k-means leaves some codewords with several times their share of the items. Here every codeword of a level is the
mean of floor(n/K) or ceil(n/K) of the n training vectors, for a few percent of squared error.

**What is balanced.** Balance is a property of the partition in training. :meth:`BalancedResidualKMeans.encode` still
gives each vector its nearest codeword, so that one vector has one code whoever else is encoded with it; the codes are
then more even than those of ``rq``, but not exactly. Who needs a bound on every code makes the quantizer with
``capacity`` and calls :meth:`BalancedResidualKMeans.encode_within`, where a vector may have to go to its second or
third nearest codeword. Either way, an exact bound splits identical vectors once there are more of them than one
codeword may take.

**How.** Each codeword has a price, added to the squared distance to it. A round assigns every point under exact quotas
(:func:`assign_with_room`), moves each codeword to the mean of its points, then raises the price of the codewords that
more points wanted than could have them and lowers the others. Prices spread the cost of a quota over all points near a
crowded codeword, instead of leaving it to the last ones to come; since every round moves codewords by means of balanced
clusters, codewords and prices do not run away from each other, as they do when the quotas are only applied at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.quantizers.kmeans import kmeans
from semid_index.quantizers.rq import REFIT_ITERATIONS, ResidualKMeans
from semid_index.vectors import as_vectors

_START_ITERATIONS = 10  # of plain k-means, before balancing
_SAMPLE_PER_CODEWORD = 256  # prices and codewords are first learned on at most this many points for each codeword
_FULL_ROUNDS = 5  # rounds on all points, where a sample came first
_FIRST_STEP, _LAST_STEP = 0.2, 0.02  # of prices, in mean squared errors: coarse at first, then without swinging
_TILE = 1 << 21  # costs computed at once: 8 MB, which stays in the cache
_PASSES = 3  # after proposing this often on average, the points left move in groups; usual are 1.1 to 2.6


class Assignment(NamedTuple):
    """Points given to codewords under quotas."""

    codes: NDArray[np.int32]
    """The codeword of each point, (n,)."""
    wanted: NDArray[np.int64]
    """How many points would have chosen each codeword without quotas, (K,)."""


def balanced_kmeans(
    points: Vectors, k: int, *, seed: int, iterations: int = 20, report: Callable[[int, int], None] | None = None
) -> tuple[Vectors, NDArray[np.int32]]:
    """Centroids (k, dim) and assignments (n,) of (n, dim) points in clusters of floor(n/k) or ceil(n/k).

    Each centroid is the mean of its points. ``iterations`` is how often they are moved; where there are more than
    256 k points, that is done on 256 k of them chosen at random, and then up to 5 times on all. ``report`` hears after
    each move how many are done and how many there are in all. One seed gives one result.

    Raises :class:`InvalidArgumentError` unless 1 <= k <= n.
    """
    if not 1 <= k <= len(points):
        raise InvalidArgumentError(f"k must be from 1 to the number of points, {len(points)}, not {k}.")
    sampled = len(points) > _SAMPLE_PER_CODEWORD * k
    full_rounds = min(_FULL_ROUNDS, iterations) if sampled else iterations
    schedule = _Schedule(1 + sampled * iterations + full_rounds, report)

    market = _Market(kmeans(points, k, seed=seed, iterations=min(_START_ITERATIONS, iterations)))
    schedule.advance()
    if sampled:
        sample = np.random.default_rng(seed).choice(len(points), _SAMPLE_PER_CODEWORD * k, replace=False, shuffle=False)
        market.balance(points[np.sort(sample)], iterations, schedule)
    best = market.balance(points, full_rounds, schedule)
    return best.centroids, best.codes


def assign_with_room(
    points: Vectors, codebook: Vectors, room: NDArray[np.int64], prices: NDArray[np.float64] | None = None
) -> Assignment:
    """Each of (n, dim) points to the nearest codeword (K, dim) that has room for it.

    ``room`` (K,) says how many points each codeword may take: in all n or more; below 0 is as good as 0.

    Every point proposes to the codeword that costs it least (squared distance plus price) among those with room. A
    codeword with too many proposals takes those that would lose most by going to their second choice; the others
    propose again. The few points that are still without a codeword after about 3 proposals for each of the n go in
    groups: those turned away by the same codeword together to the codewords nearest to their mean. Without that,
    identical points could fill one codeword in each of K rounds.

    Raises :class:`InvalidArgumentError` when there is not room for all.
    """
    room = np.maximum(room, 0)
    if room.sum() < len(points):
        raise InvalidArgumentError(f"{len(points)} points do not fit: there is room for {room.sum()} in all.")
    offsets = _offsets(codebook, prices)
    codes = np.empty(len(points), dtype=np.int32)
    wanted = np.zeros(len(codebook), dtype=np.int64)
    left = np.arange(len(points))
    proposals = 0
    while len(left) and proposals <= _PASSES * len(points):
        choice, regret = _propose(points, left, codebook, offsets, np.flatnonzero(room > 0))
        if not proposals:
            wanted = np.bincount(choice, minlength=len(codebook))
        proposals += len(left)
        kept = _most_regretful(choice, regret, room)
        codes[left[kept]] = choice[kept]
        room -= np.bincount(choice[kept], minlength=len(codebook))
        left, turned_away_by = left[~kept], choice[~kept]
    if len(left):
        _move_in_groups(points, left, turned_away_by, codebook, offsets, room, codes)
    return Assignment(codes, wanted)


class BalancedResidualKMeans(ResidualKMeans):
    """Residual k-means trained in clusters of equal size: ``levels`` codebooks of ``codebook_size`` words each.

    ``codebook_size`` may be a list, one size for each level. ``capacity`` (1 or more) is for :meth:`encode_within`: how
    many times its even share one code may have; 1.05 allows 5 % more. ``iterations`` is how often the codewords of a
    level are moved. The other options are those of ``rq``; refining moves codewords off the means of equal clusters, so
    codes are a little less even after it. With ``capacity``, encoding is greedy.
    """

    name: ClassVar[str] = "balanced-rq"

    def __init__(
        self,
        levels: int = 4,
        codebook_size: int | Sequence[int] = 256,
        *,
        capacity: float | None = None,
        iterations: int = 20,
        beam: int = 1,
        prefix_levels: int = 0,
        prefix_beam: int = 1,
        refine: int = 0,
        normalize_residuals: bool = False,
    ) -> None:
        super().__init__(
            levels,
            codebook_size,
            iterations=iterations,
            beam=beam,
            prefix_levels=prefix_levels,
            prefix_beam=prefix_beam,
            refine=refine,
            normalize_residuals=normalize_residuals,
        )
        self.capacity = None if capacity is None else _checked_capacity(capacity)
        if capacity is not None and (self.beam > 1 or self.prefix_beam > 1 or self.normalize_residuals):
            raise InvalidArgumentError(
                "With a capacity, vectors are encoded greedily: leave out beam, prefix_beam and normalize_residuals."
            )

    def _train_level(self, residuals: Vectors, size: int, seed: int, report: Callable[[int, int], None]) -> Vectors:
        """The means of balanced clusters: (size, dim)."""
        centroids, _ = balanced_kmeans(residuals, size, seed=seed, iterations=self.iterations, report=report)
        return centroids

    def _continue_level(
        self, residuals: Vectors, start: Vectors, seed: int, report: Callable[[int, int], None]
    ) -> Vectors:
        """The means of balanced clusters near to earlier ones: (size, dim)."""
        return _Market(start).balance(residuals, REFIT_ITERATIONS, _Schedule(REFIT_ITERATIONS, report)).centroids

    def encode_within(self, vectors: Vectors, counts: Sequence[NDArray[np.int64]]) -> Codes:
        """The codes (n, levels) of a batch (n, dim), such that no code of any level gets more than its capacity.

        ``counts[l]`` (K_l,) says how many items have each code of level l already; add the new codes to it before the
        next batch, as it is not changed here. A code of level l may have at most ``ceil(capacity * items / K_l)``
        items, these n included; one that has more already takes no further ones. A vector whose nearest codeword is
        full gets the nearest with room, and the next level encodes what that leaves over. So the codes of a vector
        depend on its batch and on the batches before it.

        Raises :class:`InvalidArgumentError` if the quantizer was made without ``capacity``, or ``counts`` do not fit.
        """
        codebooks = self._trained()
        if self.capacity is None:
            raise InvalidArgumentError(
                "encode_within needs a capacity, and this quantizer has none. Make it with capacity=1.05, for example."
            )
        residuals = as_vectors(vectors, dim=codebooks[0].shape[1]).copy()
        codes = np.empty((len(residuals), self.levels), dtype=np.int32)
        for level, (codebook, taken) in enumerate(zip(codebooks, self._checked_counts(counts), strict=True)):
            limit = math.ceil(self.capacity * (int(taken.sum()) + len(residuals)) / len(codebook))
            chosen = assign_with_room(residuals, codebook, limit - taken).codes
            codes[:, level] = chosen
            residuals -= codebook[chosen]
        return codes

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {**super().get_config(), "capacity": self.capacity}

    def _checked_counts(self, counts: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        arrays = [np.asarray(taken) for taken in counts]
        if [taken.shape for taken in arrays] != [(size,) for size in self.codebook_sizes]:
            raise InvalidArgumentError(
                f"counts must be {self.levels} arrays of lengths {list(self.codebook_sizes)}, "
                f"not of shapes {[taken.shape for taken in arrays]}. Start with zeros."
            )
        if not all(taken.dtype.kind in "iu" and (taken >= 0).all() for taken in arrays):
            raise InvalidArgumentError("counts must be whole numbers, 0 or more: how many items have each code.")
        return [taken.astype(np.int64) for taken in arrays]


class _Partition(NamedTuple):
    """Points in clusters of equal size, and the mean of each."""

    centroids: Vectors
    codes: NDArray[np.int32]
    error: float  # sum of squared distances to the centroids


class _Market:
    """Codewords and their prices, which move round by round."""

    def __init__(self, centroids: Vectors) -> None:
        self.centroids = centroids
        self.prices = np.zeros(len(centroids))
        self.wanted = np.zeros(len(centroids), dtype=np.int64)

    def balance(self, points: Vectors, rounds: int, schedule: _Schedule) -> _Partition:
        """The best partition of so many rounds over the points."""
        squares = float(np.einsum("nd,nd->", points, points, dtype=np.float64))
        best = _Partition(self.centroids, np.empty(0, dtype=np.int32), np.inf)
        for _ in range(rounds):
            best = min(best, self._round(points, squares, schedule.price_step), key=lambda each: each.error)
            schedule.advance()
        return best

    def _round(self, points: Vectors, squares: float, price_step: float) -> _Partition:
        quotas = _quotas(len(points), self.wanted)
        # 1. assign at today's prices
        codes, self.wanted = assign_with_room(points, self.centroids, quotas, self.prices)
        # 2. move the codewords; a cluster's error is its sum of |x|^2 less its size times |mean|^2
        means = _means(points, codes, len(quotas))
        error = max(squares - float(quotas @ np.square(means).sum(axis=1)), 0.0)
        self.centroids = means.astype(np.float32)
        # 3. let prices follow demand
        excess = np.clip((self.wanted - quotas) / quotas, -1, 1)
        self.prices = self.prices + price_step * error / len(points) * excess
        return _Partition(self.centroids, codes, error)


class _Schedule:
    """Counts the moves done, reports each, and says how far prices may move next."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.done = 0
        self.total = total
        self.report = report

    @property
    def price_step(self) -> float:
        """A geometric fall from the first step to the last."""
        return float(_FIRST_STEP * (_LAST_STEP / _FIRST_STEP) ** (self.done / self.total))

    def advance(self) -> None:
        """One more move is done."""
        self.done += 1
        if self.report is not None:
            self.report(self.done, self.total)


def _quotas(n: int, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """floor(n/K) points for each of the K codewords, one more for those that were wanted most."""
    quotas = np.full(len(wanted), n // len(wanted), dtype=np.int64)
    quotas[np.argsort(-wanted, kind="stable")[: n % len(wanted)]] += 1
    return quotas


def _means(points: Vectors, codes: NDArray[np.int32], k: int) -> NDArray[np.float64]:
    """The mean of each cluster, none of them empty: (k, dim)."""
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=k))[:-1]
    return np.array([points[members].mean(axis=0, dtype=np.float64) for members in np.split(order, ends)])


def _offsets(codebook: Vectors, prices: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """What a codeword costs apart from -2 x.c: |c|^2 and its price. |x|^2 is left out, being the same for all: (K,)."""
    squares: NDArray[np.float64] = np.square(codebook, dtype=np.float64).sum(axis=1)
    costs: NDArray[np.float64] = squares if prices is None else squares + prices
    return costs.astype(np.float32)


def _propose(
    points: Vectors, rows: NDArray[np.int64], codebook: Vectors, offsets: NDArray[np.float32], open_: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each row, the cheapest of the open codewords, and how much more the second cheapest costs: both (rows,)."""
    choice = np.empty(len(rows), dtype=np.int64)
    regret = np.zeros(len(rows), dtype=np.float32)  # stays 0 when only one codeword is open
    weights = np.ascontiguousarray(-2 * codebook[open_].T)
    tile = max(1, _TILE // max(weights.shape))
    for start in range(0, len(rows), tile):
        here = slice(start, start + tile)
        costs = points[rows[here]] @ weights
        costs += offsets[open_]
        each = np.arange(len(costs))
        first = costs.argmin(axis=1)
        choice[here] = open_[first]
        if len(open_) > 1:
            lowest = costs[each, first]
            costs[each, first] = np.inf
            regret[here] = costs[each, costs.argmin(axis=1)] - lowest
    return choice, regret


def _most_regretful(
    choice: NDArray[np.int64], regret: NDArray[np.float32], room: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which proposals are accepted: for each codeword the ``room`` ones of greatest regret."""
    order = np.lexsort((-regret, choice))
    proposed = np.bincount(choice, minlength=len(room))
    place = np.arange(len(order)) - (np.cumsum(proposed) - proposed)[choice[order]]
    accepted = np.empty(len(order), dtype=np.bool_)
    accepted[order] = place < room[choice[order]]
    return accepted


def _move_in_groups(
    points: Vectors,
    rows: NDArray[np.int64],
    group: NDArray[np.int64],
    codebook: Vectors,
    offsets: NDArray[np.float32],
    room: NDArray[np.int64],
    codes: NDArray[np.int32],
) -> None:
    """Give each group of rows the codewords nearest to its mean, as many as it needs; fills ``room`` and ``codes``."""
    order = np.argsort(group, kind="stable")
    for members in np.split(rows[order], np.flatnonzero(np.diff(group[order])) + 1):
        costs = offsets - 2 * (codebook @ points[members].mean(axis=0))
        by_cost = np.argsort(costs, kind="stable")
        taken = np.diff(np.minimum(np.cumsum(room[by_cost]), len(members)), prepend=0)
        codes[members] = np.repeat(by_cost, taken)
        room[by_cost] -= taken


def _checked_capacity(capacity: float) -> float:
    if isinstance(capacity, bool) or not isinstance(capacity, int | float) or not 1 <= capacity < math.inf:
        raise InvalidArgumentError(
            f"capacity must be a number of 1 or more (1.05: 5 % more than an even share) or None, not {capacity!r}."
        )
    return float(capacity)


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``balanced-rq``."""
    register(BalancedResidualKMeans)
