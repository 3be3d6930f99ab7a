"""What the children of the zygote do. Every job takes ``say``, which passes words on to the test."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import semid_index as semid
from semid_index.errors import CorruptIndexError, SemidError
from semid_index.index import SemanticIndex
from semid_index.store import Store

Say = Callable[..., None]
DIM = 8
SHAPE: dict[str, Any] = {"dim": DIM, "levels": 3, "codebook_size": 8}


def points(rows: int, *, seed: int = 0) -> np.ndarray:
    """Vectors around a few centres: (rows, 8)."""
    random = np.random.default_rng(seed)
    centres = 5 * np.random.default_rng(7).standard_normal((20, DIM))
    return (centres[random.integers(20, size=rows)] + random.standard_normal((rows, DIM))).astype(np.float32)


# -- what an index holds ----------------------------------------------------------------------------------------------

# what differs from one run to the next: how long something took, and when it was
_CHANGING = re.compile(r'"seconds": [-0-9.e]+|\d{4}-\d\d-\d\dT[\d:.+]+')

_FEW_ROWS = 100


def content(index: SemanticIndex) -> dict[str, str]:
    """All that an index holds and finds: a digest of each table, view and macro, and of the hits of some queries."""
    ask = index._store._fetch  # DuckDB's errors come out of it as ours
    tables = ask("SELECT schema_name || '.' || table_name FROM duckdb_tables() WHERE NOT internal AND NOT temporary")
    found = {}
    for (table,) in sorted(tables):
        columns = ask(f"DESCRIBE {table}")
        kept = ", ".join(f'"{name}"' for name, kind, *_ in columns if not kind.startswith(("TIMESTAMP", "DATE")))
        ((count, sum_of_hashes),) = ask(f"SELECT count(*), sum(hash({kept})::HUGEINT)::VARCHAR FROM {table}")
        if count < _FEW_ROWS:  # the tables with times in their texts are among these
            rows = sorted(_CHANGING.sub("", repr(row)) for row in ask(f"SELECT {kept} FROM {table}"))
            sum_of_hashes = _digest(rows)
        found[f"table {table}"] = f"{count} rows {sum_of_hashes}"
    views = "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal ORDER BY ALL"
    macros = "SELECT function_name, macro_definition FROM duckdb_functions() WHERE NOT internal ORDER BY ALL"
    found["views"], found["macros"] = (_digest(ask(query)) for query in (views, macros))
    found["problems"] = "; ".join(contradictions(index))
    if index.stats()["trained"]:
        queries = points(5, seed=99)
        hits = [index.search(queries, 5), index.search(queries, 5, exact=True)]
        if "number" in index._store.item_columns():
            hits.append(index.search(queries, 5, where="number % 2 = 0"))
        found["hits"] = _digest([(hit.flat_ids.tolist(), hit.flat_distances.round(4).tolist()) for hit in hits])
    return found


def contradictions(index: SemanticIndex) -> list[str]:
    """What in an index cannot be, by plain SQL and by its own ``verify``."""
    found = []
    ask = index._store._fetch
    if index.stats()["trained"]:
        numbers = {
            "codes without items": "SELECT count(*) FROM semid_codes ANTI JOIN items USING (id)",
            "items without codes": "SELECT count(*) FROM items ANTI JOIN semid_codes USING (id)",
            "items twice": "SELECT count(*) - count(DISTINCT id) FROM items",
            "ids twice": "SELECT count(*) - count(DISTINCT id) FROM semid_codes",
            "rows twice": "SELECT count(*) - count(DISTINCT row) FROM semid_codes",
            "IDs twice": "SELECT count(*) - count(DISTINCT (semantic_id, dup_rank)) FROM semantic_ids",
            "codes without vectors": "SELECT count(*) FROM semid_codes ANTI JOIN semid_vectors USING (row)",
            "vectors without codes": "SELECT count(*) FROM semid_vectors ANTI JOIN semid_codes USING (row)",
            "vectors twice": "SELECT count(*) - count(DISTINCT row) FROM semid_vectors",
            "rows not given out yet": f"SELECT count(*) FROM semid_codes WHERE row >= {index._store.next_row}",
            "items in no bucket": "SELECT count(*) FROM semid_codes ANTI JOIN semid_buckets USING (bucket)",
        }
        tables = [row[0] for row in ask("SELECT table_name FROM duckdb_tables() WHERE NOT internal")]
        for what, query in numbers.items():
            if not {word for word in query.split() if word.startswith("semid_")} <= {*tables, "semantic_ids"}:
                continue  # a file of an older format, or of codes without buckets
            ((count,),) = ask(query)
            if count:
                found.append(f"{count} {what}")
    report = index.verify() if hasattr(index, "verify") else None
    if report is not None and not report.ok:
        found += [f"verify: {check.name}: {check.found}" for check in report.checks if check.status == "failed"]
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=repr).encode()).hexdigest()[:16]


def look(say: Say, path: str, read_only: bool = False) -> None:
    """Open an index, and say what it holds."""
    with semid.open(path, read_only=read_only) as index:
        say("content", content(index))


def use(say: Say, path: str) -> None:
    """Add to an index (training it first, if need be), and find what was added."""
    with semid.open(path) as index:
        if not index.stats()["trained"]:
            index.train(points(400))
        new = points(3, seed=70)
        ids = index.add(new) if index._store.id_type != "str" else index.add(new, ["x", "y", "z"])
        assert index.search(new[1], 1, exact=True).ids.tolist() == [ids[1]]


def start_anew(say: Say, path: str) -> None:
    """Make a new index in the place of what a killed process left."""
    semid.create(path, overwrite=True, **SHAPE).close()
    look(say, path)


# -- the life of an index, step by step -------------------------------------------------------------------------------


class Life:
    """One index and what is done to it; every step is to be done fully or not at all."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.index: SemanticIndex | None = None

    def create(self) -> None:
        self.index = semid.create(self.path, **SHAPE)

    def open(self) -> None:
        self.index = semid.open(self.path)

    def close(self) -> None:
        self.opened.close()
        self.index = None

    def train(self) -> None:
        self.opened.train(points(400))

    def add(self) -> None:
        """The first items, with metadata."""
        vectors = points(300, seed=1)
        self.opened.add(vectors, metadata={"number": range(300), "word": [f"word {i}" for i in range(300)]})

    def append(self) -> None:
        """More of them, in batches, with a new column."""
        metadata = {"number": range(300, 400), "price": np.arange(100) / 4}
        self.opened.add(points(100, seed=2), metadata=metadata, batch_size=30)

    def append_more(self) -> None:
        """A few, after others are gone."""
        self.opened.add(points(60, seed=8), metadata={"number": range(400, 460)})

    def append_many(self) -> None:
        """So many that DuckDB writes some before the end of the transaction."""
        rows = 130_000
        self.opened.add(points(rows, seed=3), metadata={"number": np.arange(rows)}, batch_size=50_000)

    def upsert(self) -> None:
        """New vectors for some items, and a few new items."""
        ids = np.arange(250, 330)
        self.opened.upsert(points(80, seed=4), ids, metadata={"number": ids + 1})

    def delete(self) -> None:
        self.opened.delete(np.arange(0, 100, 3))

    def delete_where(self) -> None:
        self.opened.delete(where="number % 7 = 1")

    def compact(self) -> None:
        self.opened.compact()

    def retrain(self) -> None:
        self.opened.retrain(compare=False)

    def save_copy(self) -> None:
        self.opened.save_copy(Path(self.path).with_name("copy.duckdb"), overwrite=True)

    def export(self) -> None:
        self.opened.export(Path(self.path).with_name("ids.parquet"), overwrite=True)

    def search(self) -> None:
        self.opened.search(points(5, seed=5))

    @property
    def opened(self) -> SemanticIndex:
        """The index, if it is open."""
        assert self.index is not None
        return self.index


