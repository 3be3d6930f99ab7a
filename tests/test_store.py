"""What is in the file: all of a write or nothing; ids and values as given; codes as plain Python packs them."""

from __future__ import annotations

import datetime
import json
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid_index as semid
from semid_index.appending import ItemBatch
from semid_index.codes import CodeLayout, pack, pack_rest, unpack
from semid_index.errors import IndexClosedError, InvalidArgumentError
from semid_index.index import SemanticIndex
from semid_index.records import IndexConfig, Uniqueness
from semid_index.store import Store

OPTIONS: dict[str, Any] = {"dim": 24, "levels": 3, "codebook_size": 16}
OTHER_DUCKDB = Path(__file__).resolve().parent.parent / ".duckdb-1.5"


def contents(index: SemanticIndex) -> dict[str, Any]:
    """Every table, with the types of its columns and its rows in order, and the view."""
    names = [name for (name,) in index.sql("SELECT table_name FROM duckdb_tables() WHERE NOT internal").fetchall()]
    tables = {name: index.sql(f'FROM "{name}"') for name in sorted(names)}
    return {
        name: (list(map(str, rows.types)), rows.columns, sorted(rows.fetchall(), key=repr))
        for name, rows in tables.items()
    }


@pytest.fixture
def index(index_file):
    with semid.open(index_file) as opened:
        yield opened


# ---------------------------------------------------------------------------------------------- all or nothing


class Interrupted(Exception):  # noqa: N818, it stands for whatever a callback may raise
    pass


def fail_at(call: int, error: type[BaseException] = Interrupted) -> Callable[[int, int, str], None]:
    """A progress callback that raises when it is called for the nth time."""
    calls = iter(range(1, call + 1))

    def progress(done: int, total: int, what: str) -> None:
        if next(calls) == call:
            raise error

    return progress


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (Interrupted, {"progress": fail_at(2)}),
        (KeyboardInterrupt, {"progress": fail_at(4, KeyboardInterrupt)}),
        (Interrupted, {"progress": fail_at(3), "metadata": {"new column": range(100)}}),
        (InvalidArgumentError, {"metadata": {"number": [*map(str, range(99)), "x"]}}),
        (InvalidArgumentError, {"metadata": {"new column": range(100), "number": [*map(str, range(99)), "x"]}}),
    ],
    ids=["second batch", "last batch", "with a new column", "metadata of the last row", "metadata and a new column"],
)
def test_an_add_that_fails_half_way_leaves_nothing(index_file, vectors, error, options):
    with semid.open(index_file) as index:
        before, hits = contents(index), index.search(vectors[:5]).ids
        with pytest.raises(error):
            index.add(vectors[:100], batch_size=25, **options)
        assert contents(index) == before
        assert len(index) == 2_000
        assert 2_000 not in index
        assert all(np.array_equal(*pair) for pair in zip(index.search(vectors[:5]).ids, hits, strict=True))
    with semid.open(index_file) as index:
        assert contents(index) == before
        assert index.add(vectors[:2]).tolist() == [2_000, 2_001], "the ids go on where they were"
        assert contents(index) != before


def test_a_first_add_that_fails_does_not_fix_the_type_of_ids(tmp_path, vectors):
    with semid.create(tmp_path / "x.duckdb", **OPTIONS) as index:
        index.train(vectors)
        before = contents(index)
        with pytest.raises(Interrupted):
            index.add(vectors[:9], list("abcdefghi"), batch_size=4, progress=fail_at(2))
        assert contents(index) == before
        assert index.add(vectors[:2], [7, 8]).tolist() == [7, 8]


def test_training_that_fails_leaves_an_untrained_index(tmp_path, vectors):
    with semid.create(tmp_path / "x.duckdb", **OPTIONS) as index:
        before = contents(index)
        with pytest.raises(Interrupted):
            index.train(vectors, progress=fail_at(3))
        assert contents(index) == before
        index.train(vectors)
        index.add(vectors)
        assert index.search(vectors[7], k=1).ids.tolist() == [7]


KILLED_WHILE_ADDING = """
import os, signal, sys
import numpy as np
import semid_index as semid

def die(done, total, what):
    if done >= 1000:
        os.kill(os.getpid(), signal.SIGKILL)

with semid.open(sys.argv[1]) as index:
    vectors = np.random.default_rng(0).standard_normal((2000, 24), dtype=np.float32)
    index.add(vectors[:10])
    index.add(vectors, metadata={"new column": range(2000)}, batch_size=500, progress=die)
"""


def test_a_process_that_is_killed_leaves_what_it_had_finished(index_file, start_python, vectors):
    process = start_python(KILLED_WHILE_ADDING, index_file)
    _, errors = process.communicate()
    assert process.returncode == -9, errors
    with semid.open(index_file) as index:
        assert len(index) == 2_010
        assert index.sql("SELECT count(*), count(DISTINCT row) FROM semid_vectors").fetchall() == [(2_010, 2_010)]
        assert index.get([2_009]).column_names == ["id", "semantic_id", "number", "word"]
        assert index.search(vectors[7], k=1).ids.tolist() == [7]


