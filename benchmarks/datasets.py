"""The data that benchmarks run on: the bundled sample, or real sets from a folder.

The folder is given to a script, or by the environment variable SEMID_DATA; else it is one beside the repository.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semid_index.metrics import exact_search, normalized

DEFAULT_FOLDER = Path(os.environ.get("SEMID_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
HELD_OUT = 2_000


@dataclass(frozen=True)
class Dataset:
    """Vectors to search among, queries, and the exact neighbours of each query."""

    name: str
    metric: str
    base: np.ndarray
    """(n, dim) float32"""
    queries: np.ndarray
    """(q, dim) float32"""
    neighbours: np.ndarray
    """(q, 10) rows of base"""


def load(name: str, folder: Path = DEFAULT_FOLDER) -> Dataset:
    """One of debian, sift128, mnist784 (from ``folder``) or sample (bundled)."""
    return {"debian": _debian, "sift128": _sift128, "mnist784": _mnist784, "sample": _sample}[name](folder)


def beauty(folder: Path = DEFAULT_FOLDER) -> tuple[np.ndarray, pa.Table, pa.Table]:
    """The set ``beauty``, which comes without queries: vectors (12,101, 384), items, and IDs that others made."""
    vectors = normalized(np.load(folder / "beauty.minilm384.f16.npy").astype(np.float32))
    tables = (pq.read_table(folder / f"beauty.{part}.parquet") for part in ("items", "external_sids"))
    return vectors, *tables


def tiny(dataset: Dataset, rows: int = 2_000, queries: int = 100) -> Dataset:
    """The first rows and queries of a set."""
    return _with_neighbours(dataset.name, dataset.metric, dataset.base[:rows], dataset.queries[:queries])


def _with_neighbours(name: str, metric: str, base: np.ndarray, queries: np.ndarray) -> Dataset:
    return Dataset(name, metric, base, queries, exact_search(queries, base, 10, metric)[0])


def _debian(folder: Path) -> Dataset:
    vectors = np.load(folder / "debian.minilm384.f16.npy").astype(np.float32)
    order = np.random.default_rng(0).permutation(len(vectors))
    return _with_neighbours(
        "debian", "cosine", normalized(vectors[order[HELD_OUT:]]), normalized(vectors[order[:HELD_OUT]])
    )


def _sift128(folder: Path) -> Dataset:
    base = np.load(folder / "sift128.base.u8.npy").astype(np.float32)
    queries = np.load(folder / "sift128.query.u8.npy").astype(np.float32)
    return Dataset("sift128", "l2", base, queries, np.load(folder / "sift128.gt100-ids.i32.npy")[:, :10])


def _mnist784(folder: Path) -> Dataset:
    arrays = np.load(folder / "mnist784.npz")
    base, queries = arrays["base"].astype(np.float32), arrays["query"].astype(np.float32)
    return Dataset("mnist784", "l2", base, queries, arrays["gt100_ids"][:, :10])


def _sample(_: Path) -> Dataset:
    from semid_index.demo import load_sample

    vectors = load_sample().vectors
    order = np.random.default_rng(0).permutation(len(vectors))
    return _with_neighbours("sample", "cosine", vectors[order[200:]], vectors[order[:200]])
