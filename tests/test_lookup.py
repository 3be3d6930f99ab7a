"""Leaves, their scores and the choice of probes; the oracle is plain NumPy over all items."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_index import lookup
from semid_index.codes import CodeLayout, pack
from semid_index.lookup import (
    Leaves,
    Matches,
    Places,
    Probes,
    additive_scorer,
    centroid_scorer,
    choose_probes,
    make_leaves,
    whole_index,
)

layouts = st.lists(st.integers(2, 40), min_size=1, max_size=6).map(lambda sizes: CodeLayout(tuple(sizes)))


def random_codes(layout: CodeLayout, n: int, seed: int, *, skew: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([(size * rng.random(n) ** skew).astype(np.int32) for size in layout.codebook_sizes], axis=1)


@settings(deadline=None)
@given(layouts, st.integers(0, 300), st.integers(1, 50), st.integers(0, 5))
def test_leaves_cover_every_item_once_and_are_no_larger_than_asked(layout, n, leaf_size, seed):
    sids = np.sort(pack(random_codes(layout, n, seed, skew=3.0), layout))
    leaves = make_leaves(sids, layout, leaf_size)
    assert leaves.starts[0] == 0
    assert leaves.starts[-1] == n
    assert (leaves.sizes > 0).all() or n == 0
    for leaf, (start, end) in enumerate(zip(leaves.starts[:-1], leaves.starts[1:], strict=True)):
        inside = sids[start:end]
        free_bits = layout.sid_bits - leaves.bits[leaf]
        assert ((inside >> free_bits) == (leaves.lowest[leaf] >> free_bits)).all(), (
            "items of a leaf share its leading bits"
        )
        assert len(inside) <= leaf_size or len(set(inside.tolist())) == 1


def test_a_leaf_names_its_prefix():
    layout = CodeLayout((4, 8))
    codes = np.array([[0, 1], [0, 2], [1, 5], [2, 0], [2, 1], [2, 6], [2, 7], [2, 7]])
    leaves = make_leaves(np.sort(pack(codes, layout)), layout, 2)
    # 0: two items. 1: one. 2: five items, so its codes are halved: 0..3 has two; of 4..7, 6 has one and 7 two
    assert [leaves.text(leaf) for leaf in range(len(leaves))] == ["0-*", "1-*", "2-(0..3)", "2-6", "2-7"]
    assert leaves.sizes.tolist() == [2, 1, 2, 1, 2]


def test_scores_are_distances_to_the_sum_of_the_prefix_codewords():
    rng = np.random.default_rng(0)
    layout = CodeLayout((8, 4, 16))
    codebooks = [rng.standard_normal((size, 5), dtype=np.float32) for size in layout.codebook_sizes]
    codes = random_codes(layout, 4_000, 1)
    sids = np.sort(pack(codes, layout))
    leaves = make_leaves(sids, layout, 30)
    scorer = additive_scorer(leaves, codebooks, sids, "l2")
    queries = rng.standard_normal((7, 5), dtype=np.float32)
    scores = scorer.scores(scorer.table(queries))
    frequencies = [np.bincount(codes[:, level], minlength=size) for level, size in enumerate(layout.codebook_sizes)]
    partial = 0
    for leaf in range(len(leaves)):
        # worked from the definition: whole levels give their codeword, a partial one the mean of the codewords left
        left, low, point = int(leaves.bits[leaf]), int(leaves.lowest[leaf]), np.zeros(5)
        for level, bits in enumerate(layout.bits):
            if left <= 0:
                break
            code = (low >> layout.shifts[level]) & ((1 << bits) - 1)
            group = np.arange(code, code + (1 << max(bits - left, 0)))
            weights = frequencies[level][group]
            point += (weights[:, None] * codebooks[level][group]).sum(axis=0) / weights.sum()
            partial += len(group) > 1
            left -= bits
        for query, score in zip(queries, scores[:, leaf], strict=True):
            expected = float(((query - point) ** 2).sum() - query @ query)
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-3)
            assert scorer.distances(query, scores[:1, leaf], "l2")[0] == pytest.approx(
                np.sqrt(max(float(scores[0, leaf] + query @ query), 0)), rel=1e-4, abs=1e-3
            )
    assert partial, "some leaf must end inside a level, or this test shows nothing"


def representative(leaves: Leaves, leaf: int, codebooks: list[np.ndarray], codes: np.ndarray) -> tuple[np.ndarray, int]:
    """The sum of a leaf's words, by definition, and the level inside which its prefix ends: -1 for between levels."""
    left, point, inside = int(leaves.bits[leaf]), np.zeros(codebooks[0].shape[1]), -1
    for level, (bits, shift) in enumerate(zip(leaves.layout.bits, leaves.layout.shifts, strict=True)):
        if left > 0:
            code = (int(leaves.lowest[leaf]) >> shift) & ((1 << bits) - 1)
            group = np.arange(code, min(code + (1 << max(bits - left, 0)), len(codebooks[level])))
            weights = np.bincount(codes[:, level], minlength=len(codebooks[level]))[group]
            point += weights @ codebooks[level][group] / weights.sum()
            inside = level if left < bits else inside
        left -= bits
    return point, inside


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("sizes", [(12, 6, 8), (30,)])
def test_leaves_may_end_inside_any_level(metric, sizes, monkeypatch):
    monkeypatch.setattr(lookup, "_SUM_BLOCK", 7)  # so that their words are summed in several blocks
    rng = np.random.default_rng(8)
    layout = CodeLayout(sizes)
    codebooks = [rng.standard_normal((size, 5), dtype=np.float32) for size in sizes]
    codes = random_codes(layout, 3_000, 9, skew=4.0)  # the last codes of each level are rare, or not in use
    sids = np.sort(pack(codes, layout))
    leaves = make_leaves(sids, layout, 150)
    expected, ends = zip(*(representative(leaves, leaf, codebooks, codes) for leaf in range(len(leaves))), strict=True)
    assert set(range(len(sizes))) <= set(ends), "else this shows nothing"
    scorer = additive_scorer(leaves, codebooks, sids, metric)
    queries = rng.standard_normal((3, 5), dtype=np.float32)
    scores = scorer.scores(scorer.table(queries))
    products = queries @ np.array(expected).T
    wanted = -products if metric == "ip" else (np.array(expected) ** 2).sum(axis=1) - 2 * products
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)
    assert (scores.dtype, scorer.words.dtype, scorer.constants.dtype) == (np.float32,) * 3


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("sizes", [(4, 4), (4,)])
def test_an_index_of_one_leaf_has_no_words_to_score_it_by(metric, sizes):
    layout = CodeLayout(sizes)
    sids = np.sort(pack(random_codes(layout, 20, 1), layout))
    leaves = make_leaves(sids, layout, 128)
    assert leaves.bits.tolist() == [0]
    scorer = additive_scorer(leaves, [np.ones((4, 3), dtype=np.float32)] * len(sizes), sids, metric)
    queries = np.array([[1, 2, 3], [0, 0, 0]], dtype=np.float32)
    assert scorer.scores(scorer.table(queries)).tolist() == [[0], [0]]
    assert (scorer.words.shape, scorer.words.dtype) == ((1, 3), np.float32)
    found = choose_probes(scorer, queries, leaves.sizes, at_least=5, budget=5, probes=None)
    assert (found.leaves.tolist(), found.scores.tolist(), found.candidates.tolist()) == (
        [[0], [0]],
        [[0], [0]],
        [20, 20],
    )


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_whole_ids_as_leaves_score_like_decoded_vectors(metric):
    rng = np.random.default_rng(2)
    layout = CodeLayout((8, 8))
    codebooks = [rng.standard_normal((8, 6), dtype=np.float32) for _ in range(2)]
    codes = random_codes(layout, 200, 3)
    order = np.argsort(pack(codes, layout), kind="stable")
    sids = pack(codes, layout)[order]
    leaves = make_leaves(sids, layout, 1)  # as deep as it goes
    scorer = additive_scorer(leaves, codebooks, sids, metric)
    query = rng.standard_normal((1, 6), dtype=np.float32)
    query /= np.sqrt((query**2).sum())
    decoded = (codebooks[0][codes[:, 0]] + codebooks[1][codes[:, 1]])[order][leaves.starts[:-1]]
    expected = -decoded @ query[0] if metric == "ip" else ((decoded - query) ** 2).sum(axis=1) - 1
    whole = leaves.bits == layout.sid_bits
    assert whole.sum() > 5
    np.testing.assert_allclose(scorer.scores(scorer.table(query))[0][whole], expected[whole], rtol=1e-4, atol=1e-4)


