"""Collision policies: against slow ones that serve items one by one, and in real indexes."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import semid_index as semid
from semid_index import collisions
from semid_index.cli import app
from semid_index.collisions import (
    Arrivals,
    Capacity,
    CollisionPolicy,
    Digit,
    NextBest,
    Share,
    Sinkhorn,
    balanced,
    own_quantizer,
    with_extra_levels,
)
from semid_index.demo import load_sample
from semid_index.errors import InvalidArgumentError, PluginError, UnknownNameError
from semid_index.metrics import normalized
from semid_index.plugins import Offer, Plugins, installed
from semid_index.quantizer import Quantizer
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.testing import CollisionPolicyContract, Shelves

pytest.importorskip("faiss", reason="an index is trained with FAISS")

POLICIES: dict[str, Any] = {
    "share": "share",
    "digit": {"policy": "digit", "size": 512},
    "next-best": "next-best",
    "capacity": {"policy": "capacity", "items": 2},
    "sinkhorn": "sinkhorn",
}
SHAPE: dict[str, Any] = {"levels": 3, "codebook_size": [16, 12, 100], "iterations": 3}


# -- the promises that all of them make -------------------------------------------------------------------------------


class TestShare(CollisionPolicyContract):
    def make(self):
        return Share()


class TestDigit(CollisionPolicyContract):
    most_per_id = 1

    def make(self):
        return Digit(size=100)


class TestNextBest(CollisionPolicyContract):
    most_per_id = 1

    def make(self):
        return NextBest()


class TestCapacity(CollisionPolicyContract):
    most_per_id = 3

    def make(self):
        return Capacity(items=3)


class TestSinkhorn(CollisionPolicyContract):
    def make(self):
        return Sinkhorn(epsilon=0.01, iterations=20, rounds=5)


def test_the_contract_sees_what_is_wrong():
    class Careless(CollisionPolicy):
        name = "careless"
        promises_unique = True

        def place(self, arrivals):
            codes = arrivals.codes
            codes[:, 0] = 0
            return codes

    class TestCareless(CollisionPolicyContract):
        most_per_id = 1

        def make(self):
            return Careless()

    suite = TestCareless()
    for test in ("test_codes", "test_prefixes_are_kept", "test_unique", "test_limit"):
        with pytest.raises(AssertionError):
            getattr(suite, test)()


# -- slow references --------------------------------------------------------------------------------------------------


def with_codebooks(*codebooks: list[list[int]]) -> ResidualKMeans:
    """A quantizer with these codewords: whole numbers, so that distances are exact and ties are ties."""
    quantizer = ResidualKMeans(len(codebooks), [len(codebook) for codebook in codebooks])
    quantizer.learned = {f"codebook_{i}": np.array(words, dtype=np.float32) for i, words in enumerate(codebooks, 1)}
    return quantizer


@st.composite
def cases(draw, largest: int = 5):
    """A quantizer of whole numbers, vectors, codes that somebody proposes, and sizes of batches."""
    levels, dim = draw(st.integers(1, 3)), 2
    number = st.integers(-4, 4)
    word = st.lists(number, min_size=dim, max_size=dim)
    sizes = draw(st.lists(st.integers(2, largest), min_size=levels, max_size=levels))
    quantizer = with_codebooks(*(draw(st.lists(word, min_size=size, max_size=size)) for size in sizes))
    n = draw(st.integers(0, 24))
    vectors = np.array(draw(st.lists(word, min_size=n, max_size=n)), dtype=np.float32).reshape(n, dim)
    rows = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = np.array(draw(st.lists(rows, min_size=n, max_size=n)), dtype=np.int32).reshape(n, levels)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
    return quantizer, vectors, codes, [0, *cuts, n]


def placed_in_batches(policy, quantizer, vectors, codes, cuts) -> np.ndarray:
    shelves = Shelves()
    shelves.add(np.empty((0, codes.shape[1] + len(policy.extra_levels)), dtype=np.int32))
    for start, end in pairwise(cuts):
        arrivals = Arrivals(codes[start:end], vectors[start:end], quantizer, shelves.below)
        shelves.add(policy.place(arrivals))
    return shelves.codes


def alternatives(quantizer, vector, codes) -> list[tuple[float, int]]:
    """Squared error and code of every last-level codeword, nearest first."""
    *others, last = quantizer.codebooks
    left = vector.astype(float) - sum((book[code] for book, code in zip(others, codes, strict=False)), np.zeros(2))
    return sorted((float(((left - word) ** 2).sum()), code) for code, word in enumerate(last))


@given(cases())
def test_next_best_serves_one_after_the_other(case):
    """In whatever batches they come."""
    quantizer, vectors, codes, cuts = case
    taken: set[tuple[int, ...]] = set()
    expected = []
    for vector, proposed in zip(vectors, codes.tolist(), strict=True):
        prefix, chosen = proposed[:-1], proposed[-1]
        if tuple(proposed) in taken:
            free = [code for _, code in alternatives(quantizer, vector, prefix) if (*prefix, code) not in taken]
            chosen = free[0] if free else chosen
        taken.add((*prefix, chosen))
        expected.append([*prefix, chosen])
    assert placed_in_batches(NextBest(), quantizer, vectors, codes, cuts).tolist() == expected


@given(cases(), st.integers(1, 3))
def test_capacity_is_a_stable_matching(case, limit):
    """Items ask one at a time, the last to come first; an ID that is full turns away the farthest, then the latest."""
    quantizer, vectors, codes, cuts = case
    held: dict[tuple[int, ...], int] = Counter()
    expected = []
    for start, end in pairwise(cuts):
        wishes = {}
        for row in range(start, end):
            *prefix, own = codes[row].tolist()
            ranked = alternatives(quantizer, vectors[row], prefix)
            ranked.sort(key=lambda each, own=own: (each[1] != own, each))  # one's own ID first
            wishes[row] = [(cost, (*prefix, code)) for cost, code in ranked]
        guests: dict[tuple[int, ...], list[tuple[float, int]]] = defaultdict(list)
        asking = list(range(start, end))
        while asking:
            row = asking.pop()
            if wishes[row]:
                cost, id = wishes[row].pop(0)
                guests[id] = sorted([*guests[id], (cost, row)])
                room = max(limit - held[id], 0)
                asking += [turned_away for _, turned_away in guests[id][room:]]
                guests[id] = guests[id][:room]
        placed = {row: id for id, rows in guests.items() for _, row in rows}
        expected += [placed.get(row, tuple(codes[row].tolist())) for row in range(start, end)]
        held.update(expected[start:end])
    assert list(map(tuple, placed_in_batches(Capacity(limit), quantizer, vectors, codes, cuts).tolist())) == expected


@given(cases(), st.integers(2, 4))
def test_digit_counts(case, size):
    quantizer, vectors, codes, cuts = case
    seen: Counter[tuple[int, ...]] = Counter()
    expected = []
    for proposed in map(tuple, codes.tolist()):
        expected.append([*proposed, min(seen[proposed], size - 1)])
        seen[proposed] += 1
    assert placed_in_batches(Digit(size), quantizer, vectors, codes, cuts).tolist() == expected


@given(cases())
def test_share_changes_nothing(case):
    quantizer, vectors, codes, cuts = case
    assert np.array_equal(placed_in_batches(Share(), quantizer, vectors, codes, cuts), codes)


@pytest.mark.parametrize("policy", [NextBest(), Capacity(1)], ids=["next-best", "capacity"])
def test_a_prefix_in_several_blocks(policy, monkeypatch):
    """Blocks that hold 7 items each, where 40 share a prefix: next-best cannot tell, capacity keeps its limit."""
    random = np.random.default_rng(0)
    quantizer = with_codebooks(*random.integers(-99, 99, (2, 64, 2)).tolist())
    vectors = random.integers(-99, 99, (90, 2)).astype(np.float32)
    codes = np.column_stack([random.integers(0, 2, 90), random.integers(0, 9, 90)]).astype(np.int32)
    whole = placed_in_batches(policy, quantizer, vectors, codes, [0, 90])
    monkeypatch.setattr(collisions, "_BLOCK_BYTES", 7 * 64 * 4)
    in_blocks = placed_in_batches(policy, quantizer, vectors, codes, [0, 90])
    assert len(np.unique(in_blocks, axis=0)) == len(np.unique(whole, axis=0)) == 90
    if isinstance(policy, NextBest):
        assert np.array_equal(in_blocks, whole)


# -- Sinkhorn ---------------------------------------------------------------------------------------------------------


def test_balanced_is_the_best_assignment():
    """With little entropy and many iterations: each item goes where SciPy's optimal assignment puts it."""
    from scipy.optimize import linear_sum_assignment

    costs = np.random.default_rng(0).random((20, 4, 12))
    free = np.ones((20, 12))
    free[:, 5:8] = 0
    shares = balanced(costs, free, epsilon=0.01, iterations=5_000)
    np.testing.assert_allclose(shares.sum(axis=2), 1)
    assert shares.sum(axis=1).max() <= 1.001
    assert shares[:, :, 5:8].max() == 0
    open_columns = np.flatnonzero(free[0])
    for cost, share in zip(costs, shares, strict=True):
        assert share.argmax(axis=1).tolist() == open_columns[linear_sum_assignment(cost[:, open_columns])[1]].tolist()


