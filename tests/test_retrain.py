"""Retraining: versions beside each other, what becomes of each ID, and one transaction."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

import semid_index as semid
from semid_index.errors import (
    InvalidArgumentError,
    InvalidIdsError,
    InvalidVectorsError,
    NotTrainedError,
    ReadOnlyError,
)
from semid_index.metrics import exact_search
from semid_index.quantizers.rq import ResidualKMeans

DIM, FIRST, ALL = 24, 1_500, 3_000


def clustered(rows, seed, clusters=60):
    """Vectors in clusters that are the same for every seed."""
    centres = np.random.default_rng(99).standard_normal((clusters, DIM))
    random = np.random.default_rng(seed)
    return (centres[random.integers(0, clusters, rows)] + 0.5 * random.standard_normal((rows, DIM))).astype(np.float32)


VECTORS = clustered(ALL, seed=0)
IDS = [f"item {i:04}" for i in range(ALL)]
QUERIES = clustered(20, seed=1)


def make(path=None, **options):
    """An index that was trained on half of its items."""
    index = semid.create(path, dim=DIM, **{"levels": 3, "codebook_size": 16, **options})
    index.train(VECTORS[:FIRST])
    index.add(VECTORS, ids=IDS, metadata={"number": np.arange(ALL), "half": ["old", "new"] * (ALL // 2)})
    return index


def ids_of(index):
    """The text of each item's ID, by its id."""
    return dict(index.sql("SELECT id, semantic_id FROM semantic_ids").fetchall())


def codes_of(index):
    """The codes of the items, in the order of IDS."""
    found = ids_of(index)
    return np.array([[int(code) for code in found[id].split("-")] for id in IDS if id in found])


def hits(index, **options):
    found = index.search(QUERIES, k=10, **options)
    return [list(zip(*one, strict=True)) for one in zip(found.ids, found.distances, found.semantic_ids, strict=True)]


def contents(path):
    """All rows of all tables and the text of all views, of a file."""
    import duckdb

    with duckdb.connect(str(path), read_only=True) as connection:
        tables = connection.execute("SELECT schema_name, table_name FROM duckdb_tables() ORDER BY ALL").fetchall()
        rows = {
            table: connection.execute(f'SELECT t::VARCHAR FROM "{table[0]}"."{table[1]}" AS t ORDER BY 1').fetchall()
            for table in tables
        }
        views = "SELECT schema_name, view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY ALL"
        return rows, connection.execute(views).fetchall()


def test_items_keep_their_ids_where_they_can():
    with make() as index:
        before = codes_of(index)
        report = index.retrain()
        after = codes_of(index)
    assert (report.version, report.items, report.rows, report.kept_ids) == (2, ALL, ALL, True)
    for level, churn in enumerate(report.churn):
        assert churn.changed == pytest.approx((before[:, level] != after[:, level]).mean())
        assert churn.prefix == pytest.approx((before != after)[:, : level + 1].any(axis=1).mean())
    assert 5 * report.churn[0].prefix < report.churn[0].unaligned
    assert report.churn[0].prefix < report.churn[0].aligned
    assert report.error < report.error_before
    assert report.error_ratio < 1.03


def test_the_report_counts_as_numpy_does():
    with make() as index:
        before = index.decode(codes_of(index))
        report = index.retrain()
        after = index.decode(codes_of(index))
        scratch = ResidualKMeans(3, 16).fit(VECTORS)
    # the codewords of version 1 are gone from `index`, so `before` was decoded in time
    assert report.error_before == pytest.approx(np.square(VECTORS - before).sum(axis=1).mean(), rel=1e-5)
    assert report.error == pytest.approx(np.square(VECTORS - after).sum(axis=1).mean(), rel=1e-5)
    from_scratch = np.square(VECTORS - scratch.decode(scratch.encode(VECTORS))).sum(axis=1).mean()
    assert report.error_ratio == pytest.approx(report.error / from_scratch, rel=1e-4)


def test_stored_codes_are_those_that_encode_gives():
    with make() as index:
        index.retrain(compare=False)
        np.testing.assert_array_equal(codes_of(index), index.encode(VECTORS))
        assert index.verify().ok


def test_without_keep_ids_it_is_training_from_scratch():
    with make() as index, semid.create(dim=DIM, levels=3, codebook_size=16) as fresh:
        fresh.train(VECTORS)
        fresh.add(VECTORS, ids=IDS)
        report = index.retrain(keep_ids=False)
        assert ids_of(index) == ids_of(fresh)
    assert report.churn[0].unaligned is report.error_ratio is None
    assert report.churn[0].prefix > 0.5


