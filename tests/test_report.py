"""The figures of a report against scikit-learn, SciPy, brute force and examples worked by hand."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score

from semid_index.codes import CodeLayout
from semid_index.errors import InvalidArgumentError, InvalidCodesError, InvalidVectorsError, MissingDependencyError
from semid_index.metrics import normalized
from semid_index.quantizers.pq import ProductQuantization
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.quantizers.scalar import ScalarQuantization8
from semid_index.report import measures, reconstruction
from semid_index.report.measures import (
    best_names,
    chance_collision_rate,
    churn,
    classes,
    collision_rate,
    contingency,
    entropy,
    gini,
    jaccard,
    lift,
    nmi,
    overlap,
    parameters,
    perplexity,
    prefix_probe_recall,
    purity,
    rbo,
    recall,
    sort_ids,
)
from semid_index.report.quality import quality as measure
from semid_index.report.records import parse_requirement

some_counts = st.lists(st.integers(0, 50), min_size=2, max_size=30).filter(any).map(np.array)
labellings = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=60).map(np.array)


# -- use of the codes -------------------------------------------------------------------------------------------------


@given(some_counts)
def test_entropy_is_that_of_scipy(counts):
    assert entropy(counts) == pytest.approx(stats.entropy(counts), abs=1e-12)
    assert perplexity(counts) == pytest.approx(math.exp(stats.entropy(counts)))


def test_entropy_by_hand():
    assert entropy(np.array([5, 0, 0])) == 0
    assert math.copysign(1, entropy(np.array([5, 0, 0]))) == 1
    assert perplexity(np.array([3, 3, 3, 3, 0])) == pytest.approx(4)
    assert entropy(np.array([1, 3])) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


@given(some_counts)
def test_gini_is_half_the_relative_mean_difference(counts):
    values = [int(value) for value in counts]
    differences = sum(abs(a - b) for a in values for b in values) / len(values) ** 2
    assert gini(counts) == pytest.approx(differences / (2 * sum(values) / len(values)), abs=1e-12)


def test_gini_by_hand():
    assert gini(np.array([4, 4, 4])) == 0
    assert gini(np.array([0, 0, 0, 12])) == pytest.approx(3 / 4)  # 1 - 1/K
    assert gini(np.array([3, 1])) == pytest.approx(1 / 4)


# -- whole IDs and their prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [(4, 3), (2, 5, 3), (300, 2, 7, 65_536), (256,) * 9, (65_536,) * 5, (256,) * 64], ids=str
)
def test_sorted_ids_know_the_prefixes_of_every_depth(sizes):
    random = np.random.default_rng(0)
    # few different codes, so that prefixes of every depth occur more than once; the highest codes are among them
    codes = np.stack([size - 1 - random.integers(0, min(size, 2), 400) for size in sizes], axis=1).astype(np.int32)
    codes[200:] = codes[random.integers(0, 200, 200)]
    ids = sort_ids(codes, CodeLayout(sizes))
    rows = [tuple(row) for row in codes.tolist()]
    assert [rows[row] for row in ids.order] == sorted(rows)
    for depth in range(1, len(sizes) + 1):
        prefixes = [row[:depth] for row in rows]
        expected = sorted(Counter(prefixes).items())
        assert ids.distinct(depth) == len(expected)
        assert ids.sizes(depth).tolist() == [count for _, count in expected]
        assert [prefixes[row] for row in ids.first_rows(depth)] == [prefix for prefix, _ in expected]
        numbers = {prefix: number for number, (prefix, _) in enumerate(expected)}
        assert ids.groups(depth).tolist() == [numbers[prefix] for prefix in prefixes]


def test_collision_rate_by_hand():
    """Beauty as RQ-VAE has it in a paper: 12,101 items on 11,801 IDs, 2.48 %."""
    assert collision_rate(12_101, 11_801) == pytest.approx(0.0248, abs=5e-5)
    assert collision_rate(5, 5) == 0


@pytest.mark.parametrize(("items", "possible"), [(50, 60), (1_000, 256), (300, 4_096), (2_000, 1_000_000)])
def test_chance_collisions_are_those_of_random_draws(items, possible):
    random = np.random.default_rng(0)
    drawn = [collision_rate(items, len(np.unique(random.integers(possible, size=items)))) for _ in range(2_000)]
    margin = 4 * np.std(drawn) / math.sqrt(len(drawn))
    assert chance_collision_rate(items, possible) == pytest.approx(np.mean(drawn), abs=margin)


def exact_chance(items, possible):
    """The formula in whole numbers, without rounding until the end: a fraction of enormous ones."""
    from fractions import Fraction

    return float(1 - Fraction(possible, items) * (1 - Fraction(possible - 1, possible) ** items))


@pytest.mark.parametrize("items", [1, 2, 3, 10, 999, 3_000])
@pytest.mark.parametrize("possible", [2, 256, 90_000, 299_000, 10**7, 256**4, 256**8, 2**300])
def test_chance_collisions_keep_their_digits(items, possible):
    assert chance_collision_rate(items, possible) == pytest.approx(exact_chance(items, possible), rel=1e-10, abs=1e-320)


def test_chance_collisions_of_the_longest_ids():
    """65,536^64 possible IDs: (N - 1) / 2M, and nothing overflows."""
    rate = chance_collision_rate(1_000_000, 65_536**64)
    assert rate == pytest.approx(999_999 / 2 * 2.0**-1023 / 2, rel=1e-9)


# -- labels -----------------------------------------------------------------------------------------------------------


@given(labellings)
def test_purity_and_nmi(pairs):
    groups, labels = pairs.T
    table = contingency(groups, labels)
    expected = sum(max(Counter(labels[groups == group].tolist()).values()) for group in set(groups.tolist()))
    assert purity(table) == pytest.approx(expected / len(pairs))
    assert nmi(table) == pytest.approx(normalized_mutual_info_score(groups, labels), abs=1e-9)


@given(labellings)
def test_contingency_is_the_same_however_it_counts(pairs):
    groups, labels = pairs.T
    dense = contingency(groups, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_DENSE_ENTRIES", 0)
        sorted_pairs = contingency(groups, labels)
    assert dict(Counter(map(tuple, pairs.tolist()))) == {
        (int(group), int(label)): int(count)
        for group, label, count in zip(dense.groups, dense.labels, dense.counts, strict=True)
    }
    for name in ("groups", "labels", "counts"):
        assert np.array_equal(getattr(dense, name), getattr(sorted_pairs, name))


def test_purity_by_hand():
    """Group 0 holds a, a, b; group 1 holds b, c: 2 + 1 of 5 are of their group's most frequent label."""
    table = contingency(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2]))
    assert purity(table) == pytest.approx(3 / 5)
    assert lift(0.6, 0.4) == pytest.approx(1.5)


