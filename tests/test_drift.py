"""When retraining is due, and why: on data that drifts, and on data that does not."""

from __future__ import annotations

import numpy as np
import pytest

import semid_index as semid
from semid_index.demo import load_sample
from semid_index.drift import LEAST_SHARE, assess, counted, unseen_bias
from semid_index.quantizers.rq import ResidualKMeans


def clustered(rows, seed, *, clusters=40, dim=16, at=0.0):
    """Vectors in clusters that are the same for every seed."""
    centres = np.random.default_rng(99).standard_normal((clusters, dim)) + at
    random = np.random.default_rng(seed)
    return (centres[random.integers(0, clusters, rows)] + 0.4 * random.standard_normal((rows, dim))).astype(np.float32)


def trained_index(**options):
    index = semid.create(dim=16, levels=3, codebook_size=16, **options)
    vectors = clustered(2_000, seed=0)
    index.train(vectors)
    index.add(vectors)
    return index


def drift_of(index):
    return index.stats()["drift"]


def exact_error(index, first):
    """The mean squared error of the items from a number on, from what is stored."""
    table = index.sql(f"SELECT id, c1, c2, c3 FROM semantic_ids WHERE id >= {first} ORDER BY id").to_arrow_table()
    codes = np.stack([table[name].to_numpy() for name in ("c1", "c2", "c3")], axis=1)
    vectors = np.stack(index.get(table["id"], vectors=True)["vector"].to_numpy(zero_copy_only=False))
    return float(np.square(vectors - index.decode(codes)).sum(axis=1).mean())


def test_the_same_distribution_is_no_reason():
    with trained_index() as index:
        assert not drift_of(index)["due"]
        index.add(clustered(1_500, seed=1))
        found = drift_of(index)
        assert not found["due"]
        assert found["items"] == 1_500
        assert found["share"] == 1_500 / 3_500
        assert found["reason"].startswith("Retraining is not due: the 1,500 items added since the first")
        assert found["error"] == pytest.approx(exact_error(index, 2_000), rel=1e-5)
        assert 0.9 < found["error"] / found["expected_error"] < 1.1


def test_a_new_cluster_far_away_is_due_because_of_its_error():
    with trained_index() as index:
        index.add(clustered(1_000, seed=1, clusters=5, at=3.0))
        found = drift_of(index)
        assert found["due"]
        assert "described badly" in found["reason"]
        assert found["error"] == pytest.approx(exact_error(index, 2_000), rel=1e-5)
        assert index.report().drift.due
        assert index.report().value("drift_error_ratio") == pytest.approx(found["error"] / found["expected_error"])
        index.retrain()
        assert not drift_of(index)["due"]
        assert drift_of(index)["items"] == 3_000


def test_items_that_crowd_are_due_because_of_the_shelves():
    with trained_index() as index:
        index.add(clustered(4_000, seed=1, clusters=2))
        found = drift_of(index)
        assert found["due"]
        assert "crowd into few shelves" in found["reason"]
        counts = np.array(index.sql("SELECT count(*) FROM semantic_ids GROUP BY c1").fetchall())[:, 0]
        shares = counts / counts.sum()
        assert found["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_items_that_repeat_ids_are_due_because_of_them():
    with trained_index() as index:
        # one vector of each cluster many times: as even as before, as near as before, and all alike
        index.add(np.repeat(clustered(150, seed=1), 8, axis=0))
        found = drift_of(index)
        assert found["due"]
        assert "repeat the ID of another" in found["reason"]
        # the oracle: as many of the last and of the first items
        ids = [row[0] for row in index.sql("SELECT semantic_id FROM semantic_ids ORDER BY id").fetchall()]
        assert found["repeated"] == pytest.approx(1 - len(set(ids[-1_200:])) / 1_200)
        assert found["repeated_first"] == pytest.approx(1 - len(set(ids[800:2_000])) / 1_200)


def test_a_few_items_are_no_reason_however_far_away():
    with trained_index() as index:
        index.add(clustered(int(LEAST_SHARE * 2_000), seed=1, at=5.0))
        found = drift_of(index)
        assert not found["due"]
        assert "too few" in found["reason"]


def test_the_first_items_are_compared_with_the_training():
    with semid.create(dim=16, levels=3, codebook_size=16) as index:
        index.train(clustered(2_000, seed=0))
        assert drift_of(index)["items"] == 0
        index.add(clustered(1_000, seed=1, at=2.0))
        found = drift_of(index)
        assert found["due"]
        assert "the 1,000 items added first" in found["reason"]


def test_sums_are_kept_in_the_transaction_that_writes(tmp_path):
    with semid.create(tmp_path / "index.duckdb", dim=16, levels=3, codebook_size=16) as index:
        index.train(clustered(2_000, seed=0))
        index.add(clustered(500, seed=1))
        before = drift_of(index)
        with pytest.raises(semid.errors.DuplicateIdError):
            index.add(clustered(500, seed=2), ids=np.arange(499, 999))
        assert drift_of(index) == before
        index.add(clustered(300, seed=2))
        after = drift_of(index)
    with semid.open(tmp_path / "index.duckdb", read_only=True) as index:
        assert drift_of(index) == after
        assert after["items"] == 300


def test_codes_without_shelves_are_compared_by_error():
    with semid.create(dim=16, quantizer="sq8", levels=16) as index:
        index.train(clustered(2_000, seed=0))
        index.add(clustered(500, seed=0))
        index.add(clustered(500, seed=1, at=9.0))
        found = drift_of(index)
        assert found["due"]
        assert found["perplexity"] is None


@pytest.mark.parametrize(("rows", "size"), [(2_000, 32), (5_000, 64)])
def test_the_bias_is_that_of_vectors_not_seen(rows, size):
    vectors = load_sample().vectors
    vectors = vectors[np.random.default_rng(3).permutation(len(vectors))]
    seen, unseen = vectors[:rows], vectors[rows : rows + 3_000]
    quantizer = ResidualKMeans(4, size).fit(seen)

    def error(vectors):
        return np.square(vectors - quantizer.decode(quantizer.encode(vectors))).sum(axis=1).mean()

    levels = [{"codebook_size": size}] * 4
    ratio = error(unseen) / error(seen)
    assert ratio > 1.1
    assert unseen_bias(rows, levels) == pytest.approx(ratio, rel=0.05)


def test_counting_by_hand():
    first = counted(None, items=10, error=20.0, first_row=0, next_row=10)
    assert first == {"since": 10, "first": {"items": 10, "error": 20.0}, "later": {"items": 0, "error": 0.0}}
    later = counted(first, items=5, error=50.0, first_row=10, next_row=15)
    assert later["later"] == {"items": 5, "error": 50.0}
    assert later["first"] == first["first"]
    assert counted(later, items=1, error=1.0, first_row=15, next_row=16)["later"] == {"items": 6, "error": 51.0}


def test_items_of_an_older_version_of_the_package_are_not_counted():
    sums = counted(None, items=200, error=800.0, first_row=1_000, next_row=1_200)
    report = {"rows": 1_000_000, "levels": [{"error": 2.0, "codebook_size": 2, "perplexity": 2.0}]}
    found = assess(sums, report, items=1_200)
    assert (found.items, found.error, found.share) == (200, 4.0, 200 / 1_200)
    assert found.error_ratio == pytest.approx(2.0, rel=1e-4)
    assert found.due
    assert not assess(None, report, items=1_000).due