def test_the_map_leads_from_each_old_id_to_the_new_one(tmp_path):
    with make(tmp_path / "index.duckdb") as index:
        assert index.sql("FROM semid_map").fetchall() == []
        before = ids_of(index)
        index.retrain(compare=False)
        after = ids_of(index)
        index.add(QUERIES, ids=[f"new {i}" for i in range(20)], metadata={"number": [0] * 20, "half": ["new"] * 20})
        found = index.sql("SELECT id, old_version, new_version, old, new FROM semid_map").fetchall()
        assert sorted(found) == sorted((id, 1, 2, before[id], after[id]) for id in IDS)
        index.retrain(keep_ids=False)
        third = ids_of(index)
        found = index.sql("SELECT id, old_version, new_version, old, new FROM semid_map").fetchall()
        second = {**after, **{id: old for id, version, _, old, _ in found if version == 2 and id.startswith("new")}}
        expected = [(id, 1, 3, before[id], third[id]) for id in IDS] + [
            (id, 2, 3, second[id], third[id]) for id in second
        ]
        assert sorted(found) == sorted(expected)
        assert index.sql("SELECT DISTINCT version FROM semantic_ids").fetchall() == [(3,)]
        assert index.sql("SELECT DISTINCT version FROM semid_v1.semantic_ids").fetchall() == [(1,)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "cosine"},
        {"metric": "ip", "vectors": "float16"},
        {"vectors": "int8", "tail": 0},
        {"quantizer": "balanced-rq"},
        {"levels": 9, "codebook_size": 256 // 16},
        {"levels": 10, "codebook_size": 128},
        {"collisions": {"policy": "capacity", "items": 3}},
        {"collisions": "digit"},
    ],
    ids=str,
)
def test_the_old_version_goes_on_as_it_was(tmp_path, options):
    path = tmp_path / "index.duckdb"
    with make(path, **options) as index:
        ids, before, prefixes, filtered = ids_of(index), hits(index), index.tree(), hits(index, where="number < 700")
        decoded, encoded = index.decode(codes_of(index)), index.encode(QUERIES)
        index.retrain(compare=False)
        exact = index.search(QUERIES, k=10, exact=True)
        assert index.verify().ok
    with semid.open(path) as index:
        assert index.verify().ok
        np.testing.assert_array_equal(index.search(QUERIES, k=10, exact=True).flat_ids, exact.flat_ids)
        with semid.open(path, version=1) as old:
            assert ids_of(old) == ids
            assert hits(old) == before
            assert hits(old, where="number < 700") == filtered
            assert old.tree() == prefixes
            np.testing.assert_array_equal(old.decode(codes_of(old)), decoded)
            np.testing.assert_array_equal(old.encode(QUERIES), encoded)
            assert old.verify().ok, old.verify().failed
    with semid.open(path, read_only=True, version=1) as old:
        assert hits(old) == before
    with semid.open(path, read_only=True, version=1, vectors_in="file") as old:
        for query, was in zip(hits(old), before, strict=True):  # distances are summed up in another order
            assert [(id, text) for id, _, text in query] == [(id, text) for id, _, text in was]


def test_macros_follow_the_version(tmp_path):
    with make(tmp_path / "index.duckdb") as index:
        vector = index.get([IDS[5]], vectors=True)["vector"].to_pylist()[0]
        shelf = ids_of(index)[IDS[5]].split("-")[0]
        query = "SELECT id FROM semid_under(?) ORDER BY id"
        under = index.sql(query, [shelf]).fetchall()
        encode = "SELECT semid_encode(?::FLOAT[24])"
        sid = index.sql(encode, [vector]).fetchall()
        index.retrain(keep_ids=False)
        expected = sorted(id for id, text in ids_of(index).items() if text.split("-")[0] == shelf)
        assert [id for (id,) in index.sql(query, [shelf]).fetchall()] == expected
        assert (
            index.sql(encode, [vector]).fetchall()
            == index.sql("SELECT sid FROM semantic_ids WHERE id = ?", [IDS[5]]).fetchall()
        )
        with semid.open(tmp_path / "index.duckdb", version=1) as old:
            assert old.sql(query, [shelf]).fetchall() == under
            assert old.sql(encode, [vector]).fetchall() == sid
            pure = old.sql("SELECT id FROM semid_search(?::FLOAT[24], k := 3)", [vector], pure=True).fetchall()
            assert pure[0] == (IDS[5],)


