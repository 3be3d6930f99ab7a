"""Reading embeddings: every format and every kind of array gives the numbers that NumPy gives."""

from __future__ import annotations

import errno
import io
import re
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from semid_index.errors import (
    DimensionMismatchError,
    InvalidArgumentError,
    InvalidIdsError,
    InvalidVectorsError,
    MissingDependencyError,
    SemidError,
    StorageError,
)
from semid_index.vectors import VectorSource, as_queries, as_vectors, bad_rows, open_vectors, read_ids

ROWS, DIM = 23, 5
FLOATS = np.random.default_rng(7).standard_normal((ROWS, DIM)).astype(np.float32)
BYTES = np.random.default_rng(7).integers(0, 256, (ROWS, DIM), dtype=np.uint8)
SIGNED = np.random.default_rng(7).integers(-128, 128, (ROWS, DIM), dtype=np.int8)

REAL_DTYPES = ["f2", "f4", "f8", "g", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">f2", ">f4", ">f8", ">i4", ">u8"]
LIST_TYPES: dict[str, pa.DataType] = {
    "list<float>": pa.list_(pa.float32()),
    "list<double>": pa.list_(pa.float64()),
    "list<halffloat>": pa.list_(pa.float16()),
    "list<int8>": pa.list_(pa.int8()),
    "large_list<float>": pa.large_list(pa.float32()),
    "list_view<float>": pa.list_view(pa.float32()),
    "large_list_view<double>": pa.large_list_view(pa.float64()),
    "fixed<float>": pa.list_(pa.float32(), DIM),
    "fixed<double>": pa.list_(pa.float64(), DIM),
    "fixed<halffloat>": pa.list_(pa.float16(), DIM),
    "fixed<uint8>": pa.list_(pa.uint8(), DIM),
}


def assert_layout(vectors: NDArray[Any]) -> None:
    assert vectors.dtype == np.float32
    assert vectors.dtype.isnative
    assert vectors.flags.c_contiguous
    assert vectors.flags.aligned
    assert type(vectors) is np.ndarray


def assert_same(got: NDArray[Any], expected: NDArray[Any]) -> None:
    assert_layout(got)
    np.testing.assert_array_equal(got, expected, strict=True)


def lists_of(type_: pa.DataType, numbers: NDArray[Any]) -> pa.Array:
    """The rows as an Arrow array of lists of this type."""
    values = pa.array(numbers.ravel().astype(type_.value_type.to_pandas_dtype()))
    if hasattr(type_, "list_size"):
        return pa.FixedSizeListArray.from_arrays(values, DIM)
    if "view" in str(type_):
        return pa.array(numbers.tolist(), type_)
    return pa.ListArray.from_arrays(np.arange(len(numbers) + 1, dtype=np.int32) * DIM, values).cast(type_)


