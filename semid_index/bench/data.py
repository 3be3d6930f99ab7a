"""The data that is searched: a file, the bundled sample, or generated vectors; and its exact nearest neighbours."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semid_index.bench.measures import Truth, distances_of
from semid_index.bench.subject import Shape
from semid_index.errors import InvalidArgumentError
from semid_index.metrics import check_metric, exact_search, normalized
from semid_index.quantizer import Vectors
from semid_index.records import Metric
from semid_index.vectors import open_vectors

MOST_NEIGHBOURS = 100
_HELD_OUT = 2_000
_ANN_BENCHMARKS = {"angular": "cosine", "euclidean": "l2", "dot": "ip", "ip": "ip", "normalized": "cosine"}
_GENERATED = re.compile(r"generated-(\d+)x(\d+)")
_BRANCHES = (64, 32, 32)  # of the tree that generated vectors come from
_LOCAL_DIMS = 12  # in which they differ from others of the same twig
_GENERATED_BATCH = 65_536
_EXACT_ROWS = 1 << 18  # compared at once when true neighbours are looked for


@dataclass(frozen=True)
class Data:
    """Vectors to search among, and queries. Under cosine all have length 1."""

    name: str
    metric: Metric
    base: Vectors
    """(n, dim)"""
    queries: Vectors
    """(q, dim)"""
    file: Path | None = None
    """A .npy file that ``base`` is mapped from, if it is."""

    @property
    def shape(self) -> Shape:
        """What subjects choose their parameters by."""
        return Shape(len(self.base), self.base.shape[1], self.metric)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything in it."""
        digest = hashlib.blake2b(f"{self.metric} {self.base.shape}".encode(), digest_size=8)
        for array in (self.base, self.queries):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def description(self) -> dict[str, str | int]:
        """What results say of it."""
        return {
            "name": self.name,
            "rows": len(self.base),
            "dim": self.base.shape[1],
            "metric": self.metric,
            "queries": len(self.queries),
            "fingerprint": self.fingerprint,
        }

    def first(self, rows: int, queries: int) -> Data:
        """A smaller one."""
        return Data(self.name, self.metric, self.base[:rows], self.queries[:queries])


def make_data(name: str, metric: str, base: Vectors, queries: Vectors) -> Data:
    """Data of arrays, brought to length 1 under cosine."""
    metric = check_metric(metric)
    arrays = [np.ascontiguousarray(array, dtype=np.float32) for array in (base, queries)]
    if metric == "cosine":
        arrays = [normalized(array) for array in arrays]
    return Data(name, metric, arrays[0], arrays[1])


def load_data(source: str, *, metric: str | None, queries: int = _HELD_OUT, column: str | None = None) -> Data:
    """``sample``, ``generated-ROWSxDIM``, or the path of a file with vectors.

    A .hdf5 file in the layout of ann-benchmarks brings queries and metric along. Of other files and of the sample,
    ``queries`` rows (at most a tenth) are held out, chosen at random, always the same.
    """
    if queries < 1:
        raise InvalidArgumentError(f"queries must be at least 1, not {queries}.")
    if source == "sample":
        from semid_index.demo import load_sample

        return held_out("sample", metric or "cosine", load_sample().vectors, queries)
    if match := _GENERATED.fullmatch(source):
        return generated(int(match[1]), int(match[2]), queries=queries, metric=metric or "l2")
    path = Path(source)
    if path.suffix.lower() in (".hdf5", ".h5") and path.exists() and column is None:
        found = _ann_benchmarks(path, metric, queries)
        if found is not None:
            return found
    vectors = open_vectors(source, column=column)
    return held_out(path.stem, metric or "l2", np.concatenate(list(vectors.batches(_GENERATED_BATCH))), queries)


