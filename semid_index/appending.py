"""Items on their way into the tables: staged batch by batch, then moved to their place in the order of their sids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from semid_index import checksums, tables, versions
from semid_index.arrow import fixed_size_list, fixed_size_matrix
from semid_index.codes import CodeLayout, pack, pack_rest, unpack
from semid_index.collisions import Below
from semid_index.database import USER_ERRORS, first_line, read_over, run_over
from semid_index.errors import RESTORE, CorruptIndexError, InvalidArgumentError
from semid_index.quantizer import Vectors
from semid_index.records import CollisionCounts, Uniqueness

if TYPE_CHECKING:
    import pyarrow as pa

_TEXT_LISTS = re.compile(r"VARCHAR(?P<lists>(\[\d*\])+)")  # the type of lists of text, or of lists of such lists


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
    ranks: NDArray[np.int32] | None = None
    """The rank of each item among those with its ID, where it is known; -1 to be given one. None for all -1."""


@dataclass(frozen=True)
class Replaced:
    """Items that were taken out, for others with the same ids."""

    positions: NDArray[np.int64]
    """Where their ids are among those asked for."""
    rows: NDArray[np.int64]
    codes: NDArray[np.int32]
    """(m, levels)"""
    ranks: NDArray[np.int32]
    """``dup_rank``"""


class Appending:
    """Collects batches in a staging table; :meth:`finish` moves them to their place, sorted."""

    def __init__(
        self,
        cursor: duckdb.DuckDBPyConnection,
        layout: CodeLayout,
        *,
        next_row: int,
        version: int,
        has_table: Callable[[str], bool],
        replacing: bool = False,
    ) -> None:
        self._cursor = cursor
        self._layout = layout
        self._version = version
        self._has_vectors, self._has_buckets = has_table("semid_vectors"), has_table("semid_buckets")
        self._replacing = replacing
        self._replaced = self._ranked = False
        self._proposed_levels: int | None = None
        self.next_row = next_row
        cursor.execute("CREATE OR REPLACE TEMP TABLE semid_staged AS FROM semid_codes LIMIT 0")

    @property
    def _id_order(self) -> str:
        return "sid, sid_rest" if self._layout.rest_levels else "sid"

    def replace(self, ids: pa.Array) -> Replaced:
        """Take the items with these ids out; others with the same ids have to be added then."""
        import pyarrow as pa

        wanted = pa.table({"id": ids, "position": np.arange(len(ids))})
        found = read_over(
            self._cursor,
            wanted,
            f"SELECT position, row, {self._id_order}, dup_rank FROM semid_codes JOIN batch USING (id)",
        )
        if found.num_rows:
            keep = "INSERT INTO semid_replaced" if self._replaced else "CREATE OR REPLACE TEMP TABLE semid_replaced AS"
            run_over(self._cursor, wanted, f"{keep} FROM semid_codes WHERE id IN (SELECT id FROM batch)")
            run_over(self._cursor, wanted, "DELETE FROM semid_codes WHERE id IN (SELECT id FROM batch)")
            self._replaced = True
        codes = unpack(found["sid"].to_numpy(), self._layout, rest_of(found))
        positions, rows, ranks = (found[name].to_numpy() for name in ("position", "row", "dup_rank"))
        return Replaced(positions, rows, codes, ranks)

    def add(self, batch: ItemBatch) -> None:
        """Stage the codes of some items, and write their vectors and metadata."""
        import pyarrow as pa

        self.add_codes(batch)
        if batch.vectors:
            stored = {name: fixed_size_list(v) if v.ndim == 2 else pa.array(v) for name, v in batch.vectors.items()}
            vectors = pa.table({"row": batch.rows, **stored, **_checksums(batch)})
            run_over(self._cursor, vectors, "INSERT INTO semid_vectors BY NAME SELECT * FROM batch")
        self._add_metadata(batch)
        self.next_row = int(batch.rows[-1]) + 1

    def add_codes(self, batch: ItemBatch) -> None:
        """Stage the codes of some items, and nothing else."""
        import pyarrow as pa

        codes = {"row": batch.rows, "id": batch.ids, "sid": batch.sids}
        if batch.rest is not None:
            codes["sid_rest"] = fixed_size_list(batch.rest)
        codes["bucket"] = (batch.sids >> tables.bucket_shift(self._layout)).astype(np.int32)
        codes["norm2"] = batch.norms
        codes["checksum"] = checksums.of_codes(batch.rows, batch.ids, batch.sids, batch.rest)
        if batch.ranks is not None:
            codes["dup_rank"] = pa.array(batch.ranks, mask=batch.ranks < 0)
            self._ranked |= bool((batch.ranks >= 0).any())
        run_over(self._cursor, pa.table(codes), "INSERT INTO semid_staged BY NAME SELECT * FROM batch")

    def below(self, prefixes: NDArray[np.integer]) -> Below:
        """Who is below each of some prefixes (m, depth), items that are staged included."""
        import pyarrow as pa

        depth = prefixes.shape[1]
        keys = _key_expressions(self._layout, depth)
        ids = "sid, sid_rest" if self._layout.rest_levels else "sid"
        wanted = {"prefix": np.arange(len(prefixes)), **_key_columns(prefixes, self._layout)}
        found = read_over(
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
            run_over(self._cursor, batch, "CREATE OR REPLACE TEMP TABLE semid_proposed AS FROM batch LIMIT 0")
        run_over(self._cursor, batch, "INSERT INTO semid_proposed FROM batch")

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
        write_meta(self._cursor, collisions=asdict(counts))

    def save_drift(self, sums: Mapping[str, Any]) -> None:
        """How far items are from their codes, these included."""
        write_meta(self._cursor, drift=sums)

    def claim_ranks(self) -> list[Any]:
        """Let staged items have the IDs and ``dup_rank`` that they come with, also those that they had here before.

        Gives the ids of some for which that cannot be, since another item has them, or had.
        """
        key = [*self._id_order.split(", "), "dup_rank"]
        names, present = ", ".join(key), f"version = {self._version}"
        others = " UNION ALL ".join(
            f"(SELECT id, {names} FROM {source})"
            for source in ("semid_codes", f"semid_history WHERE {present}", "semid_staged")
        )
        found = self._cursor.execute(
            f"SELECT DISTINCT s.id FROM semid_staged s JOIN ({others}) AS other USING ({names}) "
            "WHERE other.id <> s.id ORDER BY s.id LIMIT 5"
        ).fetchall()
        same = " AND ".join(f"h.{name} = s.{name}" for name in ("id", *key))
        self._cursor.execute(f"DELETE FROM semid_history h USING semid_staged s WHERE h.{present} AND {same}")
        return [id for (id,) in found]

    def finish(self) -> None:
        """Move the staged codes into ``semid_codes`` in the order of their sids, and number those that share one.

        A rank that an item had is not given again, to whichever item.
        """
        if self._replaced:
            changed = "(FROM semid_replaced SEMI JOIN (FROM semid_staged WHERE dup_rank IS NULL) USING (id))"
            write_history(self._cursor, self._id_order, changed, self._version)
            versions.follow_rows(self._cursor.execute, "semid_replaced", "semid_staged")
            if self._has_vectors:
                self._cursor.execute("DELETE FROM semid_vectors WHERE row IN (SELECT row FROM semid_replaced)")
            self._cursor.execute("DROP TABLE semid_replaced")
        key = self._id_order.split(", ")
        names = self._id_order
        staged = ", ".join(f"staged.{name}" for name in key)
        same = " AND ".join(f"old.{name} = staged.{name}" for name in key)
        history = f"(FROM semid_history WHERE version = {self._version})"
        given = " UNION ALL ".join(
            f"(SELECT {names}, dup_rank FROM {table} WHERE dup_rank IS NOT NULL)"
            for table in ("semid_codes", history, *(["semid_staged"] if self._ranked else []))
        )
        ranked = " UNION ALL FROM semid_staged WHERE dup_rank IS NOT NULL" if self._ranked else ""
        self._cursor.execute(f"""
            INSERT INTO semid_codes BY NAME
            WITH old AS (SELECT {names}, max(dup_rank) + 1 AS ranks FROM ({given}) GROUP BY {names}),
                 new AS (SELECT staged.* REPLACE (
                            (coalesce(old.ranks, 0) - 1 + row_number() OVER (PARTITION BY {staged} ORDER BY staged.row))
                            ::INTEGER AS dup_rank)
                         FROM semid_staged AS staged LEFT JOIN old ON {same} WHERE staged.dup_rank IS NULL)
            FROM (FROM new{ranked}) AS staged
            ORDER BY {staged}, staged.row
            """)
        if self._has_buckets:
            tables.add_buckets(self._cursor.execute, self._layout, "semid_staged")
        self._cursor.execute("DROP TABLE semid_staged")

    def _add_metadata(self, batch: ItemBatch) -> None:
        import pyarrow as pa

        if batch.metadata is None or not batch.metadata.num_columns:
            new = " ANTI JOIN items USING (id)" if self._replacing else ""
            run_over(self._cursor, pa.table({"id": batch.ids}), f"INSERT INTO items (id) SELECT id FROM batch{new}")
            return
        table = _with_types(batch.metadata).add_column(0, "id", batch.ids)
        insert = "INSERT INTO items BY NAME SELECT * FROM batch"
        if self._replacing:
            names = [tables.quoted(name) for name in batch.metadata.column_names]
            insert = (
                "MERGE INTO items USING batch ON items.id = batch.id "
                f"WHEN MATCHED THEN UPDATE SET {', '.join(f'{name} = batch.{name}' for name in names)} "
                "WHEN NOT MATCHED THEN INSERT BY NAME"
            )
        try:
            self._fit_columns(table)
            run_over(self._cursor, table, insert)
        except USER_ERRORS as error:
            raise InvalidArgumentError(
                f"The metadata cannot be stored in the table items: {first_line(error)}. Give it as another type, or "
                "leave it out."
            ) from error

    def _fit_columns(self, table: pa.Table) -> None:
        """Make ``items`` take the columns of some metadata: add those that are new, check those that are not."""
        import pyarrow as pa

        described = self._cursor.execute("DESCRIBE items").fetchall()
        known = {tables.name_key(name): sql_type for name, sql_type, *_ in described}
        for name, given, *_ in run_over(self._cursor, table, "DESCRIBE SELECT * FROM batch"):
            all_missing = pa.types.is_null(table.schema.field(name).type)
            column, kept = tables.quoted(name), known.get(tables.name_key(name))
            if kept is None:
                self._cursor.execute(f"ALTER TABLE items ADD COLUMN {column} {'VARCHAR' if all_missing else given}")
            elif given != kept and not all_missing:
                if self._takes_any_type(column, given, kept):
                    self._cursor.execute(f"ALTER TABLE items ALTER COLUMN {column} TYPE {given}")
                else:
                    self._refuse_changes(table, column, given, kept)

    def _takes_any_type(self, column: str, given: str, kept: str) -> bool:
        """Whether a column has nothing but NULLs, and empty lists of a type that nobody gave, so that it may change."""
        something = f"{column} IS NOT NULL"
        if (text_lists := _TEXT_LISTS.fullmatch(kept)) and given.endswith(text_lists["lists"]):
            without_text = f'TRY_CAST({column} AS "NULL"{text_lists["lists"]})'
            something = f"CAST({without_text} AS {kept}) IS DISTINCT FROM {column}"
        return not self._cursor.execute(f"SELECT 1 FROM items WHERE {something} LIMIT 1").fetchall()

    def _refuse_changes(self, table: pa.Table, column: str, given: str, kept: str) -> None:
        """Refuse values that would change on their way into a column of another type."""
        changed = f"CAST(TRY_CAST({column} AS {kept}) AS {given}) IS DISTINCT FROM {column}"
        found = run_over(self._cursor, table, f"SELECT {column}::VARCHAR FROM batch WHERE {changed} LIMIT 1")
        if found:
            raise InvalidArgumentError(
                f"The metadata column {column} has the type {given}, but in the index it is {kept}, which cannot hold "
                f"{str(found[0][0])[:80]!r}. Convert the column, or give it another name."
            )


def _with_types(table: pa.Table) -> pa.Table:
    """The same table; lists, structs and maps in which something has no type, such as empty lists, have text there."""
    for position, field in enumerate(table.schema):
        if (kind := _text_for_null(field.type)) != field.type:
            table = table.set_column(position, field.with_type(kind), table.column(position).cast(kind))
    return table


def _text_for_null(kind: pa.DataType) -> pa.DataType:
    """A type with text wherever something in it has none: DuckDB 2 would keep that, and take nothing but NULL."""
    import pyarrow as pa

    def mended(field: pa.Field) -> pa.Field:
        return field.with_type(pa.string() if pa.types.is_null(field.type) else _text_for_null(field.type))

    if pa.types.is_struct(kind):
        return pa.struct([mended(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(mended(kind.key_field), mended(kind.item_field), keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(mended(kind.value_field), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(mended(kind.value_field))
    if pa.types.is_list(kind):
        return pa.list_(mended(kind.value_field))
    return kind


def uses_all_bits(vectors: Vectors) -> bool:
    """Whether most values need more than the upper 10 of the 23 bits of a float32's mantissa, as those of a model do.

    Whole numbers and values that came from float16 do not.
    """
    low_bits = vectors.view(np.uint32) & np.uint32(0x1FFF)
    return bool(np.count_nonzero(low_bits) > low_bits.size / 2)


def _checksums(batch: ItemBatch) -> dict[str, checksums.Checksums]:
    """The columns of ``semid_vectors`` that tell whether the others are as they were written."""
    found = {}
    if "v" in batch.vectors:
        found["v_checksum"] = checksums.of_vectors(batch.rows, batch.vectors["v"], batch.vectors.get("scale"))
    if "tail" in batch.vectors:
        found["tail_checksum"] = checksums.of_vectors(batch.rows, batch.vectors["tail"])
    return found


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


def rest_of(codes: pa.Table) -> NDArray[np.integer] | None:
    """The levels that sids have no room for, (n, rest_levels); None for IDs that fit."""
    return fixed_size_matrix(codes["sid_rest"]) if "sid_rest" in codes.column_names else None


def write_meta(cursor: duckdb.DuckDBPyConnection, **values: Any) -> None:
    """Write some settings, in the transaction of the cursor."""
    written = {key: json.dumps(value) for key, value in values.items()}
    pairs = [part for pair in written.items() for part in pair]
    cases, marks = "WHEN ? THEN ? " * len(written), ", ".join("?" * len(written))
    # most are there already, and this takes half the time of INSERT OR REPLACE
    found = cursor.execute(
        f"UPDATE semid_meta SET value = CASE key {cases}END WHERE key IN ({marks})", [*pairs, *written]
    ).fetchall()
    if found != [(len(written),)]:
        rows = ", ".join(["(?, ?)"] * len(written))
        cursor.execute(f"INSERT OR REPLACE INTO semid_meta VALUES {rows}", pairs)
        # the UPDATE and this find keys by DuckDB's index; if that is damaged, they do not see those that are there
        if cursor.execute("SELECT count(*) - count(DISTINCT key) FROM semid_meta").fetchall() != [(0,)]:
            raise CorruptIndexError(f"The index is damaged: DuckDB does not find its settings by their keys. {RESTORE}")


def write_history(cursor: duckdb.DuckDBPyConnection, id_columns: str, source: str, version: int) -> None:
    """Keep the IDs of some items, of the present version, which they have no more from now on."""
    names = f"id, {id_columns}, dup_rank"
    cursor.execute(
        f"INSERT INTO semid_history BY NAME SELECT {names}, {version} AS version, ? AS until FROM {source} "
        f"ORDER BY {id_columns}, dup_rank",
        [datetime.now(UTC).replace(tzinfo=None)],
    )