# ---------------------------------------------------------------------------------------------- arrays in memory


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize(
    "layout",
    [
        np.ascontiguousarray,
        np.asfortranarray,
        lambda x: np.repeat(np.repeat(x, 2, axis=0), 3, axis=1)[::2, ::3],
        lambda x: x[::-1, ::-1],
        lambda x: np.broadcast_to(x[:1], x.shape),
        lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
        lambda x: x[:0],
    ],
    ids=["C", "Fortran", "strided", "reversed", "broadcast", "unaligned", "no rows"],
)
def test_as_vectors_of_every_dtype_and_layout(dtype: str, layout: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    numbers = BYTES if np.dtype(dtype).kind == "u" else SIGNED if np.dtype(dtype).kind == "i" else FLOATS
    array = layout(numbers.astype(dtype))
    array.flags.writeable = False
    before = array.copy()
    assert_same(as_vectors(array), np.asarray(array, np.float32))
    np.testing.assert_array_equal(array, before)


@given(
    hnp.arrays(
        st.sampled_from([np.dtype(name) for name in ["f2", "f4", ">f4", "i1", "u1", "i4", ">i8", "u8"]]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements={"allow_nan": False, "allow_infinity": False},
    ),
    st.booleans(),
)
def test_as_vectors_gives_what_numpy_gives(array: NDArray[Any], transpose: bool) -> None:
    array = array.T if transpose else array
    assert_same(as_vectors(array), np.asarray(array, np.float32))


def test_as_vectors_takes_no_copy_of_an_array_that_is_right(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", FLOATS)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    column = lists_of(pa.list_(pa.float32(), DIM), FLOATS)
    for array in (FLOATS, FLOATS[4:9], mapped, column.slice(2, 8), pa.chunked_array([column]), pa.table({"v": column})):
        inside = array if isinstance(array, np.ndarray) else column.flatten().to_numpy()
        assert np.shares_memory(as_vectors(array), inside)
    assert not np.shares_memory(as_vectors(FLOATS[:, 1:]), FLOATS)


@pytest.mark.parametrize("type_", LIST_TYPES.values(), ids=LIST_TYPES)
def test_as_vectors_of_arrow_lists(type_: pa.DataType) -> None:
    numbers = BYTES if type_.value_type == pa.uint8() else SIGNED
    expected = numbers.astype(np.float32)
    column = lists_of(type_, numbers)
    chunked = pa.chunked_array([column.slice(0, 9), column.slice(9, 0), column.slice(9)])
    assert_same(as_vectors(column, dim=DIM), expected)
    assert_same(as_vectors(column.slice(3, 11)), expected[3:14])
    assert_same(as_vectors(chunked), expected)
    assert_same(as_vectors(column.slice(0, 0), dim=DIM), expected[:0])
    assert_same(as_vectors(pa.table({"id": range(ROWS), "v": chunked, "tags": [["a"]] * ROWS})), expected)
    assert_same(as_vectors(pa.record_batch({"v": column})), expected)
    assert_same(as_vectors(pa.table({"v": chunked}).to_reader()), expected)


class OnlyArray:
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return FLOATS.astype(np.float64)


class OnlyDLPack:
    def __dlpack__(self, **options: Any) -> Any:
        return FLOATS.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return FLOATS.__dlpack_device__()


def lists_as_objects(rows: list[Any]) -> NDArray[np.object_]:
    """What NumPy makes of a data frame's column of lists."""
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


@pytest.mark.parametrize(
    "data",
    [
        FLOATS.tolist(),
        tuple(map(tuple, FLOATS.tolist())),
        list(FLOATS),
        lists_as_objects(list(FLOATS)),
        lists_as_objects(FLOATS.tolist()),
        np.ma.masked_array(FLOATS),
        FLOATS.view(np.memmap),
        FLOATS.data,
        OnlyArray(),
        OnlyDLPack(),
    ],
    ids=[
        "lists",
        "tuples",
        "arrays",
        "object arrays",
        "object lists",
        "masked",
        "memmap",
        "buffer",
        "__array__",
        "dlpack",
    ],
)
def test_as_vectors_of_other_objects(data: Any) -> None:
    assert_same(as_vectors(data, dim=DIM), FLOATS)
    assert_same(np.concatenate(list(open_vectors(data).batches(4))), FLOATS)


@pytest.mark.parametrize("name", ["pandas", "polars"])
def test_as_vectors_of_data_frames(name: str) -> None:
    library = pytest.importorskip(name)
    for rows in (FLOATS.tolist(), list(FLOATS)):
        frame = library.DataFrame({"id": range(ROWS), "v": rows})
        assert_same(as_vectors(frame), FLOATS)
        assert_same(as_vectors(frame["v"]), FLOATS)
        assert_same(np.concatenate(list(open_vectors(frame, column="v").batches(4))), FLOATS)
    with pytest.raises(InvalidVectorsError, match="row 1 has 1 values where 2"):
        as_vectors(library.Series([[1.0, 2.0], [3.0]]))
    with pytest.raises(InvalidVectorsError, match=r"none of 'a', 'b' holds vectors.*to_numpy"):
        as_vectors(library.DataFrame({"a": [1.0], "b": [2.0]}))
    assert as_queries(library.Series([1.0, 2.0]), dim=2)[1]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (np.ones(4), r"shape \(4,\).*x\.reshape\(1, -1\)"),
        (np.ones((2, 3, 4)), r"shape \(2, 3, 4\).*x\.reshape\(-1, 4\)"),
        (np.float32(3), r"shape \(\).*one number"),
        ([], r"shape \(0,\)"),
        (np.ones((3, 0)), "at least one dimension"),
        (np.ones((2, 2), bool), r"booleans.*astype\(np.float32\)"),
        (np.ones((2, 2), complex), "complex"),
        (np.ones((2, 2), object), "Python objects"),
        ([["1", "2"]], "text"),
        (np.array([["1", "2"]], dtype=np.dtypes.StringDType()), "text"),
        (np.array([[b"1"]]), "bytes"),
        (np.array([["2020-01-01"]], "M8[D]"), "dates"),
        (np.zeros((2, 2), [("a", "f4")]), "records"),
        ([[1.0, None]], "Python objects"),
        (None, "Python objects"),
        ("catalog", "text"),
        (iter(FLOATS), "Python objects"),
        ([[1, 2], [3, 4], [5]], "row 2 has 1 values where 2 are expected"),
        ([[1, 2], [[3], [4]]], "inhomogeneous"),
        ([[1, 2], 3], "inhomogeneous"),
        (lists_as_objects([[1.0, 2.0], None]), "row 1 with missing values"),
        (lists_as_objects([[1.0, 2.0], [3.0, None]]), "row 1 with missing values"),
        (lists_as_objects(["a", "b"]), "no lists of numbers"),
        (lists_as_objects([{1}, 2]), "no lists of numbers"),
        (scipy.sparse.csr_matrix(FLOATS), r"sparse.*x\.toarray\(\)"),
        (scipy.sparse.coo_array(FLOATS), r"sparse.*x\.toarray\(\)"),
        (np.ma.masked_greater(FLOATS, 0), "masked"),
        (pa.array([1.0, 2.0]), r"shape \(2,\)"),
        (pa.array([["a"]]), "no lists of numbers"),
        (pa.array([[True]]), "no lists of numbers"),
        (pa.array([[1.0, 2.0], [3.0]]), "row 1 has 1 values where 2"),
        (pa.chunked_array([[[1.0]], [[2.0], [3.0, 4.0]]]), "row 2 has 2 values where 1"),
        (pa.array([[1.0], None, [2.0], None]), "rows 1, 3 with missing values"),
        (pa.array([None, [1.0]]), "row 0 with missing values|first list is empty, null"),
        (pa.array([[1.0, 2.0], [3.0, None]], pa.list_(pa.float32(), 2)), "row 1 with missing values"),
        (pa.array([[], []], pa.list_(pa.float32())), "at least one dimension|number of dimensions is unknown"),
        (pa.array([], pa.list_(pa.float32())), "at least one dimension|number of dimensions is unknown"),
        (pa.table({"a": [[1.0]], "b": [[2]]}), "'a', 'b'.*column="),
        (pa.table({"a": [1.0], "b": ["x"]}), "none of 'a', 'b' holds vectors"),
    ],
)
def test_as_vectors_refuses(data: Any, says: str) -> None:
    for read in (as_vectors, open_and_read):
        if read is open_and_read and (isinstance(data, str) or hasattr(data, "__next__")):
            continue
        with pytest.raises(SemidError, match=re.compile(says, re.DOTALL)) as caught:
            read(data)
        assert isinstance(caught.value, ValueError)


def open_and_read(data: Any) -> list[NDArray[np.float32]]:
    return list(open_vectors(data).batches(100))


def test_a_tensor_that_cannot_be_read_says_why() -> None:
    class OnDevice:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    with pytest.raises(InvalidVectorsError, match=r"items: cannot be read.*Use Tensor\.cpu\(\)"):
        as_vectors(OnDevice(), what="items")


def test_the_wrong_number_of_dimensions_is_named() -> None:
    for data in (FLOATS, FLOATS[:0], pa.array(FLOATS.tolist())):
        with pytest.raises(DimensionMismatchError, match="items have 5 dimensions, the index has 6") as caught:
            as_vectors(data, dim=6, what="items")
        assert (caught.value.expected, caught.value.got) == (6, 5)


def test_rows_that_are_not_finite_are_named() -> None:
    spoiled = np.repeat(FLOATS, 2, axis=0)
    for row, value in zip((3, 7, 11, 12, 20, 30, 44), (np.nan, np.inf, -np.inf) * 3, strict=False):
        spoiled[row, row % DIM] = value
    with pytest.raises(
        InvalidVectorsError, match="rows 3, 7, 11, 12, 20 and 2 more with values NaN or infinite"
    ) as caught:
        as_vectors(spoiled)
    assert caught.value.rows == (3, 7, 11, 12, 20, 30, 44)
    with pytest.raises(InvalidVectorsError, match="row 3 with"):
        as_vectors(spoiled[:5])
    assert_same(as_vectors(spoiled, finite=False), spoiled)


def test_values_beyond_float32_are_refused_as_such() -> None:
    limit = float(np.finfo(np.float32).max)
    assert_same(as_vectors([[limit, -limit]]), np.array([[limit, -limit]], np.float32))
    for data in ([[1.0, 2.0], [1e39, 0.0]], pa.array([[1.0, 2.0], [0.0, -1e300]])):
        with pytest.raises(InvalidVectorsError, match=r"row 1 with values beyond float32.*3\.4e\+38") as caught:
            as_vectors(data)
        assert caught.value.rows == (1,)


def test_as_queries() -> None:
    for one in (FLOATS[0], FLOATS[0].tolist(), FLOATS[0].astype(np.float64)[::1], pa.array(FLOATS[0])):
        queries, is_one = as_queries(one, dim=DIM)
        assert is_one
        assert_same(queries, FLOATS[:1])
    for many in (FLOATS, FLOATS[:1], FLOATS[:0], pa.array(list(FLOATS))):
        queries, is_one = as_queries(many, dim=DIM)
        assert not is_one
        assert_same(queries, np.asarray(many.to_pylist() if isinstance(many, pa.Array) else many, np.float32))
    assert np.shares_memory(as_queries(FLOATS[3], dim=DIM)[0], FLOATS)


@pytest.mark.parametrize(
    ("queries", "error"),
    [
        (FLOATS[0, 1:], DimensionMismatchError),
        (FLOATS[:, 1:], DimensionMismatchError),
        (FLOATS[None], InvalidVectorsError),
        (1.0, InvalidVectorsError),
        ([1.0, 2.0, 3.0, 4.0, np.nan], InvalidVectorsError),
        ("a text query", InvalidVectorsError),
    ],
)
def test_as_queries_refuses(queries: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="queries"):
        as_queries(queries, dim=DIM)


# 1e-30 squares to zero and 1e30 to infinity in float32: the first has no length left, the second is a good value.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-18, 1e-30, 1e30, -3e38, np.nan, np.inf, -np.inf])


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=5), elements=VALUES))
def test_bad_rows_are_those_found_one_by_one(vectors: NDArray[np.float32]) -> None:
    not_finite = [row for row, values in enumerate(vectors.tolist()) if not all(map(np.isfinite, values))]
    zero = [row for row, values in enumerate(vectors.tolist()) if max(map(abs, values), default=0.0) < 2e-30]
    assert bad_rows(vectors, zero=False).tolist() == not_finite
    assert bad_rows(vectors, zero=True).tolist() == sorted({*not_finite, *zero})
    assert bad_rows(vectors, zero=True).dtype == np.int64


