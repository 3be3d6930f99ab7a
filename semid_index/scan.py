"""The quickest executor: routing, scan and re-rank in one native call.

What it scans is made when vectors are read, and not stored. An item is what its first codes decode to, and a remainder;
the remainder is rotated so that its largest directions come first, cut off after some of them, and product-quantized
with 4 bits per part (as OPQ does, Ge et al., 2013; the eigenvalues are dealt out evenly to the parts). So the bytes of
the semantic ID work for the scan too, and fewer others are needed for the same accuracy (docs/decisions/0014).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index import native
from semid_index.codes import unpack
from semid_index.devices import cores
from semid_index.lookup import LeafScorer, Leaves, Matches, Probes
from semid_index.metrics import comparable
from semid_index.native import NativeIndex, Scanned, ScannedOne, ScanParts, Wanted
from semid_index.quantizer import Vectors
from semid_index.rerank import Distances, FileVectors, MemoryVectors, Positions, ScanData, VectorsByPosition, smallest

_KEPT_DIMS = 192  # after rotation: others would not change the order of candidates
_WIDTH = 4  # dimensions per part,
_NARROW_WIDTH = 2  # but of vectors with up to
_NARROW_DIMS = 64  # so many dimensions
_SAMPLE = 16_384  # items that rotation and codewords are learned from
_ITERATIONS = 12
_EXACT_EIGENVECTORS = 2_048  # rows of a matrix of which all eigenvectors are worked out
_TURNS = 8  # of subspace iteration, for larger ones: what it finds holds 0.9998 of what eigenvectors would
_SPARE_DIRECTIONS = 64  # that it takes along
_HEADS = 4  # levels of the semantic ID that the scan reads
_HEAD_SIZE = 256  # largest codebook of those after the first
LEAST_ITEMS = 256
"""With fewer, codewords would be learned from next to nothing."""
_LEAST_RUN = 16  # items that share a first code, on average; with fewer, blocks of 64 would be nearly empty
_BATCH = 16_384
_SEED = 0


class NativeScan:
    """Chooses leaves, scans the codes of their items and re-ranks the best: all in compiled code, if it has vectors."""

    name = "native"
    exact = False
    _index: NativeIndex
    _centre: NDArray[np.float32]
    """(dim,) subtracted from queries."""
    _vectors: VectorsByPosition | None = None
    """What re-ranks if the compiled code has no vectors."""
    _offsets: NDArray[np.int32] | None = None
    """(levels,) the first column of each level, if the scan reads all codes of the semantic ID."""

    @property
    def nbytes(self) -> int:
        """Codes and tables."""
        return self._index.nbytes

    @property
    def holds_codes(self) -> bool:
        """Whether :meth:`codes_at` can tell the codes of items, so that nobody else need hold them."""
        return self._offsets is not None

    def codes_at(self, positions: Positions) -> NDArray[np.int32]:
        """The semantic IDs at some positions: (m, levels). Only if it :attr:`holds_codes`."""
        columns = self._index.columns(positions)
        return columns if self._offsets is None else columns - self._offsets

    def search(self, queries: Vectors, probes: Probes, k: int) -> tuple[Distances, Positions]:
        """See :class:`semid_index.rerank.Executor`."""
        threads = cores()
        found = self._index.search(queries, k=None, keep=k, leaves=probes.leaves, threads=threads)
        return found.distances, found.positions

    def search_leaves(
        self,
        queries: Vectors,
        k: int,
        *,
        rerank: int,
        budget: int,
        probes: int | None,
        matches: Matches | None,
        shown: int,
        threads: int,
        lengths: NDArray[np.float32] | None = None,
    ) -> Scanned:
        """The k nearest of the best ``rerank`` items of the best leaves, by exact distances.

        Leaves are chosen as :func:`semid_index.lookup.choose_probes` does it. ``shown``: leaves to name, best first.
        ``lengths`` (q,): queries are divided by these first.
        """
        if lengths is not None and self._vectors is not None:
            queries, lengths = queries / lengths[:, None], None
        found = self._index.search(
            queries,
            lengths=lengths,
            k=None if self._vectors is not None else k,
            keep=rerank,
            goal=max(k, 0 if probes else budget),
            least_leaves=probes or 1,
            counts=None if matches is None else matches.counts,
            allowed=None if matches is None else matches.allowed,
            shown=shown,
            threads=threads,
        )
        return found if self._vectors is None else _reranked(found, queries, self._vectors, k)

    def search_for_one(
        self, k: int, *, rerank: int, budget: int, probes: int | None, matches: Matches | None
    ) -> Callable[[Vectors, float], ScannedOne] | None:
        """The same for one query (dim,), divided by its length: a function, for many such queries.

        None if exact distances are not computed in compiled code.
        """
        if self._vectors is not None:
            return None
        counts, allowed = (None, None) if matches is None else (matches.counts, matches.allowed)
        wanted = Wanted.of(k, rerank, max(k, 0 if probes else budget), probes or 1, counts, allowed)
        return partial(self._index.search_one, wanted)

    @property
    def leaf_distances(self) -> Callable[[Vectors, NDArray[np.float32], str], NDArray[np.float32]]:
        """Turns scores of the leaves of one query into distances of the metric, as far as the scan's directions tell.

        A function that does not hold the executor, for the trace of a search keeps it.
        """
        return partial(_leaf_distances, self._centre)


def _leaf_distances(centre: Vectors, query: Vectors, scores: NDArray[np.float32], metric: str) -> NDArray[np.float32]:
    if metric == "ip":
        return scores
    away = query - centre
    # |away - (x - centre)|^2, of which scores lack what no leaf changes
    squared: NDArray[np.float32] = np.maximum(scores + away @ (away + 2 * centre), np.float32(0))
    return squared / np.float32(2) if metric == "cosine" else np.sqrt(squared)


class NativeExecutor(NativeScan):
    """Scans the codes of the ID and of what they leave over, for vectors in memory or in the file."""

    def __init__(self, data: ScanData, vectors: MemoryVectors | FileVectors, scorer: LeafScorer) -> None:
        threads = cores()
        words = words_of(data)
        self._space = _learn_space(data, vectors, words, threads)
        self._centre = self._space.centre
        codes, scalars = _encode(data, vectors, words, self._space, threads)
        rows, scale = vectors.stored if isinstance(vectors, MemoryVectors) else (None, None)
        self._index = NativeIndex(_parts(data, scorer, words, self._space, codes, scalars), vectors.dim, rows, scale)
        self._vectors = None if isinstance(vectors, MemoryVectors) else vectors
        self._offsets = words.offsets_of_all(data)

    @property
    def nbytes(self) -> int:
        """Codes and tables."""
        return super().nbytes + self._space.rotation.nbytes


def _reranked(found: Scanned, queries: Vectors, vectors: VectorsByPosition, k: int) -> Scanned:
    """What a scan kept, by exact distances."""
    started = time.perf_counter()
    positions, distances = smallest(found.positions, vectors.distances(queries, found.positions), k)
    seconds = found.seconds.copy()
    seconds[2] += time.perf_counter() - started
    return found._replace(positions=positions, distances=distances, seconds=seconds)


@dataclass(frozen=True)
class Words:
    """The codewords that items are made of, as far as the scan reads their codes."""

    words: Vectors
    """(columns, dim) those of all levels, one after the other."""
    offsets: tuple[int, ...]
    """The first column of each level."""
    sizes: tuple[int, ...]

    def columns_of(self, data: ScanData, items: NDArray[np.int64] | slice) -> NDArray[np.int32]:
        """The columns of some items: (m, levels)."""
        rest = None if data.codes.rest is None else data.codes.rest[items]
        codes = unpack(data.codes.sids[items], data.leaves.layout, rest)[:, : len(self.sizes)]
        return codes + np.array(self.offsets, dtype=np.int32)

    def offsets_of_all(self, data: ScanData) -> NDArray[np.int32] | None:
        """The offsets, if these are all levels of an ID."""
        complete = len(self.sizes) == data.leaves.layout.levels
        return np.array(self.offsets, dtype=np.int32) if complete else None


@dataclass(frozen=True)
class _Space:
    """Where remainders are quantized."""

    rotation: NDArray[np.float32]
    """(dim, parts * width)"""
    centre: NDArray[np.float32]
    """(dim,) subtracted from vectors and queries first, but not for inner products"""
    codebooks: NDArray[np.float32]
    """(parts, 16, width)"""


def words_of(data: ScanData, most: int = _HEADS) -> Words:
    """The words of up to so many levels; of none if blocks would be nearly empty."""
    codebooks = data.quantizer.codebooks or []
    leaves, layout = data.leaves, data.leaves.layout
    used: list[Vectors] = []
    for level, codebook in enumerate(codebooks[:most]):
        if level and len(codebook) > _HEAD_SIZE:
            break
        used.append(codebook)
    if used:
        first = data.codes.sids >> layout.shifts[0]
        runs = np.count_nonzero(np.diff(first)) + len(leaves)
        if len(first) < _LEAST_RUN * runs:
            used = []
    sizes = tuple(len(codebook) for codebook in used)
    words = np.concatenate(used) if used else np.empty((0, data.vectors.dim), dtype=np.float32)
    return Words(words, tuple(np.cumsum([0, *sizes])[:-1].tolist()), sizes)


def _learn_space(data: ScanData, vectors: VectorsByPosition, words: Words, threads: int) -> _Space:
    """Directions and codewords for what the words leave over, from a sample."""
    rng = np.random.default_rng(_SEED)
    chosen = np.arange(vectors.count)
    if vectors.count > _SAMPLE:
        chosen = np.sort(rng.choice(vectors.count, _SAMPLE, replace=False))
    rows = comparable(vectors.take(chosen), vectors.metric)
    mean = rows.mean(axis=0)
    left = rows.copy()
    for column in words.columns_of(data, chosen).T:
        left -= words.words[column]
    kept = min(vectors.dim, _KEPT_DIMS)
    width = _WIDTH if kept > _NARROW_DIMS else _NARROW_WIDTH
    parts = -(-kept // width)
    # 1. the directions in which vectors differ most, for leaves are chosen in this space too
    around = rows - mean
    _rescale(around)
    directions = _directions(around, kept)
    # 2. among these, the axes of what is left over, dealt out so that each part has much and little of it
    inside = native.Multiplier(directions, threads=threads).times(left)
    factor = _rescale(inside)
    sizes, axes = _eigenvectors(inside.T @ inside / len(inside))
    rotation = np.zeros((vectors.dim, parts * width), dtype=np.float32)
    rotation[:, _dealt(sizes / factor**2, parts, width)] = directions @ axes
    centre = np.zeros_like(mean) if data.metric == "ip" else mean
    points = native.Multiplier(rotation, threads=threads).times(left).reshape(len(left), parts, width)
    begin = points[rng.choice(len(points), 16, replace=False)].transpose(1, 0, 2)
    return _Space(rotation, centre, native.train(points, begin, iterations=_ITERATIONS, threads=threads))


def _rescale(rows: Vectors) -> float:
    """Multiply rows in place, so that float32 holds their squares; the factor, a power of two, which rounds nothing."""
    exponent = math.frexp(max(float(rows.max()), -float(rows.min())))[1]
    factor = 2.0 ** min(max(-exponent, -126), 126)
    rows *= np.float32(factor)
    return factor


def _directions(rows: Vectors, count: int) -> NDArray[np.float64]:
    """The directions in which rows (n, dim) differ most, at right angles: (dim, count)."""
    if count <= len(rows) < rows.shape[1]:  # then the products of rows tell as much as those of dimensions
        return np.linalg.qr(rows.T @ _largest(rows @ rows.T, count))[0]
    return _largest(rows.T @ rows, count)


def _largest(matrix: NDArray[Any], count: int) -> NDArray[np.float64]:
    """The eigenvectors of the largest eigenvalues, in columns; of a large matrix nearly these, in much less time."""
    if len(matrix) <= _EXACT_EIGENVECTORS:
        return _eigenvectors(matrix)[1][:, :count]
    # subspace iteration: each turn, what belongs to large eigenvalues gains upon the rest
    matrix = matrix.astype(np.float64)
    found = np.random.default_rng(_SEED).standard_normal((len(matrix), count + _SPARE_DIRECTIONS))
    for _ in range(_TURNS):
        found = np.linalg.qr(matrix @ found)[0]
    return found @ _eigenvectors(found.T @ matrix @ found)[1][:, :count]


def _eigenvectors(matrix: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues, largest first, and eigenvectors in columns."""
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    return values[::-1], vectors[:, ::-1]


