"""Column types: those of DuckDB that SQLAlchemy lacks, and the one that knows how semantic IDs are packed."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from sqlalchemy import types
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.sql import operators
from sqlalchemy.types import TypeEngine

from semid_index.codes import CodeLayout


class Array(types.Indexable, TypeEngine[Any]):
    """``FLOAT[384]`` is ``Array(REAL(), 384)``, ``INTEGER[]`` is ``Array(INTEGER())``.

    A value with a size comes back as a tuple, others as lists. ``column[1]`` is the first element. Values bound with
    this type are cast to it, as DuckDB's distance functions need.
    """

    __visit_name__ = "duckdb_array"
    render_bind_cast = True
    operator_classes: ClassVar[Any] = getattr(types.ARRAY, "operator_classes", None)  # new in SQLAlchemy 2.1

    def __init__(self, item: TypeEngine[Any], size: int | None = None) -> None:
        self.item = item
        self.size = size

    class Comparator(types.Indexable.Comparator[Any]):
        """Gives arrays ``[]``."""

        def _setup_getitem(self, index: Any) -> Any:
            return operators.getitem, index, self.type.item  # type: ignore[attr-defined]

    comparator_factory = Comparator


class SizedInteger(types.Integer):
    """An integer type of DuckDB's own: ``SizedInteger("UTINYINT")``."""

    __visit_name__ = "duckdb_named"

    def __init__(self, name: str) -> None:
        self.name = name


class Other(TypeEngine[Any]):
    """Any other type of DuckDB, as it writes it: ``Other("STRUCT(a INTEGER, b VARCHAR)")``."""

    __visit_name__ = "duckdb_named"
    operator_classes: ClassVar[Any] = getattr(types.NullType, "operator_classes", None)

    def __init__(self, name: str) -> None:
        self.name = name


class Sid(types.BigInteger):
    """Semantic IDs packed into one integer. Knows how: aliases and subqueries of the column do, too."""

    def __init__(self, layout: CodeLayout) -> None:
        self.layout = layout


_INTEGERS = ("TINYINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT", "UHUGEINT")
_KNOWN: dict[str, TypeEngine[Any]] = {
    "BIGINT": types.BIGINT(),
    "BLOB": types.BLOB(),
    "BOOLEAN": types.BOOLEAN(),
    "DATE": types.DATE(),
    "DOUBLE": types.DOUBLE(),
    "FLOAT": types.REAL(),
    "INTEGER": types.INTEGER(),
    "INTERVAL": INTERVAL(),
    "JSON": types.JSON(),
    "SMALLINT": types.SMALLINT(),
    "TIME": types.TIME(),
    "TIMESTAMP": types.TIMESTAMP(),
    "TIMESTAMP WITH TIME ZONE": types.TIMESTAMP(timezone=True),
    "UUID": types.UUID(),
    "VARCHAR": types.VARCHAR(),
    **{name: SizedInteger(name) for name in _INTEGERS},
}


def parse_type(text: str) -> TypeEngine[Any]:
    """The type that DuckDB writes as ``FLOAT[384]`` or ``DECIMAL(10,2)``."""
    if array := re.fullmatch(r"(.+)\[(\d*)\]", text, re.DOTALL):
        return Array(parse_type(array[1]), int(array[2]) if array[2] else None)
    if decimal := re.fullmatch(r"DECIMAL\((\d+),(\d+)\)", text):
        return types.DECIMAL(int(decimal[1]), int(decimal[2]))
    return _KNOWN.get(text) or Other(text)
