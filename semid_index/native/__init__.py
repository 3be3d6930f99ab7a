"""The native scan: everything between a query and its hits in one call of compiled code.

It is optional. A C++ compiler that is there at installation makes ``libsemid_scan.so`` (see ``hatch_build.py``), which
this module loads with ctypes; where it is missing, or ``SEMID_NATIVE=0`` is set, FAISS does the scanning.
``SEMID_NATIVE=plain``, ``avx2`` or ``avx512`` asks for one of its kernels; by default the best that the processor has
is taken.
"""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LIBRARY = Path(__file__).parent / "libsemid_scan.so"
KERNELS = ("plain", "avx2", "avx512")
_ABI = 3
_DTYPES = {"float32": 1, "float16": 2, "int8": 3}
_METRICS = {"l2": 0, "cosine": 1, "ip": 2}
_PANEL = 32  # columns side by side in a packed matrix
_LEAST_TILE = 64
_TILE = 512  # queries that are scanned together: their products are held, and they share what they read from memory

_Pointer = ctypes.c_void_p
_Int32, _Int64, _Float = ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _Parts(ctypes.Structure):
    """``semid_parts`` of scan.cpp."""

    _fields_ = (
        ("items", _Int64),
        *(
            (name, _Int32)
            for name in ("metric", "dim", "leaves", "terms", "zero_column", "parts", "width", "heads", "dtype")
        ),
        *(
            (name, _Pointer)
            for name in (
                "starts",
                "leaf_constants",
                "leaf_terms",
                "first_codes",
                "first_constants",
                "head_codes",
                "head_columns",
                "head_sizes",
                "tail_codes",
                "codebooks",
                "scalars",
            )
        ),
        ("factor", _Float),
        ("vectors", _Pointer),
        ("scale", _Pointer),
    )


class _Request(ctypes.Structure):
    """``Request`` of scan.h."""

    _fields_ = (
        ("queries", _Int64),
        ("vectors", _Pointer),
        ("rotated", _Pointer),
        ("products", _Pointer),
        ("columns", _Int64),
        ("goal", _Int64),
        ("least_leaves", _Int64),
        ("given", _Pointer),
        ("given_width", _Int64),
        ("counts", _Pointer),
        ("allowed", _Pointer),
        ("keep", _Int64),
        ("k", _Int64),
        ("positions", _Pointer),
        ("distances", _Pointer),
        ("candidates", _Pointer),
        ("opened", _Pointer),
        ("shown", _Int64),
        ("shown_leaves", _Pointer),
        ("shown_scores", _Pointer),
        ("seconds", _Pointer),
        ("threads", _Int32),
        ("isa", _Int32),
    )


class _Encoding(ctypes.Structure):
    """``Encoding`` of scan.h."""

    _fields_ = (
        ("items", _Int64),
        *((name, _Int32) for name in ("parts", "width", "levels")),
        *(
            (name, _Pointer)
            for name in ("rotated", "lengths", "columns", "words", "centre", "codebooks", "codes", "scalars")
        ),
    )


class _Training(ctypes.Structure):
    """``Training`` of scan.h."""

    _fields_ = (
        ("items", _Int64),
        *((name, _Int32) for name in ("parts", "width", "iterations")),
        ("points", _Pointer),
        ("codebooks", _Pointer),
    )


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return "it was not built: no C++ compiler was found when semid-index was installed"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.semid_abi.restype = _Int32
        if library.semid_abi() != _ABI:
            return "it was built from another version"
        library.semid_new.restype, library.semid_new.argtypes = _Pointer, [_Pointer]
        library.semid_free.restype, library.semid_free.argtypes = None, [_Pointer]
        library.semid_bytes.restype, library.semid_bytes.argtypes = _Int64, [_Pointer]
        library.semid_search.restype, library.semid_search.argtypes = _Int32, [_Pointer, _Pointer]
        library.semid_multiply.restype = None
        library.semid_multiply.argtypes = [_Pointer, _Int64, _Int32, _Pointer, _Int64, _Pointer, _Int32]
        library.semid_columns.restype, library.semid_columns.argtypes = None, [_Pointer, _Pointer, _Int64, _Pointer]
        library.semid_sum_words.restype = None
        library.semid_sum_words.argtypes = [_Pointer, _Int32, _Pointer, _Int64, _Int32, _Pointer]
        library.semid_encode.restype, library.semid_encode.argtypes = _Int32, [_Pointer, _Int32, _Int32]
        library.semid_train.restype, library.semid_train.argtypes = _Int32, [_Pointer, _Int32, _Int32]
        library.semid_best_isa.restype = _Int32
    except (OSError, AttributeError) as error:
        return f"it cannot be loaded: {error}"
    return library


