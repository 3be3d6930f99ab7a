"""From vectors to hits and back: every quantizer, metric and tier, in one process and the next, against brute force.

The oracle is written out here in float64, apart from the package: what a tier keeps of a vector, and three distances.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import semid_index as semid
from semid_index import metrics
from semid_index.errors import SearchTimeoutError
from semid_index.index import SemanticIndex
from semid_index.records import SearchResult

pytest.importorskip("faiss", reason="training needs FAISS")

DIM, K = 24, 10
QUANTIZERS: dict[str, dict[str, Any]] = {
    "rq": {"levels": 3, "codebook_size": [16, 10, 16]},
    "balanced-rq": {"levels": 3, "codebook_size": 16},
    "pq": {"levels": 4, "codebook_size": 16},
    "sq8": {},
    "sq4": {},
}
METRICS = ("l2", "cosine", "ip")
# tier -> by how much a stored number may differ from the one given, as a share of the vector's largest number
TIERS = {"float32": 0.0, "float16": 2**-11, "int8": 1 / 254, "none": None}
# metric -> how far a distance may be from the oracle's, absolutely; relatively 1e-5 is allowed beside it
ROUNDING = {"l2": 1e-4, "cosine": 2e-6, "ip": 2e-3}
FEWEST_FOUND = 0.99  # of the true nearest, where every item is a candidate
# metric -> the same, where a third of the items are candidates and one in a hundred of them is re-ranked; by inner
# product, long vectors are near, and the short codes that are scanned first tell their lengths less well
FEWEST_FOUND_OF_MANY = {"l2": 0.95, "cosine": 0.95, "ip": 0.9}

Floats = NDArray[np.float64]


def kept(tier: str, vectors: NDArray[np.float32], index: SemanticIndex) -> Floats:
    """The vectors that an index of this tier compares queries with."""
    if tier == "float16":
        return vectors.astype(np.float16).astype(np.float64)
    if tier == "int8":
        steps = np.abs(vectors).max(axis=1, keepdims=True).astype(np.float64) / 127
        return np.rint(vectors / steps) * steps
    return (index.decode(index.encode(vectors)) if tier == "none" else vectors).astype(np.float64)


def distances64(metric: str, queries: NDArray[Any], vectors: NDArray[Any]) -> Floats:
    """Every distance, straight from its definition: (q, n)."""
    queries, vectors = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return np.sqrt(((queries[:, None] - vectors[None]) ** 2).sum(axis=2))
    products = (queries[:, None] * vectors[None]).sum(axis=2)
    if metric == "ip":
        return -products
    return 1 - products / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)[None]


def assert_true_distances(metric: str, truth: Floats, result: SearchResult) -> None:
    """Each hit of each query occurs once, has the distance it has in ``truth`` (q, n), and comes in order."""
    for row, ids, distances in zip(truth, result.ids, result.distances, strict=True):
        np.testing.assert_allclose(distances, row[ids], rtol=1e-5, atol=ROUNDING[metric])
        assert len(set(ids.tolist())) == len(ids)
        assert (np.diff(distances) >= 0).all()


def assert_nearest(metric: str, truth: Floats, result: SearchResult, k: int) -> None:
    """The hits are the k nearest; where two are equally near, to rounding, either will do."""
    assert_true_distances(metric, truth, result)
    nearest = np.sort(truth, axis=1)[:, :k]
    assert [len(ids) for ids in result.ids] == [nearest.shape[1]] * len(truth)
    np.testing.assert_allclose(np.stack(result.distances), nearest, rtol=1e-5, atol=ROUNDING[metric])


def share_found(truth: Floats, result: SearchResult, k: int) -> float:
    """Recall, by distance so that ties are fair."""
    limits = np.sort(truth, axis=1)[:, k - 1]
    limits += 1e-6 * np.abs(limits) + 1e-6
    found = [(row[ids] <= limit).sum() for row, ids, limit in zip(truth, result.ids, limits, strict=True)]
    return float(np.mean(found)) / k


# ------------------------------------------------------------ every quantizer, metric and tier, across processes


@dataclass(frozen=True)
class Case:
    """One index, open for reading, and the true distances (q, n) of ``queries`` to what it keeps of ``vectors``."""

    metric: str
    quantizer: str
    tier: str
    path: Path
    index: SemanticIndex
    truth: Floats


@pytest.fixture(scope="module", params=[(m, q) for q in QUANTIZERS for m in METRICS], ids="-".join)
def cases(request, vectors, queries, tmp_path_factory) -> Iterator[dict[str, Case]]:
    """For one metric and quantizer, an index of each tier: tier -> case."""
    metric, quantizer = request.param
    folder = tmp_path_factory.mktemp("flow")
    numbers = {"number": np.arange(len(vectors)), "parity": ["even", "odd"] * (len(vectors) // 2)}
    built = {}
    for tier in TIERS:
        path = folder / f"{tier}.duckdb"
        with semid.create(
            path, dim=DIM, metric=metric, quantizer=quantizer, vectors=tier, **QUANTIZERS[quantizer]
        ) as it:
            it.train(vectors)
            it.add(vectors, metadata=numbers, batch_size=700)
        index = semid.open(path, read_only=True)
        truth = distances64(metric, queries, kept(tier, vectors, index))
        built[tier] = Case(metric, quantizer, tier, path, index, truth)
    yield built
    for each in built.values():
        each.index.close()


@pytest.fixture(params=TIERS)
def case(request, cases) -> Case:
    return cases[request.param]


SEARCH = """
import json, sys
import numpy as np
import semid_index as semid

