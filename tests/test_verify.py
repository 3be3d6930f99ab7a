"""A healthy index of every kind passes; and each kind of damage is found by the check that is there for it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from typer.testing import CliRunner

import semid_index as semid
from semid_index.cli import app
from semid_index.errors import CorruptIndexError, InvalidArgumentError
from semid_index.records import VerifyReport

GOLDEN = Path(__file__).resolve().parent / "golden" / "v1"
ITEMS = 1_500
CHECKS = (
    "blocks",
    "codebooks",
    "ids",
    "metadata",
    "rows",
    "codes",
    "order",
    "dup_rank",
    "history",
    "norms",
    "buckets",
    "vectors",
    "checksums",
    "values",
    "encoding",
    "tail",
    "view",
    "macros",
)


def statuses(report: VerifyReport, status: str) -> list[str]:
    return [check.name for check in report.checks if check.status == status]


# ------------------------------------------------------------------------------------------------------ healthy indexes

QUANTIZERS: list[dict[str, Any]] = [
    {},
    {"metric": "cosine", "vectors": "float16"},
    {"metric": "ip", "vectors": "int8"},
    {"metric": "cosine", "vectors": "int8", "tail": 0},
    {"vectors": "none"},
    {"vectors": "none", "tail": 8},
    {"codebook_size": [20, 7, 256]},
    {"levels": 12, "codebook_size": 256, "metric": "cosine"},
    {"beam": 8, "metric": "cosine", "vectors": "int8"},
    {"normalize_residuals": True},
    {"refine": 1},
    {"quantizer": "balanced-rq"},
    {"quantizer": "balanced-rq", "capacity": 1.5},
    {"quantizer": "vq", "levels": 1, "codebook_size": 64},
    {"quantizer": "pq", "metric": "cosine", "vectors": "float16"},
    {"quantizer": "opq"},
    {"quantizer": "lsq", "metric": "ip"},
    {"quantizer": "prq", "splits": 3},
    {"quantizer": "binary", "levels": 3, "codebook_size": 256},
    {"quantizer": "rabitq", "vectors": "int8"},
    {"quantizer": "sq8", "metric": "cosine"},
    {"quantizer": "sq4", "vectors": "float16"},
    {"collisions": "digit", "vectors": "int8"},
    {"collisions": "next-best"},
    {"collisions": {"policy": "capacity", "items": 2}, "metric": "cosine"},
    {"collisions": "sinkhorn", "vectors": "float16"},
    {"quantizer": "vq", "levels": 1, "codebook_size": 64, "collisions": {"policy": "capacity", "items": 200}},
]
UNSHAPED = ("sq8", "sq4", "rabitq")  # they choose the number of levels themselves


def built(options: dict[str, Any], vectors: Any, path: Path | None = None) -> semid.SemanticIndex:
    shape = {} if options.get("quantizer") in UNSHAPED else {"levels": 3, "codebook_size": 16}
    index = semid.create(path, dim=24, **{**shape, **options})
    index.train(vectors)
    index.add(vectors[:900], [f"id {number}" for number in range(900)], metadata={"number": np.arange(900)})
    index.add(vectors[900:ITEMS], [f"id {number}" for number in range(900, ITEMS)])
    return index


@pytest.mark.parametrize("options", QUANTIZERS, ids=lambda options: "-".join(map(str, options.values())) or "default")
def test_a_healthy_index_passes(options, vectors):
    with built(options, vectors) as index:
        report = index.verify(sample=ITEMS)
        assert statuses(report, "failed") == [], report
        assert tuple(check.name for check in report.checks) == CHECKS
        assert report.ok
        without = {"encoding", "values", "tail"} if options.get("vectors") == "none" else set()
        without |= {"vectors"} if options.get("vectors") == "none" and not options.get("tail") else set()
        without |= {"tail"} if index.config.tail == 0 else set()
        # codes depend on those before; or a policy may change the only level
        if "capacity" in options or (options.get("quantizer") == "vq" and "collisions" in options):
            without.add("encoding")
        assert set(statuses(report, "skipped")) == without
        looked_at = {check.name: check.examined for check in report.checks}
        assert looked_at["ids"] == looked_at["codes"] == looked_at["metadata"] == ITEMS
        assert looked_at["encoding"] in (0, ITEMS)


def test_an_index_without_items_or_training(vectors):
    with semid.create(dim=24, levels=3, codebook_size=16) as index:
        assert statuses(index.verify(), "ok") == ["blocks"]
        assert index.verify().ok
        index.train(vectors)
        report = index.verify()
        assert report.ok, report
        assert statuses(report, "skipped") == []


@pytest.mark.parametrize("name", ["plain", "strings", "long", "flat", "scalar"])
def test_files_of_an_older_format(name, tmp_path):
    path = tmp_path / "index.duckdb"
    path.write_bytes(gzip.decompress((GOLDEN / f"{name}.duckdb.gz").read_bytes()))
    with semid.open(path, read_only=True) as index:
        report = index.verify()
        failed = statuses(report, "failed")
        assert not set(failed) - {"buckets"}, report
    with semid.open(path) as index:
        report = index.verify()
        assert report.ok, report
        assert {"view", "macros"}.isdisjoint(statuses(report, "skipped"))
        found = {check.name: check.found for check in report.checks}
        assert "not recorded" in found["codebooks"]


def test_what_is_written_while_it_verifies_does_not_matter(index_file, vectors):
    with semid.open(index_file) as index, semid.open(index_file) as other:
        added = []

        def add(done: int, total: int, what: str) -> None:
            added.append(other.add(vectors[done : done + 1]))

        report = index.verify(progress=add)
        assert len(added) == len(CHECKS)
        assert report.ok, report
        assert next(check for check in report.checks if check.name == "macros").status == "ok"
        assert len(index) == 2_000 + len(CHECKS)


@pytest.mark.parametrize("sample", [0, -1, 2.5, True, None, "all"])
def test_a_sample_that_is_none(index_file, sample):
    with semid.open(index_file, read_only=True) as index, pytest.raises(InvalidArgumentError, match="sample"):
        index.verify(sample=sample)


# --------------------------------------------------------------------------------------------------------------- damage

# 6, 6, 6 and 4 bits: a bucket is the first two levels, and codes 12 to 15 of the last are in no codebook
SHAPE: dict[str, Any] = {"dim": 24, "levels": 4, "codebook_size": [64, 64, 64, 12]}
LAST = 1_399  # the last row; the checks of the view and of macros look at every fifth


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory, vectors) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.duckdb"
    given = vectors[: LAST + 1].copy()
    given[8] = given[7]
    given[601:604] = given[600]
    with semid.create(path, **SHAPE) as index:
        index.train(vectors)
        index.add(given, metadata={"word": [f"word {number}" for number in range(len(given))]})
        index.sql("CREATE TABLE mine AS SELECT range AS n, hash(range) AS h FROM range(20000)")
    with semid.open(path, read_only=True) as index:
        assert index.verify(sample=2_000).failed == ()
    return path


RESORTED = (
    "CREATE TEMP TABLE s AS FROM semid_codes ORDER BY {}; DELETE FROM semid_codes; INSERT INTO semid_codes FROM s"
)
WITHOUT_KEY = "CREATE TABLE s AS FROM semid_codes; DROP TABLE semid_codes; ALTER TABLE s RENAME TO semid_codes"
ONE_WORD = "WHERE level = 3 AND code = 5"
SWAPPED = "UPDATE {} SET row = CASE row WHEN 3 THEN 901 ELSE 3 END WHERE row IN (3, 901)"
VIEW = "CREATE OR REPLACE VIEW semantic_ids AS SELECT * {} FROM ({})"

DAMAGE: dict[str, tuple[str, set[str]]] = {
    "the last bit of a codeword": (
        "UPDATE semid_codebook SET codeword = list_transform(codeword, lambda x: x * 1.0000002::FLOAT)::FLOAT[24] "
        f"{ONE_WORD}",
        {"codebooks"},
    ),
    "a codeword that is another": (
        "UPDATE semid_codebook SET codeword = (SELECT codeword FROM semid_codebook WHERE level = 3 AND code = 6) "
        f"{ONE_WORD}",
        {"codebooks"},
    ),
    "a codeword that is not finite": (
        f"UPDATE semid_codebook SET codeword = list_transform(codeword, lambda x: 'inf'::FLOAT)::FLOAT[24] {ONE_WORD}",
        {"codebooks"},
    ),
    "another fingerprint": (
        "UPDATE semid_meta SET value = replace(value, 'codebook_2\": \"', 'codebook_2\": \"0') "
        "WHERE key = 'fingerprints'",
        {"codebooks"},
    ),
    "an id twice": (
        f"{WITHOUT_KEY}; UPDATE semid_codes SET id = 6 WHERE id = 5; DELETE FROM items WHERE id = 5",
        {"ids", "checksums"},
    ),
    "an item without metadata": ("DELETE FROM items WHERE id = 5", {"metadata"}),
    "metadata without an item": ("INSERT INTO items VALUES (99999, 'none')", {"metadata"}),
    "metadata twice": ("INSERT INTO items FROM items WHERE id = 5", {"metadata"}),
    "an item that is gone": ("DELETE FROM semid_codes WHERE id = 5", {"metadata", "vectors"}),
    "a row number twice": (
        "UPDATE semid_codes SET row = 7 WHERE id = 8; DELETE FROM semid_vectors WHERE row = 8",
        {"rows", "checksums"},
    ),
    "rows that were never given": ("UPDATE semid_meta SET value = '1000' WHERE key = 'next_row'", {"rows"}),
    "a negative row": (
        f"UPDATE semid_codes SET row = -2 WHERE row = {LAST}; UPDATE semid_vectors SET row = -2 WHERE row = {LAST}",
        {"rows", "checksums"},
    ),
    "a code that is in no codebook": (
        "UPDATE semid_codes SET sid = sid | 15 WHERE rowid = (SELECT max(rowid) FROM semid_codes)",
        {"codes", "checksums"},
    ),
    "a sid with bits that no level has": (
        "UPDATE semid_codes SET sid = sid + (1 << 22), bucket = bucket + (1 << 12) "
        "WHERE rowid = (SELECT max(rowid) FROM semid_codes)",
        {"codes", "buckets", "checksums"},
    ),
    "another order": (RESORTED.format("hash(id)"), {"order"}),
    "nearly the same order": (RESORTED.format("CASE WHEN id = 77 THEN 0 ELSE sid END"), {"order"}),
    "a dup_rank twice": ("UPDATE semid_codes SET dup_rank = 0 WHERE id = 602", {"dup_rank"}),
    "a negative dup_rank": ("UPDATE semid_codes SET dup_rank = -1 WHERE id = 602", {"dup_rank"}),
    "an ID that was given again": (
        "INSERT INTO semid_history BY NAME SELECT 5555 AS id, sid, dup_rank, 1 AS version, now()::TIMESTAMP AS until "
        "FROM semid_codes WHERE id = 77",
        {"history"},
    ),
    "another norm2": ("UPDATE semid_codes SET norm2 = norm2 * 1.01 WHERE id = 77", {"norms"}),
    "a norm2 that is no number": ("UPDATE semid_codes SET norm2 = 'nan' WHERE id = 77", {"norms"}),
    "an item in another bucket": ("UPDATE semid_codes SET bucket = bucket + 1 WHERE id = 77", {"buckets"}),
    "a bucket that is gone": (
        "DELETE FROM semid_buckets WHERE bucket = (SELECT bucket FROM semid_codes WHERE id = 77)",
        {"buckets"},
    ),
    "a bucket twice": ("INSERT INTO semid_buckets FROM semid_buckets LIMIT 1", {"buckets"}),
    "a bucket with another norm2": (
        "UPDATE semid_buckets SET norm2 = norm2 * 1.1 WHERE bucket = (SELECT bucket FROM semid_codes WHERE id = 77)",
        {"buckets"},
    ),
    "a bucket that cannot be": ("INSERT INTO semid_buckets VALUES (1 << 20, 1)", {"buckets"}),
    "a vector that is gone": ("DELETE FROM semid_vectors WHERE row = 5", {"vectors"}),
    "a vector twice": ("INSERT INTO semid_vectors FROM semid_vectors WHERE row = 5", {"vectors"}),
    "a vector of nobody": (
        "INSERT INTO semid_vectors SELECT 5000, * EXCLUDE (row) FROM semid_vectors WHERE row = 5",
        {"vectors", "checksums"},
    ),
    "a vector that is not finite": (
        "UPDATE semid_vectors SET v = list_transform(v, lambda x: 'nan'::FLOAT)::FLOAT[24] WHERE row = 5",
        {"values", "checksums"},
    ),
    "vectors of one another": (SWAPPED.format("semid_vectors"), {"encoding", "checksums"}),
    "a vector that is another": (
        "UPDATE semid_vectors SET v = (SELECT v FROM semid_vectors WHERE row = 901) WHERE row = 3",
        {"encoding", "tail", "checksums"},
    ),
    "tails of one another": (
        "UPDATE semid_vectors SET tail = (SELECT tail FROM semid_vectors WHERE row = 901) WHERE row = 3",
        {"tail", "checksums"},
    ),
    "ids of one another": (
        f"{WITHOUT_KEY}; UPDATE semid_codes SET id = CASE id WHEN 5 THEN 6 ELSE 5 END WHERE id IN (5, 6)",
        {"checksums"},
    ),
    "a view that hides an item": (VIEW.format("", "FROM semantic_ids_before WHERE id <> 77"), {"view"}),
    "a view with columns changed": (
        VIEW.format("REPLACE (c2 AS c1)", "FROM semantic_ids_before"),
        {"view"},
    ),
    "a view that is gone": ("DROP VIEW semantic_ids", {"view"}),
    "a macro that is gone": ("DROP MACRO TABLE semid_tree", {"macros"}),
    "a macro that is another": ("CREATE OR REPLACE MACRO semid_text(sid) AS '1-2-3-4'", {"macros"}),
    "macros of another version": ("UPDATE semid_meta SET value = '\"0\"' WHERE key = 'macros'", {"macros"}),
    "a table that is gone": ("DROP TABLE semid_buckets", {"buckets"}),
}


def damaged(path: Path, statements: str) -> None:
    """Change a file with nothing but DuckDB."""
    with duckdb.connect(str(path)) as connection:
        if "semantic_ids_before" in statements:
            (query,) = connection.execute("SELECT sql FROM duckdb_views() WHERE view_name = 'semantic_ids'").fetchone()
            connection.execute(query.replace("semantic_ids", "semantic_ids_before", 1))
        for statement in statements.split("; "):
            assert connection.execute(statement).fetchall() != [(0,)], f"nothing was changed by {statement}"


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_by_the_check_that_is_there_for_it(what, whole_file, tmp_path):
    statements, expected = DAMAGE[what]
    path = Path(shutil.copy(whole_file, tmp_path / "damaged.duckdb"))
    if expected == {"codebooks"}:  # the file would be refused, so the damage comes while it is open
        with semid.open(path) as index:
            index.sql(statements)
            report = index.verify(sample=2_000)
        with pytest.raises(CorruptIndexError, match="codebooks are not as training left them"):
            semid.open(path)
    else:
        damaged(path, statements)
        with semid.open(path, read_only=True) as index:
            report = index.verify(sample=2_000)
    assert set(report.failed) == expected, report
    assert not report.ok


def test_every_check_is_seen_to_fail():
    found = {name for _, checks in DAMAGE.values() for name in checks}
    assert found | {"blocks"} == set(CHECKS)


def flip(path: Path, table: str) -> None:
    """Change one byte in the middle of a block that holds a table's values."""
    with duckdb.connect(str(path), read_only=True) as connection:
        found = connection.execute(
            f"SELECT max(block_id) FROM pragma_storage_info('{table}') WHERE persistent AND segment_type <> 'VALIDITY'"
        ).fetchall()
    content = bytearray(path.read_bytes())
    content[3 * 4096 + found[0][0] * 262_144 + 5_000] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("table", "expected"), [("mine", {"blocks"}), ("semid_vectors", {"vectors", "values", "checksums"})]
)
def test_a_byte_that_changed(table, expected, whole_file, tmp_path):
    path = Path(shutil.copy(whole_file, tmp_path / "flipped.duckdb"))
    flip(path, table)
    with semid.open(path, read_only=True) as index:
        report = index.verify()
    assert set(report.failed) - {"encoding", "tail"} == expected, report
    assert any("cannot be checked: CorruptIndexError" in check.found for check in report.checks)


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_tells_by_its_exit_code(whole_file, tmp_path):
    path = Path(shutil.copy(whole_file, tmp_path / "index.duckdb"))
    fine = CliRunner().invoke(app, ["verify", str(path), "--format", "json"])
    record = json.loads(fine.stdout)
    assert fine.exit_code == 0
    assert record["ok"] is True
    assert [check["name"] for check in record["checks"]] == list(CHECKS)
    damaged(path, "DELETE FROM items WHERE id = 5")
    bad = CliRunner().invoke(app, ["verify", str(path), "--format", "json"])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["failed"] == ["metadata"]
    shown = CliRunner().invoke(app, ["verify", str(path), "--format", "table", "--sample", "10", "--quiet"])
    assert shown.exit_code == 1
    assert "The index is damaged: metadata." in shown.stdout
    assert "1 items without metadata" in shown.stdout


@pytest.mark.parametrize("damage", ["cut off", "no database", "header"])
def test_a_file_that_cannot_be_opened(damage, whole_file, tmp_path):
    path = tmp_path / "index.duckdb"
    content = bytearray(whole_file.read_bytes())
    if damage == "header":
        content[8:12] = b"DUCK"
        content[100:4_000] = bytes(3_900)
        content[4_096:12_288] = b"\x07" * 8_192
    path.write_bytes(b"hello, world, hello" if damage == "no database" else content[: len(content) // 2])
    told = CliRunner().invoke(app, ["verify", str(path)])
    assert told.exit_code == 1
    assert told.stdout == ""
    assert told.stderr.startswith("error: ")
    assert str(path) in told.stderr
