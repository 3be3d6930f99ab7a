"""Upsert, delete and history, against a dictionary of vectors and brute force in NumPy."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import semid_index as semid
from semid_index import errors, session
from semid_index.cli import app
from semid_index.codes import format_id, unpack
from semid_index.index import SemanticIndex
from semid_index.metrics import exact_search
from semid_index.sql import tables

DIM = 8
CENTRES = 4 * np.random.default_rng(0).standard_normal((25, DIM))

SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "digit, strings": {"collisions": "digit", "vectors": "int8", "metric": "cosine"},
    "next-best": {"collisions": "next-best", "metric": "ip"},
    "capacity, strings": {"collisions": {"policy": "capacity", "items": 2}, "vectors": "float16"},
    "sinkhorn": {"collisions": "sinkhorn", "metric": "cosine"},
    "next-best without vectors": {"collisions": "next-best", "vectors": "none"},
    "balanced": {"quantizer": "balanced-rq", "vectors": "float16", "metric": "ip"},
    "balanced with capacity": {"quantizer": "balanced-rq", "capacity": 1.3, "tail": 0},
    "long, strings": {"levels": 11, "codebook_size": 64, "vectors": "int8"},
    "long digit": {"levels": 10, "codebook_size": 64, "collisions": {"policy": "digit", "size": 300}},
    "pq": {"quantizer": "pq", "metric": "cosine", "levels": 4},
    "sq8, strings": {"quantizer": "sq8", "vectors": "none", "tail": 0},
}


def points(rows: int, seed: int) -> np.ndarray:
    """Vectors around the centres, close to them, so that many share an ID."""
    random = np.random.default_rng(seed)
    return (CENTRES[random.integers(len(CENTRES), size=rows)] + random.standard_normal((rows, DIM))).astype(np.float32)


def new_index(path: Path | None = None, **setup: Any) -> SemanticIndex:
    rq = setup.get("quantizer", "rq") in ("rq", "balanced-rq")
    index = semid.create(path, dim=DIM, **({"levels": 3, "codebook_size": 8} if rq else {}) | setup)
    index.train(points(600, seed=1))
    return index


def ids_of(index: SemanticIndex) -> dict[Any, tuple[str, int]]:
    """The whole ID of each item."""
    return {
        id: (text, rank)
        for id, text, rank in index.sql("SELECT id, semantic_id, dup_rank FROM semantic_ids").fetchall()
    }


def history_of(index: SemanticIndex) -> list[tuple[Any, str, int]]:
    """Which item had which ID."""
    layout = index._store.layout
    rest = ", sid_rest" if layout.rest_levels else ""
    found = index.sql(f"SELECT id, sid, dup_rank{rest} FROM semid_history").fetchall()
    codes = [
        unpack(np.array([sid]), layout, np.array(further) if rest else None)[0].tolist()
        for _, sid, _, *further in found
    ]
    return [(id, format_id(code), rank) for (id, _, rank, *_), code in zip(found, codes, strict=True)]


class Model:
    """What an index should hold: a vector and metadata for each id, and every ID that was ever given."""

    def __init__(self, index: SemanticIndex, *, names: bool) -> None:
        self.index, self.names = index, names
        self.items: dict[Any, tuple[np.ndarray, dict[str, Any]]] = {}
        self.semantic_ids: dict[Any, tuple[str, int]] = {}
        self.history: list[tuple[Any, str, int]] = []

    def ids(self, numbers: Any) -> Any:
        return [f"item {number} é" for number in numbers] if self.names else list(numbers)

    def add(self, numbers: range, seed: int) -> None:
        vectors, ids = points(len(numbers), seed), self.ids(numbers)
        before = ids_of(self.index)
        self.index.add(vectors, ids, metadata={"number": list(numbers)})
        self.items |= {id: (v, {"number": n}) for id, v, n in zip(ids, vectors, numbers, strict=True)}
        self.check(before, touched=set(ids))

    def delete(self, numbers: Any, **where: Any) -> None:
        ids, before = self.ids(numbers), ids_of(self.index)
        gone = [id for id in dict.fromkeys(ids) if id in self.items]
        assert self.index.delete(**where) if where else self.index.delete(ids) == len(gone)
        for id in gone:
            self.history.append((id, *before[id]))
            del self.items[id]
        self.check(before, touched=set())

    def upsert(self, numbers: list[int], vectors: np.ndarray, **metadata: list[Any]) -> semid.records.UpsertResult:
        ids, before = self.ids(numbers), ids_of(self.index)
        result = self.index.upsert(vectors, ids, metadata=metadata or None, batch_size=64)
        for row, id in enumerate(ids):
            old = self.items[id][1] if id in self.items else {}
            self.items[id] = (vectors[row], old | {name: values[row] for name, values in metadata.items()})
        after = ids_of(self.index)
        renamed = [id for id in ids if id in before and before[id] != after[id]]
        self.history += [(id, *before[id]) for id in renamed]
        known = len(set(ids) & set(before))
        assert (result.inserted, result.updated, result.renamed) == (len(ids) - known, known, len(renamed))
        self.check(before, touched=set(ids))
        return result

    def check(self, before: dict[Any, tuple[str, int]], *, touched: set[Any]) -> None:
        index, now = self.index, ids_of(self.index)
        assert len(index) == len(self.items)
        assert set(now) == set(self.items)
        assert {id: now[id] for id in now if id not in touched} == {
            id: had for id, had in before.items() if id in now and id not in touched
        }
        assert sorted(history_of(index), key=str) == sorted(self.history, key=str)
        given = [*now.values(), *((text, rank) for _, text, rank in self.history)]
        assert len(set(given)) == len(given), "an ID was given twice"
        self.check_tables()
        self.check_search()

    def check_tables(self) -> None:
        index, ids = self.index, list(self.items)
        found = index.get(ids)
        assert found["id"].to_pylist() == ids
        for name in found.column_names[2:]:
            assert found[name].to_pylist() == [metadata.get(name) for _, metadata in self.items.values()]
        assert index.sql("SELECT count(*), count(DISTINCT id) FROM items").fetchall() == [(len(ids), len(ids))]
        if index._store._has_table("semid_vectors"):
            assert index.sql(
                "SELECT count(*), count(DISTINCT v.row) FROM semid_vectors v JOIN semid_codes USING (row)"
            ).fetchall() == [(len(ids), len(ids))]
            assert len(index.sql("FROM semid_vectors")) == len(ids)

    def check_search(self) -> None:
        """The index finds what brute force finds among the vectors of the items that are there."""
        index, ids = self.index, list(self.items)
        stored = np.stack(index.get(ids, vectors=True)["vector"].to_numpy(zero_copy_only=False))
        given = np.stack([vector for vector, _ in self.items.values()])
        if index.config.vectors == "none":
            codes = np.array([[int(code) for code in text.split("-")] for text, _ in map(ids_of(index).get, ids)])
            np.testing.assert_allclose(stored, index.decode(codes), rtol=1e-5)
        else:
            largest = np.abs(given).max(axis=1, keepdims=True)
            error = {"float32": 0, "float16": 2**-11, "int8": 0.51 / 127}[index.config.vectors]
            assert (np.abs(stored - given) <= error * largest + 1e-12).all()
        queries = points(6, seed=99)
        expected = exact_search(queries, stored, 7, index.config.metric)[1]
        for options in (
            {"exact": True},
            {"probes": 10_000, "rerank": 10_000},
            {"where": "id IS NOT NULL", "exact": True},
        ):
            result = index.search(queries, 7, **options)
            np.testing.assert_allclose(np.stack(result.distances), expected, rtol=2e-4, atol=2e-4)
            assert set(np.concatenate(result.ids).tolist()) <= set(ids)


@pytest.mark.parametrize("name", SETUPS)
def test_a_life_of_an_index(name, tmp_path):
    path = tmp_path / "index.duckdb"
    with new_index(path, **SETUPS[name]) as index:
        model = Model(index, names=name.endswith("strings"))
        model.add(range(260), seed=2)
        model.delete([3, 3, 255, 9_999, *range(100, 140)])
        # the same again changes no ID, whatever others have and in whatever order they come
        numbers = np.random.default_rng(3).permutation(100).tolist()[:90]
        numbers = [number for number in numbers if number != 3]
        same = np.stack([model.items[id][0] for id in model.ids(numbers)])
        result = model.upsert(numbers, same)
        if index.config.vectors != "none":
            assert result.renamed == 0
        # known ones with other vectors, deleted ones, new ones
        mixed = [*range(60, 145), *range(300, 330)]
        result = model.upsert(mixed, points(len(mixed), seed=4), word=[f"word {number}" for number in mixed])
        assert result.renamed > 20
        model.delete(range(40, 80), where="number >= ? AND number < ? ", params=[40, 80])
        model.add(range(400, 460), seed=5)
    with semid.open(path) as index:
        model.index = index
        model.check(ids_of(index), touched=set())
        model.upsert([400, 1, 500], points(3, seed=6), number=[-1, -2, -3])
        assert index.verify().failed == ()


def test_only_what_the_vector_says_decides_about_an_id():
    with new_index() as index:
        index.add(points(200, seed=2))
        before, vectors = ids_of(index), points(150, seed=3)
        index.upsert(vectors, range(50, 200))
        codes = index.encode(vectors)
        after = ids_of(index)
        for number, code in zip(range(50, 200), codes.tolist(), strict=True):
            text = "-".join(map(str, code))
            assert after[number][0] == text
            assert (after[number] == before[number]) == (before[number][0] == text)


def test_an_id_of_its_own_stays_with_its_item_while_others_come_and_go():
    """next-best: three items that want one ID; each keeps its place when all are written again, last first."""
    one = points(1, seed=7)
    with new_index(collisions="next-best") as index:
        index.add(np.repeat(one, 3, axis=0), ["a", "b", "c"])
        before = ids_of(index)
        assert len({text for text, _ in before.values()}) == 3
        index.upsert(np.repeat(one, 3, axis=0), ["c", "b", "a"])
        assert ids_of(index) == before
        index.upsert(one, ["new"])
        index.upsert(one, ["a"])
        assert {id: had for id, had in ids_of(index).items() if id != "new"} == before


def test_a_rank_is_not_given_again():
    one = points(1, seed=7)
    with new_index() as index:
        index.add(np.repeat(one, 3, axis=0))
        text = ids_of(index)[0][0]
        index.delete([1, 2])
        assert index.add(np.repeat(one, 2, axis=0)).tolist() == [3, 4]  # nor are the numbers that add gives
        assert ids_of(index) == {0: (text, 0), 3: (text, 3), 4: (text, 4)}
        index.delete(where="true")
        index.add(one)
        assert ids_of(index) == {5: (text, 5)}
        index.upsert(-one, [5])
        index.upsert(one, [5])
        assert ids_of(index) == {5: (text, 6)}


def test_the_first_items_may_come_by_upsert():
    vectors = points(5, seed=2)
    with new_index() as index:
        result = index.upsert(vectors, ["a", "b", "c", "d", "e"], metadata={"n": range(5)})
        assert (result.inserted, result.updated, result.renamed) == (5, 0, 0)
        assert index.search(vectors[2], 1).ids.tolist() == ["c"]


def test_metadata_that_is_not_given_stays():
    with new_index() as index:
        index.add(points(4, seed=2), metadata={"a": [1, 2, 3, 4], "Name": ["x", "y", "z", None]})
        index.upsert(points(2, seed=3), [1, 9], metadata={"name": [None, "n"], "more": [[1.5], None]})
        index.upsert(points(2, seed=4), [0, 10])
        found = index.sql("SELECT id, a, Name, more FROM items ORDER BY id").fetchall()
        assert found == [
            (0, 1, "x", None),
            (1, 2, None, [1.5]),
            (2, 3, "z", None),
            (3, 4, None, None),
            (9, None, "n", None),
            (10, None, None, None),
        ]


def test_history_says_since_when():
    with new_index() as index:
        index.add(points(3, seed=2))
        before = index.sql("SELECT (now() AT TIME ZONE 'UTC')::TIMESTAMP").fetchall()[0][0]
        index.delete([1])
        after = index.sql("SELECT (now() AT TIME ZONE 'UTC')::TIMESTAMP").fetchall()[0][0]
        (id, version, until), *others = index.sql("SELECT id, version, until FROM semid_history").fetchall()
        assert (id, version, others) == (1, 1, [])
        assert before <= until <= after


@pytest.mark.parametrize(
    "where",
    [
        {"where": "kind = ? AND n < 10", "params": ["b"]},
        {"where": {"kind": "b", "n": {"<": 10}}},
        "sqlalchemy",
        {"where": "c1 >= 0 AND kind = 'b' AND n < 10"},
    ],
)
def test_where_is_as_in_search(where):
    kinds = ["a", "b", "c"] * 10
    with new_index() as index:
        index.add(points(30, seed=2), metadata={"kind": kinds, "n": range(30)})
        if where == "sqlalchemy":
            items = tables(index.engine())["items"]
            where = {"where": (items.c.kind == "b") & (items.c.n < 10)}
        expected = {1, 4, 7}
        assert set(index.search(points(1, seed=3)[0], 30, **where).ids.tolist()) == expected
        assert index.delete(**where) == 3
        assert index.delete(**where) == 0
        assert set(ids_of(index)) == set(range(30)) - expected


def test_what_is_only_in_the_log_is_there_after_a_crash(tmp_path):
    path, copy = tmp_path / "index.duckdb", tmp_path / "copy.duckdb"
    with new_index(path) as index:
        index.add(points(300, seed=2), metadata={"n": range(300)})
    with semid.open(path) as index:
        index.upsert(points(100, seed=3), range(250, 350), metadata={"n": range(100)})
        index.delete(range(240, 260))
        index.upsert(points(100, seed=4), range(250, 350))
        assert path.with_name("index.duckdb.wal").stat().st_size > 10_000
        expected = ids_of(index), history_of(index)
        for suffix in ("", ".wal"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    with semid.open(copy) as index:
        assert (ids_of(index), history_of(index)) == expected
        assert index.verify().failed == ()
        assert index.upsert(points(1, seed=5), [250]).updated == 1


# -- bad calls --------------------------------------------------------------------------------------------------------

NAN = np.full((1, DIM), np.nan, dtype=np.float32)
ONE = points(1, seed=8)
BAD_CALLS: dict[str, tuple[type[Exception], Callable[[SemanticIndex], Any]]] = {
    "ids twice": (errors.DuplicateIdError, lambda index: index.upsert(points(3, seed=3), [1, 7, 1])),
    "new ids twice": (errors.DuplicateIdError, lambda index: index.upsert(points(2, seed=3), [77, 77])),
    "no ids": (errors.InvalidIdsError, lambda index: index.upsert(ONE, None)),
    "too few ids": (errors.InvalidIdsError, lambda index: index.upsert(points(2, seed=3), [1])),
    "ids of another type": (errors.InvalidIdsError, lambda index: index.upsert(ONE, ["1"])),
    "NaN": (errors.InvalidVectorsError, lambda index: index.upsert(np.concatenate([ONE, NAN]), [1, 2])),
    "only NaN": (errors.InvalidVectorsError, lambda index: index.upsert(NAN, [1], on_bad_vectors="drop")),
    "dimensions": (errors.DimensionMismatchError, lambda index: index.upsert(ONE[:, :4], [1])),
    "no vectors": (errors.InvalidVectorsError, lambda index: index.upsert(ONE[:0], [])),
    "metadata of another type": (
        errors.InvalidArgumentError,
        lambda index: index.upsert(points(70, seed=3), range(70), metadata={"n": ["x"] * 70}, batch_size=10),
    ),
    "metadata of another length": (
        errors.InvalidArgumentError,
        lambda index: index.upsert(ONE, [1], metadata={"n": [1, 2]}),
    ),
    "batch_size": (errors.InvalidArgumentError, lambda index: index.upsert(ONE, [1], batch_size=0)),
    "nothing to delete": (errors.InvalidArgumentError, lambda index: index.delete()),
    "ids and where": (errors.InvalidArgumentError, lambda index: index.delete([1], where="n = 1")),
    "params without where": (errors.InvalidArgumentError, lambda index: index.delete([1], params=[1])),
    "one id": (errors.InvalidIdsError, lambda index: index.delete("1")),
    "mixed ids": (errors.InvalidIdsError, lambda index: index.delete([1, "1"])),
    "filter": (errors.FilterError, lambda index: index.delete(where="n = (SELECT 1)")),
    "unknown column": (errors.FilterError, lambda index: index.delete(where="m = 1")),
}


def content(path: Path) -> str:
    files = [path, path.with_name(path.name + ".wal")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    with new_index(tmp_path_factory.mktemp("filled") / "index.duckdb") as index:
        index.add(points(100, seed=2), metadata={"n": range(100)})
        yield index


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_change_nothing(filled, call):
    kind, function = BAD_CALLS[call]
    before, bytes_before = ids_of(filled), content(filled._store.path)
    with pytest.raises(kind) as caught:
        function(filled)
    assert str(caught.value).endswith((".", ")"))
    assert content(filled._store.path) == bytes_before
    assert ids_of(filled) == before
    assert history_of(filled) == []


def test_untrained_and_read_only(tmp_path):
    path = tmp_path / "index.duckdb"
    with semid.create(path, dim=DIM) as index:
        for call in (lambda: index.upsert(ONE, [1]), lambda: index.delete([1])):
            with pytest.raises(errors.NotTrainedError):
                call()
    with new_index(tmp_path / "other.duckdb") as index:
        assert index.delete([1]) == index.delete(["1"]) == index.delete([]) == 0  # no items yet, of whichever type
        index.add(ONE)
        assert index.delete(["1"]) == index.delete([]) == 0
    with semid.open(tmp_path / "other.duckdb", read_only=True) as index:
        for call in (lambda: index.upsert(ONE, [1]), lambda: index.delete([7]), lambda: index.delete(where="false")):
            with pytest.raises(errors.ReadOnlyError):
                call()


def test_dropped_vectors_leave_their_items_alone():
    with new_index() as index:
        index.add(points(3, seed=2), metadata={"n": [0, 1, 2]})
        before = ids_of(index)
        vectors = np.concatenate([NAN, ONE, NAN])
        result = index.upsert(vectors, [0, 1, 5], metadata={"n": [10, 11, 15]}, on_bad_vectors="drop")
        assert (result.inserted, result.updated, result.dropped) == (0, 1, 2)
        assert index.sql("SELECT n FROM items ORDER BY id").fetchall() == [(0,), (11,), (2,)]
        assert {id: had for id, had in ids_of(index).items() if id != 1} == {0: before[0], 2: before[2]}


def test_what_fails_halfway_is_undone(monkeypatch, tmp_path):
    with new_index(tmp_path / "index.duckdb", collisions="next-best") as index:
        index.add(points(50, seed=2), metadata={"n": range(50)})
        before, expected = ids_of(index), index.search(ONE[0], 50, exact=True)
        calls = []
        place = index._policy.place

        def fails_at_the_second_batch(arrivals):
            calls.append(len(arrivals.codes))
            if len(calls) == 2:
                raise MemoryError
            return place(arrivals)

        monkeypatch.setattr(index._policy, "place", fails_at_the_second_batch)
        with pytest.raises(MemoryError):
            index.upsert(points(50, seed=3), range(25, 75), metadata={"more": range(50)}, batch_size=20)
        monkeypatch.undo()
        assert ids_of(index) == before
        assert "more" not in index.get([1]).column_names
        found = index.search(ONE[0], 50, exact=True)
        assert found.ids.tolist() == expected.ids.tolist()
        assert index.verify().ok
        assert index.upsert(points(50, seed=3), range(25, 75)).inserted == 25


# -- items by their ids -----------------------------------------------------------------------------------------------


def test_one_item_is_found_without_reading_the_ids_of_all(monkeypatch):
    with new_index() as index:
        index.add(points(3_000, seed=2))
        fetch, asked = index._store._fetch, []
        monkeypatch.setattr(index._store, "_fetch", lambda *query: asked.append(query) or fetch(*query))
        assert 2_000 in index
        plans = [fetch(f"EXPLAIN ANALYZE {query}", *params)[0][1] for query, *params in asked if "WHERE id" in query]
        assert len(plans) == 1
        assert "Index Scan" in plans[0]


def test_one_item_is_found_as_several_are(tmp_path):
    vectors, ids = points(60, seed=2), [f"item\0{n}" for n in range(50)]
    with new_index(tmp_path / "index.duckdb") as index:
        index.add(vectors[:50], ids=ids)
        store = index._store

        def rows() -> tuple[list[int], list[int]]:
            one_by_one = [int(store.rows_of_ids(pa.array([id]))[0]) for id in (*ids, "new")]
            return one_by_one, store.rows_of_ids(pa.array([*ids, "new"])).tolist()

        def write() -> None:
            index.delete(ids[:5])
            index.upsert(vectors[50:], [*ids[3:10], "a", "b", "new"])

        assert rows() == ([*range(50), -1],) * 2
        with store.reading():
            assert len(index) == 50  # the first read decides which moment it is
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()
            assert rows() == ([*range(50), -1],) * 2
        one_by_one, together = rows()
        assert one_by_one == together
        assert one_by_one == [-1, -1, -1, *range(50, 57), *range(10, 50), 59]
        assert index.similar(ids[20], 5).ids.tolist() == index.search(vectors[20], 6).ids[1:].tolist()


# -- several writers --------------------------------------------------------------------------------------------------


def test_what_one_index_writes_the_other_finds(tmp_path):
    path, vectors = tmp_path / "index.duckdb", points(60, seed=2)
    with new_index(path) as one:
        one.add(vectors[:50])
        with semid.open(path) as other:
            assert other.search(vectors[3], 1).ids.tolist() == [3]
            one.delete([3])
            assert other.search(vectors[3], 50).ids.tolist().count(3) == 0
            assert other.add(vectors[50:]).tolist() == list(range(50, 60))
            other.upsert(vectors[3:4], [7])
            assert one.search(vectors[3], 1).ids.tolist() == [7]
            assert one.search(vectors[3], 60, where="id >= 0").ids.tolist() == other.search(vectors[3], 60).ids.tolist()


def test_what_one_index_learned_the_other_knows(tmp_path):
    path, vectors = tmp_path / "index.duckdb", points(60, seed=2)
    semid.create(path, dim=DIM, levels=3, codebook_size=8).close()
    with semid.open(path) as one, semid.open(path) as other:
        assert other.config.tail is None
        one.train(points(600, seed=1))
        assert other.config == one.config
        assert other.config.tail
        np.testing.assert_array_equal(other.encode(vectors), one.encode(vectors))
        one.add(vectors[:50])
        assert other.search(vectors[3], 1, where="id < 9").ids.tolist() == [3]
        assert other.add(vectors[50:]).tolist() == list(range(50, 60))
        assert other.stats()["tail"] == one.stats()["tail"]
        assert other.verify().ok
        assert other.retrain(compare=False).version == 2
        np.testing.assert_array_equal(one.encode(vectors), other.encode(vectors))


def test_two_indexes_on_one_file_write_one_after_the_other(tmp_path):
    path, vectors = tmp_path / "index.duckdb", points(40, seed=2)
    with new_index(path) as one, semid.open(path) as other:
        one.add(vectors)
        failed: list[Exception] = []

        def work(index: SemanticIndex, first: int) -> None:
            try:
                for step in range(8):
                    index.add(vectors[:3], range(first + 3 * step, first + 3 * step + 3))
                    index.upsert(vectors[step : step + 2], [0, 1])
                    index.delete([first + 3 * step])
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(index, 1_000 * n)) for n, index in enumerate((one, other), 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert len(one) == len(other) == 40 + 2 * 16
        given = [*ids_of(one).values(), *((text, rank) for _, text, rank in history_of(one))]
        assert len(set(given)) == len(given)
        assert one.verify().ok


@pytest.mark.parametrize("write", ["delete", "upsert"])
def test_conflicts_are_tried_again_and_then_reported(monkeypatch, write):
    with new_index() as index:
        index.add(points(10, seed=2), metadata={"n": range(10)})
        other = index._store.cursor()
        call = {
            "delete": lambda: index.delete([3]),
            "upsert": lambda: index.upsert(ONE, [3], metadata={"n": [-3]}).updated,
        }[write]
        waits: list[float] = []
        monkeypatch.setattr(session.time, "sleep", waits.append)
        before = ids_of(index)
        other.execute("BEGIN")
        # DuckDB lets an item be deleted that another transaction changes, and so there is no conflict
        other.execute("DELETE FROM items WHERE id = 3" if write == "delete" else "UPDATE items SET n = 33 WHERE id = 3")
        with pytest.raises(errors.ConflictError, match="End its transaction"):
            call()
        assert len(waits) == 7
        assert sum(waits) < 2
        assert ids_of(index) == before

        def then_it_ends(seconds: float) -> None:
            other.execute("COMMIT")

        monkeypatch.setattr(session.time, "sleep", then_it_ends)
        assert call() == 1
        assert index.sql("SELECT n FROM items WHERE id = 3").fetchall() == ([] if write == "delete" else [(-3,)])
        assert len(history_of(index)) == 1


SIDES = (5, -5)
TEN = list(range(10))


def halves_seen(index: SemanticIndex) -> list[str]:
    """What a reader sees of ten items that are always all on one side, or all away, and should not see."""
    table = index.get(TEN, vectors=True)
    sides = {
        "get, vectors": [round(vector[0]) for vector in table["vector"].to_pylist()],
        "get, metadata": table["side"].to_pylist(),
    }
    for options in ({}, {"where": "side <> 0"}, {"exact": True}):
        for side in SIDES:
            result = index.search(np.full(DIM, side, dtype=np.float32), 10, **options)
            sides[f"search {options}"] = [side] * int(
                np.count_nonzero(np.isin(result.ids, TEN) & (result.distances < 2))
            )
    index.tree(1)
    index.stats()
    index.prefix(())
    return [f"{what}: {seen}" for what, seen in sides.items() if len(seen) not in (0, 10) or len(set(seen)) > 1]


def test_readers_see_one_moment():
    sides = [np.full((10, DIM), side, dtype=np.float32) + np.arange(10)[:, None] / 100 for side in SIDES]
    failed: list[Any] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set() and not failed:
                failed.extend(halves_seen(index))
        except Exception as error:
            failed.append(error)

    with new_index() as index:
        index.add(points(100, seed=2), range(100, 200), metadata={"side": [0] * 100})
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        try:
            for step in range(24):
                index.upsert(sides[step % 2], TEN, metadata={"side": [SIDES[step % 2]] * 10})
                if step % 4 == 3:
                    assert index.delete(TEN) == 10
        finally:
            done.set()
            for reader in readers:
                reader.join()
    assert failed == []


# -- the command line -------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--format", "json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands(tmp_path):
    path = tmp_path / "index.duckdb"
    with new_index(path) as index:
        index.add(points(20, seed=2), metadata={"n": range(20)})
    np.save(tmp_path / "changed.npy", points(4, seed=3))
    (tmp_path / "changed.txt").write_text("1\n2\n30\n31\n")
    np.save(tmp_path / "changed-ids.npy", np.array([1, 2, 30, 31]))
    done = run("add", path, tmp_path / "changed.npy", "--ids", tmp_path / "changed-ids.npy", "--upsert", "--quiet")
    assert done == {"added": 2, "updated": 2, "renamed": done["renamed"], "items": 22}
    assert run("delete", path, 1, 1, 99) == {"deleted": 1, "items": 21}
    assert run("delete", path, "--ids-file", tmp_path / "changed.txt") == {"deleted": 3, "items": 18}
    assert run("delete", path, "--where", "n >= ? AND n < 15", "--param", "10") == {"deleted": 5, "items": 13}
    for wrong in ([], [5, "--where", "n = 5"], ["--where", "n = 5", "--ids-file", tmp_path / "changed.txt"]):
        result = CliRunner().invoke(app, ["delete", str(path), *map(str, wrong)])
        assert result.exit_code == 2
        assert "one of these" in result.output
    with semid.open(path) as index:
        assert sorted(ids_of(index)) == [0, *range(3, 10), *range(15, 20)]


def test_commands_with_ids_that_are_text(tmp_path):
    path = tmp_path / "index.duckdb"
    with new_index(path) as index:
        index.add(points(3, seed=2), ["7", "a", "b"])
    assert run("delete", path, "7", "8") == {"deleted": 1, "items": 2}
    assert run("delete", path, "a", "8") == {"deleted": 1, "items": 1}
    assert run("delete", path, "8") == {"deleted": 0, "items": 1}
