"""Query -> scored leaves -> probes, widened until there are enough candidates.

A *leaf* is a contiguous range of sids whose items are searched together. Leaves come from splitting: all items are one
range; a range with too many items is halved by the next bit of the sid, again and again. Because codewords are numbered
so that the leading bits of a code name a compact group of codewords, a leaf is a compact region too: dense regions end
up with long prefixes, sparse ones with short prefixes, and all leaves hold about the same number of items.

A leaf is represented by the sum of one *word* per level that its prefix reaches: the codeword where the prefix has all
bits of the level, the mean of the codewords that are left where it has only the first bits. So one matrix product of
queries and words, and a few additions per leaf, score every leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import CodeLayout
from semid_index.quantizer import Vectors
from semid_index.records import Metric

_TILE = 64  # queries scored at once: 64 x 5,000 leaves x 4 bytes stays in the cache
_SUM_BLOCK = 8_192  # leaves whose representatives are summed at once


@dataclass(frozen=True)
class Leaves:
    """All non-empty leaves, in the order of their sids."""

    layout: CodeLayout
    lowest: NDArray[np.int64]
    """(n_leaves,) the lowest sid that belongs to each leaf."""
    bits: NDArray[np.int64]
    """(n_leaves,) how many leading bits of the sid the items of a leaf share by definition."""
    starts: NDArray[np.int64]
    """(n_leaves + 1,) leaf i holds the items ``starts[i]`` to ``starts[i + 1]`` of all items sorted by sid."""

    def __len__(self) -> int:
        return len(self.lowest)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Items in each leaf."""
        return np.diff(self.starts)

    def text(self, leaf: int) -> str:
        """The prefix of a leaf, such as ``12-153-*``, or ``12-(64..127)-*`` where it ends inside a level."""
        if leaf not in self._texts:
            self._texts[leaf] = self._written(leaf)
        return self._texts[leaf]

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {}

    def _written(self, leaf: int) -> str:
        left = int(self.bits[leaf])
        parts: list[str] = []
        for shift, bits, size in zip(self.layout.shifts, self.layout.bits, self.layout.codebook_sizes, strict=False):
            if left <= 0:
                break
            code = (int(self.lowest[leaf]) >> shift) & ((1 << bits) - 1)
            last = min(code + (1 << max(bits - left, 0)), size) - 1
            parts.append(str(code) if left >= bits or last == code else f"({code}..{last})")
            left -= bits
        return "-".join([*parts, "*"]) if len(parts) < self.layout.levels else "-".join(parts)


def make_leaves(sids: NDArray[np.int64], layout: CodeLayout, leaf_size: int) -> Leaves:
    """Split sorted sids (n,) into leaves of at most ``leaf_size`` items; more only where items share a whole sid."""
    lowest = np.zeros(1, dtype=np.int64)
    starts = np.zeros(1, dtype=np.int64)
    ends = np.array([len(sids)], dtype=np.int64)
    done: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]] = []
    for bits in range(layout.sid_bits + 1):
        small = (ends - starts <= leaf_size) if bits < layout.sid_bits else np.ones(len(lowest), dtype=bool)
        done.append((lowest[small], starts[small], ends[small], bits))
        lowest, starts, ends = lowest[~small], starts[~small], ends[~small]
        if not len(lowest):
            break
        upper = lowest + (1 << (layout.sid_bits - bits - 1))
        middles = np.searchsorted(sids, upper)
        lowest = np.concatenate([lowest, upper])
        starts, ends = np.concatenate([starts, middles]), np.concatenate([middles, ends])
        filled = ends > starts
        lowest, starts, ends = lowest[filled], starts[filled], ends[filled]
    depth = np.concatenate([np.full(len(part[0]), part[3], dtype=np.int64) for part in done])
    all_starts = np.concatenate([part[1] for part in done])
    order = np.argsort(all_starts, kind="stable")
    return Leaves(
        layout,
        np.concatenate([part[0] for part in done])[order],
        depth[order],
        np.append(all_starts[order], len(sids)),
    )