def test_balanced_with_more_items_than_codewords():
    """Six items for two free codewords: three each, by hand the three that lose least."""
    costs = np.array([[[0, 9, 1], [0, 9, 2], [0, 9, 3], [0, 9, 4], [0, 9, 5], [0, 9, 6]]], dtype=float)
    shares = balanced(costs, np.array([[1.0, 0, 1]]), epsilon=0.01, iterations=500)
    assert shares.argmax(axis=2).tolist() == [[2, 2, 2, 0, 0, 0]]
    np.testing.assert_allclose(shares.sum(axis=1), [[3, 0, 3]], atol=0.01)


def test_balanced_without_a_free_codeword():
    shares = balanced(np.ones((1, 2, 3)), np.zeros((1, 3)), epsilon=0.003, iterations=50)
    assert np.array_equal(shares, np.zeros((1, 2, 3)))


def slow_sinkhorn(policy, quantizer, vectors, codes):
    """Group by group, as the docstring says."""
    codes = [tuple(row) for row in codes.tolist()]
    for _ in range(policy.rounds):
        items, new, winners = Counter(codes), list(codes), set()
        for id in sorted(id for id, count in items.items() if count > 1):
            group = [row for row, code in enumerate(codes) if code == id]
            size = quantizer.codebook_sizes[-1]
            free = [float((*id[:-1], code) == id or not items[*id[:-1], code]) for code in range(size)]
            costs = [[cost for _, cost in sorted((c, d) for d, c in alternatives(quantizer, vectors[row], id[:-1]))]
                     for row in group]  # fmt: skip
            scale = [cost for row in costs for cost, is_free in zip(row, free, strict=True) if is_free] or [0, 1]
            scaled = 2 * (np.array([costs]) - min(scale)) / (max(scale) - min(scale)) - 1
            shares = balanced(scaled, np.array([free]), policy.epsilon, policy.iterations)[0]
            for row, share in zip(group, shares, strict=True):
                new[row] = (*id[:-1], int(share.argmax()))
        if new == codes:
            break
        for row, id in enumerate(new):  # one for each free ID
            if id != codes[row] and id not in winners:
                winners.add(id)
                codes[row] = id
    return codes