def test_bad_rows_needs_no_memory_for_good_rows() -> None:
    vectors = np.ones((20_000, 64), np.float32)
    assert peak_bytes(lambda: bad_rows(vectors, zero=True)) < vectors.size / 4  # a boolean matrix takes vectors.size


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that NumPy and Python hold during the call, beyond what they held before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------- sources


def write_bin(path: Path, array: NDArray[Any]) -> None:
    path.write_bytes(np.array(array.shape, "<u4").tobytes() + array.tobytes())


def write_vecs(path: Path, array: NDArray[Any]) -> None:
    path.write_bytes(b"".join(np.int32(len(row)).tobytes() + row.tobytes() for row in array))


def write_hdf5(path: Path, array: NDArray[Any], **options: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("train", data=array, **options)
        file["test"] = array[::-1]
        file["neighbors"] = np.arange(4)


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=6)


def table_of(type_: pa.DataType, numbers: NDArray[Any] = FLOATS) -> pa.Table:
    return pa.table({"name": [f"item {row}" for row in range(ROWS)], "v": lists_of(type_, numbers)})


HALF = FLOATS.astype(np.float16)
FORMATS: dict[str, tuple[str, Callable[[Path], Any], NDArray[Any]]] = {
    "npy": (".npy", lambda path: np.save(path, FLOATS), FLOATS),
    "npy float16": (".npy", lambda path: np.save(path, HALF), HALF),
    "npy big-endian": (".npy", lambda path: np.save(path, FLOATS.astype(">f8")), FLOATS),
    "npy Fortran": (".npy", lambda path: np.save(path, np.asfortranarray(FLOATS)), FLOATS),
    "npz": (".npz", lambda path: np.savez(path, v=FLOATS, ids=np.arange(ROWS)), FLOATS),
    "npz compressed": (".npz", lambda path: np.savez_compressed(path, BYTES), BYTES),
    "npz beside pickles": (".npz", lambda path: np.savez(path, v=FLOATS, ids=np.array([{}, None])), FLOATS),
    "fvecs": (".fvecs", lambda path: write_vecs(path, FLOATS), FLOATS),
    "bvecs": (".bvecs", lambda path: write_vecs(path, BYTES), BYTES),
    "fbin": (".fbin", lambda path: write_bin(path, FLOATS), FLOATS),
    "u8bin": (".u8bin", lambda path: write_bin(path, BYTES), BYTES),
    "i8bin": (".i8bin", lambda path: write_bin(path, SIGNED), SIGNED),
    "hdf5": (".hdf5", lambda path: write_hdf5(path, FLOATS), FLOATS),
    "h5 chunked float16": (".h5", lambda path: write_hdf5(path, HALF, chunks=(4, 3), compression="gzip"), HALF),
    "h5 big-endian": (".H5", lambda path: write_hdf5(path, FLOATS.astype(">f8")), FLOATS),
    "parquet list": (".parquet", lambda path: pq.write_table(table_of(LIST_TYPES["list<double>"]), path), FLOATS),
    "parquet fixed": (
        ".parquet",
        lambda path: pq.write_table(table_of(LIST_TYPES["fixed<float>"]), path, row_group_size=4),
        FLOATS,
    ),
    "parquet float16": (
        ".parquet",
        lambda path: pq.write_table(table_of(LIST_TYPES["list<halffloat>"], HALF), path),
        HALF,
    ),
    "parquet int8": (".PARQUET", lambda path: pq.write_table(table_of(LIST_TYPES["list<int8>"], SIGNED), path), SIGNED),
    "feather": (
        ".feather",
        lambda path: feather.write_feather(table_of(LIST_TYPES["fixed<float>"]), path, chunksize=6),
        FLOATS,
    ),
    "arrow": (
        ".arrow",
        lambda path: feather.write_feather(table_of(LIST_TYPES["list<double>"]), path, compression="uncompressed"),
        FLOATS,
    ),
    "arrow stream": (".arrow", lambda path: write_stream(path, table_of(LIST_TYPES["list<float>"])), FLOATS),
}
in_every_format = pytest.mark.parametrize("name", FORMATS)


