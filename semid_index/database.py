"""Connections to DuckDB and their files: opening, waiting, time limits, and DuckDB's errors as ours."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from semid_index.arrow import batches
from semid_index.errors import (
    RESTORE,
    ConflictError,
    CorruptIndexError,
    DuplicateIdError,
    IndexClosedError,
    IndexExistsError,
    IndexFileError,
    IndexLockedError,
    IndexNotFoundError,
    NewerFormatError,
    NotAnIndexError,
    ReadOnlyError,
    SemidError,
    StorageError,
    is_interrupt,
)

if TYPE_CHECKING:
    import pyarrow as pa

_DUCKDB_MAGIC = b"DUCK"  # at byte 8 of every DuckDB file
_numbers = count(1)
_one_look = threading.Lock()  # two threads that look at a file would each find that it is open
# DuckDB's errors about values and expressions, as against those about the file or the machine
USER_ERRORS = (duckdb.DataError, duckdb.NotSupportedError, duckdb.ProgrammingError)
CONNECT_CONFIG = {
    "storage_compatibility_version": "v1.2.0",  # DuckDB 1.5 and 2.x both read such files
    "autoinstall_known_extensions": "false",  # an index needs none, and must not reach for the network
}
_FREE_WITHIN = 5.0  # seconds that whoever reads the file may take to finish before it is closed or replaced
_BUSY: Any = getattr(duckdb, "ResourceInUseException", ())  # DuckDB 1.5 has no such error, and closes in any case
_INTERRUPT_EVERY = 0.05  # seconds between two attempts to stop a statement that ran out of time


class Snapshot:
    """Reads that all see one moment, whatever is written meanwhile."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, path: Path | None) -> None:
        self._cursor, self._path = cursor, path
        cursor.execute("BEGIN")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a result."""
        with self._alive():
            return self._cursor.execute(query).fetchall()

    def arrow(self, query: str, **given: pa.Table) -> pa.Table:
        """A result as an Arrow table; further arguments are Arrow tables that the query may name."""
        with self._alive(), registered(self._cursor, **given):
            return self._cursor.sql(query).to_arrow_table()

    def batches(self, query: str, rows: int) -> Iterator[pa.RecordBatch]:
        """A result in Arrow batches of so many rows or fewer."""
        with self._alive():
            yield from batches(self._cursor.sql(query), rows)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """After an error DuckDB takes nothing more in a transaction: the reads that follow get a new one."""
        try:
            with errors_translated(self._path):
                yield
        except (duckdb.Error, SemidError):
            with suppress(duckdb.Error):
                self._cursor.execute("ROLLBACK")
            with suppress(duckdb.Error):
                self._cursor.execute("BEGIN")
            raise


def unique_name(stem: str) -> str:
    """A name in SQL that no other connection of the process uses."""
    return f"{stem}_{next(_numbers)}"


def run_over(cursor: duckdb.DuckDBPyConnection, batch: pa.Table, query: str) -> list[tuple[Any, ...]]:
    """Run a query that reads the Arrow table under the name ``batch``."""
    with registered(cursor, batch=batch):
        return cursor.execute(query).fetchall()


def read_over(cursor: duckdb.DuckDBPyConnection, batch: pa.Table, query: str) -> pa.Table:
    """The result of a query that reads the Arrow table under the name ``batch``."""
    with registered(cursor, batch=batch):
        return cursor.sql(query).to_arrow_table()


@contextmanager
def registered(cursor: duckdb.DuckDBPyConnection, **given: pa.Table) -> Iterator[None]:
    """Let queries of this cursor read Arrow tables under their names."""
    for name, table in given.items():
        cursor.register(name, table)
    try:
        yield
    finally:
        with suppress(duckdb.Error):  # a query failed, and its own error is the one to see
            for name in given:
                cursor.unregister(name)


@contextmanager
def interrupted_after(seconds: float | None, cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Stop what a cursor runs after so many seconds. A thread watches, for DuckDB itself has no time limit."""
    if seconds is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        wait = min(seconds, threading.TIMEOUT_MAX)
        while not done.wait(wait):
            cursor.interrupt()
            wait = _INTERRUPT_EVERY  # DuckDB forgets an interrupt that comes between two statements

    watcher = threading.Thread(target=watch, name="semid-time-limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def connect(path: Path | None, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    """A connection to a file, or without one to a new database in memory."""
    with errors_translated(path):
        return duckdb.connect(
            ":memory:" if path is None else str(path), read_only=read_only, config=dict(CONNECT_CONFIG)
        )


def check_is_database(path: Path) -> None:
    """Refuse a path where there is no DuckDB file."""
    if not path.exists():
        raise IndexNotFoundError(
            f"There is no file {path}. Make an index with semid_index.create(path, dim=...) or semid build."
        )
    if path.is_dir():
        raise NotAnIndexError(f"{path} is a folder. Give the path of the index's file.")
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise IndexFileError(f"{path} cannot be read: {error.strerror}. Change its permissions.") from error
    if head[8:12] != _DUCKDB_MAGIC:
        raise NotAnIndexError(
            f"{path} is not an index of semid-index: it is no DuckDB file. Make an index with semid_index.create or "
            "semid build."
        )


def make_room(path: Path, *, overwrite: bool) -> None:
    """Remove what is in the way of a new index, if that may be overwritten; refuse otherwise."""
    if path.exists():
        if not overwrite:
            raise IndexExistsError(
                f"{path} exists. Open it with semid_index.open, or pass overwrite=True to replace it."
            )
        if path.is_dir():
            raise IndexExistsError(f"{path} is a folder, which is not overwritten. Give the path of a file.")
        check_not_in_use(path)
        remove_database(path)
    if not path.parent.is_dir():
        raise IndexFileError(f"There is no folder {path.parent}. Create it first.")


def check_not_in_use(path: Path) -> None:
    """Refuse to overwrite an index that is open: whoever has it open would go on writing into a deleted file."""
    with _one_look:
        for read_only in (True, False):  # DuckDB refuses another connection of this process if its mode differs
            try:
                connect(path, read_only=read_only).close()
            except IndexLockedError:
                raise
            except (IndexFileError, duckdb.Error):
                continue  # damaged, or no database: it is to be overwritten


def remove_database(path: Path) -> None:
    """Remove a DuckDB file and its log, if they are there."""
    try:
        for part in (path, log_of(path)):
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ReadOnlyError(
            f"{path} cannot be removed: {error.strerror}. Change the permissions of its folder, or use another path."
        ) from error


def log_of(path: Path) -> Path:
    """The path of a file's write-ahead log."""
    return path.with_name(path.name + ".wal")


def remove_log(path: Path) -> None:
    """Remove the write-ahead log of a file that is replaced: DuckDB would apply it to the new one."""
    log_of(path).unlink(missing_ok=True)


class _OthersAreConnectedError(Exception):
    pass


def _patiently(attempt: Callable[[], object], refusal: Any, within: float | None = None) -> Exception | None:
    """Attempt something for some seconds, while it is refused: the last refusal, or None once it is done.

    There is always one more attempt after that time, however long one takes.
    """
    until = time.monotonic() + (_FREE_WITHIN if within is None else within)
    while True:
        last = time.monotonic() > until
        try:
            attempt()
        except refusal as refused:
            if last:
                return refused  # type: ignore[no-any-return]
            time.sleep(0.001)
        else:
            return None


def close_all(connection: duckdb.DuckDBPyConnection) -> bool:
    """Close a connection and those made from it; other threads have some seconds to finish what they do with them.

    False if some take longer. Then theirs are closed when they are done.
    """
    return _patiently(connection.close, _BUSY) is None


def checkpoint_soon(connection: duckdb.DuckDBPyConnection, path: Path | None) -> None:
    """Bring all that was written into the file; waits some seconds for those who keep DuckDB from it.

    These are not only writers. While somebody reads a moment from before the last write, DuckDB keeps what it needs of
    that write, and takes it for one that goes on.
    """
    refused = _patiently(lambda: connection.execute("CHECKPOINT"), duckdb.TransactionException)
    if refused is not None:
        raise IndexLockedError(
            f"{path} is in use elsewhere in this process, and so cannot be brought up to date: another index or a "
            "connection of engine() writes to it, or a thread still reads what was there before the last write. Try "
            f"again when that is done. ({first_line(refused)})"
        ) from refused


def are_alone(connection: duckdb.DuckDBPyConnection, own: int, *, within: float) -> bool:
    """Whether, within some seconds, a database comes to have no more than so many connections."""
    return _patiently(lambda: _check_alone(connection, own), _OthersAreConnectedError, within) is None


def _check_alone(connection: duckdb.DuckDBPyConnection, own: int) -> None:
    if connection.execute("SELECT count FROM duckdb_connection_count()").fetchall()[0][0] > own:
        raise _OthersAreConnectedError


def wait_until_alone(connection: duckdb.DuckDBPyConnection, path: Path, release: Callable[[], None]) -> None:
    """Give others in this process some seconds to finish what they do with a file; refuse if they do not."""

    def attempt() -> None:
        release()
        try:
            _check_alone(connection, 1)
        except _OthersAreConnectedError:
            gc.collect()  # relations that were let go of, but are still around
            raise

    if _patiently(attempt, _OthersAreConnectedError) is not None:
        raise IndexLockedError(
            f"{path} is in use elsewhere in this process, and so cannot be replaced: by another index that is "
            "open on it, a connection of engine(), or a relation that sql() gave. Close them, and try again."
        )


def _close_late(made: Future[duckdb.DuckDBPyConnection]) -> None:
    if made.exception() is None:
        made.result().close()


def connect_soon(path: Path) -> duckdb.DuckDBPyConnection:
    """Connect to a file that was closed just now, for reading only.

    DuckDB waits, without end, for whoever still reads a result of before in small parts. So this is done by a thread.
    """
    made: Future[duckdb.DuckDBPyConnection] = Future()

    def attempt() -> None:
        try:
            made.set_result(connect(path, read_only=True))
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=attempt, name="semid-connect", daemon=True).start()
    try:
        return made.result(_FREE_WITHIN)
    except TimeoutError as error:
        made.add_done_callback(_close_late)
        raise IndexLockedError(
            f"{path} is still read from in this process, by something that takes a result of sql() in parts. The index "
            "is closed now, and nothing is lost. Finish or drop that reader, and open the index again."
        ) from error


