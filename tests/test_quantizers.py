"""Every built-in quantizer against the suite for plugins, scikit-learn's suite, and FAISS."""

import logging
import re
from collections import Counter

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils.estimator_checks import check_estimator

from semid_index.errors import InvalidArgumentError, InvalidVectorsError
from semid_index.plugins import load_plugins
from semid_index.quantizer import Quantizer
from semid_index.quantizers.balanced_rq import BalancedResidualKMeans
from semid_index.quantizers.kmeans import import_faiss
from semid_index.quantizers.pq import ProductQuantization
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.quantizers.scalar import ScalarQuantization4, ScalarQuantization8
from semid_index.quantizers.vq import VectorQuantization
from semid_index.testing import QuantizerContract, assert_raises, assert_same_codes, estimator

faiss = import_faiss()

BASELINES = [f"semid_index.quantizers.{module}" for module in ("opq", "additive", "bits")]
BUILT_IN = [
    ResidualKMeans,
    BalancedResidualKMeans,
    VectorQuantization,
    ProductQuantization,
    ScalarQuantization8,
    ScalarQuantization4,
]


# -- the suite for plugins --------------------------------------------------------------------------------------------


class TestResidualKMeans(QuantizerContract):
    error_ratio = 0.2
    fewest_rows = 16

    def make(self):
        return ResidualKMeans(levels=3, codebook_size=16)


class TestUnevenResidualKMeans(QuantizerContract):
    error_ratio = 0.2
    fewest_rows = 33

    def make(self):
        return ResidualKMeans(levels=3, codebook_size=[33, 5, 2], iterations=5)


class TestBalancedResidualKMeans(QuantizerContract):
    error_ratio = 0.2
    fewest_rows = 16

    def make(self):
        return BalancedResidualKMeans(levels=3, codebook_size=16)


class TestRefinedResidualKMeans(QuantizerContract):
    error_ratio = 0.18
    fewest_rows = 16

    def make(self):
        return ResidualKMeans(levels=3, codebook_size=16, beam=4, prefix_levels=2, prefix_beam=16, refine=3)


class TestNormalizedResidualKMeans(QuantizerContract):
    error_ratio = 0.3
    fewest_rows = 16

    def make(self):
        return ResidualKMeans(levels=3, codebook_size=16, normalize_residuals=True)


class TestVectorQuantization(QuantizerContract):
    error_ratio = 0.35
    fewest_rows = 40

    def make(self):
        return VectorQuantization(codebook_size=40)


class TestProductQuantization(QuantizerContract):
    error_ratio = 0.2
    fewest_rows = 16

    def make(self):
        return ProductQuantization(levels=8, codebook_size=16)


class TestScalarQuantization8(QuantizerContract):
    error_ratio = 1e-4
    seeded = False

    def make(self):
        return ScalarQuantization8()


class TestScalarQuantization4(QuantizerContract):
    error_ratio = 0.02
    seeded = False

    def make(self):
        return ScalarQuantization4()


def test_each_built_in_quantizer_is_registered_and_in_the_suite():
    offered = load_plugins(entry_points=False).named("quantizer")
    baselines = {"opq", "lsq", "prq", "binary", "rabitq"}  # test_baselines.py has these
    registered = {target for name, target in offered.items() if name not in baselines}
    assert registered == set(BUILT_IN)
    suites = [value for name, value in globals().items() if name.startswith("Test")]
    assert {type(suite().make()) for suite in suites} == registered


# -- does the suite find what is wrong? -------------------------------------------------------------------------------


class Reversed(ResidualKMeans):
    """Finest level first."""

    def fit(self, vectors, *, seed=0):
        super().fit(vectors, seed=seed)
        self._turn()
        return self

    def encode(self, vectors, *, beam=1):
        self._turn()
        try:
            return super().encode(vectors)[:, ::-1]
        finally:
            self._turn()

    def _turn(self):
        names = [f"codebook_{level}" for level in range(1, self.levels + 1)]
        self.learned = dict(zip(names, [self.state()[name] for name in reversed(names)], strict=True))


class Unseeded(ResidualKMeans):
    def fit(self, vectors, *, seed=0):
        return super().fit(vectors, seed=0)