def search(index, queries):
    found, exact = index.search(queries, k=10), index.search(queries, k=10, exact=True)
    return {
        "ids": np.stack(found.ids).tolist(),
        "distances": np.stack(found.distances).tolist(),
        "semantic_ids": np.stack(found.semantic_ids).tolist(),
        "exact": np.stack(exact.ids).tolist(),
        "codes": index.encode(queries).tolist(),
        "items": len(index),
        "config": [index.config.dim, index.config.metric, index.config.quantizer, index.config.vectors],
    }
"""
SEARCH_THERE = (
    SEARCH
    + """
results = []
for path in sys.argv[2:]:
    with semid.open(path, read_only=True) as index:
        results.append(search(index, np.load(sys.argv[1])))
print(json.dumps(results))
"""
)


def test_another_process_finds_the_same(cases, queries, tmp_path, run_python):
    np.save(tmp_path / "queries.npy", queries)
    search_here: dict[str, Any] = {}
    exec(SEARCH, search_here)
    results = json.loads(run_python(SEARCH_THERE, tmp_path / "queries.npy", *(case.path for case in cases.values())))
    for case, there in zip(cases.values(), results, strict=True):
        here = search_here["search"](case.index, queries)
        np.testing.assert_allclose(there["distances"], here["distances"], rtol=1e-6, atol=1e-7)
        same = {"semantic_ids", "codes", "items", "config"}
        if case.tier != "none":  # decoded, items that share an ID are equally near, in whatever order
            same |= {"ids", "exact"}
        assert {name: there[name] for name in same} == {name: here[name] for name in same}
        assert there["items"] == 2_000
        assert there["config"] == [DIM, case.metric, case.quantizer, case.tier]


def test_reopened_it_finds_what_it_found_when_it_was_built(tmp_path, vectors, queries):
    path = tmp_path / "x.duckdb"
    with semid.create(path, dim=DIM, levels=3, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors)
        before = index.search(queries, k=K)
    with semid.open(path) as index:
        after = index.search(queries, k=K)
    assert np.array_equal(after.flat_ids, before.flat_ids)
    assert np.array_equal(after.flat_distances, before.flat_distances)
    assert np.array_equal(after.flat_semantic_ids, before.flat_semantic_ids)


def test_hits_have_their_true_distances_and_are_nearly_all(case, queries):
    result = case.index.search(queries, k=K)
    assert_true_distances(case.metric, case.truth, result)
    assert [len(ids) for ids in result.ids] == [K] * len(queries)
    assert share_found(case.truth, result, K) >= FEWEST_FOUND
    assert result.trace.distances == ("decoded" if case.tier == "none" else "exact")


def test_exact_search_is_brute_force(case, queries):
    assert_nearest(case.metric, case.truth, case.index.search(queries, k=K, exact=True), K)


def test_the_oracle_of_the_package_says_the_same(case, vectors, queries):
    """``metrics`` in float32 against the definitions in float64, over what the index returns."""
    stored = np.stack(case.index.get(range(2_000), vectors=True)["vector"].to_numpy(zero_copy_only=False))
    rows, distances = metrics.exact_search(queries, stored, K, case.metric)
    np.testing.assert_allclose(
        distances, np.take_along_axis(case.truth, rows, axis=1), rtol=1e-4, atol=ROUNDING[case.metric]
    )
    np.testing.assert_allclose(distances, np.sort(case.truth, axis=1)[:, :K], rtol=1e-4, atol=ROUNDING[case.metric])


def test_get_gives_the_vectors_to_the_precision_of_the_tier(case, vectors):
    wanted = [7, 1_999, 0, 7]
    table = case.index.get(wanted, vectors=True)
    assert table["id"].to_pylist() == wanted
    assert table["number"].to_pylist() == wanted
    got = np.stack(table["vector"].to_numpy(zero_copy_only=False))
    assert got.dtype == np.float32
    if case.tier == "none":
        assert np.array_equal(got, case.index.decode(case.index.encode(vectors[wanted])))
    else:
        largest = np.abs(vectors[wanted]).max(axis=1, keepdims=True)
        assert (np.abs(got - vectors[wanted]) <= TIERS[case.tier] * largest * (1 + 1e-5)).all()


def test_more_hits_than_items(case, queries):
    assert_nearest(case.metric, case.truth, case.index.search(queries, k=3_000), 2_000)
    assert_nearest(case.metric, case.truth, case.index.search(queries, k=3_000, exact=True), 2_000)


def test_one_query_is_a_batch_of_one(case, queries):
    batch = case.index.search(queries, k=K)
    for row, query in enumerate(queries):
        one = case.index.search(query, k=K)
        assert one.ids.tolist() == batch.ids[row].tolist()
        np.testing.assert_allclose(one.distances, batch.distances[row], rtol=1e-5, atol=ROUNDING[case.metric])
        assert one.semantic_ids.tolist() == batch.semantic_ids[row].tolist()
        assert one.scores.tolist() == (-one.distances).tolist()
    assert len(batch) == len(queries)
    assert batch.to_arrow().num_rows == K * len(queries)


def test_semantic_ids_of_hits_are_those_in_sql(case, queries):
    result = case.index.search(queries, k=K)
    in_sql = dict(case.index.sql("SELECT id, semantic_id FROM semantic_ids").fetchall())
    for ids, semantic_ids in zip(result.ids, result.semantic_ids, strict=True):
        assert [in_sql[id] for id in ids.tolist()] == semantic_ids.tolist()


FILTERS: dict[str, tuple[str, list[Any], Any]] = {
    "none match": ("number < 0", [], lambda n: n < 0),
    "one matches": ("number = ?", [1_234], lambda n: n == 1_234),
    "fewer than k": ("number BETWEEN ? AND 1004", [1_000], lambda n: (n >= 1_000) & (n <= 1_004)),
    "half": ("parity = ?", ["odd"], lambda n: n % 2 == 1),
    "all": ("number >= 0", [], lambda n: n >= 0),
}


def test_a_filter_gives_the_nearest_of_what_fulfils_it(case, queries):
    for where, params, fulfils in FILTERS.values():
        fulfilled = fulfils(np.arange(2_000))
        truth = np.where(fulfilled, case.truth, np.inf)
        result = case.index.search(queries, k=K, where=where, params=params)
        assert_nearest(case.metric, truth, result, min(K, int(fulfilled.sum())))
        assert result.trace.matches == fulfilled.sum()


def test_similar_leaves_the_item_itself_out(case, vectors):
    for item in (0, 7, 1_999):
        stored = kept(case.tier, vectors, case.index)
        truth = distances64(case.metric, stored[[item]], stored)
        truth[0, item] = np.inf
        found = case.index.similar(item, k=5, exact=True)
        np.testing.assert_allclose(found.distances, np.sort(truth[0])[:5], rtol=1e-4, atol=2 * ROUNDING[case.metric])
        np.testing.assert_allclose(found.distances, truth[0, found.ids], rtol=1e-4, atol=2 * ROUNDING[case.metric])
        assert item not in found.ids
        assert len(case.index.similar(item, k=5).ids) == 5
        assert found.semantic_ids.shape == (5,)


def test_vectors_left_in_the_file_give_the_same(cases, queries):
    for tier, case in cases.items():
        with semid.open(case.path, read_only=True, vectors_in="file") as in_file:
            for options in ({}, {"exact": True}, {"where": "parity = 'odd'"}):
                expected, got = case.index.search(queries, k=K, **options), in_file.search(queries, k=K, **options)
                assert np.array_equal(got.ids, expected.ids), tier
                np.testing.assert_allclose(
                    got.flat_distances, expected.flat_distances, rtol=1e-5, atol=ROUNDING[case.metric]
                )
            if tier != "none":
                assert in_file.stats()["memory_bytes"]["vectors"] == 0
                assert case.index.stats()["memory_bytes"]["vectors"] > 0


def test_sql_alone_finds_the_same(cases, queries):
    """The stored vectors and DuckDB's own functions; float16 has no type in DuckDB."""
    for tier, vector in {"float32": "v", "int8": f"[x * scale FOR x IN v]::FLOAT[{DIM}]"}.items():
        case = cases[tier]
        function = metrics.SQL_FUNCTIONS[case.metric]
        statement = f"SELECT {function}({vector}, ?::FLOAT[{DIM}]) AS d FROM semid_codes JOIN semid_vectors USING (row)"
        for row in (0, 7):
            found = case.index.sql(f"{statement} ORDER BY d LIMIT {K}", params=[queries[row].tolist()]).fetchall()
            in_sql = np.array(found)[:, 0]
            np.testing.assert_allclose(in_sql, np.sort(case.truth[row])[:K], rtol=1e-5, atol=ROUNDING[case.metric])


