"""Executors and exact distances, against brute force."""

import logging

import numpy as np
import pytest

import semid_index as semid
from semid_index import rerank
from semid_index.codes import CodeLayout, pack, pack_rest
from semid_index.contents import StoredCodes
from semid_index.lookup import additive_scorer, choose_probes, make_leaves
from semid_index.metrics import distances, normalized
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.quantizers.tail import Tail, default_tail, pad
from semid_index.rerank import (
    DecodedVectors,
    FaissCodeExecutor,
    FaissTailExecutor,
    MemoryVectors,
    NumpyExecutor,
    ScanData,
    from_stored,
    smallest,
    to_stored,
)


def clustered(n: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((30, dim)) * 2
    return (centres[rng.integers(0, 30, n)] + rng.standard_normal((n, dim))).astype(np.float32)


def scan_data(metric: str, *, levels: int = 3, size=16, dim: int = 12, n: int = 3_000, tier: str = "float32"):
    vectors = clustered(n, dim, 0)
    if metric == "cosine":
        vectors = normalized(vectors)
    quantizer = ResidualKMeans(levels, size, iterations=5).fit(vectors, seed=0)
    layout = CodeLayout(quantizer.codebook_sizes)
    codes = quantizer.encode(vectors)
    sids = pack(codes, layout)
    rest = pack_rest(codes, layout) if layout.rest_levels else None
    order = np.lexsort((*(rest.T[::-1] if rest is not None else ()), sids))
    stored = StoredCodes(order, sids[order], None if rest is None else rest[order])
    leaves = make_leaves(stored.sids, layout, 50)
    tail = Tail.train(vectors, default_tail(dim), seed=0)
    memory = (
        MemoryVectors(vectors[order], None, metric)
        if tier != "none"
        else DecodedVectors(quantizer, stored, leaves, dim, metric)
    )
    data = ScanData(leaves, stored, quantizer, memory, metric, tail, lambda: tail.encode(vectors[order]))
    scorer = additive_scorer(leaves, quantizer.codebooks, stored.sids, metric)
    queries = clustered(70, dim, 1)
    queries = normalized(queries) if metric == "cosine" else queries
    probes = choose_probes(scorer, queries, leaves.sizes, at_least=10, budget=400, probes=None)
    return data, vectors[order], queries, probes


def candidates(data, probes, i):
    opened = [leaf for leaf in probes.leaves[i] if leaf >= 0]
    return np.concatenate([np.arange(data.leaves.starts[leaf], data.leaves.starts[leaf + 1]) for leaf in opened])


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_numpy_finds_the_nearest_of_the_candidates(metric):
    data, vectors, queries, probes = scan_data(metric)
    near, positions = NumpyExecutor(data).search(queries, probes, 10)
    for i, query in enumerate(queries):
        mine = candidates(data, probes, i)
        assert len(mine) == probes.candidates[i]
        exact = distances(query[None], vectors[mine], metric)[0]
        best = np.lexsort((mine, exact))[:10]
        np.testing.assert_allclose(near[i], exact[best], rtol=1e-3, atol=1e-3)
        assert set(positions[i]) <= set(mine)
        np.testing.assert_allclose(
            distances(query[None], vectors[positions[i]], metric)[0], exact[best], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_faiss_tail_scans_the_same_candidates_as_numpy(metric):
    data, _, queries, probes = scan_data(metric)
    everything = int(probes.candidates.max())
    _, positions = FaissTailExecutor(data).search(queries, probes, everything)
    for i in range(len(queries)):
        found = positions[i][positions[i] >= 0]
        assert sorted(found) == sorted(candidates(data, probes, i)), "asked for all, it must return each candidate once"
    # and with so many re-ranked, the hits are those of the oracle
    exact = data.vectors.distances(queries, positions)
    ours, _ = smallest(positions, exact, 10)
    _, oracle = NumpyExecutor(data).search(queries, probes, 10)
    assert (ours == oracle).mean() > 0.999  # ties aside


@pytest.mark.parametrize("dim", [1, 4])
def test_faiss_tail_leaves_out_no_item_whose_product_is_small(dim):
    """FAISS keeps none whose inner product it rounds to 0, and none at all for a query that is 0."""
    data, _, queries, probes = scan_data("ip", dim=dim)
    queries[0] = 0
    everything = int(probes.candidates.max())
    for k in (everything, everything // 2):
        _, positions = FaissTailExecutor(data).search(queries, probes, k)
        for i in range(len(queries)):
            found = positions[i][positions[i] >= 0]
            assert len(set(found)) == len(found) == min(k, probes.candidates[i])
            assert set(found) <= set(candidates(data, probes, i))


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("items", [20, 200, 600])
def test_under_ip_all_items_are_hits_when_all_are_asked_for(items, native, monkeypatch):
    monkeypatch.setenv("SEMID_NATIVE", native)
    vectors = clustered(700, 2, 7)
    with semid.create(dim=2, metric="ip", levels=2, codebook_size=8) as index:
        index.train(vectors)
        index.add(vectors[:items])
        hits = index.search(vectors[600:], items)
    for query, ids, near in zip(vectors[600:], hits.ids, hits.distances, strict=True):
        assert sorted(ids) == list(range(items))
        np.testing.assert_allclose(near, np.sort(-(vectors[:items] @ query)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize(("levels", "size"), [(3, 16), (3, [16, 5, 300]), (9, 256)])
def test_faiss_codes_are_the_distances_to_decoded_vectors(metric, levels, size):
    data, _, queries, probes = scan_data(metric, levels=levels, size=size, tier="none")
    near, positions = FaissCodeExecutor(data).search(queries, probes, 10)
    decoded = data.vectors.take(slice(None))
    for i, query in enumerate(queries):
        mine = candidates(data, probes, i)
        scores = -decoded[mine] @ query if metric == "ip" else ((decoded[mine] - query) ** 2).sum(axis=1)
        np.testing.assert_allclose(
            np.sort(-near[i] if metric == "ip" else near[i]), np.sort(scores)[:10], rtol=1e-3, atol=2e-3
        )
        assert set(positions[i]) <= set(mine)


def test_fewer_candidates_than_asked_are_padded():
    data, _, queries, probes = scan_data("l2")
    for executor in (NumpyExecutor(data), FaissTailExecutor(data), FaissCodeExecutor(data)):
        near, positions = executor.search(
            queries[:5], type(probes)(probes.leaves[:5, :1], probes.scores[:5, :1], probes.candidates[:5]), 90
        )
        assert ((positions >= 0).sum(axis=1) == data.leaves.sizes[probes.leaves[:5, 0]]).all(), executor.name
        assert near.shape == positions.shape == (5, 90)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("tier", ["float32", "float16", "int8"])
def test_stored_vectors_give_duckdbs_distances(metric, tier, tmp_path):
    vectors = clustered(300, 8, 2)
    queries = clustered(5, 8, 3)
    with semid.create(tmp_path / "x.duckdb", dim=8, metric=metric, levels=2, codebook_size=8, vectors=tier) as index:
        index.train(vectors)
        index.add(vectors)
        hits = index.search(queries, 300)
        function = {"l2": "array_distance", "cosine": "array_cosine_distance", "ip": "array_negative_inner_product"}[
            metric
        ]
        stored = np.array(index.get(list(range(300)), vectors=True)["vector"].to_pylist(), dtype=np.float32)
        if tier != "float32":
            assert not np.array_equal(stored, vectors)
            np.testing.assert_allclose(stored, vectors, atol={"float16": 1e-2, "int8": 5e-2}[tier])
        for i, query in enumerate(queries):
            rows = index.sql(
                f"SELECT {function}(?::FLOAT[8], ?::FLOAT[8]) FROM range(1)",
                params=[query.tolist(), stored[hits.ids[i][7]].tolist()],
            ).fetchall()
            assert hits.distances[i][7] == pytest.approx(rows[0][0], rel=1e-4, abs=1e-5)
            assert sorted(hits.ids[i]) == list(range(300))


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("tier", ["float32", "float16", "int8"])
def test_exact_search_is_brute_force_far_from_zero(tier, place, tmp_path, monkeypatch):
    """In several blocks, for one query and for many, with and without a filter."""
    monkeypatch.setattr(rerank, "_EXACT_BLOCK", 700)
    vectors = clustered(1_500, 8, 2) + np.float32(2_000)
    queries = vectors[:20] + np.float32(0.01)
    with semid.create(tmp_path / "x.duckdb", dim=8, levels=2, codebook_size=8, vectors=tier) as index:
        index.train(vectors)
        index.add(vectors)
    with semid.open(tmp_path / "x.duckdb", vectors_in=place) as index:
        stored = np.array(index.get(list(range(1_500)), vectors=True)["vector"].to_pylist())
        truth = np.sqrt(np.square(queries[:, None].astype(np.float64) - stored).sum(axis=2))
        for where, mine in ((None, truth), ("id >= 100", truth[:, 100:])):
            nearest = np.sort(mine, axis=1)[:, :10]
            many = index.search(queries, 10, exact=True, where=where)
            np.testing.assert_allclose(np.array(many.distances), nearest, rtol=1e-5)
            np.testing.assert_allclose(np.take_along_axis(truth, np.array(many.ids), axis=1), nearest, rtol=1e-5)
            one = index.search(queries[0], 10, exact=True, where=where)
            np.testing.assert_allclose(truth[0, one.ids], nearest[0], rtol=1e-5)


@pytest.mark.parametrize("tier", ["float32", "float16", "int8", "none"])
def test_stored_forms_are_what_they_say(tier):
    vectors = clustered(50, 7, 4)
    columns = to_stored(vectors, tier)
    if tier == "none":
        assert columns == {}
        return
    raw = columns["v"].view(np.float16) if tier == "float16" else columns["v"]
    back = from_stored(raw, columns.get("scale"))
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    bound = {"float32": 0, "float16": largest * 2**-11, "int8": largest / 127 / 2 * 1.001}[tier]
    assert (np.abs(back - vectors) <= bound).all()


def test_zero_vectors_survive_int8():
    columns = to_stored(np.zeros((2, 3), dtype=np.float32), "int8")
    assert not from_stored(columns["v"], columns["scale"]).any()


def test_tail_codes_are_those_of_faiss():
    import faiss

    vectors = clustered(1_000, 10, 5)
    tail = Tail.train(vectors, 6, seed=0)
    assert tail.padded_dim == 12
    quantizer = faiss.ProductQuantizer(12, 6, 4)
    faiss.copy_array_to_vector(tail.codebooks.ravel(), quantizer.centroids)
    np.testing.assert_array_equal(tail.encode(vectors), quantizer.compute_codes(pad(vectors, 12)))
    # each 4-bit code is the nearest of the 16 codewords of its part
    nearest = ((pad(vectors, 12).reshape(-1, 6, 1, 2) - tail.codebooks[None]) ** 2).sum(axis=3).argmin(axis=2)
    codes = tail.encode(vectors)
    np.testing.assert_array_equal(np.stack([codes & 15, codes >> 4], axis=2).reshape(-1, 6), nearest)


@pytest.mark.parametrize(("dim", "parts"), [(1, 2), (3, 2), (100, 50), (128, 64), (384, 96), (768, 96), (784, 98)])
def test_default_tail(dim, parts):
    assert default_tail(dim) == parts


def test_ties_go_to_the_lower_position():
    positions, near = smallest(np.array([[5, 3, 9, 1]]), np.array([[1.0, 1.0, 0.5, 2.0]], dtype=np.float32), 3)
    assert positions.tolist() == [[9, 3, 5]]
    assert near.tolist() == [[0.5, 1.0, 1.0]]


def test_without_faiss_numpy_searches_and_says_so_once(tmp_path, monkeypatch, caplog):
    vectors = clustered(500, 8, 6)
    with semid.create(tmp_path / "x.duckdb", dim=8, levels=2, codebook_size=8) as index:
        index.train(vectors)
        index.add(vectors)
        with_faiss = index.search(vectors[:20], 5)

    def missing():
        raise rerank.MissingDependencyError("FAISS is not installed. Run: pip install 'semid-index[cpu]'")

    monkeypatch.setattr(rerank, "import_faiss", missing)
    monkeypatch.setattr(rerank, "_warned", False)
    monkeypatch.setenv("SEMID_NATIVE", "0")
    with semid.open(tmp_path / "x.duckdb") as index, caplog.at_level(logging.WARNING, "semid_index"):
        without = index.search(vectors[:20], 5)
        index.search(vectors[:20], 5)
    assert without.trace.executor == "numpy"
    assert with_faiss.trace.executor in ("native", "faiss-tail")
    np.testing.assert_allclose(np.array(without.distances), np.array(with_faiss.distances), rtol=1e-4, atol=1e-4)
    assert [record.message for record in caplog.records if "pip install" in record.message].__len__() == 1
