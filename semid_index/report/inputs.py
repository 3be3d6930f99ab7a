"""What a quality report compares IDs with: stored vectors, columns of metadata, and an earlier version of the IDs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError, InvalidIdsError
from semid_index.lookup import Places
from semid_index.quantizer import Codes, Vectors
from semid_index.rerank import MemoryVectors
from semid_index.store import Store
from semid_index.vectors import VectorSource

if TYPE_CHECKING:
    import pyarrow as pa

LABELS_CHOSEN = 3
MOST_VALUES = 1_000  # of a column that is chosen by itself; more are names rather than labels
_LARGEST_SHARE = 0.9  # of the items may have the same value
_SEPARATOR = " > "  # between the parts of a label that is a list, such as a path of categories


class StoredVectors(VectorSource):
    """The vectors that an index stores, in the order of its rows; in memory as they are stored."""

    def __init__(self, store: Store) -> None:
        rows = np.sort(store.codes().rows)
        places = Places(rows, range(store.next_row))
        self._vectors = MemoryVectors.load(store, places, store.config.metric)
        self.rows, self.dim = len(rows), store.config.dim
        self.description = "stored vectors"

    def batches(self, size: int) -> Iterator[Vectors]:
        """See :class:`VectorSource`."""
        for start in self._starts(size):
            yield self._vectors.take(slice(start, start + size))


def choose_labels(schema: pa.Schema, value_counts: Callable[[str], Sequence[int]]) -> list[str]:
    """Up to three columns with 2 to 1,000 different values: texts, lists and booleans before whole numbers.

    ``value_counts`` counts the items of each value of a column; it may stop after 1,001 values. Left out are columns
    where nearly all items have the same value, and those where most have one of their own: such are names.
    """
    kinds = [(_kind(field.type), place, field.name) for place, field in enumerate(schema)]
    chosen: list[str] = []
    for _, _, name in sorted((kind, place, name) for kind, place, name in kinds if kind is not None):
        if len(chosen) < LABELS_CHOSEN and _tells_apart(value_counts(name)):
            chosen.append(name)
    return chosen


def _tells_apart(counts: Sequence[int]) -> bool:
    some = 2 <= len(counts) <= MOST_VALUES
    return some and 2 * len(counts) <= sum(counts) and max(counts) <= _LARGEST_SHARE * sum(counts)


def value_counts(column: pa.ChunkedArray) -> list[int]:
    """How many rows have each value of a column, missing ones left out."""
    import pyarrow.compute as pc

    counts = pc.value_counts(as_label(column).drop_null())
    return [] if not len(counts) else list(counts.field("counts").to_pylist())


def label_columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """All columns of a table as labels: one value for each row."""
    return {name: as_label(table[name]) for name in table.column_names}


def one_column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """A column, if there is one of this name."""
    if table.column_names.count(name) != 1:
        listed = ", ".join(f"'{known}'" for known in table.column_names) or "none"
        raise InvalidArgumentError(f"{where} has no column '{name}'. It has {listed}.")
    return table[name]


def as_label(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column with one plain value a row: a list, such as a path of categories, becomes one text."""
    import pyarrow as pa

    if not _is_list(column.type):
        return column
    texts = [None if parts is None else _SEPARATOR.join(map(str, parts)) for parts in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def joined(table: pa.Table, ids: pa.ChunkedArray, column: str, where: str) -> pa.Table:
    """The rows of a table that belong to some ids, in their order; nothing but nulls for ids that it lacks."""
    import pyarrow as pa

    theirs = one_column(table, column, where)
    places = places_of(ids, theirs, where)
    rows = pa.array(np.where(places < 0, 0, places), mask=places < 0)
    return table.take(rows)


def places_of(ids: Any, among: Any, where: str) -> NDArray[np.int64]:
    """Where each id stands among others; -1 where it does not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if ids.type != among.type:
        try:
            among = among.cast(ids.type)
        except pa.ArrowException as error:
            raise InvalidIdsError(f"{where} has ids of type {among.type}, not {ids.type}. Convert them.") from error
    if pc.count_distinct(among, mode="all").as_py() != len(among):
        raise InvalidIdsError(f"{where} has an id more than once. Each item needs one row.")
    if isinstance(among, pa.ChunkedArray):
        among = among.combine_chunks()
    found = pc.fill_null(pc.index_in(ids, value_set=among), -1)
    return np.asarray(found.to_numpy(), dtype=np.int64)


def earlier_codes(ids: Any, old_ids: Any, old_codes: Codes, where: str) -> Codes:
    """The codes that items had before, in the order of their ids; -1 where an item is new."""
    places = places_of(ids, old_ids, where)
    if not (places >= 0).any():
        raise InvalidIdsError(f"{where} has none of the items: no id is in both versions, so nothing can be compared.")
    return np.where(places[:, None] >= 0, old_codes[places], np.int32(-1))


def _kind(type_: pa.DataType) -> int | None:
    """0 for what names something, 1 for whole numbers, None for what is no label by itself."""
    import pyarrow.types as types

    if types.is_dictionary(type_):
        type_ = type_.value_type
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_boolean)
    if any(is_kind(type_) for is_kind in texts):
        return 0
    if _is_list(type_) and _kind(type_.value_type) == 0:
        return 0
    return 1 if types.is_integer(type_) else None


def _is_list(type_: pa.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_))
