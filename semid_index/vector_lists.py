"""The vectors themselves as lists that FAISS scans, one for each leaf: on the CPU, and by the same code on a GPU.

On a GPU, :class:`VectorListExecutor` is a copy of an inverted file that was made on the CPU. Over several GPUs leaves
are dealt out like cards: each GPU scans its own, and the best of all are merged. Limits that only the GPU has (how many
neighbours, probes and queries at once) hold on the CPU, too, so that what is tested there is what runs on a GPU.
FAISS's GPU indexes take a selector of ids and ignore it without a word; so none is ever given: items that were deleted
or do not match a filter are found too, and dropped by :mod:`semid_index.search`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index import metrics
from semid_index.devices import GpuState, device_name, gpu_state, working_gpus
from semid_index.errors import DeviceError, InvalidArgumentError
from semid_index.lookup import Probes
from semid_index.quantizer import Vectors
from semid_index.quantizers.kmeans import import_faiss
from semid_index.rerank import Distances, Positions, ScanData, search_lists, smallest

Precision = Literal["float32", "float16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
"""How vectors are kept for the scan; the hits' distances are computed from the stored ones in any case."""
MOST = 2_048
"""Neighbours for a query, and lists probed at once: what FAISS's code for GPUs can select. See :func:`most_for`."""
TEMPORARY_BYTES = 3 << 29
"""What each executor sets aside on a GPU for intermediate results."""

_TILE_BYTES = 1 << 30  # of intermediate results, for queries that are searched together
_TILE = 32_768  # such queries at most: above 65,535 the kernels stop at the first -1 among the probes
_TYPICAL = 144  # items in a leaf of an index with up to a few hundred thousand; later ones are larger
_GROUP = 32  # on a GPU, a list takes memory for a multiple of so many vectors
_SPARE = 1.02  # of memory, for what is not counted
_SMALL, _PAGE, _CELL = 1 << 20, 2 << 20, 512  # a driver gives larger blocks whole pages, smaller ones cells of a page
_SHARED_BYTES = 48 << 10  # that a block of threads on a GPU shares
# The kernel of FAISS that selects up to so many neighbours, and its warps; each warp keeps a distance and a position
# for all of them in shared memory.
_KERNELS = {32: 4, 64: 4, 128: 4, 256: 4, 512: 4, 1_024: 4, 2_048: 2}
_KEPT_BYTES = 12
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


def most_for(precision: Precision, dim: int) -> int:
    """Neighbours that can be found for a query; 0 if int8 vectors of so many dimensions cannot be scanned at all.

    For int8, the range of each dimension lies in the shared memory, too. FAISS does not check that there is room for
    both; the kernel would not start, and the results would be what was in memory before.
    """
    left = _SHARED_BYTES - (8 * dim if precision == "int8" else 0)
    return max((most for most, warps in _KERNELS.items() if _KEPT_BYTES * warps * most <= left), default=0)


