"""ScaNN: a tree, anisotropic codes, and reordering by exact distances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from semid_index.bench.subject import Build, Parameters, Shape, Subject, ladder
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Vectors


class ScannTree(Subject):
    """ScaNN as its authors advise: leaves, 4-bit codes of two dimensions each, reordering from float32 rows.

    ``soar`` puts each row into a second leaf too (Sun et al., 2023).
    """

    name: ClassVar[str] = "scann"
    requires: ClassVar[tuple[str, ...]] = ("scann",)

    @classmethod
    def load(cls) -> None:
        """Import it. There are wheels for Linux and macOS only."""
        import scann  # noqa: F401

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """By the number of leaves, and whether rows are in two of them, for which ScaNN wants inner products."""
        both = (False,) if shape.metric == "l2" else (False, True)
        return [
            Build(
                {"leaves": leaves, "soar": soar},
                [{"leaves": n, "reorder": r} for n in ladder(1, min(512, leaves)) for r in (40, 100, 200)],
            )
            for leaves, soar in (*((shape.lists(4), soar) for soar in both), (shape.lists(1), False))
        ]

    def build(self, vectors: Vectors, shape: Shape, parameters: Parameters, folder: Path, *, threads: int) -> None:
        """Train, encode, write."""
        import scann

        distance = "squared_l2" if shape.metric == "l2" else "dot_product"
        builder = scann.scann_ops_pybind.builder(np.ascontiguousarray(vectors), 10, distance)
        builder.set_n_training_threads(threads)
        soar: dict[str, float] = {"soar_lambda": 1.5, "overretrieve_factor": 2.0} if parameters["soar"] else {}
        searcher = (
            builder.tree(
                num_leaves=parameters["leaves"],
                num_leaves_to_search=1,
                training_sample_size=min(len(vectors), 100 * parameters["leaves"]),
                spherical=shape.metric == "cosine",
                **soar,
            )
            .score_ah(2, anisotropic_quantization_threshold=0.2)
            .reorder(100)
            .build()
        )
        searcher.serialize(str(folder))

    def open(self, folder: Path, shape: Shape, parameters: Parameters, *, threads: int) -> None:
        """Read the folder."""
        import scann

        self._searcher, self._shape, self._threads = scann.scann_ops_pybind.load_searcher(str(folder)), shape, threads
        self._searcher.set_num_threads(threads)
        self._parameters = parameters

    def prepare(self, search: Parameters) -> None:
        """Leaves to search, and candidates to reorder."""
        self._search = {"leaves_to_search": search["leaves"], "pre_reorder_num_neighbors": search["reorder"]}

    def search(self, queries: Vectors, k: int) -> NDArray[np.int64] | list[NDArray[np.uint32]]:
        """Ids. Where it found fewer, ScaNN says 0, at a distance that is no number."""
        options = {**self._search, "pre_reorder_num_neighbors": max(k, self._search["pre_reorder_num_neighbors"])}
        if len(queries) == 1:
            return [self._searcher.search(queries[0], final_num_neighbors=k, **options)[0]]
        many = self._searcher.search_batched if self._threads == 1 else self._searcher.search_batched_parallel
        ids, distances = many(queries, final_num_neighbors=k, **options)
        return np.where(np.isnan(distances), np.int64(-1), ids)

    def memory(self) -> dict[str, int]:
        """Rows, codes (once for each leaf that a row is in), row numbers and centroids."""
        rows, dim = self._shape.rows, self._shape.dim
        copies = 2 if self._parameters["soar"] else 1
        return {
            "float32 rows": 4 * rows * dim,
            "codes": copies * rows * -(-dim // 4),
            "row numbers": copies * 4 * rows,
            "leaf of each row": copies * 4 * rows,
            "centroids": 4 * self._parameters["leaves"] * dim,
            "codebooks": 4 * 16 * dim,
        }

    def close(self) -> None:
        """Free it."""
        del self._searcher


@hookimpl
def semid_register_subjects(register: Callable[[type[Any]], None]) -> None:
    """Offer it."""
    register(ScannTree)