def written(name: str, folder: Path) -> tuple[Path, NDArray[np.float32]]:
    suffix, write, numbers = FORMATS[name]
    path = folder / f"x{suffix}"
    write(path)
    return path, np.asarray(numbers, np.float32)


@in_every_format
def test_batches_give_the_rows_in_order(name: str, tmp_path: Path) -> None:
    path, expected = written(name, tmp_path)
    for source in (open_vectors(path), open_vectors(str(path)), open_vectors(open_vectors(path))):
        assert isinstance(source, VectorSource)
        assert (source.rows, source.dim) == (ROWS, DIM)
        assert str(path) in source.description
        assert f"{ROWS} x {DIM}" in repr(source)
        for size in (1, 4, 7, ROWS - 1, ROWS, ROWS + 1):
            batches = list(source.batches(size))
            assert [len(batch) for batch in batches[:-1]] == [size] * ((ROWS - 1) // size)
            for batch in batches:
                assert_layout(batch)
            assert_same(np.concatenate(batches), expected)


@in_every_format
def test_a_sample_is_the_rows_that_the_seed_picks(name: str, tmp_path: Path) -> None:
    path, expected = written(name, tmp_path)
    source = open_vectors(path)
    for n, seed in ((0, 0), (1, 3), (9, 0), (9, 1), (ROWS - 1, 2)):
        rows = np.sort(np.random.default_rng(seed).choice(ROWS, n, replace=False))
        assert_same(source.sample(n, seed=seed), expected[rows])
    assert_same(source.sample(ROWS, seed=0), expected)
    assert_same(source.sample(ROWS + 9, seed=0), expected)


def test_a_sample_is_fair() -> None:
    source = open_vectors(np.arange(10, dtype=np.float32).reshape(-1, 1))
    counts = sum(np.bincount(source.sample(3, seed=seed).astype(int).ravel(), minlength=10) for seed in range(2_000))
    np.testing.assert_allclose(counts, 600, atol=5 * np.sqrt(2_000 * 0.3 * 0.7))  # five standard deviations


def test_a_sample_from_a_stream_of_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semid_index.vectors._STREAM_VALUES", 4 * DIM)
    for name in ("parquet fixed", "feather", "hdf5"):
        path, expected = written(name, tmp_path)
        rows = np.sort(np.random.default_rng(5).choice(ROWS, 8, replace=False))
        assert_same(open_vectors(path).sample(8, seed=5), expected[rows])


@in_every_format
def test_sizes_that_make_no_sense_are_refused(name: str, tmp_path: Path) -> None:
    source = open_vectors(written(name, tmp_path)[0])
    with pytest.raises(InvalidArgumentError, match="Batches of 0 rows"):
        next(source.batches(0))
    with pytest.raises(InvalidArgumentError, match="sample of -1 rows"):
        source.sample(-1, seed=0)


def test_sources_leave_checking_to_their_callers(tmp_path: Path) -> None:
    spoiled = FLOATS.astype(np.float64)
    spoiled[4, 0], spoiled[9, 1] = np.nan, 1e300
    np.save(tmp_path / "x.npy", spoiled)
    pq.write_table(pa.table({"v": list(spoiled)}), tmp_path / "x.parquet")
    for source in (open_vectors(spoiled), open_vectors(tmp_path / "x.npy"), open_vectors(tmp_path / "x.parquet")):
        (batch,) = source.batches(ROWS)
        assert bad_rows(batch, zero=False).tolist() == [4, 9]


@pytest.mark.parametrize("array", [FLOATS, FLOATS[::2], np.asfortranarray(FLOATS), HALF, BYTES, FLOATS[:0]])
def test_arrays_are_wrapped_without_a_copy(array: NDArray[Any]) -> None:
    source = open_vectors(array)
    assert (source.rows, source.dim) == array.shape
    assert_same(np.concatenate([*source.batches(3), np.empty((0, DIM), np.float32)]), np.asarray(array, np.float32))
    if array is FLOATS:
        assert all(np.shares_memory(batch, FLOATS) for batch in source.batches(3))
        assert np.shares_memory(source.sample(ROWS, seed=0), FLOATS)


def test_batches_of_a_generator_are_read_once_and_kept_in_a_file() -> None:
    matrix = np.arange(70, dtype=np.float64).reshape(10, 7)
    given: list[int] = []

    def batches() -> Iterator[Any]:
        for part in (matrix[:4], matrix[4:4], matrix[4:9].tolist(), pa.array(matrix[9:].tolist())):
            given.append(len(part))
            yield part

    source = open_vectors(batches())
    assert (source.rows, source.dim, given) == (10, 7, [4, 0, 5, 1])
    for _ in range(2):
        assert np.array_equal(np.concatenate(list(source.batches(3))), matrix)
    assert np.array_equal(source.sample(10, seed=0), matrix)
    reader = pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), 7)}).to_reader(4)
    assert np.array_equal(next(open_vectors(reader).batches(99)), matrix)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "there were no rows"),
        ([np.ones((0, 3))], "there were no rows"),
        ([np.ones((2, 3)), np.ones((1, 4))], "row 2 has 4 values where 3 are expected"),
        ([np.ones((2, 3)), np.ones(3)], r"from row 2: shape \(3,\), but \(n, dim\)"),
        (["a line of text"], "text"),
    ],
)
def test_a_generator_that_gives_no_batches_is_refused(batches: list[Any], says: str) -> None:
    with pytest.raises(InvalidVectorsError, match=says):
        open_vectors(iter(batches))