def gpu_bytes(list_sizes: NDArray[np.int64] | Sequence[int], dim: int, precision: Precision) -> int:
    """Memory of a GPU that lists of so many vectors take, without that for intermediate results.

    Vectors in groups of 32, an 8-byte number for each, and a float32 centroid for each list, which FAISS wants to have
    and these lists do not use.
    """
    sizes = np.asarray(list_sizes, dtype=np.int64)
    padded = int((-(-sizes // _GROUP) * _GROUP).sum())
    return padded * dim * _BYTES[precision] + 8 * int(sizes.sum()) + 4 * dim * len(sizes)


def needed_bytes(list_sizes: NDArray[np.int64] | Sequence[int], dim: int, precision: Precision) -> int:
    """All that has to be free on a GPU before the lists are copied there: FAISS takes two blocks for each list."""
    sizes = np.asarray(list_sizes, dtype=np.int64)
    vectors = _taken(-(-sizes // _GROUP) * _GROUP * dim * _BYTES[precision])
    return math.ceil(_SPARE * (vectors + _taken(8 * sizes) + 4 * dim * len(sizes))) + TEMPORARY_BYTES


def _taken(blocks: NDArray[np.int64]) -> int:
    """Memory that blocks of so many bytes take from a driver, by what is known of it; not measured."""
    unit = np.where(blocks > _SMALL, _PAGE, _CELL)
    return int((-(-blocks // unit) * unit).sum())


def deal_out(
    sizes: NDArray[np.int64], dim: int, precision: Precision, gpu: int, *, spread: bool = False
) -> tuple[int, ...]:
    """The GPUs that the lists go to, list i to the one at place i modulo their number: one, if they fit there.

    With ``spread`` as many others as they need. Raises :class:`DeviceError`, which names the precision that would fit,
    if they are too large.
    """
    first = gpu_state(gpu)
    if first is None or needed_bytes(sizes, dim, precision) <= first.free:
        return (gpu,)
    states = {gpu: first}
    if spread:
        others = {number: state for number in working_gpus() if number != gpu and (state := gpu_state(number))}
        states |= dict(sorted(others.items(), key=lambda item: -item[1].free))
    for count in range(2, len(states) + 1):
        chosen = tuple(states)[:count]
        if all(needed_bytes(sizes[at::count], dim, precision) <= states[n].free for at, n in enumerate(chosen)):
            return chosen
    raise DeviceError(_too_large(sizes, dim, precision, states))


def _too_large(sizes: NDArray[np.int64], dim: int, precision: Precision, states: dict[int, GpuState]) -> str:
    count, free = len(states), min(state.free for state in states.values())
    needs = {p: needed_bytes(sizes[::count], dim, p) for p in PRECISIONS if _BYTES[p] <= _BYTES[precision]}
    fits = [p for p, need in needs.items() if need <= free]
    if fits:
        advice = f"With device_vectors='{fits[0]}' they need {_gb(needs[fits[0]])}, which fits."
    else:
        advice = (
            f"No precision fits: even int8 needs {_gb(needs['int8'])}. "
            "Use device='cpu', device='cuda' where there are several GPUs, or a GPU with more memory."
        )
    where, each = f"GPU {next(iter(states))}", ""
    if count > 1:
        where, each = f"each of {count} GPUs", " of the fullest"
    total = sum(state.total for state in states.values()) / count
    return (
        f"{int(sizes.sum()):,} vectors of {dim} dimensions need {_gb(needs[precision])} as {precision} on {where}, and "
        f"{_gb(free)}{each} of its {_gb(total)} are free. {advice}"
    )


def typical_sizes(items: int) -> list[int]:
    """List sizes of an index whose leaves are not known yet: 144 items each, so that a tenth of the groups is empty."""
    return [_TYPICAL] * (items // _TYPICAL) + [items % _TYPICAL]


def tile_size(probes: int, k: int, dim: int) -> int:
    """Queries searched together: for each, the GPU code keeps the probed lists' centroids and their k best."""
    return max(1, min(_TILE, _TILE_BYTES // (probes * (4 * dim + 12 * k + 12))))


class VectorListExecutor:
    """Scans the vectors of probed leaves with FAISS: an inverted file for each device, whose lists are the leaves."""

    exact = False
    """Vectors are rounded, and the GPU adds in another order: re-ranking gives the same distances everywhere."""

    def __init__(
        self, data: ScanData, *, precision: Precision = "float16", gpu: int | None = None, spread: bool = False
    ) -> None:
        """``gpu``: None for the CPU. ``spread``: other GPUs may hold a share of the leaves if they do not fit there.

        Raises :class:`DeviceError` if the GPU's memory is too small, or its code does not take such vectors.
        """
        self.name = f"faiss-lists {precision}"
        self.precision = precision
        self._metric, self._dim = data.metric, data.vectors.dim
        sizes = data.leaves.sizes
        self.most = most_for(precision, self._dim)
        """Neighbours that it can find for a query."""
        if not self.most:
            raise DeviceError(
                f"FAISS's code for GPUs has no room for {self._dim:,} dimensions as {precision}. "
                "Use device_vectors='float16', or device='cpu'."
            )
        self.gpus = () if gpu is None else deal_out(sizes, self._dim, precision, gpu, spread=spread)
        count = max(1, len(self.gpus))
        self.device = ", ".join(map(device_name, self.gpus)) or "cpu"
        self._bytes = sum(gpu_bytes(sizes[at::count], self._dim, precision) for at in range(count))
        rounding = _Rounding(data, precision)
        self._scale = rounding.scale
        self._shares = [_Share(rounding, at, count, self.gpus[at] if self.gpus else None) for at in range(count)]

    @property
    def nbytes(self) -> int:
        """Bytes of main memory; :attr:`gpu_bytes` are elsewhere."""
        return 0 if self.gpus else self._bytes

    @property
    def gpu_bytes(self) -> int:
        """Bytes of the memory of all GPUs."""
        return self._bytes if self.gpus else 0

    @property
    def index_type(self) -> str:
        """The class of FAISS that searches."""
        return type(self._shares[0].index).__name__

    def search(self, queries: Vectors, probes: Probes, k: int) -> tuple[Distances, Positions]:
        """See :class:`semid_index.rerank.Executor`; distances are in the metric of the index.

        ``k`` is at most :attr:`most`. More than 2,048 probes are searched in several goes.
        """
        if not 1 <= k <= self.most:
            raise InvalidArgumentError(f"The lists give 1 to {self.most:,} neighbours, not {k}.")
        asked = np.ascontiguousarray(queries * self._scale if self._metric == "l2" else queries, dtype=np.float32)
        if len(self._shares) == 1:
            near, found = self._shares[0].search(asked, probes.leaves, k)
        else:
            with ThreadPoolExecutor(len(self._shares)) as pool:  # FAISS lets go of the interpreter while a GPU works
                parts = list(pool.map(lambda share: share.search(asked, probes.leaves, k), self._shares))
            near, found = merged(parts, k)
        near = np.where(found >= 0, near, np.float32(0))
        distances: Distances
        if self._metric == "l2":
            distances = (np.sqrt(np.maximum(near, 0)) / self._scale).astype(np.float32, copy=False)
        elif self._metric == "ip":
            distances = near / self._scale
        else:
            distances = np.clip(1 + near / self._scale, 0, 2)
        return np.where(found >= 0, distances, np.float32(np.inf)), found


def merged(parts: Sequence[tuple[Distances, Positions]], k: int) -> tuple[Distances, Positions]:
    """The k best of what several searches found, which no item is in twice."""
    near, found = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    best, distances = smallest(found, near, k)
    return distances, best


class _Share:
    """The lists of one device: every so-manieth leaf, beginning with one of the first."""

    def __init__(self, rounding: _Rounding, first: int, step: int, gpu: int | None) -> None:
        self._first, self._step, self._dim = first, step, rounding.data.vectors.dim
        self._larger_is_nearer = rounding.data.metric != "l2"
        lists = _Lists(rounding, first, step)
        self.count = lists.count
        self.index, self._held = lists.index, lists.centroids  # held by a name: FAISS knows them by bare pointers
        self._turns = Lock()  # FAISS keeps the number of probes in the index, and the memory for intermediate results
        if gpu is not None and self.count:
            self._held = resources_for_one()
            self.index = on_gpu(lists.index, gpu, resources=self._held)

    def search(self, queries: Vectors, leaves: NDArray[np.int64], k: int) -> tuple[Distances, Positions]:
        """The k nearest of its items in the probed leaves: smaller values are nearer; inf and -1 for none."""
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        positions = np.full((len(queries), k), -1, dtype=np.int64)
        leaves = self._own(leaves)
        step = min(MOST, max(1, self.count))  # FAISS ends the process if there are more probes than lists
        for first in range(0, leaves.shape[1], step):
            probed = leaves[:, first : first + step]
            tile = tile_size(probed.shape[1], k, self._dim)
            for start in range(0, len(queries), tile):
                part = slice(start, start + tile)
                found = self._search_tile(queries[part], np.ascontiguousarray(probed[part]), k)
                if first:
                    found = merged([(distances[part], positions[part]), found], k)
                distances[part], positions[part] = found
        return distances, positions

    def _own(self, leaves: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of those of the probed leaves that are its own, in front; -1 for others."""
        if self._step == 1:
            return leaves
        mine = (leaves >= 0) & (leaves % self._step == self._first)
        order = np.argsort(~mine, axis=1, kind="stable")[:, : int(mine.sum(axis=1).max(initial=0))]
        return np.where(np.take_along_axis(mine, order, 1), np.take_along_axis(leaves, order, 1) // self._step, -1)

    def _search_tile(self, queries: Vectors, leaves: NDArray[np.int64], k: int) -> tuple[Distances, Positions]:
        none = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        near, found = search_lists(self.index, queries, Probes(leaves, *none), k, turns=self._turns)
        near = -near if self._larger_is_nearer else near
        return np.where(found >= 0, near, np.float32(np.inf)), found  # FAISS says the largest of all numbers for none


class _Rounding:
    """How vectors are rounded for the scan, which is the same for all shares."""

    def __init__(self, data: ScanData, precision: Precision) -> None:
        self.data, self.precision = data, precision
        self.low, self.high = self._extremes(needed=data.metric != "cosine" or precision == "int8")
        largest = float(max(-self.low.min(), self.high.max()))
        # by a power of two, so that nothing is too large or too small for 16 bits, and no other bit changes
        exponent = max(-100, min(100, math.frexp(largest)[1])) if largest > 0 else 0
        self.scale = np.float32(2.0**-exponent)

    def rows(self, positions: slice | Positions) -> Vectors:
        """Vectors, not yet scaled."""
        return metrics.comparable(self.data.vectors.take(positions), self.data.metric)

    def blocks(self, count: int) -> list[tuple[int, int]]:
        """From where to where so many vectors are converted at once."""
        block = max(1, _BLOCK_BYTES // (4 * self.data.vectors.dim))
        return [(start, min(start + block, count)) for start in range(0, count, block)]

    def _extremes(self, *, needed: bool) -> tuple[Vectors, Vectors]:
        """The least and the largest value of each dimension; of vectors of length 1, what is known without a look."""
        ones = np.ones(self.data.vectors.dim, dtype=np.float32)
        if not needed:
            return -ones, ones
        low, high = ones * np.float32(np.inf), ones * np.float32(-np.inf)
        for start, end in self.blocks(int(self.data.leaves.starts[-1])):
            rows = self.rows(slice(start, end))
            low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        return low, high


class _Lists:
    """An inverted file on the CPU, filled with the vectors of every so-manieth leaf."""

    def __init__(self, rounding: _Rounding, first: int, step: int) -> None:
        data, self._rounding, self._faiss = rounding.data, rounding, import_faiss()
        self._begins, self._ends = data.leaves.starts[:-1][first::step], data.leaves.starts[1:][first::step]
        self.count = len(self._begins)
        faiss, dim, count = self._faiss, data.vectors.dim, max(1, self.count)
        metric = faiss.METRIC_L2 if data.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self.centroids = faiss.IndexFlat(dim, metric)
        self.centroids.add(np.zeros((count, dim), dtype=np.float32))  # leaves are chosen by the look-up, not by FAISS
        if rounding.precision == "float32":
            self.index = faiss.IndexIVFFlat(self.centroids, dim, count, metric)
        else:
            quantizer = faiss.ScalarQuantizer
            kind = quantizer.QT_fp16 if rounding.precision == "float16" else quantizer.QT_8bit
            self.index = faiss.IndexIVFScalarQuantizer(self.centroids, dim, count, kind, metric, False)
        if rounding.precision == "int8":
            self.index.sq.train(np.stack([rounding.low, rounding.high]) * rounding.scale)
        self.index.is_trained = True
        encode = {"float32": _as_bytes, "float16": _as_halves, "int8": lambda rows: self.index.sq.compute_codes(rows)}
        self._fill(encode[rounding.precision])

    def _fill(self, encode: Callable[[Vectors], NDArray[np.uint8]]) -> None:
        """Give each list the vectors of its leaf, numbered by their positions; a leaf may be in several blocks."""
        counts = self._ends - self._begins
        starts = np.concatenate([[0], np.cumsum(counts)])  # among its own items
        shift = np.repeat(self._begins - starts[:-1], counts)
        for start, end in self._rounding.blocks(int(starts[-1])):
            numbers = np.arange(start, end) + shift[start:end]
            whole = int(numbers[-1] - numbers[0]) == end - start - 1  # nothing left out: no copy of the vectors is made
            rows = self._rounding.rows(slice(int(numbers[0]), int(numbers[-1]) + 1) if whole else numbers)
            codes = encode(np.ascontiguousarray(rows * self._rounding.scale))
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


def on_gpu(index: Any, gpu: int, *, resources: Any, halves: bool = False) -> Any:
    """A copy of an index on a GPU; raises :class:`DeviceError` if FAISS cannot, or makes something else of it.

    ``halves``: look-up tables of product quantizers in float16, which those of more than 48 parts need.
    """
    faiss = import_faiss()
    options = faiss.GpuClonerOptions()
    options.use_cuvs = False  # which has no search of given lists
    options.indicesOptions = faiss.INDICES_64_BIT
    options.useFloat16 = halves
    try:
        made = faiss.index_cpu_to_gpu(resources, gpu, index, options)
    except RuntimeError as error:
        raise DeviceError(f"FAISS cannot copy {type(index).__name__} to GPU {gpu}: {_first_line(error)}") from error
    if not type(made).__name__.startswith("GpuIndex"):
        raise DeviceError(f"FAISS made a {type(made).__name__} where an index on GPU {gpu} was asked for.")
    return made


def resources_for_one() -> Any:
    """Memory for intermediate results and streams of a GPU, for one index that searches one batch at a time.

    FAISS keeps account of memory in them without a lock. If indexes shared them, one that is copied there, or let go
    of, would disturb another that searches.
    """
    resources = import_faiss().StandardGpuResources()
    resources.setTempMemory(TEMPORARY_BYTES)
    resources.setPinnedMemory(0)  # 256 MiB by default, for copies in pages, which a search of given lists does not make
    return resources


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
