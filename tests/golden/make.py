"""Writes the files in ``v1/``, ``v2/``, ...: indexes of each format, and what was found in them.

They are a promise: whatever is written later has to read these. So this writes a folder for a new format, and never
into one that is there.

    python tests/golden/make.py
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import semid_index as semid
from semid_index.index import SemanticIndex
from semid_index.tables import FORMAT_VERSION

FOLDER = Path(__file__).resolve().parent / f"v{FORMAT_VERSION}"
ROWS, DIM, K = 300, 8, 5

INDEXES: dict[str, dict[str, Any]] = {
    "plain": {"levels": 3, "codebook_size": [8, 16, 12]},
    "strings": {"quantizer": "balanced-rq", "metric": "cosine", "levels": 2, "codebook_size": 16, "vectors": "int8"},
    "long": {"levels": 11, "codebook_size": 64, "vectors": "none"},  # 66 bits: the last level is not in the sid
    "flat": {"quantizer": "pq", "metric": "ip", "levels": 4, "codebook_size": 16, "vectors": "float16"},
    "scalar": {"quantizer": "sq4", "tail": 0},
}


def points(rows: int) -> NDArray[np.float32]:
    """Vectors around 20 centres, (rows, DIM)."""
    random = np.random.default_rng(1)
    centres = 5 * random.standard_normal((20, DIM))
    return (centres[random.integers(20, size=rows)] + 2 * random.standard_normal((rows, DIM))).astype(np.float32)


def build(path: Path, name: str) -> SemanticIndex:
    """The index of this name, filled in two adds; items 0 to 9 are there twice."""
    vectors = points(ROWS)
    numbers = np.arange(ROWS + 10)
    ids = [f"item {number} \u00e9" for number in numbers] if name == "strings" else numbers
    metadata = {
        "number": numbers,
        "word": [None if number % 7 == 0 else f"word {number}" for number in numbers],
        "tags": [["a", "b"][: number % 3] for number in numbers],
    }
    index = semid.create(path, dim=DIM, **INDEXES[name])
    index.train(vectors)
    index.add(vectors, ids[:ROWS], metadata={column: values[:ROWS] for column, values in metadata.items()})
    index.add(vectors[:10], ids[ROWS:], metadata={column: values[ROWS:] for column, values in metadata.items()})
    return index


def describe(index: SemanticIndex, queries: NDArray[np.float32]) -> dict[str, Any]:
    """What an index holds, and what is found in it, as JSON values."""
    view = index.sql("SELECT id, semantic_id, dup_rank FROM semantic_ids ORDER BY id").fetchall()
    codes = np.array([[int(code) for code in row[1].split("-")] for row in view])
    searches = {
        "default": index.search(queries, K),
        "exact": index.search(queries, K, exact=True),
        "filtered": index.search(queries, K, where="number % 2 = 1 AND word IS NOT NULL"),
    }
    return {
        "config": {name: getattr(index.config, name) for name in ("dim", "metric", "quantizer", "vectors", "tail")},
        "codebook_sizes": index.stats()["codebook_sizes"],
        "items": [list(row) for row in view],
        "decoded": index.decode(codes[:20]).tolist(),
        "metadata": index.get([row[0] for row in view[:20]]).drop_columns("semantic_id").to_pylist(),
        "shelves": {shelf.text: shelf.items for shelf in index.tree(1)} if has_prefixes(index) else None,
        "hits": {
            name: {
                "ids": [ids.tolist() for ids in result.ids],
                "distances": [distances.tolist() for distances in result.distances],
                "semantic_ids": [semantic_ids.tolist() for semantic_ids in result.semantic_ids],
            }
            for name, result in searches.items()
        },
    }


def has_prefixes(index: SemanticIndex) -> bool:
    """Whether the codes have prefixes."""
    return index.config.quantizer in ("rq", "balanced-rq")


def write(name: str) -> None:
    """Write ``<name>.duckdb.gz`` and ``<name>.json``."""
    queries = points(ROWS + 10)[ROWS:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.duckdb"
        build(path, name).close()
        with semid.open(path) as index:
            expected = {"queries": queries.tolist(), **describe(index, queries)}
        (FOLDER / f"{name}.duckdb.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    (FOLDER / f"{name}.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    FOLDER.mkdir()
    for each in INDEXES:
        write(each)
