"""semid-index for ann-benchmarks: copy this folder to ``ann_benchmarks/algorithms/semid``; see README.md."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import semid_index as semid

try:
    from ..base.module import BaseANN
except ImportError:  # in a folder of definitions beside theirs
    from ann_benchmarks.algorithms.base.module import BaseANN

METRICS = {"angular": "cosine", "euclidean": "l2"}


class Semid(BaseANN):
    """An index in a temporary file. Build options are those of ``semid.create``; see config.yml."""

    def __init__(self, metric, options):
        self._metric, self._options = METRICS[metric], dict(options)
        self._folder = tempfile.TemporaryDirectory()
        self._search = {}
        self.name = f"semid({self._described(self._options)})"

    def fit(self, X):  # noqa: N803 - as in ann-benchmarks
        path = Path(self._folder.name) / "index.duckdb"
        vectors = np.ascontiguousarray(X, dtype=np.float32)
        with semid.create(path, dim=vectors.shape[1], metric=self._metric, **self._options) as index:
            index.train(vectors)
            index.add(vectors)
        self._index = semid.open(path, read_only=True)
        self._index.search(vectors[0])  # reads what searching needs

    def set_query_arguments(self, probes, rerank):
        self._search = {"probes": probes, "rerank": rerank}
        self.name = f"semid({self._described({**self._options, **self._search})})"

    def query(self, v, n):
        return self._index.search(np.asarray(v, dtype=np.float32), n, threads=1, **self._search).ids

    def batch_query(self, X, n):  # noqa: N803 - as in ann-benchmarks
        self._found = self._index.search(np.asarray(X, dtype=np.float32), n, **self._search)

    def get_batch_results(self):
        return self._found.ids

    def get_additional(self):
        memory = self._index.stats()["memory_bytes"]
        return {"bytes_per_item": sum(memory.values()) / len(self._index)}

    def done(self):
        self._index.close()
        self._folder.cleanup()

    @staticmethod
    def _described(options):
        return ", ".join(f"{name}={value}" for name, value in options.items())
