"""What a user says, checked: ids, metadata, and how many of something."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from semid_index.errors import InvalidArgumentError, InvalidIdsError
from semid_index.records import IdType
from semid_index.tables import name_key

if TYPE_CHECKING:
    import pyarrow as pa

_NO_NAME = re.compile(r"__index_level_\d+__")  # what pyarrow calls the index of a data frame if that has no name


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number, or below ``least``."""
    if type(value) is int and value >= least:  # nearly always
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InvalidArgumentError(f"{name} must be a whole number, at least {least}, not {value!r}.")


def as_ids(ids: ArrayLike | Sequence[Any], *, count: int | None = None) -> pa.Array:
    """Ids as an Arrow array of int64 or string; mixed, missing and other types are refused."""
    import pyarrow as pa

    try:
        array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(_plain_ids(ids))
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        OverflowError,
        UnicodeEncodeError,
        TypeError,
    ) as error:
        raise InvalidIdsError(f"Ids must be all whole numbers or all strings: {str(error).splitlines()[0]}.") from error
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if count is not None and len(array) != count:
        raise InvalidIdsError(f"There are {len(array)} ids for {count} vectors. Give one id for each vector.")
    if array.null_count:
        raise InvalidIdsError(f"{array.null_count} ids are missing (None). Give every vector an id.")
    if pa.types.is_integer(array.type):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InvalidIdsError(f"Whole-number ids must fit in 64 bits with sign: {error}.") from error
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        return array.cast(pa.string())
    if not len(array):
        return array.cast(pa.int64())
    raise InvalidIdsError(f"Ids must be whole numbers or strings, not {array.type}.")


def _plain_ids(ids: Any) -> Any:
    if isinstance(ids, str | bytes | int | float | np.generic):
        raise InvalidIdsError(f"Ids must be a list or array of ids, not one {type(ids).__name__}.")
    if isinstance(ids, Set | Mapping):
        raise InvalidIdsError(f"Ids must be a list or array, in the order of the vectors, not a {type(ids).__name__}.")
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "U":
        return ids.tolist()
    if isinstance(ids, np.ndarray) and ids.ndim != 1:
        raise InvalidIdsError(f"Ids must be one-dimensional, not of shape {ids.shape}.")
    if isinstance(ids, np.ndarray) and not ids.dtype.isnative:
        return ids.astype(ids.dtype.newbyteorder("="))
    return ids if hasattr(ids, "__array__") or isinstance(ids, list) else list(ids)


def id_type(ids: pa.Array) -> IdType:
    """The type of checked ids."""
    import pyarrow as pa

    return "int" if pa.types.is_int64(ids.type) else "str"


def as_metadata(metadata: Any, ids: pa.Array) -> pa.Table | None:
    """The metadata as an Arrow table with one row for each vector, without a column ``id``."""
    import pyarrow as pa

    count = len(ids)
    if metadata is None:
        return None
    try:
        table = metadata if isinstance(metadata, pa.Table) else _without_row_labels(pa.table(metadata))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(
            f"metadata must be an Arrow table, a data frame or a dict of columns: {error}."
        ) from error
    if table.num_rows != count:
        raise InvalidArgumentError(
            f"metadata has {table.num_rows} rows for {count} vectors. Give one row for each vector, in the same order."
        )
    names = [name_key(name) for name in table.column_names]
    if unusable := [name for name in names if not name or "\0" in name]:
        raise InvalidArgumentError(f"A column of the metadata has the name {unusable[0]!r}. Give it another name.")
    if len(set(names)) != len(names):
        raise InvalidArgumentError(
            "Two columns of the metadata have the same name (SQL does not tell upper from lower case)."
        )
    if "id" in names:
        position = names.index("id")
        column = table.column(position).combine_chunks()
        if not as_ids(column).equals(ids):
            raise InvalidArgumentError(
                "The metadata has a column 'id' that differs from ids. Pass it as ids=, or rename it."
            )
        table = table.remove_column(position)
    return table


def _without_row_labels(table: pa.Table) -> pa.Table:
    """A table that may come from a pandas data frame, without the index of that if it has no name."""
    columns = (table.schema.pandas_metadata or {}).get("index_columns", [])  # dicts for those that are no columns
    return table.drop_columns([name for name in columns if isinstance(name, str) and _NO_NAME.fullmatch(name)])
