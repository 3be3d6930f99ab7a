"""Copies and compacted files: the same items, IDs and hits in less space; whole or not there; in use or replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from sqlalchemy import text
from typer.testing import CliRunner

import semid_index as semid
from semid_index.cli import app
from semid_index.errors import (
    IndexClosedError,
    IndexExistsError,
    IndexFileError,
    IndexLockedError,
    ReadOnlyError,
    StorageError,
)
from semid_index.index import SemanticIndex
from semid_index.store import Store

CYCLES = 1_000 if os.environ.get("SEMID_LONG") else 25
OPTIONS: dict[str, Any] = {"dim": 24, "levels": 3, "codebook_size": 16}


def items(index: SemanticIndex) -> dict[str, Any]:
    """What a user sees: items with their IDs and metadata, and settings."""
    return {
        "ids": sorted(index.sql("SELECT * FROM semantic_ids").fetchall()),
        "items": sorted(index.sql("SELECT * FROM items").fetchall(), key=repr),
        "vectors": sorted(index.sql("SELECT * FROM semid_vectors").fetchall()),
        "meta": sorted(index.sql("SELECT * FROM semid_meta").fetchall()),
        "history": sorted(index.sql("SELECT * FROM semid_history").fetchall(), key=repr),
    }


def ids_of(index: SemanticIndex, ids: list[int]) -> dict[int, str]:
    found = index.get(ids)
    return dict(zip(found["id"].to_pylist(), found["semantic_id"].to_pylist(), strict=True))


def hits(index: SemanticIndex, queries: Any, **options: Any) -> list[list[int]]:
    return [row.tolist() for row in index.search(queries, k=5, **options).ids]


def runs(index: SemanticIndex) -> int:
    """Sorted runs in the table of codes."""
    sids = np.array([sid for (sid,) in index.sql("SELECT sid FROM semid_codes").fetchall()])
    return int((np.diff(sids) < 0).sum()) + 1


@pytest.fixture
def worn_file(index_file, vectors) -> Path:
    """An index in which half of the items were deleted, and others added."""
    with semid.open(index_file) as index:
        for start in range(0, 2_000, 200):
            index.delete(list(range(start, start + 100)))
            index.add(vectors[start : start + 50], list(range(3_000 + start, 3_050 + start)))
    return index_file


# --------------------------------------------------------------------------------------------------------------- copies


def test_a_copy_is_the_same_index(worn_file, tmp_path, queries):
    copied = tmp_path / "copy.duckdb"
    with semid.open(worn_file) as index:
        before, found, filtered = items(index), hits(index, queries), hits(index, queries, where="number > 900")
        assert runs(index) > 5
        index.save_copy(copied)
        assert items(index) == before
        assert index.add(queries[:1]).tolist() == [4_850], "the original goes on"
    with semid.open(copied) as index:
        assert items(index) == before
        assert hits(index, queries) == found
        assert hits(index, queries, where="number > 900") == filtered
        assert runs(index) == 1
        assert index.verify().failed == ()
        assert index.add(queries[:1]).tolist() == [4_850]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.duckdb", "index.duckdb"]


def test_what_users_made_comes_along(index_file, tmp_path):
    made = """
    CREATE TYPE mood AS ENUM ('calm', 'wild');
    CREATE SEQUENCE counter START 40;
    CREATE TABLE shelves (id INTEGER PRIMARY KEY, mood mood DEFAULT 'calm', "a ""name" VARCHAR NOT NULL,
                          double INTEGER GENERATED ALWAYS AS (2 * id), UNIQUE ("a ""name"));
    CREATE TABLE aaa (shelf INTEGER REFERENCES shelves (id), since TIMESTAMPTZ, big HUGEINT,
                      parts STRUCT(a INTEGER[])[]);
    INSERT INTO shelves (id, "a ""name") VALUES (1, 'one'), (2, 'two');
    INSERT INTO aaa VALUES (1, '2026-01-01 00:00:00+00', 170141183460469231731687303715884105727, [{'a': [1, NULL]}]);
    CREATE INDEX by_time ON aaa (since);
    CREATE VIEW joined AS SELECT * FROM shelves JOIN aaa ON shelf = id;
    CREATE MACRO twice(x, y := 1) AS 2 * x + y;
    CREATE SCHEMA other;
    CREATE TABLE other.sid (sid INTEGER);
    INSERT INTO other.sid VALUES (9), (1), (5);
    COMMENT ON TABLE aaa IS 'mine';
    SELECT nextval('counter')
    """
    asked = (
        'SELECT id, mood, "a ""name", double, since, big, parts FROM joined',
        "SELECT sid FROM other.sid",
        "SELECT twice(4), twice(4, y := 5), nextval('counter')",
        "SELECT comment FROM duckdb_tables() WHERE table_name = 'aaa'",
        "SELECT index_name FROM duckdb_indexes() WHERE table_name = 'aaa'",
        "SELECT constraint_text FROM duckdb_constraints() WHERE table_name IN ('shelves', 'aaa') ORDER BY ALL",
    )
    with semid.open(index_file) as index:
        for statement in made.split(";\n"):
            index._store.cursor().execute(statement)
        index.save_copy(tmp_path / "copy.duckdb")
        expected = [index.sql(question).fetchall() for question in asked]
    assert expected[1] == [(9,), (1,), (5,)]
    assert expected[2] == [(9, 13, 41)]
    assert expected[0][0][:4] == (1, "calm", "one", 2)
    with semid.open(tmp_path / "copy.duckdb") as copied:
        assert [copied.sql(question).fetchall() for question in asked] == expected
    with semid.open(index_file) as index:
        index.compact()
        found = [index.sql(question).fetchall() for question in asked if "nextval" not in question]
        assert found == [answer for answer, question in zip(expected, asked, strict=True) if "nextval" not in question]


def test_an_index_in_memory_is_kept_by_a_copy(tmp_path, vectors, queries):
    with semid.create(**OPTIONS) as index:
        index.save_copy(tmp_path / "untrained.duckdb")
        index.train(vectors)
        index.add(vectors, metadata={"word": [f"word {number}" for number in range(len(vectors))]})
        index.save_copy(tmp_path / "copy.duckdb")
        before, found = items(index), hits(index, queries)
    with semid.open(tmp_path / "copy.duckdb", read_only=True) as copied:
        assert items(copied) == before
        assert hits(copied, queries) == found
        copied.save_copy(tmp_path / "copy of the copy.duckdb")
    with semid.open(tmp_path / "copy of the copy.duckdb") as again:
        assert items(again) == before
    with semid.open(tmp_path / "untrained.duckdb") as untrained:
        untrained.train(vectors)
        assert untrained.add(vectors[:2]).tolist() == [0, 1]


def test_a_copy_is_written_in_the_format_that_both_duckdbs_read(index_file, tmp_path):
    with semid.open(index_file, read_only=True) as index:
        index.save_copy(tmp_path / "copy.duckdb")
    with semid.open(index_file) as index:
        index.compact()
    for path in (index_file, tmp_path / "copy.duckdb"):
        with duckdb.connect(str(path), read_only=True) as connection:
            described = connection.execute("SELECT * FROM duckdb_databases() WHERE NOT internal").fetchall()
        assert "v1.2.0+" in str(described)


def test_vectors_that_do_not_compress_are_written_as_they_are(tmp_path):
    """Those of a model take 4 bytes a value (docs/decisions/0005), whole numbers fewer."""
    random = np.random.default_rng(0)
    given = random.standard_normal((130_000, 32), dtype=np.float32)
    sizes = {}
    for name, some in (("model", given), ("whole numbers", np.rint(given))):
        with semid.create(tmp_path / f"{name}.duckdb", dim=32, levels=2, codebook_size=16, tail=0) as index:
            index.train(some[:2_000])
            index.add(some)
            index.save_copy(tmp_path / "copy.duckdb", overwrite=True)
        with duckdb.connect(str(tmp_path / "copy.duckdb"), read_only=True) as connection:
            found = connection.execute(
                "SELECT DISTINCT compression FROM pragma_storage_info('semid_vectors') WHERE segment_type = 'FLOAT'"
            )
            sizes[name] = {compression for (compression,) in found.fetchall()}
        assert (tmp_path / "copy.duckdb").stat().st_size <= 1.1 * (tmp_path / f"{name}.duckdb").stat().st_size
    assert "Uncompressed" in sizes["model"]
    assert "Uncompressed" not in sizes["whole numbers"]


def test_places_that_cannot_be_written_to(index_file, tmp_path, queries):
    other = tmp_path / "other.duckdb"
    with semid.open(index_file) as index:
        with pytest.raises(IndexExistsError, match="the index itself"):
            index.save_copy(index_file, overwrite=True)
        with pytest.raises(IndexExistsError, match="folder"):
            index.save_copy(tmp_path, overwrite=True)
        with pytest.raises(IndexFileError, match="no folder"):
            index.save_copy(tmp_path / "nowhere" / "x.duckdb")
        index.save_copy(other)
        before = other.read_bytes()
        with pytest.raises(IndexExistsError, match="overwrite=True"):
            index.save_copy(other)
        assert other.read_bytes() == before
        with semid.open(other), pytest.raises(IndexLockedError):
            index.save_copy(other, overwrite=True)
        with pytest.raises((StorageError, IndexFileError)):
            index.save_copy(tmp_path / ("x" * 300))
        assert hits(index, queries)
        index.delete([7])
        index.save_copy(other, overwrite=True)
    with semid.open(other) as index:
        assert 7 not in index
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.duckdb", "other.duckdb"]


def test_what_a_killed_copy_left_is_removed_by_the_next_one(index_file, tmp_path):
    gone = 2**31 - 1  # no process has this number
    kept = [".copy.duckdb.part", f".copy.duckdb.{gone}-0123456789.part", f".other.duckdb.{gone}-01234567.part"]
    left = [f".copy.duckdb.{gone}-{rest}" for rest in ("01234567.part", "01234567.part.wal", "89abcdef.part")]
    held = tmp_path / f".copy.duckdb.{gone}-aaaaaaaa.part"
    for name in [*kept, *left]:
        (tmp_path / name).write_bytes(b"half of a copy")
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"open\n"
    try:
        with semid.open(index_file) as index:
            index.save_copy(tmp_path / "copy.duckdb")
            names = {path.name for path in tmp_path.iterdir()}
            assert {"copy.duckdb", held.name, *kept} <= names, "another process writes that one; these are not ours"
            assert not names & set(left)
    finally:
        other.communicate()
    with semid.open(index_file) as index:
        index.save_copy(tmp_path / "copy.duckdb", overwrite=True)
    assert not held.exists(), "nobody writes it any more"


def test_copies_of_two_threads_to_one_place_leave_each_other_alone(index_file, tmp_path):
    """Each takes the other's file for what it is: one that is being written."""
    target, errors = tmp_path / "copy.duckdb", []

    def copy() -> None:
        try:
            with semid.open(index_file) as index:
                for _ in range(5):
                    index.save_copy(target, overwrite=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=copy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    with semid.open(target) as index:
        assert index.verify().ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.duckdb", "index.duckdb"]


def test_the_log_of_a_file_that_is_replaced_is_not_applied_to_the_new_one(index_file, tmp_path):
    old = tmp_path / "old.duckdb"
    duckdb.connect(str(old)).close()
    (tmp_path / "old.duckdb.wal").write_bytes(b"not a log at all")
    old.write_bytes(b"no database either")
    with semid.open(index_file) as index:
        index.save_copy(old, overwrite=True)
    with semid.open(old) as index:
        assert len(index) == 2_000


def test_a_copy_that_fails_leaves_nothing(index_file, tmp_path, monkeypatch, queries):
    from semid_index import store

    real = store.copy_database

    def half(execute: Any, source: str, target: str, **options: Any) -> None:
        real(execute, source, target, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "copy_database", half)
    with semid.open(index_file) as index:
        before = items(index)
        with pytest.raises(KeyboardInterrupt):
            index.save_copy(tmp_path / "copy.duckdb")
        with pytest.raises(KeyboardInterrupt):
            index.compact()
        monkeypatch.undo()
        assert items(index) == before
        index.add(queries)
        index.save_copy(tmp_path / "copy.duckdb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.duckdb", "index.duckdb"]


FULL_DISK = """
import json, resource, signal, sys
import semid_index as semid
from semid_index.errors import StorageError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, folder = sys.argv[1:]
told = []
with semid.open(path) as index:
    index.save_copy(folder + "/whole.duckdb")
    whole = __import__("os").path.getsize(folder + "/whole.duckdb")
    for share in (0.01, 0.3, 0.6, 0.8, 0.9, 0.97):
        for act in (lambda: index.save_copy(folder + "/copy.duckdb"), index.compact):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * whole), resource.RLIM_INFINITY))
            try:
                act()
                told.append("done")
            except StorageError as error:
                told.append(str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    index.delete([5])
    assert len(index) == 1999 and index.verify().ok
print(json.dumps(told))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits for files there")
def test_a_disk_that_is_full(index_file, tmp_path, run_python):
    folder = tmp_path / "copies"
    folder.mkdir()
    told = json.loads(run_python(FULL_DISK, index_file, folder))
    assert len(told) == 12
    assert all("failed" in message and "Make room" in message for message in told), told
    assert [path.name for path in folder.iterdir()] == ["whole.duckdb"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies", "index.duckdb"]
    with semid.open(index_file) as index:
        assert len(index) == 1_999


# -------------------------------------------------------------------------------------------------------------- compact


def test_after_many_cycles_the_file_is_about_as_small_as_a_fresh_one(tmp_path, vectors, queries):
    """The oracle is a dict: which items there are, and the IDs they got when they were added."""
    path, fresh = tmp_path / "worn.duckdb", tmp_path / "fresh.duckdb"
    random = np.random.default_rng(0)
    with semid.create(path, **OPTIONS) as index:
        index.train(vectors)
        index.add(vectors)
        given = ids_of(index, list(range(2_000)))
        numbers = {id: id for id in given}
        for cycle in range(CYCLES):
            gone = random.choice(sorted(given), 20, replace=False).tolist()
            assert index.delete(gone) == 20
            for id in gone:
                del given[id], numbers[id]
            rows = random.integers(2_000, size=20)
            new = list(range(10_000 + 20 * cycle, 10_020 + 20 * cycle))
            index.add(vectors[rows], new)
            given |= ids_of(index, new)
            numbers |= dict(zip(new, rows.tolist(), strict=True))
        found = hits(index, queries)
        report = index.compact()
        after = path.stat().st_size
        assert report.bytes_after == after
        assert report.bytes_before > 0
        assert hits(index, queries) == found
        assert runs(index) == 1
        assert index.verify().failed == ()
        assert ids_of(index, sorted(given)) == given
        assert len(index) == len(given) == 2_000
    with semid.create(fresh, **OPTIONS) as index:
        index.train(vectors)
        index.add(vectors[[numbers[id] for id in sorted(given)]], sorted(given))
    assert after <= 1.5 * fresh.stat().st_size, f"{CYCLES} cycles: {report}, fresh {fresh.stat().st_size}"
    with semid.open(path) as index:
        assert hits(index, queries) == found


def test_the_file_shrinks(index_file, tmp_path):
    size = index_file.stat().st_size
    with semid.open(index_file) as index:
        index._store.cursor().execute("CREATE TABLE large AS SELECT hash(range) AS h FROM range(1500000)")
    with semid.open(index_file) as index:  # behind it, so that the file cannot simply be cut off there
        index._store.cursor().execute("CREATE TABLE small AS SELECT hash(range) AS h FROM range(1000)")
    with semid.open(index_file) as index:
        index._store.cursor().execute("DROP TABLE large")
    with semid.open(index_file) as index:
        report = index.compact()
    assert report.bytes_before > 3 * size
    assert index_file.stat().st_size == report.bytes_after <= 1.5 * size


def test_an_index_in_memory_is_sorted(vectors, queries):
    with semid.create(**OPTIONS) as index:
        assert index.compact().bytes_after == 0
        index.train(vectors)
        index.add(vectors[:900], metadata={"number": range(900)})
        index.add(vectors[900:])
        index.delete(list(range(300, 500)))
        before, found = items(index), hits(index, queries)
        assert runs(index) == 2
        report = index.compact()
        assert (report.bytes_before, report.bytes_after) == (0, 0)
        assert runs(index) == 1
        assert items(index) == before
        assert hits(index, queries) == found
        assert index.verify().failed == ()


def test_what_cannot_be_compacted(index_file):
    with semid.open(index_file, read_only=True) as index, pytest.raises(ReadOnlyError, match="read_only"):
        index.compact()
    with semid.open(index_file) as index:
        pass
    with pytest.raises(IndexClosedError):
        index.compact()


@contextmanager
def refused(why: str) -> Iterator[pytest.ExceptionInfo[IndexLockedError]]:
    """It is waited for, but not as long as usual. What is to succeed has all the time it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semid_index.database._FREE_WITHIN", 0.1)
        with pytest.raises(IndexLockedError, match=why) as caught:
            yield caught


def test_what_else_has_the_file_open_is_a_reason_to_refuse(index_file, vectors):
    content = index_file.read_bytes()
    with semid.open(index_file) as index:
        relation = index.sql("SELECT count(*) FROM items")
        with refused("relation"):
            index.compact()
        assert relation.fetchall() == [(2_000,)]
        del relation
        with semid.open(index_file) as other, refused("another index"):
            index.compact()
        assert other._store.closed
        with index.engine().connect() as connection:
            connection.execute(text("SELECT 1"))
            with refused("engine"):
                index.compact()
            assert connection.execute(text("SELECT count(*) FROM items")).scalar() == 2_000
        assert len(index) == 2_000
        assert [path.name for path in index_file.parent.iterdir()] == [index_file.name]
        assert index.search(vectors[3], k=1).ids.tolist() == [3]
        index.compact()
        index.delete([3])
    with semid.open(index_file) as index:
        assert 3 not in index
    assert index_file.read_bytes() != content


def test_a_result_that_is_taken_in_parts_is_no_endless_wait(index_file):
    """DuckDB does not count such a reader among its connections, and would wait for it without end."""
    with semid.open(index_file) as index:
        reader = index.sql("SELECT a.id FROM items a, items b").to_arrow_reader(1_000)
        with refused("in parts"):
            index.compact()
        assert len(reader.read_next_batch()) > 0
        with pytest.raises(IndexClosedError):
            len(index)
    del reader
    for thread in threading.enumerate():  # what waited for it is done when this is
        if thread.name == "semid-connect":
            thread.join()
    with semid.open(index_file) as index:
        assert len(index) == 2_000
        index.compact()


def test_the_engine_and_searches_in_sql_go_on(worn_file, vectors):
    with semid.open(worn_file) as index:
        engine, wanted = index.engine(), vectors[150].tolist()
        asked = "SELECT id FROM semid_search_exact(?, k := 3)"
        with engine.connect() as connection:
            first = connection.exec_driver_sql(asked, (wanted,)).fetchall()
        found = index.sql(asked, [wanted]).fetchall()
        index.compact()
        assert index.engine() is engine
        with engine.begin() as connection:
            assert connection.exec_driver_sql(asked, (wanted,)).fetchall() == first
            connection.execute(text("CREATE TABLE mine AS SELECT 1 AS one"))
        assert index.sql(asked, [wanted]).fetchall() == found
        assert found[0] == (150,)
    with semid.open(worn_file) as index:
        assert index.sql("FROM mine").fetchall() == [(1,)]


def test_searches_go_on_in_other_threads(worn_file, queries):
    stop = threading.Event()
    wrong: list[Any] = []
    with semid.open(worn_file) as index:
        asked = [
            lambda: hits(index, queries),
            lambda: hits(index, queries, where="number > 900"),
            lambda: index.get([150])["id"].to_pylist(),
        ]
        answers, done = [ask() for ask in asked], [0] * len(asked)

        def ask_on(which: int) -> None:
            try:
                while not stop.is_set():
                    if (answer := asked[which]()) != answers[which]:
                        wrong.append(answer)
                    done[which] += 1
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=ask_on, args=(which,)) for which in range(len(asked))]
        for thread in threads:
            thread.start()
        for _ in range(4):
            before = list(done)
            index.compact()
            while not wrong and any(now - then < 2 for now, then in zip(done, before, strict=True)):
                stop.wait(0.001)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[:3]
        assert index.verify().failed == ()


