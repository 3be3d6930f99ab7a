"""Vectors against what their codes decode to: errors, codewords estimated from vectors, neighbours.

Everything is done in passes over batches of rows, so that vectors may be larger than memory, and decoded vectors are
never held all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError, InvalidVectorsError
from semid_index.metrics import comparable, distances, exact_search
from semid_index.quantizer import Codes, ProgressCallback, Vectors
from semid_index.records import Metric
from semid_index.report.measures import Counts, SortedIds, prefix_probe_recall
from semid_index.vectors import VectorSource, as_vectors, bad_rows

_BATCH_VALUES = 1 << 23  # vectors are read so many values at a time: 32 MB
_BLOCK_ENTRIES = 1 << 22  # distances and scores held at once
_DENSE_ENTRIES = 1 << 24  # co-occurrences of two levels are counted in a table of at most so many entries, 128 MB


@dataclass(frozen=True)
class Items:
    """Vectors and their codes, read together."""

    source: VectorSource
    codes: Codes
    metric: Metric
    what: str
    """What errors call the vectors."""
    progress: ProgressCallback | None = None
    """Told of each batch; there are two passes."""

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def batch_rows(self) -> int:
        """Rows in a batch."""
        return max(1, _BATCH_VALUES // self.source.dim)

    def batches(self, doing: str, *, done: int = 0) -> Iterator[tuple[slice, Vectors]]:
        """Rows and their vectors as they are, checked to be finite (and of some length, under cosine).

        ``done`` passes came before, for the progress.
        """
        starts = range(0, len(self), self.batch_rows)
        for number, (start, batch) in enumerate(zip(starts, self.source.batches(self.batch_rows), strict=True), 1):
            bad = bad_rows(batch, zero=self.metric == "cosine") + start
            if len(bad):
                kinds = "NaN, infinite or zero" if self.metric == "cosine" else "NaN or infinite"
                raise InvalidVectorsError(
                    f"{self.what}: {len(bad):,} rows are {kinds}, the first is row {bad[0]:,}. Leave them out, of the "
                    "codes too.",
                    rows=bad[:100].tolist(),
                )
            yield slice(start, start + len(batch)), batch
            if self.progress is not None:
                self.progress(done * len(starts) + number, 2 * len(starts), doing)

    def prepared(self, batch: Vectors) -> Vectors:
        """A batch as the quantizer sees it: at length 1 under cosine."""
        return comparable(batch, self.metric)


# -- first pass: what does not depend on codewords -------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What one pass over the vectors says without codewords."""

    variance: float
    """Mean squared distance from the mean vector."""
    distinct: int
    """Different vectors."""
    queries: Vectors
    """The rows that were asked for, as the quantizer sees them."""
    sums: list[NDArray[np.float64]]
    """For each level (K, dim), the sum of the vectors that have each code; empty if not asked for."""


def survey(items: Items, query_rows: NDArray[np.int64], *, sizes: Sequence[int] = ()) -> Survey:
    """Read all vectors once; ``sizes`` are those of the levels whose sums are wanted."""
    dim = items.source.dim
    fingerprints = np.empty((len(items), 2), dtype=np.uint64)
    queries = np.empty((len(query_rows), dim), dtype=np.float32)
    sums = [np.zeros((size, dim)) for size in sizes]
    mean, squares, done = np.zeros(dim), 0.0, 0
    for rows, raw in items.batches("reading vectors"):
        fingerprints[rows] = _fingerprints(raw)
        batch = items.prepared(raw)
        asked = slice(*np.searchsorted(query_rows, (rows.start, rows.stop)))
        queries[asked] = batch[query_rows[asked] - rows.start]
        for level, total in enumerate(sums):
            add_by_code(total, items.codes[rows, level], batch)
        # Squares are taken around the mean of the batch and moved (Chan, Golub and LeVeque, 1983): no cancellation.
        batch_mean = batch.mean(axis=0, dtype=np.float64)
        centred = batch - batch_mean.astype(np.float32)
        shift = float(np.square(batch_mean - mean).sum())
        squares += float(np.square(centred).sum(dtype=np.float64)) + shift * done * len(batch) / (done + len(batch))
        mean += (batch_mean - mean) * len(batch) / (done + len(batch))
        done += len(batch)
    return Survey(squares / done, _distinct(fingerprints), queries, sums)


