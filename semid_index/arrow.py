"""Arrow columns of fixed-size lists, and NumPy matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


def fixed_size_list(matrix: NDArray[Any]) -> pa.Array:
    """A (n, d) matrix as an Arrow column of fixed-size lists, without copying it."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def fixed_size_matrix(column: Any) -> NDArray[Any]:
    """An Arrow column of fixed-size lists as a (n, d) matrix."""
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in getattr(column, "chunks", [column])]
    if not parts:
        return np.empty((0, width), dtype=column.type.value_type.to_pandas_dtype())
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, width)


def numpy_column(column: Any) -> NDArray[Any]:
    """An Arrow column as an array, (n,), or (n, d) for one of fixed-size lists."""
    import pyarrow as pa

    return fixed_size_matrix(column) if pa.types.is_fixed_size_list(column.type) else column.to_numpy()


def batches(relation: duckdb.DuckDBPyRelation, rows: int) -> Iterator[pa.RecordBatch]:
    """A result in Arrow batches. What goes wrong meanwhile comes as an error of DuckDB, and not as one of Arrow."""
    import pyarrow as pa

    reader = relation.to_arrow_reader(rows)
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except (OSError, pa.ArrowException) as error:
            raise duckdb.IOException(f"IO Error: {error}") from error
        yield batch
