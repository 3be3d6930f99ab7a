"""Residual k-means against brute force in double precision, FAISS and scikit-learn; and the order of its codewords."""

import re

import numpy as np
import pytest
from sklearn.cluster import KMeans

from semid_index.errors import InvalidArgumentError, InvalidVectorsError
from semid_index.quantizers.kmeans import import_faiss, kmeans, nearest
from semid_index.quantizers.rq import ResidualKMeans, bisection_order, sizes_per_level

faiss = import_faiss()


def clusters(n, dim, centres=30, seed=0):
    """Points around centres that lie far apart."""
    random = np.random.default_rng(seed)
    means = 4 * random.standard_normal((centres, dim))
    return (means[random.integers(centres, size=n)] + random.standard_normal((n, dim))).astype(np.float32)


def squared_distances(points, codebook):
    """(n, K), in double precision."""
    return np.square(points[:, None].astype(np.float64) - codebook).sum(axis=2)


def error(points, codebook):
    """Mean squared distance to the nearest codeword, in double precision."""
    return squared_distances(points, codebook).min(axis=1).mean()


# -- k-means ----------------------------------------------------------------------------------------------------------


def test_nearest_is_brute_force():
    points, codebook = clusters(500, 12), clusters(77, 12, seed=1)
    assert np.array_equal(nearest(points, codebook), squared_distances(points, codebook).argmin(axis=1))


def test_kmeans_finds_separate_groups():
    """Two points each around 0, 10 and 20: the centroids are their means."""
    points = np.array([[-1], [1], [9], [11], [19], [21]], dtype=np.float32)
    assert sorted(kmeans(points, 3, seed=0)[:, 0].tolist()) == [0, 10, 20]


@pytest.mark.parametrize(("size", "n"), [(2, 2_000), (16, 2_000), (100, 3_000), (2_100, 2_500)])
def test_kmeans_is_as_good_as_the_one_of_faiss(size, n):
    points = clusters(n, 8)
    theirs = faiss.Kmeans(8, size, niter=20, seed=1, min_points_per_centroid=1, max_points_per_centroid=256)
    theirs.train(points)
    assert error(points, kmeans(points, size, seed=1)) <= 1.02 * error(points, theirs.centroids)


def test_first_level_is_as_good_as_kmeans_of_faiss():
    points = clusters(3_000, 16)
    theirs = faiss.Kmeans(16, 64, niter=20, seed=3, max_points_per_centroid=256)
    theirs.train(points)
    quantizer = ResidualKMeans(levels=1, codebook_size=64).fit(points, seed=3)
    assert error(points, quantizer.codebooks[0]) <= 1.02 * error(points, theirs.centroids)


def test_kmeans_is_nearly_as_good_as_the_one_of_scikit_learn():
    """On average over starts, of which scikit-learn tries several for each centroid: 10 % better here, and slower."""
    points = clusters(1_000, 6)
    ours = [error(points, kmeans(points, 20, seed=seed)) for seed in range(10)]
    theirs = [KMeans(20, n_init=1, max_iter=20, random_state=seed).fit(points).inertia_ / 1_000 for seed in range(10)]
    assert np.mean(ours) <= 1.15 * np.mean(theirs)


def test_kmeans_of_identical_points():
    """There is one place for all centroids to be; FAISS puts those of empty clusters a thousandth beside it."""
    points = np.full((50, 3), 2.5, dtype=np.float32)
    centroids = kmeans(points, 4, seed=0)
    assert np.isfinite(centroids).all()
    np.testing.assert_allclose(centroids, 2.5, rtol=0.003)


