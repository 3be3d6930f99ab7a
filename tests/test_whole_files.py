"""What a killed process has left half-written is removed by the next one; what another one is writing is not."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import semid_index as semid
from semid_index.errors import IndexLockedError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL there")

GOLDEN = Path(__file__).resolve().parent / "golden" / "v1" / "plain.duckdb.gz"
Start = Callable[..., "subprocess.Popen[str]"]

KILLED = """
import os, signal, sys
from semid_index import cli, store, vectors
from semid_index.index import SemanticIndex

die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
real = store.Store.write_ids
store.Store.write_ids = lambda *given, **options: (real(*given, **options), die())
SemanticIndex.add = die
cli.app(sys.argv[1:])
"""
# An aggregate takes its time, and the file is there from the beginning.
ENDLESS = """
import duckdb, sys
duckdb.execute(f"COPY (SELECT sum(sin(range)) FROM range(1_000_000_000_000)) TO '{sys.argv[1]}' (FORMAT parquet)")
"""


@pytest.fixture
def index_file(tmp_path: Path) -> Path:
    path = tmp_path / "index.duckdb"
    path.write_bytes(gzip.decompress(GOLDEN.read_bytes()))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "written"
    path.mkdir()
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(start_python: Start, *arguments: object) -> None:
    process = start_python(KILLED, *arguments)
    assert process.communicate()[1] == ""
    assert process.returncode == -9


def test_what_a_killed_export_left_is_removed_by_the_next_one(index_file, folder, start_python):
    target = folder / "ids.parquet"
    for _ in range(2):
        killed(start_python, "export", index_file, "-o", target)
        [left] = names_in(folder)  # that of the second kill only
        assert re.fullmatch(r"\.ids\.parquet\.\d+-[0-9a-f]{8}\.part", left)
    with semid.open(index_file) as index:
        index.export(folder / "others.parquet")
        assert left in names_in(folder), "it may be another file's"
        assert index.export(target) == len(index)
        assert pq.read_table(target)["id"].to_pylist() == pq.read_table(folder / "others.parquet")["id"].to_pylist()
    assert names_in(folder) == ["ids.parquet", "others.parquet"]


def test_what_another_machine_is_writing_stays(index_file, folder, start_python):
    """Its process has a number that no process has here; what DuckDB writes is locked."""
    target, held = folder / "ids.parquet", folder / f".ids.parquet.{2**31 - 1}-aaaaaaaa.part"
    other = start_python(ENDLESS, held)
    try:
        deadline = time.monotonic() + 60
        while not held.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with semid.open(index_file) as index:
            index.export(target)
            assert names_in(folder) == [held.name, target.name]
            other.kill()
            other.communicate()
            assert held.exists()
            index.export(target, overwrite=True)
            assert names_in(folder) == [target.name]
    finally:
        other.kill()
        other.communicate()


def test_what_another_process_is_about_to_rename_stays(index_file, folder, start_python):
    """Nothing holds a lock on it any more."""
    target, other = folder / "ids.parquet", start_python("import sys; sys.stdin.read()")
    held = folder / f".ids.parquet.{other.pid}-aaaaaaaa.part"
    held.write_bytes(b"whole")
    with semid.open(index_file) as index:
        index.export(target)
        assert names_in(folder) == [held.name, target.name]
        other.communicate()
        index.export(target, overwrite=True)
        assert names_in(folder) == [target.name]


def test_two_processes_that_write_one_file_both_do(index_file, folder, start_python):
    """Again and again; the file is always whole, and nothing is left beside it."""
    target = folder / "ids.parquet"
    code = """
import sys, semid_index as semid
with semid.open(sys.argv[1], read_only=True) as index:
    for _ in range(10):
        index.export(sys.argv[2], overwrite=True)
"""
    others = [start_python(code, index_file, target) for _ in range(2)]
    assert [other.communicate()[1] for other in others] == ["", ""]
    with semid.open(index_file) as index:
        assert sorted(pq.read_table(target)["id"].to_pylist()) == sorted(
            index.sql("SELECT id FROM items").fetchnumpy()["id"]
        )
    assert names_in(folder) == [target.name]


def test_a_build_can_be_repeated_after_it_was_killed(folder, start_python):
    vectors, target = folder / "vectors.npy", folder / "new.duckdb"
    np.save(vectors, np.random.default_rng(0).standard_normal((300, 4), dtype=np.float32))
    arguments = ["build", vectors, "-o", target, "--levels", 2, "--codebook-size", 8]
    for _ in range(2):
        killed(start_python, *arguments)
        left = [name for name in names_in(folder) if name.endswith(".part")]
        assert len(left) == 1, left  # of the second kill only
        spilled = folder / f"{left[0]}.tmp"  # where DuckDB puts what memory has no room for
        spilled.mkdir()
        (spilled / "duckdb_temp_1_0_storage_DEFAULT-0.tmp").write_bytes(b"rows")
    process = start_python("import sys\nfrom semid_index import cli\ncli.app(sys.argv[1:])", *arguments)
    assert process.communicate()[1] == ""
    assert names_in(folder) == ["new.duckdb", "vectors.npy"]
    with semid.open(target) as index:
        assert len(index) == 300


def test_a_build_does_not_replace_an_index_that_is_open_elsewhere(index_file, folder, start_python):
    vectors = folder / "vectors.npy"
    np.save(vectors, np.random.default_rng(0).standard_normal((300, 4), dtype=np.float32))
    before = index_file.read_bytes()
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    other = start_python(code, index_file)
    try:
        assert other.stdout.readline() == "open\n"
        process = start_python(
            "import sys\nfrom semid_index import cli\ncli.app(sys.argv[1:])",
            *("build", vectors, "-o", index_file, "--overwrite"),
        )
        said = process.communicate()[1]
        assert process.returncode == 1
        assert said.startswith(f"error: {index_file} is open in another process")
        with pytest.raises(IndexLockedError):
            semid.open(index_file)
    finally:
        other.communicate()
    assert index_file.read_bytes() == before
