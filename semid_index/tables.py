"""The tables of an index, the view over them, and how older files become newer ones.

======================= ==========================================================================================
table                   what a row is
======================= ==========================================================================================
``semid_meta``          one setting, as JSON: format version, configuration, counters, report of the training
``semid_codebook``      one codeword: level and code, and its vector
``semid_array``         one other array that the quantizer learned, as raw little-endian bytes with type and shape
``semid_codes``         one item: its number ``row``, the user's ``id``, its codes; kept sorted by sid
``semid_history``       one ID that an item had and has no more: it was deleted, or its vector changed
``semid_buckets``       one bucket that has items; only where codewords add up and prefixes mean something
``semid_vectors``       one item's stored vector (``v``), and the tail codes that sharpen distances; by ``row``
``items``               the user's metadata, joined on ``id``
``semantic_ids``        a view: the codes as text and as columns, one for each level and each prefix
``semid_map``           a view: what the IDs of older versions have become
======================= ==========================================================================================

``docs/file-format.md`` has every column. A released migration is never edited; a change of the tables is a new one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from semid_index.codes import CodeLayout
from semid_index.errors import NewerFormatError
from semid_index.records import IdType, Tier

FORMAT_VERSION = 5
MAX_CODE_COLUMNS = 64  # the view has a column per level up to here; scalar quantization has one level per dimension
CHECKSUM_TYPE = "USMALLINT DEFAULT 0"
_ROUTING_BITS = 16  # the bucket column holds the longest prefix of whole levels that fits in so many bits

Execute = Callable[[str], Any]

ID_TYPES: dict[IdType, str] = {"int": "BIGINT", "str": "VARCHAR"}
_VECTOR_TYPES: dict[Tier, str] = {"float32": "FLOAT", "float16": "USMALLINT", "int8": "TINYINT"}


def quoted(name: str) -> str:
    """A name as an SQL identifier. Every name that reaches SQL passes through here."""
    return '"' + name.replace('"', '""') + '"'


def name_key(name: str) -> str:
    """What DuckDB compares of a name: the letters A to Z in small, all others as they are."""
    return name.translate(_SMALL)


_SMALL = {capital: capital + 32 for capital in range(ord("A"), ord("Z") + 1)}


def literal(text: str) -> str:
    """Text as an SQL literal. Every text that becomes part of a statement passes through here."""
    return "'" + text.replace("'", "''") + "'"


def check_format(found: int) -> None:
    """Refuse a file that a later version wrote."""
    if found > FORMAT_VERSION:
        raise NewerFormatError(
            f"The index has format {found}, this version of semid-index reads up to {FORMAT_VERSION}. "
            "Run: pip install --upgrade semid-index"
        )


def migrate(execute: Execute, found: int) -> None:
    """Bring a file of format ``found`` to today's, one numbered step after the other."""
    for step in _MIGRATIONS[found:]:
        step(execute)


def _m001_first_tables(execute: Execute) -> None:
    execute("CREATE TABLE semid_meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL)")
    execute(
        "CREATE TABLE semid_array "
        "(name VARCHAR PRIMARY KEY, dtype VARCHAR NOT NULL, shape BIGINT[] NOT NULL, data BLOB NOT NULL)"
    )


def _m002_buckets(execute: Execute) -> None:
    """The table of buckets, and a view whose prefix columns let DuckDB skip row groups; the store adds the macros."""
    settings = {key: json.loads(value) for key, value in execute("SELECT key, value FROM semid_meta").fetchall()}
    if "codebook_sizes" not in settings:
        return  # not trained: training makes everything
    layout, hierarchical = CodeLayout(tuple(settings["codebook_sizes"])), bool(settings["hierarchical"])
    execute(f"CREATE OR REPLACE VIEW semantic_ids AS {semantic_ids_query(layout, hierarchical=hierarchical)}")
    if hierarchical and codeword_levels(execute):
        create_bucket_table(execute)
        add_buckets(execute, layout)