def test_sinkhorn_goes_group_by_group():
    policy, random = Sinkhorn(), np.random.default_rng(5)
    for _ in range(20):
        quantizer = with_codebooks(*random.integers(-50, 50, (2, 12, 2)).tolist())
        vectors = random.integers(-50, 50, (25, 2)).astype(np.float32)
        codes = np.column_stack([random.integers(0, 3, 25), random.integers(0, 6, 25)]).astype(np.int32)
        expected = slow_sinkhorn(policy, quantizer, vectors, codes)
        placed = placed_in_batches(policy, quantizer, vectors, codes, [0, 25]).tolist()
        assert list(map(tuple, placed)) == expected
        assert len(set(expected)) > len(np.unique(codes, axis=0))


def test_sinkhorn_leaves_items_of_the_index_alone():
    """A newcomer to a taken ID moves to the nearest free codeword, whoever is there first stays."""
    quantizer = with_codebooks([[0, 0], [100, 100]], [[0, 0], [10, 0], [4, 0], [3, 0]])
    shelves = Shelves()
    shelves.add(np.array([[0, 0], [0, 3]], dtype=np.int32))
    vectors, codes = np.array([[1, 0]], dtype=np.float32), np.array([[0, 0]], dtype=np.int32)
    assert Sinkhorn().place(Arrivals(codes, vectors, quantizer, shelves.below)).tolist() == [[0, 2]]


