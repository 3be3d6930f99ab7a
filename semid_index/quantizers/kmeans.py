"""k-means and nearest codewords, both by FAISS; k-means on a GPU within :func:`clustering_on`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import DeviceError, MissingDependencyError
from semid_index.quantizer import Vectors

_POINTS_PER_CODEWORD = 256  # k-means learns a codebook of K words from at most 256 K points
_PLUSPLUS_LIMIT = 2_048  # k-means++ looks at every point once per codeword; above this, its sampled form is used
_SAMPLED_LIMIT = 16_384  # that form takes time with the square of the size, 200 s for 65,536; above this, random
_PROGRESSIVE_DIM = 32  # with fewer dimensions, k-means++ ends lower
_PROGRESSIVE_STEPS = 10


def import_faiss() -> Any:
    """FAISS, imported when first needed: it costs 0.1 s and is an optional dependency."""
    try:
        with _patient_threads():
            import faiss
    except Exception as error:  # faiss-gpu without its CUDA libraries raises RuntimeError, not ImportError
        raise MissingDependencyError(
            f"FAISS is needed to train, and does not load ({error}). Run: pip install 'semid-index[cpu]'"
        ) from error
    return faiss


@contextmanager
def _patient_threads() -> Iterator[None]:
    """Let FAISS's threads sleep while they wait, unless the user has said otherwise.

    By default they spin, and on a machine that others use too they then take the time from each other: k-means ran
    6 to 10 times longer (docs/decisions/0004). OpenMP reads the variable once, when FAISS is loaded.
    """
    if "faiss" in sys.modules or "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]


def kmeans(
    points: Vectors, size: int, *, seed: int, iterations: int = 20, report: Callable[[int, int], None] | None = None
) -> Vectors:
    """``size`` centroids of (n, dim) points, n >= size: (size, dim).

    With enough dimensions, clusters are found in the first principal axes and refined in more and more of them, up to
    all (FAISS's progressive dimensions): k-means that starts in all of them leaves most residuals of text embeddings
    in a few large clusters and wastes the other codewords (docs/decisions/0009). Otherwise it starts from k-means++
    (Arthur and Vassilvitskii, 2007), or for large codebooks its Markov-chain approximation (Bachem et al., 2016), or
    for the largest ones from points chosen at random. A cluster that runs empty takes half of a large one. Only about
    256 points for each codeword, chosen at random, are used. ``iterations`` is the work to spend, in passes over them.
    """
    faiss = import_faiss()
    dim = points.shape[1]
    if report is not None:
        report(0, 1)
    if dim >= _PROGRESSIVE_DIM and len(points) >= 2 * dim:
        passes = sum(int(dim ** (step / _PROGRESSIVE_STEPS)) for step in range(1, _PROGRESSIVE_STEPS + 1)) / dim
        clustering = faiss.ProgressiveDimClustering(dim, size)
        clustering.progressive_dim_steps = _PROGRESSIVE_STEPS
        _configure(clustering, seed, max(1, round(iterations / passes)))
        points = np.ascontiguousarray(points)
        with _index_factory(faiss) as factory:
            clustering.train(len(points), faiss.swig_ptr(points), factory)
    else:
        clustering = faiss.Clustering(dim, size)
        clustering.init_method = _start(faiss, size)
        _configure(clustering, seed, iterations)
        with _flat_index(faiss, dim) as index:
            clustering.train(points, index)
    if report is not None:
        report(1, 1)
    return _centroids(clustering)


def lloyd(points: Vectors, start: Vectors, *, seed: int, iterations: int) -> Vectors:
    """Centroids (K, dim) after so many iterations of k-means on points (n, dim), from given ones (K, dim)."""
    faiss = import_faiss()
    clustering = faiss.Clustering(points.shape[1], len(start))
    _configure(clustering, seed, iterations)
    faiss.copy_array_to_vector(np.ascontiguousarray(start, dtype=np.float32).ravel(), clustering.centroids)
    with _flat_index(faiss, points.shape[1]) as index:
        clustering.train(points, index)
    return _centroids(clustering)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@dataclass
class _TrainingGpu:
    """A GPU that k-means finds nearest centroids on."""

    number: int
    clusterings: int = 0
    """How many it was used for."""
    resources: Any = None
    """FAISS's memory and streams there, for the next one too: to make them takes longer than to cluster sub-vectors."""


_training_gpu: ContextVar[_TrainingGpu | None] = ContextVar("training_gpu", default=None)
_ON_GPU = Lock()  # its memory for intermediate results serves one at a time


@contextmanager
def clustering_on(gpu: int | None) -> Iterator[None]:
    """k-means on this GPU, within this thread; None for the CPU. Quantizers need not know."""
    token = _training_gpu.set(None if gpu is None else _TrainingGpu(gpu))
    try:
        yield
    finally:
        _training_gpu.reset(token)


def training_device() -> str:
    """Where k-means ran so far within :func:`clustering_on`: "cuda:0", or "cpu" if on no GPU."""
    gpu = _training_gpu.get()
    return f"cuda:{gpu.number}" if gpu is not None and gpu.clusterings else "cpu"


def worker_start() -> Callable[[], None]:
    """What a thread is to call first that runs k-means for this one: one FAISS thread each, and the same GPU."""
    faiss, gpu = import_faiss(), _training_gpu.get()

    def start() -> None:
        faiss.omp_set_num_threads(1)
        _training_gpu.set(gpu)

    return start


@contextmanager
def _flat_index(faiss: Any, dim: int) -> Iterator[Any]:
    """What finds the nearest centroids for FAISS's k-means."""
    gpu = _training_gpu.get()
    if gpu is None:
        yield faiss.IndexFlatL2(dim)
        return
    with _ON_GPU:
        gpu.resources, config = gpu.resources or faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
        config.device = gpu.number
        config.use_cuvs = False  # the same distances from every build of FAISS
        index = faiss.GpuIndexFlatL2(gpu.resources, dim, config)
        yield index
        if not type(index).__name__.startswith("GpuIndex"):
            raise DeviceError(f"FAISS made a {type(index).__name__} where an index on GPU {gpu.number} was asked for.")
        gpu.clusterings += 1


@contextmanager
def _index_factory(faiss: Any) -> Iterator[Any]:
    """The same for a number of dimensions that grows."""
    gpu = _training_gpu.get()
    if gpu is None:
        yield faiss.ProgressiveDimIndexFactory()
        return
    with _ON_GPU:
        factory = faiss.GpuProgressiveDimIndexFactory(1)
        factory.options.use_cuvs = False
        if gpu.number:  # it counts from 0
            factory.devices.clear()
            factory.devices.push_back(gpu.number)
        yield factory
        if not factory.ncall:
            raise DeviceError(f"k-means was to run on GPU {gpu.number}, and FAISS did not use it.")
        gpu.clusterings += 1


def _centroids(clustering: Any) -> Vectors:
    centroids = import_faiss().vector_to_array(clustering.centroids)
    return np.asarray(centroids, dtype=np.float32).reshape(clustering.k, -1)


def _configure(clustering: Any, seed: int, iterations: int) -> None:
    clustering.seed = seed
    clustering.niter = iterations
    clustering.min_points_per_centroid = 1  # no warning on stderr about few points
    clustering.max_points_per_centroid = _POINTS_PER_CODEWORD


def _start(faiss: Any, size: int) -> Any:
    """How FAISS is to choose the first centroids."""
    if size <= _PLUSPLUS_LIMIT:
        return faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    return faiss.ClusteringInitMethod_AFK_MC2 if size <= _SAMPLED_LIMIT else faiss.ClusteringInitMethod_RANDOM


def nearest(points: Vectors, codebook: Vectors) -> NDArray[np.int64]:
    """The number of the codeword nearest to each point: (n, dim) and (K, dim) in, (n,) out."""
    faiss = import_faiss()
    _, labels = faiss.knn(points, codebook, 1)
    return np.asarray(labels[:, 0], dtype=np.int64)


@contextmanager
def openmp_threads(threads: int) -> Iterator[None]:
    """FAISS on so many threads, within this thread of ours.

    On many tiny problems its threads wait for each other longer than they work; then one is best.
    """
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
