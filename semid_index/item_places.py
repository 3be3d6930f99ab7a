"""Which item is at which place of the table ``items``, so that a filter over it needs no join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 122_880  # rows that DuckDB keeps and compresses together


@dataclass(frozen=True)
class ItemPlaces:
    """Which item was found at each place of the table ``items``, a place being DuckDB's ``rowid``.

    Users may change that table, and DuckDB may move what is in it: so each look-up compares the ids.
    """

    writes: int
    """How often the store had written when this was read. What it writes may change the row of an id."""
    ids: pa.Array
    """(places,) null where there was no item."""
    rows: NDArray[np.int64]
    """(places,)"""

    @classmethod
    def read(cls, found: pa.Table, writes: int) -> ItemPlaces:
        """From a table of ``place``, ``row`` and ``id``; empty if the places are so sparse that it would be large."""
        import pyarrow as pa

        places = found["place"].to_numpy()
        size = int(places.max(initial=-1)) + 1
        if size > 4 * len(places) + ROW_GROUP:
            found, places, size = found[:0], places[:0], 0
        order = np.full(size, -1, dtype=np.int64)
        order[places] = np.arange(len(places))
        rows = np.full(size, -1, dtype=np.int64)
        rows[places] = found["row"].to_numpy()
        return cls(writes, found["id"].combine_chunks().take(pa.array(order, mask=order < 0)), rows)

    def rows_of(self, found: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The rows of items, from a table of ``place`` and ``id``; and for which of them the place holds another id."""
        import pyarrow as pa
        import pyarrow.compute as pc

        places, ids = found["place"].to_numpy(), found["id"]
        moved = places >= len(self.rows)
        if moved.all() or ids.type != self.ids.type:
            return np.full(len(places), -1, dtype=np.int64), np.ones(len(places), dtype=bool)
        known = np.where(moved, 0, places)
        same = pc.fill_null(pc.equal(self.ids.take(pa.array(known)), ids), False)
        return self.rows[known], moved | ~same.to_numpy()
