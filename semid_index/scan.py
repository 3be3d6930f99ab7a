"""The quickest executor: routing, scan and re-rank in one native call.

What it scans is made when vectors are read, and not stored. An item is what its first codes decode to, and a remainder;
the remainder is rotated so that its largest directions come first, cut off after some of them, and product-quantized
with 4 bits per part (as OPQ does, Ge et al., 2013; the eigenvalues are dealt out evenly to the parts). So the bytes of
the semantic ID work for the scan too, and fewer others are needed for the same accuracy (docs/decisions/0014).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index import native
from semid_index.codes import unpack
from semid_index.devices import cores
from semid_index.lookup import LeafScorer, Leaves, Matches, Probes
from semid_index.metrics import normalized
from semid_index.native import NativeIndex, Scanned, ScanParts
from semid_index.quantizer import Vectors
from semid_index.rerank import Distances, Executor, MemoryVectors, Positions, ScanData, choose_executor

_KEPT_DIMS = 192  # after rotation: others would not change the order of candidates
_WIDTH = 4  # dimensions per part,
_NARROW_WIDTH = 2  # but of vectors with up to
_NARROW_DIMS = 64  # so many dimensions
_SAMPLE = 16_384  # items that rotation and codewords are learned from
_ITERATIONS = 12
_HEADS = 4  # levels of the semantic ID that the scan reads
_HEAD_SIZE = 256  # largest codebook of those after the first
_LEAST_ITEMS = 256  # with fewer, codewords would be learned from next to nothing
_LEAST_RUN = 16  # items that share a first code, on average; with fewer, blocks of 32 would be half empty
_BATCH = 16_384
_SEED = 0


def fastest_executor(data: ScanData, scorer: Callable[[], LeafScorer]) -> Executor:
    """The native one where it can be had, else one of those in :mod:`semid_index.rerank`."""
    vectors = data.vectors
    if data.tail is None or not isinstance(vectors, MemoryVectors) or vectors.count < _LEAST_ITEMS:
        return choose_executor(data)
    if native.unavailable_because() is not None:
        return choose_executor(data)
    return NativeExecutor(data, vectors, scorer())


class NativeExecutor:
    """Chooses leaves, scans the codes of their items and re-ranks the best, all in compiled code."""

    name = "native"
    exact = False

    def __init__(self, data: ScanData, vectors: MemoryVectors, scorer: LeafScorer) -> None:
        threads = cores()
        words = _words(data)
        self._space = _learn_space(data, vectors, words, threads)
        codes, scalars = _encode(data, vectors, words, self._space, threads)
        self._index = NativeIndex(
            _parts(data, scorer, words, self._space, codes, scalars), vectors.dim, *vectors.stored
        )

    @property
    def nbytes(self) -> int:
        """Codes and tables."""
        return self._index.nbytes + self._space.rotation.nbytes

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
    ) -> Scanned:
        """The k nearest of the best ``rerank`` items of the best leaves, by exact distances.

        Leaves are chosen as :func:`semid_index.lookup.choose_probes` does it. ``shown``: leaves to name, best first.
        """
        return self._index.search(
            queries,
            k=k,
            keep=rerank,
            goal=max(k, 0 if probes else budget),
            least_leaves=probes or 1,
            counts=None if matches is None else matches.counts,
            allowed=None if matches is None else matches.allowed,
            shown=shown,
            threads=threads,
        )

    def leaf_distances(self, query: Vectors, scores: NDArray[np.float32], metric: str) -> NDArray[np.float32]:
        """Scores of the leaves of one query as distances of the metric, as far as the kept directions tell."""
        if metric == "ip":
            return scores
        centre = self._space.centre
        away = query - centre
        # |away - (x - centre)|^2, of which scores lack what no leaf changes
        squared: NDArray[np.float32] = np.maximum(scores + away @ (away + 2 * centre), np.float32(0))
        return squared / np.float32(2) if metric == "cosine" else np.sqrt(squared)


@dataclass(frozen=True)
class _Words:
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


@dataclass(frozen=True)
class _Space:
    """Where remainders are quantized."""

    rotation: NDArray[np.float32]
    """(dim, parts * width)"""
    centre: NDArray[np.float32]
    """(dim,) subtracted from vectors and queries first, but not for inner products"""
    codebooks: NDArray[np.float32]
    """(parts, 16, width)"""


def _words(data: ScanData) -> _Words:
    codebooks = data.quantizer.codebooks or []
    leaves, layout = data.leaves, data.leaves.layout
    used: list[Vectors] = []
    for level, codebook in enumerate(codebooks[:_HEADS]):
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
    return _Words(words, tuple(np.cumsum([0, *sizes])[:-1].tolist()), sizes)


def _comparable(vectors: MemoryVectors, items: NDArray[np.int64] | slice) -> Vectors:
    """Vectors as they were encoded: at length 1 under cosine."""
    rows = vectors.take(items)
    return normalized(rows) if vectors.metric == "cosine" else rows


def _learn_space(data: ScanData, vectors: MemoryVectors, words: _Words, threads: int) -> _Space:
    """Directions and codewords for what the words leave over, from a sample."""
    rng = np.random.default_rng(_SEED)
    chosen = np.arange(vectors.count)
    if vectors.count > _SAMPLE:
        chosen = np.sort(rng.choice(vectors.count, _SAMPLE, replace=False))
    rows = _comparable(vectors, chosen)
    mean = rows.mean(axis=0)
    left = rows.copy()
    for column in words.columns_of(data, chosen).T:
        left -= words.words[column]
    kept = min(vectors.dim, _KEPT_DIMS)
    width = _WIDTH if kept > _NARROW_DIMS else _NARROW_WIDTH
    parts = -(-kept // width)
    # 1. the directions in which vectors differ most, for leaves are chosen in this space too
    around = rows - mean
    directions = _eigenvectors(around.T @ around)[1][:, :kept]
    # 2. among these, the axes of what is left over, dealt out so that each part has much and little of it
    inside = left @ directions.astype(np.float32)
    sizes, axes = _eigenvectors(inside.T @ inside / len(inside))
    rotation = np.zeros((vectors.dim, parts * width), dtype=np.float32)
    rotation[:, _dealt(sizes, parts, width)] = directions @ axes
    centre = np.zeros_like(mean) if data.metric == "ip" else mean
    points = (left @ rotation).reshape(len(left), parts, width)
    begin = points[rng.choice(len(points), 16, replace=False)].transpose(1, 0, 2)
    return _Space(rotation, centre, native.train(points, begin, iterations=_ITERATIONS, threads=threads))


def _eigenvectors(matrix: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues, largest first, and eigenvectors in columns."""
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    return values[::-1], vectors[:, ::-1]


