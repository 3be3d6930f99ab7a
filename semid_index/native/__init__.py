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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LIBRARY = Path(__file__).parent / "libsemid_scan.so"
KERNELS = ("plain", "avx2", "avx512")
_ABI = 5
_DTYPES = {"float32": 1, "float16": 2, "int8": 3}
_METRICS = {"l2": 0, "cosine": 1, "ip": 2}
_PANEL = 32  # columns side by side in a packed matrix

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
        *((name, _Pointer) for name in ("vectors", "scale", "centre", "rotation", "words")),
        ("turned", _Int32),
        ("columns", _Int32),
    )


class _Request(ctypes.Structure):
    """``Request`` of scan.h."""

    _fields_ = (
        ("queries", _Int64),
        ("vectors", _Pointer),
        ("lengths", _Pointer),
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
        ("leaves", _Pointer),
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
        library.semid_multiply.restype = _Int32
        library.semid_multiply.argtypes = [_Pointer, _Int64, _Int32, _Pointer, _Int64, _Pointer, _Int32, _Int32]
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


@dataclass(frozen=True, eq=False)
class Wanted:
    """What searches for one query are to find; see :meth:`NativeIndex.search`."""

    k: int
    keep: int
    goal: int
    least_leaves: int
    counts: NDArray[np.int32] | None
    allowed: NDArray[np.bool_] | None

    @classmethod
    def of(
        cls,
        k: int,
        keep: int,
        goal: int,
        least_leaves: int,
        counts: NDArray[np.integer] | None,
        allowed: NDArray[np.bool_] | None,
    ) -> Wanted:
        """With arrays as the library reads them."""
        return cls(k, keep, goal, least_leaves, _contiguous(counts, np.int32), _contiguous(allowed, np.bool_))


class ScannedOne(NamedTuple):
    """What a native search found for one query."""

    positions: NDArray[np.int64]
    """(k,) padded with -1"""
    distances: NDArray[np.float32]
    """(k,) padded with inf"""
    counts: list[int]
    """Items in the opened leaves, and leaves opened."""
    seconds: list[float]
    """As in :class:`Scanned`."""
    opened: NDArray[np.float32]
    """The query (dim,), and then what :func:`opened_leaves` reads."""


class _Place:
    """A request for one query, and memory for what it finds; to make both anew would take as long as half a scan."""

    def __init__(self, dim: int, leaves: int, wanted: Wanted, isa: int) -> None:
        self.wanted = wanted
        self.positions = np.empty(wanted.k, dtype=np.int64)
        self.distances = np.empty(wanted.k, dtype=np.float32)
        self.counts = np.empty(2, dtype=np.int64)
        self.seconds = np.empty(3)
        self.length = np.empty(1, dtype=np.float32)
        self.opened = np.empty(dim + 2 * leaves, dtype=np.float32)
        self.query = self.opened[:dim]
        self.request = _Request(
            queries=1,
            vectors=_address(self.opened),
            lengths=_address(self.length),
            goal=wanted.goal,
            least_leaves=wanted.least_leaves,
            counts=_pointer(wanted.counts),
            allowed=_pointer(wanted.allowed),
            keep=wanted.keep,
            k=wanted.k,
            positions=_address(self.positions),
            distances=_address(self.distances),
            candidates=_address(self.counts),
            opened=_address(self.counts) + 8,
            leaves=_address(self.opened) + 4 * dim,
            seconds=_address(self.seconds),
            threads=1,
            isa=isa,
        )
        self.reference = ctypes.byref(self.request)


def opened_leaves(opened: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Leaves, best first, and their scores: pairs of a score and the number of a leaf, in no order, (2 p,) in."""
    pairs = opened.reshape(-1, 2)
    scores, leaves = pairs[:, 0], pairs.view(np.int32)[:, 1]
    order = np.lexsort((leaves, scores))
    return leaves[order].astype(np.int64), scores[order]


def _packed(matrix: NDArray[np.floating]) -> NDArray[np.float32]:
    """A matrix (dim, columns) that queries are multiplied with; not by BLAS, see ``multiply`` in kernel.cpp."""
    dim, columns = matrix.shape
    panels = -(-columns // _PANEL)
    padded = np.zeros((dim, panels * _PANEL), dtype=np.float32)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(dim, panels, _PANEL).transpose(1, 0, 2))


class Multiplier:
    """Multiplies many rows by a matrix (dim, columns), on so many threads.

    BLAS is as quick on one thread; its others wait for work by spinning, and keep a dozen megabytes each for good.
    """

    def __init__(self, matrix: NDArray[np.floating], *, threads: int) -> None:
        self._shape, self._packed, self._threads = matrix.shape, _packed(matrix), threads

    def times(self, rows: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Rows (n, dim) times the matrix: (n, columns)."""
        dim, columns = self._shape
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        found = np.empty((len(rows), columns), dtype=np.float32) if out is None else out
        places = _pointer(rows), len(rows), dim, _pointer(self._packed), columns, _pointer(found)
        if _loaded().semid_multiply(*places, self._threads, _asked_isa()):
            raise MemoryError("There is not enough memory to multiply vectors.")
        return found


class NativeIndex:
    """Codes and vectors laid out for the native scan."""

    def __init__(
        self, parts: ScanParts, dim: int, vectors: NDArray[Any] | None, scale: NDArray[np.float32] | None
    ) -> None:
        library = self._library = _loaded()
        self._isa = _asked_isa()
        self._levels = len(parts.head_sizes) + (parts.first_codes is not None)
        self._words = _packed(np.float32(parts.factor) * parts.words.T)
        self._codebooks = np.ascontiguousarray(parts.codebooks.transpose(0, 2, 1))
        self._dim, self._leaves = dim, len(parts.leaf_constants)
        # all that the library keeps pointers to stays alive with self
        self._held = [
            _contiguous(array, dtype)
            for array, dtype in (
                (parts.head_columns, np.int32),
                (parts.head_sizes, np.int32),
                (parts.first_constants, np.float32),
                (vectors, None),
                (scale, np.float32),
                (parts.centre, np.float32),
                (None if parts.rotation is None else _packed(parts.rotation), None),
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
        columns, sizes, shared, rows, scales, centre, rotation = map(_pointer, self._held)
        starts, constants, terms, first, heads, tail, scalars = map(_pointer, once)
        config = _Parts(
            items=int(parts.starts[-1]),
            metric=_METRICS[parts.metric],
            dim=dim,
            leaves=self._leaves,
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
            centre=centre,
            rotation=rotation,
            words=_address(self._words),
            turned=parts.words.shape[1],
            columns=len(parts.words),
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
        held = (*self._held[:3], *self._held[5:], self._words, self._codebooks)
        return int(self._library.semid_bytes(self._handle)) + sum(array.nbytes for array in held if array is not None)

    @property
    def kernel(self) -> str:
        """The kernel that it was asked for, or the best; by default what ``SEMID_NATIVE`` said when it was made."""
        return kernel_name() if self._isa < 0 else KERNELS[self._isa]

    @kernel.setter
    def kernel(self, name: str) -> None:
        self._isa = KERNELS.index(name)
        self._places = threading.local()

    def search(
        self,
        queries: NDArray[np.float32],
        *,
        lengths: NDArray[np.float32] | None = None,
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

        ``lengths`` (q,): queries are divided by these first. ``k=None``: all that the scan kept, by its own distances.
        Leaves are opened until they hold ``goal`` items and are ``least_leaves`` many; or those in ``leaves`` (q, p),
        padded with -1. ``allowed`` (n,): the items that may be found; ``counts`` (n_leaves,): how many each leaf holds
        of them. ``shown``: of the leaves that it opens, so many are named.
        """
        count, width = len(queries), k or keep
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        found = Scanned(
            np.empty((count, width), dtype=np.int64),
            np.empty((count, width), dtype=np.float32),
            np.empty(count, dtype=np.int64),
            np.empty(count, dtype=np.int64),
            np.full((count, shown), -1, dtype=np.int64),
            np.full((count, shown), np.inf, dtype=np.float32),
            np.zeros(3),
        )
        opened = np.empty((count, 2 * self._leaves), dtype=np.float32) if shown and leaves is None else None
        divisors = _contiguous(lengths, np.float32)
        given = _contiguous(leaves, np.int64)
        counted = _contiguous(counts, np.int32)
        permitted = _contiguous(allowed, np.bool_)
        request = _Request(
            queries=count,
            vectors=_pointer(queries),
            lengths=_pointer(divisors),
            goal=goal,
            least_leaves=least_leaves,
            given=_pointer(given),
            given_width=0 if given is None else given.shape[1],
            counts=_pointer(counted),
            allowed=_pointer(permitted),
            keep=keep,
            k=k or 0,
            positions=_pointer(found.positions),
            distances=_pointer(found.distances),
            candidates=_pointer(found.candidates),
            opened=_pointer(found.opened),
            leaves=_pointer(opened),
            seconds=_pointer(found.seconds),
            threads=threads,
            isa=self._isa,
        )
        if self._library.semid_search(self._handle, ctypes.byref(request)):
            raise MemoryError("There is not enough memory for this search.")
        if opened is not None:
            for query, leaves_opened in enumerate(found.opened.tolist()):
                number = min(leaves_opened, shown)
                best, scores = opened_leaves(opened[query, : 2 * leaves_opened])
                found.leaves[query, :number], found.scores[query, :number] = best[:number], scores[:number]
        return found

    def search_one(self, wanted: Wanted, query: NDArray[np.float32], length: float) -> ScannedOne:
        """Exactly what :meth:`search` finds for one query (dim,) and its length, with as little around it as can be."""
        places = self._places
        place: _Place | None = getattr(places, "place", None)
        places.place = None  # for it is in use
        if place is None or place.wanted is not wanted:
            place = _Place(self._dim, self._leaves, wanted, self._isa)
        place.query[:] = query
        place.length[0] = length
        place.seconds.fill(0)
        if self._library.semid_search(self._handle, place.reference):
            raise MemoryError("There is not enough memory for this search.")
        counts = place.counts.tolist()
        found = ScannedOne(
            place.positions.copy(),
            place.distances.copy(),
            counts,
            place.seconds.tolist(),
            place.opened[: self._dim + 2 * counts[1]].copy(),
        )
        places.place = place
        return found

    def columns(self, positions: NDArray[np.int64]) -> NDArray[np.int32]:
        """The words of some items, as columns: m positions in, (m, levels that the scan reads) out."""
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        found = np.empty((len(positions), self._levels), dtype=np.int32)
        self._library.semid_columns(self._handle, positions.ctypes.data, len(positions), found.ctypes.data)
        return found


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
