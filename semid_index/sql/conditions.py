"""Conditions of SQLAlchemy -> the text of a filter and its values, which are then checked like any other filter."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import BinaryExpression, BindParameter, ColumnClause, ColumnElement, Table, exc, false, true, types
from sqlalchemy.sql import operators, visitors

from semid_index.errors import FilterError
from semid_index.sql.dialect import Dialect

_DIALECT = Dialect(paramstyle="numeric_dollar")
_TABLES = ("items", "semantic_ids")
_USE = "Use columns of the tables 'items' and 'semantic_ids' from semid_index.sql.tables(index.engine())."


def filter_of(condition: Any, item_columns: Collection[str]) -> tuple[str, list[Any]]:
    """A condition over ``items`` and ``semantic_ids`` as the text of a filter, and the values for its parameters.

    ``item_columns``: the columns of ``items``; in a filter they hide columns of ``semantic_ids`` of the same name.
    Raises :class:`FilterError` for what is no condition, or speaks of other tables. What it says is not checked here.
    """
    element = _element(condition)
    hidden = {name.lower() for name in item_columns} - {"id"}
    for part in visitors.iterate(element):
        if isinstance(part, ColumnClause):
            _check_column(part, hidden)
    try:
        plain: Any = visitors.replacement_traverse(element, {}, _with_plain_value)
        compiled: Any = plain.compile(dialect=_DIALECT, compile_kwargs={"include_table": False})
    except exc.SQLAlchemyError as error:
        raise FilterError(f"The condition cannot be written as a filter: {_first_line(error)}") from error
    return str(compiled), [compiled.params[name] for name in compiled.positiontup or ()]


def _element(condition: Any) -> ColumnElement[Any]:
    """The condition as an expression of SQLAlchemy, also where an attribute of a mapped class is given."""
    element = condition.__clause_element__() if hasattr(condition, "__clause_element__") else condition
    if not isinstance(element, ColumnElement):
        raise FilterError(
            "A filter is SQL text or a mapping, or a condition of SQLAlchemy such as items.c.section == 'games'; got "
            f"{type(condition).__name__}."
        )
    if not isinstance(
        element.type, types.Boolean | types.NullType
    ):  # functions that SQLAlchemy does not know have none
        raise FilterError(f"'{_shown(element)}' is no condition: compare it with something.")
    return element


def _check_column(column: ColumnClause[Any], hidden: Collection[str]) -> None:
    table = column.table
    if table is None:
        return  # a name alone, which is checked as in a text
    if not isinstance(table, Table) or table.name not in _TABLES or table.schema not in (None, "main"):
        name = f"{getattr(table, 'fullname', getattr(table, 'name', table))}.{column.name}"
        raise FilterError(f"'{_shown(name)}' is not allowed in a filter. {_USE}")
    if table.name == "semantic_ids" and column.name.lower() in hidden:
        raise FilterError(
            f"'{_shown(column)}' is not allowed in a filter, because the metadata have a column of this name, too."
        )


def _with_plain_value(element: Any, **_: Any) -> ColumnElement[Any] | None:
    """A parameter with its value as DuckDB takes it, a list for IN as one value; None for what can stay as it is."""
    if isinstance(element, BinaryExpression) and element.operator in (operators.in_op, operators.not_in_op):
        listed = element.right
        if (
            isinstance(listed, BindParameter)
            and listed.expanding
            and not listed.required
            and not listed.effective_value
        ):
            return false() if element.operator is operators.in_op else true()  # of NULL, too, as SQLAlchemy has it
    if not isinstance(element, BindParameter):
        return None
    if element.required:
        raise FilterError(f"The parameter '{_shown(element.key)}' has no value: write the value into the condition.")
    value: Any = element.effective_value
    process: Any = element.type.dialect_impl(_DIALECT).bind_processor(_DIALECT)
    if process is not None:
        value = [process(each) for each in value] if element.expanding else process(value)
    elif element.expanding:
        value = list(value)
    return BindParameter(None, value, type_=types.NullType(), unique=True)


def _shown(part: Any) -> str:
    text = " ".join(str(part).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
