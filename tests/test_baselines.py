"""The quantizers to compare with (opq, lsq, prq, binary, rabitq) against the suite for plugins, scikit-learn's suite,
and FAISS's own indexes."""

import logging
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

import semid_index as semid
from semid_index.errors import InvalidArgumentError, InvalidVectorsError, PrefixNotSupportedError
from semid_index.plugins import load_plugins
from semid_index.quantizers import additive, bits, opq, rotation
from semid_index.quantizers.additive import LocalSearchQuantization, ProductResidualQuantization
from semid_index.quantizers.bits import BinaryQuantization, RaBitQuantization
from semid_index.quantizers.kmeans import import_faiss, openmp_threads
from semid_index.quantizers.opq import OptimizedProductQuantization
from semid_index.quantizers.pq import ProductQuantization
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.testing import QuantizerContract, estimator

faiss = import_faiss()

BASELINES = [
    OptimizedProductQuantization,
    LocalSearchQuantization,
    ProductResidualQuantization,
    BinaryQuantization,
    RaBitQuantization,
]


# -- the suite for plugins --------------------------------------------------------------------------------------------


class TestOptimizedProductQuantization(QuantizerContract):
    error_ratio = 0.15
    fewest_rows = 16

    def make(self):
        return OptimizedProductQuantization(levels=8, codebook_size=16, rotations=4)


class TestPaddedOptimizedProductQuantization(QuantizerContract):
    """16 dimensions are rotated into 18; and there are fewer training vectors than that."""

    error_ratio = 0.25
    fewest_rows = 8

    def make(self):
        return OptimizedProductQuantization(levels=6, codebook_size=8, iterations=5, rotations=2)


class TestLocalSearchQuantization(QuantizerContract):
    error_ratio = 0.15
    fewest_rows = 16

    def make(self):
        return LocalSearchQuantization(levels=4, codebook_size=16, iterations=5, rounds=5)


class TestProductResidualQuantization(QuantizerContract):
    error_ratio = 0.25
    fewest_rows = 16

    def make(self):
        return ProductResidualQuantization(levels=4, codebook_size=16)


class TestBinaryQuantization(QuantizerContract):
    error_ratio = 0.45

    def make(self):
        return BinaryQuantization(levels=4)


class TestRaBitQuantization(QuantizerContract):
    error_ratio = 0.4

    def make(self):
        return RaBitQuantization()


class TestReducedRaBitQuantization(QuantizerContract):
    """9 of 16 dimensions with 4 bits each: no part of the code ends with a byte."""

    error_ratio = 0.3

    def make(self):
        return RaBitQuantization(bits=4, dims=9)


def test_each_baseline_is_registered_and_in_the_suite():
    offered = load_plugins(entry_points=False).named("quantizer")
    modules = {module.__name__ for module in (additive, bits, opq)}
    registered = {target for target in offered.values() if target.__module__ in modules}
    assert registered == set(BASELINES)
    suites = [value for name, value in globals().items() if name.startswith("Test")]
    assert {type(suite().make()) for suite in suites} == registered


CHECKED = {
    "opq": estimator(OptimizedProductQuantization, levels=2, codebook_size=4, rotations=2),
    "lsq": estimator(LocalSearchQuantization, levels=2, codebook_size=4, iterations=2, rounds=2),
    "prq": estimator(ProductResidualQuantization, levels=2, codebook_size=4, splits=1),
    "binary": estimator(BinaryQuantization, levels=1),
    "rabitq": estimator(RaBitQuantization),
}


@pytest.mark.parametrize("name", [quantizer.name for quantizer in BASELINES])
def test_check_estimator(name):
    checks = check_estimator(CHECKED[name], on_fail=None, on_skip=None)
    counts = Counter(check["status"] for check in checks)
    others = {check["check_name"]: check["exception"] for check in checks if check["status"] != "passed"}
    assert set(others) <= {"check_array_api_input"}, others  # it needs SCIPY_ARRAY_API=1 when SciPy is imported
    assert counts["passed"] >= 40, counts


# -- vectors to work with ---------------------------------------------------------------------------------------------


