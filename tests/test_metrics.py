"""Distances against NumPy in double precision and against DuckDB; neighbours against a full sort."""

import duckdb
import numpy as np
import pytest

from semid_index import metrics
from semid_index.errors import InvalidArgumentError
from semid_index.metrics import (
    METRICS,
    SQL_FUNCTIONS,
    check_metric,
    distances,
    exact_search,
    normalized,
    paired_distances,
)


def _gaussian(n, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def in_double(queries, vectors, metric):
    """The definition of each metric, by loops over broadcast float64 arrays: (q, n)."""
    q, x = queries[:, None].astype(np.float64), vectors[None].astype(np.float64)
    if metric == "l2":
        return np.sqrt(np.square(q - x).sum(axis=2))
    if metric == "ip":
        return -(q * x).sum(axis=2)
    return 1 - (q * x).sum(axis=2) / np.sqrt(np.square(q).sum(axis=2) * np.square(x).sum(axis=2))


@pytest.mark.parametrize(("metric", "by_hand"), [("l2", 5.0), ("ip", 3.0), ("cosine", 1 + 3 / np.sqrt(10 * 9))])
def test_worked_example(metric, by_hand):
    """From (3, -1) to (0, 3): they differ by (3, -4), and their product is -3."""
    query, vector = np.array([[3, -1]], dtype=np.float32), np.array([[0, 3]], dtype=np.float32)
    assert distances(query, vector, metric)[0, 0] == pytest.approx(by_hand, rel=1e-6)
    assert paired_distances(query, vector[None], metric)[0, 0] == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 3, 128, 1_000])
def test_equal_to_double_precision(metric, dim):
    queries, vectors = _gaussian(7, dim), 3 * _gaussian(50, dim, seed=1)
    expected = in_double(queries, vectors, metric)
    found = distances(queries, vectors, metric)
    assert found.dtype == np.float32
    if metric == "l2":  # |q|^2 - 2 q.x + |x|^2 is as exact as its parts are large
        parts = np.square(queries).sum(axis=1)[:, None] + np.square(vectors).sum(axis=1)
        assert (np.abs(np.square(found.astype(float)) - np.square(expected)) <= 1e-6 * parts).all()
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.sqrt(dim))
    paired = paired_distances(queries, np.broadcast_to(vectors, (7, 50, dim)), metric)
    assert paired.dtype == np.float32
    np.testing.assert_allclose(paired, expected, rtol=1e-5, atol=1e-5 * np.sqrt(dim))


@pytest.mark.parametrize("metric", METRICS)
def test_equal_to_duckdb(metric):
    queries, vectors = _gaussian(5, 24), _gaussian(30, 24, seed=1)
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE q (i INTEGER, v FLOAT[24])")
        connection.execute("CREATE TABLE x (j INTEGER, v FLOAT[24])")
        connection.executemany("INSERT INTO q VALUES (?, ?)", list(enumerate(queries.tolist())))
        connection.executemany("INSERT INTO x VALUES (?, ?)", list(enumerate(vectors.tolist())))
        rows = connection.execute(f"SELECT {SQL_FUNCTIONS[metric]}(q.v, x.v) FROM q, x ORDER BY i, j").fetchall()
    expected = np.array(rows, dtype=np.float64).reshape(5, 30)
    np.testing.assert_allclose(distances(queries, vectors, metric), expected, rtol=1e-5, atol=1e-5)
    paired = paired_distances(queries, np.broadcast_to(vectors, (5, 30, 24)), metric)
    np.testing.assert_allclose(paired, expected, rtol=1e-5, atol=1e-6)


def test_paired_l2_does_not_cancel():
    """Vectors of length 100 that are 0.001 apart: as |q|^2 - 2 q.x + |x|^2, float32 has no digit left."""
    base = 100 * normalized(_gaussian(4, 64))
    near = base[:, None] + np.float32(1e-3) * normalized(_gaussian(12, 64, seed=1)).reshape(4, 3, 64)
    expected = np.sqrt(np.square(near.astype(float) - base[:, None]).sum(axis=2))
    np.testing.assert_allclose(paired_distances(base, near, "l2"), expected, rtol=1e-5)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_vector_is_at_no_distance_from_itself_and_never_below(metric):
    vectors = 50 * _gaussian(300, 96)
    own = np.diagonal(distances(vectors, vectors, metric))
    assert (own >= 0).all()
    scale = np.linalg.norm(vectors, axis=1).max() if metric == "l2" else 1
    assert own.max() < 2e-3 * scale
    paired = paired_distances(vectors, vectors[:, None], metric)
    assert (paired >= 0).all()
    assert paired.max() < 1e-6


def test_cosine_stays_within_0_and_2():
    vectors = _gaussian(100, 5)
    opposite = distances(vectors, np.concatenate([vectors, -vectors]), "cosine")
    assert opposite.min() >= 0
    assert opposite.max() <= 2
    np.testing.assert_allclose(np.diagonal(opposite[:, 100:]), 2, atol=1e-6)


def test_normalized():
    vectors = np.array([[3, 4], [0, 0], [-1e-10, 0], [1e15, 1e15]], dtype=np.float32)
    expected = [[0.6, 0.8], [0, 0], [-1, 0], [np.sqrt(0.5), np.sqrt(0.5)]]
    found = normalized(vectors)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
    assert vectors[0].tolist() == [3, 4]