def test_shelves_and_prefixes_are_what_sql_counts(cases, vectors):
    case = cases["float32"]
    if case.quantizer not in ("rq", "balanced-rq"):
        pytest.skip(f"the codes of {case.quantizer} have no prefixes")
    index, codes = case.index, case.index.encode(vectors)
    for depth in (1, 2, 3):
        shelves = index.tree(depth, examples=2)
        counts = Counter(map(tuple, codes[:, :depth].tolist()))
        assert {shelf.prefix: shelf.items for shelf in shelves} == counts
        assert [shelf.items for shelf in shelves] == sorted(counts.values(), reverse=True)
        assert sum(shelf.items for shelf in shelves) == 2_000
        for shelf in shelves[:3]:
            members = np.flatnonzero((codes[:, :depth] == shelf.prefix).all(axis=1))
            assert list(shelf.examples) == members[:2].tolist()
    first, second = codes[7, :2].tolist()
    assert {shelf.prefix[1]: shelf.items for shelf in index.tree(1, under=f"{first}")} == Counter(
        codes[codes[:, 0] == first, 1].tolist()
    )
    for prefix in ((first,), (first, second), tuple(codes[7].tolist())):
        table = index.prefix(prefix)
        conditions = " AND ".join(f"c{level} = {code}" for level, code in enumerate(prefix, 1))
        in_sql = index.sql(f"SELECT id, semantic_id FROM semantic_ids WHERE {conditions} ORDER BY sid, id").fetchall()
        assert list(zip(table["id"].to_pylist(), table["semantic_id"].to_pylist(), strict=True)) == in_sql
        assert table["number"].to_pylist() == table["id"].to_pylist()
        assert index.prefix("-".join(map(str, prefix)) + "-*").equals(table)
        assert 7 in table["id"].to_pylist()


