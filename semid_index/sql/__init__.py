"""SQLAlchemy over an index: the engine, its tables, and what is said about semantic IDs in a query.

>>> import numpy as np, semid_index as semid
>>> from sqlalchemy import func, select
>>> from semid_index.sql import prefix, tables
>>> vectors = np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32)
>>> with semid.create(dim=16, levels=3, codebook_size=16) as index:
...     _ = index.train(vectors)
...     ids = index.add(vectors)
...     shelf = tables(index.engine())["semantic_ids"]
...     with index.engine().connect() as connection:
...         count = connection.scalar(select(func.count()).where(prefix(shelf.c.sid, "3")))
...     count == len(index.prefix("3"))
True
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    ForeignKeyConstraint,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    and_,
    case,
    create_engine,
    inspect,
    literal,
    or_,
    select,
    true,
    types,
)
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql import coercions, roles

from semid_index.codes import (
    MAX_CODEBOOK_SIZE,
    CodeLayout,
    Prefix,
    check_prefix,
    format_id,
    parse_prefix,
    prefix_range,
)
from semid_index.errors import InvalidArgumentError, InvalidCodesError
from semid_index.sql import dbapi
from semid_index.sql.column_types import Array, Other, Sid, SizedInteger
from semid_index.store import Store

__all__ = [
    "Array",
    "Other",
    "Sid",
    "SizedInteger",
    "common_prefix_len",
    "engine_of",
    "insert",
    "insert_arrow",
    "prefix",
    "tables",
]

_ANY_LAYOUT = CodeLayout((MAX_CODEBOOK_SIZE,) * 64)
_BATCH = "semid_batch"  # what Arrow data is called while it is inserted

registry.register("semid", "semid_index.sql.dialect", "Dialect")  # the entry point does the same, once installed


def engine_of(store: Store) -> Engine:
    """An engine whose connections are cursors of the store's own connection, as many as are asked for."""
    return create_engine(
        "semid://",
        creator=lambda: dbapi.Connection(store.cursor()),
        max_overflow=-1,  # a cursor costs little, and a thread that waits for one might hold what the others wait for
    )


def tables(bind: Engine | Connection, metadata: MetaData | None = None) -> Mapping[str, Table]:
    """All tables and views of an index, by name, as they are in the file.

    Beyond what reflection sees: ``sid`` knows how IDs are packed, which :func:`prefix` and :func:`common_prefix_len`
    need; and ``id`` is the primary key of ``semantic_ids`` and of ``items``, on which they join. So they can be mapped
    to classes as they are. ``metadata``: where to put them; new by default.
    """
    metadata = MetaData() if metadata is None else metadata
    with bind.connect() if isinstance(bind, Engine) else nullcontext(bind) as connection:
        metadata.reflect(connection, views=True)
        found = metadata.tables
        if "semantic_ids" in found:
            ids, items = found["semantic_ids"], found["items"]
            for table in (ids, items):
                table.append_constraint(PrimaryKeyConstraint(table.c.id))
                table.c.id.autoincrement = False
            ids.append_constraint(ForeignKeyConstraint([ids.c.id], [items.c.id]))
            if layout := _layout(connection, found["semid_meta"]):
                ids.c.sid.type = found["semid_codes"].c.sid.type = Sid(layout)
    return found


def prefix(column: Any, prefix: str | Sequence[int]) -> ColumnElement[bool]:
    """Whether an ID begins with a prefix such as "12-153" or (12, 153): to be used in ``where``.

    ``column``: the ``sid`` of a table from :func:`tables`, or of an alias or subquery of it; then this is a range of
    integers, with which DuckDB skips what cannot match. Or any column with IDs as text, such as ``semantic_id``, or one
    in a table of yours; then every row is looked at. Raises :class:`InvalidCodesError` if the prefix does not fit.
    """
    element = _expression(column)
    if isinstance(element.type, Sid):
        layout = element.type.layout
        codes = _codes(prefix, layout)
        low, high = prefix_range(codes, layout)
        rest = enumerate(codes[layout.packed_levels :], layout.packed_levels + 1)
        return and_(element.between(low, high - 1), *(_level(element, level) == code for level, code in rest))
    if isinstance(element.type, types.String):
        text = format_id(_codes(prefix, _ANY_LAYOUT))
        return or_(element == text, element.startswith(text + "-")) if text else true()
    raise InvalidArgumentError(
        f"{element} holds no semantic IDs. Use the column sid or semantic_id of a table from "
        "semid_index.sql.tables(engine), of an index whose quantizer gives prefixes a meaning."
    )


