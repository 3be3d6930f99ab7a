"""The vectors themselves as lists that FAISS scans, one for each leaf: on the CPU, and by the same code on a GPU.

On a GPU, :class:`VectorListExecutor` is a copy of an inverted file that was made on the CPU. Limits that only the GPU
has (how many neighbours, probes and queries at once) hold on the CPU, too, so that what is tested there is what runs
on a GPU. FAISS's GPU indexes take a selector of ids and ignore it without a word; so none is ever given: items that
were deleted or do not match a filter are found too, and dropped by :mod:`semid_index.search`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index import metrics
from semid_index.devices import GpuState, device_name, gpu_state
from semid_index.errors import DeviceError, InvalidArgumentError
from semid_index.lookup import Probes
from semid_index.quantizer import Vectors
from semid_index.quantizers.kmeans import import_faiss
from semid_index.rerank import Distances, Positions, ScanData, search_lists, smallest

Precision = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
"""How vectors are kept for the scan; the hits' distances are computed from the stored ones in any case."""
MOST = 2_048
"""Neighbours for a query, and lists probed at once: what the GPU code of FAISS can select."""
TEMPORARY_BYTES = 3 << 29
"""What FAISS sets aside on a GPU for intermediate results."""

_TILE_BYTES = 1 << 30  # of intermediate results, for queries that are searched together
_TILE = 32_768  # such queries at most: above 65,535 the kernels stop at the first -1 among the probes
_TYPICAL = 144  # items in a leaf of an index with up to a few hundred thousand; later ones are larger
_GROUP = 32  # on a GPU, a list takes memory for a multiple of so many vectors
_SPARE = 1.02  # of memory, for what the driver rounds up
_BLOCK_BYTES = 64 << 20  # vectors converted at once
_BYTES = {"float32": 4, "float16": 2, "int8": 1}
# Candidates whose exact distance is computed for k hits, as (times k, at least): so many that the rounding of the scan
# loses no hit. float32 only has ties to lose.
_CANDIDATES = {"float32": (1, 10), "float16": (2, 20), "int8": (4, 100)}


def check_precision(precision: str) -> Precision:
    """One of the precisions; raises :class:`InvalidArgumentError` for anything else."""
    for known in PRECISIONS:
        if precision == known:
            return known
    raise InvalidArgumentError(f"device_vectors must be one of {', '.join(PRECISIONS)}, not {precision!r}.")


def candidates_for(k: int, precision: Precision) -> int:
    """Candidates to re-rank for k hits."""
    times, least = _CANDIDATES[precision]
    return max(times * k, k + least)


