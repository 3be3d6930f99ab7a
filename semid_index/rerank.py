"""Exact distances for candidates; the only module that imports FAISS for searching.

An *executor* scans the items of the probed leaves and returns the best of them. Some executors scan short codes, so
that their distances are approximate; then the best few hundred are re-ranked by the stored vectors
(:class:`MemoryVectors`, :class:`FileVectors`), or, where none are stored, by the decoded codes.

Items are numbered by their *position* in the order of their sids, so that a leaf is a slice of positions.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from semid_index import metrics
from semid_index.codes import unpack
from semid_index.errors import RESTORE, CorruptIndexError, MissingDependencyError
from semid_index.lookup import Leaves, Matches, Places, Probes
from semid_index.quantizer import Quantizer, Vectors
from semid_index.quantizers.kmeans import import_faiss, openmp_threads
from semid_index.quantizers.tail import Tail, pad
from semid_index.records import Metric

if TYPE_CHECKING:
    from semid_index.contents import StoredCodes
    from semid_index.store import Store

log = logging.getLogger("semid_index")

Positions = NDArray[np.int64]
Distances = NDArray[np.float32]

_GATHER_BYTES = 16 << 20  # candidates' vectors copied together at once
_FEW_QUERIES = 8  # for up to so many, vectors are compared where they are, and not copied together first
_FEW_FOR_ALL = 4  # the same where all vectors are compared, of which no copy is needed
_TAKEN_BYTES = 64 << 20  # candidates' vectors fetched or decoded together at once
_EXACT_BLOCK = 65_536  # stored vectors compared at once by brute force
_LIST_BYTES = 64 << 20  # matching vectors copied together at once, to be scanned for many queries
_STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
_PROBING = threading.Lock()  # FAISS keeps the number of probes in the index, so searches take turns


# -- where vectors for exact distances come from ----------------------------------------------------------------------


class VectorsByPosition(ABC):
    """Vectors that can be fetched by position, as float32."""

    exact: ClassVar[bool] = True
    """Whether these are the stored vectors, and not decoded codes."""

    metric: Metric
    count: int
    dim: int

    @abstractmethod
    def take(self, positions: Positions | slice) -> Vectors:
        """The vectors at some positions: m positions in, (m, dim) float32 out."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return 0

    def batches(self, size: int) -> Iterator[tuple[Positions | slice, Vectors]]:
        """All vectors, at most so many at a time if they are in memory, and their positions."""
        for start in range(0, self.count, size):
            batch = slice(start, min(start + size, self.count))
            yield batch, self.take(batch)

    def distances(self, queries: Vectors, positions: Positions) -> Distances:
        """The distance of each query to its candidates: (q, r) positions in, -1 for none; (q, r) out, inf for none."""
        found = np.full(positions.shape, np.inf, dtype=np.float32)
        tile = max(1, _GATHER_BYTES // max(1, positions.shape[1] * self.dim * 4))
        for start in range(0, len(queries), tile):
            part = positions[start : start + tile]
            vectors = self.take(np.maximum(part, 0).ravel()).reshape(*part.shape, self.dim)
            exact = metrics.paired_distances(queries[start : start + tile], vectors, self.metric)
            found[start : start + tile] = np.where(part >= 0, exact, np.float32(np.inf))
        return found

    def nearest(
        self,
        queries: Vectors,
        k: int,
        allowed: Positions | None = None,
        *,
        between: Callable[[], None] = lambda: None,
    ) -> tuple[Positions, Distances]:
        """Brute force: the k nearest of all vectors, or of the ``allowed`` positions; (q, min(k, n)) each, in order.

        ``between`` is called again and again, and may raise an error to end this.
        """
        count = self.count if allowed is None else len(allowed)
        best_positions = np.empty((len(queries), 0), dtype=np.int64)
        best_distances = np.empty((len(queries), 0), dtype=np.float32)
        for start in range(0, count, _EXACT_BLOCK):
            between()
            block = slice(start, min(start + _EXACT_BLOCK, count))
            found, distances = self._nearest_of(queries, block if allowed is None else allowed[block], k)
            best_positions = np.concatenate([best_positions, found], axis=1)
            best_distances = np.concatenate([best_distances, distances], axis=1)
            best_positions, best_distances = smallest(best_positions, best_distances, k)
        return best_positions, best_distances

    def _nearest_of(self, queries: Vectors, positions: Positions | slice, k: int) -> tuple[Positions, Distances]:
        """The k nearest of the vectors at some positions, in order."""
        rows, distances = metrics.exact_search(queries, self.take(positions), k, self.metric)
        return rows + positions.start if isinstance(positions, slice) else positions[rows], distances


class MemoryVectors(VectorsByPosition):
    """The stored vectors, in memory as they are stored (float32, float16, or int8 with a scale per vector).

    Under cosine, float32 vectors are kept at length 1.
    """

    def __init__(self, vectors: NDArray[Any], scale: NDArray[np.float32] | None, metric: Metric) -> None:
        self.count, self.dim = vectors.shape
        self.metric = metric
        self._vectors = vectors
        self._scale = scale

    @classmethod
    def load(cls, store: Store, places: Places, metric: Metric) -> MemoryVectors:
        """Read the stored vectors of some items, once, straight into their places."""
        config, count = store.config, places.count
        dtype = _STORED_DTYPES[config.vectors]
        vectors = np.empty((count, config.dim), dtype=dtype)
        scale = np.empty(count, dtype=np.float32) if config.vectors == "int8" else None
        columns = ("v", "scale") if scale is not None else ("v",)

        def place(positions: Positions, batch: dict[str, NDArray[Any]]) -> None:
            stored = batch["v"].view(dtype)
            vectors[positions] = metrics.comparable(stored, metric) if dtype == np.float32 else stored
            if scale is not None:
                scale[positions] = batch["scale"]

        one_behind(stored_in_place(store, places, *columns), place)
        return cls(vectors, scale, metric)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._vectors.nbytes + (0 if self._scale is None else self._scale.nbytes)

    @property
    def stored(self) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """All vectors as they are stored, and their scales if they are int8."""
        return self._vectors, self._scale

    def take(self, positions: Positions | slice) -> Vectors:
        """The vectors at some positions."""
        return from_stored(self._vectors[positions], None if self._scale is None else self._scale[positions])

    def distances(self, queries: Vectors, positions: Positions) -> Distances:
        """As the parent's; for float32 rows FAISS computes them in place, without gathering rows first."""
        if self._vectors.dtype != np.float32 or not faiss_works():
            return super().distances(queries, positions)
        faiss = import_faiss()
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        found = np.empty(positions.shape, dtype=np.float32)
        compute = faiss.fvec_L2sqr_by_idx if self.metric == "l2" else faiss.fvec_inner_products_by_idx
        pointers = [faiss.swig_ptr(array) for array in (found, queries, self._vectors, positions)]
        compute(*pointers, self.dim, *positions.shape)
        if self.metric == "l2":
            np.sqrt(found, out=found)
        else:
            np.subtract(1.0 if self.metric == "cosine" else 0.0, found, out=found)
        found[positions < 0] = np.inf
        return np.maximum(found, 0) if self.metric == "cosine" else found

    def _nearest_of(self, queries: Vectors, positions: Positions | slice, k: int) -> tuple[Positions, Distances]:
        """As the parent's; for a few queries copying or multiplying vectors would take longer than comparing them."""
        few = _FEW_FOR_ALL if isinstance(positions, slice) else _FEW_QUERIES
        if len(queries) > few or self._vectors.dtype != np.float32 or not faiss_works():
            return super()._nearest_of(queries, positions, k)
        if isinstance(positions, slice):
            positions = np.arange(positions.start, positions.stop)
        distances = self.distances(queries, np.broadcast_to(positions, (len(queries), len(positions))))
        columns = metrics.smallest_columns(distances, min(k, len(positions)))
        return positions[columns], np.take_along_axis(distances, columns, axis=1)


class FileVectors(VectorsByPosition):
    """The stored vectors, left in the file: the few that are re-ranked are fetched by row number."""

    def __init__(self, store: Store, rows: NDArray[np.integer], metric: Metric, span: range | None = None) -> None:
        """``rows`` (n,): the row of the item at each position. ``span``: has all of them; None if that is not known."""
        self.metric, self.count, self.dim = metric, len(rows), store.config.dim
        self._store = store
        self._rows, self._span = rows, span
        self._dtype = _STORED_DTYPES[store.config.vectors]
        self._columns = ("v", "scale") if store.config.vectors == "int8" else ("v",)

    def take(self, positions: Positions | slice) -> Vectors:
        """The vectors at some positions."""
        return self._plain(self._store.vectors_of(self._rows[positions].astype(np.int64), *self._columns))

    def batches(self, size: int) -> Iterator[tuple[Positions | slice, Vectors]]:
        """As the parent's; in the order of the file, and as many at a time as the store reads."""
        rows = self._rows.astype(np.int64, copy=False)
        span = self._span or range(int(rows.min(initial=0)), int(rows.max(initial=-1)) + 1)
        for positions, batch in stored_in_place(self._store, Places(rows, span), *self._columns):
            for start in range(0, len(positions), size):
                part = slice(start, start + size)
                yield positions[part], self._plain({name: column[part] for name, column in batch.items()})

    def distances(self, queries: Vectors, positions: Positions) -> Distances:
        """As the parent's, but with one statement for as many queries as memory allows: it takes milliseconds."""
        return _distances_taken_together(self, queries, positions)

    def _plain(self, found: dict[str, NDArray[Any]]) -> Vectors:
        return from_stored(found["v"].view(self._dtype), found.get("scale"))


class DecodedVectors(VectorsByPosition):
    """What the codes decode to: for an index that stores no vectors."""

    exact = False

    def __init__(self, quantizer: Quantizer, codes: StoredCodes, leaves: Leaves, dim: int, metric: Metric) -> None:
        self.metric, self.count, self.dim = metric, len(codes.rows), dim
        layout = leaves.layout

        def decode(positions: Positions | slice) -> Vectors:
            rest = None if codes.rest is None else codes.rest[positions]
            return quantizer.decode(unpack(codes.sids[positions], layout, rest))

        self._decode: Callable[[Positions | slice], Vectors] = decode

    def decode_by(self, decoded: Callable[[Positions], Vectors]) -> None:
        """Let go of the codes: from now on a function decodes those at some positions."""

        def decode(positions: Positions | slice) -> Vectors:
            return decoded(np.arange(*positions.indices(self.count)) if isinstance(positions, slice) else positions)

        self._decode = decode

    def take(self, positions: Positions | slice) -> Vectors:
        """The decoded vectors at some positions."""
        return self._decode(positions)

    def distances(self, queries: Vectors, positions: Positions) -> Distances:
        """As the parent's, but what several queries need is decoded once."""
        return _distances_taken_together(self, queries, positions)


def _distances_taken_together(vectors: VectorsByPosition, queries: Vectors, positions: Positions) -> Distances:
    """The distance of each query to its candidates; what many queries need is taken once, whoever needs it."""
    found = np.full(positions.shape, np.inf, dtype=np.float32)
    tile = max(1, _TAKEN_BYTES // max(1, positions.shape[1] * vectors.dim * 4))
    for start in range(0, len(queries), tile):
        part = slice(start, start + tile)
        there = positions[part] >= 0
        wanted, places = np.unique(positions[part][there], return_inverse=True)
        if not len(wanted):
            continue
        taken = vectors.take(wanted)
        rows = MemoryVectors(metrics.comparable(taken, vectors.metric), None, vectors.metric)
        numbers = np.full(there.shape, -1, dtype=np.int64)
        numbers[there] = places
        found[part] = rows.distances(queries[part], numbers)
    return found


def stored_in_place(store: Store, places: Places, *columns: str) -> Iterator[tuple[Positions, dict[str, NDArray[Any]]]]:
    """The named columns of the stored vectors of some items, in batches, with the position of each item.

    Raises :class:`CorruptIndexError` unless there is exactly one vector for each item.
    """
    seen = np.zeros(places.count, dtype=bool)
    for rows, batch in store.vector_batches(*columns, rows=places.span):
        positions = places.of(rows)
        if (positions < 0).any():
            raise CorruptIndexError(f"{store.path} has vectors without codes. {RESTORE}")
        seen[positions] = True
        yield positions, batch
    if not seen.all():
        raise CorruptIndexError(f"{store.path} lacks some of its vectors. {RESTORE}")


def one_behind(items: Iterable[tuple[Any, ...]], work: Callable[..., None]) -> None:
    """Call ``work`` with each of some items, in turn, in a thread of its own, while the next one is being read."""
    with ThreadPoolExecutor(1, "semid-load") as thread:
        doing: Future[None] | None = None
        for item in items:
            if doing is not None:
                doing.result()
            doing = thread.submit(work, *item)
        if doing is not None:
            doing.result()


def to_stored(vectors: Vectors, tier: str) -> dict[str, NDArray[Any]]:
    """Vectors (n, dim) as columns of ``semid_vectors``.

    float16 is kept as its bits, for DuckDB has no such type; int8 rows are divided by a scale of their own, so that the
    largest entry becomes 127.
    """
    if tier == "float32":
        return {"v": vectors}
    if tier == "float16":
        return {"v": vectors.astype(np.float16).view(np.uint16)}
    if tier == "int8":
        scale = np.maximum(np.abs(vectors).max(axis=1), np.float32(1e-30)) / np.float32(127)
        return {"v": np.rint(vectors / scale[:, None]).astype(np.int8), "scale": scale}
    return {}


def stored_dtype(tier: str) -> np.dtype[Any]:
    """The type of the values that ``semid_vectors`` holds, of float16 too, which DuckDB knows as its bits."""
    return _STORED_DTYPES[tier]


def from_stored(vectors: NDArray[Any], scale: NDArray[np.float32] | None) -> Vectors:
    """The float32 vectors that stored ones stand for."""
    plain = vectors.astype(np.float32, copy=False)
    return plain if scale is None else plain * scale[:, None]


# -- executors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanData:
    """What an executor may scan: everything about the items, in the order of their sids."""

    leaves: Leaves
    codes: StoredCodes
    quantizer: Quantizer
    vectors: VectorsByPosition
    metric: Metric
    tail: Tail | None
    tail_codes: Callable[[], NDArray[np.uint8]]
    """Reads the tail codes (n, parts / 2) when called."""


class Executor(Protocol):
    """Scans the items of probed leaves. Those that ``semid_register_executors`` offers are listed, not used yet."""

    name: str
    exact: bool
    """Whether its distances are final, so that re-ranking would change nothing."""

    def search(self, queries: Vectors, probes: Probes, k: int) -> tuple[Distances, Positions]:
        """The k nearest items of the probed leaves: (q, k) distances and positions, padded with inf and -1."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in memory."""


class NumpyExecutor:
    """Computes the distance of every candidate, in NumPy: the oracle for the others, and what works everywhere."""

    name = "numpy"
    exact = True
    nbytes = 0

    def __init__(self, data: ScanData) -> None:
        self._leaves, self._vectors = data.leaves, data.vectors

    def search(self, queries: Vectors, probes: Probes, k: int) -> tuple[Distances, Positions]:
        """See :class:`Executor`."""
        return search_candidates(self._vectors, queries, candidates_of(self._leaves, probes), k)


class FaissTailExecutor:
    """Scans tail codes with FAISS: an inverted file of 4-bit product codes whose lists are the leaves."""

    name = "faiss-tail"
    exact = False

    def __init__(self, data: ScanData) -> None:
        faiss = import_faiss()
        if data.tail is None:
            raise ValueError("FaissTailExecutor needs tail codes.")
        self._faiss, self._leaves = faiss, data.leaves
        self._dim = data.tail.padded_dim
        metric = faiss.METRIC_INNER_PRODUCT if data.metric == "ip" else faiss.METRIC_L2
        self._no_centroids = faiss.IndexFlat(self._dim, metric)  # leaves are chosen by the look-up, not by FAISS
        lists = faiss.IndexIVFPQ(self._no_centroids, self._dim, len(data.leaves), data.tail.parts, 4, metric)
        lists.by_residual = False
        lists.pq = data.tail.quantizer()
        lists.is_trained = True
        fill_lists(lists, data.leaves.starts, data.tail_codes())
        # FastScan lays codes out in blocks; filling its lists directly would corrupt memory, so it converts plain ones
        self._index = faiss.IndexIVFPQFastScan(lists)
        self._bytes = len(data.codes.rows) * (data.tail.parts // 2 + 8)

    @property
    def nbytes(self) -> int:
        """Codes and FAISS's own 8-byte numbers, without the padding of its blocks."""
        return self._bytes

    def search(self, queries: Vectors, probes: Probes, k: int) -> tuple[Distances, Positions]:
        """See :class:`Executor`."""
        distances, positions = search_lists(self._index, pad(queries, self._dim), probes, k)
        self._fill(positions, probes)
        return distances, positions

    def _fill(self, positions: Positions, probes: Probes) -> None:
        """Put items that FAISS left out where a row has room for them.

        FastScan rounds inner products to whole numbers from 0 on, and keeps none that is 0: the farthest items.
        """
        opened = np.where(probes.leaves >= 0, self._leaves.sizes[probes.leaves], 0).sum(axis=1)
        short = np.count_nonzero(positions >= 0, axis=1) < np.minimum(opened, positions.shape[1])
        rows = np.flatnonzero(short)
        for row, candidates in zip(rows, candidates_of(self._leaves, probes.of(rows)), strict=True):
            empty = np.flatnonzero(positions[row] < 0)
            left_out = np.setdiff1d(candidates, positions[row])[: len(empty)]
            positions[row, empty[: len(left_out)]] = left_out


class FaissCodeExecutor:
    """Scans the semantic IDs themselves with FAISS, by look-up tables: an inverted file of additive codes."""

    name = "faiss-codes"
    exact = False

    def __init__(self, data: ScanData) -> None:
        faiss = import_faiss()
        codebooks = data.quantizer.codebooks
        if codebooks is None:
            raise ValueError("FaissCodeExecutor needs an additive quantizer.")
        layout = data.leaves.layout
        inner_product = data.metric == "ip"
        metric = faiss.METRIC_INNER_PRODUCT if inner_product else faiss.METRIC_L2
        kind = faiss.AdditiveQuantizer.ST_LUT_nonorm if inner_product else faiss.AdditiveQuantizer.ST_norm_float
        dim = codebooks[0].shape[1]
        self._no_centroids = faiss.IndexFlat(dim, metric)
        bits = faiss.UInt64Vector()
        for level_bits in layout.bits:
            bits.push_back(level_bits)
        index = faiss.IndexIVFResidualQuantizer(self._no_centroids, dim, len(data.leaves), bits, metric, kind)
        index.by_residual = False
        words = np.zeros((sum(1 << level_bits for level_bits in layout.bits), dim), dtype=np.float32)
        offset = 0
        for codebook, level_bits in zip(codebooks, layout.bits, strict=True):
            words[offset : offset + len(codebook)] = codebook
            offset += 1 << level_bits
        faiss.copy_array_to_vector(words.reshape(-1), index.rq.codebooks)
        index.rq.is_trained = index.is_trained = True
        packed = np.empty((len(data.codes.rows), index.code_size), dtype=np.uint8)
        for start in range(0, len(packed), _EXACT_BLOCK):
            part = slice(start, start + _EXACT_BLOCK)
            rest = None if data.codes.rest is None else data.codes.rest[part]
            codes = unpack(data.codes.sids[part], layout, rest)
            decoded = data.quantizer.decode(codes)
            norms = np.einsum("ij,ij->i", decoded, decoded)
            block = np.empty((len(codes), index.code_size), dtype=np.uint8)
            norm_pointer = None if inner_product else faiss.swig_ptr(norms)
            index.rq.pack_codes(len(codes), faiss.swig_ptr(codes), faiss.swig_ptr(block), -1, norm_pointer, None)
            packed[part] = block
        fill_lists(index, data.leaves.starts, packed)
        self._index = index
        self._bytes = packed.nbytes + 8 * len(packed)

    @property
    def nbytes(self) -> int:
        """Codes, norms and FAISS's own 8-byte numbers."""
        return self._bytes

    def search(self, queries: Vectors, probes: Probes, k: int) -> tuple[Distances, Positions]:
        """See :class:`Executor`."""
        return search_lists(self._index, queries, probes, k)


def choose_executor(data: ScanData) -> Executor:
    """The fastest executor that the data and the installed libraries allow."""
    if not faiss_works():
        return NumpyExecutor(data)
    if data.tail is not None:
        return FaissTailExecutor(data)
    if not data.vectors.exact and data.quantizer.codebooks is not None:
        return FaissCodeExecutor(data)
    return NumpyExecutor(data)


def fill_lists(index: Any, starts: NDArray[np.int64], codes: NDArray[np.uint8]) -> None:
    """Give a FAISS inverted file its codes, numbered as they stand: list i gets ``codes[starts[i]:starts[i + 1]]``."""
    faiss = import_faiss()
    positions = np.arange(len(codes), dtype=np.int64)  # held by a name: FAISS reads it through a bare pointer
    codes = np.ascontiguousarray(codes)
    for number, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        ids, entries = positions[start:end], codes[start:end]
        index.invlists.add_entries(number, end - start, faiss.swig_ptr(ids), faiss.swig_ptr(entries))
    index.ntotal = len(codes)


def search_lists(
    index: Any, queries: Vectors, probes: Probes, k: int, *, turns: threading.Lock = _PROBING
) -> tuple[Distances, Positions]:
    """Let FAISS scan the probed lists. ``turns``: who searches this index has to hold it."""
    no_distances = np.zeros(probes.leaves.shape, dtype=np.float32)  # to the centroids, which these lists do not use
    with turns:
        index.nprobe = probes.leaves.shape[1]
        distances, positions = index.search_preassigned(queries, k, np.ascontiguousarray(probes.leaves), no_distances)
    return distances, positions


def candidates_of(leaves: Leaves | Matches, probes: Probes) -> Iterator[Positions]:
    """What the probed leaves hold, query by query: positions of items, or places in the positions of matches."""
    for chosen in probes.leaves:
        opened = chosen[chosen >= 0]
        yield _ranges(leaves.starts[opened], leaves.starts[opened + 1])


def search_candidates(
    vectors: VectorsByPosition, queries: Vectors, candidates: Iterator[Positions], k: int
) -> tuple[Distances, Positions]:
    """The k nearest of each query's candidates, by exact distances."""
    positions = np.full((len(queries), k), -1, dtype=np.int64)
    distances = np.full((len(queries), k), np.inf, dtype=np.float32)
    for i, mine in enumerate(candidates):
        found, near = vectors.nearest(queries[i : i + 1], k, mine)
        positions[i, : found.shape[1]], distances[i, : found.shape[1]] = found[0], near[0]
    return distances, positions


def search_matches(
    vectors: VectorsByPosition, queries: Vectors, matches: Matches, probes: Probes, k: int
) -> tuple[Positions, Distances]:
    """The k nearest of the matches in the probed leaves, by exact distances: (q, k) each, padded with -1 and inf.

    What any query needs is copied once, however many queries need it, into a FAISS inverted file that lives as long as
    this call.
    """
    if not faiss_works():
        candidates = (matches.positions[mine] for mine in candidates_of(matches, probes))
        return search_candidates(vectors, queries, candidates, k)[::-1]
    opened = np.unique(probes.leaves[probes.leaves >= 0])
    lists = np.full(len(matches.counts) + 1, -1)  # the last for the -1 that probes are padded with
    lists[opened] = np.arange(len(opened))
    probed = Probes(lists[probes.leaves], probes.scores, probes.candidates)
    copied = matches.positions[_ranges(matches.starts[opened], matches.starts[opened + 1])]
    starts = np.concatenate([[0], np.cumsum(matches.counts[opened])])
    best = np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
    block = max(1, _LIST_BYTES // (4 * vectors.dim))
    for start in range(0, len(copied), block):  # a list may begin in one block and end in the next
        part = copied[start : start + block]
        found, near = _nearest_in_lists(vectors, queries, part, np.clip(starts - start, 0, len(part)), probed, k)
        best = smallest(np.concatenate([best[0], found], axis=1), np.concatenate([best[1], near], axis=1), k)
    return best


def _nearest_in_lists(
    vectors: VectorsByPosition, queries: Vectors, positions: Positions, starts: Positions, probes: Probes, k: int
) -> tuple[Positions, Distances]:
    """The k nearest of the items at some positions; probe i opens ``positions[starts[i]:starts[i + 1]]``."""
    faiss = import_faiss()
    rows = np.ascontiguousarray(metrics.comparable(vectors.take(positions), vectors.metric))
    metric = faiss.METRIC_L2 if vectors.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    no_centroids = faiss.IndexFlat(vectors.dim, metric)
    index = faiss.IndexIVFFlat(no_centroids, vectors.dim, len(starts) - 1, metric)
    index.is_trained = True
    fill_lists(index, starts, rows.view(np.uint8))
    near, found = search_lists(index, queries, probes, k)
    if vectors.metric == "l2":
        distances = np.sqrt(np.maximum(near, 0))
    else:
        distances = -near if vectors.metric == "ip" else np.clip(1 - near, 0, 2)
    return np.where(found >= 0, positions[found], -1), np.where(found >= 0, distances, np.float32(np.inf))


def smallest(positions: Positions, distances: Distances, k: int) -> tuple[Positions, Distances]:
    """The k nearest of each row, in order; equal distances by position."""
    if k < distances.shape[1]:
        best = np.argpartition(distances, k - 1, axis=1)[:, :k]
        positions, distances = np.take_along_axis(positions, best, axis=1), np.take_along_axis(distances, best, axis=1)
    order = np.lexsort((positions, distances), axis=1)
    return np.take_along_axis(positions, order, axis=1), np.take_along_axis(distances, order, axis=1)


@contextmanager
def faiss_threads(threads: int | None) -> Iterator[None]:
    """FAISS on so many threads, within this thread of ours."""
    if threads is None or not faiss_works():
        yield
        return
    with openmp_threads(threads):
        yield


_warned = False


def faiss_works() -> bool:
    """Whether FAISS can be imported; says so once if it cannot."""
    global _warned
    try:
        import_faiss()
    except MissingDependencyError as error:
        if not _warned:
            log.warning("Searching with NumPy, which is slow. %s", error)
            _warned = True
        return False
    return True


def _ranges(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Positions:
    """All whole numbers in some ranges, one after the other."""
    lengths = ends - starts
    if not lengths.sum():
        return np.empty(0, dtype=np.int64)
    offsets = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    positions: Positions = np.arange(lengths.sum()) + offsets
    return positions