def test_what_a_generator_raises_is_raised(tmp_path: Path) -> None:
    def batches() -> Iterator[Any]:
        yield np.ones((2, 3))
        raise KeyError("its own error")

    with pytest.raises(KeyError, match="its own error"):
        open_vectors(batches())


def test_no_room_for_what_a_generator_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", FullDisk)
    with pytest.raises(StorageError, match=r"No space left on device\. Make room there, or set TMPDIR"):
        open_vectors(iter([np.ones((2, 3))]))


def test_tables_are_wrapped_without_a_copy() -> None:
    table = table_of(pa.list_(pa.float32(), DIM))
    values = table.column("v").chunk(0).flatten().to_numpy()
    for source in (open_vectors(table), open_vectors(table, column="v"), open_vectors(table.column("v"))):
        assert all(np.shares_memory(batch, values) for batch in source.batches(6))
        assert_same(np.concatenate(list(source.batches(6))), FLOATS)


# ---------------------------------------------------------------------------------------------------------- memory

MANY, WIDE = 80_000, 64
ALL_BYTES = MANY * WIDE * 4  # 20 MB as float32


@pytest.fixture(scope="module")
def large() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((MANY, WIDE)).astype(np.float32)


@pytest.mark.parametrize("kind", ["float16", "float64", "Fortran", "strided", ".npy", ".hdf5", ".fbin", ".fvecs"])
def test_a_batch_at_a_time_is_all_that_is_held(kind: str, large: NDArray[np.float32], tmp_path: Path) -> None:
    path = tmp_path / f"x{kind}"
    sources: dict[str, Callable[[], Any]] = {
        "float16": lambda: large.astype(np.float16),
        "float64": lambda: large.astype(np.float64),
        "Fortran": lambda: np.asfortranarray(large),
        "strided": lambda: np.repeat(large, 2, axis=1)[:, ::2],
        ".npy": lambda: np.save(path, large.astype(np.float64)),
        ".hdf5": lambda: write_hdf5(path, large),
        ".fbin": lambda: write_bin(path, large),
        ".fvecs": lambda: write_vecs(path, large),
    }
    made = sources[kind]()

    def read() -> None:
        source = open_vectors(path if made is None else made)
        for batch in source.batches(2_000):
            assert batch.nbytes <= ALL_BYTES / 40
        assert len(source.sample(2_000, seed=0)) == 2_000

    # A few batches of 1/40 and the sample of 1/40; HDF5 samples from one buffer of at most 64 MB, here the whole.
    allowed = ALL_BYTES * (1.5 if kind == ".hdf5" else 0.2)
    assert peak_bytes(read) < allowed