# -- in an index ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items(vectors) -> np.ndarray:
    """(2120, 24), of which 120 are exact copies; one item is there 41 times."""
    return np.concatenate([vectors, vectors[:80], np.repeat(vectors[:1], 40, axis=0)])


def made(items, policy, *, parts=1, path=None, **options) -> semid.SemanticIndex:
    shape = options if "quantizer" in options else SHAPE | options
    index = semid.create(path, dim=items.shape[1], collisions=policy, **shape)
    index.train(items)
    for part in np.array_split(items, parts):
        index.add(part, batch_size=300)
    return index


def codes_of(index) -> np.ndarray:
    """The codes of all items, by SQL from the view: (n, levels)."""
    levels = index.stats()["levels"]
    names = ", ".join(f"c{level}" for level in range(1, levels + 1))
    return np.array(index.sql(f"SELECT {names} FROM semantic_ids ORDER BY id").fetchall())


def uniqueness(codes) -> dict[str, int]:
    counts = Counter(map(tuple, codes.tolist())).values()
    return {"ids": len(counts), "alone": sum(n == 1 for n in counts), "largest": max(counts)}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_an_index_reports(items, policy):
    """All figures, computed anew from the codes that the view shows."""
    with made(items, POLICIES[policy]) as index:
        report, codes, proposed = index.stats()["collisions"], codes_of(index), index.encode(items)
        levels = own_quantizer(index._quantizer).levels
        moved = (codes[:, :levels] != proposed[:, :levels]).any(axis=1)
        before, after = (((items - index.decode(some)) ** 2).sum(dtype=float) for some in (proposed, codes))
        assert report["policy"] == policy
        assert report["items"] == 2_120
        assert report["moved"] == moved.sum()
        assert (report["moved"] > 100) == (policy in ("next-best", "capacity", "sinkhorn"))
        assert report["prefix_kept"] == 1
        assert np.array_equal(codes[:, : levels - 1], proposed[:, : levels - 1])
        assert report["before"] == uniqueness(proposed)
        assert report["after"] == uniqueness(codes)
        assert index.stats()["items_sharing_an_id"] == 2_120 - report["after"]["alone"]
        if policy == "share":
            assert report["error"] is None
            assert index._store.meta("collisions") is None
        else:
            assert report["error"] == pytest.approx(before, rel=1e-5)
            assert report["extra_error"] == pytest.approx(after - before, rel=1e-4, abs=1e-6 * before)
            assert report["relative_extra_error"] == pytest.approx((after - before) / before, rel=1e-4, abs=1e-6)
        assert report["unique"] is {"digit": True, "next-best": True}.get(policy)
        assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("policy", POLICIES)
