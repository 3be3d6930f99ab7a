"""One index file that is open: connections to it, moments at which it is read, and transactions.

Reads use a connection of their own, so they may come from any thread. Writes take a lock and are one transaction each.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet, WeakValueDictionary

import duckdb

from semid_index.codes import CodeLayout
from semid_index.database import Snapshot, are_alone, close_all, errors_translated, interrupted_after, registered
from semid_index.errors import (
    RESTORE,
    ConflictError,
    CorruptIndexError,
    IndexClosedError,
    IndexLockedError,
    ReadOnlyError,
)
from semid_index.item_places import ROW_GROUP
from semid_index.records import IdType, IndexConfig
from semid_index.versions import schema_of

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("semid_index")

_ATTEMPTS = 8  # at a write that conflicts with somebody else's
_FIRST_WAIT = 0.01  # seconds before the second attempt; each further one waits twice as long
_LEAST_MEMORY = 512 << 20  # bytes that DuckDB may hold while it writes or reads vectors
_KEPT_MEMORY = 1 << 20  # bytes that it may go on holding afterwards
_MOMENT = 0.05  # seconds that reads which begin now may be kept waiting
_T = TypeVar("_T")


class _Writers:
    """What all stores of one file in this process have in common: they write one after the other, and know of it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.begun = 0
        """As ``writes``, but counted before the changes can be seen."""
        self.writes = 0


_writers: WeakValueDictionary[str, _Writers] = WeakValueDictionary()
_writers_lock = threading.Lock()


def _writers_of(path: Path | None) -> _Writers:
    """The writers of a file; those of a database in memory have it for themselves."""
    if path is None:
        return _Writers()
    name = os.path.realpath(path)
    with _writers_lock:
        writers = _writers.get(name)
        if writers is None:
            _writers[name] = writers = _Writers()
        return writers


_sessions: WeakSet[Session] = WeakSet()


def _leave_to_the_parent() -> None:
    """See that a forked child never destroys a database that it has inherited.

    It has none of DuckDB's threads, which that would wait for; and it would truncate files that the parent works with.
    """
    import ctypes

    for session in _sessions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session._connection))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