def test_threads_that_add_and_search_at_once(index, vectors):
    added: list[int] = []
    wrong: list[object] = []

    def write() -> None:
        for start in range(0, 100, 20):
            added.extend(index.add(vectors[start : start + 20]).tolist())

    def read() -> None:
        for row in range(30):
            ids, distances = index.search(vectors[row], k=1)
            if distances[0] > 1e-3 or (ids[0] != row and ids[0] < 2_000):
                wrong.append((row, ids, distances))

    threads = [threading.Thread(target=target) for target in (write, read, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(added) == list(range(2_000, 2_200))
    assert len(index) == 2_200


# ----------------------------------------------------------------------------------------------- rows and their order


def test_rows_are_sorted_by_sid_however_they_came(tmp_path, vectors):
    with semid.create(tmp_path / "x.duckdb", **OPTIONS) as index:
        index.train(vectors)
        index.add(vectors, batch_size=300)
    with semid.open(tmp_path / "x.duckdb") as index:
        stored = index.sql("SELECT sid, row FROM semid_codes ORDER BY rowid").fetchall()  # as they lie in the file
        assert stored == sorted(stored)
        assert len({sid for sid, _ in stored}) > 500
        codes = unpack(np.array([sid for sid, _ in stored]), CodeLayout((16, 16, 16)))
        assert np.array_equal(codes, index.encode(vectors)[[row for _, row in stored]])


def test_dup_rank_numbers_the_items_of_an_id_in_the_order_they_came(tmp_path, vectors):
    with semid.create(tmp_path / "x.duckdb", **OPTIONS) as index:
        index.train(vectors)
        order: list[int] = []
        for rows in ([0, 1, 0, 0, 2], [1, 1], [5], [0, 2, 5, 0], list(range(300))):
            index.add(vectors[rows], batch_size=3)
            order += rows
        codes = [tuple(row) for row in index.encode(vectors[order]).tolist()]
        seen: Counter[tuple[int, ...]] = Counter()
        expected = []
        for item in codes:
            expected.append(seen[item])
            seen[item] += 1
        found = index.sql("SELECT dup_rank FROM semantic_ids ORDER BY id").fetchall()
        assert [rank for (rank,) in found] == expected
        assert max(expected) >= 5
        assert index.stats()["items_sharing_an_id"] == sum(n for n in seen.values() if n > 1)


# --------------------------------------------------------------------------------------------------------- ids

INT_IDS = {
    "list": [7, -5, 0, 2**63 - 1, -(2**63)],
    "int8": np.array([7, -5, 0, 127, -128], np.int8),
    "uint32": np.array([7, 5, 0, 2**32 - 1, 1], np.uint32),
    "big-endian": np.array([7, -5, 0, 2**40, 1], ">i8"),
    "strided": np.arange(10)[::-2],
    "Arrow": pa.array([7, -5, 0, 2**40, 1], pa.int64()),
    "Arrow chunks": pa.chunked_array([[7, -5], [0, 2**40, 1]]),
    "pandas": pd.Series([7, -5, 0, 2**40, 1], index=[9, 8, 7, 6, 5]),
    "range": range(100, 105),
    "generator": lambda: (n * n for n in range(5)),
}
STRING_IDS = [
    *(
        "plain",
        "",
        " ",
        "it's",
        'say "hi"',
        "a\0b",
        "\0",
        "a\0",
        "\n\t\\",
        "-- ; DROP TABLE items",
        "%_",
        "NULL",
        "12-*",
    ),
    *("\u00e9", "e\u0301", "\u202eright to left", "\U0001f600\U0001f469\u200d\U0001f52c", "\uffff", "\U0010ffff"),
    "x" * 100_000,
]


@pytest.mark.parametrize("kind", INT_IDS)
def test_whole_numbers_as_ids(tmp_path, vectors, kind):
    given = INT_IDS[kind]
    ids = list(given() if callable(given) else given)
    ids = [int(id.as_py() if isinstance(id, pa.Scalar) else id) for id in ids]
    with semid.create(tmp_path / "x.duckdb", **OPTIONS) as index:
        index.train(vectors)
        assert index.add(vectors[:5], given() if callable(given) else given).tolist() == ids
    with semid.open(tmp_path / "x.duckdb") as index:
        assert index.get(ids)["id"].to_pylist() == ids
        assert [index.search(vector, k=1).ids.tolist() for vector in vectors[:5]] == [[id] for id in ids]
        assert all(id in index for id in ids)
        assert 77 not in index
        assert "7" not in index


def test_any_text_as_an_id(tmp_path, vectors):
    count = len(STRING_IDS)
    with semid.create(tmp_path / "x.duckdb", **OPTIONS) as index:
        index.train(vectors)
        assert index.add(vectors[:count], STRING_IDS) == STRING_IDS
    with semid.open(tmp_path / "x.duckdb") as index:
        assert index.get(STRING_IDS)["id"].to_pylist() == STRING_IDS
        assert [index.search(vector, k=1).ids.tolist() for vector in vectors[:count]] == [[id] for id in STRING_IDS]
        assert sorted(index.prefix("")["id"].to_pylist()) == sorted(STRING_IDS)
        assert all(id in index for id in STRING_IDS)
        assert "e" not in index
        assert 7 not in index
        for row, id in enumerate(STRING_IDS):
            others = np.delete(np.arange(count), row)
            nearest = others[np.linalg.norm(vectors[others] - vectors[row], axis=1).argmin()]
            assert index.similar(id, k=1).ids.tolist() == [STRING_IDS[nearest]]
            assert index.search(vectors[0], where="id = ?", params=[id]).ids.tolist() == [id]


def test_numpy_and_arrow_text_as_ids(tmp_path, vectors):
    with semid.create(tmp_path / "x.duckdb", **OPTIONS) as index:
        index.train(vectors)
        given: list[Any] = [
            np.array(["a", "bcd"]),
            np.array(["e", "f"], dtype=object),
            pa.array(["g", "h"], pa.large_string()),
            pa.array(["i", "j"]).dictionary_encode(),
            pd.Series(["k", "l"]),
            pd.Categorical(["m", "n"]),
            iter(["o", "p"]),
        ]
        added = [index.add(vectors[:2], ids) for ids in given]
        assert added == [["a", "bcd"], *map(list, ("ef", "gh", "ij", "kl", "mn", "op"))]


def test_ids_that_are_not_given_are_numbered_from_the_largest_on(tmp_path, vectors):
    with semid.create(tmp_path / "x.duckdb", **OPTIONS) as index:
        index.train(vectors)
        assert index.add(vectors[:2]).tolist() == [0, 1]
        assert index.add(vectors[:1], [70]).tolist() == [70]
        assert index.add(vectors[:2]).tolist() == [71, 72]


def test_ids_of_ones_own_below_zero_leave_the_others_from_zero(vectors):
    with semid.create(dim=24, levels=2, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors[:2], [-100, -50])
        assert index.add(vectors[:2]).tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------- metadata

WHEN = datetime.datetime(2024, 2, 29, 23, 59, 59, 123456)
METADATA: dict[str, tuple[pa.Array, str]] = {
    "boolean": (pa.array([True, None, False]), "BOOLEAN"),
    "int8": (pa.array([-128, None, 127], pa.int8()), "TINYINT"),
    "uint64": (pa.array([0, None, 2**64 - 1], pa.uint64()), "UBIGINT"),
    "float": (pa.array([1.5, None, -np.inf], pa.float32()), "FLOAT"),
    "double": (pa.array([0.1, None, 1e300]), "DOUBLE"),
    "decimal": (pa.array([Decimal("1.25"), None, Decimal("-3.10")]), "DECIMAL(3,2)"),
    "text": (pa.array(["", None, "a\0\U0001f600"]), "VARCHAR"),
    "large text": (pa.array(["a", None, "b"], pa.large_string()), "VARCHAR"),
    "text view": (pa.array(["a", None, "b" * 100], pa.string_view()), "VARCHAR"),
    "categories": (pa.array(["a", None, "b"]).dictionary_encode(), "VARCHAR"),
    "bytes": (pa.array([b"", None, b"\0\xff"]), "BLOB"),
    "date": (pa.array([datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31)]), "DATE"),
    "time": (pa.array([datetime.time(0), None, datetime.time(23, 59, 59, 999999)]), "TIME"),
    "timestamp": (pa.array([WHEN, None, datetime.datetime(1, 1, 1)]), "TIMESTAMP"),
    "timestamp in s": (pa.array([0, None, -1], pa.timestamp("s")), "TIMESTAMP_S"),
    "timestamp in ns": (pa.array([0, None, 123456789], pa.timestamp("ns")), "TIMESTAMP_NS"),
    "timestamp with zone": (pa.array([0, None, 10**15], pa.timestamp("us", "UTC")), "TIMESTAMP WITH TIME ZONE"),
    "list": (pa.array([[1, None], None, []]), "BIGINT[]"),
    "large list": (pa.array([["a"], None, []], pa.large_list(pa.string())), "VARCHAR[]"),
    "fixed-size list": (pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)), "INTEGER[2]"),
    "struct": (pa.array([{"a": 1, "b": None}, None, {"a": None, "b": "x"}]), "STRUCT(a BIGINT, b VARCHAR)"),
    "nested": (pa.array([[[{"a": 1, "b": ["x", None]}]], None, [[]]]), "STRUCT(a BIGINT, b VARCHAR[])[][]"),
    "map": (pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())), "MAP(VARCHAR, BIGINT)"),
    "nothing": (pa.nulls(3), "VARCHAR"),
}