def test_ids_stay_and_never_repeat(items, policy, tmp_path):
    """Over several adds, and after reopening: what was given stays, and (ID, dup_rank) is unique."""
    path = tmp_path / "x.duckdb"
    parts = np.array_split(items, 3)
    with made(items, POLICIES[policy], path=path, parts=1) as whole:
        at_once = codes_of(whole)
    path.unlink()
    seen = np.empty((0, at_once.shape[1]), dtype=int)
    index = semid.create(path, dim=24, collisions=POLICIES[policy], **SHAPE)
    index.train(items)
    for part in parts:
        index.add(part, batch_size=150)
        codes = codes_of(index)
        assert np.array_equal(codes[: len(seen)], seen)
        seen = codes
        index.close()
        index = semid.open(path)
        assert np.array_equal(codes_of(index), seen)
    with index:
        repeated = "SELECT 1 FROM semantic_ids GROUP BY semantic_id, dup_rank HAVING count(*) > 1"
        assert index.sql(repeated).fetchall() == []
        report = index.stats()["collisions"]
        assert report["after"] == uniqueness(seen)
        assert report["items"] == len(items)
        assert report["after"]["largest"] <= {"digit": 1, "next-best": 1, "capacity": 2}.get(policy, 50)
    if policy in ("share", "digit", "next-best"):
        assert np.array_equal(seen, at_once), "it does not matter in which batches items come"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("vectors_kept", ["float32", "none"])
def test_search_finds_as_much(items, queries, policy, vectors_kept):
    """Items that moved to another code of the last level are found as before."""
    with made(items, POLICIES[policy], vectors=vectors_kept, leaf_size=30) as index:
        found, exact = index.search(queries, k=10, probes=25), index.search(queries, k=10, exact=True)
        assert found.trace.candidates < 1_500, "only some leaves were to be opened"
        codes = codes_of(index)
    sources = items if vectors_kept == "float32" else index_decoded(items, codes, POLICIES[policy])
    distances = np.sort(np.linalg.norm(queries[:, None] - sources[None], axis=2), axis=1)[:, :10]
    np.testing.assert_allclose(exact.distances, distances, rtol=1e-4)
    hits = [d <= truth[-1] * (1 + 1e-5) for d, truth in zip(found.distances, distances, strict=True)]
    assert np.mean(hits) > 0.9


def index_decoded(items, codes, policy) -> np.ndarray:
    """What codes stand for, by a quantizer of its own: one more level changes nothing."""
    quantizer = ResidualKMeans(**SHAPE).fit(items)
    return quantizer.decode(codes[:, :3])


def test_a_digit_is_a_level_like_any_other(items, tmp_path):
    """In SQL, as text, in prefixes and shelves, in encode and decode; and no vector is any farther."""
    with made(items, "digit", path=tmp_path / "x.duckdb") as index, made(items, "share") as plain:
        copies = [0, *range(2_080, 2_120)]  # the first item and its copies
        assert index.stats()["codebook_sizes"] == [16, 12, 100, 256]
        assert index.stats()["codebook_bytes"] == plain.stats()["codebook_bytes"]
        codes = codes_of(index)
        assert np.array_equal(codes[:, :3], codes_of(plain))
        others = (codes[:2_080, :3] == codes[0, :3]).all(axis=1).sum()  # that came between
        assert codes[copies, 3].tolist() == [0, *range(others, others + 40)]
        shared = "-".join(map(str, codes[0, :3]))
        rows = index.prefix(shared)
        assert rows["semantic_id"].to_pylist() == [f"{shared}-{digit}" for digit in range(others + 40)]
        assert {shelf.text for shelf in index.tree(1, under=shared)} == set(rows["semantic_id"].to_pylist())
        assert index.sql("SELECT max(dup_rank) FROM semantic_ids").fetchall() == [(0,)]
        encoded = index.encode(items[:50])
        assert np.array_equal(encoded, np.pad(plain.encode(items[:50]), ((0, 0), (0, 1))))
        assert np.array_equal(index.decode(codes), plain.decode(codes[:, :3]))
        same = index.similar(0, k=40)
        assert sorted(same.ids.tolist()) == sorted([*copies[1:], 2_000])[:40] or len(same.ids) == 40
        assert same.distances.max() == 0
    with semid.open(tmp_path / "x.duckdb") as again:
        assert np.array_equal(again.encode(items[:50]), encoded)
        assert np.array_equal(again.decode(codes), index_decoded(items, codes, "digit"))