def held_out(name: str, metric: str, vectors: Vectors, queries: int) -> Data:
    """Some rows, at most a tenth, become queries; the order is that of ``default_rng(0).permutation``."""
    queries = min(queries, len(vectors) // 10)
    if not queries:
        raise InvalidArgumentError(f"{len(vectors)} rows are too few to hold some out as queries: at least 10.")
    order = np.random.default_rng(0).permutation(len(vectors))
    return make_data(name, metric, vectors[order[queries:]], vectors[order[:queries]])


def generated(
    rows: int, dim: int, *, queries: int = _HELD_OUT, metric: str = "l2", seed: int = 0, folder: Path | None = None
) -> Data:
    """Vectors from a tree of clusters, which have sizes by Zipf's law, and few dimensions of their own inside a twig.

    So there is something to find at every scale, as in real embeddings, and not in plain Gaussian noise. The first rows
    of a larger set are those of a smaller one. With a folder, they are written there and mapped, and take no memory.
    """
    if rows < 1 or dim < 2:
        raise InvalidArgumentError(f"Generated data needs at least 1 row of 2 dimensions, not {rows} x {dim}.")
    random = np.random.default_rng(seed)
    sizes = np.cumprod(_BRANCHES).tolist()
    nodes = [random.standard_normal((size, dim), dtype=np.float32) * 0.8**depth for depth, size in enumerate(sizes)]
    shares = [1 / np.arange(1, branches + 1) ** 0.7 for branches in _BRANCHES]
    axes = random.standard_normal((_BRANCHES[0], _LOCAL_DIMS, dim), dtype=np.float32) * 0.8 / np.sqrt(_LOCAL_DIMS)

    def batch(number: int, count: int) -> Vectors:
        draw = np.random.default_rng([seed, number])
        vectors = 0.15 * draw.standard_normal((count, dim), dtype=np.float32)
        node = np.zeros(count, dtype=np.int64)
        for branches, share, words in zip(_BRANCHES, shares, nodes, strict=True):
            node = node * branches + draw.choice(branches, count, p=share / share.sum())
            vectors += words[node]
        trunk, local = node // (sizes[-1] // sizes[0]), draw.standard_normal((count, _LOCAL_DIMS), dtype=np.float32)
        for place in range(sizes[0]):
            mine = np.flatnonzero(trunk == place)
            vectors[mine] += local[mine] @ axes[place]
        return vectors

    name = f"generated-{rows}x{dim}"
    if folder is None:
        base = np.empty((rows, dim), dtype=np.float32)
        _fill(base, batch)
        return make_data(name, metric, base, batch(0, queries))
    path = folder / f"{name}-{seed}.npy"
    if not path.exists():
        part = path.with_suffix(".part.npy")
        mapped = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=(rows, dim))
        _fill(mapped, batch)
        mapped.flush()
        part.replace(path)
    made = make_data(name, metric, np.load(path, mmap_mode="r", allow_pickle=False), batch(0, queries))
    return replace(made, file=path if metric != "cosine" else None)  # under cosine they were copied, to length 1


def _fill(base: Vectors, batch: Callable[[int, int], Vectors]) -> None:
    """Batch 0 is the queries'."""
    for number, start in enumerate(range(0, len(base), _GENERATED_BATCH), 1):
        base[start : start + _GENERATED_BATCH] = batch(number, _GENERATED_BATCH)[: len(base) - start]


def _ann_benchmarks(path: Path, metric: str | None, queries: int) -> Data | None:
    """The data sets ``train`` and ``test`` of a file; None if it has none."""
    try:
        import h5py
    except ImportError:
        return None  # whoever opens the file next says what is missing
    with h5py.File(path, "r") as file:
        if "train" not in file or "test" not in file:
            return None
        said = str(file.attrs.get("distance", "euclidean"))
        if metric is None and said not in _ANN_BENCHMARKS:
            known = ", ".join(_ANN_BENCHMARKS)
            raise InvalidArgumentError(f"{path} has the distance '{said}'; known are {known}. Say which with --metric.")
        arrays = np.asarray(file["train"]), np.asarray(file["test"][:queries])
    return make_data(path.stem, metric or _ANN_BENCHMARKS[said], *arrays)


# -- exact neighbours -------------------------------------------------------------------------------------------------


def true_neighbours(data: Data, cache: Path) -> tuple[NDArray[np.int64], Truth]:
    """Rows and distances of the (at most 100) nearest of each query, kept in a folder by what the data is."""
    path = cache / f"truth-{data.fingerprint}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            return kept["rows"], Truth(kept["distances"])
    rows = _nearest(data)
    distances = distances_of(rows, data.queries, data.base, data.metric)  # the same way as those of what is found
    order = np.argsort(distances, axis=1, kind="stable")
    rows, distances = np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)
    part = path.with_suffix(".part.npz")
    np.savez(part, rows=rows, distances=distances)
    part.replace(path)
    return rows, Truth(distances)


def _nearest(data: Data) -> NDArray[np.int64]:
    """By brute force, part by part of the base, so that millions of rows need no memory of their own."""
    rows = np.empty((len(data.queries), 0), dtype=np.int64)
    distances = np.empty(rows.shape, dtype=np.float32)
    for start in range(0, len(data.base), _EXACT_ROWS):
        part = np.asarray(data.base[start : start + _EXACT_ROWS])
        found, far = exact_search(data.queries, part, MOST_NEIGHBOURS, data.metric)
        rows, distances = np.hstack([rows, found + start]), np.hstack([distances, far])
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :MOST_NEIGHBOURS]  # of ties the earlier row
        rows, distances = np.take_along_axis(rows, nearest, axis=1), np.take_along_axis(distances, nearest, axis=1)
    return rows


def write_for_workers(data: Data, folder: Path) -> None:
    """The data as files that other processes map into their memory."""
    for name, array in (("base", data.base), ("queries", data.queries)):
        path = folder / f"{name}.npy"
        if path.exists():
            continue
        if name == "base" and data.file is not None:
            path.symlink_to(data.file.resolve())
            continue
        part = path.with_suffix(".part.npy")
        np.save(part, array)
        part.replace(path)
    (folder / "data.json").write_text(json.dumps({"name": data.name, "metric": data.metric}), encoding="utf-8")


def read_in_worker(folder: Path) -> Data:
    """What :func:`write_for_workers` wrote; the vectors are mapped, and cost no memory of the process's own."""
    said = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    base = np.load(folder / "base.npy", mmap_mode="r", allow_pickle=False)
    queries = np.load(folder / "queries.npy", allow_pickle=False)
    return Data(said["name"], check_metric(said["metric"]), base, queries)
