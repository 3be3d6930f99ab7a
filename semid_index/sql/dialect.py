"""The SQLAlchemy dialect ``semid``: DuckDB, spoken over connections that lose no rows.

DuckDB's SQL follows PostgreSQL's, so its compilers are those of PostgreSQL with the differences below. Its catalogue
does not: reflection asks DuckDB's own functions. Why there is a dialect at all: docs/decisions/0008.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import duckdb
from sqlalchemy import URL, Connection, exc, pool, schema, types
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.dialects.postgresql.base import PGCompiler, PGIdentifierPreparer, PGTypeCompiler
from sqlalchemy.engine import default, reflection
from sqlalchemy.engine.interfaces import BindTyping
from sqlalchemy.sql import compiler
from sqlalchemy.sql.compiler import InsertmanyvaluesSentinelOpts

from semid_index.errors import InvalidArgumentError
from semid_index.sql import dbapi
from semid_index.sql.column_types import Array, Other, SizedInteger, parse_type
from semid_index.store import Store
from semid_index.tables import literal

# Where a table is looked for: temporary ones hide others, as in DuckDB itself.
_HERE = "database_name IN (current_database(), 'temp') AND lower(schema_name) = lower($1)"
_TABLE = f"{_HERE} AND lower(table_name) = lower($2)"


class Compiler(PGCompiler):
    """Statements, where DuckDB differs from PostgreSQL."""

    def visit_sequence(self, seq: Any, **kw: Any) -> str:  # type: ignore[override]
        return _next(self.preparer.format_sequence(seq))

    def _regexp_match(self, base_op: str, binary: Any, operator: Any, kw: Any) -> str:
        arguments = [self.process(binary.left, **kw), self.process(binary.right, **kw)]
        if flags := binary.modifiers["flags"]:
            arguments.append(literal(flags))
        return f"{'NOT ' if base_op.startswith('!') else ''}regexp_matches({', '.join(arguments)})"

    def for_update_clause(self, select: Any, **kw: Any) -> str:
        raise exc.CompileError("DuckDB has no FOR UPDATE. Transactions that change the same rows fail, so try again.")


class DDLCompiler(compiler.DDLCompiler):
    """Definitions. An integer primary key without a default has a sequence that comes and goes with its table."""

    def visit_create_table(self, create: Any, **kw: Any) -> str:
        sequence = self._own_sequence(create.element)
        before = f"CREATE SEQUENCE IF NOT EXISTS {sequence};" if sequence else ""
        return f"{before}{super().visit_create_table(create, **kw)}"  # type: ignore[no-untyped-call]

    def visit_drop_table(self, drop: Any, **kw: Any) -> str:
        sequence = self._own_sequence(drop.element)
        after = f";DROP SEQUENCE IF EXISTS {sequence}" if sequence else ""
        return f"{super().visit_drop_table(drop, **kw)}{after}"  # type: ignore[no-untyped-call]

    def get_column_default_string(self, column: schema.Column[Any]) -> str | None:
        if column.table is not None and column is _generated(column.table):
            return _next(self._own_sequence(column.table))
        return super().get_column_default_string(column)

    def _own_sequence(self, table: schema.Table) -> str:
        """The quoted name of the sequence that a table needs; empty if it needs none."""
        column = _generated(table)
        return "" if column is None else _own_sequence(self.preparer, table.name, column.name, table.schema)


class TypeCompiler(PGTypeCompiler):
    """Types, where DuckDB differs from PostgreSQL."""

    def visit_duckdb_array(self, type_: Array, **kw: Any) -> str:
        return f"{self.process(type_.item, **kw)}[{'' if type_.size is None else type_.size}]"

    def visit_duckdb_named(self, type_: SizedInteger | Other, **_kw: Any) -> str:
        return type_.name

    def visit_float(self, type_: types.Float[Any], **_kw: Any) -> str:
        """Python's floats have 53 bits; DuckDB's FLOAT has 24."""
        return "DOUBLE" if type_.precision is None or type_.precision > 24 else "FLOAT"

    def visit_REAL(self, type_: types.REAL[Any], **_kw: Any) -> str:
        return "FLOAT"

    def visit_double(self, type_: types.Double[Any], **kw: Any) -> str:
        return self.visit_DOUBLE(type_, **kw)

    def visit_numeric(self, type_: types.Numeric[Any], **kw: Any) -> str:
        """Without a precision, DuckDB would round to 3 decimals."""
        return "DECIMAL(38, 10)" if type_.precision is None else self.visit_NUMERIC(type_, **kw)

    def visit_TIMESTAMP(self, type_: types.TIMESTAMP, **_kw: Any) -> str:
        return "TIMESTAMP WITH TIME ZONE" if type_.timezone else "TIMESTAMP"

    def visit_TIME(self, type_: Any, **_kw: Any) -> str:
        return "TIME WITH TIME ZONE" if type_.timezone else "TIME"

    def visit_large_binary(self, type_: types.LargeBinary, **kw: Any) -> str:
        return self.visit_BLOB(type_, **kw)


class Preparer(PGIdentifierPreparer):
    """Quotes every name: in DuckDB that changes nothing but that keywords, which each version adds to, are allowed."""

    def _requires_quotes(self, value: str) -> bool:
        return True


class Context(default.DefaultExecutionContext):
    """One statement being run."""

    def fire_sequence(self, seq: Any, type_: Any) -> Any:
        return self._execute_scalar(f"SELECT {_next(self.identifier_preparer.format_sequence(seq))}", type_)


class Dialect(default.DefaultDialect):
    """DuckDB for SQLAlchemy, under the name ``semid``.

    ``index.engine()`` makes an engine over an open index. ``create_engine("semid:///catalog.duckdb")``, for tools that
    take a URL, opens the file; with ``?read_only=true`` for reading only.
    """

    name = "semid"
    driver = "duckdb"
    supports_statement_cache = True

    statement_compiler = Compiler
    ddl_compiler = DDLCompiler
    type_compiler_cls = TypeCompiler
    preparer = Preparer
    execution_ctx_cls = Context
    colspecs = {types.Interval: INTERVAL}  # noqa: RUF012 - as SQLAlchemy declares it

    supports_native_boolean = True
    supports_native_decimal = True
    supports_native_uuid = True
    supports_sane_multi_rowcount = False
    supports_sequences = True
    supports_comments = True
    supports_default_values = True
    supports_multivalues_insert = True
    supports_empty_insert = False
    postfetch_lastrowid = False
    div_is_floordiv = False
    insert_returning = True
    update_returning = True
    delete_returning = True
    update_returning_multifrom = True
    delete_returning_multifrom = True

    bind_typing = BindTyping.RENDER_CASTS  # for the types that ask for it, which arrays do

    # one INSERT with many rows, because DuckDB takes a millisecond for each statement, however small
    use_insertmanyvalues = True
    use_insertmanyvalues_wo_returning = True
    insertmanyvalues_page_size = 200
    # the rows of one page are numbered in their order: they are one chunk, which one thread works on
    insertmanyvalues_implicit_sentinel = InsertmanyvaluesSentinelOpts.ANY_AUTOINCREMENT

    # what PostgreSQL's compiler and, before SQLAlchemy 2.1, the type JSON ask a dialect
    _backslash_escapes = False
    _supports_jsonb_subscripting = False
    _json_serializer = None
    _json_deserializer = None

    # -- connections --------------------------------------------------------------------------------------------------

    @classmethod
    def import_dbapi(cls) -> ModuleType:
        return dbapi

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:
        return pool.QueuePool

    def create_connect_args(self, url: URL) -> tuple[list[Any], dict[str, Any]]:
        options = dict(url.query)
        read_only = options.pop("read_only", "false")
        if options or read_only not in ("true", "false"):
            raise InvalidArgumentError(f"{url}: the only option is read_only, 'true' or 'false'.")
        return [], {"path": url.database, "read_only": read_only == "true"}

    def connect(self, *_cargs: Any, **cparams: Any) -> Any:
        if cparams["path"] is None:
            raise InvalidArgumentError("semid:/// needs the path of an index. For one in memory, use index.engine().")
        store = Store.open(cparams["path"], read_only=cparams["read_only"])
        return dbapi.Connection(store.cursor(), store.close)

    def do_begin(self, dbapi_connection: Any) -> None:
        dbapi_connection.begin()

    def do_savepoint(self, connection: Connection, name: str) -> None:
        raise exc.InvalidRequestError(
            "DuckDB has no savepoints. Use a transaction, session.begin(), instead of begin_nested()."
        )

    def get_isolation_level_values(self, dbapi_conn: Any) -> Sequence[Any]:
        return ["SNAPSHOT", "AUTOCOMMIT"]

    def get_default_isolation_level(self, dbapi_conn: Any) -> Any:
        return "SNAPSHOT"

    def get_isolation_level(self, dbapi_connection: Any) -> Any:
        return "AUTOCOMMIT" if dbapi_connection.autocommit else "SNAPSHOT"

    def set_isolation_level(self, dbapi_connection: Any, level: Any) -> None:
        dbapi_connection.autocommit = level == "AUTOCOMMIT"

    def is_disconnect(self, e: Exception, connection: Any, cursor: Any) -> bool:
        return isinstance(e, duckdb.ConnectionException)

    # -- reflection ---------------------------------------------------------------------------------------------------

    def _get_server_version_info(self, connection: Connection) -> tuple[int, ...]:
        [(version,)] = _ask(connection, "SELECT version()")
        return tuple(int(part) for part in re.findall(r"\d+", version)[:3])

    def _get_default_schema_name(self, connection: Connection) -> str:
        [(name,)] = _ask(connection, "SELECT current_schema()")
        return str(name)

    def get_schema_names(self, connection: Connection, **kw: Any) -> list[str]:
        sql = "SELECT schema_name FROM duckdb_schemas() WHERE database_name = current_database() ORDER BY 1"
        return _names(connection, sql)

    def has_schema(self, connection: Connection, schema_name: str, **kw: Any) -> bool:
        return schema_name.lower() in (name.lower() for name in self.get_schema_names(connection))

    def get_table_names(self, connection: Connection, schema: str | None = None, **kw: Any) -> list[str]:
        sql = f"SELECT table_name FROM duckdb_tables() WHERE {_HERE} AND NOT temporary AND NOT internal ORDER BY 1"
        return _names(connection, sql, self._schema(schema))

    def get_temp_table_names(self, connection: Connection, schema: str | None = None, **kw: Any) -> list[str]:
        return _names(connection, "SELECT table_name FROM duckdb_tables() WHERE temporary ORDER BY 1")

    def get_view_names(self, connection: Connection, schema: str | None = None, **kw: Any) -> list[str]:
        sql = f"SELECT view_name FROM duckdb_views() WHERE {_HERE} AND NOT temporary AND NOT internal ORDER BY 1"
        return _names(connection, sql, self._schema(schema))

    def get_sequence_names(self, connection: Connection, schema: str | None = None, **kw: Any) -> list[str]:
        sql = f"SELECT sequence_name FROM duckdb_sequences() WHERE {_HERE} ORDER BY 1"
        return _names(connection, sql, self._schema(schema))

    def has_table(self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any) -> bool:
        self._ensure_has_table_connection(connection)
        sql = f"SELECT 1 FROM duckdb_columns() WHERE {_TABLE} LIMIT 1"
        return bool(_ask(connection, sql, self._schema(schema), table_name))

    def has_sequence(self, connection: Connection, sequence_name: str, schema: str | None = None, **kw: Any) -> bool:
        return sequence_name.lower() in (name.lower() for name in self.get_sequence_names(connection, schema))

    @reflection.cache
    def get_view_definition(self, connection: Connection, view_name: str, schema: str | None = None, **kw: Any) -> str:
        sql = f"SELECT sql FROM duckdb_views() WHERE {_HERE} AND lower(view_name) = lower($2)"
        found = _names(connection, sql, self._schema(schema), view_name)
        if not found:
            raise exc.NoSuchTableError(view_name)
        return found[0]

    @reflection.cache
    def get_columns(self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        found = _ask(
            connection,
            "SELECT column_name, data_type, is_nullable, column_default, comment FROM duckdb_columns() "
            f"WHERE {_TABLE} ORDER BY column_index",
            self._schema(schema),
            table_name,
        )
        if not found:
            raise exc.NoSuchTableError(table_name)
        columns = []
        for name, type_, nullable, value, comment in found:
            numbered = value == _next(_own_sequence(self.identifier_preparer, table_name, name, schema))
            columns.append(
                {
                    "name": name,
                    "type": parse_type(type_),
                    "nullable": nullable,
                    "default": None if numbered else value,
                    "autoincrement": numbered,
                    "comment": comment,
                }
            )
        return columns

    @reflection.cache
    def get_pk_constraint(self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        for name, columns, *_ in self._constraints(connection, table_name, schema, "PRIMARY KEY"):
            return {"name": name, "constrained_columns": columns}
        return {"name": None, "constrained_columns": []}

    @reflection.cache
    def get_unique_constraints(
        self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any
    ) -> Any:
        found = self._constraints(connection, table_name, schema, "UNIQUE")
        return [{"name": name, "column_names": columns} for name, columns, *_ in found]

    @reflection.cache
    def get_check_constraints(
        self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any
    ) -> Any:
        found = self._constraints(connection, table_name, schema, "CHECK")
        return [{"name": name, "sqltext": condition} for name, _, condition, *_ in found]

    @reflection.cache
    def get_foreign_keys(self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        return [
            {
                "name": name,
                "constrained_columns": columns,
                "referred_schema": schema,  # DuckDB has no foreign keys across schemas
                "referred_table": referred,
                "referred_columns": referred_columns,
                "options": {},
            }
            for name, columns, _, referred, referred_columns in self._constraints(
                connection, table_name, schema, "FOREIGN KEY"
            )
        ]

    @reflection.cache
    def get_indexes(self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        self._check_table(connection, table_name, schema)
        found = _ask(
            connection,
            f"SELECT index_name, is_unique, expressions::VARCHAR[] FROM duckdb_indexes() WHERE {_TABLE} ORDER BY 1",
            self._schema(schema),
            table_name,
        )
        return [_index(name, unique, parts) for name, unique, parts in found]

    @reflection.cache
    def get_table_comment(self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        self._check_table(connection, table_name, schema)
        tables = f"SELECT comment FROM duckdb_tables() WHERE {_TABLE}"
        views = f"SELECT comment FROM duckdb_views() WHERE {_HERE} AND lower(view_name) = lower($2)"
        [(comment,), *_] = _ask(connection, f"{tables} UNION ALL {views}", self._schema(schema), table_name)
        return {"text": comment}

    def get_table_options(self, connection: Connection, table_name: str, schema: str | None = None, **kw: Any) -> Any:
        return {}

    def _schema(self, schema: str | None) -> str:
        return schema or self.default_schema_name or "main"

    def _check_table(self, connection: Connection, table_name: str, schema: str | None) -> None:
        if not self.has_table(connection, table_name, schema):
            raise exc.NoSuchTableError(table_name)

    def _constraints(
        self, connection: Connection, table_name: str, schema: str | None, kind: str
    ) -> Sequence[Sequence[Any]]:
        """Name, columns, condition, and what a foreign key refers to, of each constraint of a kind."""
        self._check_table(connection, table_name, schema)
        return _ask(
            connection,
            "SELECT constraint_name, constraint_column_names, expression, referenced_table, referenced_column_names "
            f"FROM duckdb_constraints() WHERE {_TABLE} AND constraint_type = $3 ORDER BY constraint_index",
            self._schema(schema),
            table_name,
            kind,
        )


def _ask(connection: Connection, sql: str, *parameters: str) -> Sequence[Sequence[Any]]:
    return connection.exec_driver_sql(sql, parameters or None).all()


def _names(connection: Connection, sql: str, *parameters: str) -> list[str]:
    return [str(name) for (name,) in _ask(connection, sql, *parameters)]


def _generated(table: schema.Table) -> schema.Column[int] | None:
    """The primary key that numbers itself, if a table has one."""
    column = table.autoincrement_column
    return column if column is not None and column.server_default is None and column.default is None else None


def _own_sequence(preparer: compiler.IdentifierPreparer, table: str, column: str, schema_name: str | None) -> str:
    """The quoted name of the sequence that numbers a table's primary key."""
    return preparer.format_sequence(schema.Sequence(f"{table}_{column}_seq", schema=schema_name))


def _next(sequence: str) -> str:
    return f"nextval({literal(sequence)})"


def _index(name: str, unique: bool, parts: list[str]) -> dict[str, Any]:
    """An index for SQLAlchemy. DuckDB writes a column bare or quoted, and an expression in parentheses."""
    columns = [None if part.startswith("(") else _unquoted(part) for part in parts]
    index: dict[str, Any] = {"name": name, "unique": unique, "column_names": columns}
    if None in columns:
        index["expressions"] = [column or part for column, part in zip(columns, parts, strict=True)]
    return index


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