def test_mapped_files_are_not_copied(large: NDArray[np.float32], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", large)
    write_bin(tmp_path / "x.fbin", large)
    for name in ("x.npy", "x.fbin"):
        source = open_vectors(tmp_path / name)
        assert peak_bytes(lambda source=source: list(source.batches(2_000))) < ALL_BYTES / 40  # type: ignore[misc]


@pytest.mark.parametrize("suffix", [".parquet", ".feather"])
def test_arrow_memory_is_that_of_a_few_batches(suffix: str, large: NDArray[np.float32], tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    table = pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(large.ravel()), WIDE)})
    if suffix == ".parquet":
        pq.write_table(table, path)  # one row group
    else:
        feather.write_feather(table, path, chunksize=1_000)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_vectors(path).batches(1_000)]
    assert len(held) == 80
    assert max(held) < ALL_BYTES / 4
    assert np.array_equal(np.concatenate(list(open_vectors(path).batches(1_000))), large)


# ------------------------------------------------------------------------------------------------- choosing a column


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    table = pa.table({"a": list(FLOATS), "b": list(-FLOATS), "name": ["x"] * ROWS})
    pq.write_table(table, tmp_path / "x.parquet")
    feather.write_feather(table, tmp_path / "x.feather")
    np.savez(tmp_path / "x.npz", a=FLOATS, b=-FLOATS, name=np.arange(ROWS))
    for source in (table, *tmp_path.iterdir()):
        assert_same(open_vectors(source, column="b").sample(ROWS, seed=0), -FLOATS)
        with pytest.raises(InvalidArgumentError, match=r"'a', 'b'.*column="):
            open_vectors(source)
        with pytest.raises(InvalidArgumentError, match=r"no .*'c'.*'a', 'b', 'name'"):
            open_vectors(source, column="c")
        with pytest.raises(InvalidVectorsError):
            open_vectors(source, column="name")
    write_hdf5(tmp_path / "x.hdf5", FLOATS)
    assert_same(open_vectors(tmp_path / "x.hdf5", column="test").sample(ROWS, seed=0), FLOATS[::-1].copy())
    with pytest.raises(InvalidArgumentError, match=r"no dataset 'c'.*'neighbors', 'test', 'train'"):
        open_vectors(tmp_path / "x.hdf5", column="c")
    with pytest.raises(InvalidVectorsError, match=r"neighbors'.*shape \(4,\)"):
        open_vectors(tmp_path / "x.hdf5", column="neighbors")


def test_a_column_name_with_dots_is_a_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"v.x": [[2.0]], "v": [[1.0]]}), tmp_path / "x.parquet")
    for column, value in (("v", 1), ("v.x", 2)):
        assert open_vectors(tmp_path / "x.parquet", column=column).sample(1, seed=0).tolist() == [[value]]


def test_two_columns_of_one_name_cannot_be_chosen_from() -> None:
    table = pa.Table.from_arrays([pa.array([[1.0]]), pa.array([[2.0]])], names=["v", "v"])
    with pytest.raises(InvalidArgumentError, match="2 columns named 'v'"):
        open_vectors(table, column="v")


@pytest.mark.parametrize("name", ["npy", "fvecs", "fbin"])
def test_a_column_where_there_are_none_is_refused(name: str, tmp_path: Path) -> None:
    path, _ = written(name, tmp_path)
    for source in (path, open_vectors(path), FLOATS, lists_of(pa.list_(pa.float32()), FLOATS)):
        with pytest.raises(InvalidArgumentError, match="column='v'"):
            open_vectors(source, column="v")


# --------------------------------------------------------------------------------------------- files that are refused


@pytest.mark.parametrize("read", [open_vectors, read_ids])
def test_a_missing_file_is_named(read: Callable[[Any], Any], tmp_path: Path) -> None:
    for path in (tmp_path / "none.npy", tmp_path, "none.parquet"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"no file '{path}'")) as caught:
            read(path)
        assert isinstance(caught.value, SemidError)


@pytest.mark.parametrize("name", ["x.csv", "x", "x.pkl", "x.pt"])
def test_an_unknown_suffix_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"1,2\n")
    with pytest.raises(InvalidArgumentError, match=re.escape(name)) as caught:
        open_vectors(tmp_path / name)
    for suffix, _, _ in FORMATS.values():
        assert suffix.lower() in str(caught.value)


def test_files_of_ids_are_no_vectors(tmp_path: Path) -> None:
    write_vecs(tmp_path / "x.ivecs", np.arange(12, dtype=np.int32).reshape(3, 4))
    with pytest.raises(InvalidArgumentError, match="hold ids"):
        open_vectors(tmp_path / "x.ivecs")