@pytest.mark.parametrize(
    "values",
    [
        ["b", None, "a", "b"],
        np.array(["b", None, "a", "b"], dtype=object),
        np.array(["b", math.nan, "a", "b"], dtype=object),
        [2, None, 1, 2],
        [2.5, math.nan, 1.5, 2.5],
        np.array([2.5, np.nan, 1.5, 2.5], dtype=np.float16),
        [True, None, False, True],
        np.array(["2024-02-01", "NaT", "2023-01-01", "2024-02-01"], dtype="datetime64[D]"),
        pd.Series(["b", None, "a", "b"]),
        pd.Series(["b", None, "a", "b"], dtype="category"),
        pa.array([2.5, math.nan, 1.5, 2.5]),
        pa.array(["b", None, "a", "b"]).dictionary_encode(),
        pa.DictionaryArray.from_arrays([0, None, 2, 1], ["b", "b", "a"]),
        pa.chunked_array([["b", None], ["a", "b"]]),
        pa.chunked_array([pa.array([None], pa.float16()), pa.array(np.array([1, 2, 1], dtype=np.float16))]),
    ],
    ids=lambda values: f"{type(values).__name__}-{getattr(values, 'dtype', getattr(values, 'type', ''))}",
)
def test_labels_of_any_type(values):
    found = classes(values, name="x", items=4)
    place = 0 if isinstance(values, pa.ChunkedArray) and values.type == pa.float16() else 1
    assert np.flatnonzero(found < 0).tolist() == [place]
    first, second, third = [number for number in found.tolist() if number >= 0]
    assert first == third != second


@pytest.mark.parametrize("kind", ["float", "int", "date", "time", "decimal", "infinite"])
def test_quantities_are_put_into_ten_bins(kind):
    numbers = np.random.default_rng(0).permutation(1_000)
    values = {
        "float": numbers / 7,
        "int": numbers - 500,
        "date": pa.array(numbers.astype("datetime64[D]")),
        "time": numbers.astype("timedelta64[s]"),
        "decimal": pa.array(numbers).cast(pa.decimal128(25, 2)),
        "infinite": np.where(numbers < 100, -np.inf, numbers),
    }[kind]
    # a bin ends with the largest value of its tenth
    assert np.array_equal(classes(values, name="x", items=1_000), numbers // 100)


def test_few_numbers_are_not_put_into_bins():
    numbers = np.arange(1_000) % 50
    assert len(np.unique(classes(numbers, name="x", items=1_000))) == 50
    assert len(np.unique(classes(np.arange(1_000) % 51, name="x", items=1_000))) == 10


def test_bins_of_lopsided_numbers():
    """Nine tenths are 0: one bin for them, and the others in one or more."""
    numbers = np.append(np.zeros(900), np.arange(1, 101))
    found = classes(numbers, name="x", items=1_000)
    assert len(np.unique(found[:900])) == 1
    assert found[0] not in found[900:]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "b"], "'x' has 2 values for 3 items"),
        ([None, math.nan, None], "no value for any item"),
        (["a", 1, "b"], "one column of one type"),
        ([["a"], ["b"], []], "one plain value"),
        (np.zeros((3, 2)), "one column of one type"),
        (pa.array([math.nan] * 3), "no value for any item"),
    ],
)
def test_labels_that_cannot_be_used(values, message):
    with pytest.raises(InvalidArgumentError, match=message):
        classes(values, name="x", items=3)


# -- neighbours -------------------------------------------------------------------------------------------------------


def rankings(queries=40, k=12, of=25, seed=0):
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(of)[:k] for _ in range(queries)])


def test_overlap_is_that_of_sets():
    found, truth = rankings(seed=0), rankings(seed=1)
    expected = [
        [len({*f[:depth]} & {*t[:depth]}) for depth in range(1, 13)]
        for f, t in zip(found.tolist(), truth.tolist(), strict=True)
    ]
    assert overlap(found, truth).tolist() == expected


def test_jaccard_and_recall_are_those_of_sets():
    found, truth = rankings(seed=0), rankings(seed=1)
    pairs = [({*f}, {*t}) for f, t in zip(found.tolist(), truth.tolist(), strict=True)]
    assert jaccard(found, truth) == pytest.approx(np.mean([len(f & t) / len(f | t) for f, t in pairs]))
    assert recall(found, truth) == pytest.approx(np.mean([len(f & t) / 12 for f, t in pairs]))


