"""Lists of vectors on the CPU and on a GPU, against NumPy; and the path to a GPU with a pretended one.

What pretends to be a GPU is FAISS on the CPU behind the classes of its GPU part, with their limits: so all of our code
runs here but FAISS's own. Tests marked ``gpu`` run the same on a real one.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest

import semid_index as semid
from semid_index import devices, vector_lists
from semid_index.bench.gpu_page import gpu_section
from semid_index.bench.page import body
from semid_index.codes import CodeLayout
from semid_index.devices import GpuState
from semid_index.errors import DeviceError, InvalidArgumentError
from semid_index.gpu import LEAST_MEAN, SearchOnGpu, StateOnGpu
from semid_index.lookup import Leaves, Probes
from semid_index.metrics import distances, normalized
from semid_index.rerank import MemoryVectors, NumpyExecutor, ScanData, smallest
from semid_index.search import SearchRequest
from semid_index.vector_lists import (
    PRECISIONS,
    TEMPORARY_BYTES,
    VectorListExecutor,
    candidates_for,
    deal_out,
    gpu_bytes,
    most_for,
    needed_bytes,
    tile_size,
)

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = {"float32": 1e-5, "float16": 2e-3, "int8": 3e-2}  # of a distance, as a part of the largest one
GPU = [None, pytest.param(0, marks=pytest.mark.gpu)]


# -- the executor -----------------------------------------------------------------------------------------------------


def scan_data(metric, *, rows=2_000, dim=24, lists=60, seed=0, size=1.0):
    """Random vectors with 40 times the same among them, in lists of all lengths, some empty."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((rows, dim), dtype=np.float32)
    vectors[100:140] = vectors[0]
    vectors = normalized(vectors) if metric == "cosine" else vectors * np.float32(size)
    cuts = np.sort(rng.integers(0, rows + 1, lists - 1))
    cuts[5:8] = cuts[5]  # two lists with nothing
    starts = np.concatenate([[0], cuts, [rows]])
    zeros = np.zeros(lists, dtype=np.int64)
    leaves = Leaves(CodeLayout((256,)), zeros, zeros, starts)
    return ScanData(leaves, None, None, MemoryVectors(vectors, None, metric), metric, None, None)


def probes_of(data, queries, *, width=12, seed=1):
    """Random lists for each query, fewer for some, none for the last."""
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((queries, len(data.leaves))), axis=1)[:, :width].astype(np.int64)
    counts = rng.integers(1, width + 1, queries)
    counts[-1] = 0 if queries > 1 else width
    chosen[np.arange(width) >= counts[:, None]] = -1
    held = np.where(chosen >= 0, data.leaves.sizes[chosen], 0).sum(axis=1)
    return Probes(chosen, np.zeros(chosen.shape, dtype=np.float32), held)


def queries_for(data, count, seed=2):
    queries = np.random.default_rng(seed).standard_normal((count, data.vectors.dim), dtype=np.float32)
    return normalized(queries) if data.metric == "cosine" else queries


def opened(data, probes):
    """(q, n) whether an item is in a list that the query opens."""
    lists = np.zeros((len(probes.leaves), len(data.leaves) + 1), dtype=bool)
    np.put_along_axis(lists, probes.leaves, True, axis=1)  # the last column is for the -1
    return np.repeat(lists[:, :-1], data.leaves.sizes, axis=1)


def nearest_by_hand(data, queries, probes, k):
    """(q, k) distances of the nearest items of the opened lists, inf for none."""
    all_distances = distances(queries, data.vectors.take(slice(None)), data.metric)
    return np.sort(np.where(opened(data, probes), all_distances, np.float32(np.inf)), axis=1)[:, :k]


def assert_as_by_hand(executor, data, queries, probes, k):
    """The right number of hits, of the right lists, at distances that are right but for rounding."""
    near, found = executor.search(queries, probes, k)
    hit = found >= 0
    assert (hit.sum(axis=1) == np.minimum(probes.candidates, k)).all()
    assert (np.isinf(near) == ~hit).all()
    assert np.take_along_axis(opened(data, probes), found, axis=1)[hit].all()
    repeated = np.diff(np.sort(found, axis=1), axis=1) == 0
    assert not (repeated & (np.sort(found, axis=1)[:, 1:] >= 0)).any()
    right = nearest_by_hand(data, queries, probes, k)
    error = np.abs(near[hit] - right[hit])
    assert error.max(initial=0) <= ROUNDING[executor.precision] * np.abs(right[hit]).max(initial=1)