def test_hdf5_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hdf5(tmp_path / "x.hdf5", FLOATS)
    monkeypatch.setitem(sys.modules, "h5py", None)  # what an import finds when the package is not there
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'semid-index[bench]'")):
        open_vectors(tmp_path / "x.hdf5")


@in_every_format
def test_a_truncated_or_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    path, _ = written(name, tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 3, 7, 11, len(whole) // 2, len(whole) - 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        if name == "arrow stream" and length >= len(whole) - 3:
            continue  # the last bytes only mark the end
        with pytest.raises(InvalidVectorsError, match=re.escape(str(path))):
            open_and_read(path)


@pytest.mark.parametrize("name", ["npy", "fbin", "fvecs"])
def test_a_file_that_is_too_long_is_refused(name: str, tmp_path: Path) -> None:
    path, _ = written(name, tmp_path)
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(InvalidVectorsError, match="bytes"):
        open_vectors(path)


def test_headers_that_promise_too_much_take_no_memory(tmp_path: Path) -> None:
    (tmp_path / "x.fbin").write_bytes(np.array([2**32 - 1, 2**32 - 1], "<u4").tobytes() + bytes(64))
    (tmp_path / "x.fvecs").write_bytes(np.array([2**31 - 1], "<i4").tobytes() + bytes(64))
    (tmp_path / "y.fvecs").write_bytes(np.array([-1], "<i4").tobytes() * 8)
    for name, shape in (("x", (2**40, 2**40)), ("y", (-2, -8)), ("z", (2**62, 4))):
        with (tmp_path / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.write(bytes(64))
    for path in tmp_path.iterdir():

        def refuse(path: Path = path) -> None:
            with pytest.raises(InvalidVectorsError, match=re.escape(str(path))):
                open_vectors(path)

        assert peak_bytes(refuse) < 5_000_000


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    objects = np.array([[1, {}]], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", v=objects)
    with pytest.raises(InvalidVectorsError, match="unpickled"):
        open_vectors(tmp_path / "x.npy")
    with pytest.raises(InvalidVectorsError, match="none of 'v' holds vectors"):
        open_vectors(tmp_path / "x.npz")
    with pytest.raises(InvalidVectorsError, match="unpickled"):
        open_vectors(tmp_path / "x.npz", column="v")


def test_fvecs_of_several_dimensions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.fvecs"
    rows = [np.ones(4, "<f4")] * 6
    for at in (2, 5):
        write_vecs(path, [*rows[:at], np.ones(3, "<f4"), *rows[at:]])  # type: ignore[arg-type]
        with pytest.raises(InvalidVectorsError, match="whole rows"):
            open_vectors(path)
    write_vecs(path, [*rows, np.ones(9, "<f4")])  # type: ignore[arg-type]  # as long as two rows of 4
    with pytest.raises(InvalidVectorsError, match="row 7 has 1065353216 values where 4"):
        open_vectors(path)
    records = np.zeros(9, [("dim", "<i4"), ("vector", "<f4", (4,))])
    records["dim"] = 4
    records["dim"][6] = 7
    records.tofile(path)
    source = open_vectors(path)
    for read in (lambda: list(source.batches(4)), lambda: source.sample(8, seed=1), lambda: source.sample(9, seed=0)):
        with pytest.raises(InvalidVectorsError, match="row 6 has 7 values where 4") as caught:
            read()
        assert caught.value.rows == (6,)


@pytest.mark.parametrize("suffix", [".parquet", ".feather"])
@pytest.mark.parametrize(
    ("row", "value", "says"),
    [
        (7, None, "row 7 with missing values"),
        (7, [1.0, None, 1.0], "row 7 with missing values"),
        (7, [1.0, 2.0], "row 7 has 2 values where 3"),
        (7, [], "row 7 has 0 values where 3"),
        (0, None, "first list"),
        (0, [], "first list"),
    ],
)
def test_bad_lists_are_named_by_their_row(suffix: str, row: int, value: Any, says: str, tmp_path: Path) -> None:
    lists: list[Any] = [[1.0, 2.0, 3.0]] * 9
    lists[row] = value
    path = tmp_path / f"x{suffix}"
    (pq.write_table if suffix == ".parquet" else feather.write_feather)(pa.table({"v": lists}), path)
    with pytest.raises(InvalidVectorsError, match=says) as caught:
        list(open_vectors(path).batches(4))
    assert caught.value.rows == (row,)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".hdf5"])
def test_a_file_that_changed_since_it_was_opened_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"

    def write(numbers: NDArray[np.float32]) -> None:
        if suffix == ".hdf5":
            write_hdf5(path, numbers)
        else:
            table = pa.table({"v": list(numbers)})
            (pq.write_table if suffix == ".parquet" else feather.write_feather)(table, path)

    for now in (FLOATS[:-3], np.concatenate([FLOATS, FLOATS])):
        write(FLOATS)
        source = open_vectors(path)
        write(now)
        with pytest.raises(InvalidVectorsError, match="Open it again"):
            list(source.batches(4))
    write(FLOATS)
    source = open_vectors(path)
    write(FLOATS[:3])
    with pytest.raises(InvalidVectorsError, match="Open it again"):
        source.sample(9, seed=0)


def test_arrow_offsets_outside_of_the_file_are_not_followed(tmp_path: Path) -> None:
    write_stream(tmp_path / "x.arrow", pa.table({"v": pa.array([[1.0, 2.0]] * 3)}))
    offsets = np.array([0, 2, 4, 6], "<i4")
    content = (tmp_path / "x.arrow").read_bytes()
    assert content.count(offsets.tobytes()) == 1
    (tmp_path / "x.arrow").write_bytes(content.replace(offsets.tobytes(), (offsets + 10**8).tobytes()))
    with pytest.raises(InvalidVectorsError, match=r"x\.arrow cannot be read"):
        open_and_read(tmp_path / "x.arrow")


def test_null_rows_of_fixed_size_lists_are_named() -> None:
    column = pa.array([[1.0, 2.0], None, [3.0, 4.0], None], pa.list_(pa.float32(), 2))
    with pytest.raises(InvalidVectorsError, match="row 1 with missing") as caught:
        list(open_vectors(column.slice(2)).batches(1))
    assert caught.value.rows == (1,)


def test_files_without_rows(tmp_path: Path) -> None:
    empty = FLOATS[:0]
    np.save(tmp_path / "x.npy", empty)
    write_bin(tmp_path / "x.fbin", empty)
    write_hdf5(tmp_path / "x.hdf5", empty)
    pq.write_table(pa.table({"v": lists_of(pa.list_(pa.float32(), DIM), empty)}), tmp_path / "x.parquet")
    for path in tmp_path.iterdir():
        source = open_vectors(path)
        assert (source.rows, source.dim) == (0, DIM)
        assert [len(batch) for batch in source.batches(4)] == []
        assert_same(source.sample(3, seed=0), empty)
    pq.write_table(pa.table({"v": lists_of(pa.list_(pa.float32()), empty)}), tmp_path / "x.parquet")
    with pytest.raises(InvalidVectorsError, match="dimensions is unknown"):
        open_vectors(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path: Path, data: st.DataObject) -> None:
    path, _ = written(name, tmp_path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        batches = open_and_read(path)
    except SemidError:
        return  # refused, with an error that says so
    for batch in batches:
        assert_layout(batch)


# ------------------------------------------------------------------------------------------------------------- ids


def test_text_ids_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    for content, ids in {
        "a\nb\n": ["a", "b"],
        "a\r\nb": ["a", "b"],
        " a \n007\n": [" a ", "007"],
        "\ufeffé\n\u2028x\x0by\n": ["é", "\u2028x\x0by"],
        "": [],
    }.items():
        path.write_bytes(content.encode())
        assert read_ids(path) == ids
    path.write_bytes(b"a\n\nb\n")
    with pytest.raises(InvalidIdsError, match="line 2 is empty"):
        read_ids(path)
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(InvalidIdsError, match="utf-8"):
        read_ids(path)


@pytest.mark.parametrize("dtype", ["i1", "u2", ">i4", "i8", "u8"])
def test_integer_ids(dtype: str, tmp_path: Path) -> None:
    ids = np.array([3, 1, 127], dtype)
    np.save(tmp_path / "ids.npy", ids)
    pq.write_table(pa.table({"id": ids.astype(ids.dtype.newbyteorder("="))}), tmp_path / "ids.parquet")
    for path in tmp_path.iterdir():
        got = read_ids(path)
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, np.array([3, 1, 127], np.int64), strict=True)
        assert not isinstance(got, np.memmap)
        assert got.dtype.isnative


def test_text_ids_of_npy_and_parquet(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array(["é", "bb"]))
    table = pa.table({"id": ["é", "bb"], "kind": pa.array(["é", "bb"]).dictionary_encode(), "n": [2, 1]})
    pq.write_table(table, tmp_path / "ids.parquet")
    for ids in (
        read_ids(tmp_path / "ids.npy"),
        read_ids(tmp_path / "ids.parquet"),
        read_ids(tmp_path / "ids.parquet", column="kind"),
    ):
        assert ids == ["é", "bb"]
        assert all(type(name) is str for name in ids)
    np.testing.assert_array_equal(read_ids(str(tmp_path / "ids.parquet"), column="n"), [2, 1])
    with pytest.raises(InvalidArgumentError, match=r"no column 'x'.*'id', 'kind', 'n'"):
        read_ids(tmp_path / "ids.parquet", column="x")


@pytest.mark.parametrize(
    "ids",
    [np.ones(3), np.ones(3, bool), np.ones((3, 1), int), np.array([b"a"]), np.array([2**63], np.uint64)],
    ids=["float", "bool", "2-D", "bytes", "uint64"],
)
def test_arrays_that_are_no_ids(ids: NDArray[Any], tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(InvalidIdsError, match=r"ids\.npy"):
        read_ids(tmp_path / "ids.npy")


@pytest.mark.parametrize("ids", [[1.5], [["a"]], ["a", None], [1, None], [True], pa.array([2**63], pa.uint64())])
def test_columns_that_are_no_ids(ids: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ids}), tmp_path / "ids.parquet")
    with pytest.raises(InvalidIdsError, match=r"ids\.parquet"):
        read_ids(tmp_path / "ids.parquet")


def test_other_files_are_no_ids(tmp_path: Path) -> None:
    for name, error, says in (
        ("ids.csv", InvalidIdsError, r"\.npy, \.parquet and \.txt"),
        ("ids.npy", InvalidIdsError, "cannot be read"),
        ("ids.parquet", InvalidIdsError, "cannot be read"),
    ):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(error, match=says):
            read_ids(tmp_path / name)
    (tmp_path / "ids.txt").write_text("a\n")
    with pytest.raises(InvalidArgumentError, match="column='x'"):
        read_ids(tmp_path / "ids.txt", column="x")