def _fingerprints(vectors: Vectors) -> NDArray[np.uint64]:
    """128 bits of each row, equal for equal rows; others are equal with a probability of about 2^-100 a pair.

    Integer arithmetic modulo 2^64, exact wherever a row stands, which a product of floats would not be.
    """
    factors = np.random.default_rng(0).integers(1 << 63, size=(vectors.shape[1], 2), dtype=np.uint64) * 2 + 1
    bits = (vectors + np.float32(0)).view(np.uint32)  # -0.0 + 0 is 0.0
    return bits.astype(np.uint64) @ factors


def _distinct(fingerprints: NDArray[np.uint64]) -> int:
    ordered = fingerprints[np.lexsort(fingerprints.T)]
    return 1 + int((ordered[1:] != ordered[:-1]).any(axis=1).sum())


def add_by_code(totals: NDArray[np.float64], codes: NDArray[np.integer], vectors: Vectors) -> None:
    """Add each of (b, dim) vectors to the row of ``totals`` (K, dim) that its code (b,) names."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    totals[ordered[starts]] += np.add.reduceat(vectors[order], starts, axis=0)


def estimate_codebooks(codes: Codes, sums: Sequence[NDArray[np.float64]]) -> list[Vectors]:
    """Codewords for codes that came without: level by level, the mean of what is left of the vectors with a code.

    ``sums`` are those of :func:`survey`. What is left of a sum, once the codewords of the levels before are taken off,
    follows from how often the codes of two levels occur together; so no pass over the vectors is needed. Codewords
    that no item has are 0.
    """
    codebooks: list[Vectors] = []
    for level, total in enumerate(sums):
        left = total.copy()
        for before, codebook in enumerate(codebooks):
            left -= _summed_words(codes[:, level], len(total), codes[:, before], codebook)
        counts = np.bincount(codes[:, level], minlength=len(total))
        codebooks.append((left / np.maximum(counts, 1)[:, None]).astype(np.float32))
    return codebooks


def _summed_words(
    codes: NDArray[np.integer], size: int, others: NDArray[np.integer], codebook: Vectors
) -> NDArray[np.float64]:
    """For each code (size, dim), the sum of the codewords that its items have at another level."""
    if size * len(codebook) <= _DENSE_ENTRIES:
        together = np.bincount(codes.astype(np.int64) * len(codebook) + others, minlength=size * len(codebook))
        summed: NDArray[np.float64] = together.reshape(size, -1).astype(np.float64) @ codebook.astype(np.float64)
        return summed
    totals = np.zeros((size, codebook.shape[1]))
    block = max(1, _BATCH_VALUES // codebook.shape[1])
    for start in range(0, len(codes), block):
        part = slice(start, start + block)
        add_by_code(totals, codes[part], codebook[others[part]])
    return totals


# -- second pass: errors and neighbours -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """How codes become vectors: by codewords that add up, by a function, or as given for each row."""

    codebooks: Sequence[Vectors] | None = None
    decode: Callable[[Codes], Any] | None = None
    decoded: VectorSource | None = None

    def batches(self, items: Items) -> Iterator[Vectors | None]:
        """The decoded vectors, in the batches of ``items``; None where only the codewords say them."""
        if self.decoded is not None:
            for batch in self.decoded.batches(items.batch_rows):
                yield as_vectors(batch, what="decoded vectors")
            return
        for start in range(0, len(items), items.batch_rows):
            codes = items.codes[start : start + items.batch_rows]
            yield None if self.decode is None else self._decode(codes, items.source.dim)

    def _decode(self, codes: Codes, dim: int) -> Vectors:
        decoded = as_vectors(self.decode(codes), dim=dim, what="decoded vectors")  # type: ignore[misc]
        if len(decoded) != len(codes):
            raise InvalidArgumentError(f"decode gave {len(decoded):,} vectors for {len(codes):,} rows of codes.")
        return decoded


class Nearest:
    """The k items nearest to each query, of items that arrive in batches; equal ones in the order of their rows."""

    def __init__(self, queries: Vectors, own_rows: NDArray[np.int64], k: int, metric: Metric) -> None:
        self._queries, self._own_rows, self._k, self._metric = queries, own_rows, k, metric
        self._distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        self.rows = np.full((len(queries), k), -1, dtype=np.int64)

    def add(self, vectors: Vectors, rows: NDArray[np.int64]) -> None:
        """Look at items: their vectors (b, dim) and which rows they are (b,), ascending from batch to batch."""
        if not len(rows):
            return
        if rows[0] == 0:  # all would beat infinity; a query may find itself, so one more than k
            columns, near = exact_search(self._queries, vectors, self._k + 1, self._metric)
            self._merge(np.repeat(np.arange(len(columns)), columns.shape[1]), rows[columns.ravel()], near.ravel())
            return
        block = max(1, _BLOCK_ENTRIES // len(vectors))
        for start in range(0, len(self._queries), block):
            near = distances(self._queries[start : start + block], vectors, self._metric)
            queries, columns = np.nonzero(near < self._distances[start : start + block, -1:])
            self._merge(queries + start, rows[columns], near[queries, columns])

    def _merge(self, queries: NDArray[np.int64], rows: NDArray[np.int64], near: NDArray[np.float32]) -> None:
        """Take in some (query, row, distance) that were found."""
        others = rows != self._own_rows[queries]  # an item is not its own neighbour
        changed, slot = np.unique(queries[others], return_inverse=True)
        slots = np.append(np.repeat(np.arange(len(changed)), self._k), slot)
        rows = np.append(self.rows[changed], rows[others])
        near = np.append(self._distances[changed], near[others])
        order = np.lexsort((rows, near, slots))
        starts = np.searchsorted(slots[order], np.arange(len(changed)))
        best = order[starts[:, None] + np.arange(self._k)]
        self.rows[changed], self._distances[changed] = rows[best], near[best]


class NearestDecoded:
    """The same for decoded vectors: of the items that share an ID one is compared, and stands for all.

    They decode alike; compared one by one, rounding would put them in any order.
    """

    def __init__(self, ids: SortedIds, queries: Vectors, own_rows: NDArray[np.int64], k: int, metric: Metric) -> None:
        self._ids, self._own_rows, self._k = ids, own_rows, k
        self._first_rows = ids.first_rows(ids.levels)
        self._is_first = np.zeros(len(ids.order), dtype=np.bool_)
        self._is_first[self._first_rows] = True
        nobody = np.full_like(own_rows, -1)  # an item's ID counts, for others may share it
        self._nearest = Nearest(queries, nobody, min(k + 1, len(self._first_rows)), metric)

    def add(self, decoded: Vectors, rows: NDArray[np.int64]) -> None:
        """See :meth:`Nearest.add`."""
        chosen = self._is_first[rows]
        self._nearest.add(decoded[chosen], rows[chosen])

    def rows(self) -> NDArray[np.int64]:
        """(q, k) items: those of the nearest IDs, one ID after the other."""
        places = np.argsort(self._first_rows)  # IDs by first row
        ids = places[np.searchsorted(self._first_rows[places], self._nearest.rows)]
        sizes = np.minimum(self._ids.sizes(self._ids.levels), self._k + 1)[ids]  # more of one ID are never needed
        starts = self._ids.starts(self._ids.levels)[ids]
        before = np.cumsum(sizes).reshape(sizes.shape) - sizes
        rows = self._ids.order[np.arange(sizes.sum()) + np.repeat(starts - before, sizes.ravel())]
        queries = np.repeat(np.arange(len(sizes)), sizes.sum(axis=1))
        others = rows != self._own_rows[queries]
        rows, queries = rows[others], queries[others]
        first = np.searchsorted(queries, np.arange(len(sizes)))
        found: NDArray[np.int64] = rows[first[:, None] + np.arange(self._k)]
        return found


@dataclass(frozen=True)
class Comparison:
    """What one pass over vectors and their decoded ones says."""

    errors: tuple[float | None, ...]
    """Mean squared length of what is left after each level; None where it cannot be said."""
    truth: NDArray[np.int64]
    """(q, k) the items nearest to each query."""
    found: NDArray[np.int64]
    """(q, k) the items whose decoded vectors are."""
    prefix_words: Vectors | None
    """(g, dim) what each prefix of the depth asked for stands for: the sum of its codewords or, where codewords do not
    add up, the mean of its items' decoded vectors; None if not asked for."""