def _m003_history(execute: Execute) -> None:
    """The table of IDs that items had."""
    settings = {key: json.loads(value) for key, value in execute("SELECT key, value FROM semid_meta").fetchall()}
    if "codebook_sizes" in settings:
        layout = CodeLayout(tuple(settings["codebook_sizes"]))
        create_history_table(execute, layout, settings.get("id_type", "int"))


def _m004_versions(execute: Execute) -> None:
    """The view from older versions of the IDs to the present one: there is none older yet."""
    execute("INSERT OR IGNORE INTO semid_meta VALUES ('version', '1')")
    if execute("SELECT 1 FROM semid_meta WHERE key = 'codebook_sizes'").fetchall():
        create_map_view(execute)


def _m005_checksums(execute: Execute) -> None:
    """Columns for the checksums of what is stored of each item; those that are there already get none."""
    found = execute(
        "SELECT schema_name, table_name, list(column_name) FROM duckdb_columns() "
        "WHERE table_name IN ('semid_codes', 'semid_vectors') AND database_name = current_database() "
        "AND (schema_name, table_name) IN (SELECT (schema_name, table_name) FROM duckdb_tables()) GROUP BY ALL"
    ).fetchall()
    for schema, table, columns in found:
        added = (
            ["checksum"]
            if table == "semid_codes"
            else [f"{name}_checksum" for name in ("v", "tail") if name in columns]
        )
        for name in added:
            execute(f"ALTER TABLE {schema}.{table} ADD COLUMN {name} {CHECKSUM_TYPE}")


_MIGRATIONS: tuple[Callable[[Execute], None], ...] = (
    _m001_first_tables,
    _m002_buckets,
    _m003_history,
    _m004_versions,
    _m005_checksums,
)


def create_codebook_table(execute: Execute, dim: int) -> None:
    """The table of codewords; ``level`` counts from 1, as everywhere in SQL."""
    execute(
        "CREATE TABLE semid_codebook (level UTINYINT NOT NULL, code USMALLINT NOT NULL, "
        f"codeword FLOAT[{dim}] NOT NULL, PRIMARY KEY (level, code))"
    )


def clear_training(execute: Execute) -> None:
    """Remove what training wrote, and the codes of all items."""
    for table in ("semid_codes", "semid_codebook", "semid_buckets"):
        execute(f"DROP TABLE IF EXISTS main.{table}")
    execute("DELETE FROM main.semid_array")


def create_bucket_table(execute: Execute) -> None:
    """The table of buckets with items, from which a search in SQL chooses those that it opens."""
    execute("CREATE TABLE semid_buckets (bucket INTEGER NOT NULL, norm2 FLOAT NOT NULL)")


def create_history_table(execute: Execute, layout: CodeLayout, id_type: IdType) -> None:
    """The table of IDs that items had. None of them is given again."""
    rest = f", sid_rest {rest_type(layout)} NOT NULL" if layout.rest_levels else ""
    execute(
        f"CREATE TABLE semid_history (id {ID_TYPES[id_type]} NOT NULL, sid BIGINT NOT NULL{rest}, "
        "dup_rank INTEGER NOT NULL, version INTEGER NOT NULL, until TIMESTAMP NOT NULL)"
    )


def add_buckets(execute: Execute, layout: CodeLayout, source: str = "semid_codes") -> None:
    """Write down the buckets of the items in ``source`` that are new. The index has a table for them."""
    new = f"(SELECT DISTINCT bucket FROM {source} ANTI JOIN semid_buckets USING (bucket))"
    if not execute(f"SELECT 1 FROM {new} LIMIT 1").fetchall():  # most often; what follows takes several times as long
        return
    codes = bucket_expressions(layout)[: codeword_levels(execute)]
    words = [f"w{level}" for level in range(1, len(codes) + 1)]
    joins = " ".join(
        f"JOIN semid_codebook AS {word} ON {word}.level = {level} AND {word}.code = {code}"
        for level, (word, code) in enumerate(zip(words, codes, strict=True), 1)
    )
    # |w1 + w2 + ...|^2, from the products of all pairs
    products = " + ".join(f"array_inner_product({a}.codeword, {b}.codeword)" for a in words for b in words)
    execute(f"INSERT INTO semid_buckets SELECT bucket, {products} FROM {new} {joins}")