@pytest.mark.parametrize(
    ("quantizer", "options"),
    [("rq", {"levels": 10, "codebook_size": 128}), ("pq", {"levels": 4, "codebook_size": 8}), ("sq4", {})],
)
def test_digits_after_codes_of_any_kind(items, quantizer, options):
    """IDs that are longer than a sid, and codes that are no hierarchy."""
    with made(items, "digit", parts=2, quantizer=quantizer, **options) as index:
        proposed = index.encode(items)[:, :-1]
        seen: Counter[tuple[int, ...]] = Counter()
        digits = []
        for codes in map(tuple, proposed.tolist()):
            digits.append(seen[codes])
            seen[codes] += 1
        assert max(digits) >= 40
        assert codes_of(index)[:, -1].tolist() == digits
        report = index.stats()["collisions"]
        assert report["before"] == uniqueness(proposed)
        assert report["unique"] is True


@pytest.mark.parametrize("shape", [{"levels": 10, "codebook_size": 128}, {"levels": 1, "codebook_size": 590}])
def test_next_best_in_ids_of_any_length(items, shape):
    """Longer than a sid, so that prefixes reach beyond it; and of one level, so that there is one prefix for all."""
    items = np.concatenate([items[:560], items[:30]])
    with made(items, "next-best", parts=3, **shape) as index:
        proposed, codes = index.encode(items), codes_of(index)
        expected = placed_in_batches(NextBest(), index._quantizer, items, proposed, [0, len(items)])
        assert np.array_equal(codes[:, :-1], expected[:, :-1])
        errors = [np.linalg.norm(items - index.decode(some), axis=1) for some in (codes, expected)]
        np.testing.assert_allclose(*errors, rtol=1e-3, atol=1e-3)  # deep codewords are small, and nearly tied
        assert np.mean((codes == expected).all(axis=1)) > 0.95
        assert index.stats()["collisions"]["moved"] >= 30
        assert index.stats()["collisions"]["unique"] is True


def test_used_up_digits_are_shared(items, caplog):
    with caplog.at_level(logging.WARNING, "semid_index"), made(items, {"policy": "digit", "size": 8}) as index:
        codes = codes_of(index)
        assert codes[2_090:, 3].tolist() == [7] * 30
        assert index.sql(
            "SELECT count(*) FROM (SELECT DISTINCT semantic_id, dup_rank FROM semantic_ids)"
        ).fetchall() == [(len(items),)]
        assert index.stats()["collisions"]["unique"] is False
    assert "share the last digit, 7" in caplog.text


def test_capacity_of_codes_and_of_ids(items):
    """balanced-rq limits how many items have a code, as far as it goes; the policy then limits how many have an ID."""
    options = {"quantizer": "balanced-rq", "capacity": 1.2, "levels": 2, "codebook_size": [16, 200]}
    with made(items, {"policy": "capacity", "items": 2}, parts=2, **options) as index:
        codes = codes_of(index)
        assert np.bincount(codes[:, 0]).max() <= np.ceil(1.2 * len(items) / 16)
        assert uniqueness(codes)["largest"] == 2