# -- neighbours -------------------------------------------------------------------------------------------------------


def sorted_neighbours(queries, vectors, k, metric):
    """Rows by (distance, row), from double precision."""
    return np.argsort(in_double(queries, vectors, metric), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 199, 200, 500])
def test_exact_search(metric, k):
    queries, vectors = _gaussian(9, 12), _gaussian(200, 12, seed=1)
    rows, found = exact_search(queries, vectors, k, metric)
    expected = sorted_neighbours(queries, vectors, k, metric)
    assert rows.dtype == np.int64
    assert found.dtype == np.float32
    assert rows.shape == found.shape == (9, min(k, 200))
    assert np.array_equal(rows, expected)
    truth = np.take_along_axis(in_double(queries, vectors, metric), expected, axis=1)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)


def test_exact_search_in_blocks(monkeypatch):
    queries, vectors = _gaussian(10, 6), _gaussian(40, 6, seed=1)
    whole = exact_search(queries, vectors, 5, "l2")
    monkeypatch.setattr(metrics, "_BLOCK_ENTRIES", 130)  # 3 queries at a time, and 1 at the end
    parts = exact_search(queries, vectors, 5, "l2")
    assert np.array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-6)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("k", [5, 60, 300])
def test_ties_go_to_the_lower_row(metric, k):
    """Small whole numbers, whose distances float32 holds exactly: 300 vectors, at most 27 of them different."""
    random = np.random.default_rng(3)
    vectors = random.integers(-1, 2, size=(300, 3)).astype(np.float32)
    queries = random.integers(-1, 2, size=(20, 3)).astype(np.float32)
    rows, _ = exact_search(queries, vectors, k, metric)
    assert np.array_equal(rows, sorted_neighbours(queries, vectors, k, metric))


def far_from_zero(kind, n, dim):
    """Vectors that are near to each other for how far from zero they lie, and queries among them."""
    random = np.random.default_rng(n + dim)
    vectors = random.standard_normal((n, dim))
    if kind == "metres on a map":
        vectors = [500_000, 5_000_000] + 50_000 * vectors
    elif kind == "two heaps":
        vectors += np.where(random.integers(2, size=n)[:, None], 1e5, -1e5)
    else:
        vectors += kind
    return vectors[:20] + 0.01 * random.standard_normal((20, dim)), vectors


@pytest.mark.parametrize("queries_at_once", [1, 20])
@pytest.mark.parametrize(
    ("kind", "dim"),
    [(100, 32), (1_000, 384), (10_000, 32), (1e6, 8), (1e18, 4), ("two heaps", 16), ("metres on a map", 2)],
)
def test_exact_search_far_from_zero(kind, dim, queries_at_once):
    """|q|^2 - 2 q.x + |x|^2 has no digit left of these distances: the nearest have to be found by differences."""
    queries, vectors = (array.astype(np.float32) for array in far_from_zero(kind, 2_000, dim))
    truth = in_double(queries, vectors, "l2")
    for start in range(0, len(queries), queries_at_once):
        part = slice(start, start + queries_at_once)
        rows, found = exact_search(queries[part], vectors, 10, "l2")
        nearest = np.sort(truth[part], axis=1)[:, :10]
        np.testing.assert_allclose(np.take_along_axis(truth[part], rows, axis=1), nearest, rtol=1e-6)
        np.testing.assert_allclose(found, nearest, rtol=1e-6)
        assert all(len(set(row)) == 10 for row in rows.tolist())


def test_exact_search_when_all_are_in_doubt():
    """Queries that are so far away that products tell nothing, and vectors that are all equal: as by differences."""
    vectors = _gaussian(300, 8)
    vectors[100:200] = vectors[100]
    for queries in (1e7 * _gaussian(5, 8, seed=1), np.repeat(vectors[100:101], 3, axis=0)):
        rows, found = exact_search(queries, vectors, 120, "l2")
        expected = paired_distances(queries, np.broadcast_to(vectors, (len(queries), 300, 8)), "l2")
        assert np.array_equal(rows, np.argsort(expected, axis=1, kind="stable")[:, :120])
        assert np.array_equal(found, np.sort(expected, axis=1)[:, :120])


def test_distances_far_from_zero():
    """Moved to zero, vectors at 10,000 have the distances that they would have there."""
    queries, vectors = (array.astype(np.float32) for array in far_from_zero(10_000, 200, 32))
    np.testing.assert_allclose(distances(queries, vectors, "l2"), in_double(queries, vectors, "l2"), atol=0.01)


def test_no_neighbours():
    queries = _gaussian(3, 4)
    for vectors, k in ((_gaussian(0, 4), 5), (_gaussian(10, 4), 0)):
        rows, found = exact_search(queries, vectors, k, "l2")
        assert rows.shape == found.shape == (3, 0)
    rows, found = exact_search(_gaussian(0, 4), _gaussian(10, 4), 5, "l2")
    assert rows.shape == found.shape == (0, 5)


def test_check_metric():
    assert [check_metric(metric) for metric in METRICS] == ["l2", "cosine", "ip"]
    with pytest.raises(InvalidArgumentError, match="No metric 'euclidean'\\. Use one of l2, cosine, ip"):
        check_metric("euclidean")