class Int64(ResidualKMeans):
    def encode(self, vectors, *, beam=1):
        return super().encode(vectors).astype(np.int64)


class OffByOne(ResidualKMeans):
    def encode(self, vectors, *, beam=1):
        return super().encode(vectors) + np.int32(1)


class BatchDependent(ResidualKMeans):
    """Encodes what is left of the batch's mean."""

    def encode(self, vectors, *, beam=1):
        return super().encode(vectors - np.mean(vectors, axis=0, keepdims=True) if len(vectors) else vectors)


class Forgetful(ResidualKMeans):
    """Restores the codebooks in another order."""

    @classmethod
    def restore(cls, config, state):
        return super().restore(config, {name: state[f"codebook_{3 - i}"] for i, name in enumerate(sorted(state))})


class Unchecked(ResidualKMeans):
    """NaN is not refused."""

    def encode(self, vectors, *, beam=1):
        return super().encode(np.nan_to_num(vectors))


class Scribbling(ResidualKMeans):
    def fit(self, vectors, *, seed=0):
        result = super().fit(vectors, seed=seed)
        vectors -= 1
        return result


class Silent(ResidualKMeans):
    def report_progress(self, done, total, what):
        pass


class Backwards(ResidualKMeans):
    def report_progress(self, done, total, what):
        super().report_progress(total - done, total, what)


class Lossy(ResidualKMeans):
    def get_config(self):
        return {"levels": self.levels, "codebook_size": self.codebook_sizes[0]}


class NotAdditive(ResidualKMeans):
    def decode(self, codes):
        return super().decode(codes) + np.float32(0.5)


class Wasteful(ResidualKMeans):
    """Ignores all levels but the first."""

    def encode(self, vectors, *, beam=1):
        codes = super().encode(vectors)
        codes[:, 1:] = 0
        return codes


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Reversed, "test_coarsest_first"),
        (Wasteful, "test_coarsest_first"),
        (Wasteful, "test_error"),
        (Unseeded, "test_seed"),
        (Int64, "test_codes"),
        (OffByOne, "test_codes"),
        (BatchDependent, "test_alone_or_in_a_batch"),
        (Forgetful, "test_restore"),
        (Unchecked, "test_bad_vectors_are_refused"),
        (Scribbling, "test_input_is_not_changed"),
        (Silent, "test_progress"),
        (Backwards, "test_progress"),
        (Lossy, "test_config_has_every_option"),
        (NotAdditive, "test_additive"),
    ],
)
def test_the_suite_finds_broken_quantizers(broken, test):
    class Suite(QuantizerContract):
        error_ratio = 0.05
        rows = 600
        fewest_rows = 16

        def make(self):
            return broken(levels=3, codebook_size=16, iterations=5)

    if broken is not Wasteful:
        Suite.error_ratio = 0.2
        Suite().test_sizes()  # the harness itself works
    with pytest.raises(AssertionError):
        getattr(Suite(), test)()


def test_a_suite_without_make_says_so():
    class Suite(QuantizerContract):
        pass

    with pytest.raises(NotImplementedError, match="Suite must define make"):
        Suite().test_sizes()


def test_assert_raises_tells_errors_apart():
    assert str(assert_raises(ValueError, lambda: int("x"), "int")).startswith("invalid literal")
    with pytest.raises(AssertionError, match="KeyError expected, not ValueError"):
        assert_raises(KeyError, lambda: int("x"), "int")
    with pytest.raises(AssertionError, match="KeyError expected, and nothing was raised"):
        assert_raises(KeyError, lambda: int("1"), "int")


def test_near_ties_are_no_difference_and_others_are():
    quantizer = ResidualKMeans(levels=2, codebook_size=2)
    quantizer.learned = {
        "codebook_1": np.array([[-1.0], [1]], dtype=np.float32),
        "codebook_2": np.array([[-0.5], [0.5]], dtype=np.float32),
    }
    halfway, codes, others = np.zeros((1, 1), dtype=np.float32), np.array([[0, 1]]), np.array([[1, 0]])
    assert_same_codes(quantizer, halfway, codes, others)
    with pytest.raises(AssertionError, match="squared errors"):
        assert_same_codes(quantizer, halfway + np.float32(0.01), codes, others)


# -- scikit-learn -----------------------------------------------------------------------------------------------------