def _dealt(sizes: NDArray[np.float64], parts: int, width: int) -> list[int]:
    """A place for each direction: the next largest goes to the part whose product of sizes is least so far."""
    logs = np.log(np.maximum(sizes, 1e-12 * max(sizes[0], 1e-280)))
    logs -= logs.min() - 1e-3  # so that products grow
    products, counts = np.zeros(parts), np.zeros(parts, dtype=int)
    places = []
    for log in logs:
        part = int(np.argmin(np.where(counts < width, products, np.inf)))
        places.append(part * width + int(counts[part]))
        products[part] += log
        counts[part] += 1
    return places


def _encode(
    data: ScanData, vectors: VectorsByPosition, words: Words, space: _Space, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """4-bit codes and scalars of all items."""
    codes = np.empty((vectors.count, -(-len(space.codebooks) // 2)), dtype=np.uint8)
    scalars = np.empty(vectors.count, dtype=np.float32)
    rotated_words, centre = words.words @ space.rotation, space.centre @ space.rotation
    rotate = native.Multiplier(space.rotation, threads=threads).times
    # the same memory for all batches: new memory of this size would be fetched from the system, page by page, each time
    centred, turned = (np.empty((_BATCH, width), dtype=np.float32) for width in space.rotation.shape)
    for batch, taken in vectors.batches(_BATCH):
        rows = np.subtract(comparable(taken, vectors.metric), space.centre, out=centred[: len(taken)])
        columns = words.columns_of(data, batch)
        lengths = np.einsum("ij,ij->i", rows, rows)
        rotated = rotate(rows, out=turned[: len(taken)])
        codes[batch], scalars[batch] = native.encode(
            rotated, lengths, columns, rotated_words, centre, space.codebooks, threads=threads
        )
    return codes, scalars


def _parts(
    data: ScanData,
    scorer: LeafScorer,
    words: Words,
    space: _Space,
    codes: NDArray[np.uint8],
    scalars: NDArray[np.float32],
) -> ScanParts:
    all_words, terms, zero = leaf_terms_of(data.leaves, scorer, words.words)
    constants = scorer.constants
    first_codes = first_constants = None
    if words.sizes:
        first_codes = first_codes_of(data)
    if data.metric == "ip":
        first_constants = None if first_codes is None else np.zeros(len(all_words), dtype=np.float32)
        scalars_or_none = None
    else:
        of_words = all_words @ space.centre
        constants = constants - 2 * of_words[terms].sum(axis=0) + space.centre @ space.centre
        scalars_or_none = scalars
        if first_codes is not None:
            first_constants = np.zeros(len(all_words), dtype=np.float32)
            first = words.words[: words.sizes[0]] - space.centre
            first_constants[: words.sizes[0]] = np.einsum("ij,ij->i", first, first)
            scalars_or_none = scalars - first_constants[first_codes]
    return ScanParts(
        metric=data.metric,
        starts=data.leaves.starts,
        words=all_words @ space.rotation,
        leaf_terms=terms,
        zero_column=zero,
        leaf_constants=constants,
        rotation=space.rotation,
        centre=space.centre,
        codebooks=space.codebooks,
        tail_codes=codes,
        first_codes=first_codes,
        first_constants=first_constants,
        head_codes=head_codes_of(data, words),
        head_columns=np.array(words.offsets[1:], dtype=np.int32),
        head_sizes=np.array(words.sizes[1:], dtype=np.int32),
        scalars=scalars_or_none,
        factor=scorer.factor,
    )


def first_codes_of(data: ScanData) -> NDArray[np.int32]:
    """The first code of each item: (n,)."""
    return (data.codes.sids >> data.leaves.layout.shifts[0]).astype(np.int32)


def head_codes_of(data: ScanData, words: Words) -> NDArray[np.uint8]:
    """The codes after the first that the scan reads: (n, heads)."""
    heads = np.empty((len(data.codes.rows), max(len(words.sizes) - 1, 0)), dtype=np.uint8)
    for start in range(0, len(heads), _BATCH) if heads.shape[1] else ():
        batch = slice(start, start + _BATCH)
        heads[batch] = (words.columns_of(data, batch) - np.array(words.offsets))[:, 1:]
    return heads


def leaf_terms_of(leaves: Leaves, scorer: LeafScorer, words: Vectors) -> tuple[Vectors, NDArray[np.int32], int]:
    """All words that are needed, those of the leaves included; the columns of each leaf's; a column of zeros.

    Most words of leaves are codewords, and are not kept twice.
    """
    known = {word.tobytes(): column for column, word in reversed(list(enumerate(words)))}
    columns = np.array([known.get(word.tobytes(), -1) for word in scorer.words], dtype=np.int32)
    new = np.flatnonzero(columns < 0)
    columns[new] = len(words) + np.arange(len(new))
    zero = len(words) + len(new)
    all_words = np.concatenate([words, scorer.words[new], np.zeros((1, words.shape[1]), dtype=np.float32)])
    terms = np.full((max(len(scorer.terms), 1), len(leaves)), zero, dtype=np.int32)
    for term, (reached, of_leaves) in enumerate(scorer.terms):
        terms[term, slice(None) if reached is None else reached] = columns[of_leaves]
    return all_words, terms, zero