def test_metadata_of_many_types_comes_back_as_it_went_in(index_file, vectors):
    table = pa.table({name: values for name, (values, _) in METADATA.items()})
    with semid.open(index_file) as index:
        ids = index.add(vectors[:3], metadata=table, batch_size=2)
    with semid.open(index_file) as index:
        found = index.get(ids)
        types = dict(index.sql("SELECT column_name, column_type FROM (DESCRIBE items)").fetchall())
        old = index.get([5]).to_pylist()[0]
    for name, (values, sql_type) in METADATA.items():
        assert found[name].to_pylist() == values.to_pylist(), name
        assert types[name] == sql_type
        assert old[name] is None, "items that were there before have nothing in a new column"
    assert found["number"].to_pylist() == [None] * 3
    assert (old["number"], old["word"]) == (5, "word 5")


def test_metadata_of_any_container(index, vectors):
    for metadata in (
        {"number": [10_000]},
        {"number": np.array([10_000])},
        pa.table({"number": [10_000]}),
        pa.record_batch({"number": [10_000]}),
        pa.table({"number": pa.chunked_array([[], [10_000]], pa.int64())}),
        pd.DataFrame({"number": [10_000]}, index=[77]),
        pd.DataFrame({"number": [9_999, 10_000]}).query("number > 9999"),
        pd.DataFrame({"number": [10_000]}, index=pd.MultiIndex.from_tuples([(7, 8)])),
    ):
        id = int(index.add(vectors[:1], metadata=metadata)[0])
        assert index.get([id]).drop_columns("semantic_id").to_pylist() == [{"id": id, "number": 10_000, "word": None}]