def compare(
    items: Items,
    decoder: Decoder,
    ids: SortedIds,
    queries: Vectors,
    query_rows: NDArray[np.int64],
    k: int,
    depth: int | None,
) -> Comparison:
    """Read all vectors again, with what they decode to; ``query_rows`` (q,) are -1 for queries that are no items."""
    squares = np.zeros(ids.levels)
    exact = Nearest(queries, query_rows, k, items.metric)
    approximate = NearestDecoded(ids, queries, query_rows, k, items.metric)
    averaged = depth if decoder.codebooks is None else None
    groups = None if averaged is None else ids.groups(averaged)
    sums = np.zeros((0 if averaged is None else ids.distinct(averaged), items.source.dim))
    for rows, batch, decoded in _decoded_batches(items, decoder, squares):
        if k:
            exact.add(batch, rows)
            approximate.add(decoded, rows)
        if groups is not None:
            add_by_code(sums, groups[rows], decoded)
    known = ids.levels if decoder.codebooks is not None else 1
    errors = [None] * (ids.levels - known) + (squares[-known:] / len(items)).tolist()
    words = None
    if depth is not None and decoder.codebooks is not None:
        words = _summed_prefixes(decoder.codebooks, items.codes[ids.first_rows(depth), :depth])
    elif depth is not None:
        words = (sums / ids.sizes(depth)[:, None]).astype(np.float32)
    return Comparison(tuple(errors), exact.rows, approximate.rows() if k else exact.rows, words)