def codeword_levels(execute: Execute) -> int:
    """How many of the first levels have codewords; 0 for a quantizer without codebooks."""
    if not has_table(execute, "semid_codebook"):
        return 0
    return int(execute("SELECT count(DISTINCT level) FROM semid_codebook").fetchall()[0][0])


def has_table(execute: Execute, name: str) -> bool:
    """Whether the database has a table of this name."""
    return bool(execute(f"SELECT 1 FROM duckdb_tables() WHERE table_name = '{name}' AND NOT internal").fetchall())


def create_item_tables(
    execute: Execute, layout: CodeLayout, *, dim: int, id_type: IdType, tier: Tier, tail_bytes: int, hierarchical: bool
) -> None:
    """The tables that hold items, empty, and the view over them; an earlier empty set is replaced."""
    for view in ("semid_map", "semantic_ids"):
        execute(f"DROP VIEW IF EXISTS {view}")
    for table in ("semid_codes", "semid_vectors", "semid_history", "items"):
        execute(f"DROP TABLE IF EXISTS {table}")
    create_code_table(execute, layout, id_type)
    if columns := vector_columns(dim, tier, tail_bytes):
        execute(f"CREATE TABLE semid_vectors (row BIGINT NOT NULL, {', '.join(columns.values())})")
    create_history_table(execute, layout, id_type)
    execute(f"CREATE TABLE items (id {ID_TYPES[id_type]} NOT NULL)")
    execute(f"CREATE VIEW semantic_ids AS {semantic_ids_query(layout, hierarchical=hierarchical)}")
    create_map_view(execute)


def create_code_table(execute: Execute, layout: CodeLayout, id_type: IdType) -> None:
    """The table of codes, empty."""
    rest = f", sid_rest {rest_type(layout)} NOT NULL" if layout.rest_levels else ""
    execute(
        f"CREATE TABLE semid_codes (row BIGINT NOT NULL, id {ID_TYPES[id_type]} PRIMARY KEY, "
        f"sid BIGINT NOT NULL{rest}, bucket INTEGER NOT NULL, dup_rank INTEGER NOT NULL, norm2 FLOAT NOT NULL, "
        f"checksum {CHECKSUM_TYPE})"
    )


def create_map_view(execute: Execute, kept: Sequence[int] = ()) -> None:
    """The view from the IDs of older versions, those in the schemas ``semid_v1`` and so on, to the present ones."""
    columns = "new.id, {old}.version AS old_version, new.version AS new_version, {old}.semantic_id AS old, "
    columns += "new.semantic_id AS new"
    queries = [
        f"SELECT {columns.format(old='old')} FROM semid_v{version}.semantic_ids AS old "
        "JOIN main.semantic_ids AS new ON new.id = old.id"
        for version in kept
    ] or [f"SELECT {columns.format(old='new')} FROM semantic_ids AS new WHERE false"]
    execute(f"CREATE OR REPLACE VIEW semid_map AS {' UNION ALL '.join(queries)}")


def vector_columns(dim: int, tier: Tier, tail_bytes: int) -> dict[str, str]:
    """The columns of ``semid_vectors`` beside ``row``: name -> declaration. Empty if nothing is stored."""
    columns = {}
    if tier != "none":
        columns["v"] = f"v {_VECTOR_TYPES[tier]}[{dim}] NOT NULL"
    if tier == "int8":
        columns["scale"] = "scale FLOAT NOT NULL"
    if tail_bytes:
        columns["tail"] = f"tail UTINYINT[{tail_bytes}] NOT NULL"
    for name in ("v", "tail"):
        if name in columns:
            columns[f"{name}_checksum"] = f"{name}_checksum {CHECKSUM_TYPE}"
    return columns