def common_prefix_len(a: Any, b: Any) -> ColumnElement[int]:
    """How many first codes two IDs share.

    Each is the ``sid`` of a table from :func:`tables` (or of an alias of it), or an ID or prefix such as "12-153-87-21"
    or (12, 153, 87, 21); at least one of them a ``sid``.
    """
    given = [value if isinstance(value, str | Sequence) else _expression(value) for value in (a, b)]
    types_ = [value.type for value in given if isinstance(value, ColumnElement)]
    layouts = [type_.layout for type_ in types_ if isinstance(type_, Sid)]
    if not layouts or len(layouts) < len(types_):
        raise InvalidArgumentError(
            "common_prefix_len takes the column sid of a table from semid_index.sql.tables(engine), and another one or "
            "an ID such as '12-153-87-21'."
        )
    layout = layouts[0]
    if layouts[-1] != layout:
        raise InvalidArgumentError("The two columns have IDs of different shapes, so they have no prefixes in common.")
    left, right = (value if isinstance(value, ColumnElement) else _codes(value, layout) for value in given)
    levels = min(len(value) if isinstance(value, tuple) else layout.levels for value in (left, right))
    equal = [and_(*_same(left, right, level, layout)) for level in range(1, levels + 1)]
    return sum((case((condition, 1), else_=0) for condition in equal), literal(0))


def insert_arrow(connection: Connection, table: Any, data: Any) -> int:
    """Insert Arrow data, or a pandas or polars data frame, in the transaction of a connection; returns the rows.

    ``table``: a :class:`~sqlalchemy.Table` or a mapped class. Columns are matched by name; those that are missing get
    their defaults. Many times quicker than ``connection.execute(insert(table), rows)``. From a session, pass
    ``session.connection()``. Errors are SQLAlchemy's, such as ``IntegrityError``.
    """
    target: Any = inspect(table).local_table if isinstance(table, type) else table
    name = connection.dialect.identifier_preparer.format_table(target)
    duck: Any = connection.connection.dbapi_connection
    if not connection.in_transaction():
        connection.begin()  # so that the name goes with the transaction, should it fail
    with duck.registered(_BATCH, data):
        return connection.exec_driver_sql(f"INSERT INTO {name} BY NAME SELECT * FROM {_BATCH}").rowcount


def _layout(connection: Connection, meta: Table) -> CodeLayout | None:
    """How IDs are packed; None where a prefix of them means nothing."""
    wanted = select(meta.c.key, meta.c.value).where(meta.c.key.in_(["hierarchical", "codebook_sizes"]))
    settings = {key: json.loads(value) for key, value in connection.execute(wanted)}
    return CodeLayout(tuple(settings["codebook_sizes"])) if settings["hierarchical"] else None


def _expression(column: Any) -> ColumnElement[Any]:
    """A column, also where an attribute of a mapped class is given."""
    element: ColumnElement[Any] = coercions.expect(roles.ExpressionElementRole, column)
    return element


def _codes(prefix: str | Sequence[int], layout: CodeLayout) -> Prefix:
    return parse_prefix(prefix, layout) if isinstance(prefix, str) else check_prefix(prefix, layout)


def _level(sid: ColumnElement[Any], level: int) -> ColumnElement[int]:
    """The code of a level that the sid has no room for: a column beside it."""
    beside = getattr(sid, "table", None)
    if beside is None or f"c{level}" not in beside.c:
        raise InvalidCodesError(
            f"The sid ends before level {level}. Use the sid of semantic_ids, or of a subquery that also has c{level}."
        )
    column: ColumnElement[int] = beside.c[f"c{level}"]
    return column


def _same(a: Any, b: Any, level: int, layout: CodeLayout) -> list[ColumnElement[bool]]:
    """What it takes for two IDs, as columns or codes, to be equal up to a level."""
    packed = min(level, layout.packed_levels)

    def parts(value: Any) -> list[Any]:
        shift = layout.shifts[packed - 1]
        if isinstance(value, tuple):
            return [prefix_range(value[:packed], layout)[0] >> shift, *value[packed:level]]
        return [value.bitwise_rshift(shift), *(_level(value, deeper) for deeper in range(packed + 1, level + 1))]

    return [left == right for left, right in zip(parts(a), parts(b), strict=True)]