def test_rbo_by_hand():
    """(1, 2, 3) against (1, 3, 4), p = 0.9: they agree in 1/1, 1/2 and 2/3."""
    expected = 2 / 3 * 0.9**3 + 0.1 / 0.9 * (1 * 0.9 + 1 / 2 * 0.81 + 2 / 3 * 0.729)
    assert rbo(np.array([[1, 2, 3]]), np.array([[1, 3, 4]])) == pytest.approx(expected)
    assert rbo(np.array([[1, 2, 3]]), np.array([[1, 2, 3]])) == pytest.approx(1)
    assert rbo(np.array([[1, 2, 3]]), np.array([[4, 5, 6]])) == 0
    both = rbo(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 3, 4], [4, 5, 6]]))
    assert both == pytest.approx((expected + 1) / 2)


def test_rbo_goes_on_as_at_its_end():
    """Extrapolated, it is the infinite sum (1 - p) sum p^(d-1) A_d, the agreement below k being the one at k."""
    found, truth = rankings(queries=1, seed=3), rankings(queries=1, seed=4)
    agreement = overlap(found, truth)[0] / np.arange(1, 13)
    longer = np.append(agreement, np.full(2_000, agreement[-1]))
    assert rbo(found, truth, p=0.8) == pytest.approx(0.2 * (0.8 ** np.arange(len(longer)) * longer).sum())


def brute_force_probe(scores, sizes, truth, budget):
    recalls, candidates = [], []
    for query in range(len(scores)):
        opened, items = set(), 0
        for group in np.argsort(scores[query], kind="stable"):
            if items >= budget:
                break
            opened.add(int(group))
            items += int(sizes[group])
        recalls.append(np.mean([int(group) in opened for group in truth[query]]))
        candidates.append(items)
    return recalls, candidates


def test_prefix_probe_recall():
    random = np.random.default_rng(0)
    scores, sizes = random.random((15, 30)), random.integers(1, 20, 30)
    truth = random.integers(0, 30, (15, 7))
    budgets = [0.5, 1, 17, 100.5, int(sizes.sum()), 10_000]
    recalls, candidates = prefix_probe_recall(scores, sizes, truth, budgets)
    for number, budget in enumerate(budgets):
        expected = brute_force_probe(scores, sizes, truth, budget)
        assert recalls[:, number].tolist() == pytest.approx(expected[0])
        assert candidates[:, number].tolist() == expected[1]
    assert (recalls[:, -1] == 1).all()
    assert 0 < recalls[:, 2].mean() < recalls[:, 3].mean() < 1


# -- between versions, and memory -------------------------------------------------------------------------------------


def test_churn_by_hand():
    """Level 1 only has other names (0 -> 2, 1 -> 0); of level 2, one of five items really moved."""
    old = np.array([[0, 1], [0, 1], [0, 3], [1, 3], [1, 3]])
    new = np.array([[2, 5], [2, 5], [2, 4], [0, 4], [0, 5]])
    aligned, unaligned = churn(old, new)
    assert aligned == pytest.approx((0, 1 / 5))
    assert unaligned == pytest.approx((1, 1))


def test_churn_names_a_level_by_the_items_that_kept_the_codes_before():
    """Four of ten keep code 0 at level 1; at level 2, their 1 is the old 0, whatever the six others have."""
    old = np.array([[0, 0]] * 10)
    new = np.array([[0, 1]] * 4 + [[1, 0]] * 3 + [[2, 0]] * 3)
    assert churn(old, new)[0] == pytest.approx((0.6, 0.6))


def test_churn_of_the_same_ids_is_none():
    codes = np.random.default_rng(0).integers(0, 9, (500, 3))
    assert churn(codes, codes) == ((0, 0, 0), (0, 0, 0))


def test_churn_sees_through_other_names_and_counts_what_moved():
    random = np.random.default_rng(0)
    old = random.integers(0, 32, (4_000, 3))
    new = np.stack([random.permutation(32)[old[:, level]] for level in range(3)], axis=1)
    moved = random.permutation(4_000)[:400]
    new[moved, 1] = (new[moved, 1] + 5) % 32
    aligned, unaligned = churn(old, new)
    assert aligned == pytest.approx((0, 0.1, 0.1))
    assert min(unaligned) > 0.9


def test_churn_of_versions_with_other_numbers_of_levels():
    codes = np.random.default_rng(0).integers(0, 9, (50, 4))
    assert churn(codes, codes[:, :2]) == ((0, 0), (0, 0))