def _dealt(sizes: NDArray[np.float64], parts: int, width: int) -> list[int]:
    """A place for each direction: the next largest goes to the part whose product of sizes is least so far."""
    logs = np.log(np.maximum(sizes, 1e-12 * max(sizes[0], 1e-30)))
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
    data: ScanData, vectors: MemoryVectors, words: _Words, space: _Space, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """4-bit codes and scalars of all items."""
    codes = np.empty((vectors.count, -(-len(space.codebooks) // 2)), dtype=np.uint8)
    scalars = np.empty(vectors.count, dtype=np.float32)
    rotated_words, centre = words.words @ space.rotation, space.centre @ space.rotation
    for start in range(0, vectors.count, _BATCH):
        batch = slice(start, start + _BATCH)
        rows = _comparable(vectors, batch) - space.centre
        columns = words.columns_of(data, batch)
        lengths = np.einsum("ij,ij->i", rows, rows)
        rotated = (rows @ space.rotation).astype(np.float32, copy=False)
        codes[batch], scalars[batch] = native.encode(
            rotated, lengths, columns, rotated_words, centre, space.codebooks, threads=threads
        )
    return codes, scalars


def _parts(
    data: ScanData,
    scorer: LeafScorer,
    words: _Words,
    space: _Space,
    codes: NDArray[np.uint8],
    scalars: NDArray[np.float32],
) -> ScanParts:
    all_words, terms, zero = _leaf_terms(data.leaves, scorer, words.words)
    constants = scorer.constants
    first_codes = first_constants = None
    if words.sizes:
        first_codes = (data.codes.sids >> data.leaves.layout.shifts[0]).astype(np.int32)
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
        head_codes=_head_codes(data, words),
        head_columns=np.array(words.offsets[1:], dtype=np.int32),
        head_sizes=np.array(words.sizes[1:], dtype=np.int32),
        scalars=scalars_or_none,
        factor=scorer.factor,
    )


def _head_codes(data: ScanData, words: _Words) -> NDArray[np.uint8]:
    """The codes after the first that the scan reads: (n, heads)."""
    heads = np.empty((len(data.codes.rows), max(len(words.sizes) - 1, 0)), dtype=np.uint8)
    for start in range(0, len(heads), _BATCH) if heads.shape[1] else ():
        batch = slice(start, start + _BATCH)
        heads[batch] = (words.columns_of(data, batch) - np.array(words.offsets))[:, 1:]
    return heads


def _leaf_terms(leaves: Leaves, scorer: LeafScorer, words: Vectors) -> tuple[Vectors, NDArray[np.int32], int]:
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