# -- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[16, 16, 16], [2, 2, 2, 2, 2, 2], [100, 7, 3], [1_000], [3, 300]])
def test_codes_are_the_nearest_codewords_of_the_residuals(sizes):
    quantizer = ResidualKMeans(len(sizes), sizes, iterations=5).fit(clusters(1_500, 10))
    points = clusters(300, 10, seed=1)
    codes = quantizer.encode(points)
    assert quantizer.codebook_sizes == tuple(sizes)
    assert [book.shape for book in quantizer.codebooks] == [(size, 10) for size in sizes]
    residuals = points.astype(np.float64)
    for level, book in enumerate(quantizer.codebooks):
        squared = squared_distances(residuals, book)
        chosen = np.take_along_axis(squared, codes[:, [level]], axis=1)[:, 0]
        np.testing.assert_allclose(chosen, squared.min(axis=1), rtol=1e-4, atol=1e-5)
        assert (codes[:, level] == squared.argmin(axis=1)).mean() > 0.99
        residuals -= book[codes[:, level]]
    np.testing.assert_allclose(quantizer.decode(codes), points - residuals, rtol=1e-5, atol=1e-5)


def test_each_codebook_is_learned_from_what_the_levels_before_leave_over():
    """Each codeword is about the mean of the residuals nearest to it: k-means has converged on those."""
    points = clusters(2_000, 6)
    quantizer = ResidualKMeans(levels=3, codebook_size=8, iterations=100).fit(points)
    residuals = points.astype(np.float64)
    for book in quantizer.codebooks:
        labels = squared_distances(residuals, book).argmin(axis=1)
        means = np.stack([residuals[labels == code].mean(axis=0) for code in range(8)])
        assert np.abs(means - book).max() < 0.02 * np.abs(residuals).max()
        residuals -= book[labels]


def test_large_batches_are_encoded_in_parts():
    """More rows than are held at once: the same codes as for each part alone."""
    quantizer = ResidualKMeans(levels=3, codebook_size=8, iterations=2).fit(clusters(500, 4))
    points = clusters(40_000, 4, seed=1)
    parts = [
        quantizer.encode(points[:16_384]),
        quantizer.encode(points[16_384:32_768]),
        quantizer.encode(points[32_768:]),
    ]
    assert np.array_equal(quantizer.encode(points), np.concatenate(parts))


def test_65_536_codewords():
    points = clusters(70_000, 8)
    quantizer = ResidualKMeans(levels=2, codebook_size=[65_536, 4], iterations=1).fit(points)
    unseen = clusters(100, 8, seed=1)
    codes = quantizer.encode(unseen)
    assert codes[:, 0].max() > 32_767
    squared = squared_distances(unseen, quantizer.codebooks[0])
    assert np.array_equal(codes[:, 0], squared.argmin(axis=1))


def test_identical_vectors():
    points = np.full((40, 5), 3, dtype=np.float32)
    quantizer = ResidualKMeans(levels=2, codebook_size=4).fit(points)
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(points)), points, rtol=0.003)


def test_as_many_vectors_as_codewords():
    """Each is its own codeword."""
    points = clusters(16, 5)
    quantizer = ResidualKMeans(levels=1, codebook_size=16).fit(points)
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(points)), points, atol=1e-5)


def test_progress_names_the_level():
    heard = []
    quantizer = ResidualKMeans(levels=2, codebook_size=[8, 4], iterations=2)
    quantizer.on_progress = lambda *report: heard.append(report)
    quantizer.fit(clusters(100, 4))
    assert [what for _, _, what in heard][:: len(heard) - 1] == [
        "level 1 of 2, 8 codewords",
        "level 2 of 2, 4 codewords",
    ]


# -- options ----------------------------------------------------------------------------------------------------------


def test_sizes_per_level():
    assert sizes_per_level(3, 256) == (256, 256, 256)
    assert sizes_per_level(3, [1_024, 256, 7]) == (1_024, 256, 7)
    assert sizes_per_level(2, np.array([4, 5])) == (4, 5)
    assert sizes_per_level(2, np.int64(9)) == (9, 9)
    assert all(type(size) is int for size in sizes_per_level(2, np.array([4, 5])))