def test_search_finds_the_items_during_and_after():
    with make() as index:
        index.search(QUERIES)
        index.retrain(compare=False)
        found = index.search(QUERIES, k=10, probes=10_000, rerank=ALL)
        nearest, _ = exact_search(QUERIES, VECTORS, 10, "l2")
        assert [list(ids) for ids in found.ids] == [[IDS[i] for i in row] for row in nearest]
        texts = ids_of(index)
        assert all(texts[id] == text for id, text in zip(found.flat_ids, found.flat_semantic_ids, strict=True))


def test_another_index_on_the_file_follows(tmp_path):
    path = tmp_path / "index.duckdb"
    with make(path) as index, semid.open(path) as other:
        other.search(QUERIES)
        index.retrain(keep_ids=False)
        assert hits(other) == hits(index)
        other.add(QUERIES, ids=[f"new {i}" for i in range(20)])
        np.testing.assert_array_equal(other.encode(QUERIES), index.encode(QUERIES))
        assert index.verify().ok
        assert other.search(QUERIES[3], k=1).ids[0] == index.search(QUERIES[3], k=1).ids[0] == "new 3"


def test_what_is_deleted_is_gone_from_all_versions(tmp_path):
    path = tmp_path / "index.duckdb"
    with make(path) as index:
        index.retrain(compare=False)
        assert index.delete(IDS[:100]) == 100
        assert index.delete(where="number >= 2900") == 100
        assert index.versions()[0].items == ALL - 200
        assert len(index.sql("SELECT id FROM semid_map").fetchall()) == ALL - 200
        with semid.open(path, version=1) as old:
            assert set(ids_of(old)) == set(IDS[100:2_900])
            assert not set(old.search(VECTORS[:100], k=5).ids[0]) & set(IDS[:100])
            assert old.verify().ok, old.verify().failed
        assert index.verify().ok


def test_an_item_with_a_new_vector_keeps_its_old_id_in_the_old_version(tmp_path):
    path = tmp_path / "index.duckdb"
    with make(path) as index:
        before = ids_of(index)
        index.retrain(compare=False)
        index.upsert(VECTORS[:50] + 3, IDS[:50])
        with semid.open(path, version=1) as old:
            assert ids_of(old) == before
            assert old.verify(sample=1).failed in ((), ("encoding",))  # its vector is another now
            distance = old.search(VECTORS[0] + 3, k=1, exact=True).distances[0]
            assert distance == pytest.approx(0, abs=1e-3)
        assert index.verify().ok


def test_items_added_later_are_only_in_the_new_version(tmp_path):
    path = tmp_path / "index.duckdb"
    with make(path) as index:
        index.retrain(compare=False)
        index.add(QUERIES, ids=[f"new {i}" for i in range(20)])
        with semid.open(path, version=1) as old:
            assert len(old) == ALL
            assert "new 3" not in old
            assert old.search(QUERIES[3], k=1).distances[0] > 0
        assert index.search(QUERIES[3], k=1).ids[0] == "new 3"
        assert [version.items for version in index.versions()] == [ALL, ALL + 20]


def test_the_old_version_cannot_be_written(tmp_path):
    path = tmp_path / "index.duckdb"
    with make(path) as index:
        index.retrain(compare=False)
    before = contents(path)
    with semid.open(path, version=1) as old:
        for write in (
            lambda: old.add(QUERIES),
            lambda: old.delete(IDS[:1]),
            lambda: old.upsert(VECTORS[:1], IDS[:1]),
            lambda: old.retrain(),
            lambda: old.drop_version(1),
            lambda: old.compact(),
        ):
            with pytest.raises(ReadOnlyError, match="version"):
                write()
    assert contents(path) == before
    with semid.open(path, version=2) as present:  # which is the one that may be written
        present.add(QUERIES, ids=[f"new {i}" for i in range(20)])


def test_an_unknown_version_is_refused(tmp_path):
    path = tmp_path / "index.duckdb"
    with make(path) as index:
        index.retrain(compare=False)
    with pytest.raises(InvalidArgumentError, match=r"no version 3. It has 1, and 2"):
        semid.open(path, version=3)
    with pytest.raises(InvalidArgumentError, match="version must be a whole number"):
        semid.open(path, version="1")