@pytest.mark.parametrize("gpu", GPU)
@pytest.mark.parametrize("batch", [1, 32, 1_024])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_lists_find_what_is_nearest(metric, precision, batch, gpu):
    data = scan_data(metric)
    executor = VectorListExecutor(data, precision=precision, gpu=gpu)
    queries, probes = queries_for(data, batch), probes_of(data, batch)
    for k in (10, min(700, executor.most)) if batch < 1_000 else (10,):  # more than most queries have
        assert_as_by_hand(executor, data, queries, probes, k)
    k = 10
    _, kept = executor.search(queries, probes, candidates_for(k, precision))
    _, exact = smallest(kept, data.vectors.distances(queries, kept), k)
    np.testing.assert_allclose(exact, nearest_by_hand(data, queries, probes, k), rtol=1e-5, atol=2e-3)
    if batch < 1_000:
        np.testing.assert_allclose(exact, NumpyExecutor(data).search(queries, probes, k)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_cut_up_work_gives_the_same(metric, precision, monkeypatch):
    data = scan_data(metric)
    queries, probes = queries_for(data, 50), probes_of(data, 50)
    whole = VectorListExecutor(data, precision=precision).search(queries, probes, 10)
    monkeypatch.setattr(vector_lists, "_BLOCK_BYTES", 4 * 24 * 17)  # 17 vectors: lists begin and end in any block
    monkeypatch.setattr(vector_lists, "_TILE", 7)
    executor = VectorListExecutor(data, precision=precision)
    np.testing.assert_array_equal(executor.search(queries, probes, 10)[0], whole[0])
    monkeypatch.setattr(vector_lists, "MOST", 10)  # probes at once
    near, found = executor.search(queries, probes, 10)
    np.testing.assert_allclose(near, whole[0], rtol=1e-6)
    assert ((found >= 0) == (whole[1] >= 0)).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e15])
def test_vectors_of_any_length_fit_into_16_bits(metric, size):
    data = scan_data(metric, size=size)
    queries, probes = queries_for(data, 20) * np.float32(size if metric == "l2" else 1), probes_of(data, 20)
    near, found = VectorListExecutor(data).search(queries, probes, 10)
    small = scan_data(metric)  # the same vectors, not scaled
    oracle, _ = NumpyExecutor(small).search(queries_for(small, 20), probes, 10)
    np.testing.assert_allclose(near / size, oracle, rtol=4e-3, atol=2e-2)
    assert ((found >= 0) == ~np.isinf(oracle)).all()


def test_limits_of_the_gpu_hold_on_the_cpu():
    data = scan_data("l2")
    executor = VectorListExecutor(data)
    for k in (0, 2_049):
        with pytest.raises(InvalidArgumentError, match="1 to 2,048"):
            executor.search(queries_for(data, 1), probes_of(data, 1), k)
    with pytest.raises(TypeError):
        executor.search(queries_for(data, 1), probes_of(data, 1), 5, params=faiss.SearchParametersIVF())
    assert executor.search(queries_for(data, 1), probes_of(data, 1), 2_048)[0].shape == (1, 2_048)
    with pytest.raises(InvalidArgumentError, match="1 to 512"):
        VectorListExecutor(data, precision="int8").search(queries_for(data, 1), probes_of(data, 1), 513)


def test_neighbours_that_a_gpu_can_select_by_hand():
    # 48 KiB are shared; a warp keeps 12 bytes for each neighbour: 4 x 1,024 x 12 = 2 x 2,048 x 12 = 48 KiB
    assert most_for("float32", 4_096) == most_for("float16", 65_536) == 2_048
    # for int8 8 bytes a dimension too: 4 x 512 x 12 = 24,576, and 24,576 / 8 = 3,072 dimensions are left
    assert [most_for("int8", dim) for dim in (1, 768, 3_072, 3_073)] == [512, 512, 512, 256]
    assert [most_for("int8", dim) for dim in (4_608, 4_609, 5_952, 5_953)] == [256, 128, 32, 0]


def test_dimensions_that_int8_has_no_room_for():
    data = scan_data("l2", rows=70, dim=6_000, lists=8)
    with pytest.raises(DeviceError, match=r"no room for 6,000 dimensions as int8.*device_vectors='float16'"):
        VectorListExecutor(data, precision="int8")
    assert VectorListExecutor(data).most == 2_048


def test_more_probes_than_lists_are_searched_in_several_goes(gpu):
    """FAISS would end the process."""
    data = scan_data("l2", lists=20)
    queries, probes = queries_for(data, 30), probes_of(data, 30)
    wide = Probes(np.pad(probes.leaves, ((0, 0), (0, 30)), constant_values=-1), probes.scores, probes.candidates)
    assert wide.leaves.shape[1] > len(data.leaves)
    assert_as_by_hand(VectorListExecutor(data, gpu=0), data, queries, wide, 10)


