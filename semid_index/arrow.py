"""Arrow columns of fixed-size lists, and NumPy matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

_FEW = 32  # strings; more of them Arrow takes more quickly


def fixed_size_list(matrix: NDArray[Any]) -> pa.Array:
    """A (n, d) matrix as an Arrow column of fixed-size lists, without copying it."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(column_of(matrix.reshape(-1)), matrix.shape[1])


def fixed_size_matrix(column: Any) -> NDArray[Any]:
    """An Arrow column of fixed-size lists as a (n, d) matrix."""
    width = column.type.list_size
    parts = [_values(_flat(chunk)) for chunk in getattr(column, "chunks", [column])]
    if not parts:
        return np.empty((0, width), dtype=column.type.value_type.to_pandas_dtype())
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, width)


def numpy_column(column: Any) -> NDArray[Any]:
    """An Arrow column as an array, (n,), or (n, d) for one of fixed-size lists."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        return fixed_size_matrix(column)
    parts = [_values(chunk) for chunk in getattr(column, "chunks", [column])]
    if not parts:
        return np.empty(0, dtype=column.type.to_pandas_dtype())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def column_of(values: NDArray[Any]) -> pa.Array:
    """An array of numbers as an Arrow column, without copying it.

    ``pyarrow.array`` and ``to_numpy`` import pandas where it is installed, which takes longer than opening an index.
    """
    import pyarrow as pa

    plain = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(plain.dtype), len(plain), [None, pa.py_buffer(plain)])


def _flat(lists: pa.Array) -> pa.Array:
    """The values of fixed-size lists, one after the other; as ``flatten``, which imports pyarrow.compute, does it."""
    if lists.null_count:
        return lists.flatten()
    width = lists.type.list_size
    return lists.values.slice(lists.offset * width, len(lists) * width)


def _values(column: pa.Array) -> NDArray[Any]:
    """An Arrow array as a NumPy array; numbers are not copied, and so cannot be written to."""
    import pyarrow as pa

    numbers = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not numbers or column.null_count:
        return column.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    dtype = np.dtype(column.type.to_pandas_dtype())
    data = column.buffers()[1]
    if not len(column) or data is None:
        return np.empty(0, dtype=dtype)
    return np.frombuffer(data, dtype=dtype, count=len(column), offset=column.offset * dtype.itemsize)


class Values:
    """The values of an Arrow column without nulls, at some positions, as NumPy has them.

    For a few, what Arrow does around taking them takes longer than all else in a search: numbers are read where Arrow
    keeps them, and so are a few strings.
    """

    def __init__(self, column: pa.Array) -> None:
        import pyarrow as pa

        self._column = column
        self._numbers: NDArray[Any] | None = None
        self._ends: NDArray[np.int32] | None = None
        if pa.types.is_integer(column.type):
            self._numbers = _values(column)
        elif pa.types.is_string(column.type):
            _, ends, text = column.buffers()
            self._ends = np.frombuffer(ends, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
            self._text = memoryview(text or b"")

    def at(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Positions (m,) in, values (m,) out: numbers, or objects."""
        if self._numbers is not None:
            return self._numbers[positions]
        if self._ends is None or len(positions) > _FEW:
            return _values(self._column.take(column_of(positions)))
        places = zip(self._ends[positions].tolist(), self._ends[positions + 1].tolist(), strict=True)
        return np.array([str(self._text[start:end], "utf-8") for start, end in places], dtype=object)


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