def has_steps(say: Say) -> None:
    """Say which steps there are, of those that an index can do."""
    needed = {"upsert": "upsert", "delete": "delete", "delete_where": "delete", "compact": "compact"}
    needed |= {"retrain": "retrain", "save_copy": "save_copy"}
    names = [name for name in vars(Life) if not name.startswith("_") and name != "opened"]
    say("steps", [name for name in names if hasattr(SemanticIndex, needed.get(name, "close"))])


def live(say: Say, path: str, steps: list[str], at: int | None = None) -> None:
    """Do the steps, and say of each that it is done. With ``at``, the process kills itself before that statement."""
    life = Life(path)
    statements = Statements(at)
    statements.watch()
    say("started")
    for step in steps:
        getattr(life, step)()
        say("done", step)
        if life.index is not None and "add" in steps[: steps.index(step) + 1]:
            life.index.search(points(1, seed=6))
    say("statements", statements.count)


def live_and_look(say: Say, path: str, steps: list[str]) -> None:
    """Do the steps, and say what the index holds before the first, and after each of them."""
    say("content", None if not Path(path).exists() else _content_of_file(path))
    life = Life(path)
    for step in steps:
        getattr(life, step)()
        say("content", _content_of_file(path))


def _content_of_file(path: str) -> dict[str, str]:
    """What a copy of the file holds, with the log beside it: what a process would find if this one were killed now."""
    copy = f"{path}.copy"
    for part in ("", ".wal"):
        Path(copy + part).unlink(missing_ok=True)
        if Path(path + part).exists():
            shutil.copy(path + part, copy + part)
    with semid.open(copy) as index:
        return content(index)


