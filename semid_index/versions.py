"""Versions of the IDs: what was trained and encoded before stays beside what is now, until it is dropped.

The newest version has its tables where they always are. Version 1, once there is a version 2, has its own in the schema
``semid_v1``: codes, codebooks, buckets and other arrays, and settings. Whoever puts that schema first (``SET
search_path = 'semid_v1,main'``) reads version 1 under the same names, macros included. Vectors and metadata belong to
all versions.

Everything here takes ``execute``, and is to be called inside a transaction if it writes.
"""

from __future__ import annotations

import re

from semid_index import checksums
from semid_index.codes import CodeLayout
from semid_index.tables import Execute, create_map_view, quoted, semantic_ids_query

VERSION_SETTINGS = (
    "version",
    "config",
    "codebook_sizes",
    "hierarchical",
    "fingerprints",
    "macros",
    "train_report",
    "trained_at",
    "collisions",
    "drift",
)
"""The settings that each version has its own of."""

PRESENT = "coalesce((SELECT value::INTEGER FROM main.semid_meta WHERE key = 'version'), 1)"
"""SQL for the number of the present version."""

_SCHEMA = re.compile(r"semid_v(\d+)")
_KEPT = ("semid_codes", "semid_codebook", "semid_buckets", "semid_array")


def schema_of(version: int) -> str:
    """Where the tables of an older version are."""
    return f"semid_v{version}"


def kept_versions(execute: Execute) -> list[int]:
    """The older versions that were not dropped."""
    found = execute("SELECT schema_name FROM duckdb_schemas() WHERE database_name = current_database()").fetchall()
    return sorted(int(match[1]) for (name,) in found if (match := _SCHEMA.fullmatch(name)))


def keep_version(execute: Execute, version: int, layout: CodeLayout, *, hierarchical: bool) -> None:
    """Copy what belongs to the present version to the schema of its number."""
    schema = schema_of(version)
    tables = {name for (name,) in execute("SELECT table_name FROM duckdb_tables() WHERE NOT internal").fetchall()}
    execute(f"CREATE SCHEMA {schema}")
    for table in _KEPT:
        if table in tables:
            order = " ORDER BY sid, row" if table == "semid_codes" else ""
            execute(f"CREATE TABLE {schema}.{table} AS FROM main.{table}{order}")
    own = ", ".join(f"'{name}'" for name in VERSION_SETTINGS)
    execute(f"CREATE TABLE {schema}.semid_settings AS FROM main.semid_meta WHERE key IN ({own})")
    execute(
        f"CREATE VIEW {schema}.semid_meta AS SELECT key, value FROM {schema}.semid_settings "
        f"UNION ALL SELECT key, value FROM main.semid_meta WHERE key NOT IN ({own})"
    )
    if "semid_vectors" in tables:
        columns = ", ".join(quoted(name) for name, *_ in execute("DESCRIBE main.semid_vectors").fetchall())
        execute(
            f"CREATE VIEW {schema}.semid_vectors AS SELECT {columns} FROM main.semid_vectors "
            f"SEMI JOIN {schema}.semid_codes USING (row)"
        )
    query = semantic_ids_query(layout, hierarchical=hierarchical, version=version, codes=f"{schema}.semid_codes")
    execute(f"CREATE VIEW {schema}.semantic_ids AS {query}")


def drop_version(execute: Execute, version: int) -> None:
    """Remove an older version, and what ``semid_map`` says of it."""
    create_map_view(execute, [other for other in kept_versions(execute) if other != version])
    execute(f"DROP SCHEMA {schema_of(version)} CASCADE")


def delete_rows(execute: Execute, rows: str) -> None:
    """Remove items from the older versions: those whose row numbers a query gives."""
    for version in kept_versions(execute):
        execute(f"DELETE FROM {schema_of(version)}.semid_codes WHERE row IN ({rows})")


def follow_rows(execute: Execute, old: str, new: str) -> None:
    """Let older versions point to the new rows of items, which have theirs in the tables ``old`` and ``new``."""
    for version in kept_versions(execute):
        checksum = checksums.moved("kept.checksum", "kept.row", f"{new}.row")
        execute(
            f"UPDATE {schema_of(version)}.semid_codes AS kept SET row = {new}.row, checksum = {checksum} "
            f"FROM {old} JOIN {new} USING (id) WHERE kept.row = {old}.row"
        )