def sync_file(path: Path) -> None:
    """Have the disk hold what was written to a file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the disk hold the names in the folder of a file, where the system can."""
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def first_line(error: BaseException) -> str:
    """What an error says, without DuckDB's excerpts and hints."""
    return str(error).strip().splitlines()[0]


_CLOSED = "{path} was closed meanwhile by another thread. Open it again with semid_index.open(path)."
# What DuckDB's message contains -> the error to raise, and what to say about the path. The first that fits is taken.
_TRANSLATIONS: tuple[tuple[str, type[SemidError], str], ...] = (
    (
        "lock on file",
        IndexLockedError,
        "{path} is open in another process{holder}. Close it there; or open it with read_only=True in every process, "
        "as semid search does.",
    ),
    (
        "different configuration",
        IndexLockedError,
        "{path} is open in this process already, in another mode. Close it there; or use the same read_only for both.",
    ),
    ("version number", NewerFormatError, "{path} was written by a later DuckDB. Run: pip install --upgrade duckdb"),
    ("Corrupt database", CorruptIndexError, "{path} is damaged. " + RESTORE),
    (
        "Could not read enough bytes",
        CorruptIndexError,
        "{path} is damaged: it ends too early. " + RESTORE,
    ),
    ("Serialization Error", CorruptIndexError, "{path} is damaged. " + RESTORE),
    ("Data Corruption Error", CorruptIndexError, "{path} is damaged. " + RESTORE),
    ("Metadata block", CorruptIndexError, "{path} is damaged. " + RESTORE),
    ("Corrupted ", CorruptIndexError, "{path} is damaged. " + RESTORE),  # blocks that are whole, but in wrong places
    ("Catalog Error", CorruptIndexError, "{path} is damaged: a table is missing. " + RESTORE),
    (
        "Permission denied",
        ReadOnlyError,
        "{path} cannot be written. Open it with read_only=True, or change the permissions of the file and its folder.",
    ),
    ("Read-only file system", ReadOnlyError, "{path} cannot be written. Open it with read_only=True, or copy it."),
    ("No space left", StorageError, "Writing {path} failed, and the index is as it was before. Make room on the disk."),
    (
        "File too large",
        StorageError,
        "Writing {path} failed, and the index is as it was before. Make room on the disk.",
    ),
    ("Connection already closed", IndexClosedError, _CLOSED),
    ("Connection has already been closed", IndexClosedError, _CLOSED),
    ("No open result set", IndexClosedError, _CLOSED),  # it was read when the connection was closed
    ("bad_weak_ptr", IndexClosedError, _CLOSED),  # DuckDB 1.5, where it was in the middle of a query
    ("IO Error", IndexFileError, "{path} cannot be used."),
    (
        "Failed to commit: Cannot open file",  # the log, in a folder that is gone
        StorageError,
        "Writing {path} failed, and the index is as it was before. See that its folder is there.",
    ),
    ("INTERNAL Error", CorruptIndexError, "{path} is damaged, or DuckDB made a mistake. " + RESTORE),
    ("FATAL Error", StorageError, "{path} must be closed and opened again: DuckDB has given up on it."),
)
_CONFLICTS = ("conflict", "failed to commit: primary key")  # what DuckDB says when two transactions write the same


