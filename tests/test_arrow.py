"""Arrow columns and NumPy arrays, there and back, without pandas."""

from __future__ import annotations

import json

import duckdb
import numpy as np
import pyarrow as pa
import pytest

import semid_index as semid
from semid_index.arrow import Values, column_of, fixed_size_list, fixed_size_matrix, numpy_column

TYPES = ("int8", "uint8", "int16", "uint16", "int32", "int64", "uint64", "float32", "float64")


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_there_and_back(dtype):
    values = np.arange(40).astype(dtype)
    column = column_of(values)
    assert column.equals(pa.array(values))
    assert column_of(values[::3]).to_pylist() == values[::3].tolist()
    for made in (column.slice(7, 11), pa.chunked_array([column.slice(3, 4), column.slice(20)])):
        found = numpy_column(made)
        assert found.dtype == dtype
        assert found.tolist() == made.to_pylist()


@pytest.mark.parametrize("dtype", TYPES)
def test_lists_there_and_back(dtype):
    values = np.arange(60).reshape(20, 3).astype(dtype)
    column = fixed_size_list(values)
    assert column.to_pylist() == values.tolist()
    for made in (column, column.slice(5, 6), pa.chunked_array([column.slice(3, 4), column.slice(17)])):
        found = numpy_column(made)
        assert found.dtype == dtype
        assert found.tolist() == made.to_pylist()
    assert fixed_size_list(np.asfortranarray(values)).to_pylist() == values.tolist()


@pytest.mark.parametrize("chunks", [[], [[]], [[], []]])
def test_nothing(chunks):
    numbers, lists = pa.int32(), pa.list_(pa.float32(), 3)
    found = numpy_column(pa.chunked_array([pa.array(chunk, numbers) for chunk in chunks], numbers))
    assert (found.shape, found.dtype) == ((0,), np.int32)
    matrix = fixed_size_matrix(pa.chunked_array([pa.array(chunk, lists) for chunk in chunks], lists))
    assert (matrix.shape, matrix.dtype) == ((0, 3), np.float32)


def test_text_and_what_is_missing():
    assert numpy_column(pa.array(["a", "bc", ""])).tolist() == ["a", "bc", ""]
    found = numpy_column(pa.array([1, None, 3]))
    assert found[[0, 2]].tolist() == [1, 3]
    assert np.isnan(found[1])


@pytest.mark.parametrize("texts", [False, True])
def test_opening_and_searching_leave_pandas_out(texts, tmp_path, run_python):
    """It takes longer to import than an index to open, and pyarrow imports it where it is installed."""
    pytest.importorskip("pandas")
    if duckdb.__version__.startswith("1."):
        pytest.skip("DuckDB 1.5 imports pandas by itself")
    vectors = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float32)
    with semid.create(tmp_path / "index.duckdb", dim=16, levels=2, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors, ids=[f"item {number}" for number in range(600)] if texts else None)
    np.save(tmp_path / "query.npy", vectors[7])
    loaded = json.loads(
        run_python(
            "import json, sys, numpy, semid_index as semid\n"
            f"index = semid.open({str(tmp_path / 'index.duckdb')!r})\n"
            f"found = index.search(numpy.load({str(tmp_path / 'query.npy')!r}), 3)\n"
            "print(json.dumps([str(found.ids[0]), 'pandas' in sys.modules]))"
        )
    )
    assert loaded == ["item 7" if texts else "7", False]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int64()], ids=str)
@pytest.mark.parametrize("skipped", [0, 7])
def test_values_are_those_that_arrow_takes(kind, skipped):
    texts = [f"p\u00e4ckage {i}" for i in range(500)] + ["", "a\0b\0", "\u65e5\u672c\0"]
    column = pa.array(range(500) if kind == pa.int64() else texts, kind).slice(skipped)
    values = Values(column)
    last = len(column) - 1
    for positions in ([], [last], [last, 0, last, last - 1, last - 2], list(range(last, 0, -2))):
        found = values.at(np.array(positions, dtype=np.int64))
        assert found.tolist() == [column[position].as_py() for position in positions]
        assert found.dtype == (np.int64 if kind == pa.int64() else object)
        assert found.flags.writeable


def test_values_of_a_column_without_text():
    assert Values(pa.array([], pa.string())).at(np.array([], dtype=np.int64)).tolist() == []
    assert Values(pa.array(["", ""])).at(np.array([1, 0])).tolist() == ["", ""]