def test_who_reads_what_was_there_before_the_last_write_is_waited_for(index_file, vectors):
    """For DuckDB that write goes on until then, and it makes no checkpoint."""
    began, go = threading.Event(), threading.Event()
    with semid.open(index_file) as index:

        def read() -> None:
            with index._store.reading():
                index._store.stamp()
                began.set()
                go.wait()

        reader = threading.Thread(target=read)
        reader.start()
        began.wait()
        index.upsert(vectors[:5] + 1, np.arange(5))
        threading.Timer(0.3, go.set).start()
        index.compact()
        reader.join()
        assert index.verify().ok


def test_who_reads_that_for_long_is_a_reason_to_refuse(index_file, vectors):
    with semid.open(index_file) as index, ThreadPoolExecutor(1) as pool:
        with index._store.reading():
            index._store.stamp()
            pool.submit(index.upsert, vectors[:5] + 1, np.arange(5)).result()
            with refused("a thread still reads what was there before the last write") as caught:
                pool.submit(index.compact).result()
        index.compact()  # though the error holds on to what was used
        assert caught.value.__traceback__ is not None


def test_however_long_one_look_takes_there_is_another(index_file, monkeypatch):
    """What is not referred to any more may be freed by the first one, which takes long in a large process."""
    seconds, clock = [0], time.monotonic
    monkeypatch.setattr("semid_index.database.time.monotonic", lambda: clock() + seconds[0])
    with semid.open(index_file) as index:
        held = index._store.cursor()

        def collect() -> None:
            held.close()
            seconds[0] += 60

        monkeypatch.setattr("semid_index.database.gc.collect", collect)
        index.compact()
        assert seconds == [60]