class Session:
    """One open file, or one database in memory."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: Path | None, *, read_only: bool) -> None:
        self._connection: duckdb.DuckDBPyConnection | None = connection
        self._writers = _writers_of(path)
        self._write_lock = self._writers.lock
        self._file_lock = threading.RLock()  # held while another file takes the place of this one
        self._moments = threading.local()
        self._known_columns: dict[tuple[str, str], bool] = {}
        self._known_tables: set[str] = set()
        self._old_version: int | None = None
        self._known_settings: tuple[int, dict[str, str]] | None = None
        self._process = os.getpid()
        self.path = path
        self.read_only = read_only
        _sessions.add(self)

    # -- connections and moments --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the file. Closing twice is allowed.

        What other threads are reading is waited for, for some seconds; what they begin to read is refused.
        """
        with self._file_lock:
            connection, self._connection = self._connection, None
            self._known_settings = None
            if connection is None or self._is_inherited:
                return
            if not close_all(connection):
                log.warning("%s is closed, but a thread still reads it: until it is done, the file is held", self.path)

    @property
    def _is_inherited(self) -> bool:
        """Whether this is a forked child of the process that opened the file."""
        return os.getpid() != self._process

    @property
    def closed(self) -> bool:
        """Whether the index was closed."""
        return self._connection is None

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of one's own to the same database, for one thread."""
        if self._is_inherited:
            raise IndexLockedError(
                f"{self.path or 'The index'} was opened by process {self._process}, of which this one is a fork, and "
                "DuckDB works in one of them only. Open the index in each process, after the fork; with read_only=True "
                "in all of them, if they are to read at the same time."
            )
        with self._file_lock, errors_translated(self.path):
            if self._connection is None:
                raise IndexClosedError("The index is closed. Open it again with semid_index.open(path).")
            cursor = self._connection.cursor()
            if self._old_version is not None:
                cursor.execute(f"SET search_path = '{schema_of(self._old_version)},main'")
        return cursor

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let all that this thread reads here be of one moment, whatever others write meanwhile."""
        if self._reader_of_thread() is not None:
            yield
            return
        cursor = self.cursor()
        self._moments.writes, self._moments.settings = self.writes, None
        try:
            with errors_translated(self.path):
                cursor.execute("BEGIN")
            self._moments.cursor = cursor
            yield
        finally:
            self._moments.cursor = None
            with suppress(duckdb.Error):  # whatever went wrong before ended the transaction, or the index was closed
                cursor.execute("ROLLBACK")
            cursor.close()

    def _reader_of_thread(self) -> duckdb.DuckDBPyConnection | None:
        return getattr(self._moments, "cursor", None)

    @contextmanager
    def _reader(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """What to read with: the connection of this thread's moment, or one for this read alone.

        That one is closed here. An error keeps what was used where it came from, and the file could not be replaced
        until somebody collects that as garbage.
        """
        of_thread = self._reader_of_thread()
        cursor = of_thread or self.cursor()
        try:
            yield cursor
        finally:
            if of_thread is None:
                cursor.close()

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Several reads of one moment."""
        with errors_translated(self.path), closing(self.cursor()) as cursor:
            yield Snapshot(cursor, self.path)

    # -- writing ------------------------------------------------------------------------------------------------------

    @property
    def is_old_version(self) -> bool:
        """Whether an older version of the IDs is read."""
        return self._old_version is not None

    def check_writable(self) -> None:
        """Refuse to write to an index that is open for reading only."""
        if self._old_version is not None:
            raise ReadOnlyError(
                f"This is version {self._old_version} of the IDs of {self.path}, which stays as it is. Open the file "
                "without version= to change the index."
            )
        if self.read_only:
            raise ReadOnlyError(f"{self.path} is open for reading only. Open it without read_only=True to change it.")

    def retried(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns. It is done again if somebody else in this process wrote the same rows meanwhile.

        Stores of one file wait for each other; what conflicts is written through other connections, such as those of
        an engine. Raises :class:`ConflictError` after some attempts.
        """
        for attempt in range(_ATTEMPTS - 1):
            try:
                return work()
            except ConflictError:
                time.sleep(_FIRST_WAIT * 2**attempt)
        return work()

    @contextmanager
    def writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction: all of what is executed inside is kept, or nothing."""
        self.check_writable()
        with self._write_lock, errors_translated(self.path):
            cursor = self.cursor()
            cursor.execute("BEGIN")
            self._moments.is_writing = True
            try:
                yield cursor
                self._writers.begun += 1
                cursor.execute("COMMIT")
            except BaseException:
                with suppress(duckdb.Error):  # COMMIT may have ended the transaction already
                    cursor.execute("ROLLBACK")
                raise
            finally:
                self._moments.is_writing = False
                self._writers.writes += 1
                self._writers.begun = self._writers.writes
                cursor.close()

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """No one writes through this store meanwhile."""
        with self._write_lock:
            yield

    @contextmanager
    def _settings(self, **settings: str) -> Iterator[duckdb.DuckDBPyConnection]:
        """Work under other settings of DuckDB, and for a file under a memory limit that goes by the size of a row.

        Settings hold for the whole database, so only one thread at a time may change them. Gives what it does so with.
        """
        if self.path is not None:
            settings["memory_limit"] = f"{max(_LEAST_MEMORY, 16 * ROW_GROUP * self.config.dim) >> 20}MiB"
        with self._write_lock, closing(self.cursor()) as cursor:
            before: dict[str, str] = {}
            if settings:
                current = ", ".join(f"current_setting('{name}')" for name in settings)
                before = dict(zip(settings, cursor.execute(f"SELECT {current}").fetchall()[0], strict=True))
            try:
                for name, value in settings.items():
                    cursor.execute(f"SET {name} = '{value}'")
                yield cursor
            finally:
                with suppress(duckdb.Error):  # nothing that went wrong before may hide behind this
                    for name, value in before.items():
                        cursor.execute(f"SET {name} = '{value}'")

    @contextmanager
    def _reading_settings(self) -> Iterator[None]:
        """The memory limit of :meth:`_settings`, unless somebody writes: then theirs holds, and nobody waits."""
        if not self._write_lock.acquire(blocking=False):
            yield
            return
        try:
            with self._settings() as cursor:
                try:
                    yield
                finally:
                    self._let_go_of_blocks(cursor)
        finally:
            self._write_lock.release()

    def _let_go_of_blocks(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """Have DuckDB give back most of the file's blocks that it holds, which nobody is going to read soon.

        Otherwise all stored vectors would be in memory twice. For that moment there is no memory for any query, so it
        is done when nobody else has a connection, and nobody gets one meanwhile; if there is no such moment soon, then
        not now. A thread that writes needs memory itself.
        """
        if self.path is None or getattr(self._moments, "is_writing", False):
            return
        own = 2 if self._reader_of_thread() is None else 3  # the first one, the one given here, and the thread's
        with self._file_lock:
            if self._connection is None or not are_alone(cursor, own, within=_MOMENT):
                return
            before = cursor.execute("SELECT current_setting('memory_limit')").fetchall()[0][0]
            with suppress(duckdb.Error):  # it may hold what it cannot give back
                cursor.execute(f"SET memory_limit = '{_KEPT_MEMORY >> 20}MiB'")
            cursor.execute(f"SET memory_limit = '{before}'")

    # -- settings -----------------------------------------------------------------------------------------------------

    def meta(self, key: str) -> Any:
        """One setting; None if it was never written."""
        written = self._all_settings().get(key)
        try:
            return None if written is None else json.loads(written)
        except ValueError as error:
            raise CorruptIndexError(f"{self.path} is damaged: its setting '{key}' is no JSON. {RESTORE}") from error

    def _all_settings(self) -> dict[str, str]:
        """Every setting as it is written, read once for each moment and once after each write.

        A small ``add`` asks for 13 of them, and each read would cost as much as a search.
        """
        query = "SELECT key, value FROM semid_meta"
        if self._reader_of_thread() is not None:  # what others wrote since is none of this moment's
            if self._moments.settings is None:
                self._moments.settings = dict(self._fetch(query))
            return self._moments.settings  # type: ignore[no-any-return]
        writes, known = self.writes, self._known_settings
        if known is not None and known[0] == writes == self.writes_begun and not self.closed:
            return known[1]
        found = dict(self._fetch(query))
        if self.writes_begun == writes:  # else it may be of before the write that is ending, or of after it
            self._known_settings = (writes, found)
        return found

    @property
    def config(self) -> IndexConfig:
        """What the index is."""
        try:
            return IndexConfig(**self.meta("config"))
        except TypeError as error:  # missing, or with other fields
            raise CorruptIndexError(f"{self.path} is damaged: it does not say what it is. {RESTORE}") from error

    @property
    def layout(self) -> CodeLayout:
        """How codes are packed; only once trained."""
        return CodeLayout(tuple(self.meta("codebook_sizes")))

    @property
    def hierarchical(self) -> bool:
        """Whether a prefix of the codes means something."""
        return bool(self.meta("hierarchical"))

    @property
    def is_trained(self) -> bool:
        """Whether codebooks were learned."""
        return self.meta("codebook_sizes") is not None

    @property
    def id_type(self) -> IdType | None:
        """The type of the ids, fixed by the first add; None before."""
        id_type: IdType | None = self.meta("id_type")
        return id_type

    @property
    def next_row(self) -> int:
        """The number that the next new item gets."""
        return int(self.meta("next_row"))

    @property
    def writes(self) -> int:
        """How many transactions have ended, counted after each: those of all stores of this file in this process."""
        return self._writers.writes

    @property
    def writes_begun(self) -> int:
        """The same, counted before any of a transaction can be seen: equal to :attr:`writes` unless one is ending."""
        return self._writers.begun

    @property
    def version(self) -> int:
        """The version of the IDs; each training makes a new one."""
        return int(self.meta("version") or 1)

    # -- queries ------------------------------------------------------------------------------------------------------

    def arrow(self, query: str, *, params: Any = None, timeout: float | None = None, **given: pa.Table) -> pa.Table:
        """The result of a query; further keyword arguments are Arrow tables that it may name.

        After ``timeout`` seconds :class:`duckdb.InterruptException` is raised.
        """
        with (
            errors_translated(self.path),
            self._reader() as cursor,
            registered(cursor, **given),
            interrupted_after(timeout, cursor),
        ):
            return cursor.sql(query, params=params or None).to_arrow_table()

    def _fetch(self, query: str, params: list[Any] | None = None) -> list[tuple[Any, ...]]:
        with errors_translated(self.path), self._reader() as cursor:
            return cursor.execute(query, params or []).fetchall()

    def _has_table(self, name: str) -> bool:
        """Whether the index has a table. One that it has it keeps.

        Not looked up in the list of all tables: before DuckDB gives that for the first time, it makes all its own
        views, which takes as long as opening the file.
        """
        if name not in self._known_tables:
            with errors_translated(self.path), closing(self.cursor()) as cursor:
                try:
                    cursor.execute(f"SELECT 1 FROM {name} LIMIT 0").fetchall()
                except duckdb.CatalogException:
                    return False
            self._known_tables.add(name)
        return True

    def _has_column(self, table: str, name: str) -> bool:
        """Whether a table has a column. Files of older formats lack some, where they are only read."""
        if (table, name) not in self._known_columns:
            self._known_columns[table, name] = any(column == name for column, *_ in self._fetch(f"DESCRIBE {table}"))
        return self._known_columns[table, name]
