"""A whole database, table by table, into a new one that is attached beside it.

What is there is found out, not listed: the user's own tables, views and macros come along, and so do tables that later
versions add.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from graphlib import TopologicalSorter

from semid_index.tables import Execute, literal, quoted

_Table = tuple[str, str]  # schema and name

_ID_COLUMNS = ("sid", "sid_rest", "row")
_OURS = "semid_"


def copy_database(execute: Execute, source: str, target: str, *, plain: Collection[str] = ()) -> None:
    """Copy all tables, views, macros, types, sequences and indexes into the empty database ``target``.

    Tables of ours with IDs are sorted by them; all others keep their order. Those that are ``plain`` are not
    compressed, as far as they are written before the transaction ends, in which this is to be called.
    """
    execute(f"COPY FROM DATABASE {quoted(source)} TO {quoted(target)} (SCHEMA)")
    all_columns = _columns(execute, source)
    compression = "auto"
    execute(f"SET force_compression = '{compression}'")
    for schema, table in _tables(execute, source):
        columns = all_columns[schema, table]
        listed = ", ".join(map(quoted, columns))
        names = [f"{quoted(database)}.{quoted(schema)}.{quoted(table)}" for database in (target, source)]
        has_ids = table.startswith(_OURS) and "sid" in columns
        order = f" ORDER BY {', '.join(name for name in _ID_COLUMNS if name in columns)}" if has_ids else ""
        wanted = "uncompressed" if table in plain else "auto"
        if wanted != compression:
            compression = wanted
            execute(f"SET force_compression = '{compression}'")
        execute(f"INSERT INTO {names[0]} ({listed}) SELECT {listed} FROM {names[1]}{order}")


def _tables(execute: Execute, database: str) -> list[_Table]:
    """All tables, each after those that its foreign keys speak of."""
    of_database = f"database_name = {literal(database)}"
    found = execute(
        f"SELECT schema_name, table_name FROM duckdb_tables() WHERE {of_database} AND NOT internal"
    ).fetchall()
    needs: dict[_Table, set[_Table]] = {table: set() for table in sorted(found)}
    keys = execute(
        "SELECT schema_name, table_name, referenced_table FROM duckdb_constraints() "
        f"WHERE {of_database} AND constraint_type = 'FOREIGN KEY'"
    ).fetchall()
    for schema, table, other in keys:
        if other != table:
            needs[schema, table].add((schema, other))
    return list(TopologicalSorter(needs).static_order())


def _columns(execute: Execute, database: str) -> dict[_Table, list[str]]:
    """The columns of each table that can be written: all but those that are computed."""
    found = execute(
        "SELECT schema_name, table_name, column_name, column_default FROM duckdb_columns() "
        f"WHERE database_name = {literal(database)} AND NOT internal ORDER BY column_index"
    ).fetchall()
    known: dict[_Table, dict[str, str | None]] = {}
    for schema, table, column, default in found:
        known.setdefault((schema, table), {})[column] = default
    return {table: _written(execute, database, table, columns) for table, columns in known.items()}


def _written(execute: Execute, database: str, table: _Table, columns: Mapping[str, str | None]) -> list[str]:
    """Those of some columns, given with their defaults, that are not computed."""
    if not any(columns.values()):
        return list(columns)
    name = ".".join(map(quoted, (database, *table)))
    defaults = {column: default for column, _, _, _, default, _ in execute(f"DESCRIBE {name}").fetchall()}
    # DuckDB lists what computes a column as its default in one place, and not in the other
    return [column for column, default in columns.items() if default is None or defaults[column] is not None]