def test_vectors_that_stay_in_the_file_are_read_from_the_new_one(worn_file, queries):
    with semid.open(worn_file, vectors_in="file") as index:
        found = hits(index, queries)
        index.compact()
        assert hits(index, queries) == found


class Writes:
    """Stands before ``write_copy``, and writes to the file through another connection, so many times."""

    def __init__(self, times: int) -> None:
        self.times, self.copies = times, 0
        self._real = Store.write_copy

    def __call__(self, store: Store, part: Path, target: Path, *, compress: bool) -> None:
        self._real(store, part, target, compress=compress)
        self.copies += 1
        if self.copies <= self.times:
            store.cursor().execute(f"INSERT INTO mine VALUES ({self.copies})")


@pytest.mark.parametrize("times", [1, 2, 3])
def test_what_others_write_meanwhile_is_not_lost(index_file, monkeypatch, times):
    writes = Writes(times)
    with semid.open(index_file) as index:
        index._store.cursor().execute("CREATE TABLE mine (n INTEGER)")
        monkeypatch.setattr(Store, "write_copy", lambda *given, **options: writes(*given, **options))
        if times < 3:
            index.compact()
            assert writes.copies == times + 1
        else:
            with pytest.raises(IndexLockedError, match="again and again"):
                index.compact()
    with semid.open(index_file) as index:
        assert index.sql("FROM mine ORDER BY n").fetchall() == [(n,) for n in range(1, times + 1)]
        assert len(index) == 2_000
    assert [path.name for path in index_file.parent.iterdir()] == [index_file.name]