def _gaussian(n, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def _stretched(n, dim, seed=0):
    """Far from zero, and longer in some directions, oblique ones, than in others."""
    turned = rotation.random_rotation(dim, dim, seed=99)
    return (3 + _gaussian(n, dim, seed) * np.geomspace(4, 0.1, dim) @ turned).astype(np.float32)


def _error(quantizer, vectors):
    return np.square(vectors - quantizer.decode(quantizer.encode(vectors))).sum(axis=1).mean()


def _all_codes(levels, size):
    return np.stack(np.meshgrid(*[np.arange(size)] * levels, indexing="ij"), axis=-1).reshape(-1, levels)


def _lowest_errors(quantizer, vectors):
    """The squared error of the best of all codes, tried one by one."""
    decoded = quantizer.decode(_all_codes(quantizer.levels, quantizer.codebook_sizes[0])).astype(float)
    return np.square(vectors[:, None].astype(float) - decoded).sum(axis=2).min(axis=1)


def _linear(matrix, offset=None):
    """FAISS's transform by a matrix (outputs, dim), and an offset (outputs,)."""
    transform = faiss.LinearTransform(matrix.shape[1], matrix.shape[0], offset is not None)
    faiss.copy_array_to_vector(np.ascontiguousarray(matrix, dtype=np.float32).ravel(), transform.A)
    if offset is not None:
        faiss.copy_array_to_vector(np.ascontiguousarray(offset, dtype=np.float32), transform.b)
    transform.is_trained = True
    return transform


# -- rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 5), (9, 4), (4, 9)])
def test_random_rotations_are_orthonormal(rows, columns):
    turned = rotation.random_rotation(rows, columns, seed=3)
    assert turned.shape == (rows, columns)
    smaller = turned.T @ turned if rows >= columns else turned @ turned.T
    np.testing.assert_allclose(smaller, np.eye(len(smaller)), atol=1e-12)
    assert np.array_equal(turned, rotation.random_rotation(rows, columns, seed=3))
    assert not np.allclose(abs(turned), abs(rotation.random_rotation(rows, columns, seed=4))) or rows == columns == 1


def test_a_projection_keeps_the_main_axes():
    """What it keeps of the variance is the share of the largest eigenvalues, by NumPy's singular values."""
    vectors = _stretched(500, 12)
    matrix = rotation.random_projection(vectors, 5, seed=0)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(5), atol=1e-5)
    centred = vectors - vectors.mean(axis=0, dtype=float)
    kept = np.square(rotation.projected(centred.astype(np.float32), matrix)).sum()
    np.testing.assert_allclose(kept, np.square(np.linalg.svd(centred)[1][:5]).sum(), rtol=1e-5)


# -- optimized product quantization -----------------------------------------------------------------------------------