# ------------------------------------------------------------------------------------------------ special collections


@pytest.fixture(params=QUANTIZERS)
def quantizer(request) -> str:
    return request.param


@pytest.mark.parametrize("tier", TIERS)
def test_an_index_of_one_item(tmp_path, vectors, queries, quantizer, tier):
    path = tmp_path / "x.duckdb"
    with semid.create(path, dim=DIM, quantizer=quantizer, vectors=tier, **QUANTIZERS[quantizer]) as index:
        index.train(vectors)
        index.add(vectors[:1], ["only"])
    with semid.open(path) as index:
        truth = distances64("l2", queries, kept(tier, vectors[:1], index))
        for options in ({}, {"exact": True}, {"where": "id = 'only'"}, {"probes": 1}):
            ids, distances = index.search(queries, k=K, **options)
            assert [row.tolist() for row in ids] == [["only"]] * len(queries)
            np.testing.assert_allclose(np.stack(distances), truth, rtol=1e-5, atol=ROUNDING["l2"])
        assert len(index.similar("only")) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_many_items_with_one_vector(vectors, quantizer, metric):
    """300 copies, which share an ID and so a leaf, among others."""
    with semid.create(dim=DIM, metric=metric, quantizer=quantizer, **QUANTIZERS[quantizer]) as index:
        index.train(vectors)
        collection = np.concatenate([np.repeat(vectors[:1], 300, axis=0), vectors[1:500]])
        index.add(collection)
        truth = distances64(metric, vectors[:1], collection)
        for options in ({}, {"exact": True}):
            assert_nearest(metric, truth, index.search(vectors[:1], k=350, **options), 350)
        if metric != "ip":
            assert set(index.search(vectors[0], k=300).ids.tolist()) == set(range(300))
            assert len(set(index.similar(7, k=299).ids.tolist()) & set(range(300))) == 299
        assert len({tuple(code) for code in index.encode(collection[:300]).tolist()}) == 1
        assert index.stats()["items_sharing_an_id"] >= 300


