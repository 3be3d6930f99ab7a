"""Semantic IDs that others made, read from a table or an array: three layouts, one result.

================ ============================================ =========================================
layout           a row                                        found as
================ ============================================ =========================================
a column of lists ``[12, 153, 87, 21]``                       the only column of lists of integers
columns          ``12 | 153 | 87 | 21``                       columns named ``c1``, ``c2``, ... without a gap
a column of text ``12-153-87-21``                             the only column with such texts
================ ============================================ =========================================

Lists are looked for first, then columns, then text. Every row must have the same number of codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import MAX_CODEBOOK_SIZE, format_id
from semid_index.errors import InvalidArgumentError, InvalidCodesError
from semid_index.quantizer import Codes

if TYPE_CHECKING:
    import pyarrow as pa

LAYOUTS = "a column of lists of integers, columns c1, c2, ... of integers, or a column of texts such as '12-153-87-21'"
_TEXT_ID = re.compile(r"\d{1,9}(-\d{1,9})+", re.ASCII)
_PROBE_ROWS = 100  # a column of text is one of IDs if its first rows are


@dataclass(frozen=True)
class IdTable:
    """IDs, and the table that they were found in."""

    codes: Codes
    """(n, levels)"""
    table: pa.Table
    """All columns, those of the IDs too; no columns for IDs that came as an array."""
    name: str
    """Where the IDs were: a column, or "c1 to c4"."""


def codes_of_array(array: NDArray[Any], where: str) -> Codes:
    """An (n, levels) array of integers as codes, checked."""
    if array.ndim != 2 or not array.shape[1] or array.dtype.kind not in "iu":
        raise InvalidCodesError(
            f"{where}: IDs are integers of shape (n, levels), not {array.dtype} of shape {array.shape}."
        )
    bad = np.flatnonzero(((array < 0) | (array >= MAX_CODEBOOK_SIZE)).any(axis=1))
    if len(bad):
        raise InvalidCodesError(
            f"{where}: row {bad[0]} is {format_id(array[bad[0]].tolist())}. Codes lie in 0 to {MAX_CODEBOOK_SIZE - 1}."
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def read_npy_codes(path: Path) -> Codes:
    """The codes in a .npy file, (n, levels) integers."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidArgumentError(f"'{path}' cannot be read: {error}") from error
    return codes_of_array(array, str(path))


def find_codes(table: pa.Table, where: str, *, column: str | None = None) -> IdTable:
    """The IDs in a table.

    ``where`` is what errors call the table, ``column`` the column to take. Raises :class:`InvalidCodesError` where
    there are none, :class:`InvalidArgumentError` where it is not clear which are meant.
    """
    if column is not None:
        if table.column_names.count(column) != 1:
            raise InvalidArgumentError(f"{where} has no column '{column}'. It has {_listed(table.column_names)}.")
        return IdTable(_from_column(table[column], f"{where}, column '{column}'"), table, column)
    if b"semid_codebook_sizes" in (table.schema.metadata or {}):  # an export: columns of lists are metadata
        return _read_numbered(table, _numbered(table)[0], where)
    for found, read in _LAYOUTS:
        if candidates := found(table):
            if len(candidates) > 1:
                raise InvalidArgumentError(
                    f"{where}: IDs could be in {_listed(candidates)}. Choose a column with --ids-column."
                )
            return read(table, candidates[0], where)
    raise InvalidCodesError(f"{where}: no IDs among {_listed(table.column_names)}. They are {LAYOUTS}.")


# -- one function for each layout: which columns may be meant ----------------------------------------------------------


def _lists(table: pa.Table) -> list[str]:
    return [field.name for field in table.schema if _is_list_of_integers(field.type)]


def _numbered(table: pa.Table) -> list[str]:
    """``["c1 to c4"]`` if there are such columns."""
    import pyarrow.types as types

    levels = 0
    while (name := f"c{levels + 1}") in table.column_names and types.is_integer(table.schema.field(name).type):
        levels += 1
    return [f"c1 to c{levels}"] if levels else []


def _texts(table: pa.Table) -> list[str]:
    return [field.name for field in table.schema if _is_text(field.type) and _all_ids(table[field.name])]


def _all_ids(column: pa.ChunkedArray) -> bool:
    texts = column.slice(0, _PROBE_ROWS).to_pylist()
    return bool(texts) and all(text is not None and _TEXT_ID.fullmatch(text) for text in texts)


# -- and how it is read ------------------------------------------------------------------------------------------------


def _read_column(table: pa.Table, name: str, where: str) -> IdTable:
    return IdTable(_from_column(table[name], f"{where}, column '{name}'"), table, name)


def _read_numbered(table: pa.Table, name: str, where: str) -> IdTable:
    levels = int(name.rpartition("c")[2])
    columns = [table[f"c{level}"] for level in range(1, levels + 1)]
    if missing := [level for level, column in enumerate(columns, 1) if column.null_count]:
        raise InvalidCodesError(f"{where}: column 'c{missing[0]}' has rows without a code (null).")
    return IdTable(codes_of_array(np.column_stack([column.to_numpy() for column in columns]), where), table, name)


_LAYOUTS: tuple[tuple[Callable[[pa.Table], list[str]], Callable[[pa.Table, str, str], IdTable]], ...] = (
    (_lists, _read_column),
    (_numbered, _read_numbered),
    (_texts, _read_column),
)


def _from_column(column: pa.ChunkedArray, where: str) -> Codes:
    if column.null_count:
        raise InvalidCodesError(f"{where}: {column.null_count} rows have no ID (null). Leave those items out.")
    if _is_list_of_integers(column.type):
        return codes_of_array(_equal_rows(column, where), where)
    if _is_text(column.type):
        return codes_of_array(_parsed(column.to_pylist(), where), where)
    raise InvalidCodesError(f"{where} holds {column.type}. IDs are {LAYOUTS}.")


def _equal_rows(column: pa.ChunkedArray, where: str) -> NDArray[Any]:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy()
    values = pc.list_flatten(column)
    if values.null_count:
        raise InvalidCodesError(f"{where}: {values.null_count} codes are missing (null).")
    _check_lengths(lengths, where)
    return values.to_numpy().reshape(len(lengths), -1) if len(lengths) else np.empty((0, 1), dtype=np.int32)


def _parsed(texts: list[str], where: str) -> NDArray[np.int64]:
    wrong = next((row for row, text in enumerate(texts) if not _TEXT_ID.fullmatch(text)), None)
    if wrong is not None:
        raise InvalidCodesError(f"{where}: row {wrong} is {texts[wrong][:40]!r}. Write IDs as '12-153-87-21'.")
    rows = [[int(code) for code in text.split("-")] for text in texts]
    _check_lengths(np.array([len(row) for row in rows]), where)
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1 if rows else 1)


def _check_lengths(lengths: NDArray[np.integer], where: str) -> None:
    others = np.flatnonzero(lengths != lengths[:1])
    if len(others):
        raise InvalidCodesError(
            f"{where}: row 0 has {lengths[0]} codes, row {others[0]} has {lengths[others[0]]}. Give all equally many."
        )


def _is_list_of_integers(type_: pa.DataType) -> bool:
    import pyarrow.types as types

    lists = types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    return bool(lists and types.is_integer(type_.value_type))


def _is_text(type_: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_))


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "no columns"
