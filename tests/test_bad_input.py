"""Whatever goes wrong, the error is one of ours and says what to do, and the index is unchanged to the byte.

Every test that shows a fault ends with a look at the index: the bytes of its file, and what a search finds.
"""

from __future__ import annotations

import array
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
from numpy.typing import NDArray

import semid_index as semid
from semid_index import tables
from semid_index.errors import (
    AlreadyTrainedError,
    CorruptIndexError,
    DimensionMismatchError,
    DuplicateIdError,
    FilterError,
    IndexClosedError,
    IndexExistsError,
    IndexFileError,
    IndexLockedError,
    IndexNotFoundError,
    InvalidArgumentError,
    InvalidCodesError,
    InvalidIdsError,
    InvalidVectorsError,
    NewerFormatError,
    NotAnIndexError,
    NotTrainedError,
    PrefixNotSupportedError,
    ReadOnlyError,
    SemidError,
    SourceNotFoundError,
    UnknownIdError,
    UnknownNameError,
)
from semid_index.index import SemanticIndex

DIM = 24
ROWS = 300
QUANTIZERS: dict[str, dict[str, Any]] = {
    "rq": {"levels": 3, "codebook_size": 16},
    "balanced-rq": {"levels": 3, "codebook_size": 16},
    "pq": {"levels": 4, "codebook_size": 16},
    "sq8": {},
    "sq4": {},
}
# every metric with one quantizer, and every quantizer with the metric that allows least
COMBINATIONS = [("l2", "rq"), ("ip", "rq"), *(("cosine", quantizer) for quantizer in QUANTIZERS)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wal(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


class Watched:
    """An open index, and what its file holds and its searches find as long as nothing changes it."""

    def __init__(self, path: Path, queries: NDArray[np.float32]) -> None:
        self.path = path
        self.bytes = digest(path)
        self.index = semid.open(path)
        self.queries = queries
        self.trained = self.index.stats()["trained"]
        self.hits = self.search()

    def search(self) -> list[list[Any]]:
        if not self.trained:
            return []
        ids, distances = self.index.search(self.queries, k=3)
        return [np.concatenate(ids).tolist(), np.concatenate(distances).tolist()]

    def assert_as_before(self) -> None:
        assert digest(self.path) == self.bytes, "the file was changed"
        assert not wal(self.path).exists(), "something was written beside the file"
        assert self.search() == self.hits, "the index finds other things than before"

    def close(self) -> None:
        self.index.close()
        assert digest(self.path) == self.bytes, "the file was changed when it was closed"
        assert not wal(self.path).exists()


@contextmanager
def watching(path: Path, queries: NDArray[np.float32]) -> Iterator[Watched]:
    watched = Watched(path, queries)
    try:
        yield watched
        watched.assert_as_before()
    finally:
        watched.close()


@contextmanager
def refused(error: type[SemidError], *words: str) -> Iterator[pytest.ExceptionInfo[SemidError]]:
    """The block raises exactly this error, and its message has all of these words (regular expressions)."""
    with pytest.raises(error) as raised:
        yield raised
    assert type(raised.value) is error
    for word in words:
        assert re.search(word, str(raised.value)), f"{word!r} is not in: {raised.value}"


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def watched(request, clustered, tmp_path_factory) -> Iterator[dict[str, Watched]]:
    """For each metric and quantizer, a trained and filled index, and an untrained one, both open."""
    metric, quantizer = request.param
    folder, points = tmp_path_factory.mktemp("watched"), clustered(ROWS + 5, DIM)
    options = {"dim": DIM, "metric": metric, "quantizer": quantizer, **QUANTIZERS[quantizer]}
    semid.create(folder / "untrained.duckdb", **options).close()
    with semid.create(folder / "filled.duckdb", **options) as index:
        index.train(points[:ROWS])
        index.add(points[:ROWS])
    pair = {name: Watched(folder / f"{name}.duckdb", points[ROWS:]) for name in ("untrained", "filled")}
    yield pair
    for each in pair.values():
        each.close()


# ------------------------------------------------------------------------------------------------- bad vectors


def with_value(value: float, dtype: str = "f4") -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    """Vectors of which row 3 has one such value."""

    def spoil(good: NDArray[np.float32]) -> NDArray[Any]:
        bad = good.astype(dtype)
        bad[3, 1] = value
        return bad

    return spoil


def with_zero_row(good: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.arange(len(good))[:, None] == 3, np.float32(0), good)


@dataclass(frozen=True)
class Fault:
    make: Callable[[NDArray[np.float32]], Any]
    words: Sequence[str]
    """What the message says: what was wrong, and what is allowed or to be done."""
    error: type[SemidError] = InvalidVectorsError
    allowed_in: Sequence[str] = ()
    """Where it is no fault."""
    metrics: Sequence[str] = ("l2", "cosine", "ip")


VECTOR_FAULTS = {
    "NaN": Fault(with_value(np.nan), ["NaN", r"\b3\b", "drop"]),
    "infinity": Fault(with_value(np.inf), ["infinite", r"\b3\b", "drop"]),
    "minus infinity": Fault(with_value(-np.inf), ["infinite", r"\b3\b", "drop"]),
    "float64 NaN": Fault(with_value(np.nan, "f8"), ["NaN", r"\b3\b", "drop"]),
    "beyond float32": Fault(with_value(1e39, "f8"), ["infinite|beyond float32", r"\b3\b", "drop"]),
    "square beyond float32": Fault(with_value(3e19), ["lengths above 3e\\+18 are not allowed", r"\b3\b"]),
    "zero vector": Fault(with_zero_row, ["zero vector has no direction", "cosine", r"\b3\b"], metrics=["cosine"]),
    "too few dimensions": Fault(lambda v: v[:, 1:], ["23", "the index has 24", r"\(n, 24\)"], DimensionMismatchError),
    "too many dimensions": Fault(
        lambda v: np.pad(v, ((0, 0), (0, 1))), ["25", "the index has 24", r"\(n, 24\)"], DimensionMismatchError
    ),
    "no rows": Fault(lambda v: v[:0], ["0 rows", "Give one or more"], allowed_in=["encode"]),
    "no dimensions": Fault(lambda v: v[:, :0], [r"shape \(20, 0\)", "at least one dimension"]),
    "1-D": Fault(lambda v: v[0], [r"shape \(24,\)", r"x\.reshape\(1, -1\)"], allowed_in=["search"]),
    "an empty list": Fault(lambda v: [], [r"shape \(0,\)", "one vector or more"], allowed_in=["search"]),
    "3-D": Fault(lambda v: v[None], [r"shape \(1, 20, 24\)", r"x\.reshape\(-1, 24\)"]),
    "a number": Fault(lambda v: 3.0, [r"shape \(\)", r"\(n, dim\) is needed"]),
    "nothing": Fault(
        lambda v: None,
        ["Python objects", "Give floats or integers"],
        allowed_in=["retrain"],  # which then takes the stored vectors
    ),
    "objects": Fault(lambda v: v.astype(object), ["Python objects", "Give floats or integers"]),
    "text": Fault(lambda v: v.astype(str), ["text", "Give floats or integers"]),
    "bytes": Fault(lambda v: v.astype("S8"), ["bytes", "Give floats or integers"]),
    "complex numbers": Fault(lambda v: v.astype(complex), ["complex", "Give floats or integers"]),
    "booleans": Fault(lambda v: v > 0, ["booleans", r"x\.astype\(np\.float32\)"]),
    "dates": Fault(lambda v: v.astype("M8[s]"), ["dates", "Give floats or integers"]),
    "rows of different lengths": Fault(
        lambda v: [v[0].tolist(), v[1, 1:].tolist()],
        ["row 1 has 23 values", "24 are expected", "All rows need as many"],
    ),
    "a sparse matrix": Fault(scipy.sparse.csr_matrix, ["sparse", r"x\.toarray\(\)"]),
    "masked values": Fault(lambda v: np.ma.masked_greater(v, 0), ["masked", r"x\.filled\(value\)"]),
    "a table without vectors": Fault(lambda v: pa.table({"n": [1, 2]}), ["'n'", "list of numbers"]),
    "no such file": Fault(
        lambda v: "no-such-file.npy",
        ["There is no file", "Give the path"],
        SourceNotFoundError,
        allowed_in=["search", "encode"],  # which take no paths
    ),
}
VECTOR_METHODS = ["train", "add", "upsert", "search", "encode", "retrain"]


def give(index: SemanticIndex, method: str, vectors: Any) -> object:
    """Call a method with vectors; those that need ids get as many as there are rows."""
    if method == "upsert":
        return index.upsert(
            vectors, np.arange(getattr(vectors, "shape", (2,))[0] if hasattr(vectors, "__len__") else 1)
        )
    return getattr(index, method)(vectors)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # negative floats as dates
@pytest.mark.parametrize(
    ("fault", "method"),
    [
        (name, method)
        for name, fault in VECTOR_FAULTS.items()
        for method in VECTOR_METHODS
        if method not in fault.allowed_in
    ],
)
def test_bad_vectors(watched, fault, method, clustered):
    index = watched["untrained" if method == "train" else "filled"].index
    wrong = VECTOR_FAULTS[fault]
    if index.config.metric not in wrong.metrics:
        pytest.skip(f"{fault} is no fault under {index.config.metric}")
    bad = wrong.make(clustered(20, DIM))
    with refused(wrong.error, *wrong.words) as raised:
        give(index, method, bad)
    if r"\b3\b" in wrong.words:
        assert raised.value.rows == (3,)
    if wrong.error is DimensionMismatchError:
        assert (raised.value.expected, raised.value.got) == (24, bad.shape[1])
    for each in watched.values():
        each.assert_as_before()


def test_what_is_a_fault_elsewhere(watched, clustered):
    """Where the table of faults makes an exception, nothing is refused."""
    index = watched["filled"].index
    vectors = clustered(20, DIM)
    assert index.encode(vectors[:0]).shape == (0, index.encode(vectors).shape[1])
    assert index.search(vectors[0], k=2).ids.shape == (2,)
    if index.config.metric != "cosine":
        assert len(index.search(with_zero_row(vectors), k=2)) == 20
        assert len(index.encode(with_zero_row(vectors))) == 20
    watched["filled"].assert_as_before()


def test_too_few_vectors_to_train(watched, clustered):
    index = watched["untrained"].index
    if index.config.quantizer in ("sq8", "sq4"):
        pytest.skip("one vector is enough for scalar quantization")
    with refused(
        InvalidVectorsError, "at least", "16", "n_samples = 15", "Give more vectors or a smaller codebook_size"
    ):
        index.train(clustered(15, DIM))
    with refused(InvalidVectorsError, "16", "n_samples = 15"):
        index.train(clustered(300, DIM), sample=15)
    watched["untrained"].assert_as_before()


def test_pq_needs_a_dimension_that_its_levels_divide(tmp_path, clustered):
    semid.create(tmp_path / "x.duckdb", dim=DIM, quantizer="pq", levels=5, codebook_size=16).close()
    with watching(tmp_path / "x.duckdb", clustered(5, DIM)) as it, refused(InvalidArgumentError, "5", "24"):
        it.index.train(clustered(ROWS, DIM))


def test_float16_has_a_largest_number(tmp_path, clustered):
    vectors = clustered(ROWS, DIM)
    path = tmp_path / "x.duckdb"
    with semid.create(path, dim=DIM, vectors="float16", levels=2, codebook_size=8) as index:
        index.train(vectors)
        index.add(vectors)
    with watching(path, vectors[:5]) as it, refused(InvalidVectorsError, "float16 reaches up to 65,504", r"\b3\b"):
        it.index.add(with_value(65_536)(vectors[:20]))


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_float16_has_a_smallest_direction(clustered, metric):
    """Only cosine looks at the direction alone, however short a vector is."""
    good = clustered(ROWS, DIM)
    good = good / np.abs(good).max(axis=1, keepdims=True) * np.float32(6.2e-5)  # where float16 still has all its bits
    bad = good.copy()
    bad[3] *= np.float32(0.98)
    with semid.create(dim=DIM, metric=metric, vectors="float16", levels=2, codebook_size=8) as index:
        index.train(good)
        if metric == "cosine":
            with refused(InvalidVectorsError, "float16", r"without any value of 6\.1e-05", r"\b3\b"):
                index.add(bad)
        assert len(index.add(bad, on_bad_vectors="drop")) == ROWS - (metric == "cosine")
        assert index.verify().ok
    with semid.create(dim=DIM, metric="cosine", vectors="int8", levels=2, codebook_size=8) as index:
        index.train(bad)
        assert len(index.add(bad)) == ROWS


def test_dropping_bad_vectors_leaves_the_others(index_file, vectors):
    bad = vectors[:50].copy()
    bad[[3, 7], 0] = np.nan, np.inf
    good = np.delete(np.arange(50), [3, 7])
    with semid.open(index_file) as index:
        ids, numbers = np.arange(5_000, 5_050), {"number": np.arange(50)}
        added = index.add(bad, ids, metadata=numbers, on_bad_vectors="drop", batch_size=20)
        assert added.tolist() == (good + 5_000).tolist()
        assert len(index) == 2_048
        kept = index.get(good + 5_000, vectors=True)
        assert kept["number"].to_pylist() == good.tolist()
        np.testing.assert_array_equal(np.stack(kept["vector"].to_numpy(zero_copy_only=False)), bad[good])


def test_dropping_all_vectors_is_an_error(index_file, queries):
    with watching(index_file, queries) as it, refused(InvalidVectorsError, "None of the 4 vectors", "NaN"):
        it.index.add(np.full((4, DIM), np.nan), on_bad_vectors="drop")


# ---------------------------------------------------------------------------------------- arrays that must work

# The values are whole numbers from -128 to 127, which all of these types hold.
ARRAY_KINDS: dict[str, Callable[[NDArray[np.float32]], Any]] = {
    "Fortran order": np.asfortranarray,
    "strided": lambda v: np.repeat(v, 2, axis=0)[::2],
    "columns of a wider array": lambda v: np.concatenate([v, v], axis=1)[:, : v.shape[1]],
    "backwards": lambda v: v[::-1, ::-1].copy()[::-1, ::-1],
    "big-endian": lambda v: v.astype(">f4"),
    "big-endian float64": lambda v: v.astype(">f8"),
    "float16": lambda v: v.astype(np.float16),
    "float64": lambda v: v.astype(np.float64),
    "int8": lambda v: v.astype(np.int8),
    "int64": lambda v: v.astype(np.int64),
    "not aligned": lambda v: np.frombuffer(b"\0" + v.tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(v.shape),
    "writable": lambda v: v.copy(),
    "lists": lambda v: v.tolist(),
    "list of arrays": list,
    "tuples": lambda v: tuple(map(tuple, v.tolist())),
    "array.array": lambda v: [array.array("f", row) for row in v],
    "memoryview": lambda v: memoryview(v.copy()),
    "Arrow lists": lambda v: pa.array(v.tolist(), pa.list_(pa.float32(), v.shape[1])),
    "series of lists": lambda v: pd.Series(v.tolist()),
}


@pytest.fixture(scope="module", params=[*COMBINATIONS[:3], ("cosine", "pq")], ids="-".join)
def plain(request, clustered) -> tuple[dict[str, Any], NDArray[np.float32], dict[str, Any]]:
    """How to make an index, whole-numbered float32 vectors (read-only), and what comes of them."""
    metric, quantizer = request.param
    options = {"dim": DIM, "metric": metric, "quantizer": quantizer, **QUANTIZERS[quantizer]}
    vectors = np.clip(np.rint(3 * clustered(ROWS, DIM)), -128, 127).astype(np.float32)
    vectors.flags.writeable = False
    return options, vectors, everything(options, vectors, vectors[:20])


def everything(options: dict[str, Any], vectors: Any, queries: Any) -> dict[str, Any]:
    """What an index of these vectors finds and keeps."""
    with semid.create(**options) as index:
        index.train(vectors)
        index.add(vectors)
        ids, distances = index.search(queries, k=5)
        return {
            "codes": index.encode(vectors).tolist(),
            "ids": np.stack(ids).tolist(),
            "distances": np.stack(distances).tolist(),
            "stored": index.get([0, 7], vectors=True)["vector"].to_pylist(),
        }


@pytest.mark.parametrize("kind", ARRAY_KINDS)
def test_every_kind_of_array_gives_the_same_hits(plain, kind):
    options, vectors, expected = plain
    before = vectors.tobytes()
    given = ARRAY_KINDS[kind](vectors)
    assert everything(options, given, ARRAY_KINDS[kind](vectors[:20])) == expected
    assert vectors.tobytes() == before


def test_the_hits_that_every_kind_gives_are_the_right_ones(plain):
    options, vectors, expected = plain
    assert len(set(map(tuple, expected["codes"]))) > 20
    assert expected["stored"] == vectors[[0, 7]].tolist()
    if options["metric"] != "ip":  # a vector's nearest is the vector itself
        assert [ids[0] for ids in expected["ids"]] == list(range(20))
        assert np.array(expected["distances"])[:, 0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "kind", [np.asfortranarray, np.float64, np.float16, lambda v: v.astype(">f4"), np.ndarray.tolist]
)
def test_one_query_can_be_any_kind_of_array(index_file, kind):
    query = np.rint(np.linspace(-20, 20, DIM, dtype=np.float32))
    with semid.open(index_file) as index:
        found, expected = index.search(kind(query), k=4), index.search(query, k=4)
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.distances.tolist() == expected.distances.tolist()


# --------------------------------------------------------------------------------------------------------- ids


@pytest.fixture(scope="module")
def filled(trained_file, tmp_path_factory, queries) -> Iterator[Watched]:
    """An open index for faults that change nothing."""
    path = shutil.copy(trained_file, tmp_path_factory.mktemp("filled") / "index.duckdb")
    watched = Watched(Path(path), queries)
    yield watched
    watched.close()


NOT_UNICODE = "\ud800"  # half of a surrogate pair
ID_FAULTS: dict[str, tuple[Any, type[SemidError], list[str]]] = {
    "too few": ([7_001, 7_002], InvalidIdsError, ["2 ids for 3 vectors", "one id for each"]),
    "too many": ([7_001, 7_002, 7_003, 7_004], InvalidIdsError, ["4 ids for 3 vectors", "one id for each"]),
    "none": ([], InvalidIdsError, ["0 ids for 3 vectors", "one id for each"]),
    "one missing": ([7_001, None, 7_003], InvalidIdsError, ["1 ids are missing", "Give every vector an id"]),
    "numbers and strings": ([7_001, "b", 7_003], InvalidIdsError, ["all whole numbers or all strings", "'b'"]),
    "strings": (["a", "b", "c"], InvalidIdsError, ["of type int", "of type str", "first add fixed"]),
    "floats": ([7_001.5, 7_002.5, 7_003.5], InvalidIdsError, ["whole numbers or strings", "double"]),
    "whole floats": (np.array([7_001.0, 7_002, 7_003]), InvalidIdsError, ["whole numbers or strings", "double"]),
    "booleans": ([True, False, True], InvalidIdsError, ["whole numbers or strings", "bool"]),
    "bytes": ([b"a", b"b", b"c"], InvalidIdsError, ["whole numbers or strings", "binary"]),
    "dates": (np.array(["2024-01-01"] * 3, "M8[D]"), InvalidIdsError, ["whole numbers or strings", "date"]),
    "lists": ([[1], [2], [3]], InvalidIdsError, ["whole numbers or strings", "list"]),
    "objects": ([object()] * 3, InvalidIdsError, ["all whole numbers or all strings"]),
    "2-D": (np.array([[7_001], [7_002], [7_003]]), InvalidIdsError, ["one-dimensional", r"\(3, 1\)"]),
    "one string": ("abc", InvalidIdsError, ["list or array", "not one str"]),
    "a number": (7, InvalidIdsError, ["list or array", "not one int"]),
    "a number of NumPy's": (np.int64(7), InvalidIdsError, ["list or array", "not one int64"]),
    "a set, which has no order": ({7_001, 7_002, 7_003}, InvalidIdsError, ["order of the vectors", "set"]),
    "a dict": ({7_001: 0, 7_002: 0, 7_003: 0}, InvalidIdsError, ["order of the vectors", "dict"]),
    "beyond 64 bits": ([2**64, 1, 2], InvalidIdsError, ["whole numbers", "too large"]),
    "beyond 63 bits": (
        np.array([2**63, 1, 2], np.uint64),
        InvalidIdsError,
        ["64 bits with sign", "9223372036854775808"],
    ),
    "half a character": ([NOT_UNICODE, "b", "c"], InvalidIdsError, ["strings", "surrogates"]),
    "one twice": ([7_001, 7_002, 7_001], DuplicateIdError, ["more than once", "7001", "id of its own"]),
    "one in the index": ([7_001, 5, 7_003], DuplicateIdError, ["in the index already", "5", "Leave them out"]),
    "all in the index": ([0, 1, 2], DuplicateIdError, ["in the index already", "0, 1, 2|Leave them out"]),
}


@pytest.mark.parametrize("fault", ID_FAULTS)
def test_bad_ids(filled, fault):
    ids, error, words = ID_FAULTS[fault]
    with refused(error, *words) as raised:
        filled.index.add(filled.queries[:3], ids)
    filled.assert_as_before()
    if fault in ("one twice", "one in the index"):
        assert raised.value.ids == ((7_001,) if fault == "one twice" else (5,))


@pytest.mark.parametrize("fault", [fault for fault in ID_FAULTS if "in the index" not in fault])
def test_bad_ids_for_upsert(filled, fault):
    ids, error, words = ID_FAULTS[fault]
    with refused(error, *words):
        filled.index.upsert(filled.queries[:3], ids)
    filled.assert_as_before()


def test_upsert_needs_ids(filled):
    with refused(InvalidIdsError, "upsert needs", r"ids=\["):
        filled.index.upsert(filled.queries[:3], None)
    filled.assert_as_before()


NO_IDS = ("floats", "whole floats", "booleans", "bytes", "dates", "lists", "objects", "2-D", "one string", "a number")
NO_IDS += ("one missing", "numbers and strings", "a set, which has no order", "a dict", "beyond 64 bits")
NO_IDS += ("beyond 63 bits", "half a character", "a number of NumPy's")


@pytest.mark.parametrize("method", ["delete", "get"])
@pytest.mark.parametrize("fault", NO_IDS)
def test_bad_ids_for_what_takes_ids_alone(filled, method, fault):
    with refused(InvalidIdsError, "[Ii]ds"):
        getattr(filled.index, method)(ID_FAULTS[fault][0])
    filled.assert_as_before()


def test_what_delete_leaves_alone(filled):
    for ids in ([], [99_999, -1], ["a", "b"]):
        assert filled.index.delete(ids) == 0
    assert filled.index.delete(where="number < 0") == 0
    filled.assert_as_before()


def test_bad_ids_for_an_index_with_strings(tmp_path, vectors, queries):
    path = tmp_path / "strings.duckdb"
    with semid.create(path, dim=DIM, levels=3, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors[:3], ["a", "b", "c"])
    with watching(path, queries) as it:
        with refused(InvalidIdsError, "strings", "every vector needs one", r"ids=\["):
            it.index.add(vectors[:2])
        with refused(InvalidIdsError, "of type str", "of type int"):
            it.index.add(vectors[:2], [1, 2])
        with refused(DuplicateIdError, "in the index already", "'b'"):
            it.index.add(vectors[:2], ["d", "b"])
        with refused(DuplicateIdError, "more than once", "'d'"):
            it.index.add(vectors[:2], ["d", "d"])


def test_no_id_is_left_to_be_given(tmp_path, vectors, queries):
    path = tmp_path / "full.duckdb"
    with semid.create(path, dim=DIM, levels=3, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors[:1], [2**63 - 1])
    with watching(path, queries) as it, refused(InvalidIdsError, "above the largest id", "9223372036854775807", "ids="):
        it.index.add(vectors[:2])


# ---------------------------------------------------------------------------------------------------- metadata

METADATA_FAULTS: dict[str, tuple[Any, list[str]]] = {
    "too few rows": ({"number": [1, 2]}, ["2 rows for 3 vectors", "one row for each vector"]),
    "columns of different lengths": ({"number": [1, 2, 3], "word": ["a"]}, ["table", "length"]),
    "a number": (5, ["Arrow table, a data frame or a dict of columns"]),
    "a list": ([1, 2, 3], ["Arrow table, a data frame or a dict of columns"]),
    "a path": ("items.parquet", ["Arrow table, a data frame or a dict of columns"]),
    "objects": ({"what": [object()] * 3}, ["Arrow table, a data frame or a dict of columns"]),
    "numbers beyond 64 bits": ({"what": [2**63 - 1, 2**64, 1]}, ["Arrow table, a data frame or a dict of columns"]),
    "one name twice": ({"what": [1, 2, 3], "What": [1, 2, 3]}, ["same name", "upper from lower case"]),
    "other ids": ({"id": [1, 2, 3]}, ["'id' that differs", "rename"]),
    "no name": ({"": [1, 2, 3]}, ["''", "another name"]),
    "NUL in a name": ({"a\0b": [1, 2, 3]}, [r"'a\\x00b'", "another name"]),
    "text in a column of numbers": ({"number": ["1", "2", "x"]}, ['"number"', "VARCHAR", "BIGINT", "'x'", "Convert"]),
    "fractions in a column of numbers": ({"number": [1.0, 2.5, 3.0]}, ['"number"', "DOUBLE", "'2.5'", "another name"]),
    "lists in a column of numbers": ({"number": [[1], [2], [3]]}, ["BIGINT", "Convert|another type"]),
    "a type unknown to DuckDB": (pa.table({"what": np.ones(3, np.float16)}), ["cannot be stored", "another type"]),
}


@pytest.mark.parametrize("method", ["add", "upsert"])
@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_bad_metadata(filled, fault, method):
    metadata, words = METADATA_FAULTS[fault]
    ids = [7, 7_001, 7_002] if method == "upsert" else [7_000, 7_001, 7_002]
    with refused(InvalidArgumentError, *words):
        getattr(filled.index, method)(filled.queries[:3], ids, metadata=metadata)
    filled.assert_as_before()


# ------------------------------------------------------------------------------------------- arguments of create

CREATE_FAULTS: list[tuple[dict[str, Any], type[SemidError], list[str]]] = [
    *(({"dim": dim}, InvalidArgumentError, ["dim", "1 to 65,536"]) for dim in (0, -1, 1.5, True, "8", None, 65_537)),
    *(({"metric": metric}, InvalidArgumentError, ["l2, cosine, ip"]) for metric in ("euclidean", None, 2)),
    *(({"levels": levels}, InvalidArgumentError, ["levels", "1 to 64"]) for levels in (0, 65, 1.5, True, "4", None)),
    *(({"codebook_size": size}, InvalidArgumentError, ["2 to 65,536"]) for size in (0, 1, -1, 65_537, [16, 16, 1])),
    *(
        ({"codebook_size": size}, InvalidArgumentError, ["codebook_size"])
        for size in (1.5, True, None, "16", [2.5] * 3)
    ),
    ({"codebook_size": [16, 16]}, InvalidArgumentError, ["2 sizes for levels=3", "one for each level"]),
    *(({"seed": seed}, InvalidArgumentError, ["seed", "0 to 2147483583"]) for seed in (-1, 1.5, True, None, 2**31)),
    *(({"vectors": tier}, InvalidArgumentError, ["float32, float16, int8, none"]) for tier in ("float64", None, 8)),
    *(({"tail": tail}, InvalidArgumentError, ["tail", "at least 0"]) for tail in (-1, 1.5, True)),
    ({"tail": 25}, InvalidArgumentError, ["tail", "24 dimensions", "25"]),
    *(({"leaf_size": size}, InvalidArgumentError, ["leaf_size", "at least 1"]) for size in (0, -1, 1.5, True)),
    *(({"device": device}, InvalidArgumentError, ["device", "'cpu', 'auto'"]) for device in ("cuda:x", -1, True, 1.5)),
    ({"device_vectors": "float64"}, InvalidArgumentError, ["device_vectors", "float32, float16, int8"]),
    *(({"iterations": often}, InvalidArgumentError, ["iterations", "from 1 to"]) for often in (0, 1.5, None)),
    ({"iteration": 5}, InvalidArgumentError, ["'rq' has no option 'iteration'", "levels, codebook_size, iterations"]),
    ({"quantizer": "rqq"}, UnknownNameError, ["'rqq'", "balanced-rq, binary", "Did you mean 'rq'?", "semid plugins"]),
    ({"quantizer": "balanced_rq"}, UnknownNameError, ["Did you mean 'balanced-rq'?"]),
    ({"quantizer": "RQ-VAE"}, UnknownNameError, ["'RQ-VAE'", "Installed: ", "semid plugins"]),
    ({"quantizer": "rq-vae"}, UnknownNameError, ["'rq-vae'", "pip install semid-rq-vae"]),
    ({"quantizer": None}, InvalidArgumentError, ["quantizer", "balanced-rq, binary, ", ", pq, ", ", rq, sq4, sq8"]),
    ({"quantizer": ["rq"]}, InvalidArgumentError, ["quantizer", "balanced-rq, binary, ", ", pq, ", ", rq, sq4, sq8"]),
    ({"quantizer": "pq", "codebook_size": 100}, InvalidArgumentError, ["power of two", "100", "use 'rq'"]),
]


@pytest.mark.parametrize(("arguments", "error", "words"), CREATE_FAULTS, ids=[str(fault[0]) for fault in CREATE_FAULTS])
def test_bad_arguments_of_create(index_file, tmp_path, arguments, error, words):
    before, sound = digest(index_file), {"dim": DIM, "levels": 3, "codebook_size": 16}
    with refused(error, *words):
        semid.create(tmp_path / "new.duckdb", **{**sound, **arguments})
    with refused(error, *words):
        semid.create(index_file, overwrite=True, **{**sound, **arguments})
    assert list(tmp_path.iterdir()) == [index_file], "something was left behind"
    assert digest(index_file) == before, "the index that was to be overwritten is gone"


def test_create_writes_over_nothing_unasked(index_file, tmp_path, queries):
    with watching(index_file, queries), refused(IndexExistsError, "exists", "semid_index.open", "overwrite=True"):
        semid.create(index_file, dim=DIM)
    with refused(IndexExistsError, "is a folder", "path of a file"):
        semid.create(tmp_path, dim=DIM, overwrite=True)
    with refused(IndexFileError, "no folder", "Create it first"):
        semid.create(tmp_path / "no" / "such" / "x.duckdb", dim=DIM)


def test_create_overwrites_what_it_is_told_to(index_file, tmp_path):
    (tmp_path / "text.duckdb").write_text("no index")
    (tmp_path / "cut.duckdb").write_bytes(index_file.read_bytes()[:10_000])
    for path in (index_file, tmp_path / "text.duckdb", tmp_path / "cut.duckdb"):
        with semid.create(path, dim=3, overwrite=True) as index:
            assert len(index) == 0
        with semid.open(path) as index:
            assert index.config.dim == 3


# ------------------------------------------------------------------------------------- arguments of the methods

COUNTS: list[Any] = [0, -1, 1.5, True, None, "3"]
ARGUMENT_FAULTS: list[tuple[str, dict[str, Any], type[SemidError], list[str]]] = [
    *(("search", {"k": k}, InvalidArgumentError, ["k must", "at least 1", re.escape(repr(k))]) for k in COUNTS),
    *(("similar", {"k": k}, InvalidArgumentError, ["k must", "at least 1", re.escape(repr(k))]) for k in COUNTS),
    *(("explain", {"k": k}, InvalidArgumentError, ["k must", "at least 1"]) for k in (0, 1.5)),
    *(("search", {"probes": n}, InvalidArgumentError, ["probes", "at least 1"]) for n in (0, -1, 1.5, True)),
    *(("search", {"threads": n}, InvalidArgumentError, ["threads", "at least 1"]) for n in (0, -1, 1.5, True)),
    *(("search", {"rerank": n}, InvalidArgumentError, ["rerank", "at least 1"]) for n in (0, -1, 1.5, True)),
    ("search", {"rerank": 5}, InvalidArgumentError, ["rerank=5", "k=10", "at least k"]),
    *(("search", {"timeout": s}, InvalidArgumentError, ["timeout", "above 0"]) for s in (0, -1, float("nan"), "soon")),
    ("search", {"params": [1]}, InvalidArgumentError, ["where"]),
    ("search", {"where": "nummer = 1"}, FilterError, ["'nummer'", "Did you mean 'number'?"]),
    ("search", {"where": "number = 1; DROP TABLE items"}, FilterError, ["one expression", "';'"]),
    ("search", {"where": "number = ?"}, FilterError, ["[Pp]arameters", r"\b1\b", r"\b0\b"]),
    ("search", {"where": "number = ?", "params": ["x"]}, FilterError, ["does not fit", "'x'", "CAST"]),
    ("search", {"where": "number + word = 3"}, FilterError, ["does not fit", "CAST"]),
    ("search", {"where": "number * 9223372036854775807 > 1"}, FilterError, ["does not fit", "Overflow"]),
    ("similar", {"id": 99_999}, UnknownIdError, ["no item with id 99999"]),
    ("similar", {"id": "a"}, UnknownIdError, ["no item with id 'a'"]),
    *(("similar", {"id": id}, InvalidIdsError, ["whole numbers or strings|missing"]) for id in (None, 1.5, True, [1])),
    *(("get", {"ids": ids}, InvalidIdsError, ["[Ii]ds"]) for ids in (None, 5, "abc", [1.5], [None], [[1]], {1, 2})),
    *(
        ("prefix", {"prefix": text}, InvalidCodesError, ["no prefix", "'12-153'"])
        for text in ("1-x", "-1", "1--2", "1-*-2")
    ),
    *(
        ("prefix", {"prefix": codes}, InvalidCodesError, ["outside 0 to 15"])
        for codes in ("99", (16,), (-1,), "1-2-16")
    ),
    *(("prefix", {"prefix": codes}, InvalidCodesError, ["4 codes", "3 levels"]) for codes in ("1-2-3-4", (1, 2, 3, 4))),
    *(
        ("prefix", {"prefix": what}, InvalidCodesError, ["'12-153'", r"\(12, 153\)"])
        for what in (None, 5, (1.5,), (True,), ("1",), b"1", np.array(5), np.array([1.5]), np.array([[1, 2]]))
    ),
    *(("tree", {"depth": n}, InvalidArgumentError, ["depth", "at least 1"]) for n in (0, -1, 1.5, True, None)),
    ("tree", {"depth": 4}, InvalidArgumentError, ["3 levels", "depth=4", "too deep"]),
    ("tree", {"depth": 3, "under": "1"}, InvalidArgumentError, ["3 levels", "depth=3 below 1", "too deep"]),
    ("tree", {"under": "99"}, InvalidCodesError, ["outside 0 to 15"]),
    ("tree", {"under": 5}, InvalidCodesError, ["'12-153'"]),
    *(("tree", {"examples": n}, InvalidArgumentError, ["examples", "at least 0"]) for n in (-1, 1.5, None)),
    *(("decode", {"codes": codes}, InvalidCodesError, [r"\(n, 3\)"]) for codes in ([[0, 0]], [0, 0, 0], "abc", None)),
    *(
        ("decode", {"codes": codes}, InvalidCodesError, [r"integers of shape \(n, 3\)"])
        for codes in ([[0.0] * 3], [["a"] * 3])
    ),
    *(("decode", {"codes": codes}, InvalidCodesError, [r"\(n, 3\)"]) for codes in ([[0, 0, 0], [1]], [[True] * 3])),
    *(
        ("decode", {"codes": codes}, InvalidCodesError, [r"below", r"\(16, 16, 16\)"])
        for codes in ([[0, 0, 16]], [[0, 0, -1]])
    ),
    *(("add", {"batch_size": n}, InvalidArgumentError, ["batch_size", "at least 1"]) for n in (0, -1, 1.5, True)),
    ("add", {"on_bad_vectors": "skip"}, InvalidArgumentError, ["'error' or 'drop'", "'skip'"]),
    *(("upsert", {"batch_size": n}, InvalidArgumentError, ["batch_size", "at least 1"]) for n in (0, -1, 1.5, True)),
    ("upsert", {"on_bad_vectors": "skip"}, InvalidArgumentError, ["'error' or 'drop'", "'skip'"]),
    ("delete", {}, InvalidArgumentError, ["ids", "where"]),
    ("delete", {"ids": [1], "where": "number = 1"}, InvalidArgumentError, ["ids", "where"]),
    ("delete", {"ids": [1], "params": [1]}, InvalidArgumentError, ["where"]),
    ("delete", {"where": "nummer = 1"}, FilterError, ["'nummer'", "Did you mean 'number'?"]),
    ("delete", {"where": "number = 1; DROP TABLE items"}, FilterError, ["one expression", "';'"]),
    ("delete", {"where": "number = ?"}, FilterError, ["[Pp]arameters", r"\b1\b", r"\b0\b"]),
    ("delete", {"where": "number + word = 3"}, FilterError, ["does not fit", "CAST"]),
    *(("verify", {"sample": n}, InvalidArgumentError, ["sample", "at least"]) for n in (-1, 1.5, True, None, "3")),
]
DEFAULTS: dict[str, dict[str, Any]] = {"similar": {"id": 5}}


@pytest.mark.parametrize(
    ("method", "arguments", "error", "words"),
    ARGUMENT_FAULTS,
    ids=[f"{fault[0]}-{fault[1]}" for fault in ARGUMENT_FAULTS],
)
def test_bad_arguments_of_methods(filled, method, arguments, error, words):
    queries = filled.queries
    vectors = {"search": [queries], "explain": [queries[0]], "add": [queries], "upsert": [queries, range(len(queries))]}
    with refused(error, *words):
        getattr(filled.index, method)(*vectors.get(method, []), **{**DEFAULTS.get(method, {}), **arguments})
    filled.assert_as_before()


@pytest.mark.parametrize("sample", [0, -1, 1.5, True, "x"])
def test_bad_sample(tmp_path, vectors, queries, sample):
    semid.create(tmp_path / "x.duckdb", dim=DIM, levels=3, codebook_size=16).close()
    with watching(tmp_path / "x.duckdb", queries) as it, refused(InvalidArgumentError, "sample", "at least 1"):
        it.index.train(vectors, sample=sample)


@pytest.mark.parametrize("quantizer", ["pq", "sq8", "sq4"])
def test_prefixes_of_codes_that_are_no_hierarchy(tmp_path, vectors, quantizer):
    path = tmp_path / "flat.duckdb"
    with semid.create(path, dim=DIM, quantizer=quantizer, **QUANTIZERS[quantizer]) as index:
        index.train(vectors)
        index.add(vectors[:50])
    with watching(path, vectors[:5]) as it:
        for refuse in (lambda: it.index.prefix("1"), lambda: it.index.tree()):
            with refused(PrefixNotSupportedError, f"'{quantizer}'", "no.* hierarchy|not a hierarchy", "quantizer='rq'"):
                refuse()


# ------------------------------------------------------------------------------------- not trained, closed, read-only

METHODS: dict[str, Callable[[SemanticIndex, NDArray[np.float32]], object]] = {
    "train": lambda index, vectors: index.train(vectors),
    "add": lambda index, vectors: index.add(vectors),
    "upsert": lambda index, vectors: index.upsert(vectors, range(len(vectors))),
    "delete": lambda index, vectors: index.delete([1]),
    "compact": lambda index, vectors: index.compact(),
    "verify": lambda index, vectors: index.verify(),
    "retrain": lambda index, vectors: index.retrain(vectors),
    "save_copy": lambda index, vectors: index.save_copy("no-copy.duckdb"),
    "export": lambda index, vectors: index.export("no-export.parquet"),
    "import_items": lambda index, vectors: index.import_items("no-export.parquet"),
    "report": lambda index, vectors: index.report(),
    "search": lambda index, vectors: index.search(vectors),
    "explain": lambda index, vectors: index.explain(vectors[0]),
    "encode": lambda index, vectors: index.encode(vectors),
    "decode": lambda index, vectors: index.decode([[0, 0, 0]]),
    "prefix": lambda index, vectors: index.prefix("1"),
    "tree": lambda index, vectors: index.tree(),
    "get": lambda index, vectors: index.get([1]),
    "similar": lambda index, vectors: index.similar(1),
    "stats": lambda index, vectors: index.stats(),
    "sql": lambda index, vectors: index.sql("SELECT 1"),
    "len": lambda index, vectors: len(index),
    "in": lambda index, vectors: 1 in index,
}


NEEDS_TRAINING = ["add", "upsert", "delete", "retrain", "export", "report", "search", "explain", "encode", "decode"]
NEEDS_TRAINING += ["prefix", "tree", "get", "similar", "import_items"]


@pytest.mark.parametrize("method", NEEDS_TRAINING)
def test_before_training(watched, queries, method):
    index = watched["untrained"].index
    with refused(NotTrainedError, "not trained", r"Call index\.train\(vectors\)"):
        METHODS[method](index, queries)
    watched["untrained"].assert_as_before()


def test_what_works_before_training(watched):
    index = watched["untrained"].index
    assert len(index) == 0
    assert 1 not in index
    assert index.stats()["trained"] is False
    assert "not trained" in repr(index)


def test_after_training_but_before_adding(tmp_path, vectors):
    with semid.create(tmp_path / "x.duckdb", dim=DIM, levels=3, codebook_size=16) as index:
        index.train(vectors)
        assert [len(ids) for ids in index.search(vectors[:3]).ids] == [0, 0, 0]
        assert (len(index), index.tree(), index.prefix("1").num_rows, index.get([1]).num_rows) == (0, [], 0, 0)
        with refused(UnknownIdError, "no item with id 1"):
            index.similar(1)


def test_training_twice(index_file, vectors, queries):
    with watching(index_file, queries) as it, refused(AlreadyTrainedError, "trained already", "Create a new index"):
        it.index.train(vectors)


def test_after_closing(index_file, queries):
    before = digest(index_file)
    index = semid.open(index_file)
    index.search(queries)
    index.close()
    index.close()
    for method in METHODS.values():
        with refused(IndexClosedError, "closed", "semid_index.open"):
            method(index, queries)
    assert repr(index) == "<SemanticIndex, closed>"
    assert digest(index_file) == before


def test_writing_to_what_is_open_for_reading(index_file, tmp_path, vectors):
    semid.create(tmp_path / "untrained.duckdb", dim=DIM, levels=3, codebook_size=16).close()
    writes = [(index_file, method) for method in ("add", "upsert", "delete", "compact", "retrain", "import_items")]
    for path, method in [*writes, (tmp_path / "untrained.duckdb", "train")]:
        before = digest(path)
        with semid.open(path, read_only=True) as index:
            with refused(ReadOnlyError, "open for reading only", "without read_only=True"):
                METHODS[method](index, vectors)
            if method == "add":
                assert index.search(vectors[7], k=1).ids.tolist() == [7]
        assert digest(path) == before
        assert not wal(path).exists()


# ------------------------------------------------------------------------------------------------------- files


def assert_open_is_refused(path: Path, error: type[SemidError], *words: str) -> None:
    """Both ways to open the file give this error, and leave it and its folder as they are."""
    before = {each.name: digest(each) for each in path.parent.iterdir() if each.is_file()}
    for read_only in (False, True):
        with refused(error, *words, re.escape(path.name)):
            semid.open(path, read_only=read_only)
        assert {each.name: digest(each) for each in path.parent.iterdir() if each.is_file()} == before


def test_opening_what_is_no_index(tmp_path, index_file):
    text, empty, short = tmp_path / "text.duckdb", tmp_path / "empty.duckdb", tmp_path / "short.duckdb"
    text.write_text("These are a few words, and no database.")
    empty.touch()
    short.write_bytes(index_file.read_bytes()[:10])
    for path in (text, empty, short):
        assert_open_is_refused(path, NotAnIndexError, "no DuckDB file", "semid_index.create")
    assert_open_is_refused(tmp_path / "missing.duckdb", IndexNotFoundError, "no file", "semid_index.create")
    (tmp_path / "folder.duckdb").mkdir()
    assert_open_is_refused(tmp_path / "folder.duckdb", NotAnIndexError, "is a folder", "path of the index's file")
    with duckdb.connect(str(tmp_path / "other.duckdb")) as other:
        other.execute("CREATE TABLE items AS SELECT 1 AS id")
    assert_open_is_refused(
        tmp_path / "other.duckdb", NotAnIndexError, "DuckDB database", "semid_meta", "semid_index.create"
    )


@pytest.mark.parametrize("option", [{"device": "cuda:x"}, {"device_vectors": "half"}, {"vectors_in": "cloud"}])
def test_bad_arguments_of_open(index_file, queries, option):
    with watching(index_file, queries), refused(InvalidArgumentError, *option, *option.values(), "Use|must be"):
        semid.open(index_file, **option)


def edited(path: Path, *statements: str) -> Path:
    """The index after somebody ran SQL on it."""
    with duckdb.connect(str(path), config={"storage_compatibility_version": "v1.2.0"}) as connection:
        for statement in statements:
            connection.execute(statement)
    return path


def test_a_newer_format(index_file):
    newest = tables.FORMAT_VERSION
    edited(index_file, f"UPDATE semid_meta SET value = '{newest + 1}' WHERE key = 'format_version'")
    before = digest(index_file)
    for read_only in (False, True):
        with refused(NewerFormatError, f"format {newest + 1}", f"up to {newest}", "pip install --upgrade semid-index"):
            semid.open(index_file, read_only=read_only)
    assert digest(index_file) == before


DAMAGE = {
    "no format": "DELETE FROM semid_meta WHERE key = 'format_version'",
    "format 0": "UPDATE semid_meta SET value = '0' WHERE key = 'format_version'",
    "a format that is no number": "UPDATE semid_meta SET value = 'true' WHERE key = 'format_version'",
    "settings that are no JSON": "UPDATE semid_meta SET value = '{' WHERE key = 'config'",
    "no configuration": "DELETE FROM semid_meta WHERE key = 'config'",
    "a configuration without fields": "UPDATE semid_meta SET value = '{}' WHERE key = 'config'",
    "no codebooks": "DROP TABLE semid_codebook",
    "a codebook missing": "DELETE FROM semid_codebook WHERE level = 2",
    "a codeword missing": "DELETE FROM semid_codebook WHERE level = 2 AND code = 3",
    "no arrays": "DROP TABLE semid_array",
    "half of an array": "UPDATE semid_array SET data = data[1:100]",
    "an array of an unknown type": "UPDATE semid_array SET dtype = 'object'",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_contradicts_itself(index_file, damage):
    assert_open_is_refused(
        edited(index_file, DAMAGE[damage]), CorruptIndexError, "Restore it from a copy, or build it again"
    )


LOST = {
    "a vector missing": "DELETE FROM semid_vectors WHERE row = 7",
    "a code missing": "DELETE FROM semid_codes WHERE row = 7",
    "a row number out of range": "UPDATE semid_vectors SET row = 1000000 WHERE row = 7",
    "one vector twice and another missing": "UPDATE semid_vectors SET row = 8 WHERE row = 7",
}


@pytest.mark.parametrize("damage", LOST)
def test_vectors_and_codes_that_do_not_belong_together(index_file, queries, damage):
    with semid.open(edited(index_file, LOST[damage])) as index, refused(CorruptIndexError, "build it again"):
        index.search(queries)


def found(path: Path, queries: NDArray[np.float32]) -> list[Any]:
    """What reading the whole index gives."""
    with semid.open(path) as index:
        hits = index.search(queries, k=5, where="number >= 0 AND word <> ''")
        return [np.stack(hits.ids).tolist(), index.tree(), index.get(range(2_000), vectors=True).to_pydict()]


@pytest.mark.parametrize("share", [12, 100, 4_096, 8_192, 12_288, 12_289, 0.5, -262_144, -4_096, -1])
def test_a_file_that_was_cut_off(index_file, queries, share):
    whole = index_file.read_bytes()
    kept = whole[: len(whole) // 2 if share == 0.5 else share]
    index_file.write_bytes(kept)
    with refused(CorruptIndexError, "ends too early", "Restore it from a copy, or build it again"):
        found(index_file, queries)
    assert index_file.read_bytes() == kept
    assert not wal(index_file).exists()


def test_no_flipped_bit_goes_unnoticed(index_file, vectors, queries):
    """Wherever a byte is changed, the index is refused, or finds exactly what it did (the byte was not in use)."""
    whole = index_file.read_bytes()
    expected = found(index_file, queries)
    refusals = 0
    for position in [0, 12, 4_100, 8_200, *range(13_000, len(whole), 131_072)]:
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        index_file.write_bytes(damaged)
        try:
            assert found(index_file, queries) == expected
        except CorruptIndexError:
            refusals += 1
        assert index_file.read_bytes() == bytes(damaged)
    assert refusals > 10


# ------------------------------------------------------------------------------- other processes, other users

HOLD = """
import sys
import semid_index as semid
with semid.open(sys.argv[1], read_only=sys.argv[2] == "True") as index:
    print(index.search([1.0] * 24, k=1).ids[0], flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(start_python: Callable[..., Any], path: Path, *, read_only: bool) -> Iterator[int]:
    """Another process has the index open; gives its number."""
    process = start_python(HOLD, path, read_only)
    try:
        assert process.stdout.readline().strip().isdigit(), process.stderr.read()
        yield process.pid
    finally:
        process.communicate()
        assert process.returncode == 0


def test_a_second_process_holds_the_file(index_file, start_python, queries):
    before = digest(index_file)
    with held(start_python, index_file, read_only=False) as pid:
        for read_only in (False, True):
            with refused(IndexLockedError, "another process", rf"process {pid}\)", "Close it there", "read_only=True"):
                semid.open(index_file, read_only=read_only)
        with refused(IndexLockedError, "another process", rf"process {pid}\)"):
            semid.create(index_file, dim=3, overwrite=True)
    assert digest(index_file) == before
    with watching(index_file, queries):
        pass


def test_several_processes_may_read(index_file, start_python, vectors):
    before = digest(index_file)
    with held(start_python, index_file, read_only=True) as pid:
        with semid.open(index_file, read_only=True) as index:
            assert index.search(vectors[7], k=1).ids.tolist() == [7]
        with refused(IndexLockedError, rf"process {pid}\)", "read_only=True in every process"):
            semid.open(index_file)
        with refused(IndexLockedError, rf"process {pid}\)"):
            semid.create(index_file, dim=3, overwrite=True)
    assert digest(index_file) == before


def test_open_in_this_process_already(index_file, queries):
    for first in (False, True):
        with semid.open(index_file, read_only=first) as index:
            with refused(IndexLockedError, "open in this process", "Close it there", "same read_only"):
                semid.open(index_file, read_only=not first)
            with refused(IndexLockedError, "open in this process", "Close it there"):
                semid.create(index_file, dim=3, overwrite=True)
            assert len(index) == 2_000
    with watching(index_file, queries):
        pass


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can read, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


AS_ANOTHER_USER = """
import json, os, sys
import numpy as np
import semid_index as semid

vectors = np.random.default_rng(0).standard_normal((300, 24), dtype=np.float32)
with semid.create(dim=24, levels=2, codebook_size=8) as index:  # imports what others may not read
    index.train(vectors)
    index.add(vectors, metadata={"number": range(300)})
    index.search(vectors, where="number > 3")
    index.tree()
if os.geteuid() == 0:
    try:
        os.setgid(65534)
        os.setuid(65534)
    except PermissionError:
        sys.exit(print("null"))
os.chdir(sys.argv[1])

def add():
    with semid.open("writable.duckdb") as index:
        try:
            index.add(vectors)
        finally:
            assert len(index) == 2000

def read():
    with semid.open("protected.duckdb", read_only=True) as index:
        index.search(vectors[0])

outcomes = {}
for name, attempt in {
    "open": lambda: semid.open("protected.duckdb"),
    "read": read,
    "open secret": lambda: semid.open("secret.duckdb"),
    "read secret": lambda: semid.open("secret.duckdb", read_only=True),
    "add": add,
    "create": lambda: semid.create("new.duckdb", dim=3),
    "overwrite": lambda: semid.create("writable.duckdb", dim=3, overwrite=True),
}.items():
    try:
        attempt()
        outcomes[name] = ["none", ""]
    except Exception as error:
        outcomes[name] = [type(error).__name__, str(error)]
print(json.dumps(outcomes))
"""


def test_without_permission(public_folder, trained_file, run_python, queries):
    """Of the file (protected, secret), or only of the folder, in which DuckDB has to write its log."""
    for name, mode in {"protected": 0o444, "secret": 0o000, "writable": 0o666}.items():
        shutil.copy(trained_file, public_folder / f"{name}.duckdb")
        (public_folder / f"{name}.duckdb").chmod(mode)
    public_folder.chmod(0o555)
    outcomes = json.loads(run_python(AS_ANOTHER_USER, public_folder))
    public_folder.chmod(0o755)
    if outcomes is None:
        pytest.skip("this user can write everywhere, and cannot become another one")
    cannot = r"cannot be written\. Open it with read_only=True, or change the permissions of the file and its folder"
    expected = {
        "open": ["ReadOnlyError", cannot],
        "read": ["none", ""],
        "open secret": ["IndexFileError", "cannot be read: Permission denied. Change its permissions"],
        "read secret": ["IndexFileError", "cannot be read: Permission denied. Change its permissions"],
        "add": ["ReadOnlyError", cannot],
        "create": ["ReadOnlyError", cannot],
        "overwrite": ["ReadOnlyError", "cannot be removed: Permission denied. Change the permissions of its folder"],
    }
    for attempt, (error, words) in expected.items():
        assert outcomes[attempt][0] == error, outcomes[attempt]
        assert re.search(words, outcomes[attempt][1]), outcomes[attempt]
    assert sorted(path.stem for path in public_folder.iterdir()) == ["protected", "secret", "writable"]
    for path in public_folder.iterdir():
        path.chmod(0o600)
        assert digest(path) == digest(trained_file)


ON_A_FULL_DISK = """
import resource, sys
import numpy as np
import semid_index as semid
from semid_index.errors import StorageError

index = semid.open(sys.argv[1])
vectors = np.random.default_rng(0).standard_normal((2000, 24), dtype=np.float32)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # no file may grow beyond 50 kB
for _ in range(2):
    try:
        index.add(vectors)
    except StorageError as error:
        assert "as it was before" in str(error) and "Make room" in str(error), error
    else:
        raise SystemExit("the disk was to be full")
    assert len(index) == 2000 and index.search(vectors[0], k=1).ids.shape == (1,)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert index.add(vectors[:2]).tolist() == [2000, 2001]
index.close()
"""


def test_a_full_disk(index_file, run_python, vectors):
    pytest.importorskip("resource", reason="only Unix limits the size of files")
    run_python(ON_A_FULL_DISK, index_file)
    with semid.open(index_file) as index:
        assert len(index) == 2_002
        assert index.search(vectors[7], k=1).ids.tolist() == [7]