def rest_type(layout: CodeLayout) -> str:
    """The SQL type of the levels that the sid has no room for."""
    return f"{'UTINYINT' if layout.rest_dtype.itemsize == 1 else 'USMALLINT'}[{layout.rest_levels}]"


def bucket_depth(layout: CodeLayout) -> int:
    """How many of the first levels make a bucket: at least one, at most 16 bits of them."""
    depth = 1
    while depth < layout.packed_levels and sum(layout.bits[: depth + 1]) <= _ROUTING_BITS:
        depth += 1
    return depth


def bucket_shift(layout: CodeLayout) -> int:
    """How far a sid is shifted right to give its bucket."""
    return layout.shifts[bucket_depth(layout) - 1]


def bucket_expressions(layout: CodeLayout) -> list[str]:
    """SQL for the codes that the column ``bucket`` is made of."""
    shift = bucket_shift(layout)
    return [
        f"((bucket >> {layout.shifts[level] - shift}) & {(1 << layout.bits[level]) - 1})"
        for level in range(bucket_depth(layout))
    ]


def code_expressions(layout: CodeLayout) -> dict[str, str]:
    """SQL for each level's code, ``c1`` and on, over the columns of ``semid_codes``."""
    expressions = {}
    for level, bits in enumerate(layout.bits[:MAX_CODE_COLUMNS]):
        if level < layout.packed_levels:
            expressions[f"c{level + 1}"] = f"((sid >> {layout.shifts[level]}) & {(1 << bits) - 1})::INTEGER"
        else:
            expressions[f"c{level + 1}"] = f"sid_rest[{level - layout.packed_levels + 1}]::INTEGER"
    return expressions


def prefix_expressions(layout: CodeLayout) -> dict[str, str]:
    """SQL for each prefix as an integer, ``p1`` and on, as deep as the sid reaches.

    A column as it is, where there is one, and else a quotient: DuckDB skips row groups by both, but not by a shift.
    """
    stored = {bucket_shift(layout): "bucket", 0: "sid"}
    return {f"p{level + 1}": stored.get(shift, f"(sid // {1 << shift})") for level, shift in enumerate(layout.shifts)}


def text_expression(layout: CodeLayout) -> str:
    """SQL for the text form of an ID."""
    packed = list(code_expressions(CodeLayout(layout.codebook_sizes[: layout.packed_levels])).values())
    parts = [*packed, *(["array_to_string(sid_rest, '-')"] if layout.rest_levels else [])]
    return f"concat_ws('-', {', '.join(parts)})"


def semantic_ids_query(layout: CodeLayout, *, hierarchical: bool, version: int = 1, codes: str = "semid_codes") -> str:
    """The definition of the view ``semantic_ids``. Prefix columns exist only where a prefix means something."""
    columns = {
        "id": "id",
        "sid": "sid",
        **({"sid_rest": "sid_rest"} if layout.rest_levels else {}),
        "semantic_id": text_expression(layout),
        **code_expressions(layout),
        **(prefix_expressions(layout) if hierarchical else {}),
        "dup_rank": "dup_rank",
        "version": str(version),
    }
    return "SELECT " + ", ".join(f"{sql} AS {name}" for name, sql in columns.items()) + f" FROM {codes}"


# -- what it all means ------------------------------------------------------------------------------------------------

SETTINGS: dict[str, str] = {
    "format_version": "the format of the file, a whole number; this page describes the newest",
    "config": "what the index is: the arguments of `create`",
    "next_row": "the number that the next new item gets",
    "collisions": "what the collision policy did in all calls of `add` and `upsert`; null for `share`, which does "
    "nothing",
    "codebook_sizes": "codewords per level, coarsest first; written by training, as are the next four",
    "hierarchical": "whether a prefix of the codes means something",
    "fingerprints": "the SHA-256 of each array that training learned: of its type, shape and values",
    "macros": "the SHA-256 of the statements that the macros were written with",
    "train_report": "what `train` reported, or `retrain`: rows, seconds, error and perplexity per level",
    "trained_at": "when that was, in UTC",
    "version": "the version of the IDs; 1 if it was never retrained",
    "drift": "how far items are from their codes: of those encoded first after training, and of those since",
    "id_type": '`"int"` or `"str"`; written by the first `add`',
}
"""The keys of ``semid_meta``, for ``docs/file-format.md``."""