def whole_index(n: int, layout: CodeLayout) -> Leaves:
    """One leaf with everything, for codes that are not a hierarchy."""
    return Leaves(layout, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.array([0, n], dtype=np.int64))


_SPARSE = 8  # from so many row numbers per item on, places are searched for instead of looked up


class Places:
    """Where the items are: from their rows, the numbers they were given when added, to their positions."""

    def __init__(self, rows: NDArray[np.int64], span: range) -> None:
        """``rows`` (n,): the row of the item at each position. ``span``: has all of them, and may have many more."""
        self.count, self.span = len(rows), span
        self._order: NDArray[np.int64] | None = None
        if len(span) > _SPARSE * len(rows):
            self._order = np.argsort(rows)
            self._table = rows[self._order]
        else:
            self._table = np.full(len(span), -1, dtype=np.int64)
            self._table[rows - span.start] = np.arange(len(rows))

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The position of the item with each row; -1 where there is none."""
        inside = (rows >= self.span.start) & (rows < self.span.stop)
        if not self.count:
            return np.full(len(rows), -1, dtype=np.int64)
        if self._order is None:
            return np.where(inside, self._table[np.where(inside, rows - self.span.start, 0)], -1)
        found = np.minimum(np.searchsorted(self._table, rows), self.count - 1)
        return np.where(self._table[found] == rows, self._order[found], -1)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._table.nbytes + (0 if self._order is None else self._order.nbytes)


@dataclass(frozen=True)
class Matches:
    """The items that a filter lets through."""

    allowed: NDArray[np.bool_]
    """(n,) for each position, whether the item there is one of them."""
    positions: NDArray[np.int64]
    """(m,) their positions, in order."""
    starts: NDArray[np.int64]
    """(n_leaves + 1,) leaf i holds ``positions[starts[i]]`` to ``positions[starts[i + 1]]``, the last one not."""

    @classmethod
    def among(cls, leaves: Leaves, allowed: NDArray[np.bool_]) -> Matches:
        """Those that are allowed."""
        positions = np.flatnonzero(allowed)
        return cls(allowed, positions, np.searchsorted(positions, leaves.starts))

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(n_leaves,) how many each leaf holds."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class LeafScorer:
    """Scores leaves for queries: the smaller, the nearer.

    ``score = constants[leaf] + sum(factor * query . words[term])`` over the terms of the leaf, which is
    ``|x|^2 - 2 q.x`` for l2 and cosine (vectors of length 1), and ``-q.x`` for ip, x being the sum of the leaf's words.
    """

    words: Vectors
    """(m, dim)"""
    terms: tuple[tuple[NDArray[np.intp] | None, NDArray[np.intp]], ...]
    """For each level: the leaves that have a word at this level (None: all), and the number of the word."""
    constants: NDArray[np.float32]
    """(n_leaves,)"""
    factor: float

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        numbers = sum(array.nbytes for term in self.terms for array in term if array is not None)
        scaled = self._scaled_words.nbytes if "_scaled_words" in vars(self) else 0  # only searches in steps need them
        return self.words.nbytes + scaled + numbers + self.constants.nbytes

    def table(self, queries: Vectors) -> NDArray[np.float32]:
        """Each query times each word: (q, m)."""
        products: NDArray[np.float32] = queries @ self._scaled_words
        return products

    def scores(self, table: NDArray[np.float32]) -> NDArray[np.float32]:
        """The score of every leaf, from rows of the table: (q, m) in, (q, n_leaves) out. Additions only."""
        scores = np.empty((len(table), len(self.constants)), dtype=np.float32)
        scores[:] = self.constants
        for leaves, words in self.terms:
            if leaves is None:
                scores += np.take(table, words, axis=1)
            else:
                scores[:, leaves] += np.take(table, words, axis=1)
        return scores

    @cached_property
    def _scaled_words(self) -> NDArray[np.float32]:
        return np.ascontiguousarray(np.float32(self.factor) * self.words.T)

    def distances(self, query: Vectors, scores: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
        """Scores of one query as distances of the metric."""
        if metric == "ip":
            return scores
        squared: NDArray[np.float32] = np.maximum(scores + query @ query, np.float32(0))
        return squared / np.float32(2) if metric == "cosine" else np.sqrt(squared)


def additive_scorer(leaves: Leaves, codebooks: list[Vectors], sids: NDArray[np.int64], metric: Metric) -> LeafScorer:
    """A scorer by look-up tables, for quantizers whose decoded vector is a sum of codewords."""
    layout = leaves.layout
    words: list[Vectors] = []
    terms: list[tuple[NDArray[np.intp] | None, NDArray[np.intp]]] = []
    representatives = np.zeros((len(leaves), codebooks[0].shape[1]), dtype=np.float32)
    offset, first_bit = 0, 0
    for level, (shift, bits) in enumerate(zip(layout.shifts, layout.bits, strict=False)):
        reached = np.flatnonzero(leaves.bits > first_bit)
        if not len(reached):
            break
        known = np.minimum(leaves.bits[reached] - first_bit, bits)  # leading bits of this level that the leaf fixes
        codes = (leaves.lowest[reached] >> shift) & ((1 << bits) - 1)
        groups, term = np.unique((1 << known) + (codes >> (bits - known)), return_inverse=True)
        frequencies = np.bincount((sids >> shift) & ((1 << bits) - 1), minlength=1 << bits)
        level_words = _group_means(codebooks[level], frequencies[: len(codebooks[level])], groups, bits)
        for block in range(0, len(reached), _SUM_BLOCK):
            part = slice(block, block + _SUM_BLOCK)
            representatives[reached[part]] += level_words[term[part]]
        terms.append((None if len(reached) == len(leaves) else reached, term.astype(np.intp) + offset))
        words.append(level_words)
        offset += len(groups)
        first_bit += bits
    all_words = np.concatenate(words) if words else np.zeros((1, codebooks[0].shape[1]), dtype=np.float32)
    return LeafScorer(all_words, tuple(terms), *_constants(representatives, metric))


def centroid_scorer(
    leaves: Leaves, decode_positions: Callable[[NDArray[np.int64]], Vectors], metric: Metric, *, per_leaf: int = 64
) -> LeafScorer:
    """A scorer for any other quantizer: each leaf by the mean of (at most ``per_leaf`` of) its decoded items."""
    centroids: list[Vectors] = []
    for start, end in zip(leaves.starts[:-1], leaves.starts[1:], strict=True):
        positions = np.unique(np.linspace(start, end - 1, min(per_leaf, end - start)).astype(np.int64))
        decoded = decode_positions(positions)
        centroids.append(decoded.sum(axis=0) / max(len(decoded), 1))  # of no items, as an empty index has them: zeros
    words = np.array(centroids, dtype=np.float32)
    return LeafScorer(words, ((None, np.arange(len(leaves), dtype=np.intp)),), *_constants(words, metric))


@dataclass(frozen=True)
class Probes:
    """The leaves to open for each query, best first, padded with -1."""

    leaves: NDArray[np.int64]
    """(q, p)"""
    scores: NDArray[np.float32]
    """(q, p)"""
    candidates: NDArray[np.int64]
    """(q,) items in the leaves to open (of those that a filter allows)."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """(q,) leaves to open."""
        counts: NDArray[np.int64] = (self.leaves >= 0).sum(axis=1)
        return counts

    def of(self, queries: NDArray[np.int64]) -> Probes:
        """Those of some of the queries."""
        return Probes(self.leaves[queries], self.scores[queries], self.candidates[queries])


def choose_probes(
    scorer: LeafScorer,
    queries: Vectors,
    items: NDArray[np.int64],
    *,
    at_least: int,
    budget: int,
    probes: int | None,
    threads: int = 1,
) -> Probes:
    """The best leaves for each query.

    ``items`` (n_leaves,) says how many items of a leaf count; leaves with none are never opened. Leaves are opened
    until they hold ``budget`` items or, if ``probes`` is given, until there are so many leaves; in either case until
    they hold ``at_least`` items, or all.
    """
    open_leaves = np.flatnonzero(items > 0)
    everything = len(open_leaves) == len(items)
    sizes = items[open_leaves]
    goal = min(max(at_least, 0 if probes else budget), int(sizes.sum()))

    table = scorer.table(queries)

    def choose(start: int) -> Probes:
        scores = scorer.scores(table[start : start + _TILE])
        return _best_leaves(scores if everything else scores[:, open_leaves], sizes, goal, probes or 1)

    starts = range(0, len(queries), _TILE)
    if threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter while it gathers and selects
            tiles = list(pool.map(choose, starts))
    else:
        tiles = [choose(start) for start in starts]
    width = max(tile.leaves.shape[1] for tile in tiles)
    chosen = np.concatenate([_padded(tile.leaves, width, -1) for tile in tiles])
    leaves = chosen if everything else np.where(chosen >= 0, open_leaves[chosen], -1)
    scores = np.concatenate([_padded(tile.scores, width, np.inf) for tile in tiles])
    return Probes(leaves, scores, np.concatenate([tile.candidates for tile in tiles]))


def _best_leaves(scores: NDArray[np.float32], sizes: NDArray[np.int64], goal: int, at_least: int) -> Probes:
    """For each row, the leaves with the smallest scores: at least so many, and until their sizes sum up to ``goal``."""
    n = scores.shape[1]
    wanted = min(n, max(at_least, int(1.25 * goal / sizes.mean()) + 2))
    while True:
        if wanted < n:
            best = np.argpartition(scores, wanted - 1, axis=1)[:, :wanted]
        else:
            best = np.broadcast_to(np.arange(n), scores.shape)
        best_scores = np.take_along_axis(scores, best, axis=1)
        order = np.argsort(best_scores, axis=1, kind="stable")
        best, best_scores = np.take_along_axis(best, order, axis=1), np.take_along_axis(best_scores, order, axis=1)
        held = np.cumsum(sizes[best], axis=1)
        if wanted == n or held[:, -1].min() >= goal:
            break
        wanted = min(n, 2 * wanted)  # the near leaves of some query are small: look at more
    needed = np.maximum((held < goal).sum(axis=1) + 1, min(at_least, n))
    width = int(needed.max())
    opened = np.arange(width) < needed[:, None]
    return Probes(
        np.where(opened, best[:, :width], -1),
        np.where(opened, best_scores[:, :width], np.float32(np.inf)),
        np.take_along_axis(held, needed[:, None] - 1, axis=1)[:, 0],
    )


def _padded(array: NDArray[np.generic], width: int, value: float) -> NDArray[np.generic]:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=value)


def _group_means(codebook: Vectors, frequencies: NDArray[np.int64], groups: NDArray[np.int64], bits: int) -> Vectors:
    """Mean codeword by frequency of each group; group ``2^r + v``: the codes whose first r of ``bits`` bits are v."""
    means = np.empty((len(groups), codebook.shape[1]), dtype=np.float32)
    known = np.frexp(groups.astype(np.float64))[1] - 1  # floor(log2(group)) = r
    for r in np.unique(known):
        mine = np.flatnonzero(known == r)
        values = groups[mine] - (1 << int(r))
        if r == bits:
            means[mine] = codebook[values]
            continue
        width = 1 << (bits - int(r))
        for row, value in zip(mine, values, strict=True):
            part = slice(value * width, (value + 1) * width)
            weights = frequencies[part].astype(np.float32)
            means[row] = weights @ codebook[part] / weights.sum()
    return means


def _constants(representatives: Vectors, metric: Metric) -> tuple[NDArray[np.float32], float]:
    if metric == "ip":
        return np.zeros(len(representatives), dtype=np.float32), -1.0
    return np.einsum("ij,ij->i", representatives, representatives), -2.0