class Statements:
    """Counts the SQL statements and the changes to files of this process, and ends it at one of them."""

    def __init__(self, at: int | None) -> None:
        self.count, self._at = 0, at

    def watch(self) -> None:
        """From now on."""
        cursor = Store.cursor
        Store.cursor = lambda store: Watched(cursor(store), self)  # type: ignore[method-assign]
        for name in ("replace", "rename", "unlink", "remove", "fsync"):
            setattr(os, name, self.around(getattr(os, name)))

    def around(self, do: Callable[..., Any]) -> Callable[..., Any]:
        """The same, counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number == self._at:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*arguments, **options)

        return counted


class Watched:
    """A cursor whose statements are counted."""

    def __init__(self, cursor: Any, statements: Statements) -> None:
        self._cursor, self._statements = cursor, statements

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cursor, name)
        return self._statements.around(value) if name in ("execute", "sql") else value


# -- no room ----------------------------------------------------------------------------------------------------------


def without_room(say: Say, path: str, step: str, most: int | None = None, filler: str | None = None) -> None:
    """Do a step where files may not grow beyond ``most`` bytes (or the disk is full), and again with enough room.

    Says "outcome": the error, or "done"; "content" after it; "again": the same, with room.
    """
    life = Life(path)
    if step not in ("open", "create"):
        life.open()
        if step != "train":
            life.search()  # reads what a search needs
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited[1]))
    say("outcome", outcome := _attempt(life, step))
    if life.index is not None:
        say("content", content(life.index))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    if filler is not None:
        Path(filler).unlink()
    say("again", _attempt(life, step) if outcome != "done" else "done")
    if life.index is not None:
        life.close()


def look_at_copy(say: Say, path: str) -> None:
    """Say what a copy of an index holds, when it is opened."""
    with tempfile.TemporaryDirectory() as folder:
        look(say, shutil.copy(path, f"{folder}/copy.duckdb"))


def delete_while_open(say: Say, path: str) -> None:
    """Take the file away from an index that is open, and go on."""
    life = Life(path)
    life.open()
    Path(path).unlink()
    say("searched", len(life.opened.search(points(5, seed=5))))
    say("added", _attempt(life, "append"))
    life.close()
    for left in Path(path).parent.glob("index.duckdb*"):
        say("left", left.name)
    say("reopened", _attempt(life, "open"))


def _attempt(life: Life, step: str) -> str:
    """The error of a step; "done" if there is none."""
    try:
        getattr(life, step)()
    except SemidError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


# -- damaged files ----------------------------------------------------------------------------------------------------


def read_all(say: Say, path: str, read_only: bool) -> None:
    """Read everything in a file that may be damaged; say what is found, or the error of ours that was raised."""
    try:
        with semid.open(path, read_only=read_only) as index:
            say("content", content(index))
    except SemidError as error:
        say("refused", type(error).__name__, str(error), isinstance(error, CorruptIndexError))


def make_wide(say: Say, path: str, rows: int, dim: int) -> None:
    """An index whose vectors fill many blocks of the file."""
    vectors = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    with semid.create(path, dim=dim, levels=3, codebook_size=32) as index:
        index.train(vectors)
        index.add(vectors)


def search_and_verify(say: Say, path: str) -> None:
    """Say what searches find, and what ``verify`` finds wrong."""
    try:
        with semid.open(path, read_only=True) as index:
            queries = np.random.default_rng(1).standard_normal((200, index.config.dim), dtype=np.float32)
            say("hits", index.search(queries, 5, exact=True).flat_ids.tolist())
            say("failed", index.verify().failed)
    except SemidError as error:
        say("refused", type(error).__name__, str(error))


# -- memory and time --------------------------------------------------------------------------------------------------


def add_from_generator(say: Say, path: str, rows: int) -> None:
    """Add so many rows that come from a generator, and were never in memory together."""

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, rows, 100_000):
            yield points(min(100_000, rows - start), seed=start)

    with semid.create(path, dim=DIM, levels=3, codebook_size=32, vectors="none") as index:
        index.train(points(20_000))
        with _peak(say):
            index.add(batches())
        say("items", len(index))


def search_much(say: Say, path: str, items: int, queries: int, k: int, options: dict[str, Any]) -> None:
    """Many hits for a few queries, or a few hits for many."""
    with semid.create(path, dim=DIM, levels=3, codebook_size=32) as index:
        index.train(points(20_000))
        index.add(points(items, seed=1))
        index.search(points(1), 1)
        asked = points(queries, seed=2)
        with _peak(say):
            hits = index.search(asked, k, **options)
        say("hits", len(hits.flat_ids))
        first = hits.distances[0]
        say("in order", bool((np.diff(first) >= 0).all()))


def search_with_timeout(say: Say, path: str, items: int, dim: int, timeout: float, cases: dict[str, Any]) -> None:
    """Searches that take far longer than they may: how long until each is ended, and what one takes without an end."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((items, dim), dtype=np.float32)
    with semid.create(path, dim=dim, levels=2, codebook_size=32) as index:
        index.train(vectors[:20_000])
        index.add(vectors, metadata={"number": np.arange(items), "word": [f"word {i}" for i in range(items)]})
        index.search(vectors[0], 1, where="number > 3")
        for name, case in cases.items():
            queries = np.resize(vectors, (case.pop("queries"), dim))
            started = time.perf_counter()
            try:
                index.search(queries, **case, timeout=timeout)
                error = "none"
            except SemidError as raised:
                error = type(raised).__name__
            say("ended", name, error, time.perf_counter() - started)
        say("afterwards", index.search(vectors[7], 1).ids.tolist())


@contextmanager
def _peak(say: Say) -> Iterator[None]:
    """Say by how many bytes the memory of this process grew at most, meanwhile."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = _status("VmRSS"), time.perf_counter()
    yield
    say("peak", _status("VmHWM") - before)
    say("seconds", time.perf_counter() - started)


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1_024
