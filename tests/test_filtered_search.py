"""Searches with a filter: whatever matches, and wherever it lies, the nearest matches are found, and never too few.

The oracle is brute force over the matches, written out in ``nearest_matches``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import semid_index as semid
from semid_index import contents, metrics, rerank, search
from semid_index.errors import MissingDependencyError, SearchTimeoutError
from semid_index.index import SemanticIndex
from semid_index.search import filtered_budget

N, DIM, K = 60_000, 16, 10
SOME, MANY = 14_900, 30_000  # matches
SHARES = {
    0.0001: "few",
    0.001: "few",
    0.01: "few",
    0.1: "few",
    SOME / N: "some",
    0.25: "many",
    0.5: "many",
    0.9: "many",
}
PLANS = {"few": "because they are few", "some": "only look at the matches", "many": "drop what does not match"}


def stored(index: SemanticIndex, points: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors that an index of its tier compares queries with."""
    tier = index.config.vectors
    if tier == "float16":
        return points.astype(np.float16).astype(np.float32)
    if tier == "int8":
        steps = np.abs(points).max(axis=1, keepdims=True) / 127
        return np.rint(points / steps) * steps
    return index.decode(index.encode(points)) if tier == "none" else points


def nearest_matches(
    index: SemanticIndex, points: NDArray[np.float32], queries: NDArray[np.float32], mine: NDArray[Any], k: int = K
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Brute force: ids and distances of the k nearest of the items ``mine``."""
    rows, near = metrics.exact_search(queries, stored(index, points[mine]), k, index.config.metric)
    return mine[rows], near


def assert_found(
    index: SemanticIndex, points: NDArray[np.float32], queries: NDArray[np.float32], mine: NDArray[Any], result: Any
) -> float:
    """Each query has min(k, matches) hits, all different, all matches, at their true distances. Gives the recall."""
    k = result.trace.k
    mine = np.flatnonzero(mine) if mine.dtype == bool else mine
    true, near = nearest_matches(index, points, queries, mine, k)
    allowed = set(mine.tolist())
    assert result.trace.matches == len(allowed)
    kept = stored(index, points)
    for query, ids, distances in zip(queries, result.ids, result.distances, strict=True):
        assert len(ids) == min(k, len(allowed))
        assert set(ids.tolist()) <= allowed
        assert len(set(ids.tolist())) == len(ids)
        expected = metrics.paired_distances(query[None], kept[ids][None], index.config.metric)[0]
        np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-6 * max(1, np.abs(near).max(initial=0)))
        assert (np.diff(distances) >= 0).all()
    if not true.shape[1]:
        return 1.0
    return float(np.mean([np.isin(row, ids).mean() for row, ids in zip(true, result.ids, strict=True)]))


@pytest.fixture(scope="module")
def points(clustered: Any) -> NDArray[np.float32]:
    return clustered(N + 60, DIM)


@pytest.fixture(scope="module")
def queries(points: NDArray[np.float32]) -> NDArray[np.float32]:
    return points[N:]


@pytest.fixture(scope="module")
def numbers() -> NDArray[np.int64]:
    """A column of which any share of the items, spread at random, can be taken: 0 to N - 1 in any order."""
    return np.random.default_rng(5).permutation(N)


def metadata(points: NDArray[np.float32], numbers: NDArray[np.int64]) -> dict[str, Any]:
    words = np.array([None if number % 7 == 0 else f"word {number % 11}" for number in numbers], dtype=object)
    return {"number": numbers, "x": points[:N, 0].astype(np.float64), "word": words.tolist(), "ok": numbers % 2 == 0}


@pytest.fixture(scope="module")
def indexes(points: Any, numbers: Any) -> Iterator[dict[str, SemanticIndex]]:
    """One for each metric."""
    with ExitStack() as stack:
        made = {}
        for metric in ("l2", "cosine", "ip"):
            index = semid.create(dim=DIM, metric=metric, levels=3, codebook_size=32, leaf_size=128)
            made[metric] = stack.enter_context(index)
            index.train(points[:20_000])
            index.add(points[:N], metadata=metadata(points, numbers))
        yield made


@pytest.fixture(params=["l2", "cosine", "ip"])
def index(request: Any, indexes: dict[str, SemanticIndex]) -> SemanticIndex:
    return indexes[request.param]


@pytest.fixture
def l2(indexes: dict[str, SemanticIndex]) -> SemanticIndex:
    return indexes["l2"]


# --- how the matches are searched ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "kind"), SHARES.items())
def test_the_nearest_matches_are_found_however_many_match(index, points, queries, numbers, share, kind):
    result = index.search(queries, K, where="number < ?", params=[int(share * N)], rerank=400)
    assert assert_found(index, points, queries, numbers < int(share * N), result) >= 0.95
    assert PLANS[kind] in result.trace.plan
    exact = index.search(queries, K, where="number < ?", params=[int(share * N)], exact=True)
    assert assert_found(index, points, queries, numbers < int(share * N), exact) >= 0.999


def test_one_query_finds_what_it_finds_in_a_batch(index, queries, numbers):
    for limit in (100, SOME, MANY):
        batch = index.search(queries, K, where={"number": {"<": limit}})
        for row, query in enumerate(queries[:5]):
            one = index.search(query, K, where={"number": {"<": limit}})
            assert one.ids.tolist() == batch.ids[row].tolist()
            assert one.trace.plan == batch.trace.plan


def test_three_plans_say_what_they_do_and_why(l2, queries):
    leaves = l2.explain(queries[0]).leaves
    few = l2.explain(queries[0], where="number < 240")
    assert few.plan == "240 of 60,000 items match: distances to all of them, because they are few"
    assert (few.matches, few.reranked, few.probed, few.executor) == (240, 240, 0, "brute force")

    some = l2.explain(queries[0], where="number < 14900")
    budget = filtered_budget(SOME, N)
    holding = np.unique(l2._live.now().states[0].leaves.starts.searchsorted(_positions(l2, SOME), side="right"))
    assert some.plan == (
        f"14,900 of 60,000 items match, in {len(holding):,} of {leaves:,} leaves: open the best of these until they "
        f"hold {budget:,} matches, and only look at the matches"
    )
    assert budget <= some.candidates < budget + 128
    assert some.reranked == some.candidates
    assert some.executor == "faiss-flat"
    assert some.probed == len(some.probes) or len(some.probes) == 64

    many = l2.explain(queries[0], where="number < 30000")
    scan = f"scan the best of {leaves:,} leaves and drop what does not match, because many do"
    assert many.plan == f"30,000 of 60,000 items match: {scan}"
    assert many.reranked == 100
    assert many.executor in ("native", "faiss-tail")
    assert filtered_budget(MANY, N) <= many.candidates < MANY

    exact = l2.explain(queries[0], where="number < 30000", exact=True)
    assert exact.plan == "30,000 of 60,000 items match: distances to all of them, because exact=True"
    assert "until 7 are open" in l2.explain(queries[0], where="number < 14900", probes=7).plan


def _positions(index: SemanticIndex, limit: int) -> NDArray[np.int64]:
    """Where in the order of the IDs the items with smaller numbers are."""
    rows = index.sql(
        "SELECT row_number() OVER (ORDER BY s.sid, s.id) - 1 AS place, i.number "
        "FROM semantic_ids s JOIN items i USING (id)"
    ).fetchnumpy()
    return np.asarray(rows["place"][rows["number"] < limit])


def test_leaves_without_matches_are_not_opened(l2, points, queries):
    """Matches in one corner of space: a search for something far away opens their leaves and no others."""
    x = np.sort(points[:N, 0])
    limit = float(x[SOME])
    mine = points[:N, 0] < limit
    trace = l2.explain(queries[0], where="x < ?", params=[limit])
    assert trace.matches == mine.sum()
    holding = int(trace.plan.split(" in ")[1].split(" of ")[0].replace(",", ""))
    assert holding < trace.leaves
    assert trace.probed <= holding


@pytest.mark.parametrize("matches", [SOME, MANY])
def test_matches_in_a_region_far_from_the_query(index, points, queries, matches):
    """The search has to widen past all that is near, and then finds what it would find without its surroundings."""
    limit = float(np.sort(points[:N, 0])[matches])
    mine = np.flatnonzero(points[:N, 0] < limit)
    far = queries[queries[:, 0] > np.median(points[:N, 0])]
    assert len(far) >= 10
    result = index.search(far, K, where="x < ?", params=[limit], rerank=400)
    assert assert_found(index, points, far, mine, result) >= 0.95


@pytest.mark.parametrize("matches", [3_000, SOME, MANY])
def test_the_farthest_items_match(index, points, queries, matches):
    """All around the query and at almost the same distance, so that no leaf is better than another: the worst case."""
    recalls = []
    for query in queries[:4]:
        far = np.sort(metrics.exact_search(query[None], points[:N], N, index.config.metric)[0][0, -matches:])
        result = index.search(query[None], K, where="id IN ?", params=[far])
        recalls.append(assert_found(index, points, query[None], far, result))
        everything = index.search(query[None], K, where="id IN ?", params=[far], probes=10**6)
        assert assert_found(index, points, query[None], far, everything) >= 0.999
    assert np.mean(recalls) >= (0.999 if matches == 3_000 else 0.4)


def test_all_matches_in_one_shelf(l2, points, queries):
    """As where a shelf is searched: the matches are a contiguous part of the index."""
    shelf = l2.tree()[0]
    mine = np.sort(l2.prefix(shelf.prefix)["id"].to_numpy())
    result = l2.search(queries, K, where="c1 = ?", params=[shelf.prefix[0]])
    assert assert_found(l2, points, queries, mine, result) >= 0.95


def test_all_matches_in_one_leaf(points, queries):
    """10,000 items that share an ID are one leaf, however small leaves should be."""
    same = np.repeat(points[:1], 10_000, axis=0) + np.linspace(0, 1e-3, 10_000, dtype=np.float32)[:, None]
    everything = np.concatenate([points[:4_000], same])
    with semid.create(dim=DIM, levels=1, codebook_size=16, leaf_size=64) as index:
        index.train(points[:4_000])
        index.add(everything, metadata={"part": np.repeat([0, 1], [4_000, 10_000])})
        for where, mine in [("part = 1", np.arange(4_000, 14_000)), ("part = 1 AND id % 3 = 0", None)]:
            mine = np.arange(4_000, 14_000)[np.arange(4_000, 14_000) % 3 == 0] if mine is None else mine
            result = index.search(queries[:5], K, where=where)
            near = nearest_matches(index, everything, queries[:5], mine)[1]
            np.testing.assert_allclose(result.distances, near, rtol=1e-4)
            assert all(np.isin(ids, mine).all() for ids in result.ids)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("word IS NULL", lambda n: n % 7 == 0),
        ("word = 'word 3'", lambda n: (n % 7 != 0) & (n % 11 == 3)),
        ("NOT (word = 'word 3')", lambda n: (n % 7 != 0) & (n % 11 != 3)),
        ("word = 'word 3' OR word IS NULL", lambda n: (n % 7 == 0) | (n % 11 == 3)),
        ("word IN ('word 1', NULL)", lambda n: (n % 7 != 0) & (n % 11 == 1)),
        ("word NOT IN ('word 1', NULL)", lambda n: n < 0),
        ("ok AND word IS DISTINCT FROM 'word 2'", lambda n: (n % 2 == 0) & ((n % 7 == 0) | (n % 11 != 2))),
        ("NULL", lambda n: n < 0),
        ("true", lambda n: n >= 0),
        ("false", lambda n: n < 0),
        ("number = 17", lambda n: n == 17),
        ("number BETWEEN 17 AND 20", lambda n: (n >= 17) & (n <= 20)),
    ],
)
def test_null_is_no_match(l2, points, queries, numbers, where, expected):
    result = l2.search(queries, K, where=where, rerank=400)
    assert assert_found(l2, points, queries, expected(numbers), result) >= 0.95


def test_an_id_that_is_named_twice_is_one_match(l2, points, queries):
    result = l2.search(queries, K, where="id IN ?", params=[[5, 5, 5, 9, 5, 9, 10**9]])
    assert assert_found(l2, points, queries, np.array([5, 9]), result) == 1
    result = l2.search(queries, K, where="id = 5 OR id IN (5, 9)")
    assert assert_found(l2, points, queries, np.array([5, 9]), result) == 1


@pytest.mark.parametrize("limit", [0, 4, 300, SOME, MANY, N])
@pytest.mark.parametrize("k", [1, 5, 1_000, N + 1])
def test_min_k_matches_rows_come_back(l2, points, queries, numbers, limit, k):
    for options in ({}, {"probes": 1}):
        result = l2.search(queries[:3], k, where="number < ?", params=[limit], **options)
        assert_found(l2, points, queries[:3], numbers < limit, result)


def test_of_items_that_are_equal_the_same_are_found_by_one_query_and_by_many(points):
    """Many items are as near as the last hit: which of them come back depends on neither."""
    same = np.repeat(points[:20], 50, axis=0)
    with semid.create(dim=DIM, levels=2, codebook_size=8) as index:
        index.train(points[:1_000])
        index.add(same, metadata={"number": np.arange(len(same))})
        batch = index.search(points[:20], 7, where="number % 3 = 0")
        for row, query in enumerate(points[:20]):
            assert index.search(query, 7, where="number % 3 = 0").ids.tolist() == batch.ids[row].tolist()


# --- what is searched ------------------------------------------------------------------------------------------------

QUANTIZERS: dict[str, dict[str, Any]] = {
    "pq": {"levels": 4, "codebook_size": 16},
    "sq8": {},
}


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("tier", ["float16", "int8", "none"])
def test_tiers_in_memory_and_in_the_file(points, queries, numbers, metric, tier, tmp_path):
    path = tmp_path / "tier.duckdb"
    with semid.create(path, dim=DIM, metric=metric, levels=3, codebook_size=32, leaf_size=64, vectors=tier) as index:
        index.train(points[:N])
        index.add(points[:N], metadata={"number": numbers})
    for where_from in ("memory", "file"):
        with semid.open(path, read_only=True, vectors_in=where_from) as index:
            for limit in (100, SOME, MANY):
                result = index.search(queries[:8], K, where="number < ?", params=[limit], rerank=1_000)
                exact = index.search(queries[:8], K, where="number < ?", params=[limit], exact=True)
                assert_found(index, points, queries[:8], numbers < limit, result)
                last = np.array(exact.distances)[:, -1:]
                near = np.array(result.distances) <= last + 1e-5 * (1 + np.abs(last))
                assert near.mean() >= 0.9  # by distance, for many items decode to the same


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_without_a_hierarchy(points, queries, numbers, quantizer, metric):
    n = 12_000
    with semid.create(dim=DIM, metric=metric, quantizer=quantizer, leaf_size=64, **QUANTIZERS[quantizer]) as index:
        index.train(points[:n])
        index.add(points[:n], metadata={"number": np.arange(n)})
        for limit in (0, 5, 100, 6_000, 11_000):
            result = index.search(queries, K, where="number < ?", params=[limit])
            assert assert_found(index, points, queries, np.arange(limit), result) >= 0.95


def test_without_faiss_the_same_is_found(l2, queries, monkeypatch, caplog):
    expected = {n: l2.search(queries, K, where={"number": {"<": n}}, rerank=1_000) for n in (300, SOME, MANY)}

    def missing() -> Any:
        raise MissingDependencyError("FAISS is needed.")

    monkeypatch.setattr(rerank, "import_faiss", missing)
    monkeypatch.setenv("SEMID_NATIVE", "0")
    l2._live.forget()
    for limit, result in expected.items():
        got = l2.search(queries, K, where={"number": {"<": limit}})
        assert got.trace.executor in ("numpy", "brute force")
        same = [np.isin(a, b).mean() for a, b in zip(result.ids, got.ids, strict=True)]
        assert np.mean(same) >= 0.97
    l2._live.forget()


def test_blocks_of_a_copy_may_split_lists(l2, points, queries, numbers, monkeypatch):
    """What is copied at once is limited; where the limit falls changes nothing."""
    expected = l2.search(queries, K, where="number < 14900")
    monkeypatch.setattr(rerank, "_LIST_BYTES", 4 * DIM * 37)
    got = l2.search(queries, K, where="number < 14900")
    assert np.array_equal(got.flat_ids, expected.flat_ids)
    np.testing.assert_array_equal(got.flat_distances, expected.flat_distances)


# --- which items match -----------------------------------------------------------------------------------------------

# What a user may do to the table of the metadata between two searches.
CHANGES = [
    "UPDATE items SET number = number + 1",
    "DELETE FROM items WHERE number % 3 = 0",
    "INSERT INTO items SELECT id, number FROM removed ORDER BY number DESC",
    "CREATE OR REPLACE TABLE items AS FROM items ORDER BY number DESC",
    "INSERT INTO items SELECT id, 1 FROM items LIMIT 10",  # a second row for the same item
    "INSERT INTO items (id, number) VALUES ('-1', 3)",  # an item that has no vector
    "UPDATE items SET id = CASE id WHEN '1' THEN '2' WHEN '2' THEN '1' ELSE id END",
    "CHECKPOINT",
]


def matching_ids(index: SemanticIndex, where: str) -> list[str]:
    """By a join, which needs nothing but the two tables."""
    joined = f"SELECT id FROM semid_codes SEMI JOIN (SELECT id FROM items WHERE {where}) USING (id)"
    return sorted(str(id) for (id,) in index.sql(joined).fetchall())


@pytest.mark.parametrize(("kind", "most_moved"), [(int, 1_000), (str, 50)])
def test_matches_are_those_of_the_table_whatever_is_done_to_it(points, kind, most_moved, tmp_path, monkeypatch):
    """Searches remember which item is where in the table; they never go by that once it has become wrong."""
    monkeypatch.setattr(contents, "_MOST_MOVED", most_moved)

    def check(index: SemanticIndex) -> None:
        for where in ("number < 40", "number % 2 = 0", f"id IN ({', '.join(repr(kind(n)) for n in (1, 5, 900))})"):
            hits = index.search(points[0], 2_000, where=where)
            assert sorted(map(str, hits.ids.tolist())) == matching_ids(index, where)

    with semid.create(tmp_path / "changed.duckdb", dim=DIM, levels=2, codebook_size=8) as index:
        index.train(points[:1_000])
        index.add(points[:600], [kind(n) for n in range(600)], metadata={"number": np.arange(600)})
        index.sql("CREATE TABLE removed AS SELECT * FROM items WHERE (number + 1) % 3 = 0")
        for change in ["SELECT 1", *CHANGES]:
            index.sql(change)
            for _ in range(7):  # 21 searches: by a join, and by what is remembered anew
                check(index)
            assert index._store._item_places is not None, "nothing is remembered or tested"
        for write in (
            lambda: index.add(points[600:999], [kind(n) for n in range(600, 999)], metadata={"number": np.arange(399)}),
            lambda: index.upsert(points[:50] + 1, [kind(n) for n in range(950, 1_000)]),
            lambda: index.delete([kind(n) for n in range(0, 900, 5)]),
        ):
            write()
            for _ in range(7):
                check(index)


def test_a_column_may_be_called_rowid(points):
    with semid.create(dim=DIM, levels=2, codebook_size=8) as index:
        index.train(points[:1_000])
        index.add(points[:500], metadata={"RowId": np.arange(500)[::-1], "number": np.arange(500)})
        for _ in range(20):
            assert sorted(index.search(points[0], 9, where="number < 3").ids.tolist()) == [0, 1, 2]
            assert sorted(index.search(points[0], 9, where="rowid < 3").ids.tolist()) == [497, 498, 499]


# --- time ------------------------------------------------------------------------------------------------------------

SLOW = "regexp_matches(word, 'a.{50}c')"  # a quarter of a millisecond for each text of 100 letters


@pytest.fixture(scope="module")
def wordy(points: NDArray[np.float32]) -> Iterator[SemanticIndex]:
    """20,000 items with texts of 100 letters."""
    random = np.random.default_rng(0)
    texts = ["".join(letters) for letters in random.choice(["a", "b"], (20_000, 100)).tolist()]
    with semid.create(dim=DIM, levels=2, codebook_size=16) as index:
        index.train(points[:N])
        index.add(points[:20_000], metadata={"word": texts})
        index.search(points[0])  # reads what searches need, which the time limit of a filter is not about
        yield index


def test_a_filter_that_takes_too_long_is_stopped(wordy, queries):
    started = time.perf_counter()
    with pytest.raises(SearchTimeoutError, match=r"not evaluated within 0\.\d+ s. Make it simpler, or allow more"):
        wordy.search(queries[0], where=SLOW, timeout=0.2)
    assert time.perf_counter() - started < 10  # DuckDB looks at the clock every 2,048 rows
    assert len(wordy.search(queries[0], where="length(word) > 0", timeout=60)) == K, "nothing is left of it"


def test_a_filter_has_a_time_limit_without_a_timeout(wordy, queries, monkeypatch):
    monkeypatch.setattr(search, "_FILTER_SECONDS", 0.1)
    with pytest.raises(SearchTimeoutError, match=r"within 0\.1 s"):
        wordy.search(queries[0], where=SLOW)


def test_a_timeout_that_is_over_before_the_filter_begins(l2, queries):
    with pytest.raises(SearchTimeoutError):
        l2.search(queries[0], where="number < 3", timeout=1e-9)