def test_packages_and_copies_of_them():
    """Real embeddings under cosine: copies get IDs of their own, and are found beside what they are copies of."""
    sample = load_sample().vectors[:1_500].astype(np.float32)
    vectors = np.concatenate([sample, sample[:60], sample[:20]])
    shape = {"levels": 3, "codebook_size": 32, "iterations": 5}
    found = {}
    for policy in ("share", "next-best", "digit"):
        with semid.create(dim=384, metric="cosine", collisions=policy, **shape) as index:
            index.train(sample)
            index.add(vectors)
            report = index.stats()["collisions"]
            assert report["before"]["ids"] < 1_500
            assert report["after"]["ids"] == (report["before"]["ids"] if policy == "share" else 1_580)
            hits = index.search(vectors[:20], k=3)
            assert [sorted(ids.tolist()) for ids in hits.ids] == [[row, row + 1_500, row + 1_560] for row in range(20)]
            found[policy] = index.search(vectors[:200], k=10)
            truth = index.search(vectors[:200], k=10, exact=True)
        close = [d <= t[-1] + 1e-6 for d, t in zip(found[policy].distances, truth.distances, strict=True)]
        assert np.mean(close) > 0.97, policy
        if policy == "next-best":
            assert 0 < report["relative_extra_error"] < 0.05
            unit, quantizer = normalized(vectors), ResidualKMeans(**shape).fit(normalized(sample))
            error = ((unit - quantizer.decode(quantizer.encode(unit))) ** 2).sum(dtype=float)
            assert report["error"] == pytest.approx(error, rel=1e-4)


# -- names, options and errors ----------------------------------------------------------------------------------------


def test_the_built_in_ones_are_plugins():
    offers = {offer.name: offer.source for offer in installed().offers.values() if offer.kind == "collision policy"}
    assert offers == dict.fromkeys(POLICIES, "semid-index")
    plugins = Plugins()
    plugins.add(Offer("collision policy", "x", Share, "one 1.0"))
    with pytest.raises(PluginError, match="Two plugins offer a collision policy named 'x'"):
        plugins.add(Offer("collision policy", "x", Digit, "two 1.0"))


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("next_best", "No collision policy named 'next_best'.*Did you mean 'next-best'"),
        (7, "collisions must be a name, one of capacity, digit, next-best, share, sinkhorn, not 7"),
        ({"items": 5}, "needs the name of a policy"),
        ({"policy": "capacity", "most": 5}, "'capacity' has no option 'most'. Its options: items"),
        ({"policy": "share", "items": 5}, "'share' has no option 'items'. It has none"),
        ({"policy": "capacity", "items": 0}, "items must be a whole number, at least 1"),
        ({"policy": "digit", "size": 1}, "size must be a whole number, at least 2"),
        ({"policy": "digit", "size": 65_537}, "size must be at most 65,536"),
        ({"policy": "sinkhorn", "epsilon": 0}, "epsilon must be a number above 0"),
        ({"policy": "sinkhorn", "rounds": 0}, "rounds must be a whole number"),
    ],
)
def test_policies_that_there_are_not(policy, says, tmp_path):
    with pytest.raises((UnknownNameError, InvalidArgumentError), match=says):
        semid.create(tmp_path / "x.duckdb", dim=8, collisions=policy)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("policy", ["next-best", "capacity", "sinkhorn"])
def test_codes_that_cannot_be_placed(policy):
    with pytest.raises(InvalidArgumentError, match=r"'pq' does not allow: its codes are not a hierarchy.*'digit'"):
        semid.create(dim=24, quantizer="pq", levels=4, collisions=policy)


def test_codes_that_turn_out_not_to_add_up(vectors, monkeypatch):
    """What only training can tell is refused before anything is stored."""

    class NotAdditive(ResidualKMeans):
        name = "not-additive"

        @property
        def codebooks(self):
            return None

    monkeypatch.setattr("semid_index.index.quantizer_class", lambda name, **_: NotAdditive)
    with semid.create(dim=24, quantizer="not-additive", codebook_size=8, collisions="next-best") as index:
        with pytest.raises(InvalidArgumentError, match="its codewords do not add up"):
            index.train(vectors)
        assert not index.stats()["trained"]