def test_tiles_by_hand():
    # 1 GiB / (256 * (4 * 768 + 12 * 100 + 12)) = 979.1
    assert tile_size(256, 100, 768) == 979
    assert tile_size(1, 1, 1) == 32_768
    assert tile_size(2_048, 2_048, 65_536) == 1


def test_memory_by_hand():
    # lists of 1, 32 and 33 take memory for 32, 32 and 64; a number is 8 bytes; each list has a centroid
    assert gpu_bytes([1, 32, 33], 10, "float16") == 128 * 10 * 2 + 66 * 8 + 3 * 10 * 4
    assert gpu_bytes([1, 32, 33], 10, "float32") - gpu_bytes([1, 32, 33], 10, "int8") == 128 * 10 * 3
    assert needed_bytes([], 10, "int8") == TEMPORARY_BYTES == 1.5 * 2**30
    # 1,000 x 768 in 16 bits, for 1,024 of them, are 1.5 MiB and take a page of 2; their numbers take 16 cells of 512
    assert needed_bytes([1_000], 768, "float16") == TEMPORARY_BYTES + math.ceil(1.02 * (2**21 + 16 * 512 + 4 * 768))


# -- searching an index on a GPU that is pretended --------------------------------------------------------------------


# What FAISS 1.15.1 refuses, and where: (*) ends the process, (**) goes unnoticed and gives wrong results
class PretendedGpuIndex:
    """An inverted file of the CPU with the limits of one on a GPU."""

    by_dimension = False

    def __init__(self, index, gpu):
        self._index, self.nprobe, self.gpu = index, 1, gpu
        assert index.quantizer.ntotal == index.nlist  # GpuIndexIVF.cu:verifyIVFSettings_
        assert index.is_trained
        assert not self.by_dimension or 8 * index.d < 48 << 10  # GpuIndexIVFScalarQuantizer.cu:verifySQSettings_

    def search_preassigned(self, x, k, Iq, Dq, *, params=None):  # noqa: N803
        assert params is None, "a selector would be ignored"  # (**) IVFFlat.cu; class_wrappers.py
        assert 1 <= k <= 2_048  # IndexUtils.cu:validateKSelect
        assert 1 <= self.nprobe <= 2_048  # IndexUtils.cu:validateNProbe
        assert self.nprobe <= self._index.nlist  # (*) IVFFlat.cu:searchPreassigned
        assert len(x) <= 65_535  # (**) IVFInterleaved.cuh: the kernel returns at a -1
        assert Iq.shape == Dq.shape == (len(x), self.nprobe)  # class_wrappers.py
        assert Iq.min(initial=0) >= -1
        assert Iq.max(initial=0) < self._index.nlist
        selected = min(size for size in (32, 64, 128, 256, 512, 1_024, 2_048) if k <= size)
        kept = 12 * selected * (2 if selected == 2_048 else 4)
        assert kept + 8 * self._index.d * self.by_dimension <= 48 << 10  # (**) IVFInterleavedScanKernelTemplate.cu
        self._index.nprobe = self.nprobe
        return self._index.search_preassigned(x, k, Iq, Dq)


class GpuIndexIVFScalarQuantizer(PretendedGpuIndex):
    def __init__(self, index, gpu):
        self.by_dimension = index.sq.qtype == faiss.ScalarQuantizer.QT_8bit
        assert index.sq.qtype in (faiss.ScalarQuantizer.QT_8bit, faiss.ScalarQuantizer.QT_fp16)  # isSQSupported
        super().__init__(index, gpu)


class GpuIndexIVFFlat(PretendedGpuIndex):
    pass


class GpuIndexFlatL2(faiss.IndexFlatL2):
    def __init__(self, resources, dim, config):
        super().__init__(dim)
        assert isinstance(resources, Resources)
        assert isinstance(config, FlatConfig)
        assert config.device == 0


class Factory(faiss.ProgressiveDimIndexFactory):
    ncall = 1

    def __init__(self, gpus):
        super().__init__()
        assert gpus == 1
        object.__setattr__(self, "options", ClonerOptions())


class Resources:
    """As StandardGpuResources."""

    def __init__(self):
        self.temporary = self.pinned = None

    def setTempMemory(self, size):  # noqa: N802
        self.temporary = size

    def setPinnedMemory(self, size):  # noqa: N802
        self.pinned = size