def test_adding_bit_by_bit_is_adding_at_once(tmp_path, vectors, queries, quantizer):
    together, apart = (semid.create(dim=DIM, quantizer=quantizer, **QUANTIZERS[quantizer]) for _ in range(2))
    for index in (together, apart):
        index.train(vectors)
    together.add(vectors)
    for rows in np.array_split(np.arange(2_000), 7):
        assert apart.add(vectors[rows], rows.tolist(), batch_size=100).tolist() == rows.tolist()
        apart.search(queries, k=1)  # what a search keeps in memory must not outlive an add
    for options in ({}, {"exact": True}):
        expected, got = together.search(queries, k=K, **options), apart.search(queries, k=K, **options)
        assert np.array_equal(got.flat_ids, expected.flat_ids)
        assert np.array_equal(got.flat_distances, expected.flat_distances)
    view = "SELECT id, semantic_id, dup_rank FROM semantic_ids ORDER BY id"
    assert apart.sql(view).fetchall() == together.sql(view).fetchall()


def test_ids_longer_than_the_sid(tmp_path, vectors, queries):
    path = tmp_path / "x.duckdb"
    with semid.create(path, dim=DIM, levels=12, codebook_size=64, vectors="none") as index:
        index.train(vectors)
        index.add(vectors)
        codes = index.encode(vectors)
        here = index.search(queries, k=K)
    with semid.open(path) as index:
        truth = distances64("l2", queries, index.decode(codes))
        assert_nearest("l2", truth, index.search(queries, k=K, exact=True), K)
        assert_true_distances("l2", truth, index.search(queries, k=K))
        assert np.array_equal(index.search(queries, k=K).flat_ids, here.flat_ids)
        assert index.get([7])["semantic_id"].to_pylist() == ["-".join(map(str, codes[7].tolist()))]
        assert 7 in index.prefix(codes[7, :11].tolist())["id"].to_pylist()
        assert sum(shelf.items for shelf in index.tree(12)) == 2_000


def test_capacity_holds_for_items_that_are_added_later(tmp_path, vectors):
    path = tmp_path / "x.duckdb"
    options = {"quantizer": "balanced-rq", "levels": 2, "codebook_size": 16, "capacity": 1.05}
    with semid.create(path, dim=DIM, **options) as index:
        index.train(vectors)
        index.add(vectors[:800], batch_size=300)
    with semid.open(path) as index:
        index.add(vectors[800:], batch_size=300)
        for level in ("c1", "c2"):
            counts = [n for (n,) in index.sql(f"SELECT count(*) FROM semantic_ids GROUP BY {level}").fetchall()]
            assert max(counts) <= np.ceil(1.05 * 2_000 / 16)
            assert sum(counts) == 2_000
        natural = np.bincount(index.encode(vectors)[:, 0], minlength=16)
        assert natural.max() > np.ceil(1.05 * 2_000 / 16), "without the limit, some code would have more"