def _faiss_opq(quantizer):
    """FAISS's index with the rotation and the codewords of ours."""
    turned = quantizer.state()["rotation"]
    index = faiss.IndexPQ(len(turned), quantizer.levels, quantizer.codebook_sizes[0].bit_length() - 1)
    words = quantizer.state()["codewords"]
    assert words.shape == (quantizer.levels, quantizer.codebook_sizes[0], len(turned) // quantizer.levels)
    faiss.copy_array_to_vector(words.ravel(), index.pq.centroids)
    index.is_trained = True
    transform = _linear(turned)
    transform.is_orthonormal = True
    whole = faiss.IndexPreTransform(transform, index)
    return whole, (transform, index)


@pytest.mark.parametrize(("dim", "levels", "size"), [(16, 4, 16), (10, 4, 32), (5, 8, 4), (12, 2, 512), (64, 64, 2)])
def test_opq_gives_the_codes_of_faiss(dim, levels, size):
    vectors, unseen = _stretched(1_000, dim), _stretched(300, dim, seed=1)
    quantizer = OptimizedProductQuantization(levels, size, iterations=4, rotations=3).fit(vectors)
    index, _kept = _faiss_opq(quantizer)
    packed = index.sa_encode(unseen)
    codes = quantizer.encode(unseen)
    assert np.array_equal(codes, faiss.unpack_bitstrings(packed, levels, size.bit_length() - 1))
    np.testing.assert_allclose(quantizer.decode(codes), index.sa_decode(packed), atol=2e-5)
    assert len(np.unique(codes)) > size / 2


def test_opq_distances_are_those_of_faiss():
    """The distance to a decoded vector is what FAISS's own search by look-up tables gives."""
    vectors, queries = _stretched(800, 12), _stretched(20, 12, seed=1)
    quantizer = OptimizedProductQuantization(4, 16, rotations=3).fit(vectors)
    index, _kept = _faiss_opq(quantizer)
    index.add(vectors)
    theirs, ids = index.search(queries, 10)
    ours = np.square(queries[:, None] - quantizer.decode(quantizer.encode(vectors))[ids]).sum(axis=2)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_opq_learns_as_well_as_faiss_and_better_than_without_rotation():
    vectors, unseen = _stretched(1_500, 16), _stretched(1_000, 16, seed=1)
    ours = OptimizedProductQuantization(4, 16, rotations=10).fit(vectors)
    transform, index, codewords = faiss.OPQMatrix(16, 4), faiss.IndexPQ(16, 4, 4), faiss.ProductQuantizer(16, 4, 4)
    transform.niter, transform.pq = 10, codewords
    theirs = faiss.IndexPreTransform(transform, index)
    with openmp_threads(1):
        theirs.train(vectors)
    their_error = np.square(unseen - theirs.sa_decode(theirs.sa_encode(unseen))).sum(axis=1).mean()
    assert _error(ours, unseen) <= 1.05 * their_error
    assert _error(ours, unseen) < 0.8 * _error(ProductQuantization(4, 16).fit(vectors), unseen)


@pytest.mark.parametrize(("dim", "levels"), [(16, 4), (10, 4)])
def test_opq_rotation_keeps_distances(dim, levels):
    quantizer = OptimizedProductQuantization(levels, 4, rotations=3).fit(_stretched(100, dim))
    turned = quantizer.state()["rotation"]
    np.testing.assert_allclose(turned.T @ turned, np.eye(dim), atol=1e-5)
    for level, book in enumerate(quantizer.codebooks):
        others = np.delete(turned, range(level * len(turned) // levels, (level + 1) * len(turned) // levels), axis=0)
        if dim % levels == 0:  # then each codeword lies in the directions of its own piece
            np.testing.assert_allclose(book @ others.T, 0, atol=1e-5)


# -- local search quantization ----------------------------------------------------------------------------------------


def _faiss_lsq(quantizer):
    """FAISS's quantizer with the codewords of ours."""
    dim = quantizer.codebooks[0].shape[1]
    theirs = faiss.LocalSearchQuantizer(dim, quantizer.levels, quantizer.codebook_sizes[0].bit_length() - 1)
    faiss.copy_array_to_vector(np.concatenate(quantizer.codebooks, axis=None), theirs.codebooks)
    theirs.is_trained = True
    return theirs


@pytest.fixture(scope="module")
def lsq():
    return LocalSearchQuantization(8, 16, iterations=8).fit(_stretched(2_000, 16))


def test_lsq_has_the_codebooks_of_faiss(lsq):
    theirs = faiss.LocalSearchQuantizer(16, 8, 4)
    theirs.train_iters = 8
    theirs.random_seed = 0
    theirs.train(_stretched(2_000, 16))
    assert np.array_equal(np.concatenate(lsq.codebooks, axis=None), faiss.vector_to_array(theirs.codebooks))


def test_lsq_encodes_as_well_as_faiss(lsq):
    """FAISS draws other random changes, so codes may differ; how good they are may not."""
    unseen = _stretched(2_000, 16, seed=1)
    theirs = _faiss_lsq(lsq)
    assert lsq.rounds == theirs.encode_ils_iters
    packed = theirs.compute_codes(unseen)
    decoded = theirs.decode(packed)
    assert _error(lsq, unseen) <= 1.01 * np.square(unseen - decoded).sum(axis=1).mean()
    np.testing.assert_allclose(lsq.decode(faiss.unpack_bitstrings(packed, 8, 4)), decoded, atol=1e-5)


def test_lsq_finds_the_best_codes_of_a_toy():
    quantizer = LocalSearchQuantization(3, 4, iterations=5, rounds=400).fit(_stretched(300, 6))
    unseen = _stretched(300, 6, seed=1)
    errors = np.square(unseen - quantizer.decode(quantizer.encode(unseen)).astype(float)).sum(axis=1)
    np.testing.assert_allclose(errors, _lowest_errors(quantizer, unseen), rtol=1e-4)


def test_lsq_codes_get_better_with_every_round(lsq):
    unseen = _stretched(500, 16, seed=1)
    state = lsq.state()
    errors = []
    for rounds in (1, 2, 4, 8, 16):
        fewer = {**state, "changes": state["changes"][:rounds]}
        shorter = LocalSearchQuantization.restore({**lsq.get_config(), "rounds": rounds}, fewer)
        errors.append(np.square(unseen - shorter.decode(shorter.encode(unseen))).sum(axis=1))
    assert all((later <= earlier * (1 + 1e-5)).all() for earlier, later in pairwise(errors))
    assert errors[-1].mean() < 0.95 * errors[0].mean()


def test_lsq_loses_less_of_noise_than_residual_k_means():
    vectors, unseen = _gaussian(2_000, 16), _gaussian(1_000, 16, seed=1)
    ours = LocalSearchQuantization(8, 16, iterations=5).fit(vectors)
    assert _error(ours, unseen) < 0.9 * _error(ResidualKMeans(8, 16).fit(vectors), unseen)


def test_lsq_codes_do_not_depend_on_the_place_in_a_batch(lsq):
    """To the bit, though hundreds of comparisons lead to each of them."""
    unseen = _stretched(200, 16, seed=1)
    together = lsq.encode(unseen)
    assert np.array_equal(np.concatenate([lsq.encode(row[None]) for row in unseen]), together)
    assert np.array_equal(lsq.encode(np.concatenate([_stretched(77, 16), unseen]))[77:], together)


# -- product residual quantization ------------------------------------------------------------------------------------


def _faiss_prq(quantizer):
    """FAISS's quantizer with the codewords of ours."""
    dim = quantizer.codebooks[0].shape[1]
    each, width = quantizer.levels // quantizer.splits, dim // quantizer.splits
    nbits = quantizer.codebook_sizes[0].bit_length() - 1
    theirs = faiss.ProductResidualQuantizer(dim, quantizer.splits, each, nbits)
    own = [book[:, m // each * width : (m // each + 1) * width] for m, book in enumerate(quantizer.codebooks)]
    faiss.copy_array_to_vector(np.concatenate(own, axis=None), theirs.codebooks)
    for split in range(quantizer.splits):
        piece = faiss.downcast_Quantizer(theirs.subquantizer(split))
        words = np.concatenate(own[split * each : (split + 1) * each], axis=None)
        faiss.copy_array_to_vector(words, piece.codebooks)
        piece.max_beam_size = min(5, quantizer.codebook_sizes[0] ** each)  # with a wider one than all codes it is wrong
        piece.is_trained = True
    theirs.is_trained = True
    return theirs


@pytest.mark.parametrize(
    ("dim", "levels", "size", "splits"), [(16, 4, 16, 2), (12, 6, 8, 3), (10, 4, 32, 1), (8, 8, 4, 8)]
)
def test_prq_gives_the_codes_of_faiss(dim, levels, size, splits):
    vectors, unseen = _stretched(1_000, dim), _stretched(300, dim, seed=1)
    quantizer = ProductResidualQuantization(levels, size, splits=splits).fit(vectors)
    theirs = _faiss_prq(quantizer)
    packed = theirs.compute_codes(unseen)
    codes = quantizer.encode(unseen)
    assert np.array_equal(codes, faiss.unpack_bitstrings(packed, levels, size.bit_length() - 1))
    np.testing.assert_allclose(quantizer.decode(codes), theirs.decode(packed), atol=1e-5)


def test_prq_learns_as_well_as_faiss():
    vectors, unseen = _stretched(2_000, 16), _stretched(1_000, 16, seed=1)
    theirs = faiss.ProductResidualQuantizer(16, 2, 2, 4)
    theirs.train(vectors)
    their_error = np.square(unseen - theirs.decode(theirs.compute_codes(unseen))).sum(axis=1).mean()
    assert _error(ProductResidualQuantization(4, 16).fit(vectors), unseen) <= 1.05 * their_error


def test_prq_with_a_beam_as_wide_as_all_codes_finds_the_best():
    quantizer = ProductResidualQuantization(3, 4, splits=1).fit(_stretched(300, 6))
    unseen = _stretched(300, 6, seed=1)
    found = [quantizer.decode(quantizer.encode(unseen, beam=beam)).astype(float) for beam in (1, 5, 64, 99)]
    greedy, own, widest, wider = (np.square(unseen - decoded).sum(axis=1) for decoded in found)
    np.testing.assert_allclose(widest, _lowest_errors(quantizer, unseen), rtol=1e-4)
    assert np.array_equal(wider, widest)
    assert (widest <= own * (1 + 1e-5)).all()
    assert own.mean() < 0.99 * greedy.mean()
    assert np.array_equal(quantizer.encode(unseen), quantizer.encode(unseen, beam=5)), "its own beam is 5"


def test_prq_with_a_beam_of_one_is_greedy():
    quantizer = ProductResidualQuantization(4, 16).fit(_stretched(500, 8))
    unseen = _stretched(200, 8, seed=1)
    codes = quantizer.encode(unseen, beam=1)
    for columns, levels in ((slice(0, 4), (0, 1)), (slice(4, 8), (2, 3))):
        left = unseen[:, columns].astype(float)
        for level in levels:
            words = quantizer.codebooks[level][:, columns]
            assert np.array_equal(np.square(left[:, None] - words).sum(axis=2).argmin(axis=1), codes[:, level])
            left -= words[codes[:, level]]


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "levels"), [(16, 1), (16, 2), (5, 2), (40, 3)])
def test_binary_gives_the_codes_of_faiss(dim, levels):
    """FAISS's index with our rotation, and thresholds that it learns itself."""
    vectors, unseen = _stretched(501, dim), _stretched(200, dim, seed=1)
    quantizer = BinaryQuantization(levels).fit(vectors)
    index = faiss.IndexLSH(dim, 8 * levels, True, True)
    faiss.copy_array_to_vector(quantizer.state()["rotation"].ravel(), index.rrot.A)
    index.train(vectors)
    np.testing.assert_allclose(quantizer.state()["thresholds"], faiss.vector_to_array(index.thresholds), atol=1e-5)
    assert np.array_equal(quantizer.encode(unseen), index.sa_encode(unseen))
    theirs = np.square(unseen - index.sa_decode(index.sa_encode(unseen))).sum(axis=1).mean()
    assert _error(quantizer, unseen) < theirs


@pytest.mark.parametrize(("dim", "levels"), [(16, 1), (5, 2), (40, 3)])
def test_binary_decodes_by_least_squares(dim, levels):
    vectors = _stretched(400, dim)
    quantizer = BinaryQuantization(levels).fit(vectors)
    packed = quantizer.encode(vectors).astype(np.uint8)
    inputs = np.column_stack([np.unpackbits(packed, axis=1), np.ones(len(vectors))])
    best = inputs @ np.linalg.lstsq(inputs, vectors.astype(float))[0]
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(vectors)), best, atol=1e-4)


def _faiss_rabitq(quantizer):
    """FAISS's index with the rotation of ours, around its mean and in its unit."""
    state = quantizer.state()
    dims = len(state["rotation"])
    index = faiss.IndexRaBitQ(dims, faiss.METRIC_L2, quantizer.bits)
    index.qb = 0  # queries are not rounded
    faiss.copy_array_to_vector(np.zeros(dims, dtype=np.float32), index.center)
    index.is_trained = True
    matrix = state["rotation"] / state["unit"]
    transform = _linear(matrix, -matrix @ state["mean"])
    return faiss.IndexPreTransform(transform, index), (transform, index)


@pytest.mark.parametrize(
    ("dim", "dims", "nbits"), [(16, None, 1), (40, 13, 1), (16, None, 2), (13, None, 5), (24, 9, 9)]
)
def test_rabitq_gives_the_codes_of_faiss(dim, dims, nbits):
    vectors, unseen = _stretched(500, dim), _stretched(200, dim, seed=1)
    quantizer = RaBitQuantization(bits=nbits, dims=dims).fit(vectors)
    index, _kept = _faiss_rabitq(quantizer)
    ours, theirs = quantizer.encode(unseen).astype(np.uint8), index.sa_encode(unseen)
    assert ours.shape == theirs.shape
    end = -(-(dims or dim) // 8)
    assert np.array_equal(ours[:, :end], theirs[:, :end]), "signs"
    numbers = [np.ascontiguousarray(codes[:, -8:]).view("<f4") for codes in (ours, theirs)]
    # Rounded otherwise, a vector may get another of several scales that are equally good.
    np.testing.assert_allclose(*numbers, rtol=1e-5 if nbits == 1 else 1e-2, err_msg="factors")
    if nbits > 1:
        assert (ours[:, end + 12 : -8] == theirs[:, end + 12 : -8]).mean() > 0.98, "further bits"


@pytest.mark.parametrize(("dims", "nbits"), [(None, 1), (7, 1), (None, 2), (9, 4), (None, 8)])
def test_rabitq_decodes_to_the_nearest_vector_in_the_direction_of_faiss(dims, nbits):
    """FAISS's distances to queries along each axis, and to their opposites, say to which vector its search takes each
    code; ours must lie in that direction from the mean, at the foot of the perpendicular from what was encoded."""
    vectors = _stretched(300, 16)
    quantizer = RaBitQuantization(bits=nbits, dims=dims).fit(vectors)
    index, _kept = _faiss_rabitq(quantizer)
    index.add(vectors)
    state = quantizer.state()
    matrix, mean = state["rotation"], state["mean"]
    axes = 1e-3 * state["unit"] * np.concatenate([matrix, -matrix])
    distances, ids = index.search((mean + axes).astype(np.float32), len(vectors))
    by_id = np.take_along_axis(distances, np.argsort(ids, axis=1), axis=1)
    theirs = (by_id[len(matrix) :] - by_id[: len(matrix)]).T / 4e-3
    ours = (quantizer.decode(quantizer.encode(vectors)) - mean) @ matrix.T
    encoded = (vectors - mean) @ matrix.T
    lengths = np.linalg.norm(ours, axis=1)
    cosines = (ours * theirs).sum(axis=1) / lengths / np.linalg.norm(theirs, axis=1)
    np.testing.assert_allclose(cosines, 1, atol=1e-3)
    np.testing.assert_allclose((encoded * ours).sum(axis=1) / lengths, lengths, rtol=1e-4)
    assert (lengths < np.linalg.norm(encoded, axis=1)).all()


def test_rabitq_loses_less_with_every_bit():
    vectors, unseen = _stretched(500, 32), _stretched(200, 32, seed=1)
    errors = [_error(RaBitQuantization(bits=nbits).fit(vectors), unseen) for nbits in range(1, 10)]
    assert all(np.diff(errors) < 0), errors
    assert errors[-1] < 1e-4 * errors[0]


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e15])
def test_rabitq_works_at_any_scale(scale):
    """FAISS alone takes short vectors for zero."""
    vectors = _stretched(500, 16)
    usual = _error(RaBitQuantization().fit(vectors), vectors)
    scaled = (scale * vectors).astype(np.float32)
    quantizer = RaBitQuantization().fit(scaled)
    lost = np.square(scaled / scale - quantizer.decode(quantizer.encode(scaled)) / scale).sum(axis=1).mean()
    assert lost == pytest.approx(usual, rel=1e-3)


