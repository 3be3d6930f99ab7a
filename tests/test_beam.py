"""Encoding with a beam, and refined codebooks, against brute force, FAISS and least squares."""

import itertools

import numpy as np
import pytest
from sklearn.cluster import BisectingKMeans

import semid_index as semid
from semid_index.demo import load_sample
from semid_index.errors import InvalidArgumentError
from semid_index.quantizers.balanced_rq import BalancedResidualKMeans
from semid_index.quantizers.beam import choose_codes
from semid_index.quantizers.kmeans import import_faiss
from semid_index.quantizers.refine import move_codewords
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.quantizers.vq import VectorQuantization, split_codewords

faiss = import_faiss()


def mixture(n, dim, seed=0):
    """Points around 60 centres, whose residuals have structure again."""
    random = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(99).standard_normal((60, dim))
    return (centres[random.integers(60, size=n)] + random.standard_normal((n, dim))).astype(np.float32)


def random_codebooks(sizes, dim, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((size, dim)).astype(np.float32) / (1 + i) for i, size in enumerate(sizes)]


def errors(vectors, codebooks, codes):
    """Squared error of each row, in double precision."""
    total = sum(book.astype(float)[chosen] for book, chosen in zip(codebooks, codes.T, strict=True))
    return np.square(vectors - total).sum(axis=1)


def best_errors(vectors, codebooks):
    """The smallest squared error that any codes have: all of them tried."""
    sums = np.array([sum(words) for words in itertools.product(*[book.astype(float) for book in codebooks])])
    return np.square(vectors[:, None] - sums).sum(axis=2).min(axis=1)


# -- the beam ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wider", [0, 1, 1_000])
@pytest.mark.parametrize("n", [200, 1_200])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 5, 7), (2, 9), (6, 2, 3, 2), (2, 2)])
def test_a_beam_as_wide_as_there_are_codes_finds_the_best(sizes, n, wider):
    vectors, codebooks = mixture(n, 5) / 3, random_codebooks(sizes, 5)
    codes = choose_codes(vectors, codebooks, int(np.prod(sizes)) + wider)
    assert (codes < np.array(sizes)).all()
    np.testing.assert_allclose(errors(vectors, codebooks, codes), best_errors(vectors, codebooks), rtol=1e-4)
    greedy = errors(vectors, codebooks, choose_codes(vectors, codebooks, 1))
    assert greedy.mean() > best_errors(vectors, codebooks).mean() + 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_the_error_falls_as_the_beam_grows(seed):
    vectors = mixture(2_000, 24, seed=seed)
    quantizer = ResidualKMeans(levels=4, codebook_size=16).fit(vectors, seed=seed)
    means = [errors(vectors, quantizer.codebooks, quantizer.encode(vectors, beam=b)).mean() for b in (1, 2, 4, 8, 32)]
    assert np.all(np.diff(means) <= 1e-3 * means[0]), means
    assert means[-1] < 0.99 * means[0]


def test_a_beam_of_one_is_greedy_and_what_faiss_does():
    vectors = mixture(1_500, 12)
    quantizer = ResidualKMeans(levels=3, codebook_size=32).fit(vectors)
    theirs = faiss.ResidualQuantizer(12, 3, 5)
    theirs.max_beam_size = 1
    faiss.copy_array_to_vector(np.concatenate(quantizer.codebooks).ravel(), theirs.codebooks)
    theirs.is_trained = True
    codes = faiss.unpack_bitstrings(theirs.compute_codes(vectors), [5, 5, 5])
    assert np.array_equal(quantizer.encode(vectors, beam=1), codes)
    assert np.array_equal(quantizer.encode(vectors), codes)


def test_tables_change_nothing():
    """Many rows are encoded by tables of inner products, few without."""
    vectors = mixture(2_500, 20)
    codebooks = ResidualKMeans(levels=4, codebook_size=[20, 16, 9, 30]).fit(vectors).codebooks
    many = choose_codes(vectors, codebooks, 6)
    few = np.concatenate([choose_codes(vectors[start : start + 100], codebooks, 6) for start in range(0, 2_500, 100)])
    different = (many != few).any(axis=1)
    assert different.mean() < 0.01
    np.testing.assert_allclose(errors(vectors, codebooks, many), errors(vectors, codebooks, few), rtol=1e-4)


def test_prefixes_stay_those_of_the_nearest_codewords():
    vectors = mixture(1_500, 16)
    locked = ResidualKMeans(levels=4, codebook_size=8, beam=16, prefix_levels=2).fit(vectors)
    greedy, free = (
        locked.encode(vectors, beam=1),
        ResidualKMeans.restore({**locked.get_config(), "prefix_levels": 0}, locked.state()),
    )
    codes = locked.encode(vectors)
    assert np.array_equal(codes[:, :2], greedy[:, :2])
    assert (codes[:, 2:] != greedy[:, 2:]).any()
    assert (free.encode(vectors)[:, :2] != greedy[:, :2]).any(), "a free beam leaves the nearest codewords"
    means = [errors(vectors, locked.codebooks, each).mean() for each in (greedy, codes, free.encode(vectors))]
    assert means[0] > means[1] > means[2]