def _decoded_batches(
    items: Items, decoder: Decoder, squares: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.int64], Vectors, Vectors]]:
    """Rows, their vectors and decoded vectors; squared errors are added to ``squares``, of the levels that have any."""
    for (part, raw), given in zip(items.batches("comparing vectors", done=1), decoder.batches(items), strict=True):
        batch = items.prepared(raw)
        decoded = np.zeros_like(batch)
        for level, codebook in enumerate(decoder.codebooks or ()):
            decoded += codebook[items.codes[part, level]]
            squares[level] += _squared(batch, decoded)
        if given is not None:
            decoded = given
        if decoder.codebooks is None:
            squares[-1] += _squared(batch, decoded)
        yield np.arange(part.start, part.stop), batch, decoded


def _summed_prefixes(codebooks: Sequence[Vectors], prefixes: Codes) -> Vectors:
    """(g, depth) in, the sum of the codewords of each (g, dim) out."""
    words = np.zeros((len(prefixes), codebooks[0].shape[1]), dtype=np.float32)
    for codebook, codes in zip(codebooks, prefixes.T, strict=False):
        words += codebook[codes]
    return words


def _squared(a: Vectors, b: Vectors) -> float:
    left = a - b
    return float(np.einsum("ij,ij->i", left, left).sum(dtype=np.float64))


# -- probing ----------------------------------------------------------------------------------------------------------


def probe_recall(
    queries: Vectors,
    words: Vectors,
    sizes: Counts,
    truth: NDArray[np.int64],
    budgets: Sequence[float],
    metric: Metric,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """:func:`prefix_probe_recall` of groups that are scored by the distance to their words (g, dim); means, (b,) each.

    Under cosine the score is the distance from the query at length 1 to the word as it is, as in the search.
    """
    near: Metric = "ip" if metric == "ip" else "l2"
    block = max(1, _BLOCK_ENTRIES // len(words))
    recalls, opened = [], []
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        found, candidates = prefix_probe_recall(distances(queries[part], words, near), sizes, truth[part], budgets)
        recalls.append(found)
        opened.append(candidates)
    return np.concatenate(recalls).mean(axis=0), np.concatenate(opened).mean(axis=0)