CHECKED = {
    "rq": estimator(ResidualKMeans, levels=2, codebook_size=4),
    "balanced-rq": estimator(BalancedResidualKMeans, levels=2, codebook_size=4),
    "vq": estimator(VectorQuantization, codebook_size=4),
    "pq": estimator(ProductQuantization, levels=1, codebook_size=4),
    "sq8": estimator(ScalarQuantization8),
    "sq4": estimator(ScalarQuantization4),
}


@pytest.mark.parametrize("name", [quantizer.name for quantizer in BUILT_IN])
def test_check_estimator(name):
    checks = check_estimator(CHECKED[name], on_fail=None, on_skip=None)
    counts = Counter(check["status"] for check in checks)
    others = {check["check_name"]: check["exception"] for check in checks if check["status"] != "passed"}
    assert set(others) <= {"check_array_api_input"}, others  # it needs SCIPY_ARRAY_API=1 when SciPy is imported
    assert counts["passed"] >= 40, counts


def test_in_a_pipeline_with_a_parameter_search():
    """The codes of well separated clusters tell their classes apart; one codeword pair cannot."""
    random = np.random.default_rng(0)
    labels = random.integers(8, size=400)
    vectors = (20 * np.eye(8)[labels] + random.standard_normal((400, 8))).astype(np.float32)
    pipeline = make_pipeline(
        estimator(ResidualKMeans, levels=1, codebook_size=2, seed=3),
        OneHotEncoder(handle_unknown="ignore"),
        LogisticRegression(),
    )
    assert pipeline.fit(vectors, labels).score(vectors, labels) < 0.6
    search = GridSearchCV(pipeline, {"quantizerestimator__codebook_size": [2, 32]}, cv=2).fit(vectors, labels)
    assert search.best_params_ == {"quantizerestimator__codebook_size": 32}
    assert search.best_score_ == 1