def test_centroids_stand_in_where_codewords_do_not_add_up():
    rng = np.random.default_rng(4)
    layout = CodeLayout((4, 4))
    sids = np.sort(pack(random_codes(layout, 100, 5), layout))
    points = rng.standard_normal((100, 3), dtype=np.float32)
    leaves = make_leaves(sids, layout, 10)
    scorer = centroid_scorer(leaves, lambda positions: points[positions], "l2")
    centroids = np.array([points[a:b].mean(axis=0) for a, b in zip(leaves.starts[:-1], leaves.starts[1:], strict=True)])
    query = rng.standard_normal((1, 3), dtype=np.float32)
    expected = ((centroids - query) ** 2).sum(axis=1) - (query**2).sum()
    np.testing.assert_allclose(scorer.scores(scorer.table(query))[0], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(6)
    layout = CodeLayout((16, 16))
    codebooks = [rng.standard_normal((16, 4), dtype=np.float32) for _ in range(2)]
    sids = np.sort(pack(random_codes(layout, 3_000, 7, skew=2.0), layout))
    leaves = make_leaves(sids, layout, 40)
    scorer = additive_scorer(leaves, codebooks, sids, "l2")
    queries = rng.standard_normal((150, 4), dtype=np.float32)
    return leaves, scorer, queries, scorer.scores(scorer.table(queries))


def by_hand(scores, sizes, goal, least):
    """Open the best leaves, one by one, until both conditions hold."""
    opened, held = [], 0
    for leaf in np.argsort(scores, kind="stable"):
        if not sizes[leaf]:
            continue
        if held >= min(goal, sizes.sum()) and len(opened) >= least:
            break
        opened.append(int(leaf))
        held += int(sizes[leaf])
    return opened, held


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("at_least", "budget", "probes"), [(10, 200, None), (1, 1, None), (10, 0, 7), (900, 0, 2), (5_000, 10, None)]
)
def test_the_best_leaves_are_opened_until_there_are_enough_items(scored, at_least, budget, probes, threads):
    leaves, scorer, queries, scores = scored
    found = choose_probes(
        scorer, queries, leaves.sizes, at_least=at_least, budget=budget, probes=probes, threads=threads
    )
    for i in range(len(queries)):
        opened, held = by_hand(scores[i], leaves.sizes, max(at_least, 0 if probes else budget), probes or 1)
        assert found.leaves[i][: len(opened)].tolist() == opened
        assert (found.leaves[i][len(opened) :] == -1).all()
        assert found.candidates[i] == held
        assert found.counts[i] == len(opened)
        np.testing.assert_allclose(found.scores[i][: len(opened)], scores[i][opened], rtol=1e-6)
        assert (found.scores[i][len(opened) :] == np.inf).all()
    assert found.leaves.shape == found.scores.shape == (len(queries), found.counts.max())
    assert (found.leaves.dtype, found.scores.dtype) == (np.int64, np.float32)


