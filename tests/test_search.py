"""The steps of a search and what its trace says of them; hits themselves are compared in test_flow."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import semid_index as semid
from semid_index.errors import InvalidArgumentError, InvalidVectorsError, SearchTimeoutError
from semid_index.metrics import exact_search
from semid_index.search import default_budget, default_rerank, filtered_budget
from semid_index.segments import default_leaf_size


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 16)) * 2
    return (centres[rng.integers(0, 60, 20_000)] + rng.standard_normal((20_000, 16))).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("search") / "index.duckdb"


@pytest.fixture(scope="module")
def index(vectors, path):
    with semid.create(path, dim=16, levels=3, codebook_size=32) as index:
        index.train(vectors)
        index.add(vectors, metadata={"number": np.arange(len(vectors)), "parity": np.arange(len(vectors)) % 2})
        yield index


def recall(hits, truth) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(hits.ids, truth, strict=True)]))


def test_more_probes_find_more_until_all_is_found(index, vectors):
    queries = vectors[:200] + np.float32(0.1)
    truth = exact_search(queries, vectors, 10, "l2")[0]
    leaves = index.explain(queries[0]).leaves
    found = [recall(index.search(queries, 10, probes=probes, rerank=400), truth) for probes in (1, 4, 16, leaves)]
    assert found == sorted(found)
    assert found[0] < 0.9
    assert found[-1] > 0.999
    assert recall(index.search(queries, 10), truth) > 0.95, "what the defaults promise"


@pytest.mark.parametrize("asked", [2**40, 2**64])  # more than memory holds, more than 64 bits hold
@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("vectors_in", ["memory", "file"])
def test_more_than_there_is_means_all_there_is(index, path, vectors, monkeypatch, asked, native, vectors_in):
    """Then every item is compared, as the oracle does it."""
    monkeypatch.setenv("SEMID_NATIVE", native)
    queries, odd = vectors[:20] + np.float32(0.1), np.arange(1, 20_000, 2)
    everything = {"probes": asked, "rerank": asked}
    with semid.open(path, vectors_in=vectors_in) as opened:
        rows, distances = exact_search(queries, vectors, 5, "l2")
        hits = opened.search(queries, 5, **everything)
        assert np.array_equal(hits.ids, rows)
        np.testing.assert_allclose(hits.distances, distances, rtol=1e-3)
        assert hits.trace.reranked == hits.trace.candidates == 20_000
        assert np.array_equal(opened.search(queries[0], 5, **everything).ids, rows[0])
        rows = odd[exact_search(queries, vectors[odd], 5, "l2")[0]]
        assert np.array_equal(opened.search(queries, 5, where="parity = 1", **everything).ids, rows)
        assert len(opened.search(queries[0], asked)) == 20_000


def test_the_trace_counts_what_was_done(index, vectors):
    trace = index.explain(vectors[3], k=5, probes=7)
    assert trace.probed == len(trace.probes) == 7
    assert trace.candidates == sum(probe.items for probe in trace.probes)
    assert trace.reranked == min(default_rerank(5), trace.candidates)
    assert trace.distances == "exact"
    assert trace.executor in ("native", "faiss-tail")
    assert trace.matches is None
    assert set(trace.seconds) == {"load", "lookup", "scan", "rerank", "ids", "total"}
    assert trace.seconds["total"] >= sum(value for step, value in trace.seconds.items() if step != "total")
    scores = [probe.score for probe in trace.probes]
    assert scores == sorted(scores)
    semantic_id = index.get([3])["semantic_id"][0].as_py()
    best = trace.probes[0].prefix.removesuffix("-*")
    assert semantic_id.split("-")[0] == best.split("-")[0], "a stored vector is nearest to its own leaf"


def test_the_plan_of_a_filtered_search_goes_by_how_many_match(index, vectors):
    few = index.explain(vectors[0], where="number < 100")
    assert few.matches == few.reranked == 100
    assert few.executor == "brute force"
    assert few.plan == "100 of 20,000 items match: distances to all of them, because they are few"
    half = index.explain(vectors[0], where="parity = 1")
    assert half.matches == 10_000
    assert half.executor in ("native", "faiss-tail")
    assert filtered_budget(10_000, 20_000) <= half.candidates < 10_000
    assert half.plan.startswith("10,000 of 20,000 items match: scan the best of")
    none = index.search(vectors[0], where="number < 0")
    assert (len(none), none.trace.matches) == (0, 0)
    assert none.trace.plan == "no item can be a hit: none matches the filter"


def test_a_filtered_search_finds_k_even_where_matches_are_far_away(index, vectors):
    far = np.argsort(-((vectors - vectors[0]) ** 2).sum(axis=1))[:6_000]
    odd = np.flatnonzero(far % 2 == 1)
    hits = index.search(vectors[0], k=5_000, where="parity = 1", probes=1)
    assert len(hits) == 5_000
    assert (hits.ids % 2 == 1).all()
    assert len(odd)


def test_searches_from_many_threads_do_not_mix(index, vectors):
    """FAISS keeps the number of probes in the index, so this would fail without taking turns."""
    queries = vectors[100:164]
    options = [{"probes": probes, "k": k} for probes in (1, 3, 9, 30) for k in (1, 7)]
    alone = [index.search(queries, **one) for one in options]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: index.search(queries, **one), options * 6))
    for expected, got in zip(alone * 6, together, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected.ids, got.ids, strict=True))


def test_threads_change_nothing_but_time(index, vectors):
    one, *others = (index.search(vectors[:700], threads=threads) for threads in (1, 2, 3, 16))
    for other in others:
        assert np.array_equal(np.array(one.ids), np.array(other.ids))
        assert one.trace.candidates == pytest.approx(other.trace.candidates, abs=1)


def test_one_query_after_the_other_finds_what_a_batch_finds(index, vectors):
    """A thread keeps the memory of its last single query for the next one; results are copies."""
    queries = vectors[:60] + np.float32(0.1)
    together = {k: index.search(queries, k) for k in (1, 10, 7)}
    alone = [(k, i, index.search(queries[i], k)) for i in range(60) for k in together]
    for k, i, hits in alone:
        assert hits.ids.tolist() == together[k].ids[i].tolist()
        assert hits.distances == pytest.approx(together[k].distances[i], abs=1e-5)


def test_a_trace_tells_of_its_search_however_late_it_is_read(vectors, tmp_path):
    with semid.create(tmp_path / "index.duckdb", dim=16, levels=2, codebook_size=32) as index:
        index.train(vectors)
        index.add(vectors[:10_000])
        query = vectors[3].copy()
        known = index.search(query, probes=5).trace.to_dict()
        hits = index.search(query, probes=5)
        query[:] = 0
        index.add(vectors[10_000:])
        index.search(query)
    late = hits.trace.to_dict()
    assert set(late.pop("seconds")) == set(known.pop("seconds"))
    assert late == known
    assert hits.trace is hits.trace


def all_that_is_found(hits):
    """Everything but the seconds, bit by bit."""
    trace = hits.trace.to_dict()
    steps = list(trace.pop("seconds"))
    rows = hits.distances if hits.single else np.concatenate(hits.distances)
    return np.concatenate([hits.ids]).tolist(), rows.tobytes(), hits.offsets.tolist(), hits.to_arrow(), trace, steps


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("options", [{}, {"k": 3, "probes": 9}, {"k": 200, "rerank": 300}, {"probes": 1, "threads": 1}])
def test_the_short_way_of_one_query_finds_what_the_long_one_does(vectors, tmp_path, metric, options):
    """A search with a timeout goes the way of a batch, step by step."""
    queries = vectors[:30] * np.float32(1.7) + np.float32(0.1)
    with semid.create(tmp_path / "x.duckdb", dim=16, metric=metric, levels=3, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors, [f"item {number}" for number in range(len(vectors))])
        for few in (False, True):
            if few:
                index.delete([f"item {number}" for number in range(0, 1_200, 3)])
            for query in [*queries, queries[:1]]:
                short, long = index.search(query, **options), index.search(query, **options, timeout=60)
                assert all_that_is_found(short) == all_that_is_found(long)
        together = index.search(queries, **options)
        alone = [index.search(query, **options) for query in queries]
        assert [hits.ids.tolist() for hits in alone] == [ids.tolist() for ids in together.ids]
        np.testing.assert_array_equal([hits.distances for hits in alone], np.array(together.distances))
        assert len(index._live.latest.prepared) == 1


def test_one_query_may_come_in_any_form(index, vectors):
    expected = all_that_is_found(index.search(vectors[8]))
    spread, fixed = np.empty((16, 3), dtype=np.float32), vectors[8].copy()
    spread[:, 1], fixed.flags.writeable = fixed, False
    turned = np.array(vectors[8].astype(">f4"))
    for query in (vectors[8].tolist(), vectors[8].astype(np.float64), spread[:, 1], fixed, turned):
        assert all_that_is_found(index.search(query)) == expected
    for k in (np.int64(10), 10):
        assert all_that_is_found(index.search(vectors[8], k)) == expected


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 10.0}, {"k": True}, {"probes": 0}, {"rerank": 9}, {"threads": 0}])
def test_one_query_is_checked_as_many_are(index, vectors, wrong):
    index.search(vectors[0], 10)
    index.search(vectors[0], 1)
    for query in (vectors[0], vectors[:2]):
        with pytest.raises(InvalidArgumentError):
            index.search(query, **wrong)
        for bad in (np.nan, np.inf, 1e30):
            with pytest.raises(InvalidVectorsError, match="not" if bad == 1e30 else "NaN|infinite"):
                index.search(np.full_like(query, bad))


def test_a_zero_query_has_no_direction(vectors, tmp_path):
    with semid.create(tmp_path / "x.duckdb", dim=16, metric="cosine", levels=2, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors)
        index.search(vectors[0])
        with pytest.raises(InvalidVectorsError, match="zero"):
            index.search(np.zeros(16))


def test_what_is_prepared_for_queries_goes_with_its_snapshot(vectors, tmp_path):
    with semid.create(tmp_path / "x.duckdb", dim=16, levels=2, codebook_size=16) as index:
        index.train(vectors)
        index.add(vectors)
        for k in range(1, 150):
            assert index.search(vectors[0], k).ids[0] == 0
        assert 0 < len(index._live.latest.prepared) <= 64
        old = weakref.ref(index._live.latest)
        gc.disable()
        try:
            index.delete([0])
            assert index.search(vectors[0], 3).ids[0] != 0
            assert old() is None, "it would stay in memory beside the new one"
        finally:
            gc.enable()


def test_a_timeout_ends_a_search(index, vectors):
    with pytest.raises(SearchTimeoutError, match="timeout of 1e-09 s"):
        index.search(vectors[0], timeout=1e-9)
    assert len(index.search(vectors[0], timeout=60)) == 10


def test_results_unpack_and_convert(index, vectors):
    ids, distances = index.search(vectors[5], k=4)
    assert ids.tolist()[0] == 5
    assert distances[0] == 0
    batch = index.search(vectors[:3], k=4)
    table = batch.to_arrow()
    assert table["query"].to_pylist() == np.repeat([0, 1, 2], 4).tolist()
    assert table["rank"].to_pylist() == [1, 2, 3, 4] * 3
    assert table["semantic_id"].to_pylist() == np.concatenate(batch.semantic_ids).tolist()
    assert batch.to_pandas()["id"].tolist() == np.concatenate(batch.ids).tolist()
    assert np.array_equal(np.concatenate(batch.scores), -np.concatenate(batch.distances))


def test_results_without_hits_have_the_types_of_those_with(vectors, tmp_path):
    for ids in (range(50), [f"item {n}" for n in range(50)]):
        with semid.create(dim=16, levels=2, codebook_size=16) as index:
            index.train(vectors)
            index.add(vectors[:50], ids=ids)
            schema = index.search(vectors[:2], k=4).to_arrow().schema
            assert index.search(vectors[:2], k=4, where="id IS NULL").to_arrow().schema == schema


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"where": "id >= 0"}])
def test_results_leave_the_process(index, vectors, options):
    for result in (
        index.search(vectors[5], k=4, **options),
        index.search(vectors[:3], k=4, **options),
        index.similar(5, k=4, **options),
    ):
        for copied in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
            assert copied.to_arrow() == result.to_arrow()
            assert copied.trace == result.trace
            assert copied.trace.probes == result.trace.probes
            assert len(copied) == len(result)


def test_an_index_does_not_leave_the_process(index):
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"cannot be pickled or copied.*semid_index\.open\(path"):
            leave(index)


def test_as_many_are_reranked_as_similar_items_are_asked_for(index):
    assert len(index.similar(5, k=10, rerank=10)) == 10
    with pytest.raises(InvalidArgumentError, match="rerank=9 candidates cannot give k=10 hits"):
        index.similar(5, k=10, rerank=9)


@pytest.mark.parametrize(
    ("items", "leaf", "budget"), [(100, 128, 4_096), (61_666, 248, 11_919), (943_363, 971, 46_620)]
)
def test_defaults_grow_with_the_square_root(items, leaf, budget):
    assert default_leaf_size(items) == leaf
    assert default_budget(items) == budget