def test_the_index_of_a_data_frame_is_a_column_if_it_has_a_name(index, vectors):
    frame = pd.DataFrame({"number": [1, 2]}, index=pd.Index(["x", "y"], name="word"))
    index.add(vectors[:2], metadata=frame)
    assert index.get([2_000, 2_001])["word"].to_pylist() == ["x", "y"]
    with pytest.raises(InvalidArgumentError, match="'id' that differs"):
        index.add(vectors[:2], metadata=frame.rename_axis("id"))


def test_a_column_takes_other_types_if_nothing_is_lost(index, vectors):
    index.add(vectors[:2], metadata={"number": ["10000", "-3"], "word": [1.5, None], "later": [None, None]})
    index.add(vectors[:2], metadata={"number": pa.array([1, 2], pa.uint8()), "word": ["a", "b"], "later": [[1], [2]]})
    index.add(vectors[:1], metadata={"number": [4.0], "later": [None]})
    assert index.get(range(2_000, 2_005)).drop_columns("semantic_id").to_pydict() == {
        "id": [2_000, 2_001, 2_002, 2_003, 2_004],
        "number": [10_000, -3, 1, 2, 4],
        "word": ["1.5", None, "a", "b", None],
        "later": [None, None, [1], [2], None],
    }


@pytest.mark.parametrize("method", ["add", "upsert"])
@pytest.mark.parametrize(
    ("batches", "sql_type"),
    [
        ([[[], [None]], [["x"], ["y"]], [[], []]], "VARCHAR[]"),
        ([[[], [None]], [None, None], [[1], [2]], [[], None]], "BIGINT[]"),
        ([[None, None], [[], []], [[1], [2]]], "BIGINT[]"),
        ([[[[]], []], [[[1.5], []], []]], "DOUBLE[][]"),
        ([[[], []], [[[1]], []]], "BIGINT[][]"),
        (
            [[{"a": None, "b": 1}] * 2, [{"a": "x", "b": 2}] * 2, [{"a": None, "b": 3}] * 2],
            "STRUCT(a VARCHAR, b BIGINT)",
        ),
        ([[{"a": 1, "b": []}] * 2, [{"a": 2, "b": ["x"]}] * 2], "STRUCT(a BIGINT, b VARCHAR[])"),
    ],
    ids=repr,
)
def test_lists_and_structs_may_begin_empty(index, vectors, method, batches, sql_type):
    for n, values in enumerate(batches):
        getattr(index, method)(vectors[:2], [5_000 + 2 * n, 5_001 + 2 * n], metadata={"later": values})
    types = dict(index.sql("SELECT column_name, column_type FROM (DESCRIBE items)").fetchall())
    assert types["later"] == sql_type
    kept = index.get(range(5_000, 5_000 + 2 * len(batches)))["later"].to_pylist()
    assert kept == [value for values in batches for value in values]