@pytest.mark.parametrize(
    ("levels", "codebook_size", "message"),
    [
        (0, 256, "levels must be a whole number from 1 to 64, not 0"),
        (65, 256, "levels must be a whole number from 1 to 64, not 65"),
        (2.0, 256, "not 2.0"),
        (True, 256, "not True"),
        ("4", 256, "not '4'"),
        (2, [256], "codebook_size lists 1 sizes for levels=2"),
        (1, 256.0, "codebook_size must be a whole number, or a list of them, not 256.0"),
        (2, [4, 4.5], "codebook_size must be a whole number, or a list of them, not [4, 4.5]"),
        (1, True, "not True"),
        (1, None, "not None"),
        (1, 1, "Level 1 has 1 codewords; allowed are 2 to 65,536"),
        (2, [2, 65_537], "Level 2 has 65537 codewords"),
    ],
)
def test_levels_and_sizes_that_cannot_be(levels, codebook_size, message):
    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        ResidualKMeans(levels, codebook_size)


@pytest.mark.parametrize("iterations", [0, -1, 2.5, "20"])
def test_iterations_that_cannot_be(iterations):
    with pytest.raises(InvalidArgumentError, match="iterations must be a whole number from 1 to 10,000"):
        ResidualKMeans(iterations=iterations)


def test_too_few_vectors():
    with pytest.raises(InvalidVectorsError, match="at least as many vectors as the largest codebook has words: 32"):
        ResidualKMeans(levels=2, codebook_size=[4, 32]).fit(clusters(31, 4))


# -- the order of codewords -------------------------------------------------------------------------------------------


def within(codebook, order, depth):
    """Squared distances to the mean of all codewords whose numbers share their first ``depth`` bits, summed."""
    groups = np.arange(len(order)) >> ((len(order) - 1).bit_length() - depth)
    ordered = codebook[order].astype(np.float64)
    return sum(np.square(ordered[groups == g] - ordered[groups == g].mean(axis=0)).sum() for g in np.unique(groups))


@pytest.mark.parametrize("dim", [1, 2, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 300, 1_000])
def test_bisection_order_is_a_permutation(size, dim):
    codebook = clusters(size, dim)
    assert sorted(bisection_order(codebook).tolist()) == list(range(size))
    assert sorted(bisection_order(np.zeros_like(codebook)).tolist()) == list(range(size))


def test_bisection_order_by_hand():
    """On a line, neighbours: 0 and 1 share their first bit, 10 and 12 the other, whichever half comes first."""
    codebook = np.array([[10], [0], [12], [1]], dtype=np.float32)
    values = codebook[bisection_order(codebook), 0].tolist()
    assert {frozenset(values[:2]), frozenset(values[2:])} == {frozenset((0, 1)), frozenset((10, 12))}


@pytest.mark.parametrize("dim", [2, 20])
@pytest.mark.parametrize("size", [3, 5, 64, 300])
def test_codewords_that_share_their_first_bits_are_near_each_other(size, dim):
    """Nearer than in a random order, at each number of bits: over 10 codebooks, and 3 random orders for each."""
    random = np.random.default_rng(0)
    codebooks = [clusters(size, dim, seed=seed) for seed in range(10)]
    for depth in range(1, (size - 1).bit_length()):
        ours = np.mean([within(book, bisection_order(book), depth) for book in codebooks])
        others = np.mean([within(book, random.permutation(size), depth) for book in codebooks for _ in range(3)])
        assert ours < 0.95 * others, f"first {depth} bits"


def test_trained_codebooks_are_in_that_order():
    for book in ResidualKMeans(levels=2, codebook_size=32).fit(clusters(1_000, 8)).codebooks:
        random = np.random.default_rng(0)
        for depth in range(1, 5):
            others = [within(book, random.permutation(32), depth) for _ in range(20)]
            assert within(book, np.arange(32), depth) < min(others)
