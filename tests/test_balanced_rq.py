"""Balanced residual k-means: exact quotas, small error, and codes within a capacity."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from semid_index.errors import InvalidArgumentError, NotTrainedError
from semid_index.quantizer import Vectors
from semid_index.quantizers import balanced_rq
from semid_index.quantizers.balanced_rq import BalancedResidualKMeans, assign_with_room, balanced_kmeans
from semid_index.quantizers.kmeans import import_faiss
from semid_index.quantizers.rq import ResidualKMeans


def uneven_mixture(n: int, dim: int = 16, *, spread: float = 0.8, seed: int = 0) -> Vectors:
    """40 overlapping Gaussians, the largest of which has many times the points of the smallest."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(40, dim))
    shares = rng.dirichlet(np.full(40, 0.7))
    points = means[rng.choice(40, size=n, p=shares)] + rng.normal(scale=spread, size=(n, dim))
    return points.astype(np.float32)


def squared_distances(points: Vectors, codebook: Vectors) -> NDArray[np.float64]:
    """All squared distances (n, K), in double precision."""
    differences = points[:, None, :].astype(np.float64) - codebook[None, :, :]
    return np.square(differences).sum(axis=2)


def error(points: Vectors, centroids: Vectors, codes: NDArray[np.integer]) -> float:
    """The sum of squared distances to the centroids given."""
    return float(np.square(points.astype(np.float64) - centroids[codes]).sum())


def sizes(codes: NDArray[np.integer], k: int) -> NDArray[np.int64]:
    """How many points each cluster has."""
    return np.bincount(codes, minlength=k)


# ------------------------------------------------------------------------------------------------ balanced k-means