@pytest.mark.parametrize(
    ("given", "wrong"),
    [(["x", "y"], "x"), ([1, 2], "1"), ([{"a": 1}, {"a": 2}], "a")],
    ids=["text", "numbers", "structs"],
)
def test_empty_lists_stay_lists(index, vectors, given, wrong):
    index.add(vectors[:2], metadata={"later": [[], []]})
    with pytest.raises(InvalidArgumentError, match=wrong):
        index.add(vectors[:2], metadata={"later": given})


def test_maps_and_fixed_size_lists_may_begin_empty(index, vectors):
    maps = pa.array([[], None], pa.map_(pa.string(), pa.null())), pa.array([[("k", "v")], []], pa.map_("str", "str"))
    pairs = pa.nulls(2, pa.list_(pa.null(), 2)), pa.array([[1, 2], None], pa.list_(pa.int32(), 2))
    for n in (0, 1, 0):
        index.add(vectors[:2], metadata={"map": maps[n], "pair": pairs[n]})
    kept = index.get(range(2_000, 2_006))
    assert kept["map"].to_pylist() == [[], None, [("k", "v")], [], [], None]
    assert kept["pair"].to_pylist() == [None, None, [1, 2], None, None, None]


OUR_NAMES = [
    "sid",
    "sid_rest",
    "row",
    "bucket",
    "dup_rank",
    "norm2",
    "c1",
    "p1",
    "v",
    "position",
    "batch",
    "wanted",
    "semid_codes",
]
STRANGE_NAMES = [
    "select",
    'a "quoted" one',
    "it's",
    "-- ;",
    "\u00e4\U0001f600",
    " ",
    "a.b",
    "x" * 1_000,
    "ID2",
    "items",
]


def test_metadata_columns_may_have_any_name(index_file, vectors):
    names = [*OUR_NAMES, *STRANGE_NAMES]
    with semid.open(index_file) as index:
        ids = index.add(vectors[:3], metadata={name: [f"{name} {n}" for n in range(3)] for name in names})
    with semid.open(index_file) as index:
        found = index.get(ids, vectors=True)
        below = index.prefix("")
        for name in names:
            expected = [f"{name} {n}" for n in range(3)]
            assert found[name].to_pylist() == expected
            assert dict(zip(below["id"].to_pylist(), below[name].to_pylist(), strict=True))[2_001] == expected[1]
            hits = index.search(vectors[0], where={name: expected[1]})
            assert hits.ids.tolist() == [2_001], "in a filter, a column of the user's goes before one of ours"
        codes = index.encode(vectors[:1])[0]
        hits = index.search(vectors[0], k=2_003, where='c2 = ? AND "row" IS NULL', params=[int(codes[1])])
        assert set(hits.ids.tolist()) == set(np.flatnonzero(index.encode(vectors)[:, 1] == codes[1]).tolist())


def test_only_a_to_z_are_the_same_in_upper_and_lower_case(index, vectors, tmp_path):
    """As in DuckDB."""
    index.add(vectors[:2], metadata={"GR\u00d6SSE": [1, 2], "Price": [3, 4]})
    index.add(vectors[:2], metadata={"gr\u00f6sse": [5, 6], "PRICE": [7, 8]})
    index.add(vectors[:1], metadata={"\u00e4": [9], "\u00c4": [10], "\u212a": [11], "k": [12]})
    kept = index.get([2_000, 2_002, 2_004]).drop_columns(["semantic_id", "number", "word"])
    assert [{name: value for name, value in row.items() if value is not None} for row in kept.to_pylist()] == [
        {"id": 2_000, "GR\u00d6SSE": 1, "Price": 3},
        {"id": 2_002, "gr\u00f6sse": 5, "Price": 7},
        {"id": 2_004, "\u00e4": 9, "\u00c4": 10, "\u212a": 11, "k": 12},
    ]
    assert index.search(vectors[0], where={"gr\u00f6sse": 5}).ids.tolist() == [2_002]
    assert index.search(vectors[0], where={"\u00c4": 10}).ids.tolist() == [2_004]
    index.export(tmp_path / "ids.parquet", metadata=["\u00e4", "\u00c4", "Price"])
    assert pq.read_schema(tmp_path / "ids.parquet").names[-3:] == ["\u00e4", "\u00c4", "Price"]


def test_what_get_adds_goes_before_metadata_of_the_same_name(index, vectors):
    index.add(vectors[:1], metadata={"semantic_id": ["mine"], "vector": ["mine"]})
    plain, whole = index.get([2_000]).to_pylist()[0], index.get([2_000], vectors=True).to_pylist()[0]
    codes = "-".join(map(str, index.encode(vectors[:1])[0]))
    assert (plain["semantic_id"], plain["vector"]) == (codes, "mine")
    assert (whole["semantic_id"], whole["vector"]) == (codes, vectors[0].tolist())
    assert index.sql("SELECT semantic_id, vector FROM items WHERE id = 2000").fetchall() == [("mine", "mine")]


