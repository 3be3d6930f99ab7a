"""Graphs: hnswlib and USearch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from semid_index.bench.subject import Build, Parameters, Shape, Subject, ladder
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Vectors

_EFFORTS = tuple({"ef": ef} for ef in ladder(8, 768))
_LABEL_BYTES = 8
_LINK_BYTES = 4


class Hnswlib(Subject):
    """hnswlib: a graph over float32 rows. Under cosine it gets vectors of length 1, and searches by inner product."""

    name: ClassVar[str] = "hnswlib"
    requires: ClassVar[tuple[str, ...]] = ("hnswlib",)

    @classmethod
    def load(cls) -> None:
        """Import it. There is no wheel: installing it takes a C++ compiler."""
        import hnswlib  # noqa: F401

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """By the links of a node."""
        return [Build({"links": links, "ef_construction": 200}, _EFFORTS) for links in (16, 32)]

    def build(self, vectors: Vectors, shape: Shape, parameters: Parameters, folder: Path, *, threads: int) -> None:
        """Add all, write."""
        index = self._empty(shape, threads)
        index.init_index(
            max_elements=len(vectors),
            ef_construction=parameters["ef_construction"],
            M=parameters["links"],
            random_seed=100,
        )
        index.add_items(np.asarray(vectors), np.arange(len(vectors)))
        index.save_index(str(folder / "index.hnswlib"))

    def open(self, folder: Path, shape: Shape, parameters: Parameters, *, threads: int) -> None:
        """Read the file."""
        self._index, self._shape, self._links = self._empty(shape, threads), shape, parameters["links"]
        self._index.load_index(str(folder / "index.hnswlib"))
        self._index.set_num_threads(threads)

    def _empty(self, shape: Shape, threads: int) -> Any:
        import hnswlib

        index = hnswlib.Index(space="l2" if shape.metric == "l2" else "ip", dim=shape.dim)
        index.set_num_threads(threads)
        return index

    def prepare(self, search: Parameters) -> None:
        """How many nodes are kept in sight."""
        self._effort = search["ef"]

    def search(self, queries: Vectors, k: int) -> NDArray[np.uint64]:
        """Ids."""
        self._index.set_ef(max(k, self._effort))
        ids: NDArray[np.uint64] = self._index.knn_query(queries, k)[0]
        return ids

    def memory(self) -> dict[str, int]:
        """Rows, labels, and links: 2 M and a count on the lowest level; above, M and a count for one node in M - 1.

        Beside them each node has a lock, a pointer to its upper links, and its place in a table of labels.
        """
        rows, links = self._shape.rows, self._links
        return {
            "float32 rows": 4 * rows * self._shape.dim,
            "links": rows * _LINK_BYTES * (2 * links + 1) + rows // (links - 1) * _LINK_BYTES * (links + 1),
            "labels": _LABEL_BYTES * rows,
            "locks, pointers and label table": rows * (40 + 8 + 4 + 40),
        }

    def close(self) -> None:
        """Free it."""
        del self._index


class USearch(Subject):
    """USearch: a graph over rows of 32, 16 or 8 bits a dimension."""

    name: ClassVar[str] = "usearch"
    requires: ClassVar[tuple[str, ...]] = ("usearch",)

    @classmethod
    def load(cls) -> None:
        """Import it."""
        import usearch.index  # noqa: F401

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """By what is kept of the rows, and the links of a node. Its 8 bits are for vectors of length 1 only."""
        ways = [("f32", 16), ("f16", 16), ("f32", 32), *([("i8", 16)] if shape.metric == "cosine" else [])]
        return [Build({"dtype": dtype, "links": links, "ef_construction": 200}, _EFFORTS) for dtype, links in ways]

    def build(self, vectors: Vectors, shape: Shape, parameters: Parameters, folder: Path, *, threads: int) -> None:
        """Add all, write."""
        from usearch.index import Index

        index = Index(
            ndim=shape.dim,
            metric={"l2": "l2sq", "cosine": "cos", "ip": "ip"}[shape.metric],
            dtype=parameters["dtype"],
            connectivity=parameters["links"],
            expansion_add=parameters["ef_construction"],
        )
        index.add(np.arange(len(vectors)), np.asarray(vectors), threads=threads)
        index.save(str(folder / "index.usearch"))

    def open(self, folder: Path, shape: Shape, parameters: Parameters, *, threads: int) -> None:
        """Read the file."""
        from usearch.index import Index

        index = Index.restore(str(folder / "index.usearch"))
        if index is None:
            raise OSError("USearch cannot read its own file.")
        self._index, self._shape, self._threads, self._parameters = index, shape, threads, parameters

    def prepare(self, search: Parameters) -> None:
        """How many nodes are kept in sight."""
        self._index.expansion_search = search["ef"]

    def search(self, queries: Vectors, k: int) -> NDArray[np.uint64]:
        """Ids."""
        keys: NDArray[np.uint64] = self._index.search(queries, k, threads=self._threads).keys
        return keys.reshape(len(queries), -1)  # for a single query it gives one row without saying so

    def memory(self) -> dict[str, int]:
        """Rows, and everything else that its file has: links, keys and levels; and its table of keys."""
        rows = self._shape.rows
        size = {"f32": 4, "f16": 2, "i8": 1}[self._parameters["dtype"]]
        vectors = size * rows * self._shape.dim
        return {
            f"{self._parameters['dtype']} rows": vectors,
            "links, keys and levels": int(self._index.serialized_length) - vectors,
            "pointers and key table": rows * (8 + 8 + 32),
        }

    def close(self) -> None:
        """Free it."""
        del self._index


@hookimpl
def semid_register_subjects(register: Callable[[type[Any]], None]) -> None:
    """Offer both."""
    register(Hnswlib)
    register(USearch)