def test_a_prefix_beam_finds_the_best_pair():
    vectors = mixture(800, 8)
    pairs = ResidualKMeans(levels=3, codebook_size=8, prefix_levels=2, prefix_beam=64).fit(vectors)
    codes, first = pairs.encode(vectors), pairs.codebooks[:2]
    np.testing.assert_allclose(errors(vectors, first, codes[:, :2]), best_errors(vectors, first), rtol=1e-4)
    left = vectors - first[0][codes[:, 0]] - first[1][codes[:, 1]]
    np.testing.assert_allclose(
        errors(left, pairs.codebooks[2:], codes[:, 2:]), best_errors(left, pairs.codebooks[2:]), rtol=1e-4
    )


def test_the_beam_is_kept_with_an_index(tmp_path):
    vectors = mixture(1_200, 16)
    path = tmp_path / "beam.duckdb"
    with semid.create(path, dim=16, levels=3, codebook_size=16, beam=8, prefix_levels=1, prefix_beam=1) as index:
        index.train(vectors)
        index.add(vectors)
        codes = index.encode(vectors)
        greedy = choose_codes(vectors, index._quantizer.codebooks, 1)
    assert (codes != greedy).any()
    with semid.open(path) as index:
        assert np.array_equal(index.encode(vectors), codes)
        stored = index.sql("SELECT c1, c2, c3 FROM semantic_ids ORDER BY id").fetchnumpy()
        assert np.array_equal(np.array([stored[name] for name in ("c1", "c2", "c3")]).T, codes)
        hits = index.search(vectors[:50], k=1)
        assert [ids[0] for ids in hits.ids] == list(range(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam must be a whole number from 1 to 4,096, not 0"),
        ({"beam": 2.5}, "beam must be a whole number from 1 to 4,096, not 2.5"),
        ({"prefix_beam": True}, "prefix_beam must be a whole number from 1 to 4,096, not True"),
        ({"prefix_levels": 5}, "prefix_levels must be a whole number from 0 to 4, not 5"),
        ({"refine": -1}, "refine must be a whole number from 0 to 1,000, not -1"),
        ({"normalize_residuals": 1}, "normalize_residuals must be True or False, not 1"),
        ({"normalize_residuals": True, "beam": 2}, "leave beam and prefix_beam at 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ResidualKMeans(**options)


def test_a_capacity_and_a_beam_exclude_each_other():
    with pytest.raises(InvalidArgumentError, match="With a capacity, vectors are encoded greedily"):
        BalancedResidualKMeans(capacity=1.1, beam=4)


def test_an_encode_beam_that_cannot_be():
    vectors = mixture(100, 4)
    with pytest.raises(InvalidArgumentError, match="beam must be a whole number"):
        ResidualKMeans(levels=2, codebook_size=4).fit(vectors).encode(vectors, beam=-3)
    with pytest.raises(InvalidArgumentError, match="encoding is greedy"):
        ResidualKMeans(levels=2, codebook_size=4, normalize_residuals=True).fit(vectors).encode(vectors, beam=3)


# -- refinement -------------------------------------------------------------------------------------------------------


def test_moved_codewords_are_the_least_squares_solution():
    """With enough sweeps, but for the little weight on staying: against NumPy's solver on the one-hot matrix."""
    random = np.random.default_rng(1)
    sizes, n = (6, 5, 4), 4_000
    vectors = random.standard_normal((n, 7)).astype(np.float32)
    codes = np.column_stack([random.integers(size, size=n) for size in sizes]).astype(np.int32)
    codebooks = random_codebooks(sizes, 7)
    move_codewords(codebooks, vectors, codes, sweeps=100)
    one_hot = np.hstack([np.eye(size)[chosen] for size, chosen in zip(sizes, codes.T, strict=True)])
    solution = np.linalg.lstsq(one_hot, vectors.astype(float), rcond=None)[0]
    best = np.square(vectors - one_hot @ solution).sum()
    assert errors(vectors, codebooks, codes).sum() == pytest.approx(best, rel=1e-4)


def test_a_codeword_without_vectors_stays():
    codebooks = random_codebooks((3, 3), 2)
    before = [book.copy() for book in codebooks]
    codes = np.zeros((10, 2), dtype=np.int32)
    move_codewords(codebooks, mixture(10, 2), codes)
    for book, old in zip(codebooks, before, strict=True):
        assert np.array_equal(book[1:], old[1:])
        assert (book[0] != old[0]).any()


@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_refining_lowers_the_error_of_unseen_vectors(seed, beam):
    vectors, unseen = mixture(6_000, 24, seed=seed), mixture(3_000, 24, seed=seed + 50)
    found = {}
    for rounds in (0, 6):
        quantizer = ResidualKMeans(levels=4, codebook_size=16, beam=beam, refine=rounds).fit(vectors, seed=seed)
        found[rounds] = errors(unseen, quantizer.codebooks, quantizer.encode(unseen)).mean()
    assert found[6] < 0.95 * found[0], found
    report = quantizer.refinement
    assert report.rounds == 6
    assert report.error_after < report.error_before
    after = errors(vectors, quantizer.codebooks, quantizer.encode(vectors)).mean()
    assert after == pytest.approx(report.error_after, rel=1e-4)
    assert len(report.changed) == 4
    assert 0 < report.changed[0] < report.changed[-1] <= 1
    assert list(report.changed) == sorted(report.changed)


def test_refining_real_vectors_lowers_the_error_and_leaves_coarse_levels_coarse():
    vectors = load_sample().vectors
    seen, unseen = vectors[::2], vectors[1::2]
    plain, refined = (ResidualKMeans(levels=4, codebook_size=32, refine=rounds).fit(seen) for rounds in (0, 4))
    whole = [errors(unseen, q.codebooks, q.encode(unseen)).mean() for q in (plain, refined)]
    assert whole[1] < 0.998 * whole[0]
    for depth, allowed in ((1, 1.02), (2, 1.01)):
        coarse = [errors(unseen, q.codebooks[:depth], q.encode(unseen)[:, :depth]).mean() for q in (plain, refined)]
        assert coarse[1] < allowed * coarse[0]
    assert refined.refinement.changed[0] < 0.25


def test_training_tells_how_far_prefixes_moved():
    with semid.create(dim=24, levels=3, codebook_size=8, refine=2) as index:
        report = index.train(mixture(2_000, 24))
    assert report.refinement.rounds == 2
    assert len(report.refinement.changed) == 3


def test_progress_reaches_the_end_of_refining():
    heard = []
    quantizer = ResidualKMeans(levels=2, codebook_size=4, refine=3)
    quantizer.on_progress = lambda done, total, what: heard.append((done, total, what))
    quantizer.fit(mixture(300, 8))
    assert {total for _, total, _ in heard} == {5}
    assert [done for done, *_ in heard] == sorted(done for done, *_ in heard)
    assert heard[-1] == (5, 5, "refine the levels together")


# -- residuals at length 1 --------------------------------------------------------------------------------------------


def test_normalized_residuals_by_hand():
    """At each level the nearest word to what is left over at length 1, as GRID encodes."""
    vectors = mixture(1_000, 12)
    quantizer = ResidualKMeans(levels=3, codebook_size=16, normalize_residuals=True).fit(vectors)
    codes, left = quantizer.encode(vectors), vectors.astype(float)
    for level, (book, scale) in enumerate(zip(quantizer.codebooks, quantizer.state()["scales"], strict=True)):
        left /= np.linalg.norm(left, axis=1, keepdims=True)
        distances = np.square(left[:, None] - book / scale).sum(axis=2)
        chosen = np.take_along_axis(distances, codes[:, [level]].astype(np.int64), axis=1)[:, 0]
        np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-4, atol=1e-6)
        left -= (book / scale)[codes[:, level]]


def test_normalized_residuals_decode_as_well_as_scales_allow():
    vectors = mixture(3_000, 12)
    quantizer = ResidualKMeans(levels=3, codebook_size=16, normalize_residuals=True).fit(vectors)
    codes = quantizer.encode(vectors)
    words = np.array([book.astype(float)[c].ravel() for book, c in zip(quantizer.codebooks, codes.T, strict=True)])
    factors = np.linalg.lstsq(words.T, vectors.astype(float).ravel(), rcond=None)[0]
    np.testing.assert_allclose(factors, 1, atol=1e-3)
    lost = errors(vectors, quantizer.codebooks, codes).sum() / np.square(vectors - vectors.mean(axis=0)).sum()
    assert lost < 0.3


# -- one level, by splitting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 16, 33, 100])
def test_splitting_is_about_as_good_as_bisecting_kmeans_of_scikit_learn(size):
    """Which splits clusters too: one at a time and the worst first, but never moves the others."""
    vectors = mixture(4_000, 10)
    theirs = BisectingKMeans(size, random_state=0).fit(vectors).cluster_centers_.astype(np.float32)
    book = split_codewords(vectors, size, seed=0, iterations=10, report=lambda *_: None)
    ours, other = (faiss.knn(vectors, each, 1)[0].mean() for each in (book, theirs))
    assert book.shape == (size, 10)
    assert ours <= 1.1 * other


def test_splitting_in_one_dimension_by_hand():
    """The mean, 5, is split into the means of the two halves."""
    book = split_codewords(np.array([[0], [1], [9], [10]], np.float32), 2, seed=0, iterations=5, report=lambda *_: None)
    assert sorted(book[:, 0].tolist()) == [0.5, 9.5]


def test_vq_has_one_level():
    with pytest.raises(InvalidArgumentError, match=r"levels must be 1, not 4\. For more, use 'rq'"):
        VectorQuantization(levels=4)


def test_vq_in_an_index():
    vectors = mixture(500, 8)
    with semid.create(dim=8, quantizer="vq", levels=1, codebook_size=32) as index:
        index.train(vectors)
        index.add(vectors)
        assert [ids[0] for ids in index.search(vectors[:20], k=1).ids] == list(range(20))
        assert sum(shelf.items for shelf in index.tree()) == 500