def gpu_bytes(list_sizes: NDArray[np.int64] | Sequence[int], dim: int, precision: Precision) -> int:
    """Memory of a GPU that lists of so many vectors take, without that for intermediate results.

    Vectors in groups of 32, an 8-byte number for each, and a float32 centroid for each list, which FAISS wants to have
    and these lists do not use.
    """
    sizes = np.asarray(list_sizes, dtype=np.int64)
    padded = int((-(-sizes // _GROUP) * _GROUP).sum())
    return padded * dim * _BYTES[precision] + 8 * int(sizes.sum()) + 4 * dim * len(sizes)


def needed_bytes(list_sizes: NDArray[np.int64] | Sequence[int], dim: int, precision: Precision) -> int:
    """All that has to be free on a GPU before the lists are copied there."""
    return math.ceil(_SPARE * gpu_bytes(list_sizes, dim, precision)) + TEMPORARY_BYTES


def check_fits(sizes: NDArray[np.int64], dim: int, precision: Precision, gpu: int, state: GpuState | None) -> None:
    """Raise :class:`DeviceError`, which names the precision that would fit, if the lists are too large for a GPU."""
    if state is None or (needed := needed_bytes(sizes, dim, precision)) <= state.free:
        return
    fits = [p for p in PRECISIONS if _BYTES[p] < _BYTES[precision] and needed_bytes(sizes, dim, p) <= state.free]
    if fits:
        advice = f"With device_vectors='{fits[0]}' they need {_gb(needed_bytes(sizes, dim, fits[0]))}, which fits."
    else:
        least = _gb(needed_bytes(sizes, dim, "int8"))
        advice = f"No precision fits: even int8 needs {least}. Use device='cpu', or a GPU with more memory."
    raise DeviceError(
        f"{int(sizes.sum()):,} vectors of {dim} dimensions need {_gb(needed)} as {precision} on GPU {gpu}, and "
        f"{_gb(state.free)} of its {_gb(state.total)} are free. {advice}"
    )


def typical_sizes(items: int) -> list[int]:
    """List sizes of an index whose leaves are not known yet: 144 items each, so that a tenth of the groups is empty."""
    return [_TYPICAL] * (items // _TYPICAL) + [items % _TYPICAL]


def tile_size(probes: int, k: int, dim: int) -> int:
    """Queries searched together: for each, the GPU code keeps the probed lists' centroids and their k best."""
    return max(1, min(_TILE, _TILE_BYTES // (probes * (4 * dim + 12 * k + 12))))


class VectorListExecutor:
    """Scans the vectors of probed leaves with FAISS: an inverted file whose lists are the leaves."""

    exact = False
    """Vectors are rounded, and the GPU adds in another order: re-ranking gives the same distances everywhere."""

    def __init__(self, data: ScanData, *, precision: Precision = "float16", gpu: int | None = None) -> None:
        """``gpu``: None for the CPU. Raises :class:`DeviceError` if the GPU's memory is too small."""
        self.name = f"faiss-lists {precision}"
        self.device = device_name(gpu)
        self.precision = precision
        self._metric, self._dim = data.metric, data.vectors.dim
        sizes = data.leaves.sizes
        self._bytes = gpu_bytes(sizes, self._dim, precision)
        if gpu is not None:
            check_fits(sizes, self._dim, precision, gpu, gpu_state(gpu))
        lists = _Lists(data, precision)
        self._scale = lists.scale
        self._parts = lists.index, lists.centroids  # held by a name: FAISS knows them by bare pointers
        if gpu is not None:
            self._parts = on_gpu(lists.index, gpu), _resources(gpu)

    @property
    def nbytes(self) -> int:
        """Bytes of main memory; :attr:`gpu_bytes` are elsewhere."""
        return self._bytes if self.device == "cpu" else 0

    @property
    def gpu_bytes(self) -> int:
        """Bytes of the GPU's memory."""
        return 0 if self.device == "cpu" else self._bytes

    @property
    def index_type(self) -> str:
        """The class of FAISS that searches."""
        return type(self._parts[0]).__name__

    def search(self, queries: Vectors, probes: Probes, k: int) -> tuple[Distances, Positions]:
        """See :class:`semid_index.rerank.Executor`; distances are in the metric of the index.

        ``k`` is at most 2,048. More probes than that are searched in several goes.
        """
        if not 1 <= k <= MOST:
            raise InvalidArgumentError(f"The lists give 1 to {MOST:,} neighbours, not {k}.")
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        positions = np.full((len(queries), k), -1, dtype=np.int64)
        for first in range(0, probes.leaves.shape[1], MOST):
            leaves = probes.leaves[:, first : first + MOST]
            tile = tile_size(leaves.shape[1], k, self._dim)
            for start in range(0, len(queries), tile):
                part = slice(start, start + tile)
                near, found = self._search_tile(queries[part], leaves[part], k)
                if first:
                    both = np.concatenate([positions[part], found], axis=1)
                    found, near = smallest(both, np.concatenate([distances[part], near], axis=1), k)
                positions[part], distances[part] = found, near
        return distances, positions

    def _search_tile(self, queries: Vectors, leaves: NDArray[np.int64], k: int) -> tuple[Distances, Positions]:
        asked = np.ascontiguousarray(queries * self._scale if self._metric == "l2" else queries, dtype=np.float32)
        none = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        near, found = search_lists(self._parts[0], asked, Probes(leaves, *none), k)
        near = np.where(found >= 0, near, np.float32(0))  # for nothing found FAISS says the largest of all numbers
        distances: Distances
        if self._metric == "l2":
            distances = (np.sqrt(np.maximum(near, 0)) / self._scale).astype(np.float32, copy=False)
        elif self._metric == "ip":
            distances = -near / self._scale
        else:
            distances = np.clip(1 - near / self._scale, 0, 2)
        return np.where(found >= 0, distances, np.float32(np.inf)), found


class _Lists:
    """An inverted file on the CPU, filled with the vectors of the leaves."""

    def __init__(self, data: ScanData, precision: Precision) -> None:
        self._data, self._faiss = data, import_faiss()
        faiss, dim, count = self._faiss, data.vectors.dim, len(data.leaves)
        metric = faiss.METRIC_L2 if data.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self.centroids = faiss.IndexFlat(dim, metric)
        self.centroids.add(np.zeros((count, dim), dtype=np.float32))  # leaves are chosen by the look-up, not by FAISS
        if precision == "float32":
            self.index = faiss.IndexIVFFlat(self.centroids, dim, count, metric)
        else:
            quantizer = faiss.ScalarQuantizer
            kind = quantizer.QT_fp16 if precision == "float16" else quantizer.QT_8bit
            self.index = faiss.IndexIVFScalarQuantizer(self.centroids, dim, count, kind, metric, False)
        low, high = self._extremes(needed=data.metric != "cosine" or precision == "int8")
        largest = float(max(-low.min(), high.max()))
        # by a power of two, so that nothing is too large or too small for 16 bits, and no other bit changes
        exponent = max(-100, min(100, math.frexp(largest)[1])) if largest > 0 else 0
        self.scale = np.float32(2.0**-exponent)
        if precision == "int8":
            self.index.sq.train(np.stack([low, high]) * self.scale)
        self.index.is_trained = True
        encode = {"float32": _as_bytes, "float16": _as_halves, "int8": lambda rows: self.index.sq.compute_codes(rows)}
        self._fill(encode[precision])

    def _rows(self, start: int, end: int) -> Vectors:
        rows = self._data.vectors.take(slice(start, end))
        return metrics.normalized(rows) if self._data.metric == "cosine" else rows

    def _blocks(self) -> list[tuple[int, int]]:
        count = int(self._data.leaves.starts[-1])
        block = max(1, _BLOCK_BYTES // (4 * self._data.vectors.dim))
        return [(start, min(start + block, count)) for start in range(0, count, block)]

    def _extremes(self, *, needed: bool) -> tuple[Vectors, Vectors]:
        """The least and the largest value of each dimension; of vectors of length 1, what is known without a look."""
        ones = np.ones(self._data.vectors.dim, dtype=np.float32)
        if not needed:
            return -ones, ones
        low, high = ones * np.float32(np.inf), ones * np.float32(-np.inf)
        for start, end in self._blocks():
            rows = self._rows(start, end)
            low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        return low, high

    def _fill(self, encode: Callable[[Vectors], NDArray[np.uint8]]) -> None:
        """Give each list the vectors of its leaf, numbered by their positions; a leaf may be in several blocks."""
        starts = self._data.leaves.starts
        for start, end in self._blocks():
            codes = encode(np.ascontiguousarray(self._rows(start, end) * self.scale))
            numbers = np.arange(start, end)
            first = int(np.searchsorted(starts, start, side="right")) - 1
            last = int(np.searchsorted(starts, end))
            bounds = (np.clip(starts[first : last + 1], start, end) - start).tolist()
            for leaf, (begin, stop) in enumerate(itertools.pairwise(bounds), first):
                if begin < stop:
                    ids, entries = numbers[begin:stop], codes[begin:stop]
                    pointers = self._faiss.swig_ptr(ids), self._faiss.swig_ptr(entries)
                    self.index.invlists.add_entries(leaf, stop - begin, *pointers)
        self.index.ntotal = int(starts[-1])


def _as_bytes(rows: Vectors) -> NDArray[np.uint8]:
    return rows.view(np.uint8)


def _as_halves(rows: Vectors) -> NDArray[np.uint8]:
    return rows.astype(np.float16).view(np.uint8)


def on_gpu(index: Any, gpu: int, *, halves: bool = False) -> Any:
    """A copy of an index on a GPU; raises :class:`DeviceError` if FAISS cannot, or makes something else of it.

    ``halves``: look-up tables of product quantizers in float16, which those of more than 48 parts need.
    """
    faiss = import_faiss()
    options = faiss.GpuClonerOptions()
    options.use_cuvs = False  # which has no search of given lists
    options.indicesOptions = faiss.INDICES_64_BIT
    options.useFloat16 = halves
    try:
        made = faiss.index_cpu_to_gpu(_resources(gpu), gpu, index, options)
    except RuntimeError as error:
        raise DeviceError(f"FAISS cannot copy {type(index).__name__} to GPU {gpu}: {_first_line(error)}") from error
    if not type(made).__name__.startswith("GpuIndex"):
        raise DeviceError(f"FAISS made a {type(made).__name__} where an index on GPU {gpu} was asked for.")
    return made


@cache
def _resources(gpu: int) -> Any:
    """Memory for intermediate results and streams of a GPU, shared by all indexes there: searches take turns."""
    return import_faiss().StandardGpuResources()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