def test_estimator_is_the_quantizer():
    vectors = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    model = estimator(ResidualKMeans, levels=2, codebook_size=8, seed=5).fit(vectors)
    quantizer = ResidualKMeans(levels=2, codebook_size=8).fit(vectors, seed=5)
    assert model.get_params() == quantizer.get_config() | {"seed": 5}
    assert np.array_equal(model.transform(vectors), quantizer.encode(vectors))
    decoded = model.inverse_transform(model.transform(vectors))
    assert np.array_equal(decoded, quantizer.decode(quantizer.encode(vectors)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'level'"):
        estimator(ResidualKMeans, level=2)


# -- product quantization ---------------------------------------------------------------------------------------------


def _gaussian(n, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def _faiss_pq(quantizer, dim):
    """FAISS's product quantizer with the codewords of ours."""
    width = dim // quantizer.levels
    theirs = faiss.ProductQuantizer(dim, quantizer.levels, quantizer.codebook_sizes[0].bit_length() - 1)
    words = [book[:, level * width : (level + 1) * width] for level, book in enumerate(quantizer.codebooks)]
    faiss.copy_array_to_vector(np.concatenate([word.ravel() for word in words]), theirs.centroids)
    return theirs


@pytest.mark.parametrize(
    ("dim", "levels", "size"), [(12, 3, 2), (12, 12, 4), (16, 2, 16), (64, 2, 64), (10, 5, 256), (9, 1, 512)]
)
def test_pq_gives_the_codes_of_faiss(dim, levels, size):
    vectors, unseen = _gaussian(1_500, dim), _gaussian(700, dim, seed=1)
    quantizer = ProductQuantization(levels, size, iterations=4).fit(vectors)
    theirs = _faiss_pq(quantizer, dim)
    packed = theirs.compute_codes(unseen)
    codes = quantizer.encode(unseen)
    assert np.array_equal(codes, faiss.unpack_bitstrings(packed, levels, size.bit_length() - 1))
    np.testing.assert_array_equal(quantizer.decode(codes), theirs.decode(packed))
    assert len(np.unique(codes)) > size / 2


def test_pq_codes_are_the_nearest_codewords():
    vectors = _gaussian(500, 12)
    quantizer = ProductQuantization(levels=3, codebook_size=16).fit(vectors)
    codes = quantizer.encode(vectors)
    for level, book in enumerate(quantizer.codebooks):
        own = slice(4 * level, 4 * level + 4)
        assert not np.delete(book, range(own.start, own.stop), axis=1).any()
        squared = np.square(vectors[:, None, own].astype(float) - book[:, own]).sum(axis=2)
        chosen = np.take_along_axis(squared, codes[:, [level]], axis=1)[:, 0]
        np.testing.assert_allclose(chosen, squared.min(axis=1), rtol=1e-5, atol=1e-6)


def test_pq_learns_as_well_as_faiss():
    vectors = _gaussian(4_000, 16)
    ours = ProductQuantization(levels=4, codebook_size=32).fit(vectors)
    theirs = faiss.ProductQuantizer(16, 4, 5)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    theirs.train(vectors)
    faiss.omp_set_num_threads(before)
    our_error = np.square(vectors - ours.decode(ours.encode(vectors))).mean()
    their_error = np.square(vectors - theirs.decode(theirs.compute_codes(vectors))).mean()
    assert our_error <= 1.02 * their_error


def test_pq_leaves_the_number_of_threads_as_it_was():
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        ProductQuantization(levels=2, codebook_size=4).fit(_gaussian(50, 4))
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


def test_pq_is_the_same_whatever_the_number_of_threads():
    vectors = _gaussian(2_000, 16)
    before = faiss.omp_get_max_threads()
    states = []
    try:
        for threads in (1, 4):
            faiss.omp_set_num_threads(threads)
            states.append(np.concatenate(ProductQuantization(levels=4, codebook_size=16).fit(vectors).codebooks))
    finally:
        faiss.omp_set_num_threads(before)
    assert np.array_equal(*states)


def test_pq_with_65_536_codewords():
    vectors = _gaussian(65_536, 2)  # as many as codewords: k-means has nothing to do
    quantizer = ProductQuantization(levels=1, codebook_size=65_536).fit(vectors)
    unseen = _gaussian(200, 2, seed=1)
    codes = quantizer.encode(unseen)
    assert codes.max() > 32_767
    squared = np.square(unseen[:, None] - quantizer.codebooks[0]).sum(axis=2)
    np.testing.assert_allclose(np.take_along_axis(squared, codes, axis=1)[:, 0], squared.min(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 100}, "one power of two .* not 100. For other sizes use 'rq'"),
        ({"levels": 2, "codebook_size": [16, 32]}, "one power of two .* not \\[16, 32\\]"),
        ({"codebook_size": 1}, "Level 1 has 1 codewords; allowed are 2 to 65,536"),
        ({"codebook_size": 131_072}, "allowed are 2 to 65,536"),
        ({"codebook_size": 16.0}, "whole number"),
        ({"levels": 0}, "levels must be a whole number from 1 to 64, not 0"),
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
    ],
)
def test_pq_refuses_options(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ProductQuantization(**options)


@pytest.mark.parametrize(
    ("dim", "levels", "near"),
    [(100, 8, "4, 5, 10"), (7, 2, "1, 7"), (384, 7, "4, 6, 8"), (3, 8, "1, 3"), (128, 63, "16, 32, 64")],
)
def test_pq_says_which_levels_would_divide(dim, levels, near):
    message = f"{dim} dimensions cannot be cut into {levels} sub-vectors .* {re.escape(near)}\\.$"
    with pytest.raises(InvalidArgumentError, match=message):
        ProductQuantization(levels, 4).fit(_gaussian(10, dim))


@pytest.mark.parametrize("quantizer_class", [ProductQuantization, ScalarQuantization8, ScalarQuantization4])
def test_beam_other_than_one_is_refused(quantizer_class):
    quantizer = CHECKED[quantizer_class.name].fit(_gaussian(20, 4)).quantizer_
    with pytest.raises(InvalidArgumentError, match="beam must be 1, not 4"):
        quantizer.encode(_gaussian(2, 4), beam=4)


# -- scalar quantization ----------------------------------------------------------------------------------------------

SCALAR = [
    pytest.param(ScalarQuantization8, faiss.ScalarQuantizer.QT_8bit, id="sq8"),
    pytest.param(ScalarQuantization4, faiss.ScalarQuantizer.QT_4bit, id="sq4"),
]


def _faiss_codes(theirs, vectors, bits):
    """FAISS's codes, one integer for each dimension; two 4-bit codes share a byte, the first in its lower half."""
    packed = theirs.compute_codes(vectors)
    if bits == 8:
        return packed, packed
    return packed, np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)[:, : vectors.shape[1]]


@pytest.mark.parametrize(("quantizer_class", "kind"), SCALAR)
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 2_048])
def test_sq_gives_the_codes_of_faiss(quantizer_class, kind, dim):
    """With ranges of very different widths, a constant dimension, values outside and exactly at the ends."""
    random = np.random.default_rng(dim)
    vectors = _gaussian(300, dim) * np.exp(3 * random.standard_normal(dim)) + 10 * random.standard_normal(dim)
    vectors = vectors.astype(np.float32)
    if dim > 1:
        vectors[:, 1] = 2.5
    ours, theirs = quantizer_class().fit(vectors), faiss.ScalarQuantizer(dim, kind)
    theirs.train(vectors)
    queries = np.concatenate([vectors, 3 * vectors, [vectors.min(axis=0), vectors.max(axis=0)]])
    packed, codes = _faiss_codes(theirs, queries, ours.steps.bit_length() - 1)
    assert np.array_equal(ours.encode(queries), codes)
    assert {codes.min(), codes.max()} == {0, ours.steps - 1}
    # The same operations, but FAISS may round once where NumPy rounds twice.
    scale = np.abs(vectors).max(axis=0) + np.ptp(vectors, axis=0)
    assert (np.abs(ours.decode(codes) - theirs.decode(packed)) <= 2e-7 * scale).all()


