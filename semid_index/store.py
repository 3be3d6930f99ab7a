"""The only module that talks to DuckDB: one file, or one database in memory, per index.

Methods are named for the question they answer and return arrays and Arrow tables, never cursors. Reads use a cursor of
their own, so they may come from any thread. Writes take a lock and are one transaction each.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar
from weakref import WeakValueDictionary

import duckdb
import numpy as np
from numpy.typing import NDArray

from semid_index import checksums, tables, versions
from semid_index.appending import Appending, rest_of, write_history, write_meta
from semid_index.arrow import batches, fixed_size_list, fixed_size_matrix, numpy_column
from semid_index.codes import CodeLayout, Prefix, prefix_range, unpack
from semid_index.copying import copy_database
from semid_index.database import (
    CONNECT_CONFIG,
    USER_ERRORS,
    Snapshot,
    check_is_database,
    connect,
    connect_soon,
    copy_errors_translated,
    errors_translated,
    first_line,
    interrupted_after,
    log_of,
    make_room,
    remove_database,
    run_over,
    sync_folder,
    wait_until_alone,
)
from semid_index.errors import (
    RESTORE,
    ConflictError,
    CorruptIndexError,
    FilterError,
    IndexClosedError,
    IndexLockedError,
    InvalidArgumentError,
    NotAnIndexError,
    ReadOnlyError,
    SearchTimeoutError,
    StorageError,
)
from semid_index.filters import CheckedFilter
from semid_index.item_places import ROW_GROUP, ItemPlaces
from semid_index.macros import IndexShape, create_macros, encodes_greedily
from semid_index.records import CollisionCounts, IdType, IndexConfig, Uniqueness
from semid_index.versions import kept_versions, schema_of

if TYPE_CHECKING:
    import pyarrow as pa

_CODEBOOK_NAME = re.compile(r"codebook_(\d+)")
_READ_BYTES = 4 << 20  # of vectors, were they float32, that are read at a time
_READ_AHEAD = 1 << 20  # bytes of them that DuckDB may have ready; 2.0 would have ten times as many
_CHUNK = 2_048  # rows that DuckDB carries through a query together
_JOINS_PER_MAP = 16  # searches with a filter, since the last write, that are worth a map of the table items
_ATTEMPTS = 8  # at a write that conflicts with somebody else's
_FIRST_WAIT = 0.01  # seconds before the second attempt; each further one waits twice as long
_MOST_MOVED = 1_000  # items that are looked up by id where the map is wrong, before it is given up
_LEAST_MEMORY = 512 << 20  # bytes that DuckDB may hold while it writes or reads vectors
_KEPT_MEMORY = 1 << 20  # bytes that it may go on holding afterwards
_T = TypeVar("_T")
_numbers = count(1)  # for names that no other connection of the process uses


@dataclass(frozen=True)
class StoredCodes:
    """The codes of all items, sorted by sid (and rest, and row)."""

    rows: NDArray[np.int64]
    sids: NDArray[np.int64]
    rest: NDArray[np.integer] | None


class Stamp(NamedTuple):
    """What tells the items of one moment from those of any other.

    Codes change with the version, what is added or gets another vector gets a new row, and what is deleted is missing
    from the count.
    """

    version: int
    next_row: int
    items: int


@dataclass(frozen=True)
class VectorColumn:
    """How stored vectors become a column of float32 vectors."""

    stored: tuple[str, ...]
    """The columns of ``semid_vectors`` that it takes."""
    convert: Callable[..., Any] | None
    """Makes fixed-size lists of float32 of them, as Arrow columns; None where the first one is that already."""


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


class Store:
    """One open index file."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: Path | None, *, read_only: bool) -> None:
        self._connection: duckdb.DuckDBPyConnection | None = connection
        self._writers = _writers_of(path)
        self._write_lock = self._writers.lock
        self._file_lock = threading.RLock()  # held while another file takes the place of this one
        self._moments = threading.local()
        self._known_code_columns: dict[str, str] = {}
        self._known_columns: dict[tuple[str, str], bool] = {}
        self._known_tables: set[str] = set()
        self._item_places: ItemPlaces | None = None
        self._joins = _JOINS_PER_MAP  # the first search with a filter reads the map, as a search reads all it needs
        self._old_version: int | None = None
        self._known_settings: tuple[int, dict[str, str]] | None = None
        self.path = path
        self.read_only = read_only

    # -- opening and closing ------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, config: IndexConfig, *, overwrite: bool = False) -> Self:
        """A new, untrained index; in memory if ``path`` is None."""
        file = None if path is None else Path(path)
        if file is not None:
            make_room(file, overwrite=overwrite)
        store = cls(connect(file, read_only=False), file, read_only=False)
        try:
            with store.writing() as cursor:
                tables.migrate(cursor.execute, found=0)
                settings = {"config": asdict(config), "next_row": 0, "collisions": None, "version": 1}
                write_meta(cursor, format_version=tables.FORMAT_VERSION, **settings)
        except BaseException:
            store.close()
            if file is not None:
                remove_database(file)
            raise
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False, version: int | None = None) -> Self:
        """The index in an existing file, brought to today's format if it is older.

        With an older ``version`` of the IDs, that is what is read, and nothing can be written.
        """
        file = Path(path)
        check_is_database(file)
        store = cls(connect(file, read_only=read_only), file, read_only=read_only)
        try:
            found = store._format_version()
            tables.check_format(found)
            if found < tables.FORMAT_VERSION and not read_only:
                with store.writing() as cursor:
                    tables.migrate(cursor.execute, found)
                    write_meta(cursor, format_version=tables.FORMAT_VERSION)
                    if store.is_trained:
                        _create_macros(cursor, store.config, store.layout, hierarchical=store.hierarchical)
            if version is not None and version != store.version:
                store._use_version(version)
        except BaseException:
            store.close()
            raise
        return store

    def _use_version(self, version: int) -> None:
        """Read an older version of the IDs from now on."""
        if version not in (kept := kept_versions(self.cursor().execute)):
            known = "".join(f"{number}, " for number in kept)
            raise InvalidArgumentError(
                f"{self.path} has no version {version}. It has {known}and {self.version}, which is the present one."
            )
        self.read_only, self._old_version, self._known_settings = True, version, None

    def close(self) -> None:
        """Release the file. Closing twice is allowed."""
        with self._file_lock:
            connection, self._connection = self._connection, None
            self._known_settings = None
            if connection is not None:
                connection.close()

    @property
    def closed(self) -> bool:
        """Whether the index was closed."""
        return self._connection is None

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of one's own to the same database, for one thread."""
        with self._file_lock:
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

    def _reader(self) -> duckdb.DuckDBPyConnection:
        """What to read with: the connection of this thread's moment, or one for this read alone."""
        return self._reader_of_thread() or self.cursor()

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
            try:
                yield cursor
                self._writers.begun += 1
                cursor.execute("COMMIT")
            except BaseException:
                with suppress(duckdb.Error):  # COMMIT may have ended the transaction already
                    cursor.execute("ROLLBACK")
                raise
            finally:
                self._writers.writes += 1
                self._writers.begun = self._writers.writes
                self._joins = 0
                cursor.close()

    @contextmanager
    def _settings(self, **settings: str) -> Iterator[None]:
        """Work under other settings of DuckDB, and for a file under a memory limit that goes by the size of a row.

        Settings hold for the whole database, so only one thread at a time may change them.
        """
        if self.path is not None:
            settings["memory_limit"] = f"{max(_LEAST_MEMORY, 16 * ROW_GROUP * self.config.dim) >> 20}MiB"
        with self._write_lock:
            cursor = self.cursor()
            before: dict[str, str] = {}
            if settings:
                current = ", ".join(f"current_setting('{name}')" for name in settings)
                before = dict(zip(settings, cursor.execute(f"SELECT {current}").fetchall()[0], strict=True))
            try:
                for name, value in settings.items():
                    cursor.execute(f"SET {name} = '{value}'")
                yield
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
            with self._settings():
                try:
                    yield
                finally:
                    self._let_go_of_blocks()
        finally:
            self._write_lock.release()

    def _let_go_of_blocks(self) -> None:
        """Have DuckDB give back most of the file's blocks that it holds, which nobody is going to read soon.

        Otherwise all stored vectors would be in memory twice. The limit is put back where :meth:`_settings` ends.
        """
        if self.path is not None:
            cursor = self.cursor()
            with suppress(duckdb.Error):  # it may hold what it cannot give back
                cursor.execute(f"SET memory_limit = '{_KEPT_MEMORY >> 20}MiB'")
            cursor.close()

    def save_training(
        self,
        config: IndexConfig,
        report: Mapping[str, Any],
        layout: CodeLayout,
        arrays: Mapping[str, NDArray[Any]],
        *,
        hierarchical: bool,
    ) -> None:
        """What training learned, and empty tables for the items."""
        with self.writing() as cursor:
            _write_training(cursor, config, report, layout, arrays, hierarchical=hierarchical)
            _create_item_tables(cursor, config, layout, "int", hierarchical=hierarchical)
            _create_macros(cursor, config, layout, hierarchical=hierarchical)

    @contextmanager
    def new_version(self, report: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Iterator[Appending]:
        """Keep the present version of the IDs as an older one, and take the codes of a new one, in one transaction.

        All items are to be given to :meth:`Appending.add_codes`.
        """
        config, layout, hierarchical, version = self.config, self.layout, self.hierarchical, self.version
        with self._settings(), self.writing() as cursor:
            versions.keep_version(cursor.execute, version, layout, hierarchical=hierarchical)
            tables.clear_training(cursor.execute)
            _write_training(cursor, config, report, layout, arrays, hierarchical=hierarchical)
            tables.create_code_table(cursor.execute, layout, self.id_type or "int")
            query = tables.semantic_ids_query(layout, hierarchical=hierarchical, version=version + 1)
            cursor.execute(f"CREATE OR REPLACE VIEW semantic_ids AS {query}")
            tables.create_map_view(cursor.execute, kept_versions(cursor.execute))
            write_meta(cursor, version=version + 1, collisions=None)
            appending = Appending(
                cursor, layout, next_row=self.next_row, version=version + 1, has_table=self._has_table
            )
            yield appending
            appending.finish()
            _create_macros(cursor, config, layout, hierarchical=hierarchical, known=self.meta("macros"))

    def drop_version(self, version: int) -> None:
        """Remove an older version of the IDs."""
        with self.writing() as cursor:
            versions.drop_version(cursor.execute, version)

    @contextmanager
    def appending(self, id_type: IdType, *, replacing: bool = False, compress: bool = True) -> Iterator[Appending]:
        """Append items, in batches, in one transaction; they are sorted by sid when it ends.

        ``replacing``: items may take the place of others, which :meth:`Appending.replace` takes out.
        ``compress=False`` stores values as they are: DuckDB's compression makes float32 vectors that use all bits of
        their mantissas 40 % larger, and slower to write (docs/decisions/0005).
        """
        with self._settings(force_compression="auto" if compress else "uncompressed"), self.writing() as cursor:
            if self.id_type is None:
                if id_type != "int":  # training made the tables for integers
                    _create_item_tables(cursor, self.config, self.layout, id_type, hierarchical=self.hierarchical)
                write_meta(cursor, id_type=id_type)
            appending = Appending(
                cursor,
                self.layout,
                next_row=self.next_row,
                version=self.version,
                has_table=self._has_table,
                replacing=replacing,
            )
            yield appending
            appending.finish()
            write_meta(cursor, next_row=appending.next_row)

    def delete(self, rows: NDArray[np.int64]) -> int:
        """Delete the items with these rows, and keep their IDs in the history; returns how many there were."""
        import pyarrow as pa

        with self.writing() as cursor:
            wanted = pa.table({"row": rows})
            run_over(
                cursor,
                wanted,
                "CREATE OR REPLACE TEMP TABLE semid_deleted AS FROM semid_codes SEMI JOIN batch USING (row)",
            )
            write_history(cursor, self._id_order, "semid_deleted", self.version)
            for table, key in (("semid_vectors", "row"), ("items", "id"), ("semid_codes", "row")):
                if table != "semid_vectors" or self._has_table(table):
                    cursor.execute(f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM semid_deleted)")
            versions.delete_rows(cursor.execute, "SELECT row FROM semid_deleted")
            deleted = cursor.execute("SELECT count(*) FROM semid_deleted").fetchall()[0][0]
            cursor.execute("DROP TABLE semid_deleted")
        return int(deleted)

    # -- copies -------------------------------------------------------------------------------------------------------

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """No one writes through this store meanwhile."""
        with self._write_lock:
            yield

    def write_copy(self, part: Path, target: Path, *, compress: bool) -> None:
        """Write all that is in the database, of one moment, into the new file ``part``, which is to become ``target``.

        Items are sorted by sid, and nothing is left of what was deleted. ``compress``: see :meth:`appending`; here it
        is about vectors alone.
        """
        name = f"semid_copy_{next(_numbers)}"
        place = "'" + str(part.absolute()).replace("'", "''") + "'"
        version = CONNECT_CONFIG["storage_compatibility_version"]
        with copy_errors_translated(target), self._settings(force_compression="auto"):
            cursor = self.cursor()
            try:
                source = str(cursor.execute("SELECT current_database()").fetchall()[0][0])
                cursor.execute(f"ATTACH {place} AS {name} (READ_WRITE, STORAGE_VERSION '{version}')")
                try:
                    cursor.execute("BEGIN")
                    copy_database(cursor.execute, source, name, plain=() if compress else ("semid_vectors",))
                    cursor.execute("SET force_compression = 'auto'")  # for what is left to be written
                    cursor.execute("COMMIT")
                    cursor.execute(f"CHECKPOINT {name}")
                finally:
                    with suppress(duckdb.Error):  # COMMIT may have ended the transaction
                        cursor.execute("ROLLBACK")
                    cursor.execute(f"USE {tables.quoted(source)}")
                    cursor.execute(f"DETACH {name}")
            finally:
                cursor.close()

    def checkpoint(self) -> tuple[int, ...]:
        """Bring all that was written into the file itself; returns what would tell that something was written since."""
        with errors_translated(self.path), self._file_lock:
            try:
                self.cursor().execute("CHECKPOINT")
            except duckdb.TransactionException as error:
                raise IndexLockedError(
                    f"{self.path} is being written to elsewhere in this process, by another index that is open on it "
                    f"or a connection of engine(). Try again when that is done. ({first_line(error)})"
                ) from error
            return self._file_state()

    def replace_file(self, part: Path, state: tuple[int, ...], release: Callable[[], None]) -> bool:
        """Let another file take the place of this one, and open it; False if this one is not in the given state.

        ``release`` lets go of all other connections. Reads that begin meanwhile wait; those that go on longer than some
        seconds, and connections that are held elsewhere, are the reason of an :class:`IndexLockedError`, and then all
        is as before.
        """
        path = self.path
        if path is None:
            raise InvalidArgumentError("An index in memory has no file.")
        with self._write_lock, self._file_lock:
            if self._connection is None:
                raise IndexClosedError("The index was closed meanwhile.")
            wait_until_alone(self._connection, path, release)
            if self._file_state() != state:
                return False
            connection, self._connection = self._connection, None
            connection.close()
            reader = connect_soon(path)  # so that no other process opens a file that is about to go
            try:
                if self._file_state() != state:
                    return False
                part.replace(path)
                sync_folder(path)
            finally:
                reader.close()
                self._connection = connect(path, read_only=False)
                self._writers.writes += 1
                self._writers.begun = self._writers.writes
            return True

    def sort_codes(self) -> None:
        """Bring the items into the order of their sids again."""
        if not self.is_trained:
            return
        with self.writing() as cursor:
            order = f"{self._id_order}, row"
            cursor.execute(f"CREATE OR REPLACE TEMP TABLE semid_sorted AS FROM semid_codes ORDER BY {order}")
            cursor.execute("DELETE FROM semid_codes")
            cursor.execute("INSERT INTO semid_codes FROM semid_sorted")
            cursor.execute("DROP TABLE semid_sorted")

    def refresh_macros(self) -> None:
        """Write the macros anew, unless they are those of this version already."""
        if self.is_trained and self.meta("macros") != self.macros_fingerprint():
            with self.writing() as cursor:
                _create_macros(cursor, self.config, self.layout, hierarchical=self.hierarchical)

    def _file_state(self) -> tuple[int, ...]:
        parts = [] if self.path is None else [self.path, log_of(self.path)]
        found = [part.stat() for part in parts if part.exists()]
        return tuple(value for stat in found if stat.st_size for value in (stat.st_mtime_ns, stat.st_size))

    # -- settings -----------------------------------------------------------------------------------------------------

    def macros_fingerprint(self) -> str:
        """The SHA-256 of the statements with which this version writes the macros of this index."""
        return _macros_fingerprint(_macros(self.cursor(), self.config, self.layout, hierarchical=self.hierarchical))

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

    def versions(self) -> dict[int, dict[str, Any]]:
        """For each version of the IDs how many ``items`` it has, and its settings ``train_report`` and ``trained_at``.

        The present one comes last.
        """
        with self.reading():
            found = {number: schema_of(number) for number in kept_versions(self._reader().execute)}
            return {number: self._version(schema) for number, schema in (found | {self._newest(): "main"}).items()}

    def _newest(self) -> int:
        found = self._fetch("SELECT value FROM main.semid_meta WHERE key = 'version'")
        return int(json.loads(found[0][0])) if found else 1

    def _version(self, schema: str) -> dict[str, Any]:
        wanted = "key IN ('train_report', 'trained_at')"
        settings = self._fetch(f"SELECT key, value FROM {schema}.semid_meta WHERE {wanted}")
        items = int(self._fetch(f"SELECT count(*) FROM {schema}.semid_codes")[0][0])
        return {"items": items, **{key: json.loads(value) for key, value in settings}}

    # -- reading ------------------------------------------------------------------------------------------------------

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Several reads of one moment."""
        with errors_translated(self.path):
            cursor = self.cursor()
            try:
                yield Snapshot(cursor, self.path)
            finally:
                cursor.close()

    def __len__(self) -> int:
        return int(self._fetch("SELECT count(*) FROM semid_codes")[0][0]) if self.is_trained else 0

    def learned_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything that training saved, by name."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, dtype, shape, data in self._fetch("SELECT name, dtype, shape, data FROM semid_array"):
            try:
                arrays[name] = np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape)
            except (TypeError, ValueError) as error:
                raise CorruptIndexError(
                    f"{self.path} is damaged: its array '{name}' is not of the type {dtype} and the shape {shape}. "
                    f"{RESTORE}"
                ) from error
        if self._has_table("semid_codebook"):
            codebooks = self.arrow("SELECT level, code, codeword FROM semid_codebook")
            levels, codes = numpy_column(codebooks["level"]), numpy_column(codebooks["code"])
            words = fixed_size_matrix(codebooks["codeword"])
            order = np.lexsort((codes, levels))  # sorting such wide rows, DuckDB takes ten times their size
            for level in np.unique(levels):
                arrays[f"codebook_{level}"] = words[order[levels[order] == level]]
        return arrays

    def codes(self, rows: range | None = None) -> StoredCodes:
        """The codes of all items, or of those with some rows. Reads no ids and no vectors."""
        order = self._id_order
        found = self.arrow(f"SELECT row, {order} FROM semid_codes{_where_row(rows)} ORDER BY {order}, row")
        return StoredCodes(numpy_column(found["row"]), numpy_column(found["sid"]), rest_of(found))

    def codes_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The codes of some rows, in the order asked for: (m, levels)."""
        import pyarrow as pa

        wanted = pa.table({"row": rows, "position": np.arange(len(rows))})
        found = self.arrow(
            f"SELECT {self._id_order} FROM wanted w JOIN semid_codes c ON c.row = w.row ORDER BY w.position",
            wanted=wanted,
        )
        return unpack(found["sid"].to_numpy(), self.layout, rest_of(found))

    def ids_and_codes_of(self, rows: NDArray[np.int64]) -> tuple[pa.Array, NDArray[np.int32]]:
        """The ids and the codes (m, levels) of some rows, in the order asked for."""
        import pyarrow as pa

        wanted = pa.table({"row": rows, "position": np.arange(len(rows))})
        checked = self._has_column("semid_codes", "checksum")
        names = f"c.row, c.id, {self._id_order}" + (", checksum" if checked else "")
        found = self.arrow(
            f"SELECT {names} FROM wanted w JOIN semid_codes c ON c.row = w.row ORDER BY w.position", wanted=wanted
        )
        ids, sids, rest = found["id"].combine_chunks(), numpy_column(found["sid"]), rest_of(found)
        if checked:
            expected = checksums.of_codes(numpy_column(found["row"]), ids, sids, rest)
            self._check("codes", numpy_column(found["checksum"]), expected)
        return ids, unpack(sids, self.layout, rest)

    def ids(self, rows: range | None = None, *, of: StoredCodes | None = None) -> pa.Array:
        """The id of each item, or of those with some rows, in the order of :meth:`codes`.

        Raises :class:`CorruptIndexError` if they do not belong to the codes ``of`` the same items.
        """
        checked = of is not None and self._has_column("semid_codes", "checksum")
        names = "id, checksum" if checked else "id"
        found = self.arrow(f"SELECT {names} FROM semid_codes{_where_row(rows)} ORDER BY {self._id_order}, row")
        column = found["id"]
        ids = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        if checked and of is not None:
            expected = checksums.of_codes(of.rows, ids, of.sids, of.rest)
            self._check("codes", numpy_column(found["checksum"]), expected)
        return ids

    def rows(self) -> NDArray[np.int64]:
        """The rows of all items, in no order."""
        return self.arrow("SELECT row FROM semid_codes")["row"].to_numpy()  # type: ignore[no-any-return]

    def count(self, rows: range) -> int:
        """How many items have one of these rows."""
        return int(self._fetch(f"SELECT count(*) FROM semid_codes{_where_row(rows)}")[0][0])

    def stamp(self) -> Stamp:
        """What tells the items of this moment from those of any other."""
        found = self._fetch(
            "SELECT any_value(value) FILTER (key = 'next_row'), any_value(value) FILTER (key = 'version'), "
            "(SELECT count(*) FROM semid_codes) FROM semid_meta"
        )
        next_row, version, items = found[0]
        return Stamp(int(version or 1), int(next_row), int(items))

    def vector_batches(
        self, *columns: str, rows: range | None = None
    ) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
        """The rows and the named columns of ``semid_vectors``, some thousand items at a time.

        Not more: threads of DuckDB make batches in advance, and what they have allocated, C libraries keep for them.
        """
        names = self._with_checksums(columns)
        together = max(1, _READ_BYTES // (4 * self.config.dim * _CHUNK)) * _CHUNK
        with errors_translated(self.path), self._reading_settings():
            reader = self._reader()
            reader.execute(f"SET streaming_buffer_size = '{_READ_AHEAD >> 20}MiB'")
            relation = reader.sql(f"SELECT row, {', '.join(names)} FROM semid_vectors{_where_row(rows)}")
            for batch in batches(relation, together):
                numbers = numpy_column(batch.column(0))
                found = {name: numpy_column(batch.column(i)) for i, name in enumerate(names, 1)}
                self._check_vectors(numbers, found)
                yield numbers, {name: found[name] for name in columns}

    def vectors_of(self, rows: NDArray[np.int64], *columns: str) -> dict[str, NDArray[Any]]:
        """The named columns of ``semid_vectors`` for some rows, in the order asked for."""
        import pyarrow as pa

        wanted, inverse = np.unique(rows, return_inverse=True)
        names = self._with_checksums(columns)
        found = self.arrow(
            f"SELECT v.row, {', '.join('v.' + name for name in names)} FROM semid_vectors v JOIN wanted USING (row)",
            wanted=pa.table({"row": wanted}),
        )
        self._check_vectors(numpy_column(found["row"]), {name: numpy_column(found[name]) for name in names})
        order = np.argsort(numpy_column(found["row"]))
        if len(order) != len(wanted):
            raise CorruptIndexError(f"{len(wanted) - len(order)} stored vectors are missing from {self.path}.")
        return {name: numpy_column(found[name])[order][inverse] for name in columns}

    def existing_ids(self, ids: pa.Array) -> list[Any]:
        """Those of the ids that the index has, at most ten of them."""
        import pyarrow as pa

        found = self.arrow("SELECT id FROM semid_codes JOIN wanted USING (id) LIMIT 10", wanted=pa.table({"id": ids}))
        return list(found["id"].to_pylist())

    def rows_of_ids(self, ids: pa.Array) -> NDArray[np.int64]:
        """The row of each id; -1 where the index has no such item."""
        import pyarrow as pa

        wanted = pa.table({"id": ids, "position": np.arange(len(ids))})
        found = self.arrow("SELECT position, row FROM semid_codes JOIN wanted USING (id)", wanted=wanted)
        rows = np.full(len(ids), -1, dtype=np.int64)
        rows[found["position"].to_numpy()] = found["row"].to_numpy()
        return rows

    def largest_id(self) -> int:
        """The largest integer id that an item has or had; -1 if there was none."""
        # not max(id): DuckDB 2.0 answers that from statistics, which keep what a failed commit wrote
        found = [
            int(id)
            for table in ("semid_codes", "semid_history")
            for (id,) in self._fetch(f"SELECT id FROM {table} ORDER BY id DESC LIMIT 1")
        ]
        return max(found, default=-1)

    def filter_columns(self) -> dict[str, str]:
        """What a filter may speak of: name -> SQL over the codes ``c`` joined with ``items i``.

        A column of the user's wins over one of ours with the same name.
        """
        users = {name: f"i.{tables.quoted(name)}" for name in self.item_columns() if name != "id"}
        lowered = {name.lower() for name in users}
        return {name: f"c.{name}" for name in self._code_columns() if name not in lowered} | users

    def item_columns(self) -> dict[str, str]:
        """The columns of ``items``: name -> type, in order."""
        return {name: sql_type for name, sql_type, *_ in self._fetch("DESCRIBE items")}

    def matching_rows(
        self, condition: CheckedFilter, columns: Mapping[str, str], *, timeout: float | None = None
    ) -> NDArray[np.int64]:
        """The rows of the items that fulfil a checked filter over :meth:`filter_columns`, in no order.

        Raises :class:`SearchTimeoutError` after ``timeout`` seconds.
        """
        used = {name: sql for name, sql in columns.items() if name in condition.columns}
        try:
            rows = None
            if all(name == "id" or sql.startswith("i.") for name, sql in used.items()):
                rows = self._matching_in_place(condition, columns, timeout)
            return self._matching_by_join(condition, used, timeout) if rows is None else rows
        except duckdb.InterruptException as error:
            raise SearchTimeoutError(
                f"The filter was not evaluated within {timeout:g} s. Make it simpler, or allow more with timeout=."
            ) from error
        except USER_ERRORS as error:
            raise FilterError(
                f"The filter does not fit the columns: {first_line(error)}. Compare a column with values of its own "
                "type, or use CAST."
            ) from error

    def _matching_by_join(
        self, condition: CheckedFilter, used: Mapping[str, str], timeout: float | None
    ) -> NDArray[np.int64]:
        """The rows of the items that fulfil a filter over any columns."""
        select = ", ".join(["c.semid_row", *(f"{sql} AS {tables.quoted(name)}" for name, sql in used.items())])
        codes = {"semid_row": "row", "id": "id"}
        if any(sql.startswith("c.") for sql in used.values()):
            codes |= self._code_columns()
        source = f"(SELECT {select} FROM {_subquery('semid_codes', codes)} c JOIN items i ON i.id = c.id)"
        query = f"SELECT semid_row FROM {source} AS f WHERE {condition.sql}"
        found = self.arrow(query, params=condition.params, timeout=timeout)
        return found["semid_row"].to_numpy()  # type: ignore[no-any-return]

    def _matching_in_place(
        self, condition: CheckedFilter, columns: Collection[str], timeout: float | None
    ) -> NDArray[np.int64] | None:
        """The same for a filter over columns of ``items`` alone, without a join; None where the map does not serve.

        The join takes several times as long as a simple filter: it reads the ids of all items.
        """
        import pyarrow as pa

        if any(name.lower() == "rowid" for name in columns):  # it hides DuckDB's own
            return None
        writes = self.writes if self._reader_of_thread() is None else self._moments.writes
        if self.writes_begun != writes:  # of what is read here, nobody can tell whether it is from before or after
            return None
        known = self._item_places
        if known is None or known.writes != writes:
            self._joins += 1
            if self._joins <= _JOINS_PER_MAP:
                return None
            found = self.arrow(
                "SELECT i.rowid AS place, c.row, c.id FROM items i JOIN semid_codes c ON i.id = c.id", timeout=timeout
            )
            if self.writes_begun != writes:
                return None
            self._item_places = known = ItemPlaces.read(found, writes)
        found = self.arrow(
            f"SELECT rowid AS place, id FROM items WHERE {condition.sql}", params=condition.params, timeout=timeout
        )
        rows, moved = known.rows_of(found)
        if np.count_nonzero(moved) > _MOST_MOVED:
            self._item_places, self._joins = None, 0
            return None
        if moved.any():
            rows[moved] = self.rows_of_ids(found["id"].filter(pa.array(moved)))
        return rows[rows >= 0]

    def items_under(self, prefix: Prefix) -> pa.Table:
        """The items below a prefix, with their IDs and metadata, in the order of their IDs."""
        order = ["sid", *(["sid_rest"] if self.layout.rest_levels else []), "row"]
        codes = {"id": "id", "semantic_id": tables.text_expression(self.layout), **{name: name for name in order}}
        return self.arrow(
            f"SELECT c.id, c.semantic_id{self._metadata_columns()} "
            f"FROM {_subquery('semid_codes', codes, where=self._under(prefix))} c JOIN items i ON i.id = c.id "
            f"ORDER BY {', '.join('c.' + name for name in order)}"
        )

    def shelves(self, depth: int, under: Prefix, *, examples: int) -> list[tuple[tuple[int, ...], int, list[Any]]]:
        """The prefixes of ``depth`` codes below ``under``: codes, number of items, some ids; largest first."""
        codes = list(tables.code_expressions(self.layout).values())[:depth]
        names = ", ".join(f"k{level}" for level in range(depth))
        keys = ", ".join(f"{sql} AS k{level}" for level, sql in enumerate(codes))
        found = self._fetch(
            f"SELECT {names}, count(*) AS n, list(id ORDER BY position)[:{examples}] FROM "
            f"(SELECT {keys}, id, row AS position FROM semid_codes WHERE {self._under(under)}) "
            f"GROUP BY {names} ORDER BY n DESC, {names}"
        )
        return [(tuple(row[:depth]), int(row[depth]), list(row[depth + 1] or ())) for row in found]

    def items(self, ids: pa.Array) -> pa.Table:
        """The items with these ids, in the order asked for; ids that the index does not have are left out."""
        import pyarrow as pa

        wanted = pa.table({"id": ids, "position": np.arange(len(ids))})
        codes = _subquery("semid_codes", {"id": "id", "semantic_id": tables.text_expression(self.layout)})
        return self.arrow(
            f"SELECT c.id, c.semantic_id{self._metadata_columns()} "
            f"FROM wanted w JOIN {codes} c ON c.id = w.id JOIN items i ON i.id = c.id ORDER BY w.position",
            wanted=wanted,
        )

    def all_items(self, columns: Iterable[str], *, limit: int | None = None) -> pa.Table:
        """The named columns (one or more) of ``items`` for all items, or the first ones, in the order of rows."""
        names = ", ".join(f"i.{tables.quoted(name)}" for name in columns)
        few = "" if limit is None else f" LIMIT {limit}"
        return self.arrow(f"SELECT {names} FROM semid_codes c JOIN items i ON i.id = c.id ORDER BY c.row{few}")

    def value_counts(self, column: str, *, limit: int) -> list[int]:
        """How many items have each value of a column of ``items``, at most ``limit`` values; none for NULL."""
        name = tables.quoted(column)
        found = self._fetch(f"SELECT count(*) FROM items WHERE {name} IS NOT NULL GROUP BY {name} LIMIT {limit}")
        return [int(count) for (count,) in found]

    def id_file_columns(self) -> list[str]:
        """The columns of ``semantic_ids`` that a file of IDs has. All codes are among them, and so no ``sid_rest``."""
        return ["id", "sid", "semantic_id", *tables.code_expressions(self.layout), "dup_rank", "version"]

    def write_ids(
        self, part: Path, target: Path, options: str, *, metadata: Mapping[str, str], vector: VectorColumn | None
    ) -> int:
        """Write the IDs of all items, sorted, to the file ``part``, which is to become ``target``; returns how many.

        ``options``: those of DuckDB's COPY. ``metadata``: columns of ``items``, by the name that each gets.
        """
        columns = [f"s.{name}" for name in self.id_file_columns()]
        columns += [f"i.{tables.quoted(column)} AS {tables.quoted(name)}" for name, column in metadata.items()]
        source = "semantic_ids s" + (" JOIN items i ON i.id = s.id" if metadata else "")
        deeper = list(tables.code_expressions(self.layout))[self.layout.packed_levels :]
        order = ", ".join(f"s.{name}" for name in ("sid", *deeper, "dup_rank"))
        place = "'" + str(part.absolute()).replace("'", "''") + "'"
        with errors_translated(self.path), self._settings(), self._converting(vector) as (cursor, converted):
            if vector is not None:
                columns.append(f"{converted} AS vector")
                source += " JOIN semid_codes c ON c.id = s.id JOIN semid_vectors v ON v.row = c.row"
            query = f"SELECT {', '.join(columns)} FROM {source} ORDER BY {order}"
            try:
                return int(cursor.execute(f"COPY ({query}) TO {place} ({options})").fetchall()[0][0])
            except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
                if "Corrupt" in str(error):
                    raise
                raise StorageError(
                    f"Writing {target} failed: {first_line(error)}. Make room on the disk, or use another path."
                ) from error

    def uniqueness(self) -> Uniqueness:
        """How far IDs tell items apart."""
        ids = f"SELECT count(*) AS n FROM semid_codes GROUP BY {self._id_order}"
        found = self._fetch(f"SELECT count(*), count(*) FILTER (n = 1), coalesce(max(n), 0) FROM ({ids})")
        return Uniqueness(*found[0])

    def collision_counts(self) -> CollisionCounts:
        """What the collision policy did in all calls of ``add``."""
        return CollisionCounts(**self.meta("collisions") or {})

    def first_level_counts(self) -> NDArray[np.int64]:
        """How many items have each code of the first level that is in use."""
        code = tables.code_expressions(self.layout)["c1"]
        return np.array(self._fetch(f"SELECT count(*) FROM semid_codes GROUP BY {code}"), dtype=np.int64).reshape(-1)

    def repeated_share(self, rows: range) -> float:
        """Share of the items with these rows that have the ID of another of them, one of each ID left out."""
        ids = f"SELECT count(*) AS n FROM semid_codes{_where_row(rows)} GROUP BY {self._id_order}"
        items, different = self._fetch(f"SELECT coalesce(sum(n), 0), count(*) FROM ({ids})")[0]
        return 1 - different / int(items) if items else 0.0

    def memory_bytes(self) -> int:
        """What DuckDB holds in memory: blocks of the file that it has read, or all that an index without a file has."""
        return int(self._fetch("SELECT coalesce(sum(memory_usage_bytes), 0) FROM duckdb_memory()")[0][0])

    def file_bytes(self) -> int:
        """The size of the file with its write-ahead log; 0 for an index in memory."""
        if self.path is None:
            return 0
        return sum(part.stat().st_size for part in (self.path, log_of(self.path)) if part.exists())

    def column_bytes(self) -> dict[str, int]:
        """Bytes of the file's data blocks, column by column (``table.column``), after a checkpoint."""
        sizes: dict[str, int] = {}
        block = int(self._fetch("SELECT block_size FROM pragma_database_size() LIMIT 1")[0][0])
        for table in ("semid_codes", "semid_vectors", "items", "semid_codebook", "semid_buckets", "semid_array"):
            if self._has_table(table):
                found = self._fetch(
                    "SELECT column_name, count(DISTINCT block) FROM (SELECT column_name, "
                    "unnest(list_append(additional_block_ids, block_id)) AS block "
                    f"FROM pragma_storage_info('{table}') WHERE persistent) GROUP BY column_name"
                )
                sizes |= {f"{table}.{column}": int(blocks) * block for column, blocks in found}
        return sizes

    def arrow(
        self, query: str, *, params: Any = None, timeout: float | None = None, **registered: pa.Table
    ) -> pa.Table:
        """The result of a query; further keyword arguments are Arrow tables that it may name.

        After ``timeout`` seconds :class:`duckdb.InterruptException` is raised.
        """
        with errors_translated(self.path):
            cursor = self._reader()
            for name, table in registered.items():
                cursor.register(name, table)
            try:
                with interrupted_after(timeout, cursor):
                    return cursor.sql(query, params=params or None).to_arrow_table()
            finally:
                with suppress(duckdb.TransactionException):  # the query failed, and its own error is the one to see
                    for name in registered:
                        cursor.unregister(name)

    # -- parts --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _converting(self, vector: VectorColumn | None) -> Iterator[tuple[duckdb.DuckDBPyConnection, str]]:
        """A cursor, and SQL over ``semid_vectors v`` for float32 vectors."""
        cursor = self.cursor()
        stored = [] if vector is None else [f"v.{name}" for name in vector.stored]
        if vector is None or vector.convert is None:
            yield cursor, "".join(stored)
            return
        types = dict(cursor.execute("SELECT column_name, column_type FROM (DESCRIBE semid_vectors)").fetchall())
        function = f"semid_float32_{next(_numbers)}"
        cursor.create_function(  # type: ignore[call-overload]  # it takes names as well as enums
            function,
            vector.convert,
            [types[name] for name in vector.stored],
            f"FLOAT[{self.config.dim}]",
            type="arrow",
        )
        try:
            yield cursor, f"{function}({', '.join(stored)})"
        finally:
            cursor.remove_function(function)

    def _with_checksums(self, columns: Iterable[str]) -> list[str]:
        """Some columns of ``semid_vectors``, and those that are needed to check them, as far as the file has any."""
        names = list(columns)
        if "v" in names and self._has_column("semid_vectors", "v_checksum"):
            needs_scale = "scale" not in names and self._has_column("semid_vectors", "scale")
            names += ["v_checksum", *(["scale"] if needs_scale else [])]
        if "tail" in names and self._has_column("semid_vectors", "tail_checksum"):
            names.append("tail_checksum")
        return names

    def _has_column(self, table: str, name: str) -> bool:
        """Whether a table has a column. Files of older formats lack some, where they are only read."""
        if (table, name) not in self._known_columns:
            self._known_columns[table, name] = any(column == name for column, *_ in self._fetch(f"DESCRIBE {table}"))
        return self._known_columns[table, name]

    def _check_vectors(self, rows: NDArray[np.int64], found: Mapping[str, NDArray[Any]]) -> None:
        """Refuse stored vectors and tails that are not as they were written, where their checksums are there, too."""
        if "v_checksum" in found:
            self._check("vectors", found["v_checksum"], checksums.of_vectors(rows, found["v"], found.get("scale")))
        if "tail_checksum" in found:
            self._check("tail codes", found["tail_checksum"], checksums.of_vectors(rows, found["tail"]))

    def _check(self, what: str, stored: checksums.Checksums, expected: checksums.Checksums) -> None:
        wrong = int(np.count_nonzero(checksums.wrong(stored, expected)))
        if wrong:
            raise CorruptIndexError(
                f"{self.path or 'The index'} is damaged: the {what} of {wrong:,} of {len(stored):,} items are not "
                f"those that were written. {RESTORE}"
            )

    def _fetch(self, query: str, params: list[Any] | None = None) -> list[tuple[Any, ...]]:
        with errors_translated(self.path):
            return self._reader().execute(query, params or []).fetchall()

    def _has_table(self, name: str) -> bool:
        """Whether the index has a table. One that it has it keeps.

        Not looked up in the list of all tables: before DuckDB gives that for the first time, it makes all its own
        views, which takes as long as opening the file.
        """
        if name not in self._known_tables:
            with errors_translated(self.path):
                try:
                    self.cursor().execute(f"SELECT 1 FROM {name} LIMIT 0").fetchall()
                except duckdb.CatalogException:
                    return False
            self._known_tables.add(name)
        return True

    def _format_version(self) -> int:
        if not self._has_table("semid_meta"):
            raise NotAnIndexError(
                f"{self.path} is a DuckDB database, but not one of semid-index: it has no table semid_meta. "
                "Make an index, in a file of its own, with semid_index.create."
            )
        version = self.meta("format_version")
        if type(version) is not int or version < 1:
            raise CorruptIndexError(f"{self.path} is damaged: it does not say which format it has. {RESTORE}")
        return version

    def _under(self, prefix: Prefix) -> str:
        lo, hi = prefix_range(prefix, self.layout)
        rest = prefix[self.layout.packed_levels :]
        conditions = [f"sid >= {lo} AND sid < {hi}", *(f"sid_rest[{i}] = {code}" for i, code in enumerate(rest, 1))]
        return " AND ".join(conditions)

    @property
    def _id_order(self) -> str:
        """The columns that hold an ID, in the order that sorts IDs."""
        return "sid, sid_rest" if self.layout.rest_levels else "sid"

    def _code_columns(self) -> dict[str, str]:
        """The columns of ours that a filter may speak of: name -> SQL over ``semid_codes`` alone."""
        if not self._known_code_columns:  # which training fixes: every search with a filter asks for them
            layout = self.layout
            columns = {"id": "id", "sid": "sid", "dup_rank": "dup_rank", **tables.code_expressions(layout)}
            self._known_code_columns = columns | (tables.prefix_expressions(layout) if self.hierarchical else {})
        return self._known_code_columns

    def _metadata_columns(self) -> str:
        """SQL for the user's columns of ``items i``, after ``id`` and ``semantic_id``."""
        names = [name for name in self.item_columns() if name.lower() not in ("id", "semantic_id")]
        return "".join(f", i.{tables.quoted(name)}" for name in names)


def _subquery(table: str, columns: Mapping[str, str], *, where: str = "true") -> str:
    """Some expressions over one table under names of their own, where no other table's columns can be meant."""
    return f"(SELECT {', '.join(f'{sql} AS {name}' for name, sql in columns.items())} FROM {table} WHERE {where})"


def _write_training(
    cursor: duckdb.DuckDBPyConnection,
    config: IndexConfig,
    report: Mapping[str, Any],
    layout: CodeLayout,
    arrays: Mapping[str, NDArray[Any]],
    *,
    hierarchical: bool,
) -> None:
    """What training learned, in tables of its own."""
    codebooks = {name: array for name, array in arrays.items() if _CODEBOOK_NAME.fullmatch(name)}
    write_meta(
        cursor,
        config=asdict(config),
        codebook_sizes=list(layout.codebook_sizes),
        hierarchical=hierarchical,
        train_report=report,
        trained_at=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprints=fingerprints(arrays),
        drift=None,
    )
    if codebooks:
        tables.create_codebook_table(cursor.execute, config.dim)
    for name, codebook in codebooks.items():
        _insert_codebook(cursor, int(name.removeprefix("codebook_")), codebook)
    for name, array in arrays.items():
        if name not in codebooks:
            plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            values = [name, plain.dtype.str, list(array.shape), plain.tobytes()]
            cursor.execute("INSERT INTO semid_array VALUES (?, ?, ?, ?)", values)
    if codebooks and hierarchical:
        tables.create_bucket_table(cursor.execute)


def _create_item_tables(
    cursor: duckdb.DuckDBPyConnection, config: IndexConfig, layout: CodeLayout, id_type: IdType, *, hierarchical: bool
) -> None:
    tables.create_item_tables(
        cursor.execute,
        layout,
        dim=config.dim,
        id_type=id_type,
        tier=config.vectors,
        tail_bytes=-(-(config.tail or 0) // 2),
        hierarchical=hierarchical,
    )


def fingerprints(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """The SHA-256 of the type, shape and values of each array, whatever the machine's byte order."""
    found = {}
    for name, array in arrays.items():
        plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest = hashlib.sha256(f"{plain.dtype.str} {list(plain.shape)} ".encode())
        digest.update(plain.data)
        found[name] = digest.hexdigest()
    return found


def _macros(
    cursor: duckdb.DuckDBPyConnection, config: IndexConfig, layout: CodeLayout, *, hierarchical: bool
) -> list[str]:
    """The statements that write the macros of an index."""
    shape = IndexShape(
        layout,
        config.dim,
        config.metric,
        config.vectors,
        codeword_levels=tables.codeword_levels(cursor.execute),
        hierarchical=hierarchical,
        greedy=encodes_greedily(config.quantizer, config.quantizer_config),
    )
    return create_macros(shape)


def _macros_fingerprint(statements: Iterable[str]) -> str:
    return hashlib.sha256(";\n".join(statements).encode()).hexdigest()


def _create_macros(
    cursor: duckdb.DuckDBPyConnection,
    config: IndexConfig,
    layout: CodeLayout,
    *,
    hierarchical: bool,
    known: str | None = None,
) -> None:
    """Write the macros, unless those that are there, which have the fingerprint ``known``, are the same."""
    statements = _macros(cursor, config, layout, hierarchical=hierarchical)
    if (fingerprint := _macros_fingerprint(statements)) == known:
        return
    for statement in statements:
        cursor.execute(statement)
    write_meta(cursor, macros=fingerprint)


def _insert_codebook(cursor: duckdb.DuckDBPyConnection, level: int, codebook: NDArray[np.float32]) -> None:
    import pyarrow as pa

    words = pa.table(
        {
            "level": np.full(len(codebook), level, dtype=np.uint8),
            "code": np.arange(len(codebook), dtype=np.uint16),
            "codeword": fixed_size_list(codebook),
        }
    )
    run_over(cursor, words, "INSERT INTO semid_codebook SELECT * FROM batch")


def _where_row(rows: range | None) -> str:
    return "" if rows is None else f" WHERE row >= {rows.start} AND row < {rows.stop}"
