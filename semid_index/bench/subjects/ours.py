"""semid-index itself, through the interface that everybody has: one subject for each way to store vectors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

import semid_index as semid
from semid_index.bench.subject import Build, Parameters, Shape, Subject, ladder
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Vectors

_FILE = "index.duckdb"
_FEW_ROWS = 20_000  # below, smaller codebooks do
_MANY_ROWS = 300_000  # above, a larger first codebook pays


def usual(shape: Shape) -> dict[str, Any]:
    """How an index of so many rows is made: what was fastest in ``benchmarks.speed``. Its tier is the subject's."""
    if shape.rows < _FEW_ROWS:
        return {"codebook_size": 64}
    if shape.rows < _MANY_ROWS:
        return {"leaf_size": 128}
    # scoring leaves and scanning them grow alike
    leaf_size = int(max(128, 128 * (shape.rows / 1_000_000) ** 0.5))
    return {"codebook_size": [1_024, 64, 256, 256], "leaf_size": leaf_size}


class SemidIndex(Subject):
    """What all of them share."""

    tier: ClassVar[str]
    vectors_in: ClassVar[Literal["memory", "file"]] = "memory"

    @classmethod
    def load(cls) -> None:
        """Import all that it uses; without FAISS it is not worth measuring."""
        import duckdb  # noqa: F401
        import pyarrow  # noqa: F401

        import semid_index.index  # noqa: F401
        from semid_index.quantizers.kmeans import import_faiss

        import_faiss()

    @classmethod
    def take_once(cls, dim: int) -> None:
        """Make a tiny index and search it: DuckDB, Arrow and two BLAS libraries take their working memory."""
        vectors = np.random.default_rng(0).standard_normal((1_000, dim), dtype=np.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / _FILE
            with semid.create(path, dim=dim, vectors=cls.tier, levels=2, codebook_size=16) as index:
                index.train(vectors)
                index.add(vectors)
            with semid.open(path, read_only=True, vectors_in=cls.vectors_in) as index:
                index.search(vectors, threads=1)

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """The usual way; then other leaves, the defaults, another tail, and a larger first level."""
        first = usual(shape)
        ways: list[dict[str, Any]] = [first, {**first, "leaf_size": 64}, {**first, "leaf_size": 256}, {}]
        if shape.rows > _MANY_ROWS:
            ways.append({**first, "codebook_size": [4_096, 256, 256, 256]})
        if cls.tier != "none":
            ways.append({**first, "tail": shape.pieces(8)})
        return [Build(way, cls.searches(shape)) for way in ways]

    @classmethod
    def searches(cls, shape: Shape) -> list[Parameters]:
        """Leaves to open, and candidates to re-rank."""
        leaves = shape.rows // usual(shape).get("leaf_size", 64)  # about; leaves are seldom full
        probes = ladder(max(2, leaves // 200), max(8, min(3_072, leaves)))
        return [{"probes": n, "rerank": rerank} for n in probes for rerank in (25, 40, 60, 100, 200)]

    def build(self, vectors: Vectors, shape: Shape, parameters: Parameters, folder: Path, *, threads: int) -> None:
        """Train, add; the file is the index."""
        path = folder / _FILE
        with semid.create(path, dim=shape.dim, metric=shape.metric, vectors=self.tier, **parameters) as index:
            index.train(vectors)
            index.add(vectors)

    def open(self, folder: Path, shape: Shape, parameters: Parameters, *, threads: int) -> None:
        """Open the file, and read what searching needs."""
        self._threads = threads
        self._index = semid.open(folder / _FILE, read_only=True, vectors_in=self.vectors_in)
        self._index.search(np.ones(shape.dim, dtype=np.float32), threads=threads)

    def prepare(self, search: Parameters) -> None:
        """Leaves to open, and candidates to re-rank."""
        self._options = dict(search)

    def search(self, queries: Vectors, k: int) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        """Ids."""
        found = self._index.search(queries, k, threads=self._threads, **self._options)
        ids: list[NDArray[np.int64]] = found.ids
        return found.flat_ids.reshape(-1, k) if len(found.flat_ids) == k * len(queries) else ids

    def memory(self) -> dict[str, int]:
        """As the index itself says."""
        sizes: dict[str, int] = self._index.stats()["memory_bytes"]
        return {name: int(size) for name, size in sizes.items() if size}

    def close(self) -> None:
        """Close the file."""
        self._index.close()


class SemidFloat32(SemidIndex):
    """float32 rows in memory."""

    name: ClassVar[str] = "semid-float32"
    tier: ClassVar[str] = "float32"


class SemidFloat16(SemidIndex):
    """float16 rows in memory."""

    name: ClassVar[str] = "semid-float16"
    tier: ClassVar[str] = "float16"


class SemidInt8(SemidIndex):
    """Rows of a byte a dimension in memory."""

    name: ClassVar[str] = "semid-int8"
    tier: ClassVar[str] = "int8"


class SemidFile(SemidIndex):
    """float32 rows that stay in the file."""

    name: ClassVar[str] = "semid-file"
    tier: ClassVar[str] = "float32"
    vectors_in: ClassVar[Literal["memory", "file"]] = "file"


class SemidCodes(SemidIndex):
    """Codes only: distances are to what the codes decode to."""

    name: ClassVar[str] = "semid-codes"
    tier: ClassVar[str] = "none"

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """IDs of 4, 8 and 16 codes."""
        size = 64 if shape.rows < _FEW_ROWS else 256
        return [Build({"levels": levels, "codebook_size": size}, cls.searches(shape)) for levels in (16, 8, 4)]


@hookimpl
def semid_register_subjects(register: Callable[[type[Any]], None]) -> None:
    """Offer one for each tier."""
    for subject in (SemidFloat32, SemidFloat16, SemidInt8, SemidFile, SemidCodes):
        register(subject)