class ClonerOptions:
    """The fields of GpuClonerOptions, and no other: FAISS takes those too, and ignores them."""

    __slots__ = (
        "allowCpuCoarseQuantizer",
        "indicesOptions",
        "reserveVecs",
        "storeTransposed",
        "useFloat16",
        "useFloat16CoarseQuantizer",
        "usePrecomputed",
        "use_cuvs",
        "verbose",
    )


class FlatConfig:
    """The fields of GpuIndexFlatConfig."""

    __slots__ = ("device", "memorySpace", "storeTransposed", "useFloat16", "use_cuvs")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with GPUs of 16 GB, one unless ``gpu.states`` is changed; what is copied there is in ``gpu.made``."""
    made, held = [], set()

    def copy(resources, number, index, options):
        assert isinstance(resources, Resources)
        assert resources.temporary == TEMPORARY_BYTES
        assert id(resources) not in held, "FAISS's account of memory has no lock"
        held.add(id(resources))
        machine.resources.append(resources)  # so that no other gets its id
        assert number in machine.states
        assert options.use_cuvs is False
        kind = GpuIndexIVFFlat if isinstance(index, faiss.IndexIVFFlat) else GpuIndexIVFScalarQuantizer
        made.append(kind(index, number))
        return made[-1]

    pretended = {
        "StandardGpuResources": Resources,
        "GpuClonerOptions": ClonerOptions,
        "GpuIndexFlatConfig": FlatConfig,
        "GpuIndexFlatL2": GpuIndexFlatL2,
        "GpuIndexIVFScalarQuantizer": GpuIndexIVFScalarQuantizer,
        "GpuProgressiveDimIndexFactory": Factory,
        "INDICES_64_BIT": 0,
        "index_cpu_to_gpu": copy,
    }
    for name, value in pretended.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    machine = SimpleNamespace(made=made, resources=[], states={0: GpuState("Pretended", 15 << 30, 16 << 30)})
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: len(machine.states))
    monkeypatch.setattr(devices, "probe", lambda number: {"gpus": len(machine.states), "works": True})
    monkeypatch.setattr(vector_lists, "gpu_state", lambda number: machine.states[number])
    caches = (devices._automatic, devices._probed)
    for cached in caches:
        cached.cache_clear()
    yield machine
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory, clustered):
    """Indexes of 9,000 items, made when asked for; the vectors, of which there are more; and queries."""
    folder, vectors = tmp_path_factory.mktemp("gpu"), clustered(20_000, 16)

    def path(metric, stored="float32"):
        file = folder / f"{metric}-{stored}.duckdb"
        if not file.exists():
            with semid.create(file, dim=16, metric=metric, levels=2, codebook_size=32, vectors=stored) as index:
                index.train(vectors[:4_000])
                index.add(vectors[:9_000], metadata={"number": np.arange(9_000)})
        return file

    return SimpleNamespace(path=path, vectors=vectors, queries=clustered(40, 16) + np.float32(0.5))


def assert_same_hits(got, right):
    assert len(got.ids) == len(right.ids)
    for mine, theirs in zip(got.distances, right.distances, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("metric", "stored"),
    [("l2", "float32"), ("cosine", "float32"), ("ip", "float32"), ("cosine", "int8"), ("l2", "none")],
)
def test_an_index_is_searched_on_the_gpu(gpu, catalogue, metric, stored):
    with semid.open(catalogue.path(metric, stored), read_only=True, device=0) as index:
        got = index.search(catalogue.queries, probes=100_000)  # all leaves: what is found is what exists
        right = index.search(catalogue.queries, exact=True)
        assert got.trace.device == "cuda:0"
        assert got.trace.executor == "faiss-lists float16"
        assert right.trace.device == "cpu (exact=True)"
        assert right.trace.executor == "brute force"
        assert_same_hits(got, right)
        assert [type(made).__name__ for made in gpu.made] == ["GpuIndexIVFScalarQuantizer"]
        assert got.trace.leaves <= 9_000 / LEAST_MEAN


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_other_precisions(gpu, catalogue, precision):
    with semid.open(catalogue.path("l2"), read_only=True, device="auto", device_vectors=precision) as index:
        got = index.search(catalogue.queries, probes=100_000)
        assert got.trace.executor == f"faiss-lists {precision}"
        assert_same_hits(got, index.search(catalogue.queries, exact=True))


def test_filters_and_deleted_items_are_dropped_after_the_scan(gpu, catalogue, tmp_path):
    path = tmp_path / "changed.duckdb"
    path.write_bytes(catalogue.path("l2").read_bytes())
    with semid.open(path, device=0) as index:
        index.search(catalogue.queries)
        index.delete(np.arange(0, 500))
        nearest = index.search(catalogue.queries, 3, exact=True)
        index.delete(np.unique(np.concatenate(nearest.ids)))
        for where in (None, "number % 3 > 0", "number < 4000", "number < 510", "number < 0"):
            for k in (10, 1_000):
                got = index.search(catalogue.queries, k, where=where, probes=100_000)
                assert_same_hits(got, index.search(catalogue.queries, k, where=where, exact=True))
        assert index.search(catalogue.queries, where="number % 3 > 0").trace.device == "cuda:0"
        assert len(gpu.made) == 1, "deleting copies nothing again"


def test_items_added_later_are_found_too(gpu, catalogue, tmp_path):
    path = tmp_path / "grown.duckdb"
    path.write_bytes(catalogue.path("l2").read_bytes())
    with semid.open(path, device=0) as index:
        index.search(catalogue.queries)
        index.add(catalogue.vectors[9_000:9_500])
        got = index.search(catalogue.queries, probes=100_000)
        assert got.trace.device == "cuda:0"
        assert got.trace.executor == "faiss-lists float16, brute force"
        assert_same_hits(got, index.search(catalogue.queries, exact=True))
        assert len(gpu.made) == 1, "the later items are few, and compared one and all"
        index.add(catalogue.vectors[9_500:20_000])
        got = index.search(catalogue.queries, probes=100_000)
        assert_same_hits(got, index.search(catalogue.queries, exact=True))
        assert len(gpu.made) > 1


def test_what_the_gpu_holds_goes_with_the_snapshot(gpu, catalogue):
    index = semid.open(catalogue.path("l2"), read_only=True, device=0)
    index.search(catalogue.queries)
    (on_gpu,) = index._on_gpus.values()
    assert index.stats()["device"]["bytes"] > 9_000 * 16 * 2
    assert len(on_gpu._states) == 1
    index.close()
    gc.collect()
    assert on_gpu._latest is None
    assert len(on_gpu._states) == 0


@pytest.mark.parametrize(
    ("queries", "options", "reason"),
    [
        (7, {}, "fewer than 8 queries"),
        (8, {"exact": True}, "exact=True"),
        (8, {"k": 2_000}, "more than 2,048 candidates to re-rank"),
        (8, {"rerank": 2_049}, "more than 2,048 candidates to re-rank"),
        (8, {"k": 129, "precision": "int8"}, "more than 512 candidates to re-rank"),
        (8, {"k": 128, "precision": "int8"}, None),
        (8, {"k": 1_000}, None),
    ],
)
def test_searches_that_the_cpu_does_better(gpu, catalogue, queries, options, reason):
    options = dict(options)
    precision = options.pop("precision", "float16")
    with semid.open(catalogue.path("l2"), read_only=True, device_vectors=precision) as index:
        got = index.search(catalogue.queries[:queries], **options, device="cuda:0")
        assert got.trace.device == ("cuda:0" if reason is None else f"cpu ({reason})")
        assert len(gpu.made) == (reason is None)
        assert index.search(catalogue.queries).trace.device == "cpu"


def test_what_does_not_fit_is_refused(gpu, catalogue, caplog):
    with semid.open(catalogue.path("l2"), read_only=True, device=0, device_vectors="float32") as index:
        needs = index.stats()["device"]["needs"]
        gpu.states[0] = GpuState("Small", needs["float16"] + 50_000, 4 << 30)
        with pytest.raises(DeviceError, match=r"9,000 vectors of 16 .* as float32 on GPU 0.*device_vectors='float16'"):
            index.search(catalogue.queries)
        gpu.states[0] = GpuState("Small", 1 << 20, 4 << 30)
        with pytest.raises(DeviceError, match=r"No precision fits: even int8 needs 1\.6 GB"):
            index.search(catalogue.queries)
        got = index.search(catalogue.queries, device="auto")
        index.search(catalogue.queries, device="auto")
        assert got.trace.device.startswith("cpu (9,000 vectors of 16 dimensions need")
        assert sum("takes the CPU" in record.getMessage() for record in caplog.records) == 1
        assert not gpu.made


def test_faiss_that_makes_something_else_is_found_out(gpu, catalogue, monkeypatch):
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda resources, number, index, options: index)
    with semid.open(catalogue.path("l2"), read_only=True, device=0) as index:
        with pytest.raises(DeviceError, match="made a IndexIVFScalarQuantizer where an index on GPU 0"):
            index.search(catalogue.queries)

        def fails(*_):
            raise RuntimeError("Error: out of memory\nsomewhere")

        monkeypatch.setattr(faiss, "index_cpu_to_gpu", fails)
        with pytest.raises(DeviceError, match=r"to GPU 0: Error: out of memory$"):
            index.search(catalogue.queries)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_leaves_are_dealt_out_over_gpus(gpu, metric, precision):
    data = scan_data(metric, lists=61)
    free = needed_bytes(data.leaves.sizes, 24, precision) - 1
    gpu.states = {number: GpuState("Small", free, free) for number in range(3)}
    executor = VectorListExecutor(data, precision=precision, gpu=1, spread=True)
    assert executor.gpus == (1, 0)
    assert executor.device == "cuda:1, cuda:0"
    assert [made.gpu for made in gpu.made] == [1, 0]
    assert sum(made._index.ntotal for made in gpu.made) == 2_000
    on_cpu = VectorListExecutor(data, precision=precision)
    assert executor.gpu_bytes == on_cpu.nbytes
    for batch, k in ((1, 10), (50, 10), (50, 500)):
        queries, probes = queries_for(data, batch), probes_of(data, batch)
        assert_as_by_hand(executor, data, queries, probes, k)
        (near, found), (right, same) = executor.search(queries, probes, k), on_cpu.search(queries, probes, k)
        np.testing.assert_array_equal(near, right)
        ends = np.full((batch, 1), -np.inf, dtype=np.float32)
        tied = (right == np.hstack([ends, right[:, :-1]])) | (right == np.hstack([right[:, 1:], ends]))
        assert (found == same)[~tied].all()


def test_more_gpus_than_leaves(gpu, monkeypatch):
    data = scan_data("l2", lists=8)
    monkeypatch.setattr(vector_lists, "deal_out", lambda *_, **__: tuple(range(10)))
    gpu.states = {number: GpuState("", 1 << 30, 1 << 30) for number in range(10)}
    executor = VectorListExecutor(data, gpu=0, spread=True)
    assert len(gpu.made) == 8
    assert_as_by_hand(executor, data, queries_for(data, 9), probes_of(data, 9, width=4), 10)


def test_the_emptiest_gpus_are_taken(gpu):
    sizes = np.full(1_000, 1_000)
    free = needed_bytes(sizes, 64, "float16") - 1
    gpu.states = {0: GpuState("", free, free), 1: GpuState("", 1 << 20, free), 2: GpuState("", 2 * free, 3 * free)}
    assert deal_out(sizes, 64, "float16", 0, spread=True) == (0, 2)
    with pytest.raises(DeviceError, match="device='cuda' where there are several"):
        deal_out(np.full(9_000, 1_000), 64, "int8", 0)
    with pytest.raises(DeviceError, match=r"as float32 on each of 3 GPUs, and 0\.0 GB of the fullest"):
        deal_out(np.full(9_000, 1_000), 64, "float32", 0, spread=True)


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_an_index_is_searched_on_two_gpus(gpu, catalogue, device, tmp_path):
    path = tmp_path / "changed.duckdb"
    path.write_bytes(catalogue.path("l2").read_bytes())
    with semid.open(path, device=device) as index:
        index.search(catalogue.queries)
        free = index.stats()["device"]["needs"]["float16"] - 1
    gpu.made.clear()
    gpu.states = {number: GpuState("Small", free, free) for number in range(2)}
    with semid.open(path, device=device) as index:
        for _ in range(2):
            for where in (None, "number % 3 > 0"):
                got = index.search(catalogue.queries, probes=100_000, where=where)
                assert got.trace.device == "cuda:0, cuda:1"
                assert_same_hits(got, index.search(catalogue.queries, where=where, exact=True))
            index.delete(np.arange(0, 500))
        assert len(gpu.made) == 2
        stats = index.stats()["device"]
        assert (stats["asked"], stats["used"]) == (device, "cuda:0, cuda:1")
        with pytest.raises(DeviceError, match="on GPU 0"):  # which was named, and no other
            index.search(catalogue.queries, device=0)


def test_stats_say_what_would_fit(gpu, catalogue):
    with semid.open(catalogue.path("l2"), read_only=True, device="auto") as index:
        before = index.stats()["device"]
        assert (before["asked"], before["used"], before["bytes"]) == ("auto", "cuda:0", 0)
        index.search(catalogue.queries)
        after = index.stats()["device"]
        assert after["bytes"] > 0
        assert list(after["needs"]) == ["float32", "float16", "int8"]
        assert after["needs"]["float16"] == pytest.approx(before["needs"]["float16"], rel=0.2)


def test_all_but_the_copying_is_the_same_on_the_cpu(catalogue):
    with semid.open(catalogue.path("l2"), read_only=True) as index:
        index.search(catalogue.queries)
        snapshot = SearchOnGpu(None, "float16").snapshot(index._live.now())
        state = snapshot.states[0]
        assert isinstance(state, StateOnGpu)
        assert state.executor.device == "cpu"
        assert state.executor.index_type == "IndexIVFScalarQuantizer"
        from semid_index.search import search

        request = SearchRequest(catalogue.queries, False, 10, probes=100_000)
        assert_same_hits(search(lambda read: (snapshot, read()), request), index.search(catalogue.queries, exact=True))


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantizer", "dim"), [("rq", 48), ("rq", 8), ("vq", 8), ("pq", 8), ("balanced-rq", 8)])
def test_codebooks_are_learned_on_the_gpu(gpu, clustered, quantizer, dim):
    """The pretended one computes what the CPU does, so the codebooks are the same."""
    vectors = clustered(1_000, dim)
    options = {"levels": 1 if quantizer == "vq" else 2, "codebook_size": 16}
    learned = []
    for device in ("cpu", "cuda:0"):
        with semid.create(dim=dim, quantizer=quantizer, device=device, **options) as index:
            report = index.train(vectors)
            assert report.device == device
            learned.append(index._quantizer.state())
    for name, array in learned[0].items():
        np.testing.assert_array_equal(array, learned[1][name])


def test_a_quantizer_that_does_not_use_the_gpu_does_not_claim_it(gpu, clustered):
    with semid.create(dim=8, quantizer="sq8", device=0) as index:
        assert index.train(clustered(500, 8)).device == "cpu"


def test_k_means_that_would_run_on_the_cpu_is_an_error(gpu, clustered, monkeypatch):
    monkeypatch.setattr(faiss, "GpuIndexFlatL2", lambda resources, dim, config: faiss.IndexFlatL2(dim))
    monkeypatch.setattr(Factory, "ncall", 0)
    for dim in (8, 48):
        with (
            semid.create(dim=dim, levels=2, codebook_size=8, device=0) as index,
            pytest.raises(DeviceError, match="GPU 0"),
        ):
            index.train(clustered(500, dim))


# -- on a real one ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_real_gpu_gives_the_hits_of_the_cpu(catalogue):
    with semid.open(catalogue.path("l2"), read_only=True, device=0) as index:
        got = index.search(catalogue.queries, probes=100_000)
        assert got.trace.device == "cuda:0"
        assert_same_hits(got, index.search(catalogue.queries, exact=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [8, 48])
def test_a_real_gpu_learns_codebooks_as_good(clustered, dim):
    errors = []
    for device in ("cpu", 0):
        with semid.create(dim=dim, levels=2, codebook_size=32, device=device) as index:
            report = index.train(clustered(5_000, dim))
            assert report.device == ("cpu" if device == "cpu" else "cuda:0")
            errors.append(report.levels[-1].error)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_a_gpu_can_be_required():
    """Where one is, nothing may be skipped silently."""
    if devices.gpu_problem(0) is None:
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", "-k", "learns_codebooks"]
    environment = {**os.environ, "SEMID_REQUIRE_GPU": "1"}
    done = subprocess.run([*command, __file__], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "1 error" in done.stdout, done.stdout + done.stderr
    assert "GPU 0 cannot be used" in done.stdout


def bench(*arguments, code="", **environment):
    """Run the benchmark in a process of its own: how it ended."""
    code = f"import sys; {code}from benchmarks import gpu_parity; sys.exit(gpu_parity.main())"
    command = [sys.executable, "-c", code, "--cpu-only", "--rounds", "1", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_benchmark_runs_without_a_gpu(tmp_path):
    figures = tmp_path / "figures.json"
    done = bench("--json", figures)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["failed"] == 0
    assert found["environment"]["device"] == "cpu"
    assert not any(row["gpu"] for row in found["parity"] + found["speed"] + found["training"] + found["bandwidth"])
    assert {row["precision"] for row in found["parity"]} == set(PRECISIONS)
    assert {row["batch"] for row in found["parity"]} == {1, 32, 1_024}
    assert {row["case"] for row in found["parity"]} >= {"padding", "empty lists", "duplicates", "filter"}
    best = {row["subject"]: row["recall@10"] for row in found["speed"]}
    assert len(best) == 7
    assert min(best.values()) >= 0.9, "widened until 95 % are found, or all settings were tried"


def test_the_benchmark_needs_no_duckdb(tmp_path):
    done = bench("--json", tmp_path / "figures.json", "bandwidth", code="sys.modules['duckdb'] = None; ")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["bandwidth"][0]["bytes_per_second"] > 1e6


def test_a_benchmark_that_ends_early_leaves_what_it_has(tmp_path):
    """A part whose process dies, one that fails, one that is out of time."""
    figures = tmp_path / "figures.json"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'bandwidth' in sys.argv[-1:]:\n"
        "    os.abort()\n"
        "if 'training' in sys.argv[-1:]:\n"
        "    sys.modules['semid_index.quantizers.rq'] = None\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = bench("--json", figures, "--seconds", "0.01", "bandwidth", "parity", PYTHONPATH=path)
    assert done.returncode == 1
    found = json.loads(figures.read_text())
    assert "ended early: status -6" in found["bandwidth"][0]["error"]
    assert found["failed"] == 1
    assert found["parity"][0]["ok"]
    assert found["parity"][-1]["left_out"] == "the rest of this part: no time was left"


def test_a_subject_that_fails_leaves_the_others():
    """In the part that takes longest."""
    from benchmarks import gpu_parity

    arguments = SimpleNamespace(rows=600, dim=9, gpu=None, batches=[16], rounds=1)  # 9 dimensions: product codes of 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_parity, "pq_parts", lambda dim: 2)
        rows = list(gpu_parity.speed(arguments))
    (failed,) = [row for row in rows if "error" in row]
    assert failed["subject"] == "IVF-PQ2, re-ranked"
    assert failed["ok"] is False
    assert len({row["subject"] for row in rows}) == 7


# -- the page ---------------------------------------------------------------------------------------------------------


def gpu_figures():
    """As the benchmark writes them, small."""
    where = {"date": "2031-05-06", "device": "cuda:0", "gpu": "Pretended H1", "gpu_bytes": 80e9, "cores": 16}
    row = {"rows": 1_000_000, "dim": 768, "gpu": True, "bytes": 2_000_000_000, "build_seconds": 12.3, "batch": 1_024}
    rates = {"queries_per_second": 50_000.4, "spread": [40_000.4, 60_000.4]}
    ours = row | {"subject": "ours float16", **rates}
    return {
        "environment": where | {"faiss": "9.9.9, faiss-gpu 9.9.9"},
        "parity": [
            {"metric": "l2", "precision": "int8", "case": "filter", "gpu": True, "ok": True},
            {"metric": "l2", "precision": "int8", "case": "padding", "gpu": True, "ok": False},
            {"metric": "l2", "precision": "int8", "case": "padding", "gpu": True, "ok": False},
        ],
        "bandwidth": [{"gpu": True, "bytes_per_second": 4.3e12, "ok": True}],
        "speed": [
            ours | {"setting": 1, "recall@10": 0.80, "share_of_copy_bandwidth": 0.11},
            ours | {"setting": 2, "recall@10": 0.96, "share_of_copy_bandwidth": 0.33},
            ours | {"setting": 3, "recall@10": 0.99, "share_of_copy_bandwidth": 0.44},
            row | {"subject": "IVF-Flat", "setting": 4, "recall@10": 0.7, **rates, "gpu": False},
            row | {"subject": "IVF-PQ96, re-ranked", "error": "RuntimeError: no memory", "ok": False},
            {"left_out": "the rest of this part: no time was left"},
        ],
        "failed": 3,
    }


def test_the_page_shows_what_was_found_on_a_gpu(tmp_path):
    assert gpu_section(tmp_path) == ""
    (tmp_path / "gpu-1m.json").write_text(json.dumps(gpu_figures()))
    page = body(tmp_path, None)  # no other results are looked for in this file
    assert "## On a GPU" in page
    assert "2031-05-06: Pretended H1, 80 GB, 16 cores, FAISS 9.9.9, faiss-gpu 9.9.9." in page
    assert "- 1 of 3 cases agree" in page
    assert "- **parity l2 int8 padding: disagrees (2 times)**" in page
    assert "4,300 GB a second" in page
    assert "- **speed IVF-PQ96, re-ranked: RuntimeError: no memory**" in page
    assert "- **speed: the rest of this part: no time was left**" in page
    rows = [line for line in page.splitlines() if line.startswith("| 1,024")]
    assert rows == [
        "| 1,024 | **ours float16** | GPU | 0.960 | 50,000 (40,000-60,000) | 2,000 | 33% | 12 s |",
        "| 1,024 | IVF-Flat | CPU | 0.700 | 50,000 (40,000-60,000) | 2,000 |  | 12 s |",
    ]


def test_the_page_understands_what_the_benchmark_writes(tmp_path):
    figures = tmp_path / "gpu.json"
    assert bench("--json", figures, "--rows", "1000", "speed", "training").returncode == 0
    page = gpu_section(tmp_path)
    assert "**no GPU**" in page
    assert "another code (on the CPU)" in page
    assert page.count("| **ours ") == 6