KILLED = """
import os, signal, sys
import semid_index as semid
from semid_index import compact, store

path, where = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if where == "half a copy":
    real = store.copy_database
    store.copy_database = lambda *given, **options: (real(*given, **options), die())
elif where == "before the exchange":
    store.Store.replace_file = die
elif where == "after the exchange":
    store.sync_folder = die
with semid.open(path) as index:
    index.delete([11])
    index.compact()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL there")
@pytest.mark.parametrize("where", ["half a copy", "before the exchange", "after the exchange"])
def test_a_process_that_is_killed_leaves_the_old_file_or_the_new_one(where, worn_file, start_python, queries):
    with semid.open(worn_file) as index:
        found = hits(index, queries)
    process = start_python(KILLED, worn_file, where)
    assert process.communicate()[1] == ""
    assert process.returncode == -9
    with semid.open(worn_file) as index:
        assert len(index) == 1_500
        assert hits(index, queries) == found
        assert (runs(index) == 1) == (where == "after the exchange")
        assert index.verify().failed == ()
        index.compact()
        assert runs(index) == 1
    assert [path.name for path in worn_file.parent.iterdir()] == [worn_file.name]


def test_older_versions_of_the_ids_stay(index_file, vectors, queries):
    with semid.open(index_file) as index:
        index.delete(list(range(0, 2_000, 3)))
        index.retrain()
        before = index.sql("SELECT * FROM semid_map ORDER BY id").fetchall()
        found = hits(index, queries)
        assert before
        index.compact()
        assert index.sql("SELECT * FROM semid_map ORDER BY id").fetchall() == before
        assert hits(index, queries) == found
        assert index.verify().failed == ()


# --------------------------------------------------------------------------------------------------------- command line


def test_the_commands(worn_file, tmp_path):
    copied = tmp_path / "copy.duckdb"
    told = CliRunner().invoke(app, ["copy", str(worn_file), str(copied), "--format", "json"])
    assert told.exit_code == 0
    assert json.loads(told.stdout) == {"file": str(copied), "items": 1_500, "bytes": copied.stat().st_size}
    again = CliRunner().invoke(app, ["copy", str(worn_file), str(copied)])
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert CliRunner().invoke(app, ["copy", str(worn_file), str(copied), "--overwrite"]).exit_code == 0
    told = CliRunner().invoke(app, ["compact", str(worn_file), "--format", "json"])
    assert told.exit_code == 0
    assert json.loads(told.stdout)["bytes_after"] == worn_file.stat().st_size
    shown = CliRunner().invoke(app, ["compact", str(worn_file), "--format", "table"])
    assert "bytes before" in " ".join(shown.stdout.split())
    assert CliRunner().invoke(app, ["compact", str(tmp_path / "none.duckdb")]).exit_code == 1