# ------------------------------------------------------------------------------------ larger, so that leaves matter


@pytest.fixture(scope="module", params=METRICS)
def large(request, clustered) -> Iterator[tuple[str, SemanticIndex, NDArray[np.float32], NDArray[np.float32], Floats]]:
    """12,000 items of 16 dimensions, of which a search looks at a third: metric, index, vectors, queries, truth."""
    points = clustered(12_040, 16)
    vectors, queries = points[:12_000], points[12_000:]
    with semid.create(dim=16, metric=request.param, levels=3, codebook_size=32) as index:
        index.train(vectors)
        index.add(vectors, metadata={"number": np.arange(12_000)})
        yield request.param, index, vectors, queries, distances64(request.param, queries, vectors)


def test_a_search_that_opens_only_some_leaves(large):
    metric, index, _, queries, truth = large
    result = index.search(queries, k=K)
    assert result.trace.candidates < 8_000
    assert result.trace.probed < result.trace.leaves
    assert_true_distances(metric, truth, result)
    assert share_found(truth, result, K) >= FEWEST_FOUND_OF_MANY[metric]
    assert share_found(truth, index.search(queries, k=K, rerank=2_000), K) >= 0.95
    assert_nearest(metric, truth, index.search(queries, k=K, exact=True), K)


def test_a_filter_that_many_items_fulfil(large):
    metric, index, _, queries, truth = large
    result = index.search(queries, k=K, where="number % 10 > 0")
    assert (result.trace.matches, result.trace.plan) == (
        10_800,
        f"10,800 of 12,000 items match: scan the best of {result.trace.leaves} leaves and drop what does not match, "
        "because many do",
    )
    fulfilled = np.where(np.arange(12_000) % 10 > 0, truth, np.inf)
    assert_true_distances(metric, fulfilled, result)
    assert [len(ids) for ids in result.ids] == [K] * len(queries)
    assert share_found(fulfilled, result, K) >= 0.95


def test_probes_rerank_and_threads(large):
    metric, index, _, queries, truth = large
    opened = [index.search(queries, k=K, probes=probes) for probes in (1, 10, 10**6)]
    assert 1 <= opened[0].trace.probed < 1.5, "a leaf with fewer than k items is not enough for k hits"
    assert opened[1].trace.probed == 10
    assert opened[2].trace.probed == opened[2].trace.leaves
    found = [share_found(truth, result, K) for result in opened]
    assert found[0] < found[1] <= found[2]
    assert found[2] >= FEWEST_FOUND_OF_MANY[metric]
    for result in opened:
        assert_true_distances(metric, truth, result)
    assert_nearest(metric, truth, index.search(queries, k=K, probes=10**6, rerank=12_000), K)
    one = index.search(queries, k=K, threads=1)
    assert np.array_equal(one.flat_ids, index.search(queries, k=K, threads=2).flat_ids)


def test_as_many_hits_as_asked_for_whatever_is_opened(large):
    """Fewer than k only where fewer exist: leaves are opened until there are enough."""
    metric, index, _, queries, truth = large
    for k, options in [
        (500, {"probes": 1}),
        (6_000, {}),
        (20_000, {}),
        (20_000, {"probes": 3}),
        (7_000, {"where": "number < 9000"}),
    ]:
        result = index.search(queries[:3], k=k, **options)
        exist = 9_000 if "where" in options else 12_000
        assert [len(ids) for ids in result.ids] == [min(k, exist)] * 3
        assert_true_distances(metric, truth[:3], result)


def test_the_trace_of_one_query_lists_its_leaves(large):
    _, index, _, queries, _ = large
    trace = index.explain(queries[0], k=K, probes=5)
    assert len(trace.probes) == trace.probed == 5
    assert sum(probe.items for probe in trace.probes) == trace.candidates
    assert [probe.score for probe in trace.probes] == sorted(probe.score for probe in trace.probes)
    assert set(trace.seconds) >= {"load", "lookup", "scan", "rerank", "ids", "total"}
    assert json.loads(json.dumps(trace.to_dict()))["plan"] == f"probe the best of {trace.leaves} leaves"


