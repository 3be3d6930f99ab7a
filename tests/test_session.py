"""Connections and what becomes of them: closed meanwhile, interrupted, in a forked child, without a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

import semid_index as semid
from semid_index.errors import IndexClosedError, StorageError

OPTIONS: dict[str, Any] = {"dim": 8, "levels": 2, "codebook_size": 4}


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((500, 8), dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path, vectors: np.ndarray) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    with semid.create(folder / "index.duckdb", **OPTIONS) as index:
        index.train(vectors)
        index.add(vectors, metadata={"number": np.arange(500)})
    return folder / "index.duckdb"


def said_by(script: str, path: Path) -> list[str]:
    """The lines that a process prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    command = [sys.executable, "-W", "ignore", "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# -- forked children --------------------------------------------------------------------------------------------------

FORK = """
import os, sys
import numpy as np
import semid_index as semid

index = semid.open(sys.argv[1])
vectors = index.get(range(3), vectors=True)["vector"].combine_chunks().flatten().to_numpy().reshape(3, -1)
index.upsert(vectors[:1], [0])  # so that DuckDB holds what is not in the file yet
index.search(vectors[0])

def attempt(name, what):
    child = os.fork()
    if child == 0:
        try:
            print(name, what(), flush=True)
        except Exception as error:
            print(name, type(error).__name__, flush=True)
        sys.exit(0)  # and not os._exit: what is destroyed then must do no harm
    assert os.waitpid(child, 0)[1] == 0, name

attempt("search", lambda: index.search(vectors[1], k=1).ids.tolist())
attempt("filter", lambda: index.search(vectors[1], k=1, where="number > 3"))
attempt("add", lambda: index.add(vectors[:1], [900]))
attempt("delete", lambda: index.delete([2]))
attempt("compact", index.compact)
attempt("close", index.close)
index.add(vectors[:2], [901, 902])
print(len(index), index.verify().ok)
index.close()
with semid.open(sys.argv[1]) as index:
    print(len(index), index.verify().ok)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_searches_what_is_in_memory_and_leaves_the_file_to_its_parent(path):
    assert said_by(FORK, path) == [
        "search [1]",
        "filter IndexLockedError",
        "add IndexLockedError",
        "delete IndexLockedError",
        "compact IndexLockedError",
        "close None",
        "502 True",
        "502 True",
    ]


# -- interrupted ------------------------------------------------------------------------------------------------------


class Failing:
    """A connection with which nothing can be done."""

    error: Exception = RuntimeError()

    def execute(self, query: str, *given: object) -> None:
        raise self.error

    def close(self) -> None:
        pass


def test_an_interrupt_is_one_also_while_duckdb_works(path, monkeypatch):
    """DuckDB says so with another error; 2.0 overlooks some interrupts, so this one is made up."""
    with semid.open(path) as index:
        monkeypatch.setattr(Failing, "error", RuntimeError("Query interrupted"))
        monkeypatch.setattr(index._store, "cursor", Failing)
        for work in (lambda: index._store._fetch("SELECT 1"), lambda: index.delete([1])):
            with pytest.raises(KeyboardInterrupt):
                work()


# -- closed, or gone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        "Connection Error: Connection already closed!",
        "Connection Error: Connection has already been closed",
        "Invalid Input Error: No open result set",
    ],
)
def test_what_duckdb_says_of_a_closed_connection(path, monkeypatch, message):
    with semid.open(path) as index:
        monkeypatch.setattr(Failing, "error", duckdb.InvalidInputException(message))
        monkeypatch.setattr(index._store, "cursor", Failing)
        with pytest.raises(IndexClosedError, match="was closed meanwhile"):
            index._store._fetch("SELECT 1")
        with pytest.raises(IndexClosedError, match="was closed meanwhile"), index._store.reading():
            pass


def test_closing_during_verify_says_nothing_of_the_file(path):
    index = semid.open(path)
    with pytest.raises(IndexClosedError) as caught:
        index.verify(progress=lambda done, total, text: index.close() if done == 3 else None)
    assert str(caught.value).count("was closed meanwhile") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="folders in use cannot be removed")
def test_a_folder_that_is_gone(path, vectors):
    with semid.open(path) as index:
        index.search(vectors[0])
        shutil.rmtree(path.parent)
        for write in (lambda: index.add(vectors[:1], [900]), lambda: index.delete([1])):
            with pytest.raises(StorageError, match="See that its folder is there"):
                write()
        assert len(index) == 500
        assert index.search(vectors[1], k=1).ids.tolist() == [1]


# -- memory -----------------------------------------------------------------------------------------------------------


class Noted:
    """A connection, and what was done with it."""

    def __init__(self, real: duckdb.DuckDBPyConnection) -> None:
        self.execute: Callable[..., Any] = self._execute
        self.real, self.limits = real, list[str]()

    def _execute(self, query: str) -> Any:
        if query.startswith("SET memory_limit"):
            self.limits.append(query)
        return self.real.execute(query)


def test_memory_is_taken_from_nobody_who_has_a_connection(path):
    """The limit is that of the whole database: a query of another thread would fail for want of memory."""
    with semid.open(path) as index:
        store = index._store
        cursor = Noted(store.cursor())
        cursor.real.execute("SET memory_limit = '1GiB'")
        before = cursor.real.execute("SELECT current_setting('memory_limit')").fetchall()
        other = store.cursor()
        store._let_go_of_blocks(cursor)
        assert cursor.limits == []
        closing = threading.Timer(0.01, other.close)  # it is done soon
        closing.start()
        closing.join()
        store._let_go_of_blocks(cursor)
        assert len(cursor.limits) == 2
        with store.reading():  # the connection of this thread is none of another
            store._let_go_of_blocks(cursor)
        assert len(cursor.limits) == 4
        with store.writing() as writer:
            writer.execute("UPDATE items SET number = 7 WHERE id = 1")
            store._let_go_of_blocks(cursor)
        assert len(cursor.limits) == 4
        assert cursor.real.execute("SELECT current_setting('memory_limit')").fetchall() == before
        cursor.real.close()