@pytest.mark.parametrize(("quantizer_class", "kind"), SCALAR)
def test_sq_loses_at_most_half_a_step(quantizer_class, kind):
    vectors = _gaussian(400, 5)
    quantizer = quantizer_class().fit(vectors)
    step = np.ptp(vectors, axis=0) / (quantizer.steps - 1)
    lost = np.abs(vectors - quantizer.decode(quantizer.encode(vectors)))
    assert (lost <= 0.5001 * step).all()
    assert lost.max() > 0.45 * step.min()


@pytest.mark.parametrize("quantizer_class", [ScalarQuantization8, ScalarQuantization4])
def test_sq_restored_range_is_exact(quantizer_class):
    """The stored step gives the range back to the last bit; otherwise codes at the ends would differ from FAISS's."""
    vectors = _gaussian(50, 2_048) * np.exp(np.linspace(-30, 30, 2_048)).astype(np.float32)
    quantizer = quantizer_class().fit(vectors)
    restored = quantizer_class.restore(quantizer.get_config(), quantizer.state())
    width = (restored.state()["step"] * np.float32(restored.steps - 1)).astype(np.float32)
    assert np.array_equal(width, np.ptp(vectors, axis=0))


def test_sq_clips_what_is_far_outside():
    quantizer = ScalarQuantization8().fit(np.array([[0, 5], [1e-38, 5]], dtype=np.float32))
    codes = quantizer.encode(np.array([[3e38, 3e38], [-3e38, -3e38]], dtype=np.float32))
    assert codes.tolist() == [[255, 0], [0, 0]]


def test_sq_has_one_level_per_dimension_whatever_it_is_asked_for(caplog):
    with caplog.at_level(logging.INFO, logger="semid_index"):
        quantizer = ScalarQuantization4(levels=4, codebook_size=256)
        assert "'sq4' has one level per dimension with 16 codes each; levels=4" in caplog.text
        caplog.clear()
        ScalarQuantization8()
        ScalarQuantization8(codebook_size=256)
        assert caplog.text == ""
    assert (quantizer.levels, quantizer.codebook_sizes) == (0, ())
    quantizer.fit(_gaussian(10, 5))
    assert (quantizer.levels, quantizer.codebook_sizes) == (5, (16,) * 5)
    assert quantizer.codebooks is None
    assert not quantizer.hierarchical


@pytest.mark.parametrize("quantizer_class", BUILT_IN)
def test_too_few_rows_says_how_many(quantizer_class):
    quantizer = CHECKED[quantizer_class.name]
    with pytest.raises(InvalidVectorsError, match="n_samples = 0"):
        quantizer.fit(_gaussian(0, 4))
    assert issubclass(quantizer_class, Quantizer)