@contextmanager
def errors_translated(path: Path | None) -> Iterator[None]:
    """DuckDB's errors as ours, with what to do next; those that mean nothing to a user stay as they are."""
    try:
        yield
    except duckdb.IntegrityError as error:
        raise DuplicateIdError(f"An id is in the index already. Leave it out. ({first_line(error)})") from error
    except (SemidError, duckdb.DataError):  # ours already; or it quotes values, which can contain any words
        raise
    except (duckdb.Error, RuntimeError) as error:
        message = str(error)
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        if isinstance(error, duckdb.TransactionException) and any(words in message.lower() for words in _CONFLICTS):
            raise ConflictError(
                f"Another connection of this process writes the same rows of {path or 'the index'}, and the index is "
                f"as it was before. End its transaction, and try again. ({first_line(error)})"
            ) from error
        holder = re.search(r"\(PID (\d+)\)", message)
        for words, kind, text in _TRANSLATIONS:
            if words in message:
                said = text.format(path=path or "The index", holder=f" (process {holder[1]})" if holder else "")
                raise kind(f"{said} ({first_line(error)})") from error
        raise


@contextmanager
def copy_errors_translated(target: Path) -> Iterator[None]:
    """What goes wrong while a copy is written; what is wrong with the index itself stays as it is."""
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException, duckdb.TransactionException) as error:
        if "Corrupt" in str(error):
            raise CorruptIndexError(f"The index is damaged, and cannot be copied. ({first_line(error)})") from error
        raise StorageError(
            f"Writing {target} failed: {first_line(error)}. Make room on the disk, or use another path."
        ) from error
