"""DuckDB by itself: a table of vectors, and a query that orders by distance. What one has without an index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from semid_index.bench.subject import Build, Parameters, Shape, Subject
from semid_index.hookspecs import hookimpl
from semid_index.metrics import SQL_FUNCTIONS
from semid_index.quantizer import Vectors

_ROWS_AT_ONCE = 50_000


class DuckdbExact(Subject):
    """A table of float arrays, scanned for every query."""

    name: ClassVar[str] = "duckdb"
    requires: ClassVar[tuple[str, ...]] = ("duckdb",)

    @classmethod
    def load(cls) -> None:
        """Import it."""
        import duckdb  # noqa: F401

    @classmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """One way."""
        return [Build({})]

    def build(self, vectors: Vectors, shape: Shape, parameters: Parameters, folder: Path, *, threads: int) -> None:
        """Write the table."""
        import duckdb
        import pyarrow as pa

        with duckdb.connect(folder / "table.duckdb", config={"threads": threads}) as connection:
            connection.execute(f"CREATE TABLE items (id INTEGER, v FLOAT[{shape.dim}])")
            for start in range(0, len(vectors), _ROWS_AT_ONCE):
                part = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE])
                lists = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), shape.dim)
                numbers = pa.array(np.arange(start, start + len(part), dtype=np.int32))
                connection.register("part", pa.table({"id": numbers, "v": lists}))
                connection.execute("INSERT INTO items SELECT id, v FROM part")
                connection.unregister("part")

    def open(self, folder: Path, shape: Shape, parameters: Parameters, *, threads: int) -> None:
        """Open the file."""
        import duckdb

        config: dict[str, Any] = {"threads": threads}
        self._connection = duckdb.connect(folder / "table.duckdb", read_only=True, config=config)
        self._shape = shape
        # at length 1 the inner product orders as cosine does, and is cheaper
        function = SQL_FUNCTIONS["l2" if shape.metric == "l2" else "ip"]
        self._query = f"SELECT id FROM items ORDER BY {function}(v, ?::FLOAT[{shape.dim}]) LIMIT ?"

    def prepare(self, search: Parameters) -> None:
        """Nothing to set."""

    def search(self, queries: Vectors, k: int) -> list[NDArray[np.int32]]:
        """Ids, one query after the other."""
        return [
            self._connection.execute(self._query, [query.tolist(), k]).fetchnumpy()["id"].astype(np.int32)
            for query in queries
        ]

    def memory(self) -> dict[str, int]:
        """The table, which DuckDB keeps in its buffers once it was read."""
        return {"float32 rows": 4 * self._shape.rows * self._shape.dim, "row numbers": 4 * self._shape.rows}

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


@hookimpl
def semid_register_subjects(register: Callable[[type[Any]], None]) -> None:
    """Offer it."""
    register(DuckdbExact)