def _loaded() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"There is no native scan: {library}.")
    return library


def unavailable_because() -> str | None:
    """Why there is no native scan; None if there is one."""
    if os.environ.get("SEMID_NATIVE") == "0":
        return "SEMID_NATIVE=0 switches it off"
    library = _load()
    return library if isinstance(library, str) else None


def kernel_name() -> str:
    """The kernel in use: the best that the processor has, or the one that ``SEMID_NATIVE`` asks for."""
    library = _loaded()
    best: int = library.semid_best_isa()
    asked = os.environ.get("SEMID_NATIVE", "")
    return KERNELS[min(KERNELS.index(asked), best) if asked in KERNELS else best]


def _asked_isa() -> int:
    """What ``SEMID_NATIVE`` asks for, as the library numbers it; -1 for the best that the processor has."""
    asked = os.environ.get("SEMID_NATIVE")
    return KERNELS.index(asked) if asked in KERNELS else -1


@dataclass(frozen=True)
class ScanParts:
    """What a native index is made of. The *products* of a query are its products with ``words``, in their order."""

    metric: str
    starts: NDArray[np.int64]
    """(n_leaves + 1,) leaf i holds the items ``starts[i]`` to ``starts[i + 1]``."""
    words: NDArray[np.float32]
    """(columns, width of a rotated query)"""
    leaf_terms: NDArray[np.int32]
    """(terms, n_leaves) The score of a leaf is its constant and the products of its terms; ``zero_column`` for none."""
    zero_column: int
    """A column of words that are all 0."""
    leaf_constants: NDArray[np.float32]
    """(n_leaves,)"""
    rotation: NDArray[np.float32] | None
    """(dim, parts * width) None: queries are padded with zeros instead."""
    centre: NDArray[np.float32]
    """(dim,) subtracted from queries."""
    codebooks: NDArray[np.float32]
    """(parts, 16, width)"""
    tail_codes: NDArray[np.uint8]
    """(n, ceil(parts / 2)) two codes per byte, the first in the lower half."""
    first_codes: NDArray[np.int32] | None
    """(n,) the column of each item's first codeword, in the order of the leaves."""
    first_constants: NDArray[np.float32] | None
    """(columns,) subtracted from ``scalars`` already"""
    head_codes: NDArray[np.uint8]
    """(n, heads) further codes."""
    head_columns: NDArray[np.int32]
    """(heads,) the column of code 0 of each."""
    head_sizes: NDArray[np.int32]
    """(heads,) codewords of each, at most 256."""
    scalars: NDArray[np.float32] | None
    """(n,) what is added whatever the query."""
    factor: float
    """Of all products: -2 for squared distances, -1 for inner products."""


class Scanned(NamedTuple):
    """What a native search found."""

    positions: NDArray[np.int64]
    """(q, k) padded with -1"""
    distances: NDArray[np.float32]
    """(q, k) padded with inf"""
    candidates: NDArray[np.int64]
    """(q,) items in the opened leaves."""
    opened: NDArray[np.int64]
    """(q,) leaves opened."""
    leaves: NDArray[np.int64]
    """(q, shown) the first of them, best first, padded with -1."""
    scores: NDArray[np.float32]
    """(q, shown) theirs"""
    seconds: NDArray[np.float64]
    """(3,) of all threads together: choosing leaves, scanning, re-ranking."""


class _Place:
    """A request for one query, and memory for what it finds; to make both anew would take as long as half a scan."""

    def __init__(self, columns: int, width: int, shown: int) -> None:
        self.width, self.shown = width, shown
        self.products = np.empty((1, columns), dtype=np.float32)
        self.seconds = np.empty(3)
        self._numbers = np.empty(width + shown + 2, dtype=np.int64)  # positions, leaves, candidates, opened
        self._measures = np.empty(width + shown, dtype=np.float32)  # distances, scores
        numbers, measures = _address(self._numbers), _address(self._measures)
        self.request = _Request(
            queries=1,
            products=_address(self.products),
            columns=columns,
            positions=numbers,
            distances=measures,
            candidates=numbers + 8 * (width + shown),
            opened=numbers + 8 * (width + shown + 1),
            shown=shown,
            shown_leaves=numbers + 8 * width,
            shown_scores=measures + 4 * width,
            seconds=_address(self.seconds),
        )
        self.reference = ctypes.byref(self.request)

    def found(self) -> Scanned:
        """A copy of what was found."""
        numbers, measures = self._numbers.copy(), self._measures.copy()
        width, last = self.width, self.width + self.shown
        return Scanned(
            numbers[np.newaxis, :width],
            measures[np.newaxis, :width],
            numbers[last : last + 1],
            numbers[last + 1 :],
            numbers[np.newaxis, width:last],
            measures[np.newaxis, width:last],
            self.seconds.copy(),
        )