def test_a_search_that_takes_too_long(large):
    _, index, _, queries, _ = large
    with pytest.raises(SearchTimeoutError, match=r"timeout of 1e-09 s\. Allow more, or ask for fewer probes"):
        index.search(queries, timeout=1e-9)
    assert len(index.search(queries, k=K, timeout=60)) == len(queries)


# ----------------------------------------------------------------------------------------------- ways to give vectors


def write_fvecs(path: Path, vectors: NDArray[np.float32]) -> None:
    with path.open("wb") as file:
        for vector in vectors:
            file.write(struct.pack("<i", len(vector)) + vector.astype("<f4").tobytes())


def write_fbin(path: Path, vectors: NDArray[np.float32]) -> None:
    path.write_bytes(struct.pack("<ii", *vectors.shape) + vectors.astype("<f4").tobytes())


def write_hdf5(path: Path, vectors: NDArray[np.float32]) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["train"] = vectors


def as_lists(vectors: NDArray[np.float32]) -> pa.Table:
    return pa.table({"name": [str(n) for n in range(len(vectors))], "embedding": list(vectors)})


WRITERS = {
    "npy": np.save,
    "parquet": lambda path, vectors: pq.write_table(as_lists(vectors), path, row_group_size=300),
    "fvecs": write_fvecs,
    "fbin": write_fbin,
    "hdf5": write_hdf5,
}


@pytest.mark.parametrize("kind", [*WRITERS, "Arrow table"])
def test_vectors_straight_from_a_file(tmp_path, vectors, queries, kind):
    source: Any = as_lists(vectors)
    if kind in WRITERS:
        source = tmp_path / f"vectors.{kind}"
        WRITERS[kind](source, vectors)
    shape = {"dim": DIM, "levels": 3, "codebook_size": 16}
    with semid.create(**shape) as expected, semid.create(**shape) as got:
        expected.train(vectors)
        got.train(source)
        expected.add(vectors)
        assert got.add(source if kind != "npy" else str(source), batch_size=333).tolist() == list(range(2_000))
        assert np.array_equal(got.encode(vectors), expected.encode(vectors))
        assert np.array_equal(got.search(queries, k=K).flat_ids, expected.search(queries, k=K).flat_ids)
        assert got.get([1_999], vectors=True).equals(expected.get([1_999], vectors=True))


def test_one_seed_gives_one_index(vectors):
    codes = []
    for seed in (0, 0, 1):
        with semid.create(dim=DIM, levels=2, codebook_size=16, seed=seed) as index:
            report = index.train(vectors, sample=500)
            assert report.rows == 500
            codes.append(index.encode(vectors))
    assert np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])


def test_progress_goes_from_nothing_to_all(vectors):
    with semid.create(dim=DIM, levels=3, codebook_size=16) as index:
        for work in (
            lambda tell: index.train(vectors, progress=tell),
            lambda tell: index.add(vectors, batch_size=300, progress=tell),
        ):
            told: list[tuple[int, int, str]] = []
            work(lambda *step, told=told: told.append(step))
            done = [step[0] for step in told]
            assert done == sorted(done)
            assert done[-1] == told[-1][1]
            assert len(told) > 3


def test_the_report_of_training_says_how_much_each_level_leaves(vectors):
    with semid.create(dim=DIM, levels=3, codebook_size=16) as index:
        report = index.train(vectors)
        codes, codebooks = (
            index.encode(vectors),
            [index._quantizer.codebooks[level].astype(np.float64) for level in range(3)],
        )
    left = vectors.astype(np.float64)
    variance = ((left - left.mean(axis=0)) ** 2).sum(axis=1).mean()
    for level, told in enumerate(report.levels):
        left = left - codebooks[level][codes[:, level]]
        counts = np.bincount(codes[:, level], minlength=16)
        shares = counts[counts > 0] / 2_000
        assert told.error == pytest.approx((left**2).sum(axis=1).mean(), rel=1e-4)
        assert told.relative_error == pytest.approx((left**2).sum(axis=1).mean() / variance, rel=1e-4)
        assert told.perplexity == pytest.approx(np.prod(shares**-shares), rel=1e-4)
        assert told.unused == (counts == 0).sum()
