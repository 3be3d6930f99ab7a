"""FAISS: exact, inverted files with several codes, and HNSW.

Indexes are made by FAISS's own factory strings, which results show, so that anyone can make the same. Where codes are
short, ``Refine`` computes distances of the best candidates from stored rows (float32, float16 or 8 bits).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from semid_index.bench.subject import Build, Parameters, Shape, Subject, ladder
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Vectors
from semid_index.quantizers.kmeans import import_faiss

_FILE = "index.faiss"
_POINTS_PER_LIST = 64  # FAISS's k-means warns below 39 and uses at most 256
_ROWS = {"Flat": 4.0, "SQfp16": 2.0, "SQ8": 1.0}  # bytes per dimension of what Refine keeps
_BITS_PER_LINK = 32
_MANY_ROWS = 200_000
_USUAL_PIECES = 96  # of a product code, where FAISS was fastest on sets of 128, 384 and 784 dimensions


class FaissIndex(Subject):
    """What all of them share. The build parameter ``factory`` is FAISS's description of an index."""

    requires: ClassVar[tuple[str, ...]] = ("faiss-cpu",)

    @classmethod
    def load(cls) -> None:
        """Import FAISS."""
        import_faiss()

    def build(self, vectors: Vectors, shape: Shape, parameters: Parameters, folder: Path, *, threads: int) -> None:
        """Train, add, write."""
        faiss = import_faiss()
        faiss.omp_set_num_threads(threads)
        metric = faiss.METRIC_INNER_PRODUCT if shape.metric == "ip" else faiss.METRIC_L2  # at length 1, l2 is cosine
        index = faiss.index_factory(shape.dim, parameters["factory"], metric)
        self.before_training(index, parameters)
        if not index.is_trained:
            count = min(len(vectors), max(10_000, _POINTS_PER_LIST * parameters.get("lists", 1)))
            sample = np.sort(np.random.default_rng(0).choice(len(vectors), count, replace=False))
            index.train(np.ascontiguousarray(vectors[sample]))
        index.add(np.ascontiguousarray(vectors))
        faiss.write_index(index, str(folder / _FILE))

    def before_training(self, index: Any, parameters: Parameters) -> None:
        """Settings that the factory string does not have."""

    def open(self, folder: Path, shape: Shape, parameters: Parameters, *, threads: int) -> None:
        """Read the file."""
        faiss = import_faiss()
        faiss.omp_set_num_threads(threads)
        self._index = faiss.read_index(str(folder / _FILE))
        self._shape = shape
        self._parameters = parameters

    def prepare(self, search: Parameters) -> None:
        """Nothing to set."""

    def search(self, queries: Vectors, k: int) -> NDArray[np.int64]:
        """Ids; -1 for none."""
        ids: NDArray[np.int64] = self._index.search(queries, k)[1]
        return ids

    def close(self) -> None:
        """Free it."""
        del self._index


class FaissFlat(FaissIndex):
    """Exact search: the ceiling of recall, and what a matrix product can do."""

    name: ClassVar[str] = "faiss-flat"

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """One way."""
        return [Build({"factory": "Flat"})]

    def memory(self) -> dict[str, int]:
        """The rows."""
        return {"float32 rows": 4 * self._shape.rows * self._shape.dim}


