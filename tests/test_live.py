"""Searches see what was written at once, and one consistent state; the oracle is brute force over a dict of items."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import semid_index as semid
from semid_index import live
from semid_index.live import merged_spans
from semid_index.lookup import Places
from semid_index.metrics import distances as all_distances
from semid_index.metrics import exact_search
from semid_index.rerank import from_stored, to_stored

DIM, K = 16, 10


class Model:
    """What the index should hold: a vector and a number for each id."""

    def __init__(self, index: semid.SemanticIndex, random: np.random.Generator) -> None:
        self.index, self.random = index, random
        self.items: dict[int, tuple[np.ndarray, int]] = {}
        self.next_id = 0

    def vectors(self, count: int) -> np.ndarray:
        centres = 4 * np.random.default_rng(5).standard_normal((30, DIM))
        picked = centres[self.random.integers(30, size=count)]
        return (picked + self.random.standard_normal((count, DIM))).astype(np.float32)

    def add(self, count: int) -> None:
        ids, vectors = np.arange(self.next_id, self.next_id + count), self.vectors(count)
        self.next_id += count
        numbers = self.random.integers(100, size=count)
        self.index.add(vectors, ids=ids, metadata={"number": numbers})
        self._keep(ids, vectors, numbers)

    def delete(self, count: int) -> None:
        ids = self.random.permutation(list(self.items))[:count]
        assert self.index.delete(ids) == len(ids)
        for id in ids.tolist():
            del self.items[id]

    def upsert(self, count: int) -> None:
        """Some items that are there, and some that are new."""
        new = np.arange(self.next_id, self.next_id + count // 2)
        self.next_id += len(new)
        ids = np.concatenate([self.random.permutation(list(self.items))[: count - len(new)], new]).astype(np.int64)
        vectors, numbers = self.vectors(len(ids)), self.random.integers(100, size=len(ids))
        self.index.upsert(vectors, ids, metadata={"number": numbers})
        self._keep(ids, vectors, numbers)

    def _keep(self, ids: np.ndarray, vectors: np.ndarray, numbers: np.ndarray) -> None:
        self.items |= dict(zip(ids.tolist(), zip(vectors, numbers.tolist(), strict=True), strict=True))

    def arrays(self, below: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the items with a number below this, and their vectors as stored."""
        ids = [id for id, (_, number) in self.items.items() if number < below]
        vectors = np.array([self.items[id][0] for id in ids], dtype=np.float32).reshape(-1, DIM)
        tier = self.index.config.vectors
        if tier in ("float16", "int8") and ids:
            stored = to_stored(vectors, tier)
            vectors = from_stored(stored["v"].view({"float16": np.float16, "int8": np.int8}[tier]), stored.get("scale"))
        return np.array(ids, dtype=np.int64), vectors

    def check(self, queries: np.ndarray, *, recall: float) -> None:
        """Exact search is brute force, in ids and distances; approximate search finds most; its distances are true."""
        metric, decoded = self.index.config.metric, self.index.config.vectors == "none"
        for below, where in ((100, None), (30, "number < 30"), (1, "number < 1")):
            ids, vectors = self.arrays(below)
            if decoded and len(ids):
                vectors = self.index.decode(self.index.encode(vectors))
            wanted = min(K, len(ids))
            exact = self.index.search(queries, K, where=where, exact=True)
            found = self.index.search(queries, K, where=where)
            assert exact.trace.matches == (None if where is None else len(ids))
            for result in (exact, found):
                assert [len(row) for row in result.ids] == [wanted] * len(queries)
            if not wanted:
                continue
            _, nearest = exact_search(queries, vectors, wanted, metric)
            np.testing.assert_allclose(np.array(exact.distances), nearest, rtol=1e-3, atol=2e-3)
            place = {id: position for position, id in enumerate(ids.tolist())}
            for result in (exact, found):
                for query, row, distances in zip(queries, result.ids, result.distances, strict=True):
                    assert len(set(row.tolist())) == wanted
                    true = all_distances(query[None], vectors[[place[id] for id in row.tolist()]], metric)[0]
                    np.testing.assert_allclose(distances, true, rtol=1e-3, atol=2e-3)
                    assert (np.diff(distances) >= 0).all()
            hit = np.array(found.distances) <= nearest[:, -1:] + 2e-3
            assert hit.mean() >= recall

    def check_ids_and_codes(self, queries: np.ndarray) -> None:
        """Hits of a search have the semantic IDs that the file says they have; those of SQL are found too."""
        found = self.index.search(queries, K)
        said = dict(self.index.sql("SELECT id, semantic_id FROM semantic_ids").fetchall())
        for ids, texts in zip(found.ids, found.semantic_ids, strict=True):
            assert [said[id] for id in ids.tolist()] == texts.tolist()
        by_codes = self.index._search_codes(queries, K)
        assert set(by_codes.flat_ids.tolist()) <= set(self.items)
        assert by_codes.trace.distances == "decoded"


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few thousand items make several segments."""
    monkeypatch.setattr(live, "FEW", 100)


def sizes(index: semid.SemanticIndex) -> list[int]:
    """How many items each segment has."""
    return [len(segment) for segment in index._live.now().segments]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    """Makes a trained index with 3,000 items and its model."""
    opened = []

    def make(vectors_in: str = "memory", seed: int = 0, **options: Any) -> Model:
        path = tmp_path / f"{len(opened)}.duckdb"
        shape = {"levels": 3, "codebook_size": 16} | options
        with semid.create(path, dim=DIM, **shape) as index:
            model = Model(index, np.random.default_rng(seed))
            index.train(model.vectors(2_000))
        model.index = semid.open(path, vectors_in=vectors_in)
        opened.append(model.index)
        model.add(3_000)
        return model

    yield make
    for index in opened:
        index.close()


KINDS: dict[str, dict[str, Any]] = {
    "l2": {},
    "cosine": {"metric": "cosine"},
    "ip": {"metric": "ip"},
    "float16 in the file": {"vectors": "float16", "vectors_in": "file"},
    "int8": {"vectors": "int8"},
    "float32 in the file": {"vectors_in": "file", "metric": "cosine"},
    "no vectors": {"vectors": "none"},
    "no tail": {"tail": 0},
    "pq": {"quantizer": "pq", "levels": 4},
    "deeper than a sid": {"levels": 17, "codebook_size": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_was_written_is_found(made, kind):
    """Random writes, some with a search between; never fewer hits, or worse ones, than a fresh index gives."""
    model = made(**KINDS[kind])
    index, random = model.index, np.random.default_rng(1)
    queries = model.vectors(12)
    least = 0.6 if kind == "no vectors" else 0.85 if kind == "ip" else 0.95
    model.check(queries, recall=least)
    seen = set()
    for step, (write, count) in enumerate(
        [("add", 1), ("add", 40), ("delete", 20), ("add", 150), ("upsert", 60), ("delete", 200), ("add", 30),
         ("upsert", 2), ("delete", 1_500), ("add", 400), ("upsert", 300), ("delete", 5)]
    ):  # fmt: skip
        getattr(model, write)(count)
        if random.random() < 0.8 or step > 9:
            model.check(queries, recall=least)
            seen.add(len(sizes(index)))
    assert max(seen) > 1, "some searches went over several segments"
    model.check_ids_and_codes(queries)
    assert sum(sizes(index)) == len(index) == len(model.items)


def test_recall_is_that_of_a_fresh_index(made):
    model = made()
    queries = model.vectors(300)
    model.index.search(queries[:1])
    model.add(280)
    model.delete(250)
    ids, vectors = model.arrays()
    truth = exact_search(queries, vectors, K, "l2")[1][:, -1:]
    assert len(sizes(model.index)) == 2
    followed = (np.array(model.index.search(queries, K).distances) <= truth + 1e-4).mean()
    model.index._live.forget()
    fresh = (np.array(model.index.search(queries, K).distances) <= truth + 1e-4).mean()
    assert followed >= fresh - 0.01
    newest = [id for id in ids.tolist() if id >= 3_000]
    hits = model.index.search(np.array([model.items[id][0] for id in newest]), 1)
    assert [row[0] for row in hits.ids] == newest


def test_only_what_is_new_is_read(made, monkeypatch):
    model = made()
    index, query = model.index, model.vectors(1)[0]
    read: list[range] = []
    original = index._live._read
    monkeypatch.setattr(index._live, "_read", lambda rows, **few: (read.append(rows), original(rows, **few))[1])
    index.search(query)
    assert read.pop() == range(3_000)
    index.search(query)
    model.add(50)
    index.search(query)
    assert (read.pop(), read) == (range(3_000, 3_050), [])
    model.add(20)
    model.add(10)
    index.search(query)
    assert (read.pop(), read) == (range(3_000, 3_080), []), "few items are read again with those that came after them"
    model.delete(100)
    index.search(query)
    assert read == [], "what is deleted is passed over"
    assert index.stats()["memory_bytes"]["deleted"] > 0
    model.add(240)
    index.search(query)
    assert (read.pop(), read) == (range(3_320), []), "more than a tenth is new: everything is read"
    assert "deleted" not in index.stats()["memory_bytes"]
    model.delete(400)
    index.search(query)
    assert (read.pop(), read) == (range(3_320), []), "more than a tenth is deleted: so it is, too"


def test_the_trace_tells_of_all_segments(made):
    model = made()
    query = model.vectors(1)[0]
    whole = model.index.explain(query)
    assert "later" not in whole.plan
    model.add(60)
    model.delete(5)
    trace = model.index.explain(query, probes=3)
    later, leaves = sizes(model.index)[1], whole.leaves
    gone = 3_060 - 5 - sum(sizes(model.index)) + 5
    first = model.index._live.now().states[0]
    deleted = len(first) - sizes(model.index)[0]
    assert gone == 5
    assert trace.plan == (
        f"probe the best of {leaves} leaves" + f", passing over {deleted} deleted items" * (deleted > 0)
        + "; and in 60 items added later: distances to all, because they are few"
    )  # fmt: skip
    assert trace.executor == f"{whole.executor}, brute force"
    assert trace.probed == len(trace.probes) == 3
    assert trace.candidates <= sum(probe.items for probe in trace.probes) + later
    assert trace.candidates >= sum(probe.items for probe in trace.probes) + later - deleted
    assert trace.reranked > later
    filtered = model.index.explain(query, where="number < 50")
    assert filtered.matches == sum(number < 50 for _, number in model.items.values())
    assert filtered.plan.count("items match") == 2


def test_more_is_asked_for_than_there_is(made):
    model = made()
    query = model.vectors(1)
    model.index.search(query)
    model.add(7)
    model.delete(2)
    assert len(model.index.search(query, 10_000).ids[0]) == 3_005
    model.delete(3_005)
    for options in ({}, {"exact": True}, {"where": "number < 50"}):
        assert model.index.search(query, 5, **options).ids[0].tolist() == []
    model.add(4)
    assert sorted(model.index.search(query, 5).ids[0].tolist()) == sorted(model.items)
    model.delete(4)
    assert len(model.index.search(query, 5).ids[0]) == 0
    model.add(2_000)
    model.check(query, recall=0.9)


def test_an_empty_index_is_searched_before_the_first_add(tmp_path):
    with semid.create(dim=DIM, levels=2, codebook_size=16) as index:
        model = Model(index, np.random.default_rng(0))
        index.train(model.vectors(500))
        assert len(index.search(model.vectors(1)[0])) == 0
        model.add(1)
        assert index.search(model.vectors(1)[0]).ids.tolist() == [0]


def test_similar_and_get_follow(made):
    model = made()
    model.index.search(model.vectors(1))
    model.add(30)
    newest = model.next_id - 1
    vectors = np.array([vector for vector, _ in model.items.values()])
    nearest = exact_search(model.items[newest][0][None], vectors, 6, "l2")[0][0]
    assert model.index.similar(newest, 5).ids.tolist() == np.array(list(model.items))[nearest[1:]].tolist()
    model.index.delete([int(nearest[1])])
    assert int(nearest[1]) not in model.index.similar(newest, 5).ids.tolist()


# -- one moment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors_in", ["memory", "file"])
def test_items_and_matches_are_of_one_moment(made, monkeypatch, vectors_in):
    """Whenever a filter is about to be evaluated, others write; what is found is of before, or of after."""
    model = made(vectors_in)
    index, query, here = model.index, model.vectors(1)[0], threading.current_thread()
    original = index._store.matching_rows
    states: list[list[int]] = []

    def look() -> list[int]:
        return index.search(query, 50, where="number < 50").ids.tolist()

    def write() -> None:
        index.delete(states[-1][:20])
        index.upsert(model.vectors(20), states[-1][20:40], metadata={"number": [99] * 20})
        model.add(500)
        states.append(look())

    def matching(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is here:
            with ThreadPoolExecutor(1) as writer:
                writer.submit(write).result()
        return original(*arguments, **options)

    states.append(look())
    monkeypatch.setattr(index._store, "matching_rows", matching)
    seen = look()
    assert len(states) > 1
    assert seen == states[-2], "the last write came between: nothing of it is seen"
    assert not set(states[-1]) & set(seen[:40])


def test_nobody_waits_for_a_long_write(made):
    """What was written before is seen while another write is under way, and that one is not."""
    model = made()
    index, query = model.index, model.vectors(1)[0]
    index.search(query)
    model.add(20)
    with ThreadPoolExecutor(1) as reader, index._store.writing() as cursor:
        cursor.execute("DELETE FROM semid_codes WHERE row < 1000")
        assert len(reader.submit(index.search, query, 10_000).result(timeout=60).ids) == 3_020
        assert len(reader.submit(index.search, query, 10_000, where="number >= 0").result(timeout=60).ids) == 3_020
        cursor.execute("ROLLBACK; BEGIN")


class Readers:
    """Threads that search again and again, and take down during which states they did."""

    def __init__(self, model: Model, queries: np.ndarray) -> None:
        self.index, self.queries = model.index, queries
        self.states = [dict(model.items)]
        self.ended = 0
        """The last state that was there for sure."""
        self.begun = 0
        """The last state that may have been there."""
        self.done = threading.Event()
        self.results: list[tuple[range, int, bool, list[int]]] = []

    def read(self) -> None:
        turn = 0
        while not self.done.is_set():
            turn += 1
            filtered, query = turn % 2 == 0, turn % len(self.queries)
            first, where = self.ended, "number < 50" if filtered else None
            hits = self.index.search(self.queries[query], K, exact=turn % 3 > 0, where=where, threads=1)
            self.results.append((range(first, self.begun + 1), query, filtered, hits.ids.tolist()))
            if turn % 5 == 0:
                assert self.index.get(hits.ids, vectors=True).num_rows <= K

    @cache  # noqa: B019
    def nearest(self, state: int, query: int, filtered: bool) -> list[int]:
        ids = [id for id, (_, number) in self.states[state].items() if number < 50 or not filtered]
        vectors = np.array([self.states[state][id][0] for id in ids])
        return [ids[row] for row in exact_search(self.queries[query][None], vectors, K, "l2")[0][0]]

    def wrong(self) -> list[Any]:
        """Results that are not those of any state there was between the start and the end of the search."""
        return [
            (states, query, filtered, ids)
            for states, query, filtered, ids in self.results
            if all(ids != self.nearest(state, query, filtered) for state in states)
        ]


def test_readers_see_one_state_while_another_thread_writes(made):
    model = made()
    readers = Readers(model, model.vectors(4))
    with ThreadPoolExecutor(4) as pool:
        reading = [pool.submit(readers.read) for _ in range(4)]
        try:
            for write in range(16):
                readers.begun += 1
                kind, count = (("add", 40), ("delete", 30), ("upsert", 20), ("add", 3))[write % 4]
                getattr(model, kind)(count)
                readers.states.append(dict(model.items))
                readers.ended += 1
        finally:
            readers.done.set()
        for reader in reading:
            reader.result()
    assert not readers.wrong()
    assert len(readers.results) > 50
    assert len({states.stop for states, *_ in readers.results}) > 3, "searches and writes took turns"


# -- parts ------------------------------------------------------------------------------------------------------------


def test_spans_are_joined_where_one_is_small_beside_those_after_it():
    def joined(*counts: int) -> list[int]:
        ends = np.cumsum([0, *counts]).tolist()
        spans = [(range(start, end), end - start) for start, end in pairwise(ends)]
        found = merged_spans(spans)
        assert [rows.start for rows, _ in found[1:]] == [rows.stop for rows, _ in found[:-1]]
        return [count for _, count in found]

    assert joined(5_000, 100) == [5_000, 100]
    assert joined(5_000, 499, 1) == [5_000, 499, 1]
    assert joined(5_000, 500) == [5_500]
    assert joined(90, 1) == [90, 1]
    assert joined(90, 80, 1) == [171]
    assert joined(900, 80, 1) == [900, 81], "up to FEW, all that came later is read as one"
    assert joined(90, 0) == [90]
    assert joined(100_000, 9_900, 900, 70, 10) == [100_000, 9_900, 900, 80]
    assert joined(100_000, 9_900, 900, 80, 10) == [110_890]
    assert joined(0, 0) == []


def test_many_small_writes_read_an_item_again_only_a_few_times(monkeypatch):
    monkeypatch.setattr(live, "FEW", 8)
    spans: list[tuple[range, int]] = []
    read, most = 0, 0
    for row in range(20_000):
        before = {rows for rows, _ in spans}
        spans = merged_spans([*spans, (range(row, row + 1), 1)])
        read += sum(count for rows, count in spans if rows not in before)
        most = max(most, len(spans))
    assert sum(count for _, count in spans) == 20_000
    assert most <= 5
    assert read < 60 * 20_000


@pytest.mark.parametrize("span", [range(40), range(1_000, 1_040), range(1_000, 90_000), range(5, 5)])
def test_places_are_those_of_a_dict(span):
    random = np.random.default_rng(0)
    rows = random.permutation(np.array(span, dtype=np.int64))[:30]
    places = Places(rows, span)
    known = {row: position for position, row in enumerate(rows.tolist())}
    asked = np.concatenate([rows, random.integers(-100, 100_000, 500), [span.start - 1, span.start, span.stop]])
    assert places.of(asked).tolist() == [known.get(row, -1) for row in asked.tolist()]
    assert places.nbytes <= 8 * max(8 * len(rows), 2 * len(rows))