def test_the_policy_is_kept_in_the_file(vectors, tmp_path):
    path = tmp_path / "x.duckdb"
    semid.create(path, dim=24, collisions={"policy": "capacity", "items": 3}).close()
    with semid.open(path) as index:
        assert index.config.collisions == {"policy": "capacity", "items": 3}
        index.train(vectors)
        index.add(np.repeat(vectors[:1], 8, axis=0))
        assert index.stats()["collisions"]["after"] == {"ids": 3, "alone": 0, "largest": 3}


def edit_config(path: Path, change) -> None:
    with duckdb.connect(path) as connection:
        config = json.loads(connection.execute("SELECT value FROM semid_meta WHERE key = 'config'").fetchall()[0][0])
        change(config)
        connection.execute("UPDATE semid_meta SET value = ? WHERE key = 'config'", [json.dumps(config)])


def test_a_policy_that_is_not_installed(index_file):
    edit_config(index_file, lambda config: config.update(collisions={"policy": "nearest-aisle"}))
    with pytest.raises(UnknownNameError, match=r"No collision policy named 'nearest-aisle'.*install the package"):
        semid.open(index_file)


def test_a_file_from_before_there_were_policies(index_file, vectors):
    def forget(config):
        del config["collisions"]

    edit_config(index_file, forget)
    with duckdb.connect(index_file) as connection:
        connection.execute("DELETE FROM semid_meta WHERE key = 'collisions'")
    with semid.open(index_file) as index:
        index.add(vectors[:10])
        assert index.stats()["collisions"]["policy"] == "share"


def test_a_plugin_whose_codes_are_wrong(vectors, monkeypatch):
    class Wrong(CollisionPolicy):
        name = "wrong"

        def place(self, arrivals):
            return arrivals.codes[:, :1]

    monkeypatch.setattr("semid_index.index.collision_policy_class", lambda name, **_: Wrong)
    with semid.create(dim=24, levels=3, codebook_size=8, collisions="wrong") as index:
        index.train(vectors)
        with pytest.raises(PluginError, match=r"'wrong' gave int32 codes of shape \(2000, 1\).*\(2000, 3\)"):
            index.add(vectors)
        assert len(index) == 0


def test_extra_levels_are_added_to_a_trained_quantizer(vectors):
    quantizer: Quantizer = ResidualKMeans(2, 8).fit(vectors)
    assert with_extra_levels(quantizer, ()) is quantizer
    longer = with_extra_levels(quantizer, (5, 300))
    assert own_quantizer(longer) is quantizer
    assert longer.codebook_sizes == (8, 8, 5, 300)
    assert [codebook.shape for codebook in longer.codebooks] == [(8, 24), (8, 24), (5, 24), (300, 24)]
    with pytest.raises(InvalidArgumentError, match="trained already"):
        longer.fit(vectors)


# -- the command line -------------------------------------------------------------------------------------------------


def semid_program(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_build_with_a_policy(items, tmp_path):
    np.save(tmp_path / "v.npy", items)
    shape = ["--levels", 2, "--codebook-size", "16,100", "--collisions", "capacity", "--collision-option", "items=3"]
    done = semid_program("build", tmp_path / "v.npy", "-o", tmp_path / "x.duckdb", *shape, "-f", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["collisions"]
    assert report["policy"] == "capacity"
    assert report["after"]["largest"] == 3 < report["before"]["largest"]
    shown = semid_program("stats", tmp_path / "x.duckdb", "-f", "table").stdout
    assert f"capacity: {report['moved']:,} items moved" in " ".join(shown.split())


def test_build_with_wrong_options(items, tmp_path):
    np.save(tmp_path / "v.npy", items)
    build = ["build", tmp_path / "v.npy", "-o", tmp_path / "x.duckdb"]
    wrong = semid_program(*build, "--collisions", "digits")
    assert wrong.exit_code == 1
    assert "Did you mean 'digit'" in wrong.stderr
    wrong = semid_program(*build, "--collisions", "capacity", "--collision-option", "items")
    assert wrong.exit_code == 2
    assert "--collision-option is NAME=VALUE" in " ".join(wrong.stderr.replace("│", " ").split())
    assert not (tmp_path / "x.duckdb").exists()