class _Matrix:
    """A matrix (dim, columns) that queries are multiplied with; not by BLAS, see ``multiply`` in kernel.cpp."""

    def __init__(self, matrix: NDArray[np.floating]) -> None:
        self._dim, self.columns = matrix.shape
        panels = -(-self.columns // _PANEL)
        padded = np.zeros((self._dim, panels * _PANEL), dtype=np.float32)
        padded[:, : self.columns] = matrix
        self._packed = np.ascontiguousarray(padded.reshape(self._dim, panels, _PANEL).transpose(1, 0, 2))
        self._place = _address(self._packed)
        self._multiply = _loaded().semid_multiply

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._packed.nbytes

    def times(self, rows: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Contiguous rows (q, dim) times the matrix: (q, columns)."""
        count = len(rows)
        found = np.empty((count, self.columns), dtype=np.float32) if out is None else out
        self._multiply(_address(rows), count, self._dim, self._place, self.columns, _address(found), _asked_isa())
        return found


class NativeIndex:
    """Codes and vectors laid out for the native scan."""

    def __init__(
        self, parts: ScanParts, dim: int, vectors: NDArray[Any] | None, scale: NDArray[np.float32] | None
    ) -> None:
        library = self._library = _loaded()
        self._centre = np.asarray(parts.centre, dtype=np.float32)  # of the parts only what queries need is kept
        self._rotation = None if parts.rotation is None else _Matrix(parts.rotation)
        self._levels = len(parts.head_sizes) + (parts.first_codes is not None)
        self._words = _Matrix(np.float32(parts.factor) * parts.words.T)
        self._codebooks = np.ascontiguousarray(parts.codebooks.transpose(0, 2, 1))
        self._width = parts.codebooks.shape[0] * parts.codebooks.shape[2]
        # all that the library keeps pointers to stays alive with self
        self._held = [
            _contiguous(array, dtype)
            for array, dtype in (
                (parts.head_columns, np.int32),
                (parts.head_sizes, np.int32),
                (parts.first_constants, np.float32),
                (vectors, None),
                (scale, np.float32),
            )
        ]
        once = [
            _contiguous(array, dtype)
            for array, dtype in (
                (parts.starts, np.int64),
                (parts.leaf_constants, np.float32),
                (parts.leaf_terms, np.int32),
                (parts.first_codes, np.int32),
                (parts.head_codes, np.uint8),
                (parts.tail_codes, np.uint8),
                (parts.scalars, np.float32),
            )
        ]
        columns, sizes, shared, rows, scales = map(_pointer, self._held)
        starts, constants, terms, first, heads, tail, scalars = map(_pointer, once)
        config = _Parts(
            items=int(parts.starts[-1]),
            metric=_METRICS[parts.metric],
            dim=dim,
            leaves=len(parts.leaf_constants),
            terms=len(parts.leaf_terms),
            zero_column=parts.zero_column,
            parts=parts.codebooks.shape[0],
            width=parts.codebooks.shape[2],
            heads=len(parts.head_sizes),
            dtype=0 if vectors is None else _DTYPES[str(vectors.dtype)],
            starts=starts,
            leaf_constants=constants,
            leaf_terms=terms,
            first_codes=first,
            first_constants=shared,
            head_codes=heads,
            head_columns=columns,
            head_sizes=sizes,
            tail_codes=tail,
            codebooks=self._codebooks.ctypes.data,
            scalars=scalars,
            factor=parts.factor,
            vectors=rows,
            scale=scales,
        )
        self._places = threading.local()
        self._handle = library.semid_new(ctypes.byref(config))
        if not self._handle:
            raise MemoryError("There is not enough memory for the codes of all items.")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.semid_free(self._handle)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without the vectors."""
        held = sum(array.nbytes for array in self._held[:3] if array is not None)
        return int(self._library.semid_bytes(self._handle)) + self._words.nbytes + self._codebooks.nbytes + held

    def search(
        self,
        queries: NDArray[np.float32],
        *,
        k: int | None,
        keep: int,
        goal: int = 0,
        least_leaves: int = 1,
        leaves: NDArray[np.int64] | None = None,
        counts: NDArray[np.integer] | None = None,
        allowed: NDArray[np.bool_] | None = None,
        shown: int = 0,
        threads: int = 1,
    ) -> Scanned:
        """The k nearest of the best ``keep`` of a scan, by exact distances.

        ``k=None``: all that the scan kept, by its own. Leaves are opened until they hold ``goal`` items and are
        ``least_leaves`` many; or those in ``leaves`` (q, p), padded with -1. ``allowed`` (n,): the items that may be
        found; ``counts`` (n_leaves,): how many each leaf holds of them.
        """
        count, width = len(queries), k or keep
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if count == 1 and leaves is None:
            place = self._place(width, shown)
            request = place.request
            request.goal, request.least_leaves, request.keep, request.k = goal, least_leaves, keep, k or 0
            counted, permitted = _contiguous(counts, np.int32), _contiguous(allowed, np.bool_)
            request.counts, request.allowed = _pointer(counted), _pointer(permitted)
            request.threads, request.isa = threads, _asked_isa()
            found = self._search_one(queries, place)
            self._places.place = place
            return found
        found = Scanned(
            np.empty((count, width), dtype=np.int64),
            np.empty((count, width), dtype=np.float32),
            np.empty(count, dtype=np.int64),
            np.empty(count, dtype=np.int64),
            np.empty((count, shown), dtype=np.int64),
            np.empty((count, shown), dtype=np.float32),
            np.zeros(3),
        )
        given = None if leaves is None else np.ascontiguousarray(leaves, dtype=np.int64)
        isa = _asked_isa()
        counted = _contiguous(counts, np.int32)
        permitted = None if allowed is None else np.ascontiguousarray(allowed).view(np.uint8)
        results = (found.positions, found.distances, found.candidates, found.opened, found.leaves, found.scores)
        rows = [(_address(array), array.strides[0]) for array in results]
        together = min(_TILE, max(_LEAST_TILE, -(-count // (2 * threads)))) if threads > 1 else _TILE
        tiles = range(0, count, together)
        workers = max(1, min(threads, len(tiles)))

        def scan(start: int) -> NDArray[np.float64]:
            part = queries[start : start + together]
            rotated = self._rotated(part)
            products = self._words.times(rotated)
            positions, distances, candidates, opened, shown_leaves, shown_scores = [
                first + start * step for first, step in rows
            ]
            seconds = np.zeros(3)
            request = _Request(
                queries=len(part),
                vectors=_address(part),
                rotated=_address(rotated),
                products=_address(products),
                columns=products.shape[1],
                goal=goal,
                least_leaves=least_leaves,
                given=None if given is None else given[start:].ctypes.data,
                given_width=0 if given is None else given.shape[1],
                counts=_pointer(counted),
                allowed=_pointer(permitted),
                keep=keep,
                k=k or 0,
                positions=positions,
                distances=distances,
                candidates=candidates,
                opened=opened,
                shown=shown,
                shown_leaves=shown_leaves,
                shown_scores=shown_scores,
                seconds=_address(seconds),
                threads=max(threads // workers, 1),
                isa=isa,
            )
            if self._library.semid_search(self._handle, ctypes.byref(request)):
                raise MemoryError("There is not enough memory for this search.")
            return seconds

        if workers == 1:
            spent = [scan(start) for start in tiles]
        else:  # tiles side by side, and not only the scan inside each: products take a sixth of the time
            with ThreadPoolExecutor(workers) as pool:
                spent = list(pool.map(scan, tiles))
        found.seconds[:] = sum(spent)
        return found

    def columns(self, positions: NDArray[np.int64]) -> NDArray[np.int32]:
        """The words of some items, as columns: m positions in, (m, levels that the scan reads) out."""
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        found = np.empty((len(positions), self._levels), dtype=np.int32)
        self._library.semid_columns(self._handle, positions.ctypes.data, len(positions), found.ctypes.data)
        return found

    def _search_one(self, query: NDArray[np.float32], place: _Place) -> Scanned:
        """What was asked for in a place, for one query (1, dim)."""
        rotated = self._rotated(query)
        self._words.times(rotated, out=place.products)
        request = place.request
        request.vectors, request.rotated = _address(query), _address(rotated)
        place.seconds.fill(0)
        if self._library.semid_search(self._handle, place.reference):
            raise MemoryError("There is not enough memory for this search.")
        return place.found()

    def _place(self, width: int, shown: int) -> _Place:
        """Where the results of a single query go: that of the last one in this thread, unless it is in use."""
        place: _Place | None = getattr(self._places, "place", None)
        self._places.place = None
        if place is None or (place.width, place.shown) != (width, shown):
            place = _Place(self._words.columns, width, shown)
        return place

    def _rotated(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Queries in the space of the tail: (q, dim) in, (q, parts * width) out."""
        centred = queries - self._centre
        if self._rotation is None:
            missing = max(self._width - centred.shape[1], 0)
            return np.ascontiguousarray(np.pad(centred, ((0, 0), (0, missing))) if missing else centred)
        return self._rotation.times(centred)


def train(
    points: NDArray[np.float32], begin: NDArray[np.float32], *, iterations: int, threads: int
) -> NDArray[np.float32]:
    """16 codewords for each part by k-means: points (n, parts, width), first words (parts, 16, width); better ones."""
    library = _loaded()
    points = np.ascontiguousarray(points, dtype=np.float32)
    words = np.ascontiguousarray(begin.transpose(0, 2, 1), dtype=np.float32)
    training = _Training(len(points), *points.shape[1:], iterations, points.ctypes.data, words.ctypes.data)
    if library.semid_train(ctypes.byref(training), threads, _asked_isa()):
        raise MemoryError("There is not enough memory to learn codewords.")
    return np.ascontiguousarray(words.transpose(0, 2, 1))


def encode(
    rotated: NDArray[np.float32],
    lengths: NDArray[np.float32],
    columns: NDArray[np.int32],
    words: NDArray[np.float32],
    centre: NDArray[np.float32],
    codebooks: NDArray[np.float32],
    *,
    threads: int,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """4-bit codes (n, ceil(parts / 2)) of what words leave over of vectors, and what belongs to them: (n,).

    A rotated vector (n, parts * width) less the ``words`` in its ``columns`` (n, levels), and plus ``centre``, is cut
    into parts; each gets the number of the nearest of its 16 codewords. The scalar of an item, which becomes that of
    :class:`ScanParts`, is ``|x'|^2 + |x - x'|^2``, x' being what the item's words and codes stand for: with it, errors
    of the codes do not make items look nearer than they are. ``lengths`` (n,): squared, of the vectors before rotation.
    """
    library = _loaded()
    codes = np.empty((len(rotated), -(-len(codebooks) // 2)), dtype=np.uint8)
    scalars = np.empty(len(rotated), dtype=np.float32)
    arrays: tuple[NDArray[Any], ...] = (
        np.ascontiguousarray(rotated, dtype=np.float32),
        np.ascontiguousarray(lengths, dtype=np.float32),
        np.ascontiguousarray(columns, dtype=np.int32),
        np.ascontiguousarray(words, dtype=np.float32),
        np.ascontiguousarray(centre, dtype=np.float32),
        np.ascontiguousarray(codebooks.transpose(0, 2, 1), dtype=np.float32),
        codes,
        scalars,
    )
    sizes = (len(rotated), len(codebooks), codebooks.shape[2], columns.shape[1])
    encoding = _Encoding(*sizes, *map(_pointer, arrays))
    if library.semid_encode(ctypes.byref(encoding), threads, _asked_isa()):
        raise MemoryError("There is not enough memory for the codes of all items.")
    return codes, scalars


def sum_words(words: NDArray[np.float32], columns: NDArray[np.int32]) -> NDArray[np.float32]:
    """The sum of the words (any, dim) of each item: (m, levels) columns in, (m, dim) out."""
    words, columns = np.ascontiguousarray(words), np.ascontiguousarray(columns)
    sums = np.empty((len(columns), words.shape[1]), dtype=np.float32)
    _loaded().semid_sum_words(words.ctypes.data, words.shape[1], columns.ctypes.data, *columns.shape, sums.ctypes.data)
    return sums


def _contiguous(array: NDArray[Any] | None, dtype: Any) -> NDArray[Any] | None:
    return None if array is None else np.ascontiguousarray(array, dtype=dtype)


def _pointer(array: NDArray[Any] | None) -> int | None:
    return None if array is None else int(array.ctypes.data)


_Nothing = ctypes.c_char * 0


def _address(array: NDArray[Any]) -> int:
    """Where a contiguous array begins; in a fraction of the time that ``array.ctypes`` takes."""
    if not array.flags.writeable:
        return int(array.ctypes.data)
    return ctypes.addressof(_Nothing.from_buffer(array))  # type: ignore[arg-type]