def test_versions_are_listed_and_dropped(tmp_path):
    path = tmp_path / "index.duckdb"
    with make(path) as index:
        index.retrain(compare=False)
        index.retrain(compare=False)
        assert [(each.version, each.present) for each in index.versions()] == [(1, False), (2, False), (3, True)]
        assert index.versions()[0].rows == FIRST
        assert index.versions()[2].error == pytest.approx(
            np.square(VECTORS - index.decode(codes_of(index))).sum(axis=1).mean(), rel=1e-4
        )
        for version in (0, 3, 4):
            with pytest.raises(InvalidArgumentError):
                index.drop_version(version)
        index.drop_version(1)
        assert [each.version for each in index.versions()] == [2, 3]
        assert index.sql("SELECT DISTINCT old_version FROM semid_map").fetchall() == [(2,)]
        index.drop_version(2)
        assert index.sql("FROM semid_map").fetchall() == []
        assert index.verify().ok
    with semid.open(path) as index:
        assert index.sql("SELECT count(*) FROM duckdb_schemas() WHERE schema_name LIKE 'semid%'").fetchall() == [(0,)]
        assert index.retrain(compare=False).version == 4


def test_versions_come_along_with_copies(tmp_path):
    path, copy = tmp_path / "index.duckdb", tmp_path / "copy.duckdb"
    with make(path) as index:
        before = hits(index)
        index.retrain(compare=False)
        mapped = sorted(index.sql("FROM semid_map").fetchall())
        index.save_copy(copy)
        index.compact()
    for file in (path, copy):
        with semid.open(file, version=1, read_only=True) as old:
            assert hits(old) == before
        with semid.open(file) as index:
            assert sorted(index.sql("FROM semid_map").fetchall()) == mapped
            index.drop_version(1)


@pytest.mark.parametrize("step", ["encode", "commit", "last batch"])
def test_it_is_one_transaction(tmp_path, monkeypatch, step):
    path = tmp_path / "index.duckdb"
    make(path).close()
    before = contents(path)
    index = semid.open(path)
    expected = hits(index)

    def fail(*_, **__):
        raise RuntimeError("the light went out")

    if step == "encode":
        monkeypatch.setattr("semid_index.retrain._encode_all", fail)
    elif step == "commit":
        monkeypatch.setattr("semid_index.store.Appending.finish", fail)
    else:
        monkeypatch.setattr("semid_index.build.ItemWriter.finish", fail)
    with pytest.raises(RuntimeError):
        index.retrain(compare=False)
    monkeypatch.undo()
    assert hits(index) == expected
    assert [each.version for each in index.versions()] == [1]
    index.close()
    assert contents(path) == before
    with semid.open(path) as index:
        assert hits(index) == expected
        assert index.retrain(compare=False).version == 2


