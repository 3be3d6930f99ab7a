"""DuckDB as a DB-API driver whose results do not disturb each other.

A DuckDB connection holds one result at a time: the next statement discards, silently, what was not fetched from the
result before. Here the rest of that result is read into memory first. So rows are streamed as long as nothing else is
asked of their connection, and none is ever lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import duckdb
import numpy as np

from semid_index.errors import IndexClosedError

apilevel = "2.0"
threadsafety = 1  # threads may share this module, but not a connection
paramstyle = "numeric_dollar"  # so that a value can occur twice in a statement, as GROUP BY needs
Binary = bytes

# SQLAlchemy knows errors by these names, which DuckDB's own errors derive from
Error = duckdb.Error
DatabaseError = duckdb.DatabaseError
DataError = duckdb.DataError
IntegrityError = duckdb.IntegrityError
InterfaceError = duckdb.Error  # DuckDB's errors do not tell the driver from the database
InternalError = duckdb.InternalError
NotSupportedError = duckdb.NotSupportedError
OperationalError = duckdb.OperationalError
ProgrammingError = duckdb.ProgrammingError

Row = tuple[Any, ...]


class Connection:
    """A DuckDB connection, which has a transaction of its own.

    What this class lacks is looked up on the DuckDB connection: ``connection.register(...)``, for example.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, on_close: Callable[[], None] | None = None) -> None:
        self._connection = connection
        self._on_close = on_close
        self.autocommit = False
        """Whether each statement is a transaction of its own; then ``begin`` and ``commit`` do nothing."""
        self.reader: Cursor | None = None
        """The cursor whose rows still come from DuckDB."""

    def cursor(self) -> Cursor:
        """A cursor in this connection's transaction."""
        return Cursor(self)

    def begin(self) -> None:
        """Start a transaction."""
        if not self.autocommit:
            with _closing_told():
                self.settled().begin()

    def commit(self) -> None:
        """Keep what the transaction did. An open result can be read on."""
        if not self.autocommit:
            with _closing_told():
                self.settled().commit()

    def rollback(self) -> None:
        """Undo what the transaction did, if there is one. Reading on in an open result is then an error."""
        if self.reader is not None:
            self.reader.abandon()
        with suppress(duckdb.TransactionException, duckdb.ConnectionException):  # there is none, or no connection
            self._connection.rollback()

    def close(self) -> None:
        """Give the DuckDB connection back."""
        self.rollback()
        self._connection.close()
        if self._on_close is not None:
            self._on_close()

    @contextmanager
    def registered(self, name: str, data: Any) -> Iterator[None]:
        """Statements of this transaction may read Arrow data, or a data frame, under a name."""
        self.settled().register(name, data)
        try:
            yield
        finally:
            with suppress(duckdb.TransactionException):  # it failed, and the name goes with it
                self._connection.unregister(name)

    def settled(self) -> duckdb.DuckDBPyConnection:
        """The DuckDB connection, free for another statement."""
        if self.reader is not None:
            self.reader.read_rest()
        return self._connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settled(), name)


class Cursor:
    """Runs statements and gives their rows: straight from DuckDB, or from memory if its connection had to move on."""

    arraysize = 1

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.description: Sequence[Any] | None = None
        self.rowcount = -1
        self._memory: deque[Row] = deque()
        self._failure: duckdb.Error | None = None  # why the rows that are left cannot be had

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> None:
        """Run a statement, or several of which only the last has parameters."""
        duck = self._start()
        with _closing_told():
            duck.execute(statement, [_plain(value) for value in parameters])
        names = [name for name, *_ in duck.description or ()]
        if names in (["Count"], ["Success"]) and not _returns_rows(duck, statement):
            counts = duck.fetchall()
            self.rowcount = counts[0][0] if counts else -1
            return
        self.description = duck.description
        self.connection.reader = self
        if _has_returning(statement):  # the change must be over, however much of its result is read
            self.read_rest()

    def executemany(self, statement: str, parameters: Iterable[Sequence[Any]]) -> None:
        """Run a statement once for each sequence of parameters."""
        with _closing_told():
            self._start().executemany(statement, [[_plain(value) for value in row] for row in parameters])

    def fetchone(self) -> Row | None:
        """The next row; None at the end."""
        return next(iter(self.fetchmany(1)), None)

    def fetchmany(self, size: int | None = None) -> list[Row]:
        """The next rows, at most ``size``; none at the end."""
        wanted = self.arraysize if size is None else size
        if self._is_reading:
            rows = self.connection._connection.fetchmany(wanted)
            if len(rows) < wanted:
                self.connection.reader = None
            return rows
        self._check()
        return [self._memory.popleft() for _ in range(min(wanted, len(self._memory)))]

    def fetchall(self) -> list[Row]:
        """All rows that are left."""
        if self._is_reading:
            self.read_rest()
        self._check()
        rows, self._memory = list(self._memory), deque()
        return rows

    def close(self) -> None:
        """Drop what was not read."""
        self._memory, self._failure = deque(), None
        if self._is_reading:
            self.connection.reader = None

    def read_rest(self) -> None:
        """Move the rows that are left into memory, so that DuckDB can turn to another statement."""
        self.connection.reader = None
        try:
            self._memory = deque(self.connection._connection.fetchall())
        except duckdb.Error as error:
            self._failure = error

    def abandon(self) -> None:
        """Note that the rows that are left are gone with their transaction."""
        self.connection.reader = None
        self._failure = duckdb.OperationalError(
            "This result was not read to its end before its transaction was rolled back or its connection was given "
            "back. Read it earlier, for example with .all()."
        )

    @property
    def _is_reading(self) -> bool:
        return self.connection.reader is self

    def _start(self) -> duckdb.DuckDBPyConnection:
        self.close()
        self.description, self.rowcount = None, -1
        return self.connection.settled()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


def _plain(value: Any) -> Any:
    """A parameter that DuckDB takes: it knows NumPy's arrays, but not its single numbers."""
    return value.item() if isinstance(value, np.generic) else value


def _returns_rows(duck: duckdb.DuckDBPyConnection, statement: str) -> bool:
    """Whether a result with a column ``Count`` or ``Success`` is one, and not DuckDB's way to say "done"."""
    last = duck.extract_statements(statement)[-1]
    return last.type in (duckdb.StatementType.SELECT, duckdb.StatementType.EXECUTE) or _has_returning(statement)


def _has_returning(statement: str) -> bool:
    """Whether the word occurs; a false alarm costs memory for the rows, nothing else."""
    return "returning" in statement.lower()


@contextmanager
def _closing_told() -> Iterator[None]:
    try:
        yield
    except duckdb.ConnectionException as error:
        if "already closed" in str(error):
            raise IndexClosedError("The index is closed. Open it again with semid_index.open(path).") from error
        raise
