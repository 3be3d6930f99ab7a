"""Alignment, compared with all permutations; learning on, compared with learning from scratch."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from semid_index.alignment import WarmStarting, aligned, changed, new_names, renamed, renumbered
from semid_index.errors import InvalidArgumentError, NotTrainedError
from semid_index.quantizers.balanced_rq import BalancedResidualKMeans
from semid_index.quantizers.bits import BinaryQuantization
from semid_index.quantizers.pq import ProductQuantization
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.quantizers.vq import VectorQuantization


def kept(old, new, names):
    return int((names[new] == old).sum())


@pytest.mark.parametrize("seed", range(40))
def test_no_other_numbering_keeps_more_codes(seed):
    random = np.random.default_rng(seed)
    size, items = int(random.integers(2, 7)), int(random.integers(1, 60))
    old, new = random.integers(0, size, items), random.integers(0, size, items)
    old_words, new_words = random.standard_normal((2, size, 3)).astype(np.float32)
    names = new_names(old, new, old_words, new_words)
    assert sorted(names) == list(range(size))
    assert kept(old, new, names) == max(kept(old, new, np.array(order)) for order in permutations(range(size)))


def test_codewords_that_no_item_chose_get_the_nearest_free_numbers():
    old_words = np.array([[0, 0], [10, 0], [20, 0], [30, 0]], dtype=np.float32)
    new_words = np.array([[21, 0], [11, 0], [29, 0], [1, 0]], dtype=np.float32)
    # items know only that the new 1 is the old 1: the others go where their numbers were
    names = new_names(np.array([1, 1]), np.array([1, 1]), old_words, new_words)
    assert names.tolist() == [2, 1, 3, 0]
    assert renumbered(new_words, names)[:, 0].tolist() == [1, 11, 21, 29]


def test_renaming_undoes_any_order():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((3_000, 12)).astype(np.float32)
    old = ResidualKMeans(3, [16, 8, 5]).fit(vectors)
    orders = [random.permutation(size) for size in old.codebook_sizes]
    state = {f"codebook_{level}": old.codebooks[level - 1][order] for level, order in enumerate(orders, 1)}
    mixed = ResidualKMeans.restore(old.get_config(), state)
    assert (mixed.encode(vectors) != old.encode(vectors)).any(axis=0).all()
    again = aligned(old, mixed, vectors)
    for was, now in zip(old.codebooks, again.codebooks, strict=True):
        np.testing.assert_array_equal(was, now)


def test_alignment_changes_names_and_no_vector():
    random = np.random.default_rng(1)
    vectors = random.standard_normal((4_000, 16)).astype(np.float32)
    old = ResidualKMeans(2, 16).fit(vectors[:2_000])
    new = ResidualKMeans(2, 16).fit(vectors)
    result = aligned(old, new, vectors)
    np.testing.assert_array_equal(result.decode(result.encode(vectors)), new.decode(new.encode(vectors)))
    before = old.encode(vectors)
    assert changed(before, result.encode(vectors))[0][0] < changed(before, new.encode(vectors))[0][0]


def test_changed_by_hand():
    old = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5, 6]])
    new = np.array([[1, 2, 3], [1, 0, 3], [0, 2, 3], [4, 5, 0]])
    per_level, prefixes = changed(old, new)
    assert per_level.tolist() == [1, 1, 1]
    assert prefixes.tolist() == [1, 2, 3]


def test_renamed_by_hand():
    codes = np.array([[0, 1], [2, 0]], dtype=np.int32)
    assert renamed(codes, [np.array([2, 0, 1]), np.array([1, 0])]).tolist() == [[2, 0], [1, 1]]


def clustered(rows, seed, dim=40, clusters=60):
    """Vectors in clusters that are the same for every seed."""
    centres = np.random.default_rng(99).standard_normal((clusters, dim))
    random = np.random.default_rng(seed)
    return (centres[random.integers(0, clusters, rows)] + 0.6 * random.standard_normal((rows, dim))).astype(np.float32)


def error(quantizer, vectors):
    return float(np.square(vectors - quantizer.decode(quantizer.encode(vectors))).sum(axis=1).mean())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ResidualKMeans, {}),
        (BalancedResidualKMeans, {}),
        (ResidualKMeans, {"normalize_residuals": True}),
        (ResidualKMeans, {"refine": 2, "prefix_levels": 1}),
    ],
)
def test_learning_on_keeps_codes_and_lowers_the_error(kind, options):
    vectors = clustered(8_000, seed=3)
    old = kind(3, 16, **options).fit(vectors[:1_000])
    scratch = kind(3, 16, **options).fit(vectors)
    again = kind.restore(old.get_config(), old.state()).refit(vectors)
    assert isinstance(again, WarmStarting)
    before = old.encode(vectors)
    moved, from_scratch = (changed(before, each.encode(vectors))[0][0] / len(vectors) for each in (again, scratch))
    assert 5 * moved < from_scratch
    assert error(scratch, vectors) <= 1.02 * error(again, vectors)
    assert error(again, vectors) < error(old, vectors)


def test_learning_on_is_the_same_each_time():
    vectors = clustered(2_000, seed=4)
    old = ResidualKMeans(2, 16).fit(vectors[:500])
    first, second = (ResidualKMeans.restore(old.get_config(), old.state()).refit(vectors, seed=7) for _ in range(2))
    for one, other in zip(first.codebooks, second.codebooks, strict=True):
        np.testing.assert_array_equal(one, other)


def test_vq_learns_on_too():
    vectors = clustered(2_000, seed=5)
    old = VectorQuantization(codebook_size=32).fit(vectors[:500])
    again = VectorQuantization.restore(old.get_config(), old.state()).refit(vectors)
    assert error(again, vectors) < error(old, vectors)


def test_learning_on_needs_something_to_go_on_from():
    with pytest.raises(NotTrainedError):
        ResidualKMeans(2, 16).refit(clustered(100, seed=0))


def test_product_quantization_is_aligned_place_by_place():
    vectors = clustered(3_000, seed=6)
    old = ProductQuantization(4, 16).fit(vectors[:1_500])
    new = ProductQuantization(4, 16).fit(vectors, seed=5)
    before = old.encode(vectors)
    as_is, renamed_ = (changed(before, q.encode(vectors))[0] for q in (new, aligned(old, new, vectors)))
    assert (renamed_ < as_is).all()


def test_codes_that_are_more_than_numbers_are_not_renamed():
    vectors = clustered(500, seed=7)
    # flipping every sign swaps the two codes of each level, and no codeword can say so
    old, new = BinaryQuantization().fit(vectors), BinaryQuantization().fit(-vectors)
    with pytest.raises(InvalidArgumentError, match="keep_ids=False"):
        aligned(old, new, -vectors + 2 * vectors.mean(axis=0))


def test_equal_codewords_do_not_stand_in_the_way():
    """Of a single vector k-means makes many equal codewords; which of them is taken depends on their numbers alone."""
    vectors = clustered(3_000, seed=8)
    old = ResidualKMeans(3, 16).fit(vectors)
    one = np.repeat(vectors[:1], 20, axis=0)
    new = aligned(old, old.restore(old.get_config(), old.state()).refit(one), one)
    assert np.allclose(new.decode(new.encode(one)), one, atol=1e-4)