@pytest.mark.parametrize(
    ("n", "k"),
    [(1000, 8), (1003, 8), (1007, 8), (10, 8), (9, 8), (8, 8), (300, 299), (301, 150), (999, 2), (50, 1), (5000, 4)],
)
def test_every_cluster_has_floor_or_ceil_of_its_share(n: int, k: int) -> None:
    points = uneven_mixture(n)
    centroids, codes = balanced_kmeans(points, k, seed=3)
    assert sizes(codes, k).sum() == n
    assert sorted(sizes(codes, k)) == [n // k] * (k - n % k) + [n // k + 1] * (n % k)
    means = np.stack([points[codes == cluster].mean(axis=0, dtype=np.float64) for cluster in range(k)])
    np.testing.assert_allclose(centroids, means, atol=1e-5)


@pytest.mark.parametrize(("k", "others"), [(8, 24), (8, 0), (256, 24), (256, 0)])
def test_many_copies_of_one_point_are_split_evenly(k: int, others: int) -> None:
    points = np.concatenate([np.full((1000, 4), 0.3, dtype=np.float32), uneven_mixture(others, dim=4) + 5])
    n = len(points)
    _, codes = balanced_kmeans(points, k, seed=0)
    assert sizes(codes, k).min() == n // k
    assert sizes(codes, k).max() == -(-n // k)


@pytest.mark.parametrize("larger_first", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_odd_point_goes_where_it_is_wanted(larger_first: bool, seed: int) -> None:
    points = np.array([[0], [0], [0], [9], [9]], dtype=np.float32)
    points = points if larger_first else 9 - points
    centroids, codes = balanced_kmeans(points, 2, seed=seed)
    assert error(points, centroids, codes) == 0


@pytest.mark.parametrize("n", [3000, 6000])  # 6,000 is more than 256 a codeword: the seed also draws a sample
def test_points_and_seed_decide_the_result(n: int) -> None:
    points = uneven_mixture(n)
    before = points.copy()
    first, second, other = (balanced_kmeans(points, 16, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])
    np.testing.assert_array_equal(points, before)
    assert (first[0].dtype, first[1].dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(
    ("n", "spread", "allowed"),
    [
        (10_000, 1.2, 1.03),
        (30_000, 1.2, 1.03),  # more than 256 a codeword: a sample comes first
        (10_000, 0.8, 1.07),  # clusters far apart have to be cut up; without prices it is 1.08
    ],
)
def test_error_is_close_to_plain_k_means_of_faiss(n: int, spread: float, allowed: float) -> None:
    points, k = uneven_mixture(n, dim=24, spread=spread), 64
    plain = import_faiss().Kmeans(24, k, niter=25, seed=1, max_points_per_centroid=n)
    plain.train(points)
    distances, nearest = plain.index.search(points, 1)
    assert sizes(nearest[:, 0], k).max() > 1.5 * n / k  # or there would be nothing to balance

    centroids, codes = balanced_kmeans(points, k, seed=1)
    assert error(points, centroids, codes) <= allowed * distances.sum(dtype=np.float64)
    assert sizes(codes, k).max() == -(-n // k)


@pytest.mark.parametrize("seed", range(4))
def test_assignment_is_close_to_the_best_for_its_centroids(seed: int) -> None:
    points, k = uneven_mixture(400, dim=8, seed=seed), 8
    centroids, codes = balanced_kmeans(points, k, seed=0)
    assert error(points, centroids, codes) <= 1.03 * best_error(points, centroids, np.full(k, 50))


def best_error(points: Vectors, centroids: Vectors, room: NDArray[np.int64]) -> float:
    """The least error of any assignment with exactly this room: each column is repeated once for every place."""
    costs = np.repeat(squared_distances(points, centroids), room, axis=1)
    return float(costs[linear_sum_assignment(costs)].sum())


def test_progress_runs_to_its_end() -> None:
    heard: list[tuple[int, int]] = []
    balanced_kmeans(uneven_mixture(600), 2, seed=0, iterations=7, report=lambda *step: heard.append(step))
    assert heard == [(step, 13) for step in range(1, 14)]  # k-means, 7 on a sample of 512, 5 on all


@pytest.mark.parametrize("k", [0, -1, 21])
def test_number_of_clusters_must_be_possible(k: int) -> None:
    with pytest.raises(InvalidArgumentError, match="from 1 to the number of points, 20"):
        balanced_kmeans(uneven_mixture(20), k, seed=0)


# ------------------------------------------------------------------------------------------------ assign_with_room


def test_greatest_regret_stays() -> None:
    # All are nearest to 0. At 10 they would cost 80, 60 and 20 more, so 1 stays and the others go.
    points = np.array([[4], [1], [2]], dtype=np.float32)
    codebook = np.array([[0], [10]], dtype=np.float32)
    codes, wanted = assign_with_room(points, codebook, np.array([1, 2]))
    assert codes.tolist() == [1, 0, 1]
    assert wanted.tolist() == [3, 0]


def test_a_price_sends_points_elsewhere() -> None:
    # 4 costs 16 at 0 and 36 at 10; with 21 more to pay at 0, 10 is cheaper.
    points = np.array([[4], [1]], dtype=np.float32)
    codebook = np.array([[0], [10]], dtype=np.float32)
    assert assign_with_room(points, codebook, np.array([2, 2]), np.array([21.0, 0.0])).codes.tolist() == [1, 0]
    assert assign_with_room(points, codebook, np.array([2, 2]), np.array([19.0, 0.0])).codes.tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_same_as_one_point_at_a_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, codebook = uneven_mixture(300, dim=5, seed=seed), uneven_mixture(12, dim=5, seed=seed + 100)
    room = rng.multinomial(320, rng.dirichlet(np.ones(12)))
    room_before = room.copy()
    expected = assigned_one_by_one(squared_distances(points, codebook), room.tolist())
    np.testing.assert_array_equal(assign_with_room(points, codebook, room).codes, expected)
    np.testing.assert_array_equal(room, room_before)


def assigned_one_by_one(costs: NDArray[np.float64], room: list[int]) -> list[int]:
    """Rounds of proposals, written as plain loops."""
    codes = [-1] * len(costs)
    while -1 in codes:
        is_open = [k for k, places in enumerate(room) if places > 0]
        proposals: dict[int, list[tuple[float, int]]] = {k: [] for k in is_open}
        for point in (p for p, code in enumerate(codes) if code == -1):
            ranked = sorted(is_open, key=lambda k, point=point: costs[point, k])
            regret = costs[point, ranked[1]] - costs[point, ranked[0]] if len(ranked) > 1 else 0.0
            proposals[ranked[0]].append((-regret, point))
        for k, proposed in proposals.items():
            for _, point in sorted(proposed)[: room[k]]:
                codes[point] = k
                room[k] -= 1
    return codes


def test_identical_points_fill_the_nearest_codewords_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    # A round of proposals fills one codeword only; they must move on in a group, and still to the nearest.
    rounds: list[int] = []
    propose = balanced_rq._propose
    monkeypatch.setattr(balanced_rq, "_propose", lambda *args: rounds.append(len(args[1])) or propose(*args))
    codebook = uneven_mixture(256, dim=6, seed=1)
    points = np.tile(np.float32(0.1), (2000, 6))
    codes, wanted = assign_with_room(points, codebook, np.full(256, 20))
    assert 3 * 2000 < sum(rounds) <= 4 * 2000  # where filling 100 codewords one by one takes 50 * 2,000
    nearest_hundred = np.argsort(squared_distances(points[:1], codebook)[0])[:100]
    expected = np.zeros(256, dtype=int)
    expected[nearest_hundred] = 20
    np.testing.assert_array_equal(sizes(codes, 256), expected)
    assert wanted[nearest_hundred[0]] == 2000


@pytest.mark.parametrize("seed", range(4))
def test_without_prices_the_error_is_near_the_best(seed: int) -> None:
    points = uneven_mixture(400, dim=8, seed=seed)
    codebook, _ = balanced_kmeans(points, 8, seed=seed)
    room = np.full(8, 50)
    codes = assign_with_room(points, codebook, room).codes
    assert sizes(codes, 8).tolist() == room.tolist()
    assert error(points, codebook, codes) <= 1.06 * best_error(points, codebook, room)


def test_points_must_fit() -> None:
    with pytest.raises(InvalidArgumentError, match="20 points do not fit: there is room for 19"):
        assign_with_room(uneven_mixture(20), uneven_mixture(2), np.array([10, 9]))


def test_no_points_need_no_room() -> None:
    codes, wanted = assign_with_room(uneven_mixture(0), uneven_mixture(2), np.array([0, 0]))
    assert codes.shape == (0,)
    assert wanted.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------ the quantizer


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return uneven_mixture(6000)


@pytest.fixture(scope="module")
def trained(vectors: Vectors) -> BalancedResidualKMeans:
    return BalancedResidualKMeans(levels=3, codebook_size=[32, 16, 16], capacity=1.05).fit(vectors, seed=1)


def test_first_codebook_holds_the_means_of_balanced_clusters(vectors: Vectors, trained: BalancedResidualKMeans) -> None:
    centroids, _ = balanced_kmeans(vectors, 32, seed=1)
    assert trained.codebooks is not None
    assert sorted(map(tuple, trained.codebooks[0])) == sorted(map(tuple, centroids))


def test_without_capacity_each_code_is_the_nearest(vectors: Vectors) -> None:
    quantizer = BalancedResidualKMeans(levels=2, codebook_size=16).fit(vectors, seed=1)
    assert quantizer.codebooks is not None
    codes = quantizer.encode(vectors[:500])
    residuals = vectors[:500].copy()
    for level, codebook in enumerate(quantizer.codebooks):
        np.testing.assert_array_equal(codes[:, level], squared_distances(residuals, codebook).argmin(axis=1))
        residuals -= codebook[codes[:, level]]
    with pytest.raises(InvalidArgumentError, match=r"capacity=1\.05"):
        quantizer.encode_within(vectors, [np.zeros(16, dtype=np.int64)] * 2)


def test_nearest_codes_are_more_even_than_those_of_rq(vectors: Vectors, trained: BalancedResidualKMeans) -> None:
    plain = ResidualKMeans(levels=3, codebook_size=[32, 16, 16]).fit(vectors, seed=1)
    largest_of = {each.name: sizes(each.encode(vectors)[:, 0], 32).max() for each in (plain, trained)}
    assert largest_of["balanced-rq"] < 0.8 * largest_of["rq"]


@pytest.mark.parametrize("capacity", [1, 1.05, 1.5])
def test_no_code_exceeds_its_capacity_in_any_batch(
    vectors: Vectors, trained: BalancedResidualKMeans, capacity: float
) -> None:
    quantizer = BalancedResidualKMeans.restore({**trained.get_config(), "capacity": capacity}, trained.state())
    ordered = vectors[np.argsort(vectors[:, 0])]  # each batch comes from another corner
    counts = [np.zeros(size, dtype=np.int64) for size in quantizer.codebook_sizes]
    turned_away = 0
    for batch in np.array_split(ordered, [1, 500, 2000, 2000, 4000]):
        before = [taken.copy() for taken in counts]
        codes = quantizer.encode_within(batch, counts)
        assert codes.shape == (len(batch), 3)
        assert codes.dtype == np.int32
        turned_away += int((codes[:, 0] != quantizer.encode(batch)[:, 0]).sum())
        for level, (taken, size) in enumerate(zip(counts, quantizer.codebook_sizes, strict=True)):
            np.testing.assert_array_equal(taken, before[level])  # the caller adds
            taken += sizes(codes[:, level], size)
            limit = math.ceil(capacity * taken.sum() / size)
            assert (taken <= np.maximum(limit, before[level])).all()
    assert turned_away > 100  # or the limit would not have been tried


def test_a_code_above_its_capacity_takes_no_more(trained: BalancedResidualKMeans, vectors: Vectors) -> None:
    counts = [np.zeros(size, dtype=np.int64) for size in trained.codebook_sizes]
    crowded = int(sizes(trained.encode(vectors[:320])[:, 0], 32).argmax())
    counts[0][crowded] = 10_000
    codes = trained.encode_within(vectors[:320], counts)
    assert crowded not in codes[:, 0]
    assert sizes(codes[:, 0], 32).max() > 10  # the others take them: an even share is 10


def test_each_level_encodes_what_the_levels_before_left(trained: BalancedResidualKMeans, vectors: Vectors) -> None:
    counts = [np.zeros(size, dtype=np.int64) for size in trained.codebook_sizes]
    codes = trained.encode_within(vectors[:1000], counts)
    assert trained.codebooks is not None
    residuals = vectors[:1000].copy()
    for level, codebook in enumerate(trained.codebooks):
        room = np.full(len(codebook), math.ceil(1.05 * 1000 / len(codebook)))
        expected = assigned_one_by_one(squared_distances(residuals, codebook), room.tolist())
        assert (codes[:, level] == expected).mean() > 0.995  # float32 may order near-ties otherwise
        residuals -= codebook[codes[:, level]]


def test_a_wide_capacity_changes_nothing(trained: BalancedResidualKMeans, vectors: Vectors) -> None:
    roomy = BalancedResidualKMeans.restore({**trained.get_config(), "capacity": 32}, trained.state())
    counts = [np.zeros(size, dtype=np.int64) for size in roomy.codebook_sizes]
    np.testing.assert_array_equal(roomy.encode_within(vectors[:700], counts), roomy.encode(vectors[:700]))


def test_config_and_state_bring_it_back(trained: BalancedResidualKMeans, vectors: Vectors) -> None:
    config = trained.get_config()
    assert config == ResidualKMeans(3, [32, 16, 16], iterations=20).get_config() | {"capacity": 1.05}
    again = BalancedResidualKMeans.restore(config, trained.state())
    np.testing.assert_array_equal(again.encode(vectors), trained.encode(vectors))
    assert BalancedResidualKMeans().get_config()["capacity"] is None


@pytest.mark.parametrize("capacity", [0.99, 0, -1, math.inf, math.nan, "1.05", True])
def test_capacity_is_a_number_of_one_or_more(capacity: object) -> None:
    with pytest.raises(InvalidArgumentError, match="capacity must be a number of 1 or more"):
        BalancedResidualKMeans(capacity=capacity)  # type: ignore[arg-type]


def test_counts_must_fit_the_codebooks(trained: BalancedResidualKMeans, vectors: Vectors) -> None:
    def zeros(*lengths: int) -> list[NDArray[np.int64]]:
        return [np.zeros(length, dtype=np.int64) for length in lengths]

    for counts in (zeros(32, 16), zeros(32, 16, 17), zeros(16, 32, 16)):
        with pytest.raises(InvalidArgumentError, match=r"3 arrays of lengths \[32, 16, 16\]"):
            trained.encode_within(vectors, counts)
    for bad in (-np.ones(32, dtype=np.int64), np.full(32, 0.5)):
        with pytest.raises(InvalidArgumentError, match="whole numbers"):
            trained.encode_within(vectors, [bad, *zeros(16, 16)])


def test_training_comes_first(vectors: Vectors) -> None:
    with pytest.raises(NotTrainedError):
        BalancedResidualKMeans(capacity=1.05).encode_within(vectors, [])