def test_rabitq_decodes_the_mean_itself():
    vectors = np.array([[1, 5], [3, 5], [2, 5]], dtype=np.float32)
    for nbits in (1, 3):
        quantizer = RaBitQuantization(bits=nbits).fit(vectors)
        np.testing.assert_allclose(quantizer.decode(quantizer.encode(vectors[2:])), vectors[2:], atol=1e-6)
        same = RaBitQuantization(bits=nbits).fit(vectors[:1])
        np.testing.assert_allclose(same.decode(same.encode(vectors[:1])), vectors[:1])


def test_rabitq_has_one_level_for_each_byte_whatever_it_is_asked_for(caplog):
    with caplog.at_level(logging.INFO, logger="semid_index"):
        quantizer = RaBitQuantization(levels=4, codebook_size=256, dims=64)
        assert "'rabitq' has one level for each byte of its codes; levels=4" in caplog.text
        caplog.clear()
        RaBitQuantization(codebook_size=256)
        assert caplog.text == ""
    assert (quantizer.levels, quantizer.codebook_sizes) == (0, ())
    quantizer.fit(_gaussian(100, 100))
    assert (quantizer.levels, quantizer.codebook_sizes) == (16, (256,) * 16)


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKED)
def test_batches_leave_no_trace(name, monkeypatch):
    """Whatever is encoded or decoded in pieces comes out as it would in one."""
    vectors = _stretched(400, 6)
    quantizer = CHECKED[name].fit(vectors).quantizer_
    codes = quantizer.encode(vectors)
    decoded = quantizer.decode(codes)
    for module, size in (
        (additive, "_LOOKUPS"),
        (additive, "_PRQ_BATCH"),
        (opq, "_ENCODE_BATCH"),
        (bits, "_BATCH"),
        (rotation, "_BATCH"),
    ):
        monkeypatch.setattr(module, size, 97)
    assert np.array_equal(quantizer.encode(vectors), codes)
    assert np.array_equal(quantizer.decode(codes), decoded)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizedProductQuantization(codebook_size=100), "'opq' needs one power of two .* not 100"),
        (lambda: OptimizedProductQuantization(rotations=0), "rotations must be a whole number, at least 1, not 0"),
        (lambda: OptimizedProductQuantization(levels=65), "levels must be a whole number from 1 to 64, not 65"),
        (
            lambda: LocalSearchQuantization(codebook_size=[4, 8], levels=2),
            "'lsq' needs one power of two .* not \\[4, 8",
        ),
        (lambda: LocalSearchQuantization(64, 256), "at most 8,192 codewords; 64 levels of 256 are 16,384"),
        (lambda: LocalSearchQuantization(rounds=0), "rounds must be a whole number, at least 1, not 0"),
        (lambda: LocalSearchQuantization(iterations=True), "iterations must be a whole number, at least 1, not True"),
        (lambda: ProductResidualQuantization(codebook_size=48), "'prq' needs one power of two .* not 48"),
        (lambda: ProductResidualQuantization(5), "5 levels cannot be shared evenly among 2 pieces"),
        (lambda: ProductResidualQuantization(splits=1.0), "splits must be a whole number, at least 1, not 1.0"),
        (lambda: ProductResidualQuantization(beam=0), "beam must be a whole number from 1 to 4,096, not 0"),
        (lambda: ProductResidualQuantization(4, 4).fit(_gaussian(9, 5)), "5 dimensions cannot be cut into 2 pieces"),
        (lambda: BinaryQuantization(codebook_size=16), "is a byte, so codebook_size must be 256, not 16"),
        (lambda: RaBitQuantization(bits=10), "bits must be a whole number from 1 to 9, not 10"),
        (lambda: RaBitQuantization(dims=0), "dims must be a whole number, at least 1, or None for all, not 0"),
        (lambda: RaBitQuantization(dims=6).fit(_gaussian(9, 5)), "5 dimensions cannot be reduced to dims=6"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make()


@pytest.mark.parametrize("name", ["opq", "lsq", "binary", "rabitq"])
def test_beam_other_than_one_is_refused(name):
    quantizer = CHECKED[name].fit(_gaussian(20, 4)).quantizer_
    assert np.array_equal(quantizer.encode(_gaussian(2, 4), beam=1), quantizer.encode(_gaussian(2, 4)))
    with pytest.raises(InvalidArgumentError, match="beam must be 1, not 4"):
        quantizer.encode(_gaussian(2, 4), beam=4)


@pytest.mark.parametrize("name", CHECKED)
def test_too_few_rows_says_how_many(name):
    with pytest.raises(InvalidVectorsError, match="n_samples = 0"):
        CHECKED[name].fit(_gaussian(0, 4))


# -- in an index ------------------------------------------------------------------------------------------------------

INDEXES = {
    "opq of 8 levels": {"quantizer": "opq", "levels": 8, "codebook_size": 16, "rotations": 3},
    "opq of 32 levels": {"quantizer": "opq", "levels": 32, "codebook_size": 16, "rotations": 2},
    "lsq": {"quantizer": "lsq", "levels": 6, "codebook_size": 16, "iterations": 4, "rounds": 4},
    "prq of 32 levels": {"quantizer": "prq", "levels": 32, "codebook_size": 4, "splits": 8},
    "binary": {"quantizer": "binary", "levels": 8},
    "rabitq": {"quantizer": "rabitq"},
    "rabitq of few dimensions": {"quantizer": "rabitq", "dims": 8, "bits": 4},
}


@pytest.mark.parametrize(
    ("case", "metric"), [*((case, "l2") for case in INDEXES), ("opq of 32 levels", "cosine"), ("rabitq", "cosine")]
)
def test_an_index_finds_what_is_near(case, metric, tmp_path, vectors, queries):
    """With stored vectors, hits are those of brute force, as far as scanning by tail codes lets them be; after
    reopening, codes and hits are the same; and prefixes are refused."""
    path = tmp_path / "x.duckdb"
    with semid.create(path, dim=24, metric=metric, **INDEXES[case]) as index:
        index.train(vectors)
        index.add(vectors)
        codes = index.encode(vectors)
        found, exact = index.search(queries, k=10), index.search(queries, k=10, exact=True)
        stored = index.sql("SELECT * FROM semantic_ids ORDER BY id").fetchnumpy()
    assert np.array_equal(np.stack([stored[f"c{level}"] for level in range(1, codes.shape[1] + 1)], axis=1), codes)
    comparable = [v / np.linalg.norm(v, axis=1, keepdims=True) if metric == "cosine" else v for v in (vectors, queries)]
    by_hand = np.argsort(np.linalg.norm(comparable[1][:, None] - comparable[0][None], axis=2), axis=1)[:, :10]
    assert np.array_equal(np.stack(exact.ids), by_hand)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids, by_hand, strict=True)])
    assert recall > 0.95
    name = INDEXES[case]["quantizer"]
    with semid.open(path) as index:
        assert np.array_equal(index.encode(vectors), codes)
        assert [ids.tolist() for ids in index.search(queries, k=10).ids] == [ids.tolist() for ids in found.ids]
        for refuse in (lambda: index.prefix("1"), lambda: index.tree()):
            with pytest.raises(PrefixNotSupportedError, match=re.escape(f"codes of '{name}' are not a hierarchy")):
                refuse()


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_without_vectors_finds_what_codes_can(case, vectors, queries):
    """Hits are the nearest of the decoded vectors, by brute force."""
    with semid.create(dim=24, vectors="none", **INDEXES[case]) as index:
        index.train(vectors)
        index.add(vectors)
        decoded = index.decode(index.encode(vectors)).astype(float)
        found = index.search(queries, k=10)
    distances = np.linalg.norm(queries[:, None] - decoded, axis=2)
    lowest = np.sort(distances, axis=1)[:, :10]
    np.testing.assert_allclose(np.stack(found.distances), lowest, rtol=1e-3)
    exact = np.argsort(np.linalg.norm(queries[:, None].astype(float) - vectors, axis=2), axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids, exact, strict=True)])
    assert recall > 0.25, "by chance it would be 0.005"