@pytest.mark.parametrize(("old_size", "new_size"), [(12, 12), (7, 20), (20, 7), (1, 9), (40, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_best_names_keep_as_many_as_an_assignment(old_size, new_size, seed):
    random = np.random.default_rng(seed)
    old, new = random.integers(0, old_size, 150), random.integers(0, new_size, 150)
    names = best_names(old, new)
    given = names[names >= 0]
    assert len(np.unique(given)) == len(given)
    table = np.zeros((new_size, old_size))
    np.add.at(table, (new, old), 1)
    assert (names[new] == old).sum() == table[linear_sum_assignment(table, maximize=True)].sum()


def test_churn_without_scipy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse", None)
    with pytest.raises(MissingDependencyError, match="pip install scipy"):
        churn(np.zeros((3, 1), dtype=int), np.zeros((3, 1), dtype=int))


def test_parameters_of_the_article():
    """1M items of 256 floats against 4 codebooks of 256 words: 256,000,000 floats against 262,144, 977 times fewer."""
    assert parameters([256] * 4, 256) == 262_144
    assert round(1_000_000 * 256 / parameters([256] * 4, 256)) == 977


# -- reports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(clustered):
    """(3000, 24), of which 20 stand twice."""
    vectors = clustered(3_000, 24, seed=5).copy()
    vectors[2_980:] = vectors[:20]
    return vectors


@pytest.fixture(scope="module")
def trained(rows):
    return ResidualKMeans(levels=3, codebook_size=[16, 8, 8]).fit(rows)


@pytest.fixture(scope="module")
def codes(rows, trained):
    return trained.encode(rows)


@pytest.fixture(scope="module")
def report(rows, trained, codes):
    sections = np.array(["a", "b", "c", "d"], dtype=object)[codes[:, 0] // 4]
    sections[::10] = None
    return measure(
        codes,
        trained.codebook_sizes,
        vectors=rows,
        codebooks=trained.codebooks,
        labels={"section": sections, "size": np.linalg.norm(rows, axis=1)},
        held_out=(codes[:500], rows[:500]),
        previous=codes,
        queries=300,
        bytes_per_item=12.5,
    )


def test_levels(report, rows, trained, codes):
    variance = np.square(rows.astype(float) - rows.mean(axis=0, dtype=float)).sum(axis=1).mean()
    left = rows.astype(float)
    assert len(report.levels) == 3
    for number, (level, codebook) in enumerate(zip(report.levels, trained.codebooks, strict=True)):
        left = left - codebook[codes[:, number]]
        error = np.square(left).sum(axis=1).mean()
        counts = np.bincount(codes[:, number], minlength=len(codebook))
        prefixes = {tuple(prefix) for prefix in codes[:, : number + 1].tolist()}
        assert level.level == number + 1
        assert level.codebook_size == len(codebook)
        assert level.error == pytest.approx(error, rel=1e-5)
        assert level.relative_error == pytest.approx(error / variance, rel=1e-5)
        assert level.entropy == pytest.approx(stats.entropy(counts))
        assert level.normalized_entropy == pytest.approx(stats.entropy(counts) / math.log(len(codebook)))
        assert level.perplexity == pytest.approx(math.exp(level.entropy))
        assert level.gini == gini(counts)
        assert level.unused == (counts == 0).sum()
        assert level.largest == counts.max()
        assert level.distinct_prefixes == len(prefixes)
        assert level.collision_rate == pytest.approx((3_000 - len(prefixes)) / 3_000)


def test_whole_ids(report, codes):
    buckets = Counter(map(tuple, codes.tolist()))
    ids = report.ids
    assert ids.items == 3_000
    assert ids.distinct == len(buckets)
    assert ids.collision_rate == pytest.approx((3_000 - len(buckets)) / 3_000)
    assert ids.shared == pytest.approx(sum(size for size in buckets.values() if size > 1) / 3_000)
    assert ids.largest_bucket == max(buckets.values())
    assert ids.excess == pytest.approx(ids.collision_rate / exact_chance(3_000, 16 * 8 * 8))
    assert ids.exact_duplicates == 20


def test_ids_by_hand():
    """Five items, IDs 0-0 (three times), 0-1, 1-1 of 2 x 2; chance: 1 - 4 (1 - 0.75^5) / 5."""
    report = measure([[0, 0], [0, 0], [0, 1], [0, 0], [1, 1]], 2)
    assert report.ids.distinct == 3
    assert report.ids.collision_rate == pytest.approx(2 / 5)
    assert report.ids.shared == pytest.approx(3 / 5)
    assert report.ids.largest_bucket == 3
    assert report.ids.excess == pytest.approx(0.4 / (1 - 4 * (1 - 0.75**5) / 5))
    assert report.ids.exact_duplicates is None
    assert [level.distinct_prefixes for level in report.levels] == [2, 3]
    assert [level.collision_rate for level in report.levels] == pytest.approx([3 / 5, 2 / 5])
    assert [level.largest for level in report.levels] == [4, 3]
    assert report.levels[0].error is report.neighbours is report.memory is report.churn is report.dim is None
    assert report.held_out == ()


def test_ids_that_are_all_different():
    ids = measure([[0, 0], [0, 1]], 2).ids
    assert (ids.collision_rate, ids.shared, ids.largest_bucket, ids.excess) == (0, 0, 1, 0)


def test_one_item():
    report = measure([[1, 0]], 2, vectors=[[1.0, 2.0]])
    assert report.ids.collision_rate == report.ids.excess == 0
    assert report.neighbours is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_exact_duplicates_are_rows_that_are_equal():
    vectors = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    vectors[50:53] = vectors[7]
    vectors[100, 2], vectors[101] = -0.0, vectors[100]
    vectors[101, 2] = 0.0
    vectors[150] = np.nextafter(vectors[151], np.inf)
    report = measure(np.zeros((200, 1), dtype=int), 2, vectors=vectors)
    assert report.ids.exact_duplicates == 200 - len(np.unique(vectors, axis=0)) == 4


def test_labels(report, codes):
    section = np.array(
        [None if row % 10 == 0 else int(code) // 4 for row, code in enumerate(codes[:, 0])], dtype=object
    )
    known = np.flatnonzero([value is not None for value in section])
    labels = section[known].astype(int)
    for depth, found in enumerate(report.labels["section"], 1):
        names, groups = np.unique(codes[known, :depth], axis=0, return_inverse=True)
        groups = groups.ravel()
        assert found.depth == depth
        assert found.groups == len(names)
        assert found.items == len(known)
        assert found.classes == len(np.unique(labels))
        assert found.purity == 1  # the section says no more than the first code
        assert found.nmi == pytest.approx(normalized_mutual_info_score(groups, labels), abs=1e-9)
        shuffled = np.random.default_rng(9).permuted(np.tile(labels, (20, 1)), axis=1)
        purities = [purity(contingency(groups, row)) for row in shuffled]
        spread = 6 * np.std(purities)
        assert found.shuffled_purity == pytest.approx(np.mean(purities), abs=spread)
        assert found.shuffled_nmi == pytest.approx(
            np.mean([normalized_mutual_info_score(groups, row) for row in shuffled]), abs=0.01
        )
        assert found.lift == pytest.approx(1 / found.shuffled_purity)
    assert report.labels["section"][0].lift > 2
    assert report.labels["size"][0].classes == 10


def test_a_label_of_which_the_codes_know_nothing_has_no_lift(codes):
    label = np.random.default_rng(1).integers(0, 3, len(codes))
    depths = measure(codes, [16, 8, 8], labels={"x": label}).labels["x"]
    assert [depth.lift for depth in depths] == pytest.approx([1, 1, 1], abs=0.05)
    assert depths[2].purity > 0.45  # and not a third, because the groups are small


def test_depths_that_split_nothing_more_are_equal():
    codes = np.stack([np.arange(60) % 6, np.zeros(60, dtype=int), np.arange(60) // 6], axis=1)
    first, second, third = measure(codes, 10, labels={"x": np.arange(60) % 3}).labels["x"]
    assert second == replace(first, depth=2)
    assert third.groups == 60


def neighbours_by_force(queries, own, vectors, k):
    vectors = vectors.astype(float)
    distances = np.square(vectors).sum(axis=1) - 2 * queries @ vectors.T  # and |q|^2, which is the same for all
    for query, row in enumerate(own):
        if row >= 0:
            distances[query, row] = np.inf
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


def decoded_neighbours_by_force(queries, own, decoded, codes, k):
    """Items that share an ID, which rounding may put at several distances, are at that of the first of them."""
    _, firsts, ids = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    return neighbours_by_force(queries, own, decoded[firsts[ids.ravel()]], k)


def test_neighbours(rows, trained, codes):
    rows, codes, own = rows[-1_000:], codes[-1_000:], np.arange(1_000)
    report = measure(codes, trained.codebook_sizes, vectors=rows, codebooks=trained.codebooks, k=7, queries=1_000)
    truth = neighbours_by_force(rows, own, rows, 7)
    found = decoded_neighbours_by_force(rows, own, trained.decode(codes), codes, 7)
    neighbours = report.neighbours
    assert (neighbours.k, neighbours.queries) == (7, 1_000)
    assert neighbours.recall == pytest.approx(recall(found, truth), abs=2e-3)
    assert neighbours.jaccard == pytest.approx(jaccard(found, truth), abs=2e-3)
    assert neighbours.rbo == pytest.approx(rbo(found, truth), abs=2e-3)
    assert 0.05 < neighbours.jaccard < neighbours.recall < 0.9


def test_neighbours_where_nearly_all_share_an_id(rows):
    """Two IDs, of 990 and 10 items: the neighbours of an item are the first of the nearer ID, without itself."""
    rows, own, codes = rows[:1_000], np.arange(1_000), np.zeros((1_000, 1), dtype=int)
    codes[::100] = 1
    decoded = np.where(codes, rows[0], rows[1])
    found = decoded_neighbours_by_force(rows, own, decoded, codes, 12)
    truth = neighbours_by_force(rows, own, rows, 12)
    neighbours = measure(codes, 2, vectors=rows, decoded=decoded, k=12, queries=1_000).neighbours
    assert neighbours.rbo == pytest.approx(rbo(found, truth), abs=1e-4)


def test_neighbours_of_vectors_that_decode_to_themselves(rows):
    ids = np.stack(np.divmod(np.arange(2_980), 100), axis=1)
    neighbours = measure(ids, 100, vectors=rows[:2_980], decoded=rows[:2_980].copy(), queries=200).neighbours
    assert neighbours.recall == neighbours.jaccard == pytest.approx(1)
    assert neighbours.rbo == pytest.approx(1)


@pytest.mark.parametrize("items", [2, 3, 11])
def test_fewer_neighbours_than_were_asked_for(rows, items):
    """All other items are the neighbours of each, however they are coded."""
    for codes in (np.zeros((items, 1), dtype=int), np.arange(items)[:, None]):
        neighbours = measure(codes, 16, vectors=rows[:items], k=20).neighbours
        assert (neighbours.k, neighbours.queries) == (items - 1, items)
        assert neighbours.recall == 1
        asked = measure(codes, 16, vectors=rows[:items], k=20, queries=rows[20:22]).neighbours
        assert (asked.k, asked.queries, asked.recall) == (items, 2, 1)


def test_probing(rows, trained, codes):
    queries = rows[:400] + np.float32(1e-3)
    options = {"vectors": rows, "codebooks": trained.codebooks, "k": 5}
    neighbours = measure(codes, trained.codebook_sizes, queries=queries, **options).neighbours
    # 16, 128 and (nearly) 1,024 prefixes; sqrt(3000) = 55 to 3000 / 16 = 188 are wanted
    assert neighbours.probe_depth == 2
    prefixes, groups, sizes = np.unique(codes[:, :2], axis=0, return_inverse=True, return_counts=True)
    assert neighbours.probe_groups == len(prefixes)
    words = trained.codebooks[0][prefixes[:, 0]] + trained.codebooks[1][prefixes[:, 1]]
    scores = np.square(queries[:, None] - words[None]).sum(axis=2)
    truth = groups.ravel()[neighbours_by_force(queries, [], rows, 5)]
    assert [probe.share for probe in neighbours.probing] == [0.001, 0.003, 0.01, 0.03, 0.1]
    for probe in neighbours.probing:
        recalls, candidates = brute_force_probe(scores, sizes, truth, probe.share * 3_000)
        assert probe.candidates >= probe.share * 3_000
        assert probe.recall == pytest.approx(np.mean(recalls), abs=1e-3)
        assert probe.candidates == pytest.approx(np.mean(candidates), rel=1e-3)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_metrics(rows, metric):
    vectors = normalized(rows) if metric == "cosine" else rows
    trained = ResidualKMeans(levels=2, codebook_size=32).fit(vectors)
    codes = trained.encode(vectors)
    queries = rows[:50] * np.float32(1e-3) if metric == "cosine" else rows[:50]  # under cosine, length says nothing
    report = measure(codes, 32, vectors=rows, codebooks=trained.codebooks, metric=metric, queries=queries, k=10)
    decoded = trained.decode(codes)
    if metric == "cosine":
        decoded = normalized(decoded)
    similar = [vectors[:50] @ decoded.T, vectors[:50] @ vectors.T]
    if metric != "ip":
        similar = [2 * dots - np.square(x).sum(axis=1) for dots, x in zip(similar, (decoded, vectors), strict=True)]
    found, truth = (np.argsort(-scores, axis=1, kind="stable")[:, :10] for scores in similar)
    assert report.neighbours.recall == pytest.approx(recall(found, truth), abs=0.03)
    error = np.square(vectors - trained.decode(codes)).sum(axis=1).mean()
    assert report.levels[-1].error == pytest.approx(error, rel=1e-5)
    assert report.neighbours.probe_depth == 1
    words = trained.codebooks[0]
    scores = -vectors[:50] @ words.T if metric == "ip" else np.square(vectors[:50, None] - words).sum(axis=2)
    for probe in report.neighbours.probing:
        recalls, _ = brute_force_probe(
            scores, np.bincount(codes[:, 0], minlength=32), codes[truth, 0], probe.share * 3_000
        )
        assert probe.recall == pytest.approx(np.mean(recalls), abs=0.01)


def test_batches_change_nothing(rows, trained, codes, report, monkeypatch):
    monkeypatch.setattr(reconstruction, "_BATCH_VALUES", 24 * 170)
    monkeypatch.setattr(reconstruction, "_BLOCK_ENTRIES", 1_000)
    steps = []
    again = measure(
        codes,
        trained.codebook_sizes,
        vectors=rows,
        codebooks=trained.codebooks,
        queries=300,
        progress=lambda done, total, what: steps.append((done, total, what)),
    )
    expected, found = report.values(), again.values()
    for name in found:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-3), name
    assert steps[-1][:2] == (36, 36)
    assert [done for done, _, _ in steps] == list(range(1, 37))


def test_bad_rows_are_named_in_later_batches_too(rows, codes, monkeypatch):
    monkeypatch.setattr(reconstruction, "_BATCH_VALUES", 24 * 170)
    vectors = rows.copy()
    vectors[[1_234, 2_000], 5] = np.nan, np.inf
    with pytest.raises(InvalidVectorsError, match="first is row 1,234") as caught:
        measure(codes, [16, 8, 8], vectors=vectors)
    assert caught.value.rows == (1_234,)


def test_vectors_from_a_file_in_half_precision(rows, trained, codes, tmp_path):
    halves = rows.astype(np.float16)
    np.save(tmp_path / "v.npy", halves)
    options = {"codebooks": trained.codebooks, "queries": 100}
    from_file = measure(codes, [16, 8, 8], vectors=tmp_path / "v.npy", **options)
    assert from_file.values() == measure(codes, [16, 8, 8], vectors=halves.astype(np.float32), **options).values()


# -- IDs that others made, and quantizers of other kinds --------------------------------------------------------------


def test_estimated_codewords_are_means_of_what_is_left(rows, codes, trained):
    random = np.random.default_rng(0)
    others = np.column_stack([codes[:, 0], random.integers(0, 8, len(codes)), codes[:, 1]])
    left = rows.astype(float)
    errors = []
    for level in range(3):
        means = np.array([left[others[:, level] == code].mean(axis=0) for code in range(others[:, level].max() + 1)])
        left = left - means[others[:, level]]
        errors.append(np.square(left).sum(axis=1).mean())
    report = measure(others, [16, 8, 8], vectors=rows, queries=100)
    assert report.codebooks_estimated
    assert [level.error for level in report.levels] == pytest.approx(errors, rel=1e-5)
    assert report.memory.parameters == 32 * 24


def test_estimated_codewords_without_a_table(rows, codes, monkeypatch):
    expected = measure(codes, [16, 8, 8], vectors=rows, queries=10)
    monkeypatch.setattr(reconstruction, "_DENSE_ENTRIES", 0)
    monkeypatch.setattr(reconstruction, "_BATCH_VALUES", 24 * 170)
    found = measure(codes, [16, 8, 8], vectors=rows, queries=10)
    for before, after in zip(expected.levels, found.levels, strict=True):
        assert after.error == pytest.approx(before.error, rel=1e-5)


def test_estimated_codewords_serve_held_out_vectors(clustered, rows, trained, codes):
    unseen = clustered(600, 24, seed=5)[:500]
    held_out = (trained.encode(unseen), unseen)
    given = measure(codes, [16, 8, 8], vectors=rows, codebooks=trained.codebooks, held_out=held_out, queries=10)
    estimated = measure(codes, [16, 8, 8], vectors=rows, held_out=held_out, queries=10)
    for own, other in zip(given.held_out, estimated.held_out, strict=True):
        assert own.error == pytest.approx(other.error, rel=0.05)
    left = unseen - trained.decode(held_out[0])
    assert given.held_out[-1].error == pytest.approx(np.square(left).sum(axis=1).mean(), rel=1e-5)
    assert given.values()["held_out_relative_error"] == given.held_out[-1].relative_error


def test_product_quantization_has_no_figures_of_prefixes(rows):
    trained = ProductQuantization(levels=4, codebook_size=16).fit(rows)
    codes = trained.encode(rows)
    report = measure(
        codes,
        16,
        vectors=rows,
        codebooks=trained.codebooks,
        hierarchical=False,
        labels={"x": codes[:, 0]},
        queries=100,
    )
    assert all(level.distinct_prefixes is level.collision_rate is None for level in report.levels)
    assert [label.depth for label in report.labels["x"]] == [4]
    assert report.neighbours.probing == ()
    assert report.neighbours.probe_depth is None
    assert report.neighbours.recall > 0.1
    assert report.levels[-1].error == pytest.approx(
        np.square(rows - trained.decode(codes)).sum(axis=1).mean(), rel=1e-5
    )
    assert "collision_rate_1" not in report.values()
    assert "collision_rate" in report.values()


def test_codes_that_do_not_add_up(rows):
    trained = ScalarQuantization8().fit(rows)
    codes = trained.encode(rows)
    report = measure(codes, 256, vectors=rows, decode=trained.decode, hierarchical=False, queries=100)
    assert [level.error for level in report.levels[:-1]] == [None] * 23
    error = np.square(rows - trained.decode(codes)).sum(axis=1).mean()
    assert report.levels[-1].error == pytest.approx(error, rel=1e-4)
    assert report.neighbours.recall > 0.9
    same = measure(codes, 256, vectors=rows, decoded=trained.decode(codes), hierarchical=False, queries=100)
    assert same.values() == report.values()


def test_prefixes_of_codes_that_do_not_add_up_are_scored_by_means(rows, trained, codes):
    """Decoded by a function: a prefix stands for the mean of its items' decoded vectors."""
    report = measure(codes, [16, 8, 8], vectors=rows, decode=trained.decode, queries=rows[:200] + np.float32(1e-3), k=5)
    assert not report.codebooks_estimated
    depth = report.neighbours.probe_depth
    assert depth == 2
    _, groups, sizes = np.unique(codes[:, :depth], axis=0, return_inverse=True, return_counts=True)
    groups, decoded = groups.ravel(), trained.decode(codes)
    words = np.array([decoded[groups == group].mean(axis=0) for group in range(len(sizes))])
    scores = np.square(rows[:200, None] - words[None]).sum(axis=2)
    truth = groups[neighbours_by_force(rows[:200] + np.float32(1e-3), [], rows, 5)]
    for probe in report.neighbours.probing:
        recalls, candidates = brute_force_probe(scores, sizes, truth, probe.share * 3_000)
        assert probe.recall == pytest.approx(np.mean(recalls), abs=2e-3)
        assert probe.candidates == pytest.approx(np.mean(candidates), rel=2e-3)


def test_churn_and_memory(report, codes, trained):
    assert report.churn.common == 3_000
    assert report.churn.per_level == report.churn.unaligned == (0, 0, 0)
    assert report.memory.parameters == 32 * 24
    assert report.memory.table_parameters == 3_000 * 24
    assert report.memory.reduction == pytest.approx(3_000 * 24 / (32 * 24))
    assert report.memory.code_bytes == 10 / 8
    assert report.memory.bytes_per_item == 12.5
    previous = codes.copy()
    previous[:1_000] = -1
    previous[1_000:1_500, 2] = (previous[1_000:1_500, 2] + 1) % 8
    moved = measure(codes, [16, 8, 8], previous=previous).churn
    assert moved.common == 2_000
    assert moved.unaligned == pytest.approx((0, 0, 0.25))
    assert moved.per_level == pytest.approx((0, 0, 0.25))


def test_memory_is_known_from_the_codebooks_alone(codes, trained):
    report = measure(codes, [16, 8, 8], codebooks=trained.codebooks)
    assert report.dim == 24
    assert report.memory.parameters == 32 * 24
    assert report.levels[0].error is None


# -- names and requirements -------------------------------------------------------------------------------------------


def test_the_report_is_json(report):
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["ids"]["collision_rate"] == report.ids.collision_rate
    assert plain["labels"]["section"][1]["depth"] == 2
    assert plain["neighbours"]["probing"][0]["share"] == 0.001
    assert report.ids.to_dict()["items"] == 3_000


def test_values_have_names(report):
    values = report.values()
    assert all(isinstance(value, int | float) for value in values.values())
    assert report.value("collision_rate") == report.ids.collision_rate
    assert report.value("shared") == report.ids.shared
    assert report.value("collision_rate_2") == report.levels[1].collision_rate
    assert report.value("perplexity_1") == report.levels[0].perplexity
    assert report.value("gini_1") == report.levels[0].gini
    assert report.value("relative_error") == report.levels[2].relative_error
    assert report.value("relative_error_1") == report.levels[0].relative_error
    assert report.value("held_out_error") == report.held_out[2].error
    assert report.value("recall@10") == report.neighbours.recall
    assert report.value("rbo@10") == report.neighbours.rbo
    assert report.value("jaccard@10") == report.neighbours.jaccard
    assert report.value("probe_recall@0.01") == report.neighbours.probing[2].recall
    assert report.value("section.purity_2") == report.labels["section"][1].purity
    assert report.value("size.lift_3") == report.labels["size"][2].lift
    assert report.value("churn_2") == report.churn.per_level[1]
    assert report.value("reduction") == report.memory.reduction
    assert "purity_2" not in values  # there are two labels
    one = replace(report, labels={"section": report.labels["section"]})
    assert one.value("purity_2") == one.value("section.purity_2")
    with pytest.raises(InvalidArgumentError, match=r"no figure 'colision_rate'. It has: .*collision_rate.*recall@10"):
        report.value("colision_rate")


def test_requirements(report):
    rate = report.ids.collision_rate
    assert report.meets(f"collision_rate < {rate + 0.01}")
    assert not report.meets(f"collision_rate<{rate!r}")
    assert report.meets(f"collision_rate<={rate!r}")
    assert report.meets(f"collision_rate>={rate!r}")
    assert not report.meets(f"collision_rate>{rate!r}")
    assert report.meets("exact_duplicates == 20")
    assert not report.meets("exact_duplicates==19")
    assert report.unmet(["recall@10>0", "items==3000"]) == ()
    failed = report.unmet(["recall@10>0", "items<=12", "section.purity_1 < 1"])
    assert failed == ("items is 3000, required is <= 12.", "section.purity_1 is 1, required is < 1.")
    assert parse_requirement("probe_recall@0.01 >= 9e-1") == ("probe_recall@0.01", ">=", 0.9)


@pytest.mark.parametrize("text", ["", "collision_rate", "<0.5", "collision_rate<", "collision_rate=0.5", "gini_1<a"])
def test_what_is_no_requirement(report, text):
    with pytest.raises(InvalidArgumentError, match=r"no requirement.*such as 'collision_rate<0\.05'"):
        report.meets(text)


# -- what cannot be measured ------------------------------------------------------------------------------------------

CODES = np.array([[0, 1], [1, 1], [1, 0]])
VECTORS = np.arange(6, dtype=np.float32).reshape(3, 2)
BOOKS = [np.zeros((2, 2), dtype=np.float32)] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codes": CODES[:0]}, InvalidCodesError, "no items"),
        ({"codes": CODES[0]}, InvalidCodesError, r"integers of shape \(n, levels\), not int64 of shape \(2,\)"),
        ({"codes": CODES / 2}, InvalidCodesError, "not float64"),
        ({"codes": CODES + 1}, InvalidCodesError, "level 1 must lie in 0 to 1"),
        ({"codes": CODES - 1}, InvalidCodesError, "level 1 must lie in 0 to 1"),
        ({"codebook_sizes": [2, 2, 2]}, InvalidCodesError, r"shape \(n, 3\)"),
        ({"codebook_sizes": 1}, InvalidArgumentError, "Level 1 has 1 codewords"),
        ({"codebook_sizes": None}, InvalidArgumentError, "codebook_sizes must be"),
        ({"vectors": VECTORS[:2]}, InvalidArgumentError, "2 vectors for 3 rows of codes"),
        ({"vectors": VECTORS * np.nan}, InvalidVectorsError, "NaN or infinite, the first is row 0"),
        ({"vectors": VECTORS * 0, "metric": "cosine"}, InvalidVectorsError, "infinite or zero"),
        ({"codebooks": BOOKS[:1]}, InvalidArgumentError, "codebooks have the shapes"),
        ({"codebooks": [np.zeros((3, 2))] * 2}, InvalidArgumentError, "codebooks have the shapes"),
        (
            {"codebooks": [np.zeros((2, 5))] * 2, "vectors": VECTORS},
            InvalidArgumentError,
            "codewords have 5 dimensions, the vectors 2",
        ),
        ({"decoded": VECTORS}, InvalidArgumentError, "give vectors as well"),
        ({"decoded": VECTORS[:2], "vectors": VECTORS}, InvalidArgumentError, r"decoded has shape \(2, 2\)"),
        ({"decoded": VECTORS * np.nan, "vectors": VECTORS}, InvalidVectorsError, "decoded vectors"),
        ({"decode": lambda codes: VECTORS[:1], "vectors": VECTORS}, InvalidArgumentError, "decode gave 1 vectors"),
        ({"decode": lambda codes: np.ones((3, 9)), "vectors": VECTORS}, InvalidVectorsError, "decoded vectors have 9"),
        ({"labels": {"x": [1, 2]}}, InvalidArgumentError, "'x' has 2 values for 3 items"),
        ({"labels": ["a", "b", "c"]}, InvalidArgumentError, "labels must be a dict"),
        ({"held_out": VECTORS}, InvalidArgumentError, "pair"),
        ({"held_out": (CODES, VECTORS)}, InvalidArgumentError, "give codebooks or decode"),
        ({"held_out": (CODES, VECTORS[:2]), "codebooks": BOOKS}, InvalidArgumentError, "2 held-out vectors for 3"),
        ({"held_out": (CODES + 5, VECTORS), "codebooks": BOOKS}, InvalidCodesError, "level 1 must lie"),
        ({"previous": CODES[:2]}, InvalidCodesError, "previous codes for 2 rows"),
        ({"previous": CODES * 0 - 1}, InvalidCodesError, "No item has previous codes"),
        ({"previous": CODES * 70_000}, InvalidCodesError, "previous codes go up to 70000"),
        ({"previous": CODES / 1}, InvalidCodesError, "previous codes must be integers"),
        ({"k": 0}, InvalidArgumentError, "k must be"),
        ({"k": 2.5}, InvalidArgumentError, "k must be"),
        ({"queries": 0}, InvalidArgumentError, "queries must be"),
        ({"queries": "many"}, InvalidArgumentError, "queries must be"),
        ({"queries": np.ones((2, 3)), "vectors": VECTORS}, InvalidVectorsError, "queries have 3 dimensions"),
        ({"metric": "hamming"}, InvalidArgumentError, "No metric 'hamming'"),
    ],
)
def test_what_cannot_be_measured(arguments, error, message):
    with pytest.raises(error, match=message):
        measure(**{"codes": CODES, "codebook_sizes": 2, **arguments})


def test_nothing_given_is_changed(rows, trained, codes):
    vectors, given = rows.copy(), codes.copy()
    vectors.flags.writeable = given.flags.writeable = False
    measure(given, [16, 8, 8], vectors=vectors, codebooks=trained.codebooks, queries=10, metric="cosine")
