"""The only module that talks to DuckDB: one file, or one database in memory, per index.

Methods are named for the question they answer and return arrays and Arrow tables, never cursors. Reads use a cursor of
their own, so they may come from any thread. Writes take a lock and are one transaction each.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import duckdb
import numpy as np
from numpy.typing import NDArray

from semid_index import tables
from semid_index.codes import CodeLayout, Prefix, pack, pack_rest, prefix_range, unpack
from semid_index.collisions import Below
from semid_index.errors import (
    RESTORE,
    CorruptIndexError,
    DuplicateIdError,
    FilterError,
    IndexClosedError,
    IndexExistsError,
    IndexFileError,
    IndexLockedError,
    IndexNotFoundError,
    InvalidArgumentError,
    NewerFormatError,
    NotAnIndexError,
    ReadOnlyError,
    SearchTimeoutError,
    SemidError,
    StorageError,
)
from semid_index.filters import CheckedFilter
from semid_index.macros import IndexShape, create_macros, encodes_greedily
from semid_index.records import CollisionCounts, IdType, IndexConfig, Uniqueness

if TYPE_CHECKING:
    import pyarrow as pa

_DUCKDB_MAGIC = b"DUCK"  # at byte 8 of every DuckDB file
_CONNECT_CONFIG = {
    "storage_compatibility_version": "v1.2.0",  # DuckDB 1.5 and 2.x both read such files
    "autoinstall_known_extensions": "false",  # an index needs none, and must not reach for the network
}
_CODEBOOK_NAME = re.compile(r"codebook_(\d+)")
_READ_BATCH = 65_536
_ROW_GROUP = 122_880  # rows that DuckDB keeps and compresses together
_INTERRUPT_EVERY = 0.05  # seconds between two attempts to stop a statement that ran out of time
_LEAST_MEMORY = 512 << 20  # bytes that DuckDB may hold while it writes or reads vectors
# DuckDB's errors about values and expressions, as against those about the file or the machine
_USER_ERRORS = (duckdb.DataError, duckdb.NotSupportedError, duckdb.ProgrammingError)

_numbers = count(1)  # for names that no other connection of the process uses


@dataclass(frozen=True)
class ItemBatch:
    """Encoded items on their way into the store; every array has one entry per item."""

    rows: NDArray[np.int64]
    ids: pa.Array
    sids: NDArray[np.int64]
    rest: NDArray[np.integer] | None
    norms: NDArray[np.float32]
    """Squared length of the decoded vector."""
    vectors: Mapping[str, NDArray[Any]]
    """Columns of ``semid_vectors``: ``v`` (n, dim), ``scale`` (n,), ``tail`` (n, bytes), as far as there are any."""
    metadata: pa.Table | None


@dataclass(frozen=True)
class StoredCodes:
    """The codes of all items, sorted by sid (and rest, and row)."""

    rows: NDArray[np.int64]
    sids: NDArray[np.int64]
    rest: NDArray[np.integer] | None


@dataclass(frozen=True)
class VectorColumn:
    """How stored vectors become a column of float32 vectors."""

    stored: tuple[str, ...]
    """The columns of ``semid_vectors`` that it takes."""
    convert: Callable[..., Any] | None
    """Makes fixed-size lists of float32 of them, as Arrow columns; None where the first one is that already."""


class Store:
    """One open index file."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: Path | None, *, read_only: bool) -> None:
        self._connection: duckdb.DuckDBPyConnection | None = connection
        self._write_lock = threading.RLock()
        self._known_code_columns: dict[str, str] = {}
        self.path = path
        self.read_only = read_only

    # -- opening and closing ------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, config: IndexConfig, *, overwrite: bool = False) -> Self:
        """A new, untrained index; in memory if ``path`` is None."""
        file = None if path is None else Path(path)
        if file is not None:
            _make_room(file, overwrite=overwrite)
        store = cls(_connect(file, read_only=False), file, read_only=False)
        try:
            with store.writing() as cursor:
                tables.migrate(cursor.execute, found=0)
                settings = {"config": asdict(config), "next_row": 0, "collisions": None}
                _write_meta(cursor, format_version=tables.FORMAT_VERSION, **settings)
        except BaseException:
            store.close()
            if file is not None:
                _remove(file)
            raise
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> Self:
        """The index in an existing file, brought to today's format if it is older."""
        file = Path(path)
        _check_is_database(file)
        store = cls(_connect(file, read_only=read_only), file, read_only=read_only)
        try:
            found = store._format_version()
            tables.check_format(found)
            if found < tables.FORMAT_VERSION and not read_only:
                with store.writing() as cursor:
                    tables.migrate(cursor.execute, found)
                    _write_meta(cursor, format_version=tables.FORMAT_VERSION)
                    if store.is_trained:
                        _create_macros(cursor, store.config, store.layout, hierarchical=store.hierarchical)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Release the file. Closing twice is allowed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @property
    def closed(self) -> bool:
        """Whether the index was closed."""
        return self._connection is None

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of one's own to the same database, for one thread."""
        if self._connection is None:
            raise IndexClosedError("The index is closed. Open it again with semid_index.open(path).")
        return self._connection.cursor()

    # -- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction: all of what is executed inside is kept, or nothing."""
        if self.read_only:
            raise ReadOnlyError(f"{self.path} is open for reading only. Open it without read_only=True to change it.")
        with self._write_lock, _errors_translated(self.path):
            cursor = self.cursor()
            cursor.execute("BEGIN")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                with suppress(duckdb.Error):  # COMMIT may have ended the transaction already
                    cursor.execute("ROLLBACK")
                raise
            finally:
                cursor.close()

    @contextmanager
    def _settings(self, **settings: str) -> Iterator[None]:
        """Work under other settings of DuckDB, and for a file under a memory limit that goes by the size of a row.

        Settings hold for the whole database, so only one thread at a time may change them.
        """
        if self.path is not None:
            settings["memory_limit"] = f"{max(_LEAST_MEMORY, 16 * _ROW_GROUP * self.config.dim) >> 20}MiB"
        with self._write_lock:
            cursor = self.cursor()
            before = {name: cursor.execute("SELECT current_setting(?)", [name]).fetchall()[0][0] for name in settings}
            try:
                for name, value in settings.items():
                    cursor.execute(f"SET {name} = '{value}'")
                yield
            finally:
                with suppress(duckdb.Error):  # nothing that went wrong before may hide behind this
                    for name, value in before.items():
                        cursor.execute(f"SET {name} = '{value}'")

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
        codebooks = {name: array for name, array in arrays.items() if _CODEBOOK_NAME.fullmatch(name)}
        with self.writing() as cursor:
            _write_meta(
                cursor,
                config=asdict(config),
                codebook_sizes=list(layout.codebook_sizes),
                hierarchical=hierarchical,
                train_report=report,
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
            _create_item_tables(cursor, config, layout, "int", hierarchical=hierarchical)
            _create_macros(cursor, config, layout, hierarchical=hierarchical)

    @contextmanager
    def appending(self, id_type: IdType, *, compress: bool = True) -> Iterator[Appending]:
        """Append items, in batches, in one transaction; they are sorted by sid when it ends.

        ``compress=False`` stores values as they are: DuckDB's compression makes float32 vectors that use all bits of
        their mantissas 40 % larger, and slower to write (docs/decisions/0005).
        """
        with self._settings(force_compression="auto" if compress else "uncompressed"), self.writing() as cursor:
            if self.id_type is None:
                if id_type != "int":  # training made the tables for integers
                    _create_item_tables(cursor, self.config, self.layout, id_type, hierarchical=self.hierarchical)
                _write_meta(cursor, id_type=id_type)
            appending = Appending(cursor, self.layout)
            yield appending
            appending.finish()
            _write_meta(cursor, next_row=appending.next_row)

    # -- settings -----------------------------------------------------------------------------------------------------

    def meta(self, key: str) -> Any:
        """One setting; None if it was never written."""
        found = self._fetch("SELECT value FROM semid_meta WHERE key = ?", [key])
        try:
            return json.loads(found[0][0]) if found else None
        except ValueError as error:
            raise CorruptIndexError(f"{self.path} is damaged: its setting '{key}' is no JSON. {RESTORE}") from error

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

    # -- reading ------------------------------------------------------------------------------------------------------

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
            codebooks = self.arrow("SELECT level, codeword FROM semid_codebook ORDER BY level, code")
            levels = codebooks["level"].to_numpy()
            words = fixed_size_matrix(codebooks["codeword"])
            for level in np.unique(levels):
                arrays[f"codebook_{level}"] = words[levels == level]
        return arrays

    def codes(self) -> StoredCodes:
        """The codes of all items. Reads no ids and no vectors."""
        found = self.arrow(f"SELECT row, {self._id_order} FROM semid_codes ORDER BY {self._id_order}, row")
        return StoredCodes(found["row"].to_numpy(), found["sid"].to_numpy(), _rest_of(found))

    def codes_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The codes of some rows, in the order asked for: (m, levels)."""
        import pyarrow as pa

        wanted = pa.table({"row": rows, "position": np.arange(len(rows))})
        found = self.arrow(
            f"SELECT {self._id_order} FROM wanted w JOIN semid_codes c ON c.row = w.row ORDER BY w.position",
            wanted=wanted,
        )
        return unpack(found["sid"].to_numpy(), self.layout, _rest_of(found))

    def ids(self) -> pa.Array:
        """The id of each item, in the order of :meth:`codes`."""
        column = self.arrow(f"SELECT id FROM semid_codes ORDER BY {self._id_order}, row")["id"]
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)

    def vector_batches(self, *columns: str) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
        """The rows and the named columns of ``semid_vectors``, some ten thousand items at a time."""
        with _errors_translated(self.path), self._settings():
            relation = self.cursor().sql(f"SELECT row, {', '.join(columns)} FROM semid_vectors")
            for batch in relation.to_arrow_reader(_READ_BATCH):
                yield batch.column(0).to_numpy(), {name: _column(batch.column(i)) for i, name in enumerate(columns, 1)}

    def vectors_of(self, rows: NDArray[np.int64], *columns: str) -> dict[str, NDArray[Any]]:
        """The named columns of ``semid_vectors`` for some rows, in the order asked for."""
        import pyarrow as pa

        wanted, inverse = np.unique(rows, return_inverse=True)
        found = self.arrow(
            f"SELECT v.row, {', '.join('v.' + name for name in columns)} FROM semid_vectors v JOIN wanted USING (row)",
            wanted=pa.table({"row": wanted}),
        )
        order = np.argsort(found["row"].to_numpy())
        if len(order) != len(wanted):
            raise CorruptIndexError(f"{len(wanted) - len(order)} stored vectors are missing from {self.path}.")
        return {name: _column(found[name])[order][inverse] for name in columns}

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
        """The largest integer id; -1 in an empty index."""
        # not max(id): DuckDB 2.0 answers that from statistics, which keep what a failed commit wrote
        found = self._fetch("SELECT id FROM semid_codes ORDER BY id DESC LIMIT 1")
        return int(found[0][0]) if found else -1

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
        select = ", ".join(["c.semid_row", *(f"{sql} AS {tables.quoted(name)}" for name, sql in used.items())])
        codes = {"semid_row": "row", "id": "id"}
        if any(sql.startswith("c.") for sql in used.values()):
            codes |= self._code_columns()
        source = f"(SELECT {select} FROM {_subquery('semid_codes', codes)} c JOIN items i ON i.id = c.id)"
        try:
            found = self.arrow(
                f"SELECT semid_row FROM {source} AS f WHERE {condition.sql}", params=condition.params, timeout=timeout
            )
        except duckdb.InterruptException as error:
            raise SearchTimeoutError(
                f"The filter was not evaluated within {timeout:g} s. Make it simpler, or allow more with timeout=."
            ) from error
        except _USER_ERRORS as error:
            raise FilterError(
                f"The filter does not fit the columns: {_first_line(error)}. Compare a column with values of its own "
                "type, or use CAST."
            ) from error
        return found["semid_row"].to_numpy()  # type: ignore[no-any-return]

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
        with _errors_translated(self.path), self._settings(), self._converting(vector) as (cursor, converted):
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
                    f"Writing {target} failed: {_first_line(error)}. Make room on the disk, or use another path."
                ) from error

    def uniqueness(self) -> Uniqueness:
        """How far IDs tell items apart."""
        ids = f"SELECT count(*) AS n FROM semid_codes GROUP BY {self._id_order}"
        found = self._fetch(f"SELECT count(*), count(*) FILTER (n = 1), coalesce(max(n), 0) FROM ({ids})")
        return Uniqueness(*found[0])

    def collision_counts(self) -> CollisionCounts:
        """What the collision policy did in all calls of ``add``."""
        return CollisionCounts(**self.meta("collisions") or {})

    def file_bytes(self) -> int:
        """The size of the file with its write-ahead log; 0 for an index in memory."""
        if self.path is None:
            return 0
        return sum(part.stat().st_size for part in (self.path, _wal(self.path)) if part.exists())

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
        with _errors_translated(self.path):
            cursor = self.cursor()
            for name, table in registered.items():
                cursor.register(name, table)
            try:
                with _interrupted_after(timeout, cursor):
                    return cursor.sql(query, params=params or None).to_arrow_table()
            finally:
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

    def _fetch(self, query: str, params: list[Any] | None = None) -> list[tuple[Any, ...]]:
        with _errors_translated(self.path):
            return self.cursor().execute(query, params or []).fetchall()

    def _has_table(self, name: str) -> bool:
        return bool(self._fetch("SELECT 1 FROM duckdb_tables() WHERE table_name = ? AND NOT internal", [name]))

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


class Appending:
    """Collects batches in a staging table; :meth:`finish` moves them to their place, sorted."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, layout: CodeLayout) -> None:
        self._cursor = cursor
        self._layout = layout
        self._proposed_levels: int | None = None
        self.next_row = 0
        cursor.execute(
            "CREATE OR REPLACE TEMP TABLE semid_staged AS SELECT * EXCLUDE (dup_rank) FROM semid_codes LIMIT 0"
        )

    def add(self, batch: ItemBatch) -> None:
        """Stage the codes of some items, and write their vectors and metadata."""
        import pyarrow as pa

        codes = {"row": batch.rows, "id": batch.ids, "sid": batch.sids}
        if batch.rest is not None:
            codes["sid_rest"] = fixed_size_list(batch.rest)
        codes["bucket"] = (batch.sids >> tables.bucket_shift(self._layout)).astype(np.int32)
        codes["norm2"] = batch.norms
        _run_over(self._cursor, pa.table(codes), "INSERT INTO semid_staged BY NAME SELECT * FROM batch")
        if batch.vectors:
            stored = {name: fixed_size_list(v) if v.ndim == 2 else pa.array(v) for name, v in batch.vectors.items()}
            vectors = pa.table({"row": batch.rows, **stored})
            _run_over(self._cursor, vectors, "INSERT INTO semid_vectors BY NAME SELECT * FROM batch")
        self._add_metadata(batch)
        self.next_row = int(batch.rows[-1]) + 1

    def below(self, prefixes: NDArray[np.integer]) -> Below:
        """Who is below each of some prefixes (m, depth), items that are staged included."""
        import pyarrow as pa

        depth = prefixes.shape[1]
        keys = _key_expressions(self._layout, depth)
        ids = "sid, sid_rest" if self._layout.rest_levels else "sid"
        wanted = {"prefix": np.arange(len(prefixes)), **_key_columns(prefixes, self._layout)}
        found = _read_over(
            self._cursor,
            pa.table(wanted),
            f"SELECT prefix, {_next_code(self._layout, depth)} AS code, count(*) AS items "
            f"FROM (SELECT {ids} FROM semid_codes UNION ALL SELECT {ids} FROM semid_staged) AS c "
            f"JOIN batch ON {' AND '.join(f'{sql} = batch.{name}' for name, sql in keys.items())} GROUP BY ALL",
        )
        return Below(*(found[name].to_numpy().astype(np.int64) for name in Below._fields))

    def propose(self, codes: NDArray[np.int32]) -> None:
        """Take note of what the quantizer proposes for some items, (n, L), for :meth:`proposed_uniqueness`."""
        import pyarrow as pa

        batch = pa.table(_key_columns(codes, self._layout))
        if self._proposed_levels is None:
            self._proposed_levels = codes.shape[1]
            _run_over(self._cursor, batch, "CREATE OR REPLACE TEMP TABLE semid_proposed AS FROM batch LIMIT 0")
        _run_over(self._cursor, batch, "INSERT INTO semid_proposed FROM batch")

    def proposed_uniqueness(self) -> Uniqueness:
        """What the proposals would add to the IDs in use and to the items alone; the largest group they would make."""
        if self._proposed_levels is None:
            return Uniqueness(0, 0, 0)
        keys = _key_expressions(self._layout, self._proposed_levels)
        names = ", ".join(f"key_{name}" for name in keys)
        old = ", ".join(f"{sql} AS key_{name}" for name, sql in keys.items())
        new = ", ".join(f"{name} AS key_{name}" for name in keys)
        found = self._cursor.execute(f"""
            WITH new AS (SELECT {new}, count(*) AS n FROM semid_proposed GROUP BY ALL),
                 old AS (SELECT {names}, count(*) AS n FROM (SELECT {old} FROM semid_codes AS c) GROUP BY ALL)
            SELECT count(*) FILTER (old.n IS NULL),
                   count(*) FILTER (old.n IS NULL AND new.n = 1) - count(*) FILTER (old.n = 1),
                   max(new.n + coalesce(old.n, 0))
            FROM new LEFT JOIN old USING ({names})
            """).fetchall()
        self._cursor.execute("DROP TABLE semid_proposed")
        self._proposed_levels = None
        return Uniqueness(*found[0])

    def save_collisions(self, counts: CollisionCounts) -> None:
        """What the collision policy did, this time included."""
        _write_meta(self._cursor, collisions=asdict(counts))

    def finish(self) -> None:
        """Move the staged codes into ``semid_codes`` in the order of their sids, and number those that share one."""
        key = ["sid", "sid_rest"] if self._layout.rest_levels else ["sid"]
        names = ", ".join(key)
        staged = ", ".join(f"staged.{name}" for name in key)
        same = " AND ".join(f"old.{name} = staged.{name}" for name in key)
        self._cursor.execute(f"""
            INSERT INTO semid_codes BY NAME
            WITH old AS (SELECT {names}, max(dup_rank) + 1 AS ranks FROM semid_codes GROUP BY {names})
            SELECT staged.*,
                   (coalesce(old.ranks, 0) + row_number() OVER (PARTITION BY {staged} ORDER BY staged.row) - 1)::INTEGER
                   AS dup_rank
            FROM semid_staged AS staged LEFT JOIN old ON {same}
            ORDER BY {staged}, staged.row
            """)
        tables.add_buckets(self._cursor.execute, self._layout, "semid_staged")
        self._cursor.execute("DROP TABLE semid_staged")

    def _add_metadata(self, batch: ItemBatch) -> None:
        import pyarrow as pa

        if batch.metadata is None:
            _run_over(self._cursor, pa.table({"id": batch.ids}), "INSERT INTO items (id) SELECT id FROM batch")
            return
        table = batch.metadata.add_column(0, "id", batch.ids)
        try:
            self._fit_columns(table)
            _run_over(self._cursor, table, "INSERT INTO items BY NAME SELECT * FROM batch")
        except _USER_ERRORS as error:
            raise InvalidArgumentError(
                f"The metadata cannot be stored in the table items: {_first_line(error)}. Give it as another type, or "
                "leave it out."
            ) from error

    def _fit_columns(self, table: pa.Table) -> None:
        """Make ``items`` take the columns of some metadata: add those that are new, check those that are not."""
        import pyarrow as pa

        known = {name.lower(): sql_type for name, sql_type, *_ in self._cursor.execute("DESCRIBE items").fetchall()}
        for name, sql_type, *_ in _run_over(self._cursor, table, "DESCRIBE SELECT * FROM batch"):
            all_missing = pa.types.is_null(table.schema.field(name).type)
            column = tables.quoted(name)
            if name.lower() not in known:
                new_type = "VARCHAR" if all_missing else sql_type
                self._cursor.execute(f"ALTER TABLE items ADD COLUMN {column} {new_type}")
            elif sql_type != known[name.lower()] and not all_missing:
                self._fit_column(table, column, sql_type, known[name.lower()])

    def _fit_column(self, table: pa.Table, column: str, given: str, kept: str) -> None:
        """Refuse values that would change on their way into a column of another type."""
        if self._cursor.execute(f"SELECT count({column}) FROM items").fetchall() == [(0,)]:
            self._cursor.execute(f"ALTER TABLE items ALTER COLUMN {column} TYPE {given}")
            return
        changed = f"CAST(TRY_CAST({column} AS {kept}) AS {given}) IS DISTINCT FROM {column}"
        found = _run_over(self._cursor, table, f"SELECT {column}::VARCHAR FROM batch WHERE {changed} LIMIT 1")
        if found:
            raise InvalidArgumentError(
                f"The metadata column {column} has the type {given}, but in the index it is {kept}, which cannot hold "
                f"{str(found[0][0])[:80]!r}. Convert the column, or give it another name."
            )


def _key_expressions(layout: CodeLayout, depth: int) -> dict[str, str]:
    """SQL over the codes ``c`` for the first ``depth`` levels: columns that are equal where those levels are."""
    if depth <= layout.packed_levels:
        return {"sid": f"(c.sid >> {layout.shifts[depth - 1]})" if depth else "0"}
    return {"sid": "c.sid", "rest": f"c.sid_rest[:{depth - layout.packed_levels}]"}


def _key_columns(prefixes: NDArray[np.integer], layout: CodeLayout) -> dict[str, Any]:
    """The same columns for prefixes of an index with this layout, (n, depth)."""
    import pyarrow as pa

    depth = prefixes.shape[1]
    if not depth:
        return {"sid": np.zeros(len(prefixes), dtype=np.int64)}
    part = CodeLayout(layout.codebook_sizes[:depth])
    keys: dict[str, Any] = {"sid": pack(prefixes, part)}
    if part.rest_levels:
        rest = fixed_size_list(pack_rest(prefixes, part).astype(layout.rest_dtype))
        keys["rest"] = rest.cast(pa.list_(rest.type.value_type))
    return keys


def _next_code(layout: CodeLayout, depth: int) -> str:
    """SQL over the codes ``c`` for the code after the first ``depth`` levels; 0 after the last."""
    if depth == layout.levels:
        return "0"
    if depth < layout.packed_levels:
        return f"(c.sid >> {layout.shifts[depth]}) & {(1 << layout.bits[depth]) - 1}"
    return f"c.sid_rest[{depth - layout.packed_levels + 1}]"


def _subquery(table: str, columns: Mapping[str, str], *, where: str = "true") -> str:
    """Some expressions over one table under names of their own, where no other table's columns can be meant."""
    return f"(SELECT {', '.join(f'{sql} AS {name}' for name, sql in columns.items())} FROM {table} WHERE {where})"


def fixed_size_list(matrix: NDArray[Any]) -> pa.Array:
    """A (n, d) matrix as an Arrow column of fixed-size lists, without copying it."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def fixed_size_matrix(column: Any) -> NDArray[Any]:
    """An Arrow column of fixed-size lists as a (n, d) matrix."""
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in getattr(column, "chunks", [column])]
    if not parts:
        return np.empty((0, width), dtype=column.type.value_type.to_pandas_dtype())
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, width)


def _rest_of(codes: pa.Table) -> NDArray[np.integer] | None:
    """The levels that sids have no room for, (n, rest_levels); None for IDs that fit."""
    return fixed_size_matrix(codes["sid_rest"]) if "sid_rest" in codes.column_names else None


def _column(column: Any) -> NDArray[Any]:
    import pyarrow as pa

    return fixed_size_matrix(column) if pa.types.is_fixed_size_list(column.type) else column.to_numpy()


def _run_over(cursor: duckdb.DuckDBPyConnection, batch: pa.Table, query: str) -> list[tuple[Any, ...]]:
    """Run a query that reads the Arrow table under the name ``batch``."""
    cursor.register("batch", batch)
    try:
        return cursor.execute(query).fetchall()
    finally:
        with suppress(duckdb.TransactionException):  # the query failed, and its own error is the one to see
            cursor.unregister("batch")


def _read_over(cursor: duckdb.DuckDBPyConnection, batch: pa.Table, query: str) -> pa.Table:
    """The result of a query that reads the Arrow table under the name ``batch``."""
    cursor.register("batch", batch)
    try:
        return cursor.sql(query).to_arrow_table()
    finally:
        cursor.unregister("batch")


def _write_meta(cursor: duckdb.DuckDBPyConnection, **values: Any) -> None:
    for key, value in values.items():
        cursor.execute("INSERT OR REPLACE INTO semid_meta VALUES (?, ?)", [key, json.dumps(value)])


@contextmanager
def _interrupted_after(seconds: float | None, cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Stop what a cursor runs after so many seconds. A thread watches, for DuckDB itself has no time limit."""
    if seconds is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        wait = seconds
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


def _create_macros(
    cursor: duckdb.DuckDBPyConnection, config: IndexConfig, layout: CodeLayout, *, hierarchical: bool
) -> None:
    shape = IndexShape(
        layout,
        config.dim,
        config.metric,
        config.vectors,
        codeword_levels=tables.codeword_levels(cursor.execute),
        hierarchical=hierarchical,
        greedy=encodes_greedily(config.quantizer, config.quantizer_config),
    )
    for statement in create_macros(shape):
        cursor.execute(statement)


def _insert_codebook(cursor: duckdb.DuckDBPyConnection, level: int, codebook: NDArray[np.float32]) -> None:
    import pyarrow as pa

    words = pa.table(
        {
            "level": np.full(len(codebook), level, dtype=np.uint8),
            "code": np.arange(len(codebook), dtype=np.uint16),
            "codeword": fixed_size_list(codebook),
        }
    )
    _run_over(cursor, words, "INSERT INTO semid_codebook SELECT * FROM batch")


def _connect(path: Path | None, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    with _errors_translated(path):
        return duckdb.connect(
            ":memory:" if path is None else str(path), read_only=read_only, config=dict(_CONNECT_CONFIG)
        )


def _check_is_database(path: Path) -> None:
    if not path.exists():
        raise IndexNotFoundError(f"There is no file {path}. Make an index with semid_index.create(path, dim=...).")
    if path.is_dir():
        raise NotAnIndexError(f"{path} is a folder. Give the path of the index's file.")
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise IndexFileError(f"{path} cannot be read: {error.strerror}. Change its permissions.") from error
    if head[8:12] != _DUCKDB_MAGIC:
        raise NotAnIndexError(
            f"{path} is not an index of semid-index: it is no DuckDB file. Make an index with semid_index.create."
        )


def _make_room(path: Path, *, overwrite: bool) -> None:
    if path.exists():
        if not overwrite:
            raise IndexExistsError(
                f"{path} exists. Open it with semid_index.open, or pass overwrite=True to replace it."
            )
        if path.is_dir():
            raise IndexExistsError(f"{path} is a folder, which is not overwritten. Give the path of a file.")
        _check_not_in_use(path)
        _remove(path)
    if not path.parent.is_dir():
        raise IndexFileError(f"There is no folder {path.parent}. Create it first.")


def _check_not_in_use(path: Path) -> None:
    """Refuse to overwrite an index that is open: whoever has it open would go on writing into a deleted file."""
    for read_only in (True, False):  # DuckDB refuses another connection of this process if its mode differs
        try:
            _connect(path, read_only=read_only).close()
        except IndexLockedError:
            raise
        except (IndexFileError, duckdb.Error):
            continue  # damaged, or no database: it is to be overwritten


def _remove(path: Path) -> None:
    try:
        for part in (path, _wal(path)):
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ReadOnlyError(
            f"{path} cannot be removed: {error.strerror}. Change the permissions of its folder, or use another path."
        ) from error


def _wal(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


# What DuckDB's message contains -> the error to raise, and what to say about the path. The first that fits is taken.
_TRANSLATIONS: tuple[tuple[str, type[SemidError], str], ...] = (
    (
        "lock on file",
        IndexLockedError,
        "{path} is open in another process{holder}. Close it there; or open it with read_only=True in every process.",
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
    ("IO Error", IndexFileError, "{path} cannot be used."),
)


@contextmanager
def _errors_translated(path: Path | None) -> Iterator[None]:
    """DuckDB's errors as ours, with what to do next; those that mean nothing to a user stay as they are."""
    try:
        yield
    except duckdb.IntegrityError as error:
        raise DuplicateIdError(f"An id is in the index already. Leave it out. ({_first_line(error)})") from error
    except duckdb.DataError:  # it quotes values, which can contain any words
        raise
    except duckdb.Error as error:
        message = str(error)
        holder = re.search(r"\(PID (\d+)\)", message)
        for words, kind, text in _TRANSLATIONS:
            if words in message:
                said = text.format(path=path or "The index", holder=f" (process {holder[1]})" if holder else "")
                raise kind(f"{said} ({_first_line(error)})") from error
        raise
