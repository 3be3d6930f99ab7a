"""What is in an index file, as arrays and Arrow tables.

Methods are named for the question they answer. Where the file has checksums, what is read is compared with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np
from numpy.typing import NDArray

from semid_index import checksums, tables
from semid_index.appending import rest_of
from semid_index.arrow import batches, fixed_size_matrix, numpy_column
from semid_index.codes import Prefix, prefix_range, unpack
from semid_index.database import USER_ERRORS, errors_translated, first_line, log_of, unique_name
from semid_index.errors import RESTORE, CorruptIndexError, FilterError, SearchTimeoutError, StorageError
from semid_index.filters import CheckedFilter
from semid_index.item_places import ItemPlaces
from semid_index.records import CollisionCounts, Uniqueness
from semid_index.session import Session
from semid_index.versions import kept_versions, schema_of

if TYPE_CHECKING:
    import pyarrow as pa

_READ_BYTES = 4 << 20  # of vectors, were they float32, that are read at a time
_READ_AHEAD = 1 << 20  # bytes of them that DuckDB may have ready; 2.0 would have ten times as many
_CHUNK = 2_048  # rows that DuckDB carries through a query together
_JOINS_PER_MAP = 16  # searches with a filter, since the last write, that are worth a map of the table items
_FEW_IDS, _MOST_IDS = 1_000, 2**63 - 1  # examples of a shelf: found one way, and for DuckDB a number at all
_MOST_MOVED = 1_000  # items that are looked up by id where the map is wrong, before it is given up


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


class Contents(Session):
    """What is in an open file."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: Path | None, *, read_only: bool) -> None:
        super().__init__(connection, path, read_only=read_only)
        self._known_code_columns: dict[str, str] = {}
        self._item_places: ItemPlaces | None = None
        # the first search with a filter reads the map, as a search reads all it needs
        self._joins, self._joined = _JOINS_PER_MAP, self.writes

    # -- the whole ----------------------------------------------------------------------------------------------------

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

    def versions(self) -> dict[int, dict[str, Any]]:
        """For each version of the IDs how many ``items`` it has, and its settings ``train_report`` and ``trained_at``.

        The present one comes last.
        """
        with self.reading(), self._reader() as cursor:
            found = {number: schema_of(number) for number in kept_versions(cursor.execute)}
            return {number: self._version(schema) for number, schema in (found | {self._newest(): "main"}).items()}

    def _newest(self) -> int:
        found = self._fetch("SELECT value FROM main.semid_meta WHERE key = 'version'")
        return int(json.loads(found[0][0])) if found else 1

    def _version(self, schema: str) -> dict[str, Any]:
        wanted = "key IN ('train_report', 'trained_at')"
        settings = self._fetch(f"SELECT key, value FROM {schema}.semid_meta WHERE {wanted}")
        items = int(self._fetch(f"SELECT count(*) FROM {schema}.semid_codes")[0][0])
        return {"items": items, **{key: json.loads(value) for key, value in settings}}

    def stamp(self) -> Stamp:
        """What tells the items of this moment from those of any other."""
        found = self._fetch(
            "SELECT any_value(value) FILTER (key = 'next_row'), any_value(value) FILTER (key = 'version'), "
            "(SELECT count(*) FROM semid_codes) FROM semid_meta"
        )
        next_row, version, items = found[0]
        return Stamp(int(version or 1), int(next_row), int(items))

    # -- codes and ids ------------------------------------------------------------------------------------------------

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

    def existing_ids(self, ids: pa.Array) -> list[Any]:
        """Those of the ids that the index has, at most ten of them."""
        import pyarrow as pa

        found = self.arrow("SELECT id FROM semid_codes JOIN wanted USING (id) LIMIT 10", wanted=pa.table({"id": ids}))
        return list(found["id"].to_pylist())

    def rows_of_ids(self, ids: pa.Array) -> NDArray[np.int64]:
        """The row of each id; -1 where the index has no such item."""
        import pyarrow as pa

        if len(ids) == 1:  # which DuckDB finds by its index; for a join it reads the ids of all items
            one = self._fetch("SELECT row FROM semid_codes WHERE id = ?", ids.to_pylist())
            return np.array([row for (row,) in one] or [-1], dtype=np.int64)
        wanted = pa.table({"id": ids, "position": np.arange(len(ids))})
        found = self.arrow("SELECT position, row FROM semid_codes JOIN wanted USING (id)", wanted=wanted)
        rows = np.full(len(ids), -1, dtype=np.int64)
        rows[found["position"].to_numpy()] = found["row"].to_numpy()
        return rows

    def largest_id(self) -> int:
        """The largest integer id from 0 on that an item has or had; -1 if there was none."""
        # not max(id): DuckDB 2.0 answers that from statistics, which keep what a failed commit wrote
        found = [
            int(id)
            for table in ("semid_codes", "semid_history")
            for (id,) in self._fetch(f"SELECT id FROM {table} ORDER BY id DESC LIMIT 1")
        ]
        return max([-1, *found])

    # -- vectors ------------------------------------------------------------------------------------------------------

    def vector_batches(
        self, *columns: str, rows: range | None = None
    ) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
        """The rows and the named columns of ``semid_vectors``, some thousand items at a time.

        Not more: threads of DuckDB make batches in advance, and what they have allocated, C libraries keep for them.
        """
        names = self._with_checksums(columns)
        together = max(1, _READ_BYTES // (4 * self.config.dim * _CHUNK)) * _CHUNK
        with errors_translated(self.path), self._reading_settings(), self._reader() as reader:
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
        query = f"SELECT v.row, {', '.join('v.' + name for name in names)} FROM semid_vectors v"
        if len(wanted) == 1:  # for a join, DuckDB reads more than the part of the file that has this row
            found = self.arrow(f"{query} WHERE v.row = ?", params=wanted.tolist())
        else:
            found = self.arrow(f"{query} JOIN wanted USING (row)", wanted=pa.table({"row": wanted}))
        self._check_vectors(numpy_column(found["row"]), {name: numpy_column(found[name]) for name in names})
        order = np.argsort(numpy_column(found["row"]))
        if len(order) != len(wanted):
            raise CorruptIndexError(f"{len(wanted) - len(order)} stored vectors are missing from {self.path}.")
        return {name: numpy_column(found[name])[order][inverse] for name in columns}

    # -- filters ------------------------------------------------------------------------------------------------------

    def filter_columns(self) -> dict[str, str]:
        """What a filter may speak of: name -> SQL over the codes ``c`` joined with ``items i``.

        A column of the user's wins over one of ours with the same name.
        """
        users = {name: f"i.{tables.quoted(name)}" for name in self.item_columns() if name != "id"}
        taken = {tables.name_key(name) for name in users}
        return {name: f"c.{name}" for name in self._code_columns() if name not in taken} | users

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

        if any(tables.name_key(name) == "rowid" for name in columns):  # it hides DuckDB's own
            return None
        writes = self.writes if self._reader_of_thread() is None else self._moments.writes
        if self.writes_begun != writes:  # of what is read here, nobody can tell whether it is from before or after
            return None
        known = self._item_places
        if known is None or known.writes != writes:
            if self._joined != writes:
                self._joins, self._joined = 0, writes
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

    # -- items --------------------------------------------------------------------------------------------------------

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
            f"SELECT {names}, count(*) AS n, {_first_ids(examples)} FROM "
            f"(SELECT {keys}, id, row AS position FROM semid_codes WHERE {self._under(under)}) "
            f"GROUP BY {names} ORDER BY n DESC, {names}"
        )
        return [(tuple(row[:depth]), int(row[depth]), list(row[depth + 1] or ())) for row in found]

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
        place = tables.literal(str(part.absolute()))
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

    # -- counts and sizes ---------------------------------------------------------------------------------------------

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

    # -- parts --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _converting(self, vector: VectorColumn | None) -> Iterator[tuple[duckdb.DuckDBPyConnection, str]]:
        """A cursor, and SQL over ``semid_vectors v`` for float32 vectors."""
        stored = [] if vector is None else [f"v.{name}" for name in vector.stored]
        with closing(self.cursor()) as cursor:
            if vector is None or vector.convert is None:
                yield cursor, "".join(stored)
                return
            types = dict(cursor.execute("SELECT column_name, column_type FROM (DESCRIBE semid_vectors)").fetchall())
            function = unique_name("semid_float32")
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
        names = [name for name in self.item_columns() if tables.name_key(name) not in ("id", "semantic_id")]
        return "".join(f", i.{tables.quoted(name)}" for name in names)


def _subquery(table: str, columns: Mapping[str, str], *, where: str = "true") -> str:
    """Some expressions over one table under names of their own, where no other table's columns can be meant."""
    return f"(SELECT {', '.join(f'{sql} AS {name}' for name, sql in columns.items())} FROM {table} WHERE {where})"


def _first_ids(count: int) -> str:
    """SQL for a list of the first ids of a group, by their ``position``."""
    if count == 0:
        return "[]"
    if count <= _FEW_IDS:  # in less time, and without a list of all of them; DuckDB takes no million here
        return f"arg_min(id, position, {count})"
    return f"list(id ORDER BY position)[:{min(count, _MOST_IDS)}]"


def _where_row(rows: range | None) -> str:
    return "" if rows is None else f" WHERE row >= {rows.start} AND row < {rows.stop}"