def test_codebooks_of_a_retraining_that_was_undone_are_forgotten(tmp_path, monkeypatch):
    def interrupted(appending):
        raise KeyboardInterrupt

    path = tmp_path / "index.duckdb"
    make(path).close()
    with semid.open(path) as index, semid.open(path) as other:
        monkeypatch.setattr("semid_index.store.Appending.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.retrain(clustered(ALL, seed=5, clusters=20), keep_ids=False)
        monkeypatch.undo()
        assert other.retrain(keep_ids=False).version == 2
        np.testing.assert_array_equal(index.encode(VECTORS), codes_of(other))
        index.add(QUERIES, ids=[f"new {i}" for i in range(len(QUERIES))])
        assert index.verify().ok


def test_without_stored_vectors_they_have_to_be_given():
    with make(vectors="none") as index:
        before = ids_of(index)
        with pytest.raises(InvalidVectorsError, match="keeps no vectors"):
            index.retrain()
        with pytest.raises(InvalidVectorsError, match="keeps no vectors"):
            index.retrain(VECTORS)
        for wrong in (IDS[:-1], [*IDS[:-1], IDS[0]], [*IDS[:-1], "unknown"], list(range(ALL))):
            with pytest.raises(InvalidIdsError):
                index.retrain(VECTORS[: len(wrong)], ids=wrong)
        assert ids_of(index) == before
        order = np.random.default_rng(0).permutation(ALL)
        index.retrain(VECTORS[order], ids=[IDS[i] for i in order], compare=False)
        np.testing.assert_array_equal(codes_of(index), index.encode(VECTORS))


def test_vectors_without_ids_are_only_learned_from():
    with make() as index:
        report = index.retrain(clustered(2_000, seed=7), compare=False)
        assert (report.rows, report.items) == (2_000, ALL)
        np.testing.assert_array_equal(codes_of(index), index.encode(VECTORS))


def test_collision_policies_hold_in_the_new_version():
    largest = "SELECT max(n) FROM (SELECT count(*) AS n FROM semantic_ids GROUP BY sid)"
    with make(collisions={"policy": "capacity", "items": 2}, codebook_size=[8, 8, 256]) as index:
        assert index.sql(largest).fetchall() == [(2,)]
        index.retrain(compare=False)
        assert index.sql(largest).fetchall() == [(2,)]
        assert index.stats()["collisions"]["moved"] == (codes_of(index) != index.encode(VECTORS)).any(axis=1).sum() > 0


def test_history_belongs_to_its_version():
    with make() as index:
        index.delete(IDS[:10])
        index.retrain(compare=False)
        index.delete(IDS[10:20])
        found = index.sql("SELECT version, count(*) FROM semid_history GROUP BY ALL ORDER BY ALL").fetchall()
        assert found == [(1, 10), (2, 10)]


def test_other_quantizers_are_aligned_or_refused():
    vectors = VECTORS[:, :8]
    for quantizer in ("pq", "vq"):
        with semid.create(dim=8, quantizer=quantizer, levels=4 if quantizer == "pq" else 1, codebook_size=16) as index:
            index.train(vectors[:FIRST])
            index.add(vectors, ids=IDS)
            assert index.retrain().churn[0].changed < 1
    with semid.create(dim=8, quantizer="sq8", levels=8) as index:
        index.train(vectors[:FIRST])
        index.add(vectors, ids=IDS)
        before = ids_of(index)
        with pytest.raises(InvalidArgumentError, match="keep_ids=False"):
            index.retrain()
        assert ids_of(index) == before
        assert index.retrain(keep_ids=False).version == 2


def test_there_has_to_be_something_to_retrain():
    with semid.create(dim=DIM, levels=2, codebook_size=16) as index:
        with pytest.raises(NotTrainedError):
            index.retrain()
        index.train(VECTORS)
        with pytest.raises(InvalidArgumentError, match="no items"):
            index.retrain()
        index.add(VECTORS)
        with pytest.raises(InvalidArgumentError, match="ids belong to vectors"):
            index.retrain(ids=np.arange(ALL))
        with pytest.raises(InvalidVectorsError):
            index.retrain(np.full((10, DIM), np.nan))
        assert [each.version for each in index.versions()] == [1]


def test_reading_only(tmp_path):
    path = tmp_path / "index.duckdb"
    make(path).close()
    with semid.open(path, read_only=True) as index:
        with pytest.raises(ReadOnlyError):
            index.retrain()
        assert [each.version for each in index.versions()] == [1]


def test_progress_is_told():
    said = []
    with make() as index:
        index.retrain(progress=lambda done, total, what: said.append((done, total, what)))
    assert {what for *_, what in said} >= {"encode all items again"}
    assert said[-1] == (ALL, ALL, "encode all items again")


def test_metadata_stays(tmp_path):
    with make(tmp_path / "index.duckdb") as index:
        before = index.get(IDS[:5]).drop_columns("semantic_id")
        index.retrain(compare=False)
        assert index.get(IDS[:5]).drop_columns("semantic_id") == before
        assert isinstance(before, pa.Table)


def test_commands(tmp_path):
    from typer.testing import CliRunner

    from semid_index.cli import app

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.stdout

    path, vectors, ids = tmp_path / "index.duckdb", tmp_path / "vectors.npy", tmp_path / "ids.txt"
    make(path, vectors="none").close()
    np.save(vectors, VECTORS)
    ids.write_text("\n".join(IDS), encoding="utf-8")
    run("retrain", path, "--quiet", code=1)  # it keeps no vectors
    run("retrain", path, "--ids", ids, "--quiet", code=2)
    report = json.loads(run("retrain", path, "--vectors", vectors, "--ids", ids, "--format", "json", "--quiet"))
    assert (report["version"], report["items"]) == (2, ALL)
    shown = run("retrain", path, "--vectors", vectors, "--ids", ids, "--drop-old", "--format", "table", "--quiet")
    assert "from scratch" in shown
    assert "Version 2 was dropped." in shown
    versions = run("versions", path, "--drop", 1, "--format", "jsonl")
    assert [json.loads(line)["version"] for line in versions.splitlines()] == [3]
    run("versions", path, "--drop", 3, code=1)
    assert "Retraining is not due" in run("stats", path, "--format", "table")