def test_leaves_without_allowed_items_are_never_opened(scored):
    leaves, scorer, queries, scores = scored
    allowed = leaves.sizes * (np.arange(len(leaves)) % 3 == 0)
    found = choose_probes(scorer, queries, allowed, at_least=10, budget=100, probes=None)
    for i in range(len(queries)):
        opened, held = by_hand(scores[i], allowed, 100, 1)
        assert found.leaves[i][: len(opened)].tolist() == opened
        assert (found.leaves[i][len(opened) :] == -1).all()
        np.testing.assert_allclose(found.scores[i][: len(opened)], scores[i][opened], rtol=1e-6)
        assert found.candidates[i] == held


def test_far_more_leaves_than_expected_are_opened_where_the_near_ones_are_small():
    """The first guess, by the mean size, is far too low for one query of two."""
    n = 400
    sizes = np.r_[np.ones(n // 2, dtype=np.int64), np.full(n // 2, 99)]
    points = np.arange(n, dtype=np.float32)[:, None]
    leaves = Leaves(CodeLayout((512,)), np.arange(n), np.full(n, 9), np.r_[0, np.cumsum(sizes)])
    scorer = centroid_scorer(
        leaves, lambda positions: np.searchsorted(leaves.starts, positions, "right")[:, None] - 1.0, "l2"
    )
    np.testing.assert_array_equal(scorer.words, points)
    queries = np.array([[0], [n - 1]], dtype=np.float32)
    found = choose_probes(scorer, queries, sizes, at_least=1, budget=150, probes=None)
    assert found.counts.tolist() == [150, 2]
    assert found.candidates.tolist() == [150, 198]
    assert found.leaves[0].tolist() == list(range(150))
    assert found.leaves[1].tolist() == [n - 1, n - 2, *[-1] * 148]
    assert choose_probes(scorer, queries, sizes, at_least=1, budget=150, probes=3).counts.tolist() == [3, 3]
    every = choose_probes(scorer, queries, sizes, at_least=10**6, budget=1, probes=None)  # more than there are
    assert (every.counts.tolist(), every.candidates.tolist()) == ([n, n], [int(sizes.sum())] * 2)


def test_codes_without_hierarchy_are_one_leaf():
    layout = CodeLayout((16, 16))
    leaves = whole_index(50, layout)
    assert leaves.sizes.tolist() == [50]
    assert leaves.text(0) == "*"


def test_one_leaf_is_the_root_with_all_items():
    leaves = whole_index(50, CodeLayout((16, 16)))
    assert [leaves.lowest.tolist(), leaves.bits.tolist(), leaves.starts.tolist()] == [[0], [0], [0, 50]]
    assert {array.dtype for array in (leaves.lowest, leaves.bits, leaves.starts)} == {np.dtype(np.int64)}


def test_names_of_leaves_by_hand():
    layout = CodeLayout((4, 6, 3))  # 2, 3 and 2 bits
    names = {(0, 0): "*", (2 << 5, 1): "(2..3)-*", (2 << 5, 2): "2-*", (2 << 5 | 4 << 2, 3): "2-(4..5)-*"}
    names |= {(2 << 5 | 4 << 2, 4): "2-(4..5)-*", (2 << 5 | 4 << 2, 5): "2-4-*", (2 << 5 | 5 << 2, 5): "2-5-*"}
    names |= {(1 << 5 | 3 << 2 | 2, 6): "1-3-2", (1 << 5 | 3 << 2 | 1, 7): "1-3-1", (1 << 5 | 3 << 2, 6): "1-3-(0..1)"}
    for (lowest, bits), name in names.items():
        leaf = Leaves(layout, np.array([lowest]), np.array([bits]), np.array([0, 9]))
        assert leaf.text(0) == name, (lowest, bits)


@pytest.mark.parametrize(
    ("metric", "point", "query", "score", "distance"),
    [
        ("l2", (3, 4), (0, 0), 25, 5),
        ("l2", (3, 4), (3, 0), 25 - 18, 4),
        ("cosine", (0, 1), (1, 0), 1, 1),
        ("cosine", (0, 1), (0, 1), -1, 0),
        ("cosine", (0.6, 0.8), (0, 1), 1 - 1.6, 0.2),
        ("ip", (3, 4), (2, 1), -10, -10),
    ],
)
def test_scores_and_distances_by_hand(metric, point, query, score, distance):
    points, queries = np.array([point], dtype=np.float32), np.array([query], dtype=np.float32)
    scorer = centroid_scorer(whole_index(1, CodeLayout((2,))), lambda positions: points[positions], metric)
    scores = scorer.scores(scorer.table(queries))
    np.testing.assert_allclose(scores, [[score]], atol=1e-6)
    np.testing.assert_allclose(scorer.distances(queries[0], scores[0], metric), [distance], atol=1e-6)


def test_a_centroid_is_the_mean_of_at_most_so_many_items_of_its_leaf():
    asked = []

    def decode(positions):
        asked.append(positions.tolist())
        return positions[:, None].astype(np.float32)

    leaves = Leaves(CodeLayout((4,)), np.array([0, 2]), np.array([1, 1]), np.array([0, 3, 203]))
    scorer = centroid_scorer(leaves, decode, "l2", per_leaf=5)
    assert asked[0] == [0, 1, 2]
    assert (asked[1][0], asked[1][-1], len(asked[1])) == (3, 202, 5)
    np.testing.assert_allclose(scorer.words[:, 0], [np.mean(part) for part in asked])
    assert len(asked) == 2


def test_the_leaf_of_an_empty_index_has_a_score_too():
    points = np.empty((0, 3), dtype=np.float32)
    scorer = centroid_scorer(whole_index(0, CodeLayout((16, 16))), lambda positions: points[positions], "l2")
    np.testing.assert_array_equal(scorer.scores(scorer.table(np.ones((2, 3), dtype=np.float32))), np.zeros((2, 1)))


def test_matches_are_counted_leaf_by_leaf():
    leaves = Leaves(CodeLayout((4,)), np.array([0, 1, 2]), np.array([2, 2, 2]), np.array([0, 3, 5, 9]))
    matches = Matches.among(leaves, np.array([0, 1, 1, 0, 0, 1, 0, 0, 1], dtype=bool))
    assert matches.positions.tolist() == [1, 2, 5, 8]
    assert matches.counts.tolist() == [2, 0, 2]
    assert matches.starts.tolist() == [0, 2, 2, 4]
    assert (len(matches), matches.allowed.sum()) == (4, 4)


def test_probes_of_some_queries():
    probes = Probes(
        np.array([[1, 2], [3, -1], [4, 5]]), np.array([[0.1, 0.2], [0.3, np.inf], [0.4, 0.5]]), np.arange(3)
    )
    some = probes.of(np.array([2, 0]))
    assert some.leaves.tolist() == [[4, 5], [1, 2]]
    assert some.scores.tolist() == [[0.4, 0.5], [0.1, 0.2]]
    assert some.candidates.tolist() == [2, 0]


@given(st.lists(st.integers(0, 60), unique=True, max_size=20), st.lists(st.integers(-5, 2_000), max_size=20))
@pytest.mark.parametrize("last", [61, 1_900])  # a table of all rows, or, where most are gone, a search
def test_rows_lead_to_positions(last, rows, wanted):
    places = Places(np.array(rows, dtype=np.int64), range(last))
    position = {row: number for number, row in enumerate(rows)}
    assert places.of(np.array([*wanted, *rows], dtype=np.int64)).tolist() == [
        position.get(row, -1) for row in [*wanted, *rows]
    ]
    later = Places(np.array(rows, dtype=np.int64) + 1_000, range(1_000, 1_000 + last))
    assert later.of(np.array(rows, dtype=np.int64) + 1_000).tolist() == list(range(len(rows)))
    assert (later.of(np.array([-1, 0, 999, 1_000 + last, 10_000])) == -1).all()
    assert (places.count, places.span, later.count) == (len(rows), range(last), len(rows))