class FaissIvf(FaissIndex):
    """Inverted files: the cells nearest to the query are scanned."""

    def prepare(self, search: Parameters) -> None:
        """Cells to scan, and how many candidates are refined for each hit."""
        faiss = import_faiss()
        faiss.extract_index_ivf(self._index).nprobe = search["nprobe"]
        if "refine" in search:
            self._index.k_factor = search["refine"]

    @staticmethod
    def probes(lists: int) -> list[int]:
        """Numbers of cells to try."""
        return ladder(max(1, lists // 128), min(512, lists))

    def memory(self) -> dict[str, int]:
        """Codes, ids, what is refined from, centroids and codebooks, as FAISS lays them out."""
        faiss = import_faiss()
        shape, ivf = self._shape, faiss.extract_index_ivf(self._index)
        kept = self._parameters.get("rows")
        parts = {
            "codes": shape.rows * code_bytes(ivf),
            "ids": 8 * shape.rows,
            "centroids": 4 * ivf.nlist * ivf.d,
            "codebooks": 4 * ivf.pq.d * ivf.pq.ksub if hasattr(ivf, "pq") else 0,
        }
        if kept is not None:
            parts["float32 rows" if kept == "Flat" else f"{kept} rows"] = int(_ROWS[kept] * shape.rows * shape.dim)
        if str(self._parameters["factory"]).startswith("OPQ"):
            parts["rotation"] = 4 * shape.dim * shape.dim
        return {name: size for name, size in parts.items() if size}


def code_bytes(ivf: Any) -> int:
    """Bytes of one code in a list, which FastScan keeps with an even number of 4-bit codes."""
    return int(ivf.M2 // 2) if hasattr(ivf, "M2") and hasattr(ivf, "pq") else int(ivf.code_size)


class FaissIvfFlat(FaissIvf):
    """Rows in cells, as they are."""

    name: ClassVar[str] = "faiss-ivf-flat"

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """By the number of cells."""
        return [
            Build({"factory": f"IVF{lists},Flat", "lists": lists}, [{"nprobe": n} for n in cls.probes(lists)])
            for lists in (shape.lists(4), shape.lists(1))
        ]


class FaissIvfSq8(FaissIvf):
    """A byte for each dimension, in cells; nothing else is kept."""

    name: ClassVar[str] = "faiss-ivf-sq8"

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """By the number of cells."""
        return [
            Build({"factory": f"IVF{lists},SQ8", "lists": lists}, [{"nprobe": n} for n in cls.probes(lists)])
            for lists in (shape.lists(4), shape.lists(1))
        ]


class FaissIvfPq(FaissIvf):
    """4-bit product codes, scanned with SIMD ("fast scan"), then refined: on a CPU FAISS's fastest."""

    name: ClassVar[str] = "faiss-ivf-pq"

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """By cells, length of the codes, a learned rotation, and what is kept to refine from."""
        lists, other, last = (shape.lists(factor) for factor in ((4, 2, 1) if shape.rows > _MANY_ROWS else (1, 2, 4)))
        pieces = list(dict.fromkeys(shape.pieces(dims) for dims in (2, 4, 8, 16)))
        usual = min(pieces, key=lambda m: abs(m - _USUAL_PIECES))
        shorter = next((m for m in pieces if m < usual), usual)
        longer = next((m for m in reversed(pieces) if m > usual), usual)
        ways = [
            (lists, usual, "", "Flat"),
            (other, usual, "", "Flat"),
            (lists, usual, f"OPQ{usual},", "Flat"),
            (lists, shorter, "", "Flat"),
            (lists, usual, "", "SQ8"),
            (lists, shorter, f"OPQ{shorter},", "Flat"),
            (lists, longer, "", "Flat"),
            (lists, usual, "", "SQfp16"),
            (last, usual, "", "Flat"),
            (other, shorter, f"OPQ{shorter},", "Flat"),
            (lists, shorter, "", "SQ8"),
        ]
        return [
            Build(
                {"factory": f"{rotation}IVF{lists},PQ{m}x4fs,Refine({rows})", "lists": lists, "rows": rows},
                [{"nprobe": n, "refine": refine} for n in cls.probes(lists) for refine in (2, 4, 6, 10, 20)],
            )
            for lists, m, rotation, rows in dict.fromkeys(ways)
        ]


class FaissIvfRaBitQ(FaissIvf):
    """A bit for each dimension (RaBitQ), scanned with SIMD, then refined."""

    name: ClassVar[str] = "faiss-ivf-rabitq"

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """By cells, and what is kept to refine from."""
        return [
            Build(
                {"factory": f"IVF{lists},RaBitQfs,Refine({rows})", "lists": lists, "rows": rows},
                [{"nprobe": n, "refine": refine} for n in cls.probes(lists) for refine in (4, 10, 20)],
            )
            for lists, rows in ((shape.lists(4), "Flat"), (shape.lists(1), "Flat"), (shape.lists(4), "SQ8"))
        ]


class FaissHnsw(FaissIndex):
    """A graph over the rows, or over rows of 8 bits a dimension."""

    name: ClassVar[str] = "faiss-hnsw"

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """By the links of a node."""
        efforts = [{"ef": ef} for ef in ladder(8, 768)]
        ways = (("HNSW16,Flat", 16), ("HNSW32,Flat", 32), ("HNSW16,SQ8", 16))
        return [Build({"factory": factory, "links": links, "ef_construction": 200}, efforts) for factory, links in ways]

    def before_training(self, index: Any, parameters: Parameters) -> None:
        """How hard building tries."""
        index.hnsw.efConstruction = parameters["ef_construction"]

    def prepare(self, search: Parameters) -> None:
        """How many nodes are kept in sight."""
        self._index.hnsw.efSearch = search["ef"]

    def memory(self) -> dict[str, int]:
        """Rows and links: 2 M on the lowest level, M on each above, which one node in M reaches."""
        faiss = import_faiss()
        shape, hnsw = self._shape, self._index.hnsw
        bits = "SQ8" if "SQ8" in self._parameters["factory"] else "float32"
        size = 1 if bits == "SQ8" else 4
        neighbors = hnsw.neighbors.size() * _BITS_PER_LINK // 8
        return {
            f"{bits} rows": size * shape.rows * shape.dim,
            "links": int(neighbors),
            "offsets and levels": int(8 * hnsw.offsets.size() + 4 * faiss.vector_to_array(hnsw.levels).size),
        }


@hookimpl
def semid_register_subjects(register: Callable[[type[Any]], None]) -> None:
    """Offer FAISS's."""
    for subject in (FaissFlat, FaissIvfFlat, FaissIvfPq, FaissIvfRaBitQ, FaissIvfSq8, FaissHnsw):
        register(subject)