# ------------------------------------------------------------------------------------------------- codes and columns

LAYOUTS = {
    "4 x 256": (256,) * 4,
    "7 x 256, the most that fit": (256,) * 7,
    "8 x 256, one in the rest": (256,) * 8,
    "5 x 65536": (65_536,) * 5,
    "64 x 2": (2,) * 64,
    "65 x 2, more than the view shows": (2,) * 65,
    "mixed": (3, 1_000, 65_536, 2, 17, 256, 5, 70, 256, 100),
    "mixed, large in the rest": (65_536, 1_000, 65_536, 300, 2, 4_096, 7),
    "one level": (1_000,),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def coded(request, tmp_path) -> tuple[Store, CodeLayout, np.ndarray]:
    """A store with 500 items, and the codes that they were given: the row is the id, and 20 items share each code."""
    layout = CodeLayout(request.param)
    codes = np.random.default_rng(0).integers(layout.codebook_sizes, size=(500, layout.levels))
    codes[:20] = codes[20]
    codes[20:30, : layout.levels - 1] = codes[20, : layout.levels - 1]
    codes[30], codes[31] = 0, np.array(layout.codebook_sizes) - 1
    store = Store.create(tmp_path / "x.duckdb", IndexConfig(4, "l2", "rq", {}, 0, "none", 0, None))
    store.save_training(store.config, {}, layout, {}, hierarchical=True)
    with store.appending("int") as appending:
        for rows in np.array_split(np.arange(500), 3):
            part = codes[rows]
            rest = pack_rest(part, layout) if layout.rest_levels else None
            norms = np.zeros(len(rows), dtype=np.float32)
            appending.add(ItemBatch(rows, pa.array(rows), pack(part, layout), rest, norms, {}, None))
    store.close()
    store = Store.open(tmp_path / "x.duckdb")
    yield store, layout, codes
    store.close()


def test_the_view_shows_the_codes(coded):
    store, layout, codes = coded
    view = store.arrow("FROM semantic_ids ORDER BY id")
    assert view["semantic_id"].to_pylist() == ["-".join(map(str, row)) for row in codes.tolist()]
    shown = min(layout.levels, 64)
    assert [name for name in view.column_names if re.fullmatch(r"c\d+", name)] == [f"c{n + 1}" for n in range(shown)]
    for level in range(shown):
        assert view[f"c{level + 1}"].to_pylist() == codes[:, level].tolist()
    bits = [int(size - 1).bit_length() for size in layout.codebook_sizes]
    prefixes, depth = [0] * 500, 0
    while depth < layout.levels and sum(bits[: depth + 1]) <= 63:
        prefixes = [
            prefix << bits[depth] | code for prefix, code in zip(prefixes, codes[:, depth].tolist(), strict=True)
        ]
        depth += 1
        assert view[f"p{depth}"].to_pylist() == prefixes
    assert view["sid"].to_pylist() == prefixes
    assert f"p{depth + 1}" not in view.column_names
    assert set(view["version"].to_pylist()) == {1}


def test_codes_come_back_in_the_order_of_their_ids(coded):
    store, layout, codes = coded
    order = sorted(range(500), key=lambda row: (*codes[row].tolist(), row))
    stored = store.codes()
    assert stored.rows.tolist() == order
    assert np.array_equal(unpack(stored.sids, layout, stored.rest), codes[order])
    assert store.ids().to_pylist() == order
    some = np.array([7, 499, 0, 7])
    assert np.array_equal(store.codes_of(some), codes[some])
    assert store.arrow("SELECT row FROM semid_codes ORDER BY rowid")["row"].to_pylist() == order


def test_prefixes_of_any_depth(coded):
    store, layout, codes = coded
    for depth in {1, 2, layout.packed_levels, layout.levels - 1, layout.levels} - {0}:
        if depth > layout.levels:
            continue
        prefix = tuple(codes[20, :depth].tolist())
        below = [row for row in range(500) if tuple(codes[row, :depth].tolist()) == prefix]
        assert sorted(store.items_under(prefix)["id"].to_pylist()) == below
        if depth <= 64:
            shelves = store.shelves(depth, (), examples=3)
            counts = Counter(tuple(row[:depth]) for row in codes.tolist())
            assert {codes: items for codes, items, _ in shelves} == counts
            assert next(examples for codes, _, examples in shelves if codes == prefix) == below[:3]
            for count in (0, 1, 1_000, 1_001, 2**70):
                counted = store.shelves(depth, (), examples=count)
                assert [shelf[:2] for shelf in counted] == [shelf[:2] for shelf in shelves]
                assert next(examples for codes, _, examples in counted if codes == prefix) == below[:count]


def test_bucket_is_a_prefix_of_at_most_16_bits(coded):
    store, layout, codes = coded
    bits = [int(size - 1).bit_length() for size in layout.codebook_sizes]
    depth = max(1, sum(np.cumsum(bits) <= 16))
    expected = [
        int("".join(f"{code:0{width}b}" for code, width in zip(row, bits[:depth], strict=False)), 2) for row in codes
    ]
    assert store.arrow("SELECT bucket FROM semid_codes ORDER BY row")["bucket"].to_pylist() == expected


def test_items_that_share_an_id_of_any_length(coded):
    store, _, codes = coded
    counts = Counter(map(tuple, codes.tolist()))
    alone = sum(n == 1 for n in counts.values())
    assert store.uniqueness() == Uniqueness(len(counts), alone, max(counts.values()))
    ranks = store.arrow("SELECT dup_rank FROM semantic_ids ORDER BY id")["dup_rank"].to_pylist()
    seen: Counter[tuple[int, ...]] = Counter()
    for code, rank in zip(map(tuple, codes.tolist()), ranks, strict=True):
        assert rank == seen[code]
        seen[code] += 1


# -------------------------------------------------------------------------------------------- what training learned


def test_arrays_come_back_to_the_bit(tmp_path):
    random = np.random.default_rng(0)
    strange = np.array([[-0.0, 1e-45, np.finfo("f4").max, np.finfo("f4").tiny]], dtype=np.float32)
    arrays: dict[str, np.ndarray] = {
        "codebook_1": np.concatenate([strange, random.standard_normal((6, 4)).astype(np.float32)]),
        "codebook_2": random.standard_normal((300, 4)).astype(np.float32),
        "codebook_10": np.asfortranarray(random.standard_normal((3, 4)).astype(np.float32)),
        "codebooks": random.standard_normal((2, 3, 5)),
        "float32 with NaN": np.array([np.nan, -np.inf, -0.0], dtype=np.float32),
        "big-endian": random.standard_normal(5).astype(">f8"),
        "bytes": random.integers(0, 256, (3, 7), dtype=np.uint8),
        "whole numbers": np.array([-(2**63), 2**63 - 1]),
        "booleans": np.array([True, False]),
        "half": np.array([1.5, 65_504], dtype=np.float16),
        "one number": np.array(2.5),
        "nothing": np.empty((0, 4), dtype=np.float32),
        "not contiguous": random.standard_normal((6, 6))[::2, 1::2],
        'it\'s a "name"': np.arange(3),
    }
    layout = CodeLayout((7, 300, 3))
    with_arrays = Store.create(tmp_path / "x.duckdb", IndexConfig(4, "l2", "rq", {}, 0, "none", 0, None))
    with_arrays.save_training(with_arrays.config, {}, layout, arrays, hierarchical=True)
    with_arrays.close()
    store = Store.open(tmp_path / "x.duckdb", read_only=True)
    found = store.learned_arrays()
    store.close()
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        native = array.astype(array.dtype.newbyteorder("="))
        assert (found[name].dtype, found[name].shape) == (native.dtype, array.shape), name
        assert found[name].tobytes() == native.tobytes(), name


# ------------------------------------------------------------------------------------------------------- the file


def test_the_file_has_the_format_that_both_duckdbs_read(trained_file):
    head = trained_file.read_bytes()[:20]
    assert head[8:12] == b"DUCK"
    assert struct.unpack("<Q", head[12:20]) == (65,), "storage version 65 is that of DuckDB 1.2"


READ_WITH_PLAIN_DUCKDB = """
import json, sys
file, *not_from = sys.argv[1:]
sys.path = [folder for folder in sys.path if folder not in not_from]
import duckdb

connection = duckdb.connect(file, read_only=True)
rows = connection.execute(
    "SELECT id, semantic_id, c1, c2, c3, p2, word FROM semantic_ids JOIN items USING (id) ORDER BY id"
)
rows = rows.fetchall()
nearest = connection.execute(
    "SELECT row FROM semid_vectors ORDER BY array_distance(v, (SELECT v FROM semid_vectors WHERE row = 7)) LIMIT 5"
)
print(json.dumps([duckdb.__version__, rows, [row for (row,) in nearest.fetchall()]]))
"""


def test_the_other_duckdb_reads_it(trained_file, run_python, vectors):
    """In the run with DuckDB 2 that is DuckDB 1.5, and in the run with 1.5 it is the one that is installed."""
    if duckdb.__version__.startswith("1."):
        other = run_python(READ_WITH_PLAIN_DUCKDB, trained_file, Path(duckdb.__file__).parent.parent)
    elif (OTHER_DUCKDB / "duckdb").is_dir():
        other = run_python(READ_WITH_PLAIN_DUCKDB, trained_file, path=OTHER_DUCKDB)
    else:
        pytest.skip(f"'make test-duckdb-1.5' installs the other DuckDB into {OTHER_DUCKDB.name}, and it is not there")
    version, rows, nearest = json.loads(other)
    if version == duckdb.__version__:
        pytest.skip(f"there is only one DuckDB here, {version}")
    with semid.open(trained_file, read_only=True) as index:
        codes = index.encode(vectors).tolist()
        assert nearest == index.search(vectors[7], k=5, exact=True).ids.tolist()
    assert rows == [[id, f"{a}-{b}-{c}", a, b, c, a << 4 | b, f"word {id}"] for id, (a, b, c) in enumerate(codes)]


def test_an_index_in_memory_leaves_no_file(tmp_path, monkeypatch, vectors):
    monkeypatch.chdir(tmp_path)
    with semid.create(**OPTIONS) as index:
        index.train(vectors)
        index.add(vectors)
        assert index.search(vectors[7], k=1).ids.tolist() == [7]
        assert index.stats()["path"] is None
        assert index.stats()["file_bytes"] == 0
    assert not list(tmp_path.iterdir())


def test_bytes_of_the_columns(trained_file):
    with semid.open(trained_file, read_only=True) as index:
        stats = index.stats()
        sizes = index._store.column_bytes()
    assert stats["file_bytes"] == trained_file.stat().st_size
    assert sizes["semid_vectors.v"] >= 2_000 * 24 * 4
    assert {"semid_codes.sid", "semid_codes.id", "items.word", "semid_codebook.codeword"} <= set(sizes)
    assert max(sizes.values()) <= stats["file_bytes"]


def test_vectors_that_were_read_are_not_held_twice(tmp_path, monkeypatch):
    path = tmp_path / "index.duckdb"
    vectors = np.random.default_rng(0).standard_normal((30_000, 64), dtype=np.float32)
    with semid.create(path, dim=64, levels=2, codebook_size=16) as index:
        index.train(vectors[:2_000])
        index.add(vectors)

    def held_blocks() -> int:
        with semid.open(path, read_only=True) as index:
            index.search(vectors[0])
            query = "SELECT memory_usage_bytes FROM duckdb_memory() WHERE tag = 'BASE_TABLE'"
            return index.sql(query).fetchall()[0][0]

    monkeypatch.setattr("semid_index.session._KEPT_MEMORY", 2 << 20)
    few = held_blocks()
    monkeypatch.setattr("semid_index.session._KEPT_MEMORY", 1 << 30)
    assert few < vectors.nbytes / 2 < vectors.nbytes < held_blocks()


# --------------------------------------------------------------------------------- closing while others read


class Asked:
    """A query that another thread is carrying out, until it is let go on."""

    def __init__(self, index: SemanticIndex) -> None:
        self.answer: Future[pa.Table] = Future()
        self._began, self.go_on = threading.Event(), threading.Event()
        self._reader = pa.RecordBatchReader.from_batches(pa.schema({"n": pa.int64()}), self._batches())
        threading.Thread(target=self._ask, args=(index,)).start()
        assert self._began.wait(60)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        self._began.set()
        assert self.go_on.wait(60)
        yield pa.record_batch({"n": [1, 2]})

    def _ask(self, index: SemanticIndex) -> None:
        try:
            self.answer.set_result(index._store.arrow("SELECT sum(n) AS n FROM slow", slow=self._reader))
        except BaseException as error:
            self.answer.set_exception(error)


def test_closing_waits_for_what_others_read(index_file):
    index = semid.open(index_file)
    asked = Asked(index)
    threading.Timer(0.3, asked.go_on.set).start()
    index.close()
    try:
        assert asked.answer.result(60)["n"].to_pylist() == [3]
    except IndexClosedError:
        assert duckdb.__version__ < "2", "which does not wait"
    with pytest.raises(IndexClosedError):
        len(index)
    with semid.open(index_file) as index:
        assert index.verify().ok


@pytest.mark.skipif(duckdb.__version__ < "2", reason="DuckDB 1.5 does not wait")
def test_closing_does_not_wait_for_ever(index_file, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("semid_index.session.log.warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr("semid_index.database._FREE_WITHIN", 0.1)
    index = semid.open(index_file)
    asked = Asked(index)
    index.close()
    asked.go_on.set()
    assert said == [f"{index_file} is closed, but a thread still reads it: until it is done, the file is held"]
    with pytest.raises(IndexClosedError):
        len(index)
    assert asked.answer.result(60)["n"].to_pylist() == [3]
    with semid.open(index_file) as index:
        assert index.verify().ok


def test_what_was_being_read_when_the_index_was_closed_says_so(index_file):
    with semid.open(index_file) as index, index._store.reading():
        assert index._store.count(range(10)) == 10
        index.close()
        with pytest.raises(IndexClosedError, match=r"was closed meanwhile by another thread\. Open it again"):
            index._store.count(range(10))