COLUMNS: dict[str, dict[str, str]] = {
    "semantic_ids": {
        "id": "the user's id",
        "sid": "the packed codes: sorting by it puts alike items side by side",
        "sid_rest": "the codes of the levels that the sid has no room for; only where there are some",
        "semantic_id": "the codes as text, such as `12-153-87-21`",
        "c": "the code at each level, `c1` the coarsest; at most 64 columns",
        "p": "the first 1, 2, ... codes as one integer, as deep as the sid reaches; "
        "equal numbers mean equal prefixes; only where a prefix means something",
        "dup_rank": "0 for the first item with this ID, 1 for the second, and so on; with the ID it is unique, "
        "and given to no other item ever",
        "version": "the training that the ID comes from: 1, and one more each time the index was retrained",
    },
    "semid_map": {
        "id": "the user's id; only of items that both versions have",
        "old_version": "an older version; see [Versions of the IDs](#versions-of-the-ids)",
        "new_version": "the version of `semantic_ids`",
        "old": "the semantic ID in the older version",
        "new": "the semantic ID now",
    },
    "items": {"id": "the user's id; the other columns are the metadata, with the names and types they were given in"},
    "semid_codes": {
        "row": "the item's number, given once and in the order of writing: `upsert` gives a new one; "
        "it joins `semid_vectors`",
        "id": "the user's id",
        "sid": "the codes of the levels that fit into 63 bits",
        "sid_rest": "the codes of the other levels; only where there are some",
        "bucket": "the first codes alone, as many whole levels as fit into 16 bits (at least one); to join on from SQL",
        "dup_rank": "as in `semantic_ids`",
        "norm2": "the squared length of the vector that the codes decode to",
        "checksum": "1 to 65,521, of `row`, `id`, `sid` and `sid_rest`; 0 where there is none, as the item was written "
        "in an older format",
    },
    "semid_vectors": {
        "row": "the item's number; joins `semid_codes`",
        "v": '`FLOAT` for `vectors="float32"`, `TINYINT` for `"int8"`, `USMALLINT` with the bits of a half for '
        '`"float16"`, absent for `"none"`',
        "scale": 'with `"int8"`: the vector is about `v * scale`',
        "tail": "tail codes, two 4-bit codes per byte, the first in the low bits; absent without a tail",
        "v_checksum": "of `row`, `v` and `scale`, as in `semid_codes`",
        "tail_checksum": "of `row` and `tail`",
    },
    "semid_history": {
        "id": "the id of an item that was deleted, or has another ID now",
        "sid": "the ID it had: the codes of the levels that fit into 63 bits",
        "sid_rest": "the codes of the other levels; only where there are some",
        "dup_rank": "the rank it had among the items with this ID",
        "version": "as in `semantic_ids`",
        "until": "when it was deleted or changed, in UTC",
    },
    "semid_codebook": {
        "level": "1 for the coarsest",
        "code": "the number of the codeword in its codebook, from 0",
        "codeword": "the vector; an item decodes to the sum of its codewords",
    },
    "semid_buckets": {
        "bucket": "a bucket that has, or had, items",
        "norm2": "the squared length of the sum of its codewords",
    },
    "semid_array": {
        "name": "what the quantizer calls the array; `tail_codebooks` are the codewords of the tail",
        "dtype": "as NumPy writes it, such as `<f4`; always little-endian",
        "shape": "its lengths",
        "data": "its values, row by row",
    },
    "semid_meta": {"key": "the name of a setting, see below", "value": "its value, as JSON"},
}
"""What each column of each table means, for ``docs/file-format.md``. ``c`` and ``p`` stand for ``c1``, ``c2``, ..."""
